"""``jlora convert``: there and back, names, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from cli_case import DOWN, MIX, NAMES, PARAMS, PEFT, UP, base_of, call, called, checkpoint, same_updates, trained, whole
from safetensors.numpy import load_file, save_file

import jlora
import jlora.peft


def test_there_and_back(here, own):
    (here / "names.json").write_text(json.dumps(NAMES))
    found = called("convert", "one", "p", "--to", "peft", "--names", "names.json", "--task-type", "CAUSAL_LM")
    assert {x["path"] for x in found["sites"]} == {f"model.layers.{i}.mix.weight" for i in range(4)} | {
        "up.weight",
        "down.weight",
    }
    config = json.loads((here / "p" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("me/tiny", "CAUSAL_LM")
    found = called("convert", "p", "back", "--to", "orbax", "--names", "names.json", "--like", "two")
    assert {x["path"] for x in found["sites"]} == {UP, MIX, DOWN}
    same_updates(jlora.load(here / "back", PARAMS), trained(0))
    assert jlora.metadata(here / "back")["meta"] == {"base_model_name_or_path": "me/tiny", "task_type": "CAUSAL_LM"}
    assert called("diff", "one", "back")["same"]


def test_a_checkpoint_tells_axes_too(here):
    jlora.save(here / "one", trained(0, [jlora.LoRA(rank=2, targets=(UP, DOWN))]))
    call("convert", "one", "p", "--to", "peft")
    base = checkpoint(here / "base", PARAMS)
    call("convert", "p", "back", "--to", "orbax", "--base", base)
    same_updates(jlora.load(here / "back", PARAMS), jlora.load(here / "one"))
    call("convert", "p", "b16", "--to", "orbax", "--base", base, "--dtype", "bfloat16")
    assert jlora.load(here / "b16")[UP].a.dtype == jnp.bfloat16


def test_whole_biases_are_converted(here):
    jlora.save(here / "one", trained(0, [jlora.LoRA(rank=2, targets=UP), jlora.Full(targets=".*bias")]))
    call("convert", "one", "p", "--to", "peft")
    for how in (("--like", "one"), ("--base", checkpoint(here / "base", PARAMS))):
        call("convert", "p", "back", "--to", "orbax", "--force", *how)
        again = jlora.load(here / "back", PARAMS)
        np.testing.assert_array_equal(again["params/up/bias"].value, jlora.load(here / "one")["params/up/bias"].value)


NAME_ERRORS = [
    ("[]", "holds list, not an object"),
    ("{", "is not JSON"),
    ('{"a": 3}', "'a' in names.json must be a name"),
    ('{"a": {"layout": "out_in"}}', "'a' in names.json must be a name"),
    ('{"a": {"name": "b", "rotary_heads": true}}', "must be a name"),
    ('{"a": {"name": "b", "rotary_heads": 0}}', "rotary_heads of 'a'"),
    ('{"a": {"name": "b", "transposed": true}}', "must be a name"),
    ('{"a": {"name": "b", "transposed": "up"}}', "must be 'reversed' or 'as_is'"),
    ('{"a": {"name": "b", "layout": "up"}}', "must be 'out_in' or 'in_out'"),
    ('{"nothing": "b"}', "No leaf has the path 'nothing' of names"),
    ('{"(": "b"}', "is not a regular expression"),
]


@pytest.mark.parametrize(("text", "message"), NAME_ERRORS)
def test_names_are_checked(text, message, here, own):
    (here / "names.json").write_text(text)
    assert message in call("convert", "one", "p", "--to", "peft", "--names", "names.json", code=2)
    assert not (here / "p").exists()


def test_names_that_no_base_was_asked_for_are_told(here, own):
    (here / "names.json").write_text(json.dumps(NAMES))
    text = call("convert", "one", "a", "--to", "peft")
    assert "names: made of the paths" in text
    assert "names were not compared with PEFT's base; --base-folder FOLDER" in text
    found = called("convert", "one", "b", "--to", "peft", "--names", "names.json")
    assert (found["names"], found["compared_with"]) == ("names.json", None)
    base = base_of("llama", here)
    message = call("convert", "one", "c", "--to", "peft", "--base-folder", base, code=2)
    assert f"do not fit the base at {base}" in message
    assert not (here / "c").exists()
    tensors, _ = jlora.peft.read(here / "a")
    save_file({p: np.zeros(x.shape, np.float32) for p, x in tensors.items()}, here / "whole.safetensors")
    (here / "torch").mkdir()
    (here / "whole.safetensors").rename(here / "torch" / "model.safetensors")
    assert "names and shapes are those of torch" in call(
        "convert", "one", "c", "--to", "peft", "--base-folder", "torch"
    )
    assert "--base-folder" in call(
        "convert", "a", "d", "--to", "orbax", "--base-folder", "torch", "--like", "one", code=2
    )


def test_converting_is_refused(here, own):
    call("convert", "one", "p", "--to", "peft", "--names", (here / "n.json").write_text(json.dumps(NAMES)) and "n.json")
    message = call("convert", "p", "back", "--to", "orbax", code=2)
    assert "--like ADAPTER" in message
    assert "jlora.peft.load(folder, jlora.sites(fn, params, x), names=...)" in message
    assert "one is orbax already" in call("convert", "one", "b", "--to", "orbax", code=2)
    assert "p is peft already" in call("convert", "p", "b", "--to", "peft", code=2)
    assert "--like takes one of jlora's own" in call("convert", "p", "b", "--to", "orbax", "--like", "p", code=2)
    assert "are for --to peft" in call("convert", "p", "b", "--to", "orbax", "--base-model", "x", code=2)
    base = base_of("llama", here)
    assert "--base takes an orbax checkpoint" in call("convert", "p", "b", "--to", "orbax", "--base", base, code=2)
    assert "tensors of the adapter are for nothing in the base" in call(
        "convert", PEFT / "llama", "b", "--to", "orbax", "--like", "one", code=2
    )


def test_converting_whole_kernels(here):
    """Square and stacked: the adapter knows its axes, and so does --like."""
    jlora.save(here / "one", whole(0))
    (here / "names.json").write_text(json.dumps(NAMES))
    call("convert", "one", "p", "--to", "peft", "--names", "names.json")
    found = load_file(here / "p" / "adapter_model.safetensors")
    np.testing.assert_array_equal(found["base_model.model.model.layers.2.mix.weight"], whole(0)[MIX].value[2].T)
    call("convert", "p", "back", "--to", "orbax", "--names", "names.json", "--like", "one")
    np.testing.assert_array_equal(jlora.load(here / "back", PARAMS)[MIX].value, whole(0)[MIX].value)
    base = checkpoint(here / "base", PARAMS)
    message = call("convert", "p", "b", "--to", "orbax", "--names", "names.json", "--base", base, code=2)
    assert "How the axes of 'model.layers.0.mix.weight' lie here" in message
    assert "--like ADAPTER" in message
    assert "--base tells the axes of matrices named kernel alone" in message
    assert "jlora.save(folder, jlora.peft.load(" in message
