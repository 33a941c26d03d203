"""Adapters made here, in the real PEFT: its outputs are ours. Needs torch, peft and transformers, which only CI installs for this."""

import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_case import FOLDER, base_of, edit, expected
from peft_case import promotion as promotion
from peft_models import PORTS, llama
from safetensors.numpy import load_file as numpy_file

import jlora
import jlora.export
import jlora.peft

MISSING = [name for name in ("torch", "peft", "transformers") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.filterwarnings("ignore"),  # torch's and PEFT's own
]

if not MISSING:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file

ATTENTION = "layers/[qkvo]"


def adapters(port, sites, params, rules, seed=7):
    lora = jlora.init(jax.random.key(seed), params, sites, rules)
    leaves, tree = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [x + jax.random.normal(k, x.shape) / 4 for k, x in zip(keys, leaves, strict=True)])


CASES = {
    "llama": [jlora.LoRA(rank=3, alpha=7, dropout=0.1)],
    "llama, ranks and scales that differ": (
        "llama",
        [jlora.LoRA(rank=4, alpha=3, rslora=True, targets=ATTENTION), jlora.LoRA(rank=2, alpha=9)],
    ),
    "llama_embedding": [jlora.LoRA(rank=3, targets=["embed", "head", "layers/q"])],
    "llama_tied": [jlora.LoRA(rank=3, targets=["embed", "layers/v"])],
    "llama, whole leaves": (
        "llama",
        [jlora.Full(targets=["head", "layers/norm_1", "norm"]), jlora.LoRA(rank=2, targets=ATTENTION)],
    ),
    "gpt2": [jlora.LoRA(rank=3, alpha=5, targets=".*/c_.*/kernel")],
    "gpt2, biases": (
        "gpt2",
        [jlora.Full(targets=".*/c_attn/bias"), jlora.LoRA(rank=3, alpha=5, targets=".*/c_attn/kernel")],
    ),
    "gpt2, all biases": (
        "gpt2",
        [jlora.Full(targets=".*/bias"), jlora.LoRA(rank=3, alpha=5, targets=".*/c_attn/kernel")],
    ),
    "bert": [jlora.Full(targets=".*/classifier/.*"), jlora.LoRA(rank=3, targets=".*/(query|value|dense)/kernel")],
    "bert, half of a module": (
        "bert",
        [jlora.Full(targets=".*/classifier/kernel"), jlora.LoRA(rank=3, targets=".*/(query|value)/kernel")],
    ),
    "vision": [jlora.LoRA(rank=3, alpha=5, dropout=0.1)],
    "vision, head": ("vision", [jlora.LoRA(rank=2), jlora.LoRA(rank=3, targets=["head/kernel"])]),
    "experts": [jlora.LoRA(rank=2, alpha=5, targets="experts/.*"), jlora.LoRA(rank=3, targets="head/kernel")],
    "experts alone": ("experts", [jlora.LoRA(rank=2, alpha=5, targets="experts/.*")]),
    "nested": [
        jlora.Full(targets=["moe/bias", "moe/gate/bias", "moe/tail/.*"]),
        jlora.LoRA(rank=2, alpha=5, targets=["moe/up", "moe/down"]),
        jlora.LoRA(rank=3, targets=["moe/gate/kernel", "head/kernel"]),
    ],
    "nested, one parameter": ("nested", [jlora.LoRA(rank=2, targets=["moe/down", "moe/gate/kernel"])]),
    "nested, another parameter": (
        "nested",
        [jlora.Full(targets="moe/bias"), jlora.LoRA(rank=2, targets=["moe/up", "moe/tail/0/kernel"])],
    ),
    "attention": [
        jlora.LoRA(rank=2, alpha=5, targets="attn/in_proj/kernel"),
        jlora.Full(targets="attn/out_proj/bias"),
        jlora.LoRA(rank=3, targets="head/kernel"),
    ],
}


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_peft_computes_what_we_compute(name, portable, tmp_path):
    kind, rules = (name, CASES[name]) if isinstance(CASES[name], list) else CASES[name]
    port, x = PORTS[kind](), expected(kind)["x"]
    sites, params = base_of(kind, port, x)
    lora = adapters(port, sites, params, rules)
    jlora.peft.save(tmp_path / "a", lora, names=port.names, sites=sites, params=params, portable=portable)
    ours = jlora.wrap(port.fn)(params, lora, x)
    assert float(abs(ours - port.fn(params, x)).max()) > 0.05
    np.testing.assert_allclose(in_peft(kind, x, tmp_path / "a"), ours, atol=1e-5)
    again = jlora.peft.load(tmp_path / "a", sites, names=port.names, params=params)
    np.testing.assert_allclose(jlora.wrap(port.fn)(params, again, x), ours, atol=1e-5)


@pytest.mark.parametrize(("kind", "targets"), [("vision", "all-linear"), ("llama_embedding", ["embed", "layers/q"])])
def test_peft_trains_with_the_rate_that_is_written(kind, targets, tmp_path):
    port, x = PORTS[kind](), expected(kind)["x"]
    sites, params = base_of(kind, port, x)
    lora = adapters(port, sites, params, [jlora.LoRA(rank=2, dropout=0.25, targets=targets)])
    jlora.peft.save(tmp_path / "a", lora, names=port.names)
    model = PeftModel.from_pretrained(torch_base(kind), tmp_path / "a")
    layers = [m.lora_dropout["default"] for m in model.modules() if hasattr(m, "lora_dropout")]
    assert layers
    assert {layer.p for layer in layers} == {0.25}
    again = jlora.peft.load(tmp_path / "a", sites, names=port.names, params=params)
    assert {path: x.dropout for path, x in again.items()} == {path: 0.0 if path == "embed" else 0.25 for path in lora}


def test_rows_of_rotary_pairs_are_exchanged(tmp_path):
    port, x = llama(pairs=True), expected("llama")["x"]
    sites, params = base_of("llama", port, x)
    np.testing.assert_allclose(port.fn(params, x), expected("llama")["before"], atol=1e-5)
    lora = adapters(port, sites, params, [jlora.LoRA(rank=3, targets=ATTENTION)])
    jlora.peft.save(tmp_path / "a", lora, names=port.names)
    np.testing.assert_allclose(in_peft("llama", x, tmp_path / "a"), jlora.wrap(port.fn)(params, lora, x), atol=1e-5)


def test_a_merged_export_is_the_model_of_transformers(tmp_path):
    import transformers

    port, x = PORTS["llama"](), expected("llama")["x"]
    sites, params = base_of("llama", port, x)
    lora = adapters(port, sites, params, [jlora.LoRA(rank=3)])
    config = torch_base("llama").config.to_dict()
    jlora.export.save(tmp_path / "m", params, lora, sites=sites, names=port.names, config=config, shard_bytes=4000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        theirs = model(torch.as_tensor(np.array(x))).logits.numpy()
    np.testing.assert_allclose(theirs, port.fn(jlora.merge(params, lora), x), atol=1e-5)


def torch_base(kind):
    import make_peft_fixtures as make

    torch.manual_seed(0)
    model = make.CASES[kind][0]().eval()
    weights = load_file(FOLDER / kind / "base.safetensors")
    lacking, unknown = model.load_state_dict(weights, strict=False)
    assert set(lacking) <= {"lm_head.weight"}
    assert not unknown
    if lacking:
        model.tie_weights()
    return model


def tensors_of(folder):
    return numpy_file(folder / "adapter_model.safetensors")


def in_peft(kind, x, folder):
    import make_peft_fixtures as make

    model = PeftModel.from_pretrained(torch_base(kind), folder).eval()
    unused = [n for n, p in model.named_parameters() if "lora_" in n and not bool(p.any())]
    with torch.no_grad():
        out = make.outputs(model, torch.as_tensor(np.array(x)))
    assert not unused, unused  # PEFT only warns of what a file does not have
    return jnp.asarray(out.numpy())


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_square_experts_in_either_layout(layout, is_transposed, tmp_path):
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(3, 4, 4))
            if is_transposed:
                self.is_transposed = True

        def forward(self, x):
            return torch.einsum("td,edh->eth" if layout == "in_out" else "td,ehd->eth", x, self.w).sum(0)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = Experts()

        def forward(self, x):
            return self.moe(x)

    if is_transposed and layout == "out_in":
        pytest.skip("a module that says so stores (experts, in, out)")
    torch.manual_seed(0)
    base = Model()
    w = base.moe.w.detach().numpy()
    params = {"w": jnp.asarray(w if layout == "in_out" else w.swapaxes(1, 2))}
    fn = lambda p, x: jnp.einsum("etd,edh->eth", jnp.broadcast_to(x, (3, *x.shape)), p["w"]).sum(0)  # noqa: E731
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4)), jnp.float32)
    sites = jlora.sites(fn, params, x)
    names = {"w": jlora.peft.Weight("moe.w", layout, is_transposed=is_transposed)}
    lora = adapters(None, sites, params, [jlora.LoRA(rank=2, targets="w")])
    jlora.peft.save(tmp_path / "a", lora, names=names)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, tmp_path / "a").eval()(torch.as_tensor(np.array(x))).numpy()
    np.testing.assert_allclose(theirs, jlora.wrap(fn)(params, lora, x), atol=1e-4)
    torch.manual_seed(0)
    model = get_peft_model(
        Model(), LoraConfig(r=2, target_modules=[], target_parameters=["moe.w"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "b")
    again = jlora.peft.load(tmp_path / "b", sites, names=names)
    with torch.no_grad():
        theirs = model.eval()(torch.as_tensor(np.array(x))).numpy()
    np.testing.assert_allclose(jlora.wrap(fn)(params, again, x), theirs, atol=1e-4)


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_rotary_pairs_of_parameters_are_exchanged_as_merged_ones_are(layout, experts, tmp_path):
    class Held(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros([experts, 8, 8] if experts else [8, 8]))

        def forward(self, x):
            return torch.einsum("td,...dh->...th" if layout == "in_out" else "td,...hd->...th", x, self.w)

    def there(folder):
        model = torch.nn.Sequential(Held())
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model

    e = "e" if experts else ""
    fn = lambda p, x: jnp.einsum(f"{e}td,{e}dh->{e}th", jnp.broadcast_to(x, (*p["w"].shape[:-2], 5, 8)), p["w"])  # noqa: E731
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((experts, 8, 8) if experts else (8, 8)), jnp.float32)}
    x = rng.standard_normal((5, 8)).astype(np.float32)
    sites = jlora.sites(fn, params, x)
    names = {"w": jlora.peft.Weight("0.w", layout, rotary_heads=2, nesting=0)}
    lora = adapters(None, sites, params, [jlora.LoRA(rank=2, targets="w")])
    jlora.peft.save(tmp_path / "a", lora, names=names)
    jlora.export.save(tmp_path / "base", params, sites=sites, names=names)
    jlora.export.save(tmp_path / "merged", params, lora, sites=sites, names=names)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(there(tmp_path / "base"), tmp_path / "a").eval()(torch.as_tensor(x)).numpy()
        merged = there(tmp_path / "merged")(torch.as_tensor(x)).numpy()
    halves = np.array([0, 2, 1, 3, 4, 6, 5, 7])
    np.testing.assert_allclose(theirs, jlora.wrap(fn)(params, lora, x)[..., halves], atol=1e-4)
    np.testing.assert_allclose(theirs, merged, atol=1e-4)


@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_transposed_convolutions_are_pytorchs(transpose_kernel, stride, tmp_path):
    """Merged into a state_dict, and trained outright beside factors of the head."""
    import torch
    from peft import PeftModel

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.ConvTranspose2d(3, 5, (2, 3), stride)
            self.head = torch.nn.Linear(5, 4)

        def forward(self, x):
            return self.head(torch.tanh(self.up(x)).mean((2, 3)))

    up = nn.ConvTranspose(5, (2, 3), stride, "VALID", transpose_kernel=transpose_kernel)
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 6))
    rows = jnp.moveaxis(x, 1, -1)
    params = {
        "up": up.init(jax.random.key(1), rows)["params"],
        "head": {"kernel": jnp.ones((5, 4)), "bias": jnp.ones(4)},
    }

    def fn(p, x):
        y = jnp.tanh(up.apply({"params": p["up"]}, x)).mean((1, 2))
        return y @ p["head"]["kernel"] + p["head"]["bias"]

    def theirs(model):
        with torch.no_grad():
            return model.eval()(torch.as_tensor(np.array(x))).numpy()

    sites = jlora.sites(fn, params, rows)
    names = {"up/kernel": jlora.peft.Weight("up.weight", transposed="as_is" if transpose_kernel else "reversed")}
    rules = [jlora.Full(targets="up/.*"), jlora.LoRA(rank=2, targets="head/kernel")]
    lora = adapters(None, sites, params, rules)
    ours = jlora.wrap(fn)(params, lora, rows)
    jlora.export.save(tmp_path / "m", params, lora, sites=sites, names=names)
    jlora.export.save(tmp_path / "base", params, sites=sites, names=names)
    model, base = Model(), Model()
    model.load_state_dict(load_file(tmp_path / "m" / "model.safetensors"))
    base.load_state_dict(load_file(tmp_path / "base" / "model.safetensors"))
    np.testing.assert_allclose(theirs(base), fn(params, rows), atol=1e-5)
    np.testing.assert_allclose(theirs(model), ours, atol=1e-5)
    jlora.peft.save(tmp_path / "a", lora, names=names, sites=sites)
    np.testing.assert_allclose(theirs(PeftModel.from_pretrained(base, tmp_path / "a")), ours, atol=1e-5)
    again = jlora.peft.load(tmp_path / "a", sites, names=names)
    np.testing.assert_allclose(jlora.wrap(fn)(params, again, rows), ours, atol=1e-5)
    low = adapters(None, sites, params, [jlora.LoRA(rank=2, targets=["up/kernel", "head/kernel"])])
    with pytest.raises(ValueError, match="transposed"):
        jlora.peft.save(tmp_path / "b", low, names=names)


def test_a_checkpoint_of_transformers_with_buffers(tmp_path):
    """BERT as it was long saved, with ``position_ids`` among its weights; its configuration is an object or a dict."""
    import torch
    from safetensors.torch import save_file

    port, x = PORTS["bert"](), expected("bert")["x"]
    sites, params = base_of("bert", port, x)
    model = torch_base("bert")
    tensors = dict(model.state_dict()) | {"bert.embeddings.position_ids": torch.arange(16)[None]}
    (tmp_path / "m").mkdir()
    save_file({name: x.contiguous() for name, x in tensors.items()}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match=r"left over: bert.embeddings.position_ids"):
        jlora.export.load(tmp_path / "m", params, sites=sites, names=port.names)
    found = jlora.export.load(tmp_path / "m", params, sites=sites, names=port.names, ignore=r".*\.position_ids")
    jax.tree.map(np.testing.assert_array_equal, found, params)
    for folder, config in (("n", model.config), ("o", model.config.to_dict())):
        jlora.export.save(tmp_path / folder, params, sites=sites, names=port.names, config=config)
    assert (tmp_path / "n" / "config.json").read_bytes() == (tmp_path / "o" / "config.json").read_bytes()


class Router(torch.nn.Module if not MISSING else object):
    """A matrix that is a parameter, beside experts."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 4))
        self.w = torch.nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x):
        return torch.einsum("td,ehd,te->th", x, self.w, x @ self.weight.T)


class Routed(torch.nn.Module if not MISSING else object):
    def __init__(self):
        super().__init__()
        self.moe = Router()

    def forward(self, x):
        return self.moe(x)


@pytest.mark.parametrize("targets", [["moe.weight"], ["moe.weight", "moe.w"]])
def test_matrices_that_are_adapted_themselves(targets, tmp_path):
    torch.manual_seed(0)
    base = Routed()
    params = {
        "w": jnp.asarray(base.moe.w.detach().numpy().swapaxes(1, 2)),
        "weight": jnp.asarray(base.moe.weight.detach().numpy().T),
    }
    fn = lambda p, x: jnp.einsum(  # noqa: E731
        "eth,te->th", jnp.einsum("etd,edh->eth", jnp.broadcast_to(x, (3, *x.shape)), p["w"]), x @ p["weight"]
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4)), jnp.float32)
    sites = jlora.sites(fn, params, x)
    names = {"weight": jlora.peft.Weight("moe.weight", nesting=0), "w": jlora.peft.Weight("moe.w", nesting=1)}
    lora = adapters(None, sites, params, [jlora.LoRA(rank=2, targets=[t.removeprefix("moe.") for t in targets])])
    jlora.peft.save(tmp_path / "a", lora, names=names)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, tmp_path / "a").eval()(torch.as_tensor(np.array(x))).numpy()
    np.testing.assert_allclose(theirs, jlora.wrap(fn)(params, lora, x), rtol=1e-5, atol=1e-4)
    torch.manual_seed(0)
    model = get_peft_model(
        Routed(), LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "b")
    again = jlora.peft.load(tmp_path / "b", sites, names=names)
    with torch.no_grad():
        theirs = model.eval()(torch.as_tensor(np.array(x))).numpy()
    np.testing.assert_allclose(jlora.wrap(fn)(params, again, x), theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (AttributeError, {"target_parameters": ["moe.up", "gate.weight"]}),
        (ValueError, {"target_parameters": ["moe.up"], "modules_to_save": ["gate"]}),
        (TypeError, {"target_parameters": ["moe.up"], "modules_to_save": ["moe"]}),
    ],
)
def test_peft_cannot_do_what_is_refused_here(error, options):
    with pytest.raises(error, match=r"ParamWrapper"):
        get_peft_model(torch_base("nested"), LoraConfig(r=2, target_modules=[], **options))


@pytest.mark.parametrize(("module", "leaf"), [("classifier", "classifier/bias"), ("pooler", "pooler/dense/bias")])
def test_all_biases_beside_a_module_that_is_saved_whole(module, leaf, tmp_path):
    """PEFT writes the biases of that module again, under the names that they have inside its wrapper, and does not read those."""
    port, x = PORTS["bert"](), expected("bert")["x"]
    sites, params = base_of("bert", port, x)
    config = LoraConfig(r=2, target_modules=["query"], bias="all", modules_to_save=[module], init_lora_weights=False)
    model = get_peft_model(torch_base("bert"), config)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn_like(p) / 4)
    model.save_pretrained(tmp_path / "a")
    copies = {k: v for k, v in tensors_of(tmp_path / "a").items() if f".{module}.modules_to_save." in k}
    others = {k: v for k, v in tensors_of(tmp_path / "a").items() if f".{module}.original_module." in k}
    assert len(copies) == len(others) == 1
    lora = jlora.peft.load(tmp_path / "a", sites, names=port.names, params=params)
    name = next(path for path in lora if path.endswith(leaf))
    np.testing.assert_array_equal(lora[name].value, next(iter(copies.values())))
    ours = jlora.wrap(port.fn)(params, lora, x)
    np.testing.assert_allclose(in_peft("bert", x, tmp_path / "a"), ours, atol=1e-5)
    alone = jlora.peft.read(tmp_path / "a")[0]
    assert len(alone) == len(tensors_of(tmp_path / "a")) - 2 - 2  # two pairs of factors
    edit(tmp_path / "a", tensors={key: x + 1 for key, x in others.items()})
    np.testing.assert_allclose(in_peft("bert", x, tmp_path / "a"), ours, atol=1e-5)
    again = jlora.peft.load(tmp_path / "a", sites, names=port.names, params=params)
    jax.tree.map(np.testing.assert_array_equal, again, lora)


def test_peft_never_calls_an_output_projection_that_is_the_target(tmp_path):
    x = expected("attention")["x"]
    config = LoraConfig(r=2, target_modules=["out_proj"], init_lora_weights=False)
    get_peft_model(torch_base("attention"), config).save_pretrained(tmp_path / "a")
    np.testing.assert_allclose(in_peft("attention", x, tmp_path / "a"), expected("attention")["before"], atol=1e-6)
    port = PORTS["attention"]()
    with pytest.raises(ValueError, match=r"'attn.out_proj' has no effect in PEFT"):
        jlora.peft.load(tmp_path / "a", base_of("attention", port, x)[0], names=port.names)


def test_peft_does_not_see_a_tie_by_hand(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(11, 6), torch.nn.Linear(6, 11, bias=False)
            self.mid = torch.nn.Linear(6, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.mid(self.embed(ids)))

    net = Net()
    params = {"embed": jnp.asarray(net.embed.weight.detach().numpy()), "mid": jnp.ones((6, 6))}
    sites = jlora.sites(lambda p, ids: p["embed"][ids] @ p["mid"] @ p["embed"].T, params, jnp.arange(4))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["mid"], trainable_token_indices={"embed": [1]}))
    with torch.no_grad():
        before = model(torch.tensor([0, 1]))
        next(p for n, p in model.named_parameters() if "tokens_delta" in n).add_(1.0)
        after = model(torch.tensor([0, 1]))
    torch.testing.assert_close(after[0], before[0])  # the head is as it was
    assert not torch.allclose(after[1], before[1])
    model.save_pretrained(tmp_path / "a")
    names = {"embed": ("embed.weight", "head.weight"), "mid": "mid.weight"}
    with pytest.raises(ValueError, match=r"replaces only some of its weights in PyTorch, not head\.weight"):
        jlora.peft.load(tmp_path / "a", sites, names=names, params=params)


def test_a_norm_whose_name_ends_as_that_of_a_target(tmp_path):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.RMSNorm(4)

        def forward(self, x):
            return self.proj(x)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.block = torch.nn.Linear(4, 4, bias=False), Block()

        def forward(self, x):
            return self.block(self.proj(x))

    net, x = Net(), np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    params = {
        "proj": {"kernel": jnp.asarray(net.proj.weight.detach().numpy().T)},
        "block": {"proj": {"scale": jnp.ones(4)}},
    }

    def fn(p, x):
        y = x @ p["proj"]["kernel"]
        eps = np.finfo(np.float32).eps
        return y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps) * p["block"]["proj"]["scale"]

    sites = jlora.sites(fn, params, x)
    lora = adapters(None, sites, params, [jlora.LoRA(rank=2, targets="proj/kernel")])
    jlora.peft.save(tmp_path / "a", lora)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(net, tmp_path / "a").eval()(torch.as_tensor(x)).numpy()
    np.testing.assert_allclose(theirs, jlora.wrap(fn)(params, lora, x), atol=1e-5)
