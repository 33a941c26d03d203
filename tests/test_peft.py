"""PEFT adapters: files that the real PEFT made give its outputs here, and what is saved here comes back.

The fixtures come from ``make_peft_fixtures.py``; ``test_peft_real.py`` goes the other way.
"""

import json
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
import jlora.peft
from jlora.peft import default_name


@pytest.mark.parametrize("kind", PORTS)
def test_an_adapter_of_peft_gives_its_outputs(kind):
    port, want = PORTS[kind](), expected(kind)
    sites, params = base_of(kind, port, want["x"])
    np.testing.assert_allclose(port.fn(params, want["x"]), want["before"], atol=1e-5)
    lora = jlora.peft.load(FOLDER / kind, sites, names=port.names, params=params)
    np.testing.assert_allclose(jlora.wrap(port.fn)(params, lora, want["x"]), want["after"], atol=1e-5)
    if any(getattr(x, "only", "") for x in lora.values()):
        with pytest.raises(ValueError, match="cannot be merged"):
            jlora.merge(params, lora)
    else:
        np.testing.assert_allclose(port.fn(jlora.merge(params, lora), want["x"]), want["after"], atol=1e-5)
    assert float(abs(want["after"] - want["before"]).max()) > 0.05


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
