"""What a PEFT adapter has to be, file and names, to be read; and what is refused."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_case import FOLDER, PARAMS, SITES, UP, base_of, edit, expected, fresh
from peft_case import promotion as promotion
from peft_case import saved as saved
from peft_models import PORTS
from safetensors.numpy import load_file

import jlora
import jlora.export
import jlora.peft
from jlora.peft import Weight

CONFIG_ERRORS = [
    ({"peft_type": "LOHA"}, "is of type LOHA; only LORA"),
    ({"peft_type": ["LORA"]}, "only LORA can be read"),
    ({"use_dora": True}, "use_dora: DoRA's magnitudes"),
    ({"use_qalora": True}, "use_qalora"),
    ({"layer_replication": [[0, 1]]}, "layers are repeated"),
    ({"init_lora_weights": "pissa_niter_4"}, "changes the base before training"),
    ({"init_lora_weights": "loftq"}, "changes the base before training"),
    ({"brand_new_trick": {"beta": 2}}, "has brand_new_trick, which jlora does not know"),
    ({"r": 0}, "r in .* must be a whole number"),
    ({"r": True}, "r in .* must be a whole number"),
    ({"r": 10**6}, "has rank 2 in its tensors and 1000000"),
    ({"r": "2"}, "r in .* must be a whole number"),
    ({"lora_alpha": 0}, "lora_alpha in .* must be a finite number above 0"),
    ({"lora_alpha": float("nan")}, "lora_alpha in .* must be a finite number above 0"),
    ({"lora_alpha": 10**400}, "lora_alpha in .* must be a finite number above 0"),
    ({"lora_dropout": 1}, "lora_dropout in .* must be a rate"),
    ({"use_rslora": "yes"}, "use_rslora in .* must be true or false"),
    ({"alpha_pattern": [1]}, "alpha_pattern in .* must be an object"),
    ({"alpha_pattern": {"up": -1}}, r"alpha_pattern\[up\] in .* above 0"),
    (
        {"alpha_pattern": {r"(u)\1p": 3}},
        r"alpha_pattern in .* which is not run: it has the back-reference '.1'",
    ),
    ({"rank_pattern": {"(?>u)p": 2}}, r"rank_pattern in .* is not run: it has the group '\(\?>u', which is not read"),
    (
        {"target_modules": "(up"},
        r"target_modules in .* has '\(up', which is not a regular expression: .* without its '\)'",
    ),
    ({"rank_pattern": {".*": 3}}, "'down' has rank 2 in its tensors and 3"),
    ({"alpha_pattern": {"u.*": 2, "[tu]p": 3}}, r"Several patterns of alpha_pattern match 'up', with values \[2, 3\]"),
    ({"layers_to_transform": ["0"]}, "layers_to_transform in .* must be numbers of layers"),
    ({"bias": "some"}, "bias in .* must be none, all or lora_only"),
    ({"lora_bias": "yes"}, "lora_bias in .* must be true or false"),
    ({"alpha_pattern": {"up": 2, "^up": 3}}, r"Several patterns of alpha_pattern match 'up', with values \[2, 3\]"),
    ({"rank_pattern": {"up": 3}}, "'up' has rank 2 in its tensors and 3"),
    ({"target_modules": [1]}, "target_modules in .* must be a list of names"),
    ({"modules_to_save": "head"}, "modules_to_save in .* must be a list of names"),
    ({"target_parameters": {}, "trainable_token_indices": [-1]}, "trainable_token_indices in .* must be ids of tokens"),
    ({"trainable_token_indices": [1, 1]}, "must be ids of tokens, each once"),
]


@pytest.mark.parametrize(("config", "message"), CONFIG_ERRORS)
def test_a_configuration_is_refused(saved, config, message):
    edit(saved, config)
    with pytest.raises(ValueError, match=message):
        jlora.peft.load(saved, SITES)


def test_patterns_match_as_in_peft(saved):
    edit(saved, {"alpha_pattern": {"^down": 8, r"u\.p": 5, "xup": 5, "u.": 4}})
    lora = jlora.peft.load(saved, SITES)
    assert (lora["down/kernel"].scale, lora["up/kernel"].scale) == (4, 2)
    edit(saved, {"alpha_pattern": {"p": 5}, "use_rslora": True})
    assert jlora.peft.load(saved, SITES)["up/kernel"].scale == pytest.approx(2 / 2**0.5)


A, B = np.ones((2, 3), np.float32), np.ones((5, 2), np.float32)


TENSOR_ERRORS = [
    ({UP: None}, "'base_model.model.up.lora_B.weight' has no lora_A"),
    ({UP.replace("A", "B"): None}, "'base_model.model.up.lora_A.weight' has no lora_B"),
    ({UP: np.ones((2, 4), np.float32)}, r"do not fit 'up/kernel' \(3, 5\).\n  got: \(2, 4\) and \(5, 2\); needed .*\(r, 3\) and \(5, r\)"),
    ({UP: np.ones((3, 3), np.float32)}, r"do not fit 'up/kernel'"),
    ({UP: A * np.nan}, f"'{UP}' is not finite"),
    ({UP: np.ones((2, 3), np.int32)}, "holds I32; here it may be BF16"),
    (
        {UP.replace("up", "upp"): A, "base_model.model.upp.lora_B.weight": B},
        "2 tensors of the adapter are for nothing in the base: .*upp.*\n  nearest to the first: up",
    ),
    ({"up.lora_A.weight": A}, "named in several ways: 'up.lora_A.weight' begins with no prefix"),
    ({"base_model.model.up.lora_magnitude_vector": B[:, 0]}, "DoRA's magnitudes"),
    ({"base_model.model.up.lora_C.weight": A}, "of a kind that jlora does not know"),
    ({"base_model.model.down.weight": np.ones((7, 5), np.float32)}, "needs the value of 'down/kernel'"),
    ({"base_model.model.../../etc/passwd": A}, "for nothing in the base"),
    ({"base_model.model.up.lora_B.bias": np.ones(5, np.float32)}, "for nothing in the base"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "message"), TENSOR_ERRORS)
def test_tensors_are_refused(saved, tensors, message):
    edit(saved, {}, tensors)
    with pytest.raises(ValueError, match=message):
        jlora.peft.load(saved, SITES)


ONES, M = np.ones(7, np.float32), "base_model.model."
BIAS_ERRORS = [
    ({"bias": "all"}, {f"{M}down.base_layer.bias": ONES[:5]}, r"has shape \(5,\); 'down/bias' \(7,\) is \(7,\) there"),
    ({"lora_bias": True}, {f"{M}up.lora_B.bias": ONES[:5], f"{M}down.lora_B.bias": ONES}, "for nothing in the base: .*up"),
    ({"trainable_token_indices": {"up": [1]}}, {f"{M}up.token_adapter.trainable_tokens_delta": A}, "needs the value of 'up/"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "tensors", "message"), BIAS_ERRORS)
def test_declared_tensors_are_refused(saved, config, tensors, message):
    edit(saved, config, tensors)
    with pytest.raises(ValueError, match=message):
        jlora.peft.load(saved, SITES)


def test_base_weights_in_the_file_must_be_the_base(saved):
    edit(saved, {}, {"base_model.model.down.base_layer.weight": np.ones((7, 5), np.float32)})
    assert set(jlora.peft.load(saved, SITES, params=PARAMS)) == {"down/kernel", "up/kernel"}
    edit(saved, {}, {"base_model.model.down.base_layer.weight": np.full((7, 5), 2, np.float32)})
    with pytest.raises(ValueError, match="is not what 'down/kernel' is in the base"):
        jlora.peft.load(saved, SITES, params=PARAMS)
    edit(saved, {"modules_to_save": ["down"]})
    with pytest.raises(ValueError, match="factors for 1 module that its configuration leaves out: down"):
        jlora.peft.load(saved, SITES, params=PARAMS)


def test_trained_tokens_are_refused_where_they_do_not_fit(saved):
    rows = {"base_model.model.up.token_adapter.trainable_tokens_delta": np.ones((3, 5), np.float32)}
    config = {"trainable_token_indices": {"up": [1, 2]}, "target_modules": ["down"]}
    edit(saved, config, rows | {UP: None, UP.replace("A", "B"): None})
    with pytest.raises(ValueError, match=r"has shape \(3, 5\), for 2 trained tokens of 'up/kernel'"):
        jlora.peft.load(saved, SITES, params=PARAMS)


def test_a_tied_table_that_was_adapted_apart_is_refused(tmp_path):
    port, want = PORTS["llama_tied"](), expected("llama_tied")
    sites, params = base_of("llama_tied", port, want["x"])
    shutil.copytree(FOLDER / "llama_tied", tmp_path / "a")
    head = "base_model.model.lm_head.lora_B.weight"
    edit(tmp_path / "a", {}, {head: load_file(tmp_path / "a" / "adapter_model.safetensors")[head] + 1})
    with pytest.raises(ValueError, match="'embed' is one leaf here, but its 2 weights in PyTorch were adapted apart"):
        jlora.peft.load(tmp_path / "a", sites, names=port.names, params=params)
    edit(tmp_path / "a", {}, {head: None, head.replace("lora_B", "lora_A"): None})
    with pytest.raises(ValueError, match=r"lacks factors for 1 weight: lm_head.weight"):
        jlora.peft.load(tmp_path / "a", sites, names=port.names, params=params)
    carried = head.replace("lora_B", "base_layer")
    edit(tmp_path / "a", {"ensure_weight_tying": False}, {carried: None})  # then PEFT adapts the table alone
    assert jlora.peft.load(tmp_path / "a", sites, names=port.names, params=params)["embed"].only == "lookup"
    edit(tmp_path / "a", {"target_modules": ["embed_tokens", "v_proj", "lm_head"]})
    with pytest.raises(ValueError, match=r"lacks factors for 1 weight: lm_head.weight"):
        jlora.peft.load(tmp_path / "a", sites, names=port.names, params=params)


@pytest.mark.parametrize(
    ("kind", "leaf", "only"), [("gpt2_table", "wte/embedding", "lookup"), ("llama_head", "embed", "linear")]
)
def test_an_adapter_of_one_of_two_tied_modules_is_for_one_use(kind, leaf, only, tmp_path):
    port, want = PORTS[kind](), expected(kind)
    sites, params = base_of(kind, port, want["x"])
    lora = jlora.peft.load(FOLDER / kind, sites, names=port.names, params=params)
    path = next(path for path in lora if path.endswith(leaf))
    assert lora[path].only == only
    jlora.peft.save(tmp_path / "a", lora, names=port.names)
    found, made = (load_file(folder / "adapter_model.safetensors") for folder in (FOLDER / kind, tmp_path / "a"))
    assert set(made) == {key for key in found if "base_layer" not in key}
    every = {path: replace(lora[path], only="")}
    off = jlora.wrap(port.fn)(params, lora | every, want["x"]) - want["after"]
    assert float(abs(off).max()) > 0.1  # what was loaded before


def test_a_head_cannot_be_saved_without_its_name(tmp_path):
    port, want = PORTS["llama_head"](), expected("llama_head")
    sites, params = base_of("llama_head", port, want["x"])
    rule = jlora.LoRA(rank=2, targets="embed", only="linear")
    lora = jlora.init(jax.random.key(0), params, sites, rule)
    with pytest.raises(
        ValueError, match=r"Name both: names=\{'embed': \('model.embed_tokens.weight', 'lm_head.weight'\)\}"
    ):
        jlora.peft.save(tmp_path / "a", lora, names={"embed": "model.embed_tokens.weight"})


def shared(params, ids):
    return params["shared"][ids] @ params["shared"].T


def test_a_table_that_nothing_calls_in_peft_is_refused(tmp_path):
    """Encoder and decoder of T5 and BART look up through other modules. A model that is not of transformers may call it."""
    params, ids = {"shared": jnp.ones((11, 3))}, jnp.arange(4)
    sites, names = jlora.sites(shared, params, ids), {"shared": ("shared.weight", "lm_head.weight")}
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="shared", only="lookup"))
    with pytest.raises(ValueError, match=r"PEFT's adapter of 'shared' has no effect: .*T5, BART"):
        jlora.peft.save(tmp_path / "a", lora, names=names)
    said = {"shared": jlora.peft.Weight("shared.weight", "in_out")}
    jlora.peft.save(tmp_path / "a", lora, names=said)
    assert jlora.peft.load(tmp_path / "a", sites, names=names)["shared"].only == "lookup"
    edit(tmp_path / "a", {"task_type": "SEQ_2_SEQ_LM"})
    with pytest.raises(ValueError, match=r"The adapter of 'shared' has no effect in PEFT"):
        jlora.peft.load(tmp_path / "a", sites, names=names)
    jlora.peft.load(tmp_path / "a", sites, names=said)


def test_experts_that_nothing_names_are_refused(tmp_path):
    port, want = PORTS["experts"](), expected("experts")
    sites, params = base_of("experts", port, want["x"])
    with pytest.raises(ValueError, match=r"Say in names which the module registers first"):
        jlora.peft.load(FOLDER / "experts", sites, params=params)
    with pytest.raises(ValueError, match="the file does not name them"):
        jlora.peft.read(FOLDER / "experts")
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="experts/.*"))
    with pytest.raises(ValueError, match="PEFT's keys do not name them"):
        jlora.peft.save(tmp_path / "a", lora)


def square(params, x):
    return jnp.einsum("etd,edh->eth", x, params["experts"])


@pytest.mark.parametrize(
    ("version", "layout", "across"),
    [("0.19.0", "out_in", False), ("0.18.1", "out_in", True), ("0.18.1", "in_out", True), ("0.21.2", "in_out", False)],
)
def test_square_experts_by_version(tmp_path, version, layout, across):
    params = {"experts": jnp.ones((3, 4, 4))}
    sites = jlora.sites(square, params, jnp.ones((3, 2, 4)))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="experts"))
    lora = jax.tree.map(lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), lora)
    names = {"experts": Weight("mlp.experts", layout)}
    jlora.peft.save(tmp_path / "a", lora, names=names)
    edit(tmp_path / "a", {"peft_version": version})
    found, wanted = jlora.peft.load(tmp_path / "a", sites, names=names)["experts"].delta(), lora["experts"].delta()
    np.testing.assert_allclose(found, wanted.swapaxes(1, 2) if across else wanted, rtol=1e-5)
    with pytest.raises(ValueError, match=r"'experts' is square.*\n.*layout='out_in'"):
        jlora.peft.load(tmp_path / "a", sites, names={"experts": "mlp.experts"})


HALVES = np.array([0, 2, 1, 3, 4, 6, 5, 7])  # of two heads of four, whose pairs lie side by side here


@pytest.mark.parametrize(("batch", "layout"), [("e", "in_out"), ("e", "out_in"), ("", "in_out"), ("", "out_in")])
def test_rotary_pairs_are_outputs_in_every_layout(tmp_path, batch, layout):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((3, 4, 8) if batch else (4, 8)), jnp.float32)
    x = jnp.ones((*w.shape[:-2], 2, 4))
    sites = jlora.sites(lambda p, x: jnp.einsum(f"{batch}td,{batch}dh->{batch}th", x, p["w"]), {"w": w}, x)
    lora = jlora.init(jax.random.key(0), {"w": w}, sites, jlora.LoRA(rank=2, targets="w"))
    lora = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), lora)
    names = {"w": Weight("moe.w", layout, rotary_heads=2, nesting=0)}
    jlora.peft.save(tmp_path / "a", lora, names=names)
    again = jlora.peft.load(tmp_path / "a", sites, names=names)
    np.testing.assert_allclose(again["w"].delta(), lora["w"].delta(), rtol=1e-5, atol=1e-6)
    jlora.export.save(tmp_path / "m", {"w": w}, sites=sites, names=names)
    there = load_file(tmp_path / "m" / "model.safetensors")["moe.w"]
    np.testing.assert_array_equal(there if layout == "in_out" else there.swapaxes(-1, -2), w[..., HALVES])
    np.testing.assert_array_equal(jlora.export.load(tmp_path / "m", {"w": w}, sites=sites, names=names)["w"], w)


NAMES_ERRORS = [
    ({"upp/kernel": "up.weight"}, ValueError, "No leaf has the path 'upp/kernel' of names.\n  nearest: up/kernel"),
    ({"up/kernel": "down.weight"}, ValueError, "'down.weight' is the name of 'down/kernel' and 'up/kernel'"),
    ({"up/kernel": "layers.{}.up.weight"}, ValueError, "has 1 index, but 'up/kernel' .* has 0 batch axes"),
    ({"(": "x"}, ValueError, "is not a regular expression"),
    ({"up/kernel": 3}, TypeError, "must be a string, a Weight, or several"),
    (["up/kernel"], TypeError, "names must be a dict"),
    ({"up/kernel": "up/weight"}, ValueError, "keys joined by dots"),
    ({"up/kernel": "base_model.model.up.weight"}, ValueError, "without PEFT's 'base_model.model.'"),
    ({"(up)/kernel": r"\2.weight"}, ValueError, r"does not fit its pattern '\(up\)/kernel': invalid group reference"),
]


@pytest.mark.parametrize(("names", "error", "message"), NAMES_ERRORS)
def test_names_are_refused(saved, tmp_path, names, error, message):
    with pytest.raises(error, match=message):
        jlora.peft.load(saved, SITES, names=names)
    with pytest.raises(error, match=message):
        jlora.peft.save(tmp_path / "b", fresh(), names=names)
    assert not (tmp_path / "b").exists()


def test_the_name_of_a_module_is_none_of_a_parameter(tmp_path):
    with pytest.raises(ValueError, match=r"'up' of 'up/kernel' does not end in '\.weight': it is that of a module"):
        jlora.peft.save(tmp_path / "a", fresh(), names={"up/kernel": "up"})


def test_bad_weights():
    with pytest.raises(ValueError, match=r"layout=.* must be 'out_in' or 'in_out'"):
        Weight("a.weight", layout="oi")
    for heads in (0, -2, True, 2.0):
        with pytest.raises(ValueError, match=r"rotary_heads=.* must be the number of heads, 1 or more"):
            Weight("a.weight", rotary_heads=heads)


def test_parameters_alone_tell_only_plain_kernels(tmp_path):
    def fn(params, ids):
        return params["embedding"][ids] @ params["kernel"]

    params = {"embedding": jnp.ones((11, 3)), "kernel": jnp.ones((3, 5))}
    sites = jlora.sites(fn, params, jnp.arange(4))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="embedding"))
    jlora.peft.save(tmp_path / "a", lora, names={"embedding": "embed.weight", "kernel": "head.weight"})
    with pytest.raises(ValueError, match=r"parameters alone do not tell its axes.*\n  Pass what tells: .*jlora.sites"):
        jlora.peft.load(tmp_path / "a", params, names={"embedding": "embed.weight", "kernel": "head.weight"})


STACK = {"layers": {"kernel": jnp.arange(18.0).reshape(2, 3, 3)}, "up": {"kernel": jnp.ones((3, 3))}}


def stack(params, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["kernel"])
    return x @ params["up"]["kernel"]


def test_a_whole_leaf_keeps_its_axes(tmp_path):
    """So that it is written in PyTorch's layout without the sites, also after it was saved; square kernels do not tell by shape."""
    sites = jlora.sites(stack, STACK, jnp.ones((2, 3)))
    rules = [jlora.Full(targets="layers/kernel"), jlora.LoRA(rank=2, targets="up/kernel")]
    lora = jlora.init(jax.random.key(0), STACK, sites, rules)
    whole = lora["layers/kernel"]
    assert (whole.use, whole.inputs, whole.outputs, whole.batch) == ("linear", (1,), (2,), (0,))
    jlora.save(tmp_path / "own", lora)
    lora = jlora.load(tmp_path / "own", STACK)
    assert jax.tree.structure(lora["layers/kernel"]) == jax.tree.structure(whole)
    jlora.peft.save(tmp_path / "a", lora)
    found = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for i, w in enumerate(STACK["layers"]["kernel"]):
        np.testing.assert_array_equal(found[f"base_model.model.layers.{i}.weight"], w.T)
    again = jlora.peft.load(tmp_path / "a", sites)["layers/kernel"]
    np.testing.assert_array_equal(again.value, whole.value)
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    with pytest.raises(
        ValueError, match=r"How the axes of 'layers.0.weight' lie here, where it is \(3, 3\), is not known"
    ):
        jlora.peft.load(tmp_path / "a", STACK)  # parameters alone do not tell


def test_adapters_saved_before_whole_leaves_had_axes(tmp_path):
    sites = jlora.sites(stack, STACK, jnp.ones((2, 3)))
    lora = jlora.init(jax.random.key(0), STACK, sites, jlora.Full(targets="layers/kernel"))
    description = jlora.describe(lora)
    entry = description["adapters"]["layers/kernel"]
    for name in ("use", "inputs", "outputs", "batch", "window", "groups"):
        del entry[name]
    assert jlora.restore_target(description)["layers/kernel"].use == ""
    entry |= {"use": "linear", "inputs": [0], "outputs": [2], "batch": []}
    with pytest.raises(ValueError, match=r"'layers/kernel' has axes \[0, 2\]"):
        jlora.restore_target(description)
