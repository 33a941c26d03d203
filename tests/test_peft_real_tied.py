"""Models of transformers with a tied head, adapted by the real PEFT and here: the same numbers, or an error. Needs torch and peft.

Parameters are a dict of PyTorch's names, in its layout, so that one function is a model and its own table of names.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from peft_case import promotion as promotion
from peft_models import attend, rms

import jlora
import jlora.peft

MISSING = [name for name in ("torch", "peft", "transformers") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.filterwarnings("ignore"),  # torch's and PEFT's own
]

if not MISSING:
    import torch
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

V, D, HEADS = 23, 12, 3
IDS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def dense(p, name, x):
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def norm(p, name, x, eps=1e-5):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * p[f"{name}.weight"] + p[f"{name}.bias"]


def split(x):
    return x.reshape(*x.shape[:2], HEADS, -1)


def gpt2(p, ids):
    x = p["transformer.wte.weight"][ids] + p["transformer.wpe.weight"][: ids.shape[1]][None]
    conv1d = lambda name, x: x @ p[f"{name}.weight"] + p[f"{name}.bias"]  # noqa: E731
    h = "transformer.h.0"
    q, k, v = map(split, jnp.split(conv1d(f"{h}.attn.c_attn", norm(p, f"{h}.ln_1", x)), 3, axis=-1))
    x = x + conv1d(f"{h}.attn.c_proj", attend(q, k, v).reshape(x.shape))
    y = jax.nn.gelu(conv1d(f"{h}.mlp.c_fc", norm(p, f"{h}.ln_2", x)), approximate=True)
    x = x + conv1d(f"{h}.mlp.c_proj", y)
    return norm(p, "transformer.ln_f", x) @ p["transformer.wte.weight"].T


def opt(p, ids):
    m = "model.decoder"
    x = p[f"{m}.embed_tokens.weight"][ids] + p[f"{m}.embed_positions.weight"][2 : ids.shape[1] + 2][None]
    h = f"{m}.layers.0"
    y = norm(p, f"{h}.self_attn_layer_norm", x)
    q, k, v = (split(dense(p, f"{h}.self_attn.{n}_proj", y)) for n in "qkv")
    x = x + dense(p, f"{h}.self_attn.out_proj", attend(q, k, v).reshape(x.shape))
    x = x + dense(p, f"{h}.fc2", jax.nn.relu(dense(p, f"{h}.fc1", norm(p, f"{h}.final_layer_norm", x))))
    return norm(p, f"{m}.final_layer_norm", x) @ p[f"{m}.embed_tokens.weight"].T


def bert(p, ids):
    e, eps = "bert.embeddings", 1e-12
    x = p[f"{e}.word_embeddings.weight"][ids] + p[f"{e}.token_type_embeddings.weight"][jnp.zeros_like(ids)]
    x = norm(p, f"{e}.LayerNorm", x + p[f"{e}.position_embeddings.weight"][: ids.shape[1]][None], eps)
    h = "bert.encoder.layer.0"
    q, k, v = (split(dense(p, f"{h}.attention.self.{n}", x)) for n in ("query", "key", "value"))
    y = dense(p, f"{h}.attention.output.dense", attend(q, k, v, causal=False).reshape(x.shape))
    x = norm(p, f"{h}.attention.output.LayerNorm", x + y, eps)
    y = dense(p, f"{h}.output.dense", jax.nn.gelu(dense(p, f"{h}.intermediate.dense", x), approximate=False))
    x = norm(p, f"{h}.output.LayerNorm", x + y, eps)
    head = "cls.predictions"
    y = jax.nn.gelu(dense(p, f"{head}.transform.dense", x), approximate=False)
    y = norm(p, f"{head}.transform.LayerNorm", y, eps)
    return y @ p[f"{e}.word_embeddings.weight"].T + p[f"{head}.bias"]


def t5(p, ids):
    def attention(name, x, y, bias):
        q, k, v = (split(s @ p[f"{name}.{n}.weight"].T) for n, s in zip("qkv", (x, y, y), strict=True))
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias)
        return jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(*x.shape[:2], -1) @ p[f"{name}.o.weight"].T

    def feed(name, x):
        y = jax.nn.relu(rms(x, p[f"{name}.layer_norm.weight"]) @ p[f"{name}.DenseReluDense.wi.weight"].T)
        return x + y @ p[f"{name}.DenseReluDense.wo.weight"].T

    def biases(name, buckets):
        return p[f"{name}.layer.0.SelfAttention.relative_attention_bias.weight"][buckets].transpose(2, 0, 1)[None]

    q, k = np.arange(ids.shape[1])[:, None], np.arange(ids.shape[1])[None]
    e, d = "encoder.block.0", "decoder.block.0"
    x = p["shared.weight"][ids]
    y = rms(x, p[f"{e}.layer.0.layer_norm.weight"])
    x = x + attention(f"{e}.layer.0.SelfAttention", y, y, biases(e, (k > q) * 16 + abs(k - q)))
    memory = rms(feed(f"{e}.layer.1", x), p["encoder.final_layer_norm.weight"])
    x = p["shared.weight"][ids[:, ::-1]]
    y = rms(x, p[f"{d}.layer.0.layer_norm.weight"])
    bias = biases(d, np.maximum(q - k, 0)) + jnp.where(q >= k, 0.0, -1e30)[None, None]
    x = x + attention(f"{d}.layer.0.SelfAttention", y, y, bias)
    y = rms(x, p[f"{d}.layer.1.layer_norm.weight"])
    x = x + attention(f"{d}.layer.1.EncDecAttention", y, memory, jnp.zeros((1, 1, 1, 1)))
    x = rms(feed(f"{d}.layer.2", x), p["decoder.final_layer_norm.weight"]) * D**-0.5
    return x @ p["shared.weight"].T


SIZES = {"vocab_size": V, "num_hidden_layers": 1, "num_attention_heads": HEADS}
BUILD = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=V, n_embd=D, n_layer=1, n_head=HEADS, n_positions=16)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SIZES, hidden_size=D, word_embed_proj_dim=D, ffn_dim=20, max_position_embeddings=16)
    ),
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(**SIZES, hidden_size=D, intermediate_size=20, max_position_embeddings=16)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=V, d_model=D, d_kv=4, d_ff=20, num_layers=1, num_heads=HEADS)
    ),
}
MODELS = {  # the function, the table, the head, and something else to adapt
    "gpt2": (gpt2, "transformer.wte", "lm_head", "c_attn"),
    "opt": (opt, "model.decoder.embed_tokens", "lm_head", "v_proj"),
    "bert": (bert, "bert.embeddings.word_embeddings", "cls.predictions.decoder", "value"),
    "t5": (t5, "shared", "lm_head", "v"),
}
every = pytest.mark.parametrize("kind", MODELS)


def torch_base(kind):
    torch.manual_seed(0)
    return BUILD[kind]().eval()


class Here:
    """The same model here."""

    def __init__(self, kind):
        self.fn, self.table, self.head, self.other = MODELS[kind]
        self.leaf = f"{self.table}.weight"
        base = torch_base(kind)
        tensors = {n: x for n, x in base.named_parameters() if n != f"{self.head}.weight"}
        self.params = {n: jnp.asarray(x.detach().numpy()) for n, x in tensors.items()}
        self.sites = jlora.sites(self.fn, self.params, IDS)
        self.names = {self.leaf: (self.leaf, f"{self.head}.weight")}
        np.testing.assert_allclose(self.fn(self.params, IDS), logits(kind, base), atol=1e-5)

    def load(self, folder, names=None):
        return jlora.peft.load(folder, self.sites, names=names or self.names, params=self.params)

    def outputs(self, lora):
        return jlora.wrap(self.fn)(self.params, lora, IDS)

    def random(self, **rule):
        rules = [jlora.LoRA(rank=2, alpha=3, targets=self.leaf, **rule), jlora.LoRA(rank=1, targets=self.others)]
        lora = jlora.init(jax.random.key(0), self.params, self.sites, rules)
        leaves, tree = jax.tree.flatten(lora)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        new = [x + jax.random.normal(k, x.shape) / 3 for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(tree, new)

    def others(self, site):
        return site.path.endswith(f".{self.other}.weight")


def logits(kind, model):
    ids = torch.as_tensor(IDS)
    with torch.no_grad():
        more = {"decoder_input_ids": ids.flip(1)} if kind == "t5" else {}
        return model.eval()(input_ids=ids, **more).logits.numpy()


def trained(kind, folder, **options):
    """An adapter that PEFT made and saved, and what PEFT computes with the file."""
    model = get_peft_model(torch_base(kind), LoraConfig(r=2, lora_alpha=5, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for x in (x for x in model.parameters() if x.requires_grad):
            x.add_(torch.randn_like(x) / 3)
    model.save_pretrained(folder)
    return in_peft(kind, folder)


def in_peft(kind, folder):
    return logits(kind, PeftModel.from_pretrained(torch_base(kind), folder))


@every
@pytest.mark.parametrize("only", ["lookup", "linear"])
def test_an_adapter_of_one_module_changes_one_use(kind, only, tmp_path):
    here = Here(kind)
    module = here.table if only == "lookup" else here.head
    want = trained(kind, tmp_path / "a", target_modules=[module, here.other])
    if kind == "t5" and only == "lookup":
        with pytest.raises(ValueError, match="The adapter of 'shared' has no effect in PEFT"):
            here.load(tmp_path / "a")
        return
    lora = here.load(tmp_path / "a")
    assert lora[here.leaf].only == only
    np.testing.assert_allclose(here.outputs(lora), want, atol=2e-5)
    if only == "lookup":
        alone = here.load(tmp_path / "a", {here.leaf: here.leaf})
        jax.tree.map(np.testing.assert_array_equal, alone, lora)


@every
@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("only", ["lookup", "linear", None])
def test_peft_computes_what_is_saved(kind, only, portable, tmp_path):
    here = Here(kind)
    lora = here.random(only=only)
    save = lambda: jlora.peft.save(tmp_path / "a", lora, names=here.names, portable=portable)  # noqa: E731
    if kind == "t5" and only != "linear":
        with pytest.raises(ValueError, match=r"PEFT's adapter of 'shared' has no effect.*\n.*layout='in_out'"):
            save()
        return
    save()
    np.testing.assert_allclose(in_peft(kind, tmp_path / "a"), here.outputs(lora), atol=2e-5)
    again = here.load(tmp_path / "a")
    assert again[here.leaf].only == (only or "")
    np.testing.assert_allclose(here.outputs(again), here.outputs(lora), atol=2e-5)


@every
def test_both_modules_apart_are_refused(kind, tmp_path):
    here = Here(kind)
    trained(kind, tmp_path / "a", target_modules=[here.table, here.head])
    with pytest.raises(ValueError, match=r"were adapted apart|has no effect in PEFT"):
        here.load(tmp_path / "a")


def test_weights_that_peft_ties_are_for_all_uses(tmp_path):
    here = Here("opt")
    want = trained("opt", tmp_path / "a", target_modules=["embed_tokens"], ensure_weight_tying=True)
    lora = here.load(tmp_path / "a")
    assert lora[here.leaf].only == ""
    np.testing.assert_allclose(here.outputs(lora), want, atol=2e-5)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_peft_ties_only_what_has_one_of_two_names(kind, tmp_path):
    here = Here(kind)
    want = trained(kind, tmp_path / "a", target_modules=[here.table], ensure_weight_tying=True)
    lora = here.load(tmp_path / "a")
    assert lora[here.leaf].only == "lookup"
    np.testing.assert_allclose(here.outputs(lora), want, atol=2e-5)
    options = {"target_modules": [here.other], "modules_to_save": [here.table], "ensure_weight_tying": True}
    trained(kind, tmp_path / "b", **options)
    with pytest.raises(ValueError, match="replaces only some of its weights in PyTorch"):
        here.load(tmp_path / "b")


@every
@pytest.mark.parametrize("whole", ["table", "head", "both"])
def test_modules_that_are_saved_whole(kind, whole, tmp_path):
    """PEFT's copies of two tied modules are trained apart."""
    here = Here(kind)
    saved = [here.table, here.head] if whole == "both" else [getattr(here, whole)]
    trained(kind, tmp_path / "a", target_modules=[here.other], modules_to_save=saved)
    for names in (here.names, {here.leaf: here.leaf} if whole == "table" else here.names):
        with pytest.raises(ValueError, match=r"replaces only some|has two values|has no effect|are for nothing"):
            here.load(tmp_path / "a", names)


@every
def test_a_table_that_is_trained_outright_is_saved_for_both_modules(kind, tmp_path):
    here = Here(kind)
    rules = [jlora.Full(targets=here.leaf), jlora.LoRA(rank=2, targets=here.others)]
    lora = jlora.init(jax.random.key(0), here.params, here.sites, rules)
    lora = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape) / 3, lora)
    options = {"sites": here.sites, "params": here.params}
    with pytest.raises(ValueError, match=r"Name both|has no effect"):
        jlora.peft.save(tmp_path / "b", lora, **options)
    if kind == "t5":
        with pytest.raises(ValueError, match="PEFT's adapter of 'shared' has no effect"):
            jlora.peft.save(tmp_path / "a", lora, names=here.names, **options)
        return
    names = here.names | ({"cls.predictions.bias": "cls.predictions.decoder.bias"} if kind == "bert" else {})
    jlora.peft.save(tmp_path / "a", lora, names=names, **options)
    np.testing.assert_allclose(in_peft(kind, tmp_path / "a"), here.outputs(lora), atol=2e-5)


@every
@pytest.mark.parametrize("tokens", ["table", "head"])
def test_trained_tokens_follow_a_tie_from_the_table_and_not_from_the_head(kind, tokens, tmp_path):
    here = Here(kind)
    ids = {getattr(here, tokens): [1, 4]}
    want = trained(kind, tmp_path / "a", target_modules=[here.other], trainable_token_indices=ids)
    if tokens == "head":
        with pytest.raises(
            ValueError, match=r"replaces only some of its weights in PyTorch, not [\w.]+\.\n.*leaf for each\.$"
        ):
            here.load(tmp_path / "a")
        return
    for names in (here.names, {here.leaf: here.leaf}):
        np.testing.assert_allclose(here.outputs(here.load(tmp_path / "a", names)), want, atol=2e-5)
