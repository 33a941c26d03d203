"""Saved adapters: what they carry, what they refuse, and that no failure loses the last good one."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora


def net(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"][None]


PARAMS = {"up": jnp.ones((3, 5)), "down": jnp.ones((5, 7)), "bias": jnp.zeros(7)}
X = jnp.ones((2, 3))
RULES = [
    jlora.LoRA(rank=2, alpha=3, dropout=0.25, targets="up"),
    jlora.LoRA(rank=1, rslora=True, targets="down"),
    jlora.Full(targets="bias"),
]


def adapter(seed=0):
    lora = jlora.init(jax.random.key(seed), PARAMS, jlora.sites(net, PARAMS, X), RULES)
    return jax.tree.map(lambda x: x + seed, lora)


def assert_same(x, y):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.map(np.testing.assert_array_equal, x, y)


@pytest.fixture
def folder(tmp_path):
    jlora.save(tmp_path / "adapter", adapter(1), note="first", numbers=[1, 2.5])
    return tmp_path / "adapter"


def test_round_trip(folder):
    assert_same(jlora.load(folder), adapter(1))
    assert_same(jlora.load(str(folder), PARAMS), adapter(1))
    assert_same(jlora.load(folder, jax.eval_shape(lambda: PARAMS)), adapter(1))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dilation", [{}, {"lhs_dilation": (2, 1)}, {"rhs_dilation": (1, 2)}])
def test_convolutions_of_every_kind_come_back(groups, dilation, tmp_path):
    """What says how a kernel is used is saved too: groups, transposed or not, dilated or not."""

    def conv(p, x):
        how = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), "feature_group_count": groups, **dilation}
        return jax.lax.conv_general_dilated(x, p["k"], dimension_numbers=("NHWC", "HWIO", "NHWC"), **how)

    params, x = {"k": jnp.ones((3, 3, 4 // groups, 6))}, jnp.ones((1, 5, 5, 4))
    lora = jlora.init(jax.random.key(0), params, jlora.sites(conv, params, x), jlora.LoRA(rank=2, targets="k"))
    jlora.save(tmp_path / "a", lora)
    assert_same(jlora.load(tmp_path / "a", params), lora)


def test_carries_rules_axes_scale_version_and_fingerprint(folder):
    about = jlora.metadata(folder)
    assert about["jlora"] == jlora.__version__
    assert about["meta"] == {"note": "first", "numbers": [1, 2.5]}
    up = about["adapters"]["up"]
    assert (up["rank"], up["alpha"], up["scale"], up["dropout"]) == (2, 3.0, 1.5, 0.25)
    assert (up["inputs"], up["outputs"], up["batch"]) == ([0], [1], [])
    assert about["adapters"]["down"]["scale"] == 32.0
    assert about["base"] == [["bias", [7], "float32"], ["down", [5, 7], "float32"], ["up", [3, 5], "float32"]]


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"up": PARAMS["up"], "down": PARAMS["down"]}, r"'bias' \(7,\) float32 is missing"),
        (PARAMS | {"extra": X}, r"'extra' \(2, 3\) float32 is not part of the adapter's base"),
        (PARAMS | {"up": jnp.ones((3, 6))}, r"'up' is \(3, 6\) float32, not \(3, 5\) float32"),
        (PARAMS | {"up": jnp.ones((3, 5), jnp.bfloat16)}, r"'up' is \(3, 5\) bfloat16, not \(3, 5\) float32"),
    ],
)
def test_refuses_another_base(folder, other, difference):
    with pytest.raises(ValueError, match=rf"The adapter was made for another base: {difference}"):
        jlora.load(folder, other)


def test_refuses_to_overwrite_unless_told(folder):
    with pytest.raises(FileExistsError, match=r"(?s)already an adapter at .*overwrite=True"):
        jlora.save(folder, adapter(2))
    assert_same(jlora.load(folder), adapter(1))
    jlora.save(folder, adapter(2), overwrite=True)
    assert_same(jlora.load(folder), adapter(2))
    assert len(list(folder.glob("arrays-*"))) == 1


def test_leaves_other_folders_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("cat")
    with pytest.raises(FileExistsError, match="is not an adapter: it is left alone"):
        jlora.save(tmp_path / "photos", adapter(), overwrite=True)
    (tmp_path / "file").write_text("text")
    with pytest.raises(FileExistsError, match="is not an adapter"):
        jlora.save(tmp_path / "file", adapter(), overwrite=True)
    assert (tmp_path / "photos" / "cat.png").read_text() == "cat"


def test_other_files_in_the_folder_are_kept(folder):
    (folder / "README.md").write_text("mine")
    jlora.save(folder, adapter(2), overwrite=True)
    assert_same(jlora.load(folder), adapter(2))
    assert (folder / "README.md").read_text() == "mine"


def test_loaded_adapter_is_placed_as_the_base_and_compiles_nothing(folder):
    apply = jax.jit(jlora.wrap(net))
    apply(PARAMS, adapter(3), X)
    apply(PARAMS, jlora.load(folder, PARAMS), X)
    apply(PARAMS, jlora.load(folder), X)
    assert apply._cache_size() == 1
    placed = jax.device_put(PARAMS, jax.devices()[0])
    assert all(x.committed for x in jax.tree.leaves(jlora.load(folder, placed)))


def test_arguments_in_another_order(folder):
    with pytest.raises(TypeError, match="The folder of the adapter comes first"):
        jlora.load(PARAMS, folder)
    with pytest.raises(TypeError, match="The folder of the adapter comes first"):
        jlora.save(adapter(), folder)


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    jlora.save("~/mine", adapter(1))
    assert_same(jlora.load(tmp_path / "mine"), adapter(1))


def test_stacks_and_unknown_kinds_are_refused(tmp_path):
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), {k: v for k, v in adapter().items() if k != "bias"})
    for call in (lambda: jlora.save(tmp_path / "adapter", stacked), lambda: jlora.merge(PARAMS, stacked)):
        with pytest.raises(ValueError, match=r"(?s)factor a of an adapter must have 2 axes.*got: 3 axes.*jax\.vmap"):
            call()

    class Odd(jlora.LowRank):
        kind = "odd"

    with pytest.raises(TypeError, match="can only save low-rank, full adapters"):
        jlora.save(tmp_path / "adapter", {"up": Odd(**vars(adapter()["up"]))})


def test_nothing_to_load(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no adapter at .*: it has no adapter\.json"):
        jlora.load(tmp_path)


def test_metadata_must_be_json(tmp_path):
    for bad in (object(), float("nan"), {1, 2}):
        with pytest.raises(TypeError, match="metadata must be JSON"):
            jlora.save(tmp_path / "adapter", adapter(), value=bad)
    assert not (tmp_path / "adapter").exists()


def test_refuses_values_that_are_not_finite(folder):
    broken = jax.tree.map(lambda x: x * jnp.nan, adapter(2))
    with pytest.raises(ValueError, match=r"'bias'\.value is not finite"):
        jlora.save(folder, broken, overwrite=True)
    assert_same(jlora.load(folder), adapter(1))


def test_refuses_tracers(tmp_path):
    with pytest.raises(TypeError, match="cannot run inside a transformation"):
        jax.jit(lambda lora: jlora.save(tmp_path / "adapter", lora))(adapter())


def test_refuses_adapters_of_different_bases(tmp_path):
    other = {"up": jnp.ones((3, 5)), "down": jnp.ones((5, 9)), "bias": jnp.zeros(9)}
    mixed = adapter() | {
        "down": jlora.init(jax.random.key(0), other, jlora.sites(net, other, X), jlora.LoRA(rank=1, targets="down"))[
            "down"
        ]
    }
    with pytest.raises(ValueError, match="made for 2 different bases"):
        jlora.save(tmp_path / "adapter", mixed)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00\xff", "null"])
def test_metadata_that_is_not_json(folder, text):
    (folder / "adapter.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"adapter\.json (is not JSON|holds \w+, not an object)"):
        jlora.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=99), "has format 99"),
        (lambda d: d.pop("base"), "description of the adapter is damaged"),
        (lambda d: d.update(adapters={}), "damaged: it names no leaf"),
        (lambda d: d.update(adapters=[1]), "description of the adapter is damaged"),
        (lambda d: d.update(files={}), "damaged: it names no files"),
        (lambda d: d.update(arrays="../elsewhere"), "damaged"),
        (lambda d: d.update(arrays="arrays-gone"), "the folder arrays-gone is missing"),
        (lambda d: d["adapters"]["up"].update(kind="magic"), "kind 'magic'"),
        (lambda d: d["adapters"]["up"].update(scale=float("nan")), "damaged: scale is nan"),
        (lambda d: d["adapters"]["up"].update(dropout=2.0), r"damaged: dropout is 2\.0"),
        (lambda d: d["adapters"]["up"].update(dropout=float("nan")), "damaged: dropout is nan"),
        (lambda d: d["adapters"]["up"].update(inputs=[-2]), r"damaged: 'up' has axes \[-2, 1\]"),
        (lambda d: d["adapters"]["up"].update(outputs=[5]), r"damaged: 'up' has axes \[0, 5\]"),
        (lambda d: d["adapters"]["up"]["arrays"]["b"].update(shape=[9, 5]), r"damaged: 'up' \(3, 5\) has"),
        (lambda d: d["adapters"]["up"]["arrays"]["a"].update(dtype="int32"), r"damaged: 'up' \(3, 5\) has"),
        (lambda d: d["adapters"].update(nowhere=d["adapters"]["up"]), "damaged: its base has no leaf 'nowhere'"),
        (lambda d: d["adapters"]["up"].update(scale=3.0), "damaged: it was changed after it was written"),
        (lambda d: d["adapters"]["up"]["arrays"]["a"].update(shape=[4, 4]), r"damaged: 'up' \(3, 5\) has"),
    ],
)
def test_damaged_description(folder, change, message):
    file = folder / "adapter.json"
    description = json.loads(file.read_text())
    change(description)
    file.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=message):
        jlora.load(folder, PARAMS)


def test_description_that_was_rewritten_with_its_digest(folder):
    """The digest finds damage, not intent: whoever rewrites it still meets the arrays."""
    file = folder / "adapter.json"
    description = json.loads(file.read_text())
    del description["digest"]
    del description["adapters"]["bias"]
    description["digest"] = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="do not fit their description"):
        jlora.load(folder)


def test_every_damaged_file_is_found(folder, tmp_path):
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "adapter.json"]
    assert len(files) > 3
    for file in files:
        for damage in ("truncate", "flip", "remove"):
            copy = tmp_path / "copy"
            shutil.copytree(folder, copy)
            target = copy / file.relative_to(folder)
            data = target.read_bytes()
            if damage == "remove" or not data:
                target.unlink()
            elif damage == "truncate":
                target.write_bytes(data[:-1])
            else:
                target.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            with pytest.raises(ValueError, match=f"is damaged: the file .*{target.name} (is missing|has)"):
                jlora.load(copy)
            shutil.rmtree(copy)


def rewrite(folder, **change):
    """Changes the description, digest and all."""
    description = json.loads((folder / "adapter.json").read_text()) | change
    del description["digest"]
    description["digest"] = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    (folder / "adapter.json").write_text(json.dumps(description))


def test_files_that_are_not_listed_are_refused(folder, monkeypatch):
    arrays = next(folder.glob("arrays-*"))
    (folder / "README.md").write_text("beside them there may be anything")
    assert_same(jlora.load(folder), adapter(1))
    with open(arrays / "extra", "wb") as f:
        f.truncate(2**32)
    monkeypatch.setattr(hashlib, "file_digest", None)
    with pytest.raises(ValueError, match=r"(?s)/extra is not one of the files that jlora.save wrote.*Remove it"):
        jlora.load(folder)
    (arrays / "extra").unlink()
    (arrays / "more").mkdir()
    with pytest.raises(ValueError, match="/more is not one of the files"):
        jlora.load(folder)


def test_a_file_of_another_size_is_not_read(folder, monkeypatch):
    arrays = next(folder.glob("arrays-*"))
    file = next(p for p in sorted(arrays.rglob("*")) if p.is_file())
    os.truncate(file, 2**32)
    monkeypatch.setattr(hashlib, "file_digest", None)
    with pytest.raises(ValueError, match=rf"is damaged: the file .*{file.name} has 4,294,967,296 bytes, not \d+"):
        jlora.load(folder)


@pytest.mark.parametrize("record", [None, [], "x", [1, 2, 3]])
def test_damaged_records(folder, record):
    files = json.loads((folder / "adapter.json").read_text())["files"]
    rewrite(folder, files=dict.fromkeys(files, record))
    with pytest.raises(ValueError, match=r"is damaged: the file .* has the record"):
        jlora.load(folder)


def test_arrays_of_another_adapter_are_not_read(folder, tmp_path):
    other = tmp_path / "other"
    jlora.save(other, adapter(2))
    name = json.loads((other / "adapter.json").read_text())["arrays"]
    rewrite(folder, arrays=f"../other/{name}", files=json.loads((other / "adapter.json").read_text())["files"])
    with pytest.raises(ValueError, match="damaged: it names no files"):
        jlora.load(folder)


def test_descriptions_too_long_or_too_deep(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(jlora._files, "MAX_JSON", 3000)
    with pytest.raises(
        ValueError, match=r"would have [\d,]+ bytes, more than the 2,250 it may have.\n  Keep large metadata"
    ):
        jlora.save(folder, adapter(2), overwrite=True, notes="x" * 2000)
    assert_same(jlora.load(folder), adapter(1))
    (folder / "adapter.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"adapter.json is not JSON: .*recursion.*\n  It is damaged"):
        jlora.load(folder)
    os.truncate(folder / "adapter.json", 2**34)
    with pytest.raises(ValueError, match=r"has 17,179,869,184 bytes, more than the [\d,]+ it may have"):
        jlora.load(folder)


def test_sixty_four_bits_are_not_cut(tmp_path):
    with jax.enable_x64(True):
        params = {"w": jnp.ones((3, 4), jnp.float64)}
        found = jlora.sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 3), jnp.float64))
        lora = jlora.init(jax.random.key(0), params, found, jlora.LoRA(rank=2, dtype=jnp.float64, targets="w"))
        assert lora["w"].a.dtype == jnp.float64
        jlora.save(tmp_path / "adapter", lora)
    with pytest.raises(ValueError, match=r"'w'\.a was saved in float64, .* cut to float32.\n  Set JAX_ENABLE_X64=1"):
        jlora.load(tmp_path / "adapter")
    with jax.enable_x64(True):
        assert_same(jlora.load(tmp_path / "adapter"), lora)


FULL_DISK = """
    import resource, signal, sys
    sys.path.insert(0, {tests!r})
    import jax, jlora
    from test_checkpoint import adapter
    lora = adapter(2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    try:
        jlora.save({folder!r}, lora, overwrite=True)
    except OSError as error:
        print("OSError", error)
"""


@pytest.mark.parametrize("limit", [0, 40, 700])
def test_full_disk_keeps_the_last_good_one(folder, limit):
    """A limit on the size of files stands for a full disk: writes fail at the start or in the middle."""
    script = textwrap.dedent(FULL_DISK.format(tests=os.path.dirname(__file__), folder=str(folder), limit=limit))
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert child.stdout.startswith("OSError"), child.stderr
    assert_same(jlora.load(folder), adapter(1))
    assert len(list(folder.glob("arrays-*"))) == 1


SAVER = """
    import sys, time, jax, jax.numpy as jnp, jlora
    sys.path.insert(0, {tests!r})
    from test_checkpoint import adapter
    print("ready", flush=True)
    i = 1
    while True:
        i += 1
        jlora.save({folder!r}, adapter(i), overwrite=True, i=i)
        print(i, flush=True)
"""


def test_kill_during_a_save_keeps_a_complete_one(folder):
    """kill -9 at many moments of a loop of saves: what is there always loads, and is the last complete one or the one under way."""
    rng = np.random.default_rng(0)
    script = textwrap.dedent(SAVER.format(tests=os.path.dirname(__file__), folder=str(folder)))
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            finished = [int(child.stdout.readline())]
            time.sleep(float(rng.uniform(0.05, 0.4)))
            child.send_signal(signal.SIGKILL)
            finished += [int(line) for line in child.stdout.read().split()]
        about = jlora.metadata(folder)
        assert about["meta"]["i"] in (finished[-1], finished[-1] + 1)
        assert_same(jlora.load(folder, PARAMS), adapter(about["meta"]["i"]))
    jlora.save(folder, adapter(5), overwrite=True)  # and the remains are swept
    assert sorted(p.name.split("-")[0] for p in folder.iterdir()) == ["adapter.json", "arrays"]
