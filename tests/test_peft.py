"""PEFT adapters: files that the real PEFT made give its outputs here; what is saved here comes back; what is wrong is refused.

The fixtures come from ``make_peft_fixtures.py``; ``test_peft_real.py`` goes the other way.
"""

import json
import shutil
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_models import PORTS
from safetensors.numpy import load_file, save_file

import jlora
import jlora.export
import jlora.peft
from jlora.peft import Weight, default_name

FOLDER = Path(__file__).parent / "fixtures" / "peft"


@pytest.fixture(autouse=True)
def promotion(strict_promotion):
    """The models are written as people write them."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@lru_cache
def expected(kind):
    found = load_file(FOLDER / kind / "expected.safetensors")
    return {k: jnp.asarray(x.astype(np.int32) if x.dtype == np.int64 else x) for k, x in found.items()}


def base_of(kind, port, x):
    """Sites and parameters of a port, from the base that PEFT's adapter was made for."""
    sites = jlora.sites(port.fn, port.struct(), x)
    weights = FOLDER / kind / "base.safetensors"
    return sites, jlora.export.load(weights, port.struct(), sites=sites, names=port.names)


@pytest.mark.parametrize("kind", PORTS)
def test_an_adapter_of_peft_gives_its_outputs(kind):
    port, want = PORTS[kind](), expected(kind)
    sites, params = base_of(kind, port, want["x"])
    np.testing.assert_allclose(port.fn(params, want["x"]), want["before"], atol=1e-5)
    lora = jlora.peft.load(FOLDER / kind, sites, names=port.names, params=params)
    np.testing.assert_allclose(jlora.wrap(port.fn)(params, lora, want["x"]), want["after"], atol=1e-5)
    np.testing.assert_allclose(port.fn(jlora.merge(params, lora), want["x"]), want["after"], atol=1e-5)
    assert float(abs(want["after"] - want["before"]).max()) > 0.05


# --- Names ---


@pytest.mark.parametrize(
    ("path", "batch", "name"),
    [
        ("params/model/layers/0/self_attn/q_proj/kernel", (), "model.layers.0.self_attn.q_proj.weight"),
        ("params/model/layers_11/mlp/up/kernel", (), "model.layers.11.mlp.up.weight"),
        ("params/h/mlp/kernel", (3,), "h.{}.mlp.weight"),
        ("params/h/3/experts/up", (8,), "h.3.experts.up"),
        ("transformer/wte/embedding", (), "transformer.wte.weight"),
        ("norm/scale", None, "norm.weight"),
        ("blocks/norm/bias", None, "blocks.{}.norm.bias"),
        ("conv_1/kernel", (), "conv_1.weight"),
    ],
)
def test_default_names(path, batch, name):
    assert default_name(path, batch, ndim=2) == name


def net(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"] + params["down"]["bias"]


PARAMS = {"up": {"kernel": jnp.ones((3, 5))}, "down": {"kernel": jnp.ones((5, 7)), "bias": jnp.zeros(7)}}
SITES = jlora.sites(net, PARAMS, jnp.ones((2, 3)))


def fresh(*rules):
    lora = jlora.init(jax.random.key(0), PARAMS, SITES, rules or [jlora.LoRA(rank=2, alpha=3, targets=".*kernel")])
    return jax.tree.map(lambda x: x + 1, lora)


@pytest.fixture
def saved(tmp_path):
    jlora.peft.save(tmp_path / "a", fresh())
    return tmp_path / "a"


def edit(folder, config=None, tensors=None):
    """Changes a saved adapter: fields of its configuration, tensors by key (``None`` removes one)."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    if tensors is not None:
        found = load_file(folder / "adapter_model.safetensors") | tensors
        save_file({k: v for k, v in found.items() if v is not None}, folder / "adapter_model.safetensors")


UP = "base_model.model.up.lora_A.weight"


def test_what_is_saved_comes_back(saved):
    for base in (SITES, PARAMS, jax.eval_shape(lambda: PARAMS)):
        again = jlora.peft.load(saved, base)
        assert list(again) == sorted(fresh())
        for path, adapter in fresh().items():
            np.testing.assert_allclose(again[path].delta(None), adapter.delta(None), rtol=1e-6)
            assert again[path].scale == 1


def test_a_loaded_adapter_is_like_one_that_was_made(saved):
    made = jlora.init(jax.random.key(0), PARAMS, SITES, jlora.LoRA(rank=2, alpha=2, targets=".*kernel"))
    assert jax.tree.structure(jlora.peft.load(saved, SITES)) == jax.tree.structure(made)


def test_the_same_adapter_gives_the_same_bytes(saved, tmp_path):
    jlora.peft.save(tmp_path / "b", dict(reversed(fresh().items())))
    for file in saved.iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_the_portable_configuration_needs_nothing_else(saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 2
    assert config["target_modules"] == ["down", "up"]
    assert not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_factors_are_placed_as_the_base_is(saved):
    mesh = jax.make_mesh((2,), ("model",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    lora = jlora.peft.load(saved, SITES, params=jax.device_put(PARAMS, spec))
    assert lora["up/kernel"].a.sharding.mesh == mesh


def test_lower_precision(saved, tmp_path):
    jlora.peft.save(tmp_path / "b", fresh(), dtype=jnp.bfloat16)
    assert str(load_file(tmp_path / "b" / "adapter_model.safetensors")[UP].dtype) == "bfloat16"
    lora = jlora.peft.load(tmp_path / "b", SITES)
    assert lora["up/kernel"].a.dtype == jnp.float32
    assert jlora.peft.load(tmp_path / "b", SITES, dtype=jnp.bfloat16)["up/kernel"].a.dtype == jnp.bfloat16
    np.testing.assert_allclose(lora["up/kernel"].delta(None), fresh()["up/kernel"].delta(None), rtol=2e-2)


def test_factors_of_two_precisions_keep_the_finer(tmp_path):
    lora = fresh(jlora.LoRA(rank=2, targets="up/kernel"))
    up = lora["up/kernel"]
    up = replace(up, a=up.a.astype(jnp.bfloat16), b=jnp.full_like(up.b, 1.0001), scale=1.0)
    jlora.peft.save(tmp_path / "a", {"up/kernel": up})
    again = jlora.peft.load(tmp_path / "a", SITES)["up/kernel"]
    np.testing.assert_array_equal(again.a, up.a.astype(jnp.float32))
    np.testing.assert_array_equal(again.b, up.b)


def test_layers_of_a_stack_may_be_missing_if_the_file_says_so(tmp_path):
    kind = "llama"
    shutil.copytree(FOLDER / kind, tmp_path / "a")
    gone = {k: None for k in load_file(tmp_path / "a" / "adapter_model.safetensors") if ".layers.1." in k}
    port, want = PORTS[kind](), expected(kind)
    sites, _ = base_of(kind, port, want["x"])
    edit(tmp_path / "a", {}, gone)
    with pytest.raises(ValueError, match=r"lacks factors for 7 weights: model\.layers\.1\.mlp\.down_proj"):
        jlora.peft.load(tmp_path / "a", sites, names=port.names)
    edit(tmp_path / "a", {"layers_to_transform": [0]})
    lora = jlora.peft.load(tmp_path / "a", sites, names=port.names)
    assert bool(lora["layers/q"].delta()[0].any())
    assert not bool(lora["layers/q"].delta()[1].any())


def test_without_its_base(saved):
    lora, sites = jlora.peft.read(saved)
    assert {path: x.shape for path, x in lora.items()} == {"down.weight": (7, 5), "up.weight": (5, 3)}
    np.testing.assert_allclose(lora["up.weight"].delta().T, fresh()["up/kernel"].delta(), rtol=1e-6)
    assert sites["up.weight"].inputs == (1,)


@pytest.mark.parametrize("kind", sorted({*PORTS} - {"attention", "experts", "llama_tokens", "nested"}))
def test_reading_and_saving_again_keeps_every_number(kind, tmp_path):
    lora, sites = jlora.peft.read(FOLDER / kind)
    jlora.peft.save(tmp_path / "a", lora, names=lambda path: path, sites=sites)
    port, want = PORTS[kind](), expected(kind)
    sites, params = base_of(kind, port, want["x"])
    again = jlora.peft.load(tmp_path / "a", sites, names=port.names, params=params)
    np.testing.assert_allclose(jlora.wrap(port.fn)(params, again, want["x"]), want["after"], atol=1e-5)


# --- What is refused ---

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
    ({"alpha_pattern": {"(x+x+)+y": 3}}, "patterns from a file are not run"),
    ({"rank_pattern": {".*": 2}}, "patterns from a file are not run"),
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
    ({"up.lora_A.weight": A}, "does not begin with 'base_model.model.'"),
    ({"base_model.model.up.lora_magnitude_vector": B[:, 0]}, "DoRA's magnitudes"),
    ({"base_model.model.up.lora_C.weight": A}, "of a kind that jlora does not know"),
    ({"base_model.model.down.weight": np.ones((7, 5), np.float32)}, "needs the value of 'down/kernel'"),
    ({"base_model.model.../../etc/passwd": A}, "for nothing in the base"),
    ({"base_model.model.up.lora_B.bias": np.ones(5, np.float32)}, "for nothing in the base"),
    ({"base_model.model.down.lora_B.bias": np.ones(7, np.float32)}, "needs the value of 'down/bias'"),
    ({"base_model.model.down.base_layer.bias": np.ones(5, np.float32)}, r"has shape \(5,\); 'down/bias' \(7,\) is \(7,\) there"),
    ({"base_model.model.up.token_adapter.trainable_tokens_delta": A}, "needs the value of 'up/kernel'"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "message"), TENSOR_ERRORS)
def test_tensors_are_refused(saved, tensors, message):
    edit(saved, {}, tensors)
    with pytest.raises(ValueError, match=message):
        jlora.peft.load(saved, SITES)


def test_base_weights_in_the_file_must_be_the_base(saved):
    edit(saved, {}, {"base_model.model.down.base_layer.weight": np.ones((7, 5), np.float32)})
    assert set(jlora.peft.load(saved, SITES, params=PARAMS)) == {"down/kernel", "up/kernel"}
    edit(saved, {}, {"base_model.model.down.base_layer.weight": np.full((7, 5), 2, np.float32)})
    with pytest.raises(ValueError, match="is not what 'down/kernel' is in the base"):
        jlora.peft.load(saved, SITES, params=PARAMS)
    edit(saved, {"modules_to_save": ["down"]})
    with pytest.raises(ValueError, match="factors and whole values for the same leaf: down/kernel"):
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
    with pytest.raises(ValueError, match=r"lacks factors for 1 weights: lm_head.weight"):
        jlora.peft.load(tmp_path / "a", sites, names=port.names, params=params)


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
    ({"up/kernel": "layers.{}.up.weight"}, ValueError, "has 1 indices, but 'up/kernel' .* has 0 batch axes"),
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


def test_arguments_in_another_order(saved):
    with pytest.raises(ValueError, match=r"load\(folder, sites\)"):
        jlora.peft.load(saved, {})
    with pytest.raises(TypeError, match="A folder is given by its path"):
        jlora.peft.load(SITES, saved)
    with pytest.raises(ValueError, match="The sites were found for other parameters"):
        jlora.peft.load(saved, SITES, params={"up": PARAMS["up"]})


def test_saving_is_refused(tmp_path, saved):
    with pytest.raises(FileExistsError, match="already a PEFT adapter"):
        jlora.peft.save(saved, fresh())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="is not a PEFT adapter: it is left alone"):
        jlora.peft.save(tmp_path / "other", fresh(), overwrite=True)
    (tmp_path / "link").symlink_to(saved)
    with pytest.raises(FileExistsError, match="left alone"):
        jlora.peft.save(tmp_path / "link", fresh(), overwrite=True)
    before = (saved / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is not finite"):
        jlora.peft.save(saved, jax.tree.map(lambda x: x * jnp.nan, fresh()), overwrite=True)
    assert (saved / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    jlora.peft.save(saved, jax.tree.map(lambda x: 2 * x, fresh()), overwrite=True)
    assert (saved / "adapter_model.safetensors").read_bytes() != before


def written_rate(folder, *rules, **options):
    jlora.peft.save(folder, fresh(*rules), **options)
    return json.loads((folder / "adapter_config.json").read_text())["lora_dropout"]


def test_one_rate_of_dropout_is_that_of_the_file(tmp_path):
    up, down = (jlora.LoRA(rank=2, dropout=0.25, targets=f"{name}/kernel") for name in ("up", "down"))
    assert written_rate(tmp_path / "a", up, down) == 0.25
    again = jlora.peft.load(tmp_path / "a", SITES)
    assert {x.dropout for x in again.values()} == {0.25}
    other = jlora.LoRA(rank=2, targets="down/kernel")
    with pytest.raises(
        ValueError, match=r"have several: 0\.0 at 'down/kernel', 0\.25 at 'up/kernel'.*\n.*dropout=0\.25"
    ):
        written_rate(tmp_path / "b", up, other)
    assert not (tmp_path / "b").exists()
    assert written_rate(tmp_path / "b", up, other, dropout=0.5) == 0.5
    for wrong in (1.0, -0.1, float("nan"), "0.1", True):
        with pytest.raises(ValueError, match=r"dropout must be a rate from 0 up to"):
            written_rate(tmp_path / "c", up, dropout=wrong)


def test_peft_has_no_dropout_for_parameters(tmp_path):
    names = {"down/kernel": Weight("down.weight", nesting=0)}
    rule = jlora.LoRA(rank=2, dropout=0.25, targets=".*kernel")
    with pytest.raises(
        ValueError, match=r"no dropout for parameters .* 'down.weight', and refuses.*0\.25.*\n.*dropout=0\.0"
    ):
        written_rate(tmp_path / "a", rule, names=names)
    assert written_rate(tmp_path / "a", rule, names=names, dropout=0.0) == 0.0


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.complex64, jnp.float8_e5m2, bool, "half-way"])
def test_dtypes_that_destroy_values_are_refused(dtype, tmp_path, saved):
    for call in (
        lambda: jlora.peft.save(tmp_path / "b", fresh(), dtype=dtype),
        lambda: jlora.peft.load(saved, SITES, dtype=dtype),
        lambda: jlora.peft.read(saved, dtype=dtype),
    ):
        with pytest.raises(ValueError, match=r"dtype must be one of float64, float32, float16, bfloat16\.\n  got: "):
            call()
    assert not (tmp_path / "b").exists()


def test_parameters_in_place_of_an_adapter(tmp_path):
    with pytest.raises(
        TypeError, match=r"(?s)lora must be a dict.*got: parameters, dict with the array 'down/bias' \(7,\)"
    ):
        jlora.peft.save(tmp_path / "b", PARAMS)


def test_leaves_without_a_place_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There are no factors in this adapter.*\n.*jlora\.export\.save.*LoRA rule"):
        jlora.peft.save(tmp_path / "a", fresh(jlora.Full(targets="down/bias")))
    lora = fresh(jlora.Full(targets="down/kernel"), jlora.LoRA(rank=2, targets="up/kernel"))
    with pytest.raises(ValueError, match="PEFT saves the module 'down' whole, and 'down/bias' was not trained"):
        jlora.peft.save(tmp_path / "a", lora)
    older = lora | {"down/kernel": jlora.FullWeight(lora["down/kernel"].value, lora["down/kernel"].base)}
    with pytest.raises(ValueError, match=r"How the axes of 'down.weight' lie here, .*\n  Pass what tells: sites="):
        jlora.peft.save(tmp_path / "a", older)
    jlora.peft.save(tmp_path / "a", older, sites=SITES, params=PARAMS)
    shutil.rmtree(tmp_path / "a")
    other = jlora.sites(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 5))}, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="made for another base than sites"):
        jlora.peft.save(tmp_path / "a", lora, sites=other)
    alien = jlora.init(jax.random.key(0), {"w": jnp.ones((3, 5))}, other, jlora.LoRA(rank=2, targets="w"))
    with pytest.raises(ValueError, match="made for 2 different bases"):
        jlora.peft.save(tmp_path / "a", fresh() | alien)
    old = {"up/kernel": jlora.LowRank(**{**vars(fresh()["up/kernel"]), "use": ""})}
    with pytest.raises(ValueError, match="How the model uses 'up/kernel' is not part of this adapter"):
        jlora.peft.save(tmp_path / "a", old)
    jlora.peft.save(tmp_path / "a", old, sites=SITES)


def test_a_grouped_convolution_is_refused(tmp_path):
    def fn(params, x):
        names = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(x, params["kernel"], [1], "VALID", dimension_numbers=names, feature_group_count=2)  # fmt: skip

    params = {"kernel": jnp.ones((3, 2, 6))}
    sites = jlora.sites(fn, params, jnp.ones((1, 5, 4)))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="kernel"))
    with pytest.raises(ValueError, match="a convolution in groups, or transposed"):
        jlora.peft.save(tmp_path / "a", lora, names={"kernel": "conv.weight"})


def dilated(params, x, by=2):
    names = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x, params["kernel"], [1], "SAME", rhs_dilation=[by], dimension_numbers=names)


def test_a_dilated_convolution_is_refused(tmp_path):
    """PEFT makes lora_A a convolution without the dilation; where the window has one place, there is none."""
    params, x, names = {"kernel": jnp.ones((3, 4, 6))}, jnp.ones((1, 9, 4)), {"kernel": "conv.weight"}
    rules = jlora.LoRA(rank=2, targets="kernel")
    sites = jlora.sites(dilated, params, x)
    lora = jlora.init(jax.random.key(0), params, sites, rules)
    with pytest.raises(ValueError, match=r"'kernel', a dilated convolution, .*\n  Merge it instead"):
        jlora.peft.save(tmp_path / "a", lora, names=names)
    jlora.save(tmp_path / "j", lora)
    with pytest.raises(ValueError, match="a dilated convolution"):
        jlora.peft.save(tmp_path / "a", jlora.load(tmp_path / "j"), names=names)
    plain = jlora.init(jax.random.key(0), params, jlora.sites(partial(dilated, by=1), params, x), rules)
    jlora.peft.save(tmp_path / "a", plain, names=names)
    with pytest.raises(ValueError, match=r"'kernel' is a dilated convolution, .*no update of this weight"):
        jlora.peft.load(tmp_path / "a", sites, names=names)
    one = {"kernel": jnp.ones((1, 4, 6))}
    assert not jlora.sites(dilated, one, x)["kernel"].dilated


def test_a_tied_table_needs_both_names(tmp_path):
    def fn(params, ids):
        return params["embed"][ids] @ params["embed"].T

    params = {"embed": jnp.ones((11, 3))}
    sites = jlora.sites(fn, params, jnp.arange(4))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="embed"))
    with pytest.raises(ValueError, match=r"Name both: names=\{'embed': \('embed', 'lm_head.weight'\)\}"):
        jlora.peft.save(tmp_path / "a", lora)


def test_targets_are_a_pattern_where_a_name_is_the_end_of_another(tmp_path):
    """PEFT takes 'proj' for the end of 'block.proj', which is a norm; a pattern has to match all of a name."""
    params = {"proj": {"kernel": jnp.ones((4, 4))}, "block": {"proj": {"scale": jnp.ones(4)}}}
    sites = jlora.sites(lambda p, x: x @ p["proj"]["kernel"] * p["block"]["proj"]["scale"], params, jnp.ones((2, 4)))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="proj/kernel"))

    def targets(**how):
        jlora.peft.save(tmp_path / "a", lora, overwrite=True, **how)
        assert set(jlora.peft.load(tmp_path / "a", sites, names=how.get("names"))) == {"proj/kernel"}
        return json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]

    assert targets() == "(?:proj)"
    names = {"proj/kernel": "a.proj.weight", "block/proj/scale": "block.norm.weight"}
    assert targets(names=names) == ["a.proj"]
    base_files(tmp_path / "b", {"a.proj.weight": zeros(4, 4), "b.a.proj.weight": zeros(4)})
    assert targets(names=names, base_folder=tmp_path / "b") == r"(?:a\.proj)"


def test_rows_that_are_no_heads_are_refused(tmp_path):
    with pytest.raises(ValueError, match="5 rows are no 4 heads of rotary pairs"):
        jlora.peft.save(tmp_path / "a", fresh(), names={"up/kernel": Weight("up.weight", rotary_heads=4)})


def test_a_tied_table_of_which_one_use_is_replaced_is_refused(tmp_path):
    """PEFT unties them; with ensure_weight_tying it does not."""
    port, want = PORTS["llama_tied"](), expected("llama_tied")
    sites, params = base_of("llama_tied", port, want["x"])
    names = dict(port.names)
    rule = [jlora.Full(targets="embed"), jlora.LoRA(rank=2, targets="layers/q")]
    jlora.peft.save(tmp_path / "a", jlora.init(jax.random.key(0), params, sites, rule), names=names, sites=sites)
    both = jlora.peft.load(tmp_path / "a", sites, names=names, params=params)
    assert isinstance(both["embed"], jlora.FullWeight)
    edit(tmp_path / "a", {"modules_to_save": ["model.embed_tokens"]}, {"base_model.model.lm_head.weight": None})
    with pytest.raises(
        ValueError, match=r"'embed' is one leaf here, but the adapter replaces only some .* not lm_head\.weight"
    ):
        jlora.peft.load(tmp_path / "a", sites, names=names, params=params)
    edit(tmp_path / "a", {"ensure_weight_tying": True})
    jlora.peft.load(tmp_path / "a", sites, names=names, params=params)


def test_trained_tokens_of_a_tie_that_peft_does_not_know_are_refused(tmp_path):
    """It asks the configuration of a model of transformers; a tie by hand it does not see, and changes the lookup alone."""
    port, want = PORTS["llama_tokens"](), expected("llama_tokens")
    sites, params = base_of("llama_tokens", port, want["x"])
    shutil.copytree(FOLDER / "llama_tokens", tmp_path / "a")
    for changed in ({"base_model_class": "Net", "parent_library": "__main__"}, None):
        edit(tmp_path / "a", {"auto_mapping": changed})
        with pytest.raises(
            ValueError,
            match=r"only some .* not lm_head\.weight.\n  Give the base a leaf for each\. Or, if PEFT's model",
        ):
            jlora.peft.load(tmp_path / "a", sites, names=port.names, params=params)
    edit(tmp_path / "a", {"auto_mapping": None, "base_model_name_or_path": "me/my-base"})
    lora = jlora.peft.load(tmp_path / "a", sites, names=port.names, params=params)
    np.testing.assert_allclose(jlora.wrap(port.fn)(params, lora, want["x"]), want["after"], atol=1e-5)


def test_what_is_inside_a_saved_module_is_saved(saved):
    """Also if it was trained but a little, which must not pass for the base's rounding."""
    edit(
        saved,
        {"target_modules": ["up"]},
        {k: None for k in load_file(saved / "adapter_model.safetensors") if ".down." in k},
    )
    little = np.full((7, 5), 1.004, np.float32)
    edit(saved, {}, {"base_model.model.down.weight": little})
    with pytest.raises(ValueError, match="is not what 'down/kernel' is in the base"):
        jlora.peft.load(saved, SITES, params=PARAMS)
    edit(saved, {"modules_to_save": ["own"]})  # PEFT compares the ends of names
    np.testing.assert_array_equal(jlora.peft.load(saved, SITES)["down/kernel"].value, little.T)


def test_biases_that_peft_writes_twice(saved):
    """As with ``bias="all"`` and ``modules_to_save``; one of the two is read, whatever the base or the file is asked for."""
    low = {k: None for k in load_file(saved / "adapter_model.safetensors") if ".down." in k}
    down, bias = "base_model.model.down", np.full(7, 2.0, np.float32)
    whole = {f"{down}.weight": np.ones((7, 5), np.float32), f"{down}.bias": bias}
    twice = {f"{down}.modules_to_save.bias": bias, f"{down}.original_module.bias": 0 * bias}
    edit(saved, {"target_modules": ["up"], "bias": "all"}, low | whole | twice)
    with pytest.raises(
        ValueError, match=r"2 tensors of the adapter are for nothing in the base: .*modules_to_save.bias"
    ):
        jlora.peft.load(saved, SITES, params=PARAMS)
    edit(saved, {"modules_to_save": ["down"]})
    np.testing.assert_array_equal(jlora.peft.load(saved, SITES)["down/bias"].value, bias)
    np.testing.assert_array_equal(jlora.peft.read(saved)[0]["down.bias"].value, bias)
    edit(saved, tensors={f"{down}.modules_to_save.bias": bias + 1})
    for call in (lambda: jlora.peft.load(saved, SITES), lambda: jlora.peft.read(saved)):
        with pytest.raises(
            ValueError, match=r"down.modules_to_save.bias' is a copy of '.*down.bias'.*differs.*\n.*changed"
        ):
            call()
    edit(saved, tensors={f"{down}.bias": None})
    with pytest.raises(ValueError, match=r"for nothing in the base"):
        jlora.peft.load(saved, SITES)


def test_layers_that_a_pattern_left_out_may_be_missing(tmp_path):
    port, want = PORTS["llama"](), expected("llama")
    sites, _ = base_of("llama", port, want["x"])
    shutil.copytree(FOLDER / "llama", tmp_path / "a")
    gone = {k: None for k in load_file(tmp_path / "a" / "adapter_model.safetensors") if ".layers.1." in k}
    edit(tmp_path / "a", {"target_modules": r".*layers\.0\..*_proj"}, gone)
    assert not bool(jlora.peft.load(tmp_path / "a", sites, names=port.names)["layers/q"].delta()[1].any())


# --- Wrappers in wrappers ---


@pytest.fixture
def wrapped(tmp_path):
    """PEFT's adapter of experts, of what is beside them in their module, and of another layer; and what it is for."""
    port, want = PORTS["nested"](), expected("nested")
    sites, params = base_of("nested", port, want["x"])
    shutil.copytree(FOLDER / "nested", tmp_path / "a")
    return tmp_path / "a", lambda: jlora.peft.load(tmp_path / "a", sites, names=port.names, params=params)


def renamed(folder, old, new):
    """Renames the tensors whose key begins with ``old``."""
    found = load_file(folder / "adapter_model.safetensors")
    begun = {k: x for k, x in found.items() if k.startswith(f"base_model.model.{old}")}
    assert begun
    edit(folder, {}, dict.fromkeys(begun) | {k.replace(old, new, 1): x for k, x in begun.items()})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "moe.base_layer.base_layer.gate.lora",
            "moe.base_layer.gate.lora",
            r"'base_model.model.moe.base_layer.gate.lora_A.weight' does not go through the wrappers .*\n"
            r"  PEFT would name it 'base_model.model.moe.base_layer.base_layer.gate.lora_A.weight'",
        ),
        (
            "moe.base_layer.base_layer.bias",
            "moe.bias",
            "would name it 'base_model.model.moe.base_layer.base_layer.bias'",
        ),
        (
            "moe.base_layer.base_layer.tail",
            "tail",
            "2 tensors of the adapter are for nothing in the base: .*tail.0.bias",
        ),
        (
            "head.base_layer.bias",
            "head.base_layer.base_layer.bias",
            "would name it 'base_model.model.head.base_layer.bias'",
        ),
        ("head.lora", "head.base_layer.lora", "'head' has factors inside 1 wrappers, of which only 0 have factors"),
        (
            "moe.lora",
            "moe.base_layer.base_layer.base_layer.lora",
            "'moe' has factors inside 3 wrappers, of which only 1",
        ),
        (
            "moe.base_layer.lora",
            "moe.base_layer.base_layer.lora",
            "'moe' has factors inside 2 wrappers, of which only 1",
        ),
    ],
)
def test_keys_go_through_all_wrappers(wrapped, old, new, message):
    folder, load = wrapped
    assert {"moe/up", "moe/down", "moe/gate/kernel", "moe/bias", "moe/tail/0/kernel"} <= set(load())
    renamed(folder, old, new)
    with pytest.raises(ValueError, match=message):
        load()


def test_no_two_tensors_are_for_one_thing(wrapped):
    folder, load = wrapped
    edit(folder, {}, {"base_model.model.head.bias": np.ones(5, np.float32)})
    with pytest.raises(ValueError, match=r"are for one: '.*head.base_layer.bias' and '.*head.bias'"):
        load()
    renamed(folder, "head.base_layer.bias", "head.bias")  # as before PEFT 0.7
    assert "head/bias" in load()


def test_parameters_that_the_configuration_lists_are_there(saved):
    gone = {k: None for k in load_file(saved / "adapter_model.safetensors") if ".down." in k}
    edit(saved, {"target_modules": ["up"], "target_parameters": ["down.weight"]}, gone)
    with pytest.raises(ValueError, match=r"lacks factors for 1 weights: down\.weight"):
        jlora.peft.load(saved, SITES)


def test_modules_of_the_base_may_be_named_as_wrappers_are(tmp_path):
    names = {r"(up|down)/kernel": r"net.base_layer.\1.weight", "down/bias": "net.base_layer.down.bias"}
    lora = fresh(jlora.Full(targets="down/bias"), jlora.LoRA(rank=2, targets=".*kernel"))
    jlora.peft.save(tmp_path / "a", lora, names=names)
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert "base_model.model.net.base_layer.down.base_layer.bias" in keys
    again = jlora.peft.load(tmp_path / "a", SITES, names=names, params=PARAMS)
    np.testing.assert_allclose(again["up/kernel"].delta(), lora["up/kernel"].delta(), rtol=1e-6)
    np.testing.assert_array_equal(again["down/bias"].value, lora["down/bias"].value)


def moe(params, x):
    p = params["moe"]
    y = jnp.einsum("etd,edh->eth", jnp.broadcast_to(x, (3, *x.shape)), p["w"]).sum(0)
    z = y @ p["gate"]["kernel"] + p["bias"]
    return z @ p["kernel"] + params["proj"]["bias"] @ params["in_proj"]["kernel"] + params["table"][jnp.arange(2)]


MOE = {
    "moe": {
        "w": jnp.ones((3, 4, 4)),
        "gate": {"kernel": jnp.ones((4, 4))},
        "bias": jnp.ones(4),
        "kernel": jnp.ones((4, 4)),
    },
    "proj": {"bias": jnp.ones(4)},
    "in_proj": {"kernel": jnp.ones((4, 4))},
    "table": jnp.ones((5, 4)),
}
TOP = {"table": "table.weight"}


@pytest.mark.parametrize(
    ("lora", "full", "names", "message"),
    [
        (
            ["moe/w", "moe/gate/kernel"],
            [],
            {"moe/gate/kernel": Weight("moe.gate.weight", nesting=0)},
            "PEFT cannot adapt parameters of 'moe' and of 'moe.gate' inside it: 'moe.w' and 'moe.gate.weight'",
        ),
        (["moe/w", "moe/kernel"], [], {}, "PEFT adapts either 'moe' or its parameters, and 'moe.w' is one"),
        (["moe/w"], ["moe/gate/kernel"], {}, "PEFT refuses modules_to_save='moe.gate' where parameters of 'moe', .*\n.*moe.w"),
        (["in_proj/kernel"], ["moe/w"], {}, "modules_to_save='moe' for 'moe.gate.weight' too"),
        (
            ["moe/w"],
            [],
            {"moe/w": "experts.w", "moe/kernel": "mlp.experts.w"},
            "PEFT would take target_parameters='experts.w' for 'mlp.experts.w' too",
        ),
        (["in_proj/kernel"], [], {"in_proj/kernel": "in_proj_weight"}, "'in_proj/kernel' is a parameter of the model itself"),
        (["table"], [], {"table": Weight("table.weight", nesting=0)}, "'table' is used as lookup.\n  Leave nesting out"),
        (
            ["moe/gate/kernel"],
            [],
            {"moe/gate/kernel": "attn.out_proj.weight", "in_proj/kernel": "attn.in_proj_weight"},
            "No adapter of 'attn.out_proj' means the same to every PEFT",
        ),
        (
            ["in_proj/kernel"],
            [],
            {"moe/gate/kernel": "attn.in_proj_weight", "in_proj/kernel": "attn.in_proj_weight"},
            "'attn.in_proj_weight' is the name of 'in_proj/kernel' and 'moe/gate/kernel'",
        ),
    ],
)  # fmt: skip
def test_what_peft_would_file_elsewhere_is_refused(lora, full, names, message, tmp_path):
    sites = jlora.sites(moe, MOE, jnp.ones((2, 4)))
    rules = [jlora.LoRA(rank=2, targets=lora), *([jlora.Full(targets=full)] if full else [])]
    adapter = jlora.init(jax.random.key(0), MOE, sites, rules)
    with pytest.raises(ValueError, match=message):
        jlora.peft.save(tmp_path / "a", adapter, names=TOP | names, sites=sites, params=MOE)
    assert not (tmp_path / "a").exists()


def test_nesting_says_that_a_matrix_is_adapted_itself(tmp_path):
    sites = jlora.sites(moe, MOE, jnp.ones((2, 4)))
    lora = jlora.init(jax.random.key(0), MOE, sites, jlora.LoRA(rank=2, targets=["moe/w", "moe/kernel"]))
    lora = jax.tree.map(lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), lora)
    names = TOP | {"moe/w": Weight("moe.w", "out_in", nesting=1), "moe/kernel": Weight("moe.weight", nesting=0)}
    jlora.peft.save(tmp_path / "a", lora, names=names)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["target_parameters"]) == ([], ["moe.w", "moe.weight"])
    again = jlora.peft.load(tmp_path / "a", sites, names=names)
    for path in lora:
        np.testing.assert_allclose(again[path].delta(), lora[path].delta(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"factors for 2 of the parameters .*, and does not name them"):
        jlora.peft.load(tmp_path / "a", sites, names=TOP | {"moe/kernel": "moe.weight"})


# --- nn.MultiheadAttention ---


def attention(tmp_path, config=None):
    port, want = PORTS["attention"](), expected("attention")
    sites, _ = base_of("attention", port, want["x"])
    shutil.copytree(FOLDER / "attention", tmp_path / "a", dirs_exist_ok=True)
    edit(tmp_path / "a", config)
    return jlora.peft.load(tmp_path / "a", sites, names=port.names)


def test_the_output_projection_counts_as_often_as_in_peft(tmp_path):
    scale = 5 / 2
    lora = attention(tmp_path)
    assert (lora["attn/in_proj/kernel"].scale, lora["attn/out_proj/kernel"].scale) == (scale, 2 * scale)
    lora = attention(tmp_path, {"peft_version": "0.21.2.dev0"})
    assert lora["attn/out_proj/kernel"].scale == 2 * scale
    with pytest.raises(
        ValueError, match=r"up to 0.21.2 adds the update of 'attn.out_proj' .* twice; this file is of 0.21.3"
    ):
        attention(tmp_path, {"peft_version": "0.21.3"})


def test_the_rank_of_the_output_projection_is_that_of_attention(tmp_path):
    assert attention(tmp_path, {"alpha_pattern": {"attn": 3, "out_proj": 7}})["attn/out_proj/kernel"].scale == 3


def test_an_output_projection_that_peft_never_calls_is_refused(tmp_path):
    config = {"target_parameters": ["attn.in_proj_weight"], "target_modules": ["head", "out_proj"]}
    with pytest.raises(ValueError, match=r"'attn.out_proj' has no effect in PEFT.*\n  The target was to be 'attn'"):
        attention(tmp_path, config)
    port, want = PORTS["attention"](), expected("attention")
    sites, _ = base_of("attention", port, want["x"])
    own = port.names | {"attn/in_proj/kernel": Weight("attn.in_proj_weight", nesting=0)}  # another module
    assert jlora.peft.load(tmp_path / "a", sites, names=own)["attn/out_proj/kernel"].scale == 5 / 2
    renamed(tmp_path / "a", "attn.base_layer.out_proj", "attn.out_proj")
    gone = {f"base_model.model.attn.lora_{x}.weight": None for x in "AB"}
    edit(tmp_path / "a", {"target_parameters": None}, gone)
    with pytest.raises(ValueError, match=r"'attn.out_proj' has no effect in PEFT"):
        jlora.peft.load(tmp_path / "a", sites, names=port.names)


def test_attention_that_was_cut_is_refused(tmp_path):
    port, want = PORTS["attention"](), expected("attention")
    sites, _ = base_of("attention", port, want["x"])
    shutil.copytree(FOLDER / "attention", tmp_path / "a")
    edit(
        tmp_path / "a", {}, {k: None for k in load_file(tmp_path / "a" / "adapter_model.safetensors") if ".attn." in k}
    )
    with pytest.raises(ValueError, match=r"lacks factors for 2 weights: attn.in_proj_weight, attn.out_proj.weight"):
        jlora.peft.load(tmp_path / "a", sites, names=port.names)


def test_attention_without_its_base(tmp_path):
    lora, sites = jlora.peft.read(FOLDER / "attention")
    assert {path: x.scale for path, x in lora.items()} == {
        "attn.in_proj_weight": 2.5,
        "attn.out_proj.weight": 5,
        "head.weight": 2.5,
    }
    with pytest.raises(ValueError, match=r"No adapter of 'attn.out_proj' means the same to every PEFT"):
        jlora.peft.save(tmp_path / "a", lora, names=lambda path: path, sites=sites)


# --- The base's files ---


def base_files(folder, tensors, shards=1):
    """A base as Hugging Face has it."""
    folder.mkdir()
    parts = [dict(list(tensors.items())[i::shards]) for i in range(shards)]
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {f"model-{i}.safetensors": part for i, part in enumerate(parts)}
    for file, part in files.items():
        save_file(part, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def zeros(*shape):
    return np.zeros(shape, np.float32)


NAMED = {r"(up|down)/kernel": r"net.h.0.\1.weight", "down/bias": "net.h.0.down.bias"}
BOTH = [jlora.LoRA(rank=2, targets=".*kernel"), jlora.Full(targets="down/bias")]


@pytest.mark.parametrize("prefix", ["net.h.0.", "h.0.", "0.", "", "whole.net.h.0."])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_base_that_has_every_weight(prefix, shards, tmp_path):
    tensors = {"up.weight": zeros(5, 3), "down.weight": zeros(7, 5), "down.bias": zeros(7), "other": zeros(1)}
    folder = base_files(tmp_path / "base", {prefix + name: x for name, x in tensors.items()}, shards)
    jlora.peft.save(tmp_path / "a", fresh(*BOTH), names=NAMED, base_folder=folder)
    assert "base_model.model.net.h.0.up.lora_A.weight" in load_file(tmp_path / "a" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"net.h.0.up.weight": zeros(5, 3), "net.h.0.dwon.weight": zeros(7, 5), "net.h.0.down.bias": zeros(7)},
            r"1 of the adapter's 3 weights do not fit the base at .*base:\n"
            r"  net.h.0.down.weight is not there; nearest: net.h.0.dwon.weight",
        ),
        (
            {"h.0.up.weight": zeros(5, 4), "h.0.down.weight": zeros(5, 7), "h.0.down.bias": zeros(6)},
            r"2 of .* \(names were looked up without 'net.'\):\n  net.h.0.up.weight is \(5, 4\) there; the adapter is for "
            r"\(5, 3\) or \(3, 5\)\n|net.h.0.down.bias is \(6,\) there; the adapter is for \(7,\)",
        ),
        (
            {f"{side}.net.h.0.{name}": zeros(1) for side in ("a", "b") for name in ("up.weight", "down.weight", "down.bias")},
            r"in 2 ways: with 'a.' before them, with 'b.' before them.\n  Give the weights their whole names",
        ),
        ({"h.0.up.weight": zeros(5, 3), "0.down.weight": zeros(7, 5)}, "2 of .* do not fit the base"),
    ],
)  # fmt: skip
def test_a_base_that_lacks_a_weight(tensors, message, tmp_path):
    folder = base_files(tmp_path / "base", tensors)
    with pytest.raises(ValueError, match=message):
        jlora.peft.save(tmp_path / "a", fresh(*BOTH), names=NAMED, base_folder=folder)
    assert not (tmp_path / "a").exists()
    with pytest.raises(FileNotFoundError, match="There are no weights at"):
        jlora.peft.save(tmp_path / "a", fresh(*BOTH), names=NAMED, base_folder=tmp_path)


@pytest.mark.parametrize("kind", sorted({*PORTS} - {"attention", "gpt2_bias", "llama_tokens"}))
def test_the_bases_of_the_fixtures_have_what_is_saved_for_them(kind, tmp_path):
    port, want = PORTS[kind](), expected(kind)
    sites, params = base_of(kind, port, want["x"])
    lora = jlora.peft.load(FOLDER / kind, sites, names=port.names, params=params)
    options = {"names": port.names, "sites": sites, "params": params}
    jlora.peft.save(tmp_path / "a", lora, base_folder=FOLDER / kind / "base.safetensors", **options)


def test_a_layout_that_is_said_has_to_be_that_of_the_base(tmp_path):
    folder = base_files(tmp_path / "base", {"up.weight": zeros(3, 5), "down.weight": zeros(5, 7)})
    jlora.peft.save(tmp_path / "a", fresh(), base_folder=folder)  # Conv1D: an adapter for it is the same
    names = {"(.*)/kernel": Weight(r"\1.weight", "out_in")}
    with pytest.raises(ValueError, match=r"down.weight is \(5, 7\) there; the adapter is for \(7, 5\)\n"):
        jlora.peft.save(tmp_path / "b", fresh(), names=names, base_folder=folder)
