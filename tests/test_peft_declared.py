"""A PEFT adapter whose configuration and tensors disagree, or whose keys are spelled in another way."""

import jax.numpy as jnp
import numpy as np
import pytest
from peft_case import PARAMS, SITES, UP, edit
from peft_case import promotion as promotion
from peft_case import saved as saved
from safetensors.numpy import load_file, save_file

import jlora.peft

M = "base_model.model."
FIVE, SEVEN = np.ones(5, np.float32), np.ones(7, np.float32)
WHOLE = {f"{M}down.weight": np.ones((7, 5), np.float32)}
GONE = {f"{M}down.lora_{c}.weight": None for c in "AB"}


MISSING = [
    ({}, GONE, r"lacks factors for 1 weight: down.weight"),
    ({"target_modules": "(up|down)"}, GONE, r"lacks factors for 1 weight: down.weight"),
    ({"exclude_modules": ["up"]}, {}, "factors for 1 module that its configuration leaves out: up"),
    ({"exclude_modules": "u.*"}, {}, "factors for 1 module that its configuration leaves out: up"),
    ({"target_modules": ["down"]}, {}, "factors for 1 module that its configuration leaves out: up"),
    ({"modules_to_save": ["head"]}, {}, "modules_to_save, and the adapter has nothing for: head"),
    ({"modules_to_save": ["down"]}, GONE | WHOLE, "modules_to_save, and the adapter lacks: down.bias"),
    ({"trainable_token_indices": {"up": [1]}}, {}, "trainable_token_indices, and the adapter has no rows of: up"),
    ({}, {f"{M}up.token_adapter.trainable_tokens_delta": np.ones((1, 3), np.float32)}, "trained tokens that its configuration does not"),
    ({"lora_bias": True}, {f"{M}down.lora_B.bias": SEVEN}, "lora_bias=true, and the adapter lacks lora_B.bias of: up"),
    ({}, {f"{M}down.lora_B.bias": SEVEN}, "biases of B, and its configuration says lora_bias=false: .*down"),
    ({"bias": "all"}, {}, "bias=all, and the adapter lacks: down.bias"),
    ({"bias": "lora_only"}, {}, "bias=lora_only, and the adapter lacks: down.bias"),
    ({}, {f"{M}down.base_layer.bias": SEVEN}, "biases of the base, and its configuration says bias=none: .*down"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "tensors", "message"), MISSING)
def test_configuration_and_tensors_have_to_agree(saved, config, tensors, message):
    edit(saved, config, tensors)
    with pytest.raises(ValueError, match=message):
        jlora.peft.load(saved, SITES, params=PARAMS)


def test_older_peft_lost_the_biases(saved):
    edit(saved, {"bias": "lora_only", "peft_version": "0.19.1"})
    assert set(jlora.peft.load(saved, SITES, params=PARAMS)) == {"down/kernel", "up/kernel"}


def test_whole_weights_that_are_not_listed(saved):
    whole = {f"{M}norm{i}.weight": FIVE for i in range(2)}
    edit(saved, {}, whole)
    with pytest.raises(ValueError, match=r"whole weights that its configuration does not list: .*norm0"):
        jlora.peft.read(saved)


def test_patterns_of_ranks_may_be_regular_expressions(saved):
    """The tensors say which rank of several; alphas have to be one."""
    edit(saved, {"r": 7, "rank_pattern": {"u.*|down": 2, "(up|x)": 3}, "alpha_pattern": {r"(?!up).*\b": 8, "[u]p": 5}})
    lora = jlora.peft.load(saved, SITES)
    assert (lora["down/kernel"].scale, lora["up/kernel"].scale) == (4, 2.5)


SPELLINGS = [
    lambda key: key.replace(M, M + "_orig_mod."),
    lambda key: key.replace(M, "_fsdp_wrapped_module." + M),
    lambda key: key.replace(".weight", ".default.weight"),
    lambda key: key.removeprefix(M),
    lambda key: "module." + key,
    lambda key: M + key,
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_keys_of_wrappers_and_dumps(saved, spelling):
    want = jlora.peft.load(saved, SITES)
    file = saved / "adapter_model.safetensors"
    save_file({spelling(key): x for key, x in load_file(file).items()}, file)
    edit(saved, {"init_lora_weights": None})
    for path, x in jlora.peft.load(saved, SITES).items():
        assert jnp.array_equal(x.delta(), want[path].delta())


MIXED = [
    ({UP: None, UP.replace("A.", "A.default."): np.ones((2, 3), np.float32)}, "has the adapter's name 'default'"),
    (
        {UP.replace("A.", f"A.{name}."): np.ones((2, 3), np.float32) for name in ("a", "b")} | {UP: None},
        "holds 2 adapters: a, b",
    ),
    ({M + UP: np.ones((2, 3), np.float32)}, "named in several ways"),
    ({UP.replace("up", "_orig_mod.up"): np.ones((2, 3), np.float32)}, "are for one: .*_orig_mod"),
]


@pytest.mark.parametrize(("tensors", "message"), MIXED)
def test_mixed_spellings_are_refused(saved, tensors, message):
    edit(saved, {}, tensors)
    with pytest.raises(ValueError, match=message):
        jlora.peft.load(saved, SITES)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda key: key.replace(M, "module."), "begin with 'module.' and not with 'base_model.model.'"),
        (lambda key: key.replace("lora_", "other_").removeprefix(M), "and none is a factor: it is not an adapter"),
        (lambda key: key.replace(M, M + "model."), "All would be there: 'model.' before their names is too much"),
    ],
)
def test_keys_whose_spelling_is_unclear(saved, rename, message):
    file = saved / "adapter_model.safetensors"
    save_file({rename(key): x for key, x in load_file(file).items()}, file)
    edit(saved)
    with pytest.raises(ValueError, match=message):
        jlora.peft.load(saved, SITES)
