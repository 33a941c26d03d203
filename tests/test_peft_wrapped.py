"""PEFT's wrappers in wrappers: parameters of a module beside its layers, experts beside routers, ``nn.MultiheadAttention``."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_case import FOLDER, PARAMS, SITES, base_of, edit, expected, fresh
from peft_case import promotion as promotion
from peft_case import saved as saved
from peft_models import PORTS
from safetensors.numpy import load_file

import jlora
import jlora.peft
from jlora.peft import Weight


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
        ("head.lora", "head.base_layer.lora", "'head' has factors inside 1 wrapper, of which only 0 have factors"),
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
    with pytest.raises(ValueError, match=r"lacks factors for 1 weight: down\.weight"):
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
