"""``jlora merge``: models of PyTorch and checkpoints, against PEFT's outputs and ``jlora.export``."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_case import CONV1D, DOWN, PARAMS, PEFT, UP, base_of, call, called, checkpoint, renamed, restored, trained
from peft_models import PORTS
from safetensors.numpy import load_file, save_file

import jlora
import jlora.export
import jlora.peft
from jlora import _cli_merge

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
        {p.name for p in base.iterdir()} - {"original", "pytorch_model.bin"} | {"checksums.json"}
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
    assert sorted(p.name for p in (here / "out").iterdir()) == ["checksums.json", "model.safetensors"]


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
    assert "'model.norm.weight' has values that float16 cannot hold: 1e+06, where its largest is 65504" in message
    assert "--dtype float32. To store infinities: --overflow allow" in message
    assert not (here / "out").exists()
    call("merge", base, PEFT / "llama", "wide", "--dtype", "float32")
    call("merge", base, PEFT / "llama", "out", "--dtype", "float16", "--overflow", "allow")
    assert np.isinf(load_file(here / "out" / "model.safetensors")["model.norm.weight"]).sum() == 1


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


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_an_adapter_that_was_cut_is_refused(kind, here):
    """Its configuration declares what the base has and the file lacks: a layer's factors, or what goes with a head."""
    base = base_of(kind, here)
    shutil.copytree(PEFT / kind, here / "cut")
    file = here / "cut" / "adapter_model.safetensors"
    found = load_file(file)
    gone = next(key.rpartition(".lora_A")[0] for key in sorted(found) if ".lora_A.weight" in key)
    save_file({key: x for key, x in found.items() if not key.startswith(gone + ".")}, file)
    message = call("merge", base, "cut", "out", *MERGED[kind], code=2)
    assert "lacks factors for 1 weight" in message
    assert gone.removeprefix("base_model.model.") in message
    assert not (here / "out").exists()


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
