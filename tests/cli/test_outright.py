"""Leaves trained outright in ``jlora combine``, ``convert`` and ``diff``."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from cli_case import DOWN, MIX, PARAMS, PEFT, UP, base_of, call, called, checkpoint, renamed, trained, whole
from safetensors.numpy import load_file, save_file

import jlora
from jlora import _cli_show, algebra
from jlora._advice import Advised


def test_combining_whole_leaves_of_peft(here):
    """A mean of values needs no base; another sum does."""
    base = base_of("bert", here)
    shutil.copytree(PEFT / "bert", here / "b")
    file = here / "b" / "adapter_model.safetensors"
    found = load_file(file)
    key = "base_model.model.classifier.weight"
    save_file(found | {key: found[key] + 1}, file)
    got = called("combine", "mean", PEFT / "bert", "b", "--weights", "0.5,0.5")
    assert {x["path"]: x["rank"] for x in got["sites"]}["classifier.weight"] is None
    np.testing.assert_allclose(load_file(here / "mean" / "adapter_model.safetensors")[key], found[key] + 0.5, atol=1e-6)
    call("combine", "sum", PEFT / "bert", "b", "--base", base)
    w = load_file(base / "model.safetensors")["classifier.weight"]
    want = w + (found[key] - w) + (found[key] + 1 - w)
    np.testing.assert_allclose(load_file(here / "sum" / "adapter_model.safetensors")[key], want, atol=1e-6)
    ties = ("--method", "ties", "--density", 0.5, "--weights", "0.5,0.5")
    assert "--base BASE" in call("combine", "t", PEFT / "bert", "b", *ties, code=2)
    call("combine", "t", PEFT / "bert", "b", *ties, "--base", base)
    renamed(base, lambda name: f"x.{name}")
    assert "--base lacks 'classifier." in call("combine", "x", PEFT / "bert", "b", "--base", base, code=2)


def test_combining_whole_leaves_of_checkpoints(here):
    params = checkpoint(here / "params", PARAMS)
    for seed, name in enumerate(("one", "two")):
        jlora.save(here / name, whole(seed))
    call("combine", "sum", "one", "two", "--base", params)
    want = algebra.combine([whole(0), whole(1)], params=PARAMS)
    np.testing.assert_allclose(jlora.load(here / "sum", PARAMS)[MIX].value, want[MIX].value, atol=1e-6)
    other = checkpoint(here / "other", {"params": PARAMS["params"] | {"more": jnp.ones(3)}})
    assert "one was made for another base than --base" in call("combine", "x", "one", "two", "--base", other, code=2)
    assert "is an orbax checkpoint of parameters" in call(
        "combine", "x", "one", "two", "--base", base_of("llama", here), code=2
    )


def test_errors_speak_of_options(here):
    jlora.save(here / "one", trained(0, [jlora.Full(targets=UP), jlora.LoRA(rank=2, targets=DOWN)]))
    message = call("convert", "one", "p", "--to", "peft", code=2)
    assert "'params/up/bias' was not trained.\n  Pass the base: --base BASE." in message
    base = checkpoint(here / "base", PARAMS)
    call("convert", "one", "p", "--to", "peft", "--base", base)
    found = load_file(here / "p" / "adapter_model.safetensors")
    np.testing.assert_array_equal(found["base_model.model.up.bias"], PARAMS["params"]["up"]["bias"])
    (here / "n.json").write_text(json.dumps({"params/down/kernel": "x.weight"}))
    message = call("convert", "p", "b", "--to", "orbax", "--base", base, "--names", "n.json", code=2)
    assert "Say so in --names FILE, JSON" in message
    (here / "n.json").write_text(json.dumps({"params/.*/kernel": "same.weight"}))
    message = call("convert", "one", "q", "--to", "peft", "--names", "n.json", "--base", base, code=2)
    assert "--names FILE" in message
    assert "names=" not in message
    message = call("resize", "one", "r", "--rank", 99, code=2)
    assert "Lower --rank" in message
    assert "resize(" not in message
    jlora.save(here / "two", trained(0, [jlora.LoRA(rank=2, targets=UP)]))
    other = checkpoint(here / "other", {"params": PARAMS["params"] | {"more": jnp.ones(3)}})
    assert "Pass the base that it was trained on." in call("merge", other, "two", "m", code=2)
    example = {"a": {"name": "b", "nesting": 0}}
    shown = _cli_show.in_options(Advised("Wrong.", "Weight(...)", "names", example))
    assert shown == (
        "Wrong.\n  Say so in --names FILE, JSON from a path, or a pattern of paths, to a name in PyTorch: "
        f"{json.dumps(example)}."
    )


def test_diff_of_weights_that_one_lacks(here, own):
    lora = trained(0)
    jlora.save(here / "less", {UP: lora[UP]})
    rows = {x["path"]: x for x in called("diff", "one", "less", code=1)["sites"]}
    assert rows[UP]["difference"] < 1e-6
    assert rows[MIX]["norm_one"] == pytest.approx(float(jnp.linalg.norm(lora[MIX].delta())), rel=1e-5)
    assert (rows[MIX]["norm_two"], rows[MIX]["cosine"], rows[MIX]["difference"]) == (0, 0, 1)
    rows = {x["path"]: x for x in called("diff", "less", "one", code=1)["sites"]}
    assert (rows[MIX]["norm_one"], rows[MIX]["difference"]) == (0, None)  # JSON has no infinity
    assert "at most inf" in call("diff", "less", "one", code=1)


def test_diff_of_whole_leaves_with_their_base(here):
    params = checkpoint(here / "params", PARAMS)
    jlora.save(here / "one", whole(0))
    jlora.save(here / "two", {UP: whole(1)[UP], MIX: whole(1)[MIX]})
    rows = {x["path"]: x for x in called("diff", "one", "two", "--base", params, code=1)["sites"]}
    want = algebra.compare(whole(0), {MIX: whole(1)[MIX]}, PARAMS)[MIX]
    assert rows[MIX]["compared"] == "updates"
    assert rows[MIX]["norm_one"] == pytest.approx(float(want.norm_one), rel=1e-5)
    assert rows[MIX]["cosine"] == pytest.approx(float(want.cosine), rel=1e-5)
    assert rows["params/up/bias"]["norm_two"] == 0
    rows = {x["path"]: x for x in called("diff", "one", "two", code=1)["sites"]}
    assert rows[MIX]["compared"] == "values"
    assert rows[MIX]["norm_one"] == pytest.approx(float(jnp.linalg.norm(whole(0)[MIX].value)), rel=1e-5)
    assert (rows["params/up/bias"]["norm_two"], rows["params/up/bias"]["difference"]) == (None, None)
    assert re.search(rf"^{MIX} +values ", call("diff", "one", "two", code=1), re.M)
    jlora.save(here / "low", trained(0, [jlora.LoRA(rank=2, targets=MIX)]))
    jlora.save(here / "full", {MIX: whole(0)[MIX]})
    assert called("diff", "low", "full", code=1)["sites"][0]["norm_one"] is None
    assert called("diff", "low", "full", "--base", params, code=1)["sites"][0]["norm_one"] > 0


def one_weight(folder, name, factors=None, value=None):
    """A PEFT adapter of one weight: factors of it, or what stands for it, beside factors of another."""
    tensors = {"other.lora_A.weight": np.ones((2, 3), np.float32), "other.lora_B.weight": np.ones((3, 2), np.float32)}
    if factors is not None:
        tensors |= {f"{name}.lora_A.weight": factors[0], f"{name}.lora_B.weight": factors[1]}
    else:
        tensors |= {f"{name}.weight": value}
    folder.mkdir()
    save_file(
        {f"base_model.model.{k}": np.ascontiguousarray(x) for k, x in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["other", *([name] if factors else [])]}
    config |= {"modules_to_save": None if factors else [name]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("shape", "conv1d"), [((5, 3), None), ((5, 5), ""), ((5, 5), "x.weight")])
def test_diff_of_factors_and_a_whole_leaf_of_peft(shape, conv1d, here):
    """The same update, as factors of (5, n) and whole: ``Conv1D`` has the transpose."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, shape[1])).astype(np.float32), rng.normal(size=(5, 2)).astype(np.float32)
    w = rng.normal(size=shape).astype(np.float32)
    is_turned = conv1d == "x.weight"
    one_weight(here / "low", "x", factors=(a, b))
    one_weight(here / "full", "x", value=w + ((b @ a).T if is_turned else b @ a))
    (here / "base").mkdir()
    save_file({"x.weight": w, "other.weight": np.zeros((3, 3), np.float32)}, here / "base" / "model.safetensors")
    more = () if conv1d is None else ("--conv1d", conv1d)
    found = called("diff", "low", "full", "--base", "base", *more)
    row = next(x for x in found["sites"] if x["path"] == "x.weight")
    assert row["compared"] == "updates"
    assert row["cosine"] == pytest.approx(1.0)
    assert row["norm_two"] == pytest.approx(float(np.linalg.norm(b @ a)), rel=1e-4)
    assert "trained outright: x.weight; --base BASE compares the updates" in call("diff", "low", "full", code=1)
    if shape == (5, 5):
        assert "may be (out, in), as nn.Linear has it" in call("diff", "low", "full", "--base", "base", code=2)
