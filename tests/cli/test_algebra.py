"""``jlora resize``, ``combine`` and ``diff``."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_case import DOWN, MIX, PARAMS, PEFT, SITES, UP, call, called, same_updates, trained
from safetensors.numpy import load_file, save_file

import jlora
import jlora.peft
from jlora import algebra


def test_resizing(here, own):
    found = called("resize", "one", "small", "--rank", 1)
    want, kept = algebra.resize(trained(0), 1, report=True)
    same_updates(jlora.load(here / "small", PARAMS), want)
    assert {x["path"]: x["energy"] for x in found["sites"]} == pytest.approx({k: float(x) for k, x in kept.items()})
    assert jlora.metadata(here / "small")["meta"] == jlora.metadata(here / "one")["meta"]
    call("resize", "one", "large", "--rank", 3, "--dtype", "bfloat16")
    assert jlora.load(here / "large")[UP].a.dtype == jnp.bfloat16


def test_resizing_peft(here):
    found = called("resize", PEFT / "bert", "small", "--energy", 0.8)
    lora, _ = jlora.peft.read(PEFT / "bert")
    want = {p: x for p, x in algebra.resize(lora, energy=0.8).items() if isinstance(x, jlora.LowRank)}
    again, _ = jlora.peft.read(here / "small")
    same_updates({p: again[p] for p in want}, want)
    assert "classifier.weight" in again
    assert {x["rank"] for x in found["sites"]} == {1, 2}
    assert {x["rank_in_file"] for x in found["sites"]} == {2}
    assert {x.rank for x in again.values() if isinstance(x, jlora.LowRank)} == {2}
    text = call("resize", PEFT / "bert", "small", "--energy", 0.8, "--force")
    assert "padded with zeros to rank 2" in text
    assert "1 (2 in the file)" in text
    found = called("resize", PEFT / "bert", "patterns", "--energy", 0.8, "--rank-pattern")
    assert all(x["rank_in_file"] == x["rank"] for x in found["sites"])
    again, _ = jlora.peft.read(here / "patterns")
    assert {x.rank for x in again.values() if isinstance(x, jlora.LowRank)} == {1, 2}


def test_resizing_is_refused(own):
    assert "either --rank or --energy" in call("resize", "one", "x", code=2)
    assert "either --rank or --energy" in call("resize", "one", "x", "--rank", 1, "--energy", 0.5, code=2)
    assert "Rank 99 is above" in call("resize", "one", "x", "--rank", 99, code=2)
    assert "energy must be a number" in call("resize", "one", "x", "--energy", 2, code=2)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (("--weights", "0.5,-1"), {"weights": [0.5, -1.0]}),
        (("--method", "svd", "--rank", 1), {"method": "svd", "rank": 1}),
        (("--method", "ties", "--density", 0.5), {"method": "ties", "density": 0.5}),
        (
            ("--method", "dare", "--density", 0.5, "--seed", 3),
            {"method": "dare", "density": 0.5, "key": jax.random.key(3)},
        ),
    ],
)
def test_combining(options, arguments, here, own):
    found = called("combine", "sum", "one", "two", *options)
    same_updates(jlora.load(here / "sum", PARAMS), algebra.combine([trained(0), trained(1)], **arguments))
    assert set(found) == {"out", "format", "method", "weights", "inputs", "sites"}
    assert found["sites"][0]["of"] == [0, 1]
    assert jlora.metadata(here / "sum")["meta"] == {"base_model_name_or_path": "me/tiny"}  # what both say


def test_combining_peft_adapters_of_different_targets(here):
    found = called("combine", "sum", PEFT / "llama", PEFT / "llama_rslora_patterns", "--weights", "1,2")
    (one, _), (two, _), (got, _) = map(jlora.peft.read, (PEFT / "llama", PEFT / "llama_rslora_patterns", here / "sum"))
    assert set(got) == set(one) | set(two)
    for path, x in got.items():
        want = sum(w * lora[path].delta() for w, lora in ((1, one), (2, two)) if path in lora)
        np.testing.assert_allclose(x.delta(), want, atol=1e-5)
    assert {len(x["of"]) for x in found["sites"]} == {1, 2}


def test_combining_is_refused(here, own):
    assert "The order is: jlora combine OUT ADAPTER ADAPTER" in call("combine", "one", "two", "--force", code=2)
    message = call("combine", "x", "one", "--weights", "1,2", code=2)
    assert "2 weights, 1 adapter\n  The order is: jlora combine OUT" in message
    assert "takes numbers and commas" in call("combine", "x", "one", "--weights", "a", code=2)
    assert "finite" in call("combine", "x", "one", "--weights", "nan", code=2)
    assert "dare needs a --seed" in call("combine", "x", "one", "--method", "dare", "--density", 0.5, code=2)
    assert "dare needs a --seed" in call("combine", "x", "one", "--seed", 1, code=2)
    assert "has no use for rank" in call("combine", "x", "one", "two", "--rank", 1, code=2)
    assert "of one format: one is orbax, llama is peft" in call("combine", "x", "one", PEFT / "llama", code=2)
    message = call("combine", "x", PEFT / "bert", PEFT / "bert", code=2)
    assert "'classifier.bias' is trained outright" in message
    assert "Pass the base: --base BASE." in message
    assert "--density 0.5" in call("combine", "x", "one", "two", "--method", "ties", code=2)
    jlora.save(here / "three", trained(0), base_model_name_or_path="me/other")
    assert "name different bases: me/other and me/tiny" in call("combine", "x", "one", "three", code=2)
    call("combine", "x", "one", "three", "--base-model", "me/tiny")


def test_adapters_of_other_shapes_are_refused(here):
    shutil.copytree(PEFT / "llama", here / "other")
    found = load_file(here / "other" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file(found | {key: np.ones((2, 25), np.float32)}, here / "other" / "adapter_model.safetensors")
    assert "are for different bases: 'model.layers.0.mlp.up_proj.weight' is (20, 25)" in call(
        "combine", "x", PEFT / "llama", "other", code=2
    )


def test_diff(here, own):
    jlora.save(here / "again", trained(0))
    assert "the same" in call("diff", "one", "again")
    found = called("diff", "one", "two", code=1)
    want = algebra.compare(trained(0), trained(1))
    for site in found["sites"]:
        assert site["cosine"] == pytest.approx(float(want[site["path"]].cosine.min()), abs=1e-6)
        assert site["difference"] == pytest.approx(float(want[site["path"]].difference.max()), rel=1e-5)
        assert 0 <= site["input_angle"] <= 90.001
    assert not found["same"]
    assert called("diff", "one", "two", "--tol", 100)["same"]
    jlora.save(here / "less", {UP: trained(0)[UP]})
    found = called("diff", "less", "one", code=1)
    assert (found["only_in_one"], found["only_in_two"]) == ([], sorted([MIX, DOWN]))
    assert f"only in one: {MIX}" in call("diff", "less", "one", code=1)


def test_diff_has_no_angles_of_directions_that_are_not_there(here, own):
    call("resize", "one", "wide", "--rank", 3)
    for site in called("diff", "wide", "wide")["sites"]:
        assert site["input_angle"] < 1
        assert site["output_angle"] < 1
    jlora.save(here / "fresh", jlora.init(jax.random.key(0), PARAMS, SITES, jlora.LoRA(rank=2, targets=UP)))
    assert called("diff", "fresh", "fresh")["sites"][0]["input_angle"] is None


def test_diff_of_peft_and_of_whole_leaves(here):
    assert called("diff", PEFT / "bert", PEFT / "bert")["same"]
    shutil.copytree(PEFT / "bert", here / "b")
    found = load_file(here / "b" / "adapter_model.safetensors")
    key = "base_model.model.classifier.bias"
    save_file(found | {key: found[key] * 2}, here / "b" / "adapter_model.safetensors")
    got = {x["path"]: x["difference"] for x in called("diff", PEFT / "bert", "b", code=1)["sites"]}
    assert got.pop("classifier.bias") == pytest.approx(1)
    assert max(got.values()) < 1e-5
    found = called("diff", PEFT / "llama", PEFT / "llama_rslora_patterns", code=1)
    assert len(found["only_in_one"]) == 8
    assert "--tol must be" in call("diff", "b", "b", "--tol", "nan", code=2)
    assert "--conv1d is for PEFT's adapters, with --base" in call("diff", "b", "b", "--conv1d", "x", code=2)
