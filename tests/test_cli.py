"""The command line: every command on adapters of both formats, its exit codes, its JSON, and what it leaves behind when it fails."""

import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
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

pytest.importorskip("typer", reason='the command line needs pip install "jlora[cli]"')

import orbax.checkpoint as ocp
from typer.testing import CliRunner

from jlora import _cli_app, _cli_merge, _cli_show, _files, algebra, cli
from jlora._advice import Advised

ROOT = Path(__file__).parent.parent
PEFT = Path(__file__).parent / "fixtures" / "peft"
CONV1D = ("--conv1d", ".*c_(attn|proj|fc).weight")


@pytest.fixture(autouse=True)
def promotion(strict_promotion):
    """The models are written as people write them."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*args, code=0):
    """Standard output of ``jlora *args``, or with a code of failure its standard error."""
    result = CliRunner().invoke(_cli_app.app, [str(x) for x in args])
    if result.exit_code != code:
        raise AssertionError(f"{args}: {result.exit_code}\n{result.output}") from result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    if code > 1:
        assert result.stdout == ""
        assert result.stderr.startswith(("jlora: ", "Usage: "))
        return result.stderr
    return result.stdout


def called(*args, code=0):
    return json.loads(call(*args, "--json", code=code))


def model(params, x):
    p = params["params"]
    x = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"])
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"]["mix"])
    return x @ p["down"]["kernel"]


KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "params": {
        "up": {"kernel": jax.random.normal(KEYS[0], (3, 5)), "bias": jnp.zeros(5)},
        "layers": {"mix": jax.random.normal(KEYS[1], (4, 5, 5))},
        "down": {"kernel": jax.random.normal(KEYS[2], (5, 7)).astype(jnp.bfloat16)},
    }
}
SITES = jlora.sites(model, PARAMS, jnp.ones((2, 3)))
UP, MIX, DOWN = "params/up/kernel", "params/layers/mix", "params/down/kernel"


def trained(seed, rules=None):
    rules = rules or [jlora.LoRA(rank=2, alpha=4, targets=(UP, MIX, DOWN))]
    lora = jlora.init(jax.random.key(seed), PARAMS, SITES, rules)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(seed), x.shape, x.dtype), lora)


@pytest.fixture
def own(here):
    """Two adapters of jlora's own, ``one`` and ``two``."""
    for seed, name in enumerate(("one", "two")):
        jlora.save(here / name, trained(seed), base_model_name_or_path="me/tiny", task=f"demo {seed}")
    return here / "one", here / "two"


def checkpoint(path, params):
    with ocp.StandardCheckpointer() as c:
        c.save(path.absolute(), params)
        c.wait_until_finished()
    return path


def restored(path):
    with ocp.StandardCheckpointer() as c:
        return c.restore(path.absolute(), PARAMS)


def base_of(kind, here, **config):
    """The base of a fixture as a folder like those on the Hugging Face hub."""
    folder = here / f"{kind}-base"
    folder.mkdir()
    shutil.copy(PEFT / kind / "base.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": re.split("[_-]", kind)[0]} | config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def same_updates(one, two, tol=1e-5):
    assert set(one) == set(two)
    for path in one:
        a, b = (np.asarray(x[path].delta(None)) for x in (one, two))
        assert np.linalg.norm(a - b) <= tol * np.linalg.norm(a) + 1e-9, path


# --- info ---------------------------------------------------------------------------------------------------------------


def test_rates_of_dropout_that_differ(here):
    jlora.save("two", trained(3, [jlora.LoRA(rank=2, dropout=0.25, targets=UP), jlora.LoRA(rank=2, targets=DOWN)]))
    message = call("convert", "two", "peft", "--to", "peft", code=2)
    assert f"have several: 0.0 at '{DOWN}', 0.25 at '{UP}'" in message
    assert "--dropout RATE" in message
    call("convert", "two", "peft", "--to", "peft", "--dropout", 0.5)
    assert json.loads(Path("peft/adapter_config.json").read_text())["lora_dropout"] == 0.5
    call("combine", "sum", "two", "two", "--dropout", 0.125)
    assert {x.dropout for x in jlora.load("sum").values()} == {0.125}
    assert "--dropout takes a rate" in call("combine", "again", "two", "two", "--dropout", 1, code=2)


def test_info_of_an_own_adapter(own):
    found = called("info", "one")
    sites = {site["path"]: site for site in found["sites"]}
    assert set(sites) == {UP, MIX, DOWN}
    assert set(sites[UP]) == {
        "path", "kind", "use", "shape", "rank", "scale", "parameters", "norm", "effective_rank",
    }  # fmt: skip
    assert sites[UP]["shape"] == [3, 5]
    assert (sites[UP]["rank"], sites[UP]["scale"], sites[UP]["parameters"]) == (2, 2, 16)
    assert sites[MIX]["norm"] == pytest.approx(float(jnp.linalg.norm(trained(0)[MIX].delta())), rel=1e-5)
    assert len(sites[MIX]["effective_rank"]) == 4
    assert found["format"] == "orbax"
    assert found["base"] == {"name": "me/tiny", "fingerprint": SITES.base.digest, "leaves": 4}
    assert found["about"]["task"] == "demo 0"
    assert found["parameters"] == sum(x.size for x in jax.tree.leaves(trained(0)))
    text = call("info", "one")
    assert "task: demo 0" in text
    assert re.search(rf"^{MIX}  +linear  +4×5×5  +2  +2  +80 ", text, re.M)


@pytest.mark.parametrize("kind", sorted({*PORTS} - {"experts", "llama_tokens", "nested"}))
def test_info_of_peft(kind):
    found = called("info", PEFT / kind)
    lora, _ = jlora.peft.read(PEFT / kind)
    assert [site["path"] for site in found["sites"]] == list(lora)
    assert found["format"] == "peft"
    assert found["version"] == "PEFT 0.21.2"
    assert len(call("info", PEFT / kind).splitlines()) == len(lora) + 4


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dora", "DoRA's magnitudes"),
        ("pissa", "changes the base before training"),
        ("experts", "the file does not name them"),
    ],
)
def test_info_says_what_it_cannot_read(kind, message):
    assert message in call("info", PEFT / kind, code=2)


# --- merge --------------------------------------------------------------------------------------------------------------

MERGED = {
    "llama": (),
    "llama_embedding": (),
    "llama_rslora_patterns": (),
    "llama_tied": ("--tied", "lm_head.weight=model.embed_tokens.weight"),
    "gpt2": CONV1D,
    "gpt2_bias": (),
    "bert": (),
    "vision": (),
}


@pytest.mark.parametrize("kind", MERGED)
def test_merged_models_give_the_outputs_of_peft(kind, here):
    port = PORTS[kind]()
    want = {
        k: x.astype(np.int32) if x.dtype == np.int64 else x
        for k, x in load_file(PEFT / kind / "expected.safetensors").items()
    }
    base = base_of(kind, here)
    found = called("merge", base, PEFT / kind, "out", *MERGED[kind])
    sites = jlora.sites(port.fn, port.struct(), want["x"])
    params = jlora.export.load(here / "out", port.struct(), sites=sites, names=port.names)
    np.testing.assert_allclose(port.fn(params, want["x"]), want["after"], atol=1e-5)
    assert set(found) == {"out", "format", "dtype", "merged", "replaced", "added", "untied", "copied", "left_out"}
    assert found["copied"] == ["config.json", "tokenizer.json"]
    assert {x["path"] for x in found["merged"]} | set(found["replaced"]) <= set(
        load_file(here / "out" / "model.safetensors")
    )
    assert all(x["lost"] < 1e-6 for x in found["merged"])
    assert len(found["merged"]) + len(found["replaced"]) == len(jlora.peft.read(PEFT / kind)[0]) - (
        kind == "llama_tied"
    )


def test_merging_equals_what_export_writes(here):
    port = PORTS["llama"]()
    sites = jlora.sites(port.fn, port.struct(), np.zeros((1, 4), np.int32))
    base = base_of("llama", here)
    params = jlora.export.load(base, port.struct(), sites=sites, names=port.names)
    lora = jlora.peft.load(PEFT / "llama", sites, names=port.names)
    lost = jlora.export.save("want", params, lora, sites=sites, names=port.names, dtype=jnp.bfloat16)
    found = called("merge", base, PEFT / "llama", "out", "--dtype", "bfloat16")
    got, want = (load_file(here / name / "model.safetensors") for name in ("out", "want"))
    assert got.keys() == want.keys()
    for (
        name,
        x,
    ) in got.items():  # the products of both are the same up to rounding: where they differ, it is by one step of bf16
        bits, wanted = (np.asarray(y).view(np.int16).astype(int) for y in (x, want[name]))
        assert np.abs(bits - wanted).max() <= 1, name
        assert (bits != wanted).mean() < 1e-2, name
    assert max(x["lost"] for x in found["merged"]) == pytest.approx(max(lost.values()), rel=0.2)
    assert "float32 keeps it all" not in call("merge", base, PEFT / "llama", "out2")


def shards(folder):
    """Splits a model into two files with an index, beside a tensor of integers."""
    found = load_file(folder / "model.safetensors") | {"position_ids": np.arange(5)}
    (folder / "model.safetensors").unlink()
    names = sorted(found)
    files = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, several in files.items():
        save_file({n: found[n] for n in several}, folder / file)
    where = {n: file for file, several in files.items() for n in several}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return found


def test_shards_stay_shards_and_other_files_are_copied(here):
    base = base_of("llama", here, torch_dtype="float32", text_config={"torch_dtype": "float32"})
    found = shards(base)
    (base / "pytorch_model.bin").write_text("the base's weights in another format")
    (base / "original").mkdir()
    report = called("merge", base, PEFT / "llama", "out", "--dtype", "float16")
    assert report["left_out"] == ["original", "pytorch_model.bin"]
    assert sorted(p.name for p in (here / "out").iterdir()) == sorted(
        {p.name for p in base.iterdir()} - {"original", "pytorch_model.bin"}
    )
    index = json.loads((here / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    got = {n: x for file in set(index["weight_map"].values()) for n, x in load_file(here / "out" / file).items()}
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in got.values())
    assert got["position_ids"].tolist() == [0, 1, 2, 3, 4]
    assert got["model.norm.weight"].dtype == np.float16
    config = json.loads((here / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "float16"


def test_a_model_may_be_one_file(here):
    file = base_of("vision", here) / "model.safetensors"
    assert called("merge", file, PEFT / "vision", "out")["copied"] == []
    assert [p.name for p in (here / "out").iterdir()] == ["model.safetensors"]


def test_one_tensor_at_a_time(here, monkeypatch):
    base, most = base_of("llama", here), []
    read = _cli_merge.Weights.read
    monkeypatch.setattr(_cli_merge.Weights, "read", lambda self, name: most.append(name) or read(self, name))
    found = called("merge", base, PEFT / "llama", "out")
    assert most == [n for n in most if n in {x["path"] for x in found["merged"]}]  # the others are copied as bytes
    assert len(most) == len(set(most))


def test_stochastic_rounding_has_a_seed(here):
    base = base_of("llama", here)
    options = ("--dtype", "bfloat16", "--rounding", "stochastic")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        call("merge", base, PEFT / "llama", name, *options, "--seed", seed)
    a, b, c = ((here / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert "needs a --seed" in call("merge", base, PEFT / "llama", "d", *options, code=2)
    assert "needs a --seed" in call("merge", base, PEFT / "llama", "d", "--seed", 1, code=2)


def test_what_a_dtype_cannot_hold_is_refused(here):
    base = base_of("llama", here)
    found = load_file(base / "model.safetensors")
    found["model.norm.weight"][0] = 1e6
    save_file(found, base / "model.safetensors")
    message = call("merge", base, PEFT / "llama", "out", "--dtype", "float16", code=2)
    assert "'model.norm.weight' has values that float16 cannot hold" in message
    assert not (here / "out").exists()


def test_square_weights_of_conv1d_are_not_guessed(here):
    message = call("merge", base_of("gpt2", here), PEFT / "gpt2", "out", code=2)
    assert "'transformer.h.0.attn.c_proj.weight' (12, 12) may be (out, in)" in message
    assert "--conv1d ''" in message
    base = here / "gpt2-base"
    assert "matches no weight" in call("merge", base, PEFT / "gpt2", "out", "--conv1d", "c_attn", code=2)
    assert "not a regular expression" in call("merge", base, PEFT / "gpt2", "out", "--conv1d", "(", code=2)
    call("merge", base, PEFT / "gpt2", "out", "--conv1d", "")  # said, if wrong: shapes alone do not contradict it


def test_square_weights_of_an_unknown_model_are_not_guessed(here):
    base = base_of("llama", here, auto_map={"AutoModel": "its own code"})
    assert "--conv1d ''" in call("merge", base, PEFT / "llama", "out", code=2)
    (base / "config.json").unlink()
    assert "--conv1d ''" in call("merge", base, PEFT / "llama", "out", code=2)
    call("merge", base, PEFT / "llama", "out", "--conv1d", "")


def renamed(folder, change):
    found = load_file(folder / "model.safetensors")
    save_file({change(name): x for name, x in found.items()}, folder / "model.safetensors")


def test_names_with_another_beginning(here):
    base = base_of("gpt2", here)
    call("merge", base, PEFT / "gpt2", "want", *CONV1D)
    renamed(base, lambda name: name.removeprefix("transformer."))
    message = call("merge", base, PEFT / "gpt2", "out", "--conv1d", "", code=2)
    assert "If these are the same: --prefix transformer.=\n" in message
    call("merge", base, PEFT / "gpt2", "out", *CONV1D, "--prefix", "transformer.=")
    got, want = (load_file(here / name / "model.safetensors") for name in ("out", "want"))
    for name, x in got.items():
        np.testing.assert_array_equal(x, want[f"transformer.{name}"])
    assert "No name of the adapter begins with 'x.'" in call(
        "merge", base, PEFT / "gpt2", "o", "--prefix", "x.=", code=2
    )
    assert "takes two names" in call("merge", base, PEFT / "gpt2", "o", "--prefix", "x.", code=2)


def test_a_new_head_is_added_only_on_request(here):
    base = base_of("bert", here)
    found = load_file(base / "model.safetensors")
    save_file({n: x for n, x in found.items() if not n.startswith("classifier")}, base / "model.safetensors")
    assert "--add-new" in call("merge", base, PEFT / "bert", "out", code=2)
    assert called("merge", base, PEFT / "bert", "out", "--add-new")["added"] == ["classifier.bias", "classifier.weight"]
    want = load_file(PEFT / "bert" / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    np.testing.assert_array_equal(load_file(here / "out" / "model.safetensors")["classifier.weight"], want)


def test_a_tied_head_has_one_update(here):
    base = base_of("llama_tied", here)
    assert "--tied lm_head.weight=" in call("merge", base, PEFT / "llama_tied", "out", code=2)
    tied = ("--tied", "lm_head.weight=model.embed_tokens.weight")
    shutil.copytree(PEFT / "llama_tied", here / "apart")
    file = here / "apart" / "adapter_model.safetensors"
    found = load_file(file)
    found["base_model.model.lm_head.lora_B.weight"] += 1
    save_file(found, file)
    assert "were adapted apart" in call("merge", base, "apart", "out", *tied, code=2)
    assert "The adapter has no 'a'" in call("merge", base, "apart", "out", "--tied", "a=b", code=2)


def test_a_quantised_or_other_base_is_refused(here):
    base = base_of("llama", here)
    found = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(found | {name: np.zeros((24, 24), np.int8)}, base / "model.safetensors")
    assert f"'{name}' in the base holds I8" in call("merge", base, PEFT / "llama", "out", code=2)
    save_file(found | {name: np.zeros((24, 25), np.float32)}, base / "model.safetensors")
    assert "is (24, 25) in the base, and (24, 24) in the adapter" in call("merge", base, PEFT / "llama", "o", code=2)


def test_merging_checkpoints(here, own):
    base = checkpoint(here / "base", PARAMS)
    found = called("merge", base, "one", "out")
    want = jlora.merge(PARAMS, trained(0))
    jax.tree.map(np.testing.assert_array_equal, restored(here / "out"), want)
    lost = {x["path"]: x["lost"] for x in found["merged"]}
    assert lost[UP] < 1e-6 < lost[DOWN]
    assert found["format"] == "orbax"
    wide = called("merge", base, "one", "wide", "--dtype", "float32", "--to", "orbax")
    assert max(x["lost"] for x in wide["merged"]) < 1e-6
    assert "are for safetensors" in call("merge", base, "one", "o", "--conv1d", "", code=2)


def test_a_leaf_trained_outright_is_merged(here):
    lora = trained(0, [jlora.LoRA(rank=2, targets=UP), jlora.Full(targets=".*bias")])
    jlora.save(here / "a", lora)
    assert called("merge", checkpoint(here / "base", PARAMS), "a", "out")["replaced"] == ["params/up/bias"]
    jax.tree.map(np.testing.assert_array_equal, restored(here / "out"), jlora.merge(PARAMS, lora))


def test_another_checkpoint_is_refused(here, own):
    base = checkpoint(here / "base", {"params": PARAMS["params"] | {"more": jnp.ones(3)}})
    assert "'params/more' (3,) float32 is not part of the adapter's base" in call("merge", base, "one", "out", code=2)


def test_formats_that_do_not_go_together(here, own):
    base, params = base_of("llama", here), checkpoint(here / "params", PARAMS)
    assert "jlora convert ADAPTER PEFT --to peft" in call("merge", base, "one", "out", code=2)
    assert "jlora convert ADAPTER OWN --to orbax" in call("merge", params, PEFT / "llama", "out", code=2)
    assert "not --to orbax" in call("merge", base, PEFT / "llama", "out", "--to", "orbax", code=2)
    assert "not --to safetensors" in call("merge", params, "one", "out", "--to", "safetensors", code=2)
    assert "is an adapter, not a model" in call("merge", "one", base, "out", code=2)
    assert "It is a model" in call("merge", base, base, "out", code=2)
    (here / "old").mkdir()
    (here / "old" / "pytorch_model.bin").write_text("pickle")
    assert "is a pickle, which is never read" in call("merge", "old", PEFT / "llama", "out", code=2)
    (here / "run").mkdir()
    checkpoint(here / "run" / "default", PARAMS)
    assert f"a checkpoint inside: {here / 'run' / 'default'}" in call("merge", "run", "one", "out", code=2)


# --- convert ------------------------------------------------------------------------------------------------------------

NAMES = {MIX: "model.layers.{}.mix.weight", "params/(.*)/kernel": {"name": r"\1.weight"}}


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


# --- extract ------------------------------------------------------------------------------------------------------------


def tuned(base, change):
    folder = base.with_name("tuned")
    shutil.copytree(base, folder)
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors")
    return folder


def low_rank(shape, rank=3, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return (rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))).astype(np.float32) / 10


def test_extracting_and_merging_gives_the_tuned_model(here):
    base = base_of("llama", here)

    def change(found):
        for name in found:
            if "proj" in name:
                found[name] += low_rank(found[name].shape)

    after = tuned(base, change)
    found = called("extract", base, after, "a", "--rank", 4, "--energy", 0.9999, "--base-model", "me/llama")
    assert set(found) == {"out", "format", "energy", "sites", "whole", "ignored", "reasons", "unchanged"}
    assert {x["rank"] for x in found["sites"]} == {3}
    assert found["energy"] > 0.9999
    assert found["unchanged"] == 7
    assert called("info", "a")["base"]["name"] == "me/llama"
    call("merge", base, "a", "out")
    got, want = (load_file(x / "model.safetensors") for x in (here / "out", after))
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)
    assert called("extract", base, after, "b", "--rank", 1)["energy"] < 0.9


def test_extracting_from_conv1d(here):
    base = base_of("gpt2", here)
    name = "transformer.h.0.attn.c_proj.weight"
    after = tuned(base, lambda found: found.update({name: found[name] + low_rank((12, 12))}))
    assert "may be (out, in)" in call("extract", base, after, "a", "--rank", 3, code=2)
    call("extract", base, after, "a", "--rank", 3, *CONV1D)
    call("merge", base, "a", "out", *CONV1D)
    np.testing.assert_allclose(
        load_file(here / "out" / "model.safetensors")[name], load_file(after / "model.safetensors")[name], atol=1e-5
    )


def test_what_changed_beside_matrices(here):
    base = base_of("bert", here)

    def change(found):
        found["bert.pooler.dense.weight"] += low_rank((12, 12))
        found["bert.pooler.dense.bias"] += 1
        found["bert.encoder.layer.0.output.LayerNorm.weight"] += 1

    after = tuned(base, change)
    message = call("extract", base, after, "a", "--rank", 3, code=2)
    assert "2 tensors changed that get no factors" in message
    assert "bert.pooler.dense.bias: (12,) is no matrix" in message
    found = called("extract", base, after, "a", "--rank", 3, "--rest", "ignore")
    assert len(found["ignored"]) == 2
    assert "ignored: bert.pooler.dense.bias" in call(
        "extract", base, after, "a", "--rank", 3, "--rest", "ignore", "--force"
    )
    found = called("extract", base, after, "b", "--rank", 3, "--rest", "full")
    assert set(found["whole"]) == {
        "bert.pooler.dense.bias",
        "bert.encoder.layer.0.output.LayerNorm.weight",
        "bert.encoder.layer.0.output.LayerNorm.bias",  # PEFT saves modules whole
    }
    call("merge", base, "b", "out")
    got, want = (load_file(x / "model.safetensors") for x in (here / "out", after))
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)


def test_extracting_an_embedding(here):
    base = base_of("llama", here)
    name = "model.embed_tokens.weight"
    after = tuned(base, lambda found: found.update({name: found[name] + low_rank((23, 24))}))
    assert "may be embeddings" in call("extract", base, after, "a", "--rank", 3, code=2)
    call("extract", base, after, "a", "--rank", 3, "--embedding", name)
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in load_file(here / "a" / "adapter_model.safetensors")
    (base / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    assert "it is tied to the output head" in call(
        "extract", base, after, "b", "--rank", 3, "--embedding", name, code=2
    )
    message = call("extract", base, after, "b", "--rank", 3, "--embedding", "embed_tokens", code=2)
    assert "--embedding 'embed_tokens' matches no weight of the model" in message


def two_models(here, *, config=None, bias=False, **shapes):
    """A base and what was trained of it, of these weights, each with a bias or not."""
    for name, shift in (("base", 0.0), ("after", 0.1)):
        (here / name).mkdir()
        found = {f"{k}.weight": np.ones(shape, np.float32) + shift * low_rank(shape) for k, shape in shapes.items()}
        found |= {f"{k}.bias": np.zeros(shape[0], np.float32) for k, shape in shapes.items() if bias}
        save_file(found, here / name / "model.safetensors")
        (here / name / "config.json").write_text(json.dumps({"model_type": "mine"} | (config or {})))
    return here / "base", here / "after"


def test_a_table_and_a_linear_layer_are_not_guessed(here):
    """They have the same tensors: names that linear layers have are taken, others have to be said."""
    base, after = two_models(here, tok=(20, 8), ids=(5, 7), head=(3, 8), q_proj=(5, 8))
    message = call("extract", base, after, "a", "--rank", 2, code=2)
    assert "may be embeddings" in message
    assert "'ids.weight' (5, 7), 'tok.weight' (20, 8)." in message
    assert "--embedding 'ids.weight'" in message
    call("extract", base, after, "a", "--rank", 2, "--embedding", "(tok|ids).weight")
    keys = {k.removeprefix("base_model.model.") for k in load_file(here / "a" / "adapter_model.safetensors")}
    assert {"tok.lora_embedding_A", "ids.lora_embedding_B", "head.lora_A.weight", "q_proj.lora_B.weight"} <= keys
    call("extract", base, after, "b", "--rank", 2, "--embedding", "")
    assert "base_model.model.tok.lora_A.weight" in load_file(here / "b" / "adapter_model.safetensors")


def test_a_module_with_a_bias_is_no_table(here):
    base, after = two_models(here, bias=True, embedder=(20, 8), ids=(5, 7))
    assert {x["path"] for x in called("extract", base, after, "a", "--rank", 2)["sites"]} == {
        "embedder.weight", "ids.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "config", "reason"),
    [
        ({"head": (3, 8)}, {}, ""),
        ({"head": (3, 8)}, {"tie_word_embeddings": True}, "it is tied to the output head"),
        ({"q_proj": (5, 8)}, {"tie_word_embeddings": False}, ""),
        ({"q_proj": (5, 8)}, {}, 'if it is not, put "tie_word_embeddings": false there'),
    ],
)
def test_whether_a_table_is_tied_is_not_guessed(more, config, reason, here):
    base, after = two_models(here, config=config, tok=(20, 8), **more)
    arguments = ("extract", base, after, "a", "--rank", 2, "--embedding", "tok.weight")
    if reason:
        assert reason in call(*arguments, code=2)
    else:
        assert "tok.weight" in {x["path"] for x in called(*arguments)["sites"]}


def test_extracting_from_checkpoints(here, own):
    after = jax.tree.map(lambda x: x, PARAMS)
    after["params"]["up"] = {"kernel": PARAMS["params"]["up"]["kernel"] + low_rank((3, 5), 1), "bias": jnp.ones(5)}
    after["params"]["layers"] = {"mix": PARAMS["params"]["layers"]["mix"] + low_rank((5, 5), 2)}
    one, two = checkpoint(here / "p", PARAMS), checkpoint(here / "q", after)
    assert "only of a matrix named kernel, or with --like" in call("extract", one, two, "a", "--rank", 2, code=2)
    found = called("extract", one, two, "a", "--rank", 2, "--like", "one", "--rest", "full")
    assert {x["path"] for x in found["sites"]} == {UP, MIX}
    assert found["whole"] == ["params/up/bias"]
    merged = jlora.merge(PARAMS, jlora.load(here / "a", PARAMS))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), merged, after)
    assert "--like is for orbax" in call(
        "extract", base_of("llama", here), "llama-base", "x", "--rank", 2, "--like", "one", code=2
    )
    assert "Both models must be of one format" in call("extract", one, "llama-base", "x", "--rank", 2, code=2)


def test_extracting_is_refused(here):
    base = base_of("llama", here)
    assert "the adapter would have no effect" in call("extract", base, base, "a", "--rank", 2, code=2)
    after = tuned(base, lambda found: found.pop("model.norm.weight"))
    assert "only in the base: model.norm.weight" in call("extract", base, after, "a", "--rank", 2, code=2)
    for models in ((PEFT / "llama", base), (base, PEFT / "llama")):
        message = call("extract", *models, "a", "--rank", 2, code=2)
        assert (
            "llama is an adapter, not a model.\n  extract makes an adapter of two models: jlora extract BASE" in message
        )
    assert "--rank must be at least 1" in call("extract", base, after, "a", "--rank", 0, code=2)
    assert "--energy must be above 0" in call("extract", base, after, "a", "--rank", 1, "--energy", "nan", code=2)
    save_file({"model.norm.weight": np.ones(3, np.float32)}, after / "model.safetensors")
    assert sorted(x.name for x in here.iterdir()) == ["llama-base", "tuned"]


# --- resize, combine, diff ----------------------------------------------------------------------------------------------


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
    assert "2 weights, 1 adapters\n  The order is: jlora combine OUT" in message
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


# --- Leaves trained outright --------------------------------------------------------------------------------------------


def whole(seed, *rules):
    return trained(seed, [jlora.Full(targets=(MIX, "params/up/bias")), *(rules or [jlora.LoRA(rank=2, targets=UP)])])


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


def test_extract_says_what_it_keeps_whole(here):
    after = jax.tree.map(lambda x: x, PARAMS)
    after["params"]["layers"] = {"mix": PARAMS["params"]["layers"]["mix"] + 1}
    after["params"]["up"] = {"kernel": PARAMS["params"]["up"]["kernel"] + low_rank((3, 5), 1), "bias": jnp.ones(5)}
    one, two = checkpoint(here / "p", PARAMS), checkpoint(here / "q", after)
    assert f"kept whole: {MIX}: its axes are not known" in call("extract", one, two, "a", "--rank", 2, "--rest", "full")
    found = called("extract", one, two, "a", "--rank", 2, "--rest", "full", "--force")
    assert found["reasons"]["params/up/bias"] == "(5,) is no matrix"
    lora = jlora.load(here / "a", PARAMS)
    assert (lora[MIX].use, lora["params/up/bias"].use) == ("", "dense")


# --- What PEFT adds beside factors, and heads ----------------------------------------------------------------------------


def test_biases_of_b_are_added_to_biases(here):
    """``lora_bias``: PEFT adds the bias of B, times the scale."""
    base = base_of("gpt2", here)
    shutil.copytree(PEFT / "gpt2_bias", here / "a")
    file = here / "a" / "adapter_model.safetensors"
    found = {k: x for k, x in load_file(file).items() if ".lora_" in k}
    save_file(found, file)
    config = json.loads((here / "a" / "adapter_config.json").read_text())
    (here / "a" / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    sites = {s["path"]: s for s in called("info", "a")["sites"]}
    bias = sites["transformer.h.1.attn.c_attn.bias"]
    assert (bias["use"], bias["shape"], bias["norm"]) == ("bias", [36], None)
    assert sites["transformer.h.1.attn.c_attn.weight"]["norm"] > 0
    got = called("merge", base, "a", "out")
    name = "transformer.h.1.attn.c_attn.bias"
    assert name in got["replaced"]
    key = "base_model.model.transformer.h.1.attn.c_attn.lora_B.bias"
    want = load_file(base / "model.safetensors")[name] + found[key] * config["lora_alpha"] / config["r"]
    np.testing.assert_allclose(load_file(here / "out" / "model.safetensors")[name], want, atol=1e-6)
    call("merge", base, "a", "bare", "--prefix", "transformer.=transformer.")


def test_trained_tokens_without_and_with_their_base(here):
    row = next(s for s in called("info", PEFT / "llama_tokens")["sites"] if s["use"] == "rows")
    assert (row["path"], row["shape"], row["parameters"]) == ("model.embed_tokens.weight", [2, 24], 48)
    assert re.search(r"embed_tokens.weight +rows +2×24 ", call("info", PEFT / "llama_tokens"))
    assert "--base BASE" in call("resize", PEFT / "llama_tokens", "a", "--rank", 1, code=2)
    base = base_of("llama_tokens", here)
    call("resize", PEFT / "llama_tokens", "a", "--rank", 1, "--base", base)
    rows = load_file(PEFT / "llama_tokens" / "adapter_model.safetensors")
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    table[[1, 9]] = next(x for key, x in rows.items() if "trainable_tokens" in key)
    found = load_file(here / "a" / "adapter_model.safetensors")
    np.testing.assert_allclose(found["base_model.model.model.embed_tokens.weight"], table, atol=1e-6)
    assert "Leave out --base" in call("resize", PEFT / "llama", "b", "--rank", 1, "--base", base, code=2)


def parameter_adapter(folder, shape, rank=2):
    """Factors of a parameter as such, ``target_parameters``: of experts if it has three axes."""
    n, (rows, columns) = (shape[0] if len(shape) == 3 else 1), shape[-2:]
    rng = np.random.default_rng(0)
    a = rng.normal(size=(rank * n, columns)).astype(np.float32)
    b = rng.normal(size=(rows, rank * n)).astype(np.float32)
    folder.mkdir()
    save_file(
        {"base_model.model.mix.lora_A.weight": a, "base_model.model.mix.lora_B.weight": b},
        folder / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_parameters": ["mix.w"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return a, b


def test_square_parameters_are_as_peft_has_them(here):
    """Two axes: B A as they are, whatever the module; of three, the file does not tell."""
    (here / "base").mkdir()
    save_file({"mix.w": np.zeros((5, 5), np.float32)}, here / "base" / "model.safetensors")
    a, b = parameter_adapter(here / "two", (5, 5))
    call("merge", "base", "two", "out")
    np.testing.assert_allclose(load_file(here / "out" / "model.safetensors")["mix.w"], b @ a, atol=1e-5)
    save_file({"mix.w": np.zeros((3, 5, 5), np.float32)}, here / "base" / "model.safetensors")
    assert "is (3, 5, 5) in the base" in call("merge", "base", "two", "x", code=2)
    parameter_adapter(here / "new", (3, 5, 5))
    assert "depends on the module (is_transposed)" in call("merge", "base", "new", "x", code=2)


@pytest.mark.parametrize("said", [{"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}}, {}])
def test_a_head_that_is_added_to_a_tied_base_unties_it(here, said):
    """A base whose configuration is silent is tied too, if it has no head: that is transformers' default."""
    base = base_of("llama_tied", here, **said)
    shutil.copytree(PEFT / "llama", here / "a")
    file = here / "a" / "adapter_model.safetensors"
    head = np.ones((23, 24), np.float32)
    save_file(load_file(file) | {"base_model.model.lm_head.weight": head}, file)
    config = json.loads((here / "a" / "adapter_config.json").read_text())
    (here / "a" / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["lm_head"]}))
    assert "--add-new" in call("merge", base, "a", "out", code=2)
    assert called("merge", base, "a", "out", "--add-new")["untied"] is True
    written = json.loads((here / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert written.get("text_config", {"tie_word_embeddings": False}) == {"tie_word_embeddings": False}
    np.testing.assert_array_equal(load_file(here / "out" / "model.safetensors")["lm_head.weight"], head)
    assert "tie_word_embeddings in config.json is false" in call("merge", base, "a", "out", "--add-new", "--force")
    assert called("merge", base, PEFT / "llama", "plain")["untied"] is False
    assert (here / "plain" / "config.json").read_bytes() == (base / "config.json").read_bytes()


# --- What is left behind, and what is shown -----------------------------------------------------------------------------


def commands(here, own):
    """One call of each command that writes, but for its output; and what its output is."""
    base, params = base_of("llama", here), checkpoint(here / "params", PARAMS)
    after = tuned(base, lambda f: f.update({"lm_head.weight": f["lm_head.weight"] + low_rank((23, 24))}))
    (here / "names.json").write_text(json.dumps(NAMES))
    call("convert", "one", "p", "--to", "peft", "--names", "names.json")
    return [
        ("merge", base, PEFT / "llama", "OUT"),
        ("merge", params, "one", "OUT"),
        ("convert", "one", "OUT", "--to", "peft", "--names", "names.json"),
        ("convert", "p", "OUT", "--to", "orbax", "--names", "names.json", "--like", "one"),
        ("extract", base, after, "OUT", "--rank", 2),
        ("resize", "one", "OUT", "--rank", 1),
        ("resize", "p", "OUT", "--rank", 1),
        ("combine", "OUT", "one", "two"),
        ("combine", "OUT", "p", "p"),
    ]


def test_nothing_is_written_into_what_is_read(here, own):
    for i, args in enumerate(commands(here, own)):
        read = args[1] if args[0] != "combine" else args[2]
        message = call(*(here / read / "inside" if x == "OUT" else x for x in args), code=2)
        assert "inside lies inside" in message, i
        assert not (here / read / "inside").exists()


def test_a_file_is_no_folder_to_write_into(here, own):
    (here / "file").write_text("")
    for out in ("file/a", "file/deep/a"):
        message = call("resize", "one", out, "--rank", 1, code=2)
        assert f"{here / 'file'} is a file, not a folder.\n  Choose another name." in message


def test_nothing_is_replaced_by_accident(here, own):
    before = None
    for i, args in enumerate(commands(here, own)):

        def run(out, *more, code=0, args=args):
            return call(*(out if x == "OUT" else x for x in args), *more, code=code)

        out = f"out{i}"
        run(out)
        before = {p: p.read_bytes() for p in (here / out).rglob("*") if p.is_file()}
        message = run(out, code=2)
        assert "There is already a" in message and "--force" in message  # noqa: PT018
        assert before == {p: p.read_bytes() for p in (here / out).rglob("*") if p.is_file()}
        run(out, "--force")
        (here / "mine").mkdir(exist_ok=True)
        (here / "mine" / "thesis.txt").write_text("x")
        assert "it is left alone" in run("mine", "--force", code=2)
        assert "would be replaced while it is read" in run(
            args[1] if args[0] != "combine" else args[2], "--force", code=2
        )
        (here / "empty").mkdir()
        run("empty")
        shutil.rmtree(here / "empty")
    assert before
    assert not [p.name for p in here.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 3)])
def test_a_failure_leaves_nothing(error, code, here, own, monkeypatch):
    listed = commands(here, own)
    before = sorted(p.name for p in here.iterdir())

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(_files, "_exchange", fail)
    for args in listed:
        message = call(*args, code=code)
        assert (
            message
            == f"jlora: {'interrupted: nothing is left half-written' if code == 130 else 'error: No space left on device'}\n"
        )
        assert before == sorted(p.name for p in here.iterdir()), args


def test_what_libraries_say_of_a_failure_is_not_printed_above_it(monkeypatch, capsys):
    """A full disk is told by orbax, which logs its traceback, and by threads of its storage that find the command ended."""
    monkeypatch.setattr(sys, "argv", ["jlora"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    error = ValueError("the disk is full")
    with warnings.catch_warnings():
        cli._quiet()
    try:
        assert not logging.getLogger("absl").isEnabledFor(logging.ERROR)
        thread = threading.Thread(target=sys.excepthook, args=(ValueError, error, None))
        thread.start()
        thread.join()
        assert capsys.readouterr().err == ""
        sys.excepthook(ValueError, error, None)
        assert capsys.readouterr().err == "ValueError: the disk is full\n"
    finally:
        logging.disable(logging.NOTSET)


def test_merge_into_a_base_that_the_adapter_was_not_made_for(here):
    """The embedding that PEFT writes beside factors for it must be the base's; a tied head must not come apart unseen."""
    base = base_of("llama_embedding", here)
    call("merge", base, PEFT / "llama_embedding", "right")
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][9:] += 2
    save_file(tensors, base / "model.safetensors")
    assert "which is not 'model.embed_tokens.weight' of the base" in call(
        "merge", base, PEFT / "llama_embedding", "out", code=2
    )
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    save_file(load_file(PEFT / "llama_embedding" / "base.safetensors"), base / "model.safetensors")
    assert "head and embedding are one" in call("merge", base, PEFT / "llama_embedding", "out", code=2)
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "text_config": {"tie_word_embeddings": True}}))
    assert "head and embedding are one" in call("merge", base, PEFT / "llama_embedding", "out", code=2)
    weights = load_file(base / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    shutil.copytree(PEFT / "llama_embedding", here / "a")
    file = here / "a" / "adapter_model.safetensors"
    save_file({key: x for key, x in load_file(file).items() if "lm_head" not in key}, file)
    assert "may be the output head as well" in call("merge", base, "a", "out", code=2)
    assert not (here / "out").exists()


SCRIPT = """
import os, signal, sys, time
from jlora import _cli_merge, cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without it
number = getattr(signal, sys.argv.pop())
_cli_merge.Fold.added = lambda *_: (os.kill(os.getpid(), number), time.sleep(60))
cli.main()
"""


def test_an_interrupt_before_a_command_has_begun():
    script = "import jlora._cli_app as a, jlora.cli\ndef app(**_):\n    raise KeyboardInterrupt\na.app = app\njlora.cli.main()"
    done = process("-c", script)
    assert (done.returncode, done.stderr) == (130, "interrupted: nothing is left half-written\n")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGINT"])
def test_a_signal_leaves_nothing_at_the_final_name(name, here):
    base = base_of("llama", here)
    done = process("-c", SCRIPT, "merge", base, PEFT / "llama", "out", name)
    number = getattr(signal, name)
    assert done.returncode == (-number if name == "SIGKILL" else 128 + number)
    assert "Traceback" not in done.stderr
    assert not (here / "out").exists()
    assert name == "SIGKILL" or [p.name for p in here.iterdir()] == ["llama-base"]


def process(*args, **env):
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = (
        {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")} | {"PYTHONPATH": path} | env
    )
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def test_as_a_process(here):
    done = process("-m", "jlora.cli", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"jlora {jlora.__version__}\n", "")
    done = process("-m", "jlora.cli", "info", PEFT / "llama", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["sites"]) == 14
    done = process("-m", "jlora.cli", "info", "nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"jlora: error: There is no adapter at {here / 'nothing'}: nothing is there.\n"
    done = process("-m", "jlora.cli", "info", "nothing", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_on_the_cpu_unless_told_otherwise():
    code = "import sys; sys.argv = ['jlora', '--version']\nfrom jlora import cli\ntry: cli.main()\nexcept SystemExit: pass\n"
    code += "import jax; print(jax.config.jax_platforms)"
    assert process("-c", code).stdout.splitlines()[-1] == "cpu"
    assert process("-c", code, JAX_PLATFORMS="rocm").stdout.splitlines()[-1] == "rocm"


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == 'typer and rich missing.\n  pip install "jlora[cli]"\n'


def test_help_has_examples():
    for name in ("info", "merge", "convert", "extract", "resize", "combine", "diff"):
        assert f"jlora {name} " in call(name, "--help")
        assert name in call("--help")


def test_tables_are_whole_where_nobody_looks(here, own, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert MIX in call("info", "one")
    path = "p" * 300 + "/kernel"
    lora = trained(0)
    sites = jlora.sites(
        lambda p, x: x @ p["p" * 300]["kernel"], {"p" * 300: {"kernel": jnp.ones((3, 5))}}, jnp.ones((2, 3))
    )
    lora = jlora.init(
        jax.random.key(0), {"p" * 300: {"kernel": jnp.ones((3, 5))}}, sites, jlora.LoRA(rank=2, targets=path)
    )
    jlora.save(here / "long", lora)
    assert path in call("info", "long")


@pytest.mark.parametrize("width", [30, 200])
def test_tables_for_a_terminal(width, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    path = "a/[red]very/" + "long/" * 10 + "kernel"
    _cli_show.Screen(False).table(("weight", "norm"), [(path, "3")], right=(1,))
    with _cli_show.progress("work", 2) as step:
        step("[a]")
    out = capsys.readouterr().out
    assert path in re.sub(r"\x1b\[\d*m|\n", "", out)
    assert ("norm 3" in out) == (width == 30)


def test_numbers_are_spelled():
    spelled = [_cli_show.percent(x) for x in (None, 0, 1e-6, 0.25, 0.99999, 1)]
    assert spelled == [
        "-",
        "0.00 %",
        "<0.01 %",
        "25.00 %",
        ">99.99 %",
        "100.00 %",
    ]
    assert _cli_show.number(None) == "-"
    assert _cli_show._plain({"a": [float("inf"), 1.5, True, Path("x")]}) == {"a": [None, 1.5, True, "x"]}


# --- Nothing gives a traceback ------------------------------------------------------------------------------------------

WORDS = [
    *("info", "merge", "convert", "extract", "resize", "combine", "diff"),
    *(
        "one",
        "two",
        "p",
        "base",
        "params",
        "OUT",
        "nothing",
        "file",
        "broken",
        "",
        ".",
        "/",
        "/dev/null",
        "\0",
        "ü",
        "x" * 300,
    ),
    *(
        "--rank",
        "0",
        "2",
        "-1",
        "1e9",
        "nan",
        "--energy",
        "0.5",
        "--to",
        "peft",
        "orbax",
        "--weights",
        "1,2",
        ",",
        "--method",
        "svd",
    ),
    *(
        "ties",
        "--density",
        "--seed",
        "--json",
        "--force",
        "--conv1d",
        "(",
        "--names",
        "names.json",
        "--like",
        "--base",
        "--tol",
    ),
    *("--dtype", "float16", "int8", "--rest", "full", "--prefix", "a=b", "--tied", "--help", "--"),
]


def test_a_fuzz_of_arguments(here, own):
    commands(here, own)
    shutil.copytree(here / "llama-base", here / "base")
    (here / "file").write_text("x")
    shutil.copytree(here / "one", here / "broken")
    (here / "broken" / "adapter.json").write_text('{"format": 1, "adapters": []}')
    chance = random.Random(0)
    seen = set()
    for _ in range(400):
        args = [chance.choice(WORDS[:7]), *(chance.choice(WORDS) for _ in range(chance.randrange(7)))]
        result = CliRunner().invoke(_cli_app.app, args)
        assert result.exception is None or isinstance(result.exception, SystemExit), (args, result.exception)
        assert "Traceback" not in result.output, args
        assert "not expected" not in result.output, (args, result.output)
        assert result.exit_code in (0, 1, 2, 3), args
        seen.add(result.exit_code)
    assert seen >= {0, 2}


def test_damaged_files_are_refused(here, own):
    base, params = base_of("llama", here), checkpoint(here / "params", PARAMS)
    file = base / "model.safetensors"
    whole = file.read_bytes()
    for damage in (whole[:-5], whole[:4], b"\xff" * 100, whole[:8] + b"x" + whole[9:], b""):
        file.write_bytes(damage)
        message = call("merge", base, PEFT / "llama", "out", code=2)
        assert re.search("is no safetensors file|was cut or added to|is damaged", message), message
    file.unlink()
    for index in ("[]", "{}", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "gone.safetensors"}}'):
        (base / "model.safetensors.index.json").write_text(index)
        call("merge", base, PEFT / "llama", "out", code=2)
    (params / "_METADATA").write_text("{}")
    call("merge", params, "one", "out", code=2)
    shutil.rmtree(here / "params" / "d")
    call("merge", params, "one", "out", code=2)
    (here / "one" / "adapter.json").write_text("{")
    assert "is not JSON" in call("info", "one", code=2)
    assert not (here / "out").exists()
