"""Folders of ``jlora.save`` from elsewhere: whatever is in them, an error comes quickly, and memory stays within what they describe.

Who sends a folder can make every digest in it anew, and so do these tests.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import ocdbt_writer as ocdbt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoint import PARAMS, adapter, assert_same
from test_hostile import MANY, VALUES

import jlora
from jlora import _checkpoint, _ocdbt


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "a"
    jlora.save(folder, adapter(1), note="x")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "a"))


def described(folder):
    return json.loads((folder / "adapter.json").read_text())


def arrays(folder):
    return folder / described(folder)["arrays"]


def seal(folder, **change):
    """Writes all digests anew."""
    about = described(folder) | change
    about.pop("digest")
    about["files"] = {n: _checkpoint._record(f) for n, f in _checkpoint._files_of(arrays(folder)).items()}
    (folder / "adapter.json").write_text(json.dumps(about | {"digest": _checkpoint._digest(about)}))


SHAPES = {"00000.value": (7,), "00001.a": (5, 1), "00001.b": (1, 7), "00002.a": (3, 2), "00002.b": (2, 5)}


def zarray(shape, **change):
    about = {
        "zarr_format": 2,
        "shape": list(shape),
        "chunks": list(shape),
        "dtype": "<f4",
        "fill_value": None,
        "order": "C",
    }
    about |= {"compressor": {"id": "zstd", "level": 1}, "filters": None, "dimension_separator": "."}
    return json.dumps(about | change).encode()


def values(**change):
    """What is in the store of a good adapter, all ones, by key; ``None`` leaves it out."""
    found = {}
    for name, shape in SHAPES.items():
        found[f"{name}/.zarray"] = zarray(shape)
        found[f"{name}/{'.'.join('0' for _ in shape)}"] = ocdbt.raw_frame(np.ones(shape, "f4").tobytes())
    return {k: v for k, v in (found | change).items() if v is not None}


def store(folder, root, *, height=0, zstd=False, more=b"", named="d/x", **how):
    """Replaces the store by one whose root has this body."""
    at = arrays(folder)
    for old in ("d", "ocdbt.process_0"):
        shutil.rmtree(at / old)
    node = ocdbt.sealed(ocdbt.NODE, root, zstd)
    (at / "d").mkdir()
    (at / "d" / "x").write_bytes(node + more)
    body = ocdbt.manifest(named, 0, len(node), height, **how)
    (at / "manifest.ocdbt").write_bytes(ocdbt.sealed(ocdbt.MANIFEST, body))
    seal(folder)


def test_stores_of_this_writer_are_read(folder):
    """By jlora, and by TensorStore: what is wrong with those below is what their test says."""
    import tensorstore as ts

    body = ocdbt.leaf(values())
    store(folder, ocdbt.frame([(0, len(body), body)]), zstd=True)
    lora = jlora.load(folder, PARAMS)
    assert all(bool((x == 1).all()) for x in jax.tree.leaves(lora))
    assert jax.tree.structure(lora) == jax.tree.structure(adapter())
    kv = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{arrays(folder)}/"}).result()
    assert {k.decode(): kv.read(k).result().value for k in kv.list().result()} == values()


def far(folder):
    """A value outside of the folder."""
    (folder.parent / "secret").write_bytes(np.ones((7,), "f4").tobytes())
    store(folder, ocdbt.leaf(values(**{"00000.value/0": (0, 0, 28)}), named=["../../secret"]))


def shared(folder):
    """A tree whose nodes have the same children again and again: it has 100 keys to the eighth power."""
    bodies = [ocdbt.leaf({"x": b""})]
    at, pieces = [0], b""
    for height in range(1, 9):
        node = ocdbt.sealed(ocdbt.NODE, bodies[-1])
        below = (0, at[-1], len(node))
        pieces += node
        at.append(len(pieces))
        bodies.append(ocdbt.interior(height, [(f"{i:02d}", 2, below) for i in range(100)], ["d/x"]))
    root = ocdbt.sealed(ocdbt.NODE, bodies[-1])
    store(folder, bodies[-1], height=8)
    at_file = arrays(folder) / "d" / "x"
    at_file.write_bytes(pieces + root)
    (arrays(folder) / "manifest.ocdbt").write_bytes(
        ocdbt.sealed(ocdbt.MANIFEST, ocdbt.manifest("d/x", len(pieces), len(root), 8))
    )
    seal(folder)


def long_keys(folder):
    """Keys that share all but a letter with the one before: some kilobytes of node for two gigabytes of keys."""
    n = 2**15
    body = bytes([0]) + ocdbt.files([]) + ocdbt.number(n)
    body += ocdbt.numbers([65_000] * (n - 1)) + ocdbt.numbers([65_001] + [1] * (n - 1)) + b"a" * (65_000 + n)
    store(folder, body + ocdbt.numbers([0] * n) + bytes(n))


def zip_bomb(folder):
    """Not OCDBT at all: a chunk of 256 megabytes, as zarr has it."""
    at = arrays(folder)
    for old in ("d", "ocdbt.process_0"):
        shutil.rmtree(at / old)
    (at / "manifest.ocdbt").unlink()
    about = json.loads((at / "_METADATA").read_text()) | {"use_ocdbt": False}
    (at / "_METADATA").write_text(json.dumps(about))
    pack = zlib.compressobj(1)
    raw = b"".join(pack.compress(bytes(2**24)) for _ in range(16)) + pack.flush()
    for name, shape in SHAPES.items():
        (at / name).mkdir()
        big = {"chunks": [2**13] * len(shape), "compressor": {"id": "zlib", "level": 1}}
        (at / name / ".zarray").write_bytes(zarray(shape, **big))
        (at / name / ".".join("0" for _ in shape)).write_bytes(raw)
    seal(folder)


GIGABYTES = 2**33
CHUNK = "00002.a/0.0"
BOMBS = {
    "zarr": (zip_bomb, "there is no manifest.ocdbt"),
    "chunk": (lambda f: store(f, ocdbt.leaf(values(**{CHUNK: ocdbt.bomb(GIGABYTES)}))), "may unpack to more than"),
    "chunk that lies": (
        lambda f: store(f, ocdbt.leaf(values(**{CHUNK: ocdbt.bomb(GIGABYTES, 24)}))),
        "may unpack to more than",
    ),
    "chunk of another size": (
        lambda f: store(f, ocdbt.leaf(values(**{CHUNK: ocdbt.bomb(2**17, 2**17)}))),
        "a chunk of 00002.a has 131,072 bytes, not 24",
    ),
    "chunk of chunks": (
        lambda f: store(f, ocdbt.leaf(values(**{"00002.a/.zarray": zarray((3, 2), chunks=[2**14, 2**14])}))),
        "00002.a should be",
    ),
    "node": (lambda f: store(f, ocdbt.bomb(GIGABYTES), zstd=True), "may unpack to more than"),
    "node of nothing": (lambda f: store(f, ocdbt.frame([(0, 0, b"")] * 10**5), zstd=True), "in too many blocks"),
    "window": (
        lambda f: store(f, ocdbt.frame([(0, 1, b"x")], window=31), zstd=True),
        "needs a window of 2,147,483,648",
    ),
    "content": (lambda f: store(f, ocdbt.frame([(0, 1, b"x")], 2**62), zstd=True), "shorter than it says"),
    "shared": (shared, "in two places of the tree"),
    "long keys": (long_keys, "a key has 65,001 letters"),
    "far": (far, r"names the file '\.\./\.\./secret', which is not one that was saved"),
    "keys": (lambda f: store(f, bytes([0, 0]) + ocdbt.number(2**40)), "has 1,099,511,627,776 keys"),
    "files": (lambda f: store(f, bytes([0]) + ocdbt.number(2**40)), "names 1,099,511,627,776 files"),
}

CHILD = """
import json, resource, sys, time
import jax.numpy as jnp, jlora
params = {"up": jnp.ones((3, 5)), "down": jnp.ones((5, 7)), "bias": jnp.zeros(7)}
jlora.load(sys.argv[1], params)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for folder in sys.argv[2:]:
    before, begin, said = peak(), time.monotonic(), ""
    try:
        jlora.load(folder, params)
    except ValueError as error:
        said = str(error)
    print(json.dumps([said, peak() - before, time.monotonic() - begin]), flush=True)
"""


def test_bombs_take_no_memory_and_no_time(saved, tmp_path):
    made = []
    for name, (build, _) in BOMBS.items():
        made.append(Path(shutil.copytree(saved, tmp_path / name.replace(" ", "-"))))
        build(made[-1])
        assert sum(f.stat().st_size for f in made[-1].rglob("*")) < 30 * 2**20
    child = subprocess.run(
        [sys.executable, "-c", CHILD, saved, *made], capture_output=True, text=True, timeout=300, check=True
    )
    for (name, (_, wanted)), line in zip(BOMBS.items(), child.stdout.splitlines(), strict=True):
        said, megabytes, seconds = json.loads(line)
        assert re.search(wanted, said), (name, said)
        assert megabytes < 100, name
        assert seconds < 30, name


STORES = {
    "missing": ({CHUNK: None}, "they have 9 parts, not 10"),
    "another": ({CHUNK: None, "00002.a/0.1": b""}, "00002.a/0.0 is missing"),
    "more": ({"00009.a/0.0": b""}, "00009.a/0.0 is not described"),
    "unknown": ({"00002.a/.zarray": None}, "00002.a is missing"),
    "long": ({"00002.a/.zarray": b" " * 2**15 + zarray((3, 2))}, "00002.a is described by 32,"),
    "deep": ({"00002.a/.zarray": b"[" * 2**13}, r"00002.a should be \(3, 2\) float32"),
    "shape": ({"00002.a/.zarray": zarray((3, 3))}, r"00002.a should be \(3, 2\) float32"),
    "zero": ({"00002.a/.zarray": zarray((3, 2), chunks=[0, 2])}, "00002.a should be"),
    "dtype": ({"00002.a/.zarray": zarray((3, 2), dtype="<f8")}, "00002.a should be"),
    "filters": ({"00002.a/.zarray": zarray((3, 2), filters=[{"id": "zlib"}])}, "00002.a should be"),
    "compressor": ({"00002.a/.zarray": zarray((3, 2), compressor={"id": "blosc", "level": 1})}, "00002.a should be"),
    "fill": ({"00002.a/.zarray": zarray((3, 2), fill_value=1)}, "00002.a should be"),
    "not json": ({"00002.a/.zarray": b"\xff\xfe"}, "00002.a should be"),
    "no zstd": ({CHUNK: np.ones((3, 2), "f4").tobytes()}, "not compressed by zstd"),
    "two frames": ({CHUNK: 2 * ocdbt.raw_frame(bytes(24))}, "was added to"),
    "cut": ({CHUNK: ocdbt.raw_frame(bytes(24))[:-1]}, "was cut or changed"),
    "dictionary": ({CHUNK: ocdbt.frame([(0, 24, bytes(24))], 24, flags=1)}, "in a way that orbax does not use"),
    "garbage": ({CHUNK: ocdbt.frame([(2, 24, b"\xff" * 24)], 24)}, "00002.a cannot be unpacked"),
    "nan": ({CHUNK: ocdbt.raw_frame(np.full((3, 2), np.nan, "f4").tobytes())}, r"'up\.a at .*' is not finite"),
    "infinite": ({CHUNK: ocdbt.raw_frame(np.full((3, 2), -np.inf, "f4").tobytes())}, r"'up\.a at .*' is not finite"),
}


@pytest.mark.parametrize(("change", "message"), STORES.values(), ids=STORES)
def test_stores_that_do_not_fit(change, message, folder):
    store(folder, ocdbt.leaf(values(**change)))
    for params in (None, PARAMS):
        with pytest.raises(ValueError, match=message):
            jlora.load(folder, params)


NODES = {
    "height": (lambda f: store(f, ocdbt.leaf(values(), height=1)), "not as high in the tree"),
    "empty": (lambda f: store(f, bytes([0, 0, 0])), "has 0 keys"),
    "cut": (lambda f: store(f, ocdbt.leaf(values())[:-5]), "a node was cut"),
    "digits": (lambda f: store(f, bytes([0]) + b"\xff" * 20), "too many digits"),
    "no table": (lambda f: store(f, ocdbt.leaf(values(**{CHUNK: (0, 0, 28)}))), "not in its table"),
    "past the end": (
        lambda f: store(f, ocdbt.leaf(values(**{CHUNK: (0, 10, 10**9)}), named=["d/x"])),
        "a part of d/x is not there",
    ),
    "manifests": (lambda f: store(f, ocdbt.leaf(values()), kind=1), "in several files"),
    "elsewhere": (lambda f: store(f, ocdbt.leaf(values()), named="/etc/passwd"), "names the file '/etc/passwd'"),
    "nowhere": (lambda f: store(f, ocdbt.leaf(values()), named="d/\x1b[2J"), r"names the file 'd/\\x1b\[2J'"),
}


@pytest.mark.parametrize(("build", "message"), NODES.values(), ids=NODES)
def test_nodes_that_orbax_does_not_write(build, message, folder):
    build(folder)
    with pytest.raises(ValueError, match=f"The arrays in .* are damaged: .*{message}"):
        jlora.load(folder, PARAMS)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (ocdbt.sealed(ocdbt.NODE, ocdbt.manifest("d/x", 0, 9)), "holds no node"),
        (ocdbt.sealed(ocdbt.MANIFEST, ocdbt.manifest("d/x", 0, 9), version=9), "has version 9 of OCDBT"),
        (ocdbt.sealed(ocdbt.MANIFEST, bytes(16) + b"\0\1\1\4\0\0\0\0"), "names no version"),
        (b"", "has 0 bytes"),
    ],
)
def test_manifests_that_orbax_does_not_write(raw, message, folder):
    (arrays(folder) / "manifest.ocdbt").write_bytes(raw)
    seal(folder)
    with pytest.raises(ValueError, match=message):
        jlora.load(folder)


def test_a_key_twice(folder):
    body = ocdbt.leaf(values())
    node = ocdbt.sealed(ocdbt.NODE, body)
    again = [("", 0, (0, at, len(node))) for at in (0, len(node))]
    root = ocdbt.interior(1, again, ["d/x"])
    store(folder, body, more=node + ocdbt.sealed(ocdbt.NODE, root))
    place = 2 * len(node), len(root) + 18
    (arrays(folder) / "manifest.ocdbt").write_bytes(ocdbt.sealed(ocdbt.MANIFEST, ocdbt.manifest("d/x", *place, 1)))
    seal(folder)
    with pytest.raises(ValueError, match=r"the key '00.*' is there twice"):
        jlora.load(folder)


def test_content_that_ends_early():
    with pytest.raises(ValueError, match="cannot be unpacked"):
        _ocdbt.unpack(ocdbt.frame([(2, 24, b"\xff" * 24)], 24), 2**20)
    assert _ocdbt.unpack(ocdbt.frame([(0, 3, b"abc")], flags=4) + bytes(4), 2**20) == b"abc"
    assert _ocdbt.unpack(ocdbt.frame([(0, 0, b"")], 0), 2**20) == b""


@pytest.mark.parametrize(
    "what", ["adapter.json", "arrays", "arrays/d", "arrays/manifest.ocdbt", "arrays/_METADATA", "arrays/new"]
)
def test_links(what, folder, tmp_path):
    path = folder / what.replace("arrays", arrays(folder).name)
    if path.exists():
        shutil.move(path, tmp_path / "moved")
    path.symlink_to(tmp_path / "moved" if what != "arrays/new" else "/dev/zero")
    with pytest.raises(ValueError, match=r"(?s) is a symbolic link: what lies elsewhere is not read.*cp -rL"):
        jlora.load(folder)
    if what == "adapter.json":
        with pytest.raises(ValueError, match="is a symbolic link"):
            jlora.metadata(folder)


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    (tmp_path / "latest").symlink_to(folder)
    assert_same(jlora.load(tmp_path / "latest"), adapter(1))


@pytest.mark.parametrize(
    "what", ["adapter.json", "arrays", "arrays/d", "arrays/manifest.ocdbt", "arrays/array_metadatas/process_1"]
)
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_pipes_and_sockets(kind, what, folder, tmp_path, monkeypatch):
    path = folder / what.replace("arrays", arrays(folder).name, 1)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        monkeypatch.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)
    with pytest.raises(ValueError, match="is not a regular file"):
        jlora.load(folder)


def test_listed_files_larger_than_the_arrays_call_for(folder):
    with open(arrays(folder) / "d" / "more", "wb") as f:
        f.truncate(2**40)
    about = described(folder)
    about["files"]["d/more"] = [2**40, "0" * 64]
    about.pop("digest")
    (folder / "adapter.json").write_text(json.dumps(about | {"digest": _checkpoint._digest(about)}))
    with pytest.raises(ValueError, match=r"have 1,099,51[\d,]+ bytes; for the arrays that are described at most"):
        jlora.load(folder)


def test_arrays_larger_than_any(folder):
    about = described(folder)
    size = 2**39
    about["base"] = [["up", [size, 5], "float32"]]
    about["adapters"] = {"up": about["adapters"]["up"]}
    about["adapters"]["up"]["arrays"]["a"]["shape"] = [size, 2]
    about.pop("digest")
    (folder / "adapter.json").write_text(json.dumps(about | {"digest": _checkpoint._digest(about)}))
    with pytest.raises(ValueError, match=r"is to have 4,398,046,511,144 bytes; at most 4,398,046,511,104 are read"):
        jlora.load(folder)


@pytest.mark.parametrize("depth", [100, 900, 100_000])
def test_nesting(depth, folder):
    (folder / "adapter.json").write_text('{"meta":' + "[" * depth + "]" * depth + "}")
    with pytest.raises(ValueError, match=r"nested more than 64 levels deep|is not JSON"):
        jlora.metadata(folder)


def test_metadata_that_would_not_be_read(tmp_path):
    deep = []
    for depth in range(1, 100_000):
        deep = [deep]
        if depth in (70, 99_999):
            with pytest.raises((ValueError, TypeError), match=r"nested more than 63 levels deep|must be JSON"):
                jlora.save(tmp_path / "a", adapter(), deep=deep)


def places(x, path=()):
    yield path
    for key in x if isinstance(x, dict) else range(len(x)) if isinstance(x, list) else ():
        yield from places(x[key], (*path, key))


ODD = st.sampled_from(
    [-1, 0, 1, 2**31, 2**62, 2**64, 10**300, 1e308, float("inf"), "\ud800", "object", "int4", "float64", "V8"]
)


def attempt(folder):
    """Loads what may be anything: finite arrays, or a clear error."""
    for params in (None, PARAMS):
        try:
            lora, said = jlora.load(folder, params), ""
        except UnicodeError:
            raise
        except (ValueError, FileNotFoundError) as error:
            lora, said = {}, str(error)
        assert bool(lora) != bool(said)
        assert len(said) < 3000
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(lora))


@MANY
@given(data=st.data())
def test_descriptions_of_any_kind(saved, data, tmp_path):
    about = described(saved)
    folder = tmp_path / "a"
    if not folder.exists():
        shutil.copytree(saved, folder)
    at = data.draw(st.sampled_from([p for p in places(about) if p and p[0] != "digest"]))
    inner = about
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = data.draw(VALUES | ODD)
    about.pop("digest")
    (folder / "adapter.json").write_text(json.dumps(about | {"digest": _checkpoint._digest(about)}))
    attempt(folder)


@MANY
@given(data=st.data())
def test_bytes_that_were_changed(saved, data, tmp_path):
    """In any of the files, with all digests right."""
    folder = tmp_path / "a"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    names = sorted(_checkpoint._files_of(arrays(folder)))
    root = next(n for n in names if re.fullmatch(r"d/\w+", n))
    file = arrays(folder) / data.draw(st.sampled_from([root, root, "manifest.ocdbt", *names]))
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(raw))
    seal(folder)
    attempt(folder)
