"""Orbax checkpoints as bases, which may come from elsewhere: what orbax writes is read as orbax reads it, and what does harm is refused."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import ocdbt_writer as ocdbt
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_hostile import MANY

from jlora import _restore

pytest.importorskip("typer", reason='the command line needs pip install "jlora[cli]"')

from cli_case import call

import jlora
from jlora._cli_adapters import Refusal
from jlora._cli_weights import load_checkpoint

NOISE = jax.random.normal(jax.random.key(0), (64, 33))
TREE = {
    "layers": [{"k": NOISE.astype(jnp.bfloat16), "e": {}}, {"k": NOISE.astype(jnp.float16)[:, :5]}],
    "w": NOISE,
    "scalar": jnp.float32(2.5),
    "zero": jnp.zeros((40, 40)),
    "whole": np.arange(6).reshape(2, 3),
    "small": jnp.ones((4, 6), jnp.int4),
    "eight": jnp.full((4, 4), 0.5, jnp.float8_e4m3fn),
    "flags": jnp.array([True, False, True]),
    "turned": jnp.full(3, 1 + 2j, jnp.complex64),
    "python": 3,
    "wide": 2.5,
    "tuple": (jnp.ones(2), None, ()),
    "a.b/c": jnp.arange(5, dtype=jnp.uint8),
    "key": jax.random.key(7),
    "keys": jax.random.split(jax.random.key(7, impl="rbg"), 3),
    "optimiser": optax.chain(optax.clip(1.0), optax.adam(1e-3)).init({"w": jnp.ones(3)}),
}


def save(folder, tree, chunk=None, **how):
    args = None if chunk is None else jax.tree.map(lambda x: ocp.SaveArgs(chunk_byte_size=chunk), tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**how)) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, save_args=args))
    return folder


def bits(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()


def assert_read_as_orbax_does(folder):
    local = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata.tree
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=local), metadata)
        wanted = checkpointer.restore(folder, like)
    found, shapes = load_checkpoint(folder), load_checkpoint(folder, values=False)
    assert jax.tree.structure(found) == jax.tree.structure(wanted) == jax.tree.structure(shapes)
    for x, y, like in zip(*map(jax.tree.leaves, (found, wanted, shapes)), strict=True):
        assert isinstance(x, jax.Array)
        assert x.sharding == y.sharding
        assert (x.shape, x.dtype) == (y.shape, y.dtype) == (like.shape, like.dtype)
        assert bits(x) == bits(y)


LAYOUTS = [
    {"use_ocdbt": a, "use_zarr3": b, "chunk": c}
    for a, b, c in itertools.product((True, False), (False, True), (None, 512))
]


@pytest.mark.parametrize(
    "how", [*LAYOUTS, {"use_compression": False}, {"use_compression": False, "use_zarr3": True}], ids=str
)
def test_layouts(how, tmp_path):
    assert_read_as_orbax_does(save(tmp_path / "a", TREE, **how))


@pytest.mark.parametrize(
    "tree", [{f"l{i}": jnp.full(7, i) for i in range(600)}, jnp.ones((3, 4)), [NOISE, {"w": NOISE}]]
)
def test_trees(tree, tmp_path):
    assert_read_as_orbax_does(save(tmp_path / "a", tree))
    assert_read_as_orbax_does(save(tmp_path / "b", tree, use_ocdbt=False))


@pytest.mark.parametrize("use_zarr3", [True, False])
def test_arrays_on_a_mesh(use_zarr3, tmp_path):
    mesh = jax.make_mesh((4,), ("x",))
    split = jax.device_put(NOISE, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    assert_read_as_orbax_does(save(tmp_path / "a", {"w": split, "b": NOISE}, use_zarr3=use_zarr3))


def test_steps_and_items(tmp_path):
    items = {name: ocp.args.StandardSave({"w": NOISE}) for name in ("params", "state")}
    both = ocp.args.Composite(**items, about=ocp.args.JsonSave({"a": 1}))
    for name, args in (("one", ocp.args.StandardSave({"w": NOISE})), ("two", both)):
        with ocp.CheckpointManager(tmp_path / name) as manager:
            manager.save(3, args=args)
            manager.wait_until_finished()
    for outer, inner in (("one", "3/default"), ("one/3", "default"), ("two/3", "params"), ("two", "3/state")):
        assert_read_as_orbax_does(tmp_path / outer / inner)
        with pytest.raises(Refusal, match=f"(?s)holds no tree.*There is one inside: .*/{outer}/{inner}\\."):
            load_checkpoint(tmp_path / outer)


def test_zeros_that_older_versions_left_out(tmp_path):
    folder = save(tmp_path / "a", {"w": NOISE, "z": jnp.zeros((40, 40))}, use_ocdbt=False)
    (folder / "z" / "0.0").unlink()
    with pytest.raises(ValueError, match=r"is damaged: z/0\.0 is missing"):
        load_checkpoint(folder)
    about = json.loads((folder / "_METADATA").read_text())
    about.pop("store_array_data_equal_to_fill_value")
    (folder / "_METADATA").write_text(json.dumps(about))
    assert_read_as_orbax_does(folder)


# --- From elsewhere ----------------------------------------------------------------------------------------------------

SMALL = {"w": jnp.ones((3, 5)), "b": [jnp.ones(5), jnp.ones(2)]}


def test_commands(folder, tmp_path):
    """Each reads its base so; and values only of a base that the adapter is for."""
    params = {"w": jnp.ones((3, 5)), "b": [jnp.ones(5), jnp.ones(2)]}
    sites = jlora.sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 3)))
    jlora.save(tmp_path / "lora", jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="w")))
    store(folder, values(**{"w/.zarray": zarray(2**28, 2**8), "w/0.0": ocdbt.bomb(2**33, 2**38)}))
    said = call("merge", folder, tmp_path / "lora", tmp_path / "out", code=2)
    assert "(268435456, 256)" in said
    (folder / "d" / "x").unlink()
    (folder / "d" / "x").symlink_to("/dev/zero")
    for command in (
        ("merge", folder, tmp_path / "lora", tmp_path / "out"),
        ("diff", tmp_path / "lora", tmp_path / "lora", "--base", folder),
        ("extract", folder, folder, tmp_path / "out", "--rank", "1"),
        ("convert", tmp_path / "lora", tmp_path / "out", "--to", "peft", "--base", folder),
    ):
        assert "is a symbolic link: what lies elsewhere is not read" in call(*command, code=2), command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return {
        (ocdbt, three): save(tmp_path_factory.mktemp("a") / "a", SMALL, use_ocdbt=ocdbt, use_zarr3=three)
        for ocdbt in (True, False)
        for three in (True, False)
    }


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved[True, False], tmp_path / "a"))


@pytest.fixture
def plain(saved, tmp_path):
    return Path(shutil.copytree(saved[False, False], tmp_path / "a"))


@pytest.fixture
def plain3(saved, tmp_path):
    return Path(shutil.copytree(saved[False, True], tmp_path / "a"))


def change(file, *at, to):
    """Sets an item of a JSON file."""
    inner = about = json.loads(file.read_text())
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = to
    file.write_text(json.dumps(about))


def store(folder, values, named=(), **how):
    """Replaces an OCDBT store by one whose root holds these values."""
    node = ocdbt.sealed(ocdbt.NODE, values if isinstance(values, bytes) else ocdbt.leaf(values, named), **how)
    shutil.rmtree(folder / "d")
    (folder / "d").mkdir()
    (folder / "d" / "x").write_bytes(node)
    (folder / "manifest.ocdbt").write_bytes(ocdbt.sealed(ocdbt.MANIFEST, ocdbt.manifest("d/x", 0, len(node))))


def zarray(*shape, **change):
    about = {"zarr_format": 2, "shape": shape, "chunks": shape, "dtype": "<f4", "fill_value": None, "order": "C"}
    about |= {"compressor": {"id": "zstd", "level": 1}, "filters": None, "dimension_separator": "."}
    return json.dumps(about | change).encode()


def values(**change):
    found = {}
    for name, shape in {"w": (3, 5), "b.0": (5,), "b.1": (2,)}.items():
        found[f"{name}/.zarray"] = zarray(*shape)
        found[f"{name}/{'.'.join('0' for _ in shape)}"] = ocdbt.raw_frame(np.ones(shape, "f4").tobytes())
    return {k: v for k, v in (found | change).items() if v is not None}


def test_stores_of_this_writer_are_read(folder):
    store(folder, values())
    assert_read_as_orbax_does(folder)


@pytest.mark.parametrize(
    "what", ["_METADATA", "manifest.ocdbt", "d", "ocdbt.process_0", "array_metadatas", "array_metadatas/process_0"]
)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes(kind, what, folder, tmp_path):
    shutil.move(folder / what, tmp_path / "moved")
    if kind == "link":
        (folder / what).symlink_to(tmp_path / "moved")
    else:
        os.mkfifo(folder / what)
    with pytest.raises(
        ValueError, match=r"(?s)is a symbolic link: .*cp -rL" if kind == "link" else "is not a regular file"
    ):
        load_checkpoint(folder)


@pytest.mark.parametrize("what", ["w", "w/.zarray", "w/0.0"])
def test_links_where_keys_are_files(what, plain, tmp_path):
    shutil.move(plain / what, tmp_path / "moved")
    (plain / what).symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match="is a symbolic link: what lies elsewhere is not read"):
        load_checkpoint(plain)


def test_what_is_beside_may_be_anything(folder, tmp_path):
    """The folder itself may be a link, and files that are no part of a checkpoint are not looked at."""
    (folder / "README.md").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    (tmp_path / "latest").symlink_to(folder)
    assert jax.tree.structure(load_checkpoint(tmp_path / "latest")) == jax.tree.structure(SMALL)


def bomb_of_zarr(folder):
    pack = zlib.compressobj(1)
    raw = b"".join(pack.compress(bytes(2**24)) for _ in range(16)) + pack.flush()
    (folder / "w" / ".zarray").write_bytes(zarray(3, 5, chunks=[2**13] * 2, compressor={"id": "zlib", "level": 1}))
    (folder / "w" / "0.0").write_bytes(raw)


def shard(*parts, end=b"", index=None):
    at = np.cumsum([0, *map(len, parts)])
    index = [(at[i], len(part)) for i, part in enumerate(parts)] if index is None else index
    raw = np.array(index, "<u8").tobytes()
    return b"".join(parts) + end + raw + ocdbt.crc32c(raw).to_bytes(4, "little")


def long_keys(folder, length, count):
    body = bytes([0]) + ocdbt.files([]) + ocdbt.number(count)
    body += ocdbt.numbers([length] * (count - 1)) + ocdbt.numbers([length + 1] + [1] * (count - 1))
    store(folder, body + b"a" * (length + count) + ocdbt.numbers([0] * count) + bytes(count))


GIGABYTES = 2**33
ENTRY = "tree_metadata", "('w',)"
BOMBS = {
    "chunk": (0, lambda f: store(f, values(**{"w/0.0": ocdbt.bomb(GIGABYTES)})), "may unpack to more than"),
    "node": (0, lambda f: store(f, ocdbt.bomb(GIGABYTES), zstd=True), "may unpack to more than"),
    "long keys": (0, lambda f: long_keys(f, 65_000, 2**15), "a key has 65,001 letters"),
    "letters": (0, lambda f: long_keys(f, 4_000, 2**18), "more letters than fit"),
    "far": (0, lambda f: store(f, values(**{"w/0.0": (0, 0, 60)}), ["../../secret"]), r"names the file '\.\./\.\./secret'"),
    "zarr": (1, bomb_of_zarr, "'w' is stored in a way that orbax does not use"),
    "plain chunk": (1, lambda f: (f / "w" / "0.0").write_bytes(ocdbt.bomb(GIGABYTES)), "may unpack to more than"),
    "of nothing": (1, lambda f: (f / "w" / ".zarray").write_bytes(zarray(2**20, 2**19, chunks=[1, 1])), "and most are missing"),
    "a hole": (1, lambda f: (f / "w" / ".zarray").write_bytes(zarray(2**20, 2**19)), "a chunk of w has 60 bytes, not 2,199,023,255,552"),
    "shard": (2, lambda f: (f / "w" / "c" / "0" / "0").write_bytes(shard(ocdbt.bomb(GIGABYTES))), "may unpack to more than"),
    "list": (  # of a trillion
        1, lambda f: change(f / "_METADATA", *ENTRY, "key_metadata", 0, to={"key": "9" * 12, "key_type": 1}),
        "'999999999999' is missing",
    ),
    "depth": (1, lambda f: (f / "_METADATA").write_text('{"tree_metadata":' + "[" * 10**5 + "]" * 10**5 + "}"), "is not JSON|levels deep"),
}  # fmt: skip
CHILD = """
import json, pathlib, resource, sys, time
from jlora._cli_weights import load_checkpoint
load_checkpoint(pathlib.Path(sys.argv[1]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for folder in sys.argv[2:]:
    before, begin, said = peak(), time.monotonic(), ""
    try:
        load_checkpoint(pathlib.Path(folder))
    except ValueError as error:
        said = str(error)
    print(json.dumps([said, peak() - before, time.monotonic() - begin]), flush=True)
"""


def test_bombs_take_no_memory_and_no_time(saved, tmp_path):
    made = []
    for name, (layout, build, _) in BOMBS.items():
        made.append(
            Path(shutil.copytree(saved[((True, False), (False, False), (False, True))[layout]], tmp_path / name))
        )
        build(made[-1])
        assert sum(f.stat().st_size for f in made[-1].rglob("*")) < 30 * 2**20
    child = subprocess.run(
        [sys.executable, "-c", CHILD, saved[True, False], *made],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    for (name, (_, _, wanted)), line in zip(BOMBS.items(), child.stdout.splitlines(), strict=True):
        said, megabytes, seconds = json.loads(line)
        assert re.search(wanted, said), (name, said)
        assert megabytes < 200, name
        assert seconds < 30, name


STORES = {
    "missing": ({"w/0.0": None}, "w/0.0 is missing"),
    "unknown": ({"w/.zarray": None}, "'w' is missing"),
    "long": ({"w/.zarray": b" " * 2**15 + zarray(3, 5)}, "'w' is stored in a way that orbax does not use"),
    "another size": ({"w/0.0": ocdbt.raw_frame(bytes(64))}, "a chunk of w has 64 bytes, not 60"),
    "fewer": ({"w/0.0": ocdbt.frame([(0, 3, b"abc")])}, "a chunk of w has fewer bytes, not 60"),
    "garbage": ({"w/0.0": ocdbt.frame([(2, 24, b"\xff" * 24)], 60)}, "w cannot be unpacked"),
    "not packed": ({"w/.zarray": zarray(3, 5, compressor=None)}, r"a chunk of w has \d+ bytes, not 60"),
    "huge": ({"w/.zarray": zarray(2**30, 2**30)}, "its arrays are to have 4,611,686,018,427,387,"),
}
ODD = [
    {"chunks": [4, 5]}, {"chunks": [0, 5]}, {"chunks": [3]}, {"shape": [3.0, 5]}, {"shape": [-3, 5]}, {"shape": [True, 5]}, {"shape": 3},
    {"dtype": "|O"}, {"dtype": ">f4"}, {"dtype": ["<f4"]}, {"filters": [{"id": "zlib"}]}, {"fill_value": 1}, {"order": "F"}, {"more": 1},
    {"compressor": {"id": "blosc"}}, {"compressor": 3}, {"dimension_separator": "/"}, {"zarr_format": 3},
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), STORES.values(), ids=STORES)
def test_stores_that_do_not_fit(change, message, folder):
    store(folder, values(**change))
    with pytest.raises(ValueError, match=f"The checkpoint at .* is damaged: {message}"):
        load_checkpoint(folder)


@pytest.mark.parametrize("change", ODD, ids=str)
def test_what_orbax_does_not_say(change, folder):
    store(folder, values(**{"w/.zarray": zarray(3, 5, **change)}))
    with pytest.raises(ValueError, match=r"'w' is stored in a way that orbax does not use\n  got: \{"):
        load_checkpoint(folder)


SHARDING = "codecs", 0, "configuration"
ODD_3 = [
    (("zarr_format",), 2), (("node_type",), "group"), (("data_type",), "float128"), (("fill_value",), 1), (("shape",), [3, 5, 7]),
    (("attributes",), {"a": 1}), (("storage_transformers",), [1]), (("chunk_grid", "name"), "rectilinear"), (("codecs",), []),
    (("chunk_grid", "configuration", "chunk_shape"), [4, 5]), (("chunk_key_encoding",), {"name": "v2"}), (("codecs", 0, "name"), "x"),
    ((*SHARDING, "chunk_shape"), [2, 5]), ((*SHARDING, "codecs", 1, "name"), "gzip"), ((*SHARDING, "index_location"), "start"),
    ((*SHARDING, "index_codecs"), []), ((*SHARDING, "codecs", 0, "configuration"), {"endian": "big"}), ((*SHARDING, "codecs"), 7),
]  # fmt: skip


@pytest.mark.parametrize(("at", "to"), ODD_3, ids=str)
def test_what_orbax_does_not_say_in_zarr_3(at, to, plain3):
    change(plain3 / "w" / "zarr.json", *at, to=to)
    with pytest.raises(ValueError, match=r"'w' is stored in a way that orbax does not use\n  got: \{"):
        load_checkpoint(plain3)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "a chunk of w was cut"),
        (shard(ocdbt.raw_frame(bytes(60)), index=[(0, 10**6)]), "a part of a chunk of w is not there"),
        (shard(ocdbt.raw_frame(bytes(64))), "a chunk of w has 64 bytes, not 60"),
        (shard(ocdbt.raw_frame(bytes(60)))[:-4] + bytes(4), "w cannot be unpacked"),
    ],
)
def test_shards_that_do_not_fit(raw, message, plain3):
    (plain3 / "w" / "c" / "0" / "0").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(plain3)


def test_shards_of_this_writer_are_read(plain3):
    """And what a shard leaves out is zero."""
    at = plain3 / "w" / "c" / "0" / "0"
    at.write_bytes(shard(ocdbt.raw_frame(np.arange(15, dtype="f4").tobytes())))
    assert_read_as_orbax_does(plain3)
    at.write_bytes(shard(index=[(2**64 - 1, 2**64 - 1)]))
    assert float(load_checkpoint(plain3)["w"].sum()) == 0


LEAF = {"key_metadata": [{"key": "w", "key_type": 2}], "value_metadata": {"value_type": "x", "skip_deserialize": False}}
IN_W = LEAF | {"key_metadata": [*LEAF["key_metadata"], {"key": "x", "key_type": 2}]}
EMPTY = LEAF | {"value_metadata": {"value_type": "Dict", "skip_deserialize": True}}
TREES = {
    "none": ((ENTRY[0],), {}, "is no tree of parameters: it holds no arrays"),
    "only empty": ((ENTRY[0],), {"a": EMPTY}, "is no tree of parameters: it holds no arrays"),
    "not a dict": ((ENTRY[0],), [1], "_METADATA is not what orbax writes"),
    "not an entry": (ENTRY, 3, "_METADATA is not what orbax writes"),
    "no number": ((*ENTRY, "key_metadata", 0, "key_type"), 1, "_METADATA is not what orbax writes"),
    "text": ((*ENTRY, "value_metadata", "value_type"), "string", "is no tree of parameters: 'w' is a string, beside arrays"),
    "other": ((*ENTRY, "value_metadata"), {"value_type": "X\x1b", "skip_deserialize": True}, r"'w' is a X\\x1b, beside arrays"),
    "twice": ((ENTRY[0], "again"), LEAF, "'w' is there twice"),
    "inside": ((ENTRY[0], "z"), IN_W, r"'w\.x' is missing"),
    "gap": ((ENTRY[0], "('b', '0')", "key_metadata", 1, "key"), "2", r"'b\.2' is missing"),
    "strange": ((*ENTRY, "key_metadata", 0, "key"), "\ud800", r"'\\ud800' is missing"),
}  # fmt: skip


@pytest.mark.parametrize(("at", "to", "message"), TREES.values(), ids=TREES)
def test_trees_that_orbax_does_not_write(at, to, message, plain):
    change(plain / "_METADATA", *at, to=to)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(plain)


def test_nodes_that_do_not_go_together(plain):
    change(plain / "_METADATA", ENTRY[0], "z", to=IN_W)
    shutil.copytree(plain / "w", plain / "w.x")
    with pytest.raises(ValueError, match=r"'w\.x' lies in an array"):
        load_checkpoint(plain)
    change(plain / "_METADATA", ENTRY[0], to={"y": LEAF | {"key_metadata": [{"key": "1", "key_type": 1}]}})
    (plain / "w").rename(plain / "1")
    with pytest.raises(ValueError, match="the parts of a list are not numbered one after another"):
        load_checkpoint(plain)


@pytest.mark.parametrize(("impl", "message"), [("rot13", "'w' is no random key"), (3, "'w' is no random key")])
def test_random_keys_that_are_none(impl, message, folder):
    file = folder / "array_metadatas" / "process_0"
    about = json.loads(file.read_text())
    of_w = next(x for x in about["array_metadatas"] if x["array_metadata"]["param_name"] == "w")
    of_w["array_metadata"]["ext_metadata"] = {"random_key_impl": impl}
    file.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)
    file.write_text('{"array_metadatas": [3]}')
    with pytest.raises(ValueError, match="array_metadatas/process_0 is not what orbax writes"):
        load_checkpoint(folder)


def test_a_folder_without_a_tree(folder):
    with pytest.raises(ValueError, match="is no tree of parameters: there is no _METADATA"):
        _restore.Checkpoint(folder / "d")


def attempt(folder):
    """Loads what may be anything: a tree of arrays, or a clear error."""
    said = ""
    try:
        load_checkpoint(folder)
    except UnicodeError:
        raise
    except (ValueError, FileNotFoundError, Refusal) as error:
        said = str(error)
        assert said.isprintable() or "\n" in said
    assert len(said) < 3000


@MANY
@given(data=st.data())
def test_bytes_that_were_changed(saved, data, tmp_path):
    """In any of the files, in any of the layouts."""
    folder = tmp_path / "a"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved[data.draw(st.booleans()), data.draw(st.booleans())], folder)
    file = data.draw(st.sampled_from(sorted(f for f in folder.rglob("*") if f.is_file())))
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(raw))
    attempt(folder)
