"""Files from elsewhere: whatever is in them, a clear error comes quickly, memory stays small, and nothing is written."""

import contextlib
import json
import os
import re
import struct
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jlora
import jlora.peft
from jlora import _files, _peft_match

PARAMS = {"up": {"kernel": jnp.ones((3, 5))}, "down": {"kernel": jnp.ones((5, 7))}}
SITES = jlora.sites(lambda p, x: jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"], PARAMS, jnp.ones((2, 3)))
ERRORS = (ValueError, FileNotFoundError)


def adapter(folder):
    jlora.peft.save(
        folder, jlora.init(jax.random.key(0), PARAMS, SITES, jlora.LoRA(rank=2, targets=".*")), overwrite=True
    )
    (folder / "checksums.json").unlink()  # a stranger's has none, or the right ones
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = adapter(tmp_path_factory.mktemp("good") / "a")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def written(folder, header, body=b"", length=None):
    """An adapter whose tensors have this header."""
    adapter(folder)
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = struct.pack("<Q", len(raw) if length is None else length)
    (folder / "adapter_model.safetensors").write_bytes(start + raw + body)
    return folder


def quickly(call, megabytes=200, seconds=60):
    """Calls what has to fail: in bounded time and memory (not to hang is what counts), and with an error that says something."""
    tracemalloc.start()
    begin = time.monotonic()
    with pytest.raises(ERRORS) as caught:
        call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - begin < seconds
    assert peak < megabytes * 2**20
    assert len(str(caught.value)) < 2000
    return str(caught.value)


def entry(**changes):
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes


HEADERS = [
    (b"", "no safetensors file|damaged"),
    (b"not json", "header .* is damaged"),
    (b"[]", "header .* is damaged"),
    (b"{}", "holds 0 tensors"),
    (b"[" * 200_000, "header .* is damaged"),
    (b'{"a": ' * 50_000 + b"1" + b"}" * 50_000, "header .* is damaged"),
    (b'{"a": ' + b"9" * 10_000 + b"}", "header .* is damaged"),
    ({"a": 3}, "header .* is damaged"),
    ({"a": entry(dtype="I64")}, "holds I64"),
    ({"a": entry(dtype="PICKLE")}, "holds PICKLE"),
    ({"a": entry(shape=[-2, 3])}, "has shape and offsets"),
    ({"a": entry(shape=[2.0, 3])}, "has shape and offsets"),
    ({"a": entry(shape=[True, 24])}, "has shape and offsets"),
    ({"a": entry(shape=[2**40, 2**40])}, "lies at"),
    ({"a": entry(shape=[1] * 40)}, "has shape and offsets"),
    ({"a": entry(data_offsets=[0])}, "has shape and offsets"),
    ({"a": entry(data_offsets=[24, 0])}, "lies at"),
    ({"a": entry(data_offsets=[0, 2**63])}, "has shape and offsets"),
    ({"a": entry(), "b": entry()}, "lies at"),
    ({"a": entry(data_offsets=[8, 32])}, "lies at"),
    ({"a": entry()}, "was cut or added to"),
    (b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a": {}}', "stands there twice"),
    ({f"t{i}": entry(shape=[0], data_offsets=[0, 0]) for i in range(100_001)}, "holds 100,001 tensors"),
    ({"\x1b[2J" * 50: entry(dtype="I8")}, r"'\\x1b"),
]


@pytest.mark.parametrize(("header", "message"), HEADERS)
def test_headers(header, message, tmp_path):
    folder = written(tmp_path / "a", header)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    said = quickly(lambda: jlora.peft.load(folder, SITES))
    assert re.search(message, said), said
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("length", [2**63, 2**32, 100 * 2**20])
def test_a_header_longer_than_it_may_be(length, tmp_path):
    folder = written(tmp_path / "a", b"{}", length=length)
    assert "cannot hold a header" in quickly(lambda: jlora.peft.load(folder, SITES))
    with open(folder / "adapter_model.safetensors", "r+b") as f:
        f.truncate(101 * 2**20)  # sparse: the size is there, the bytes are not
    said = quickly(lambda: jlora.peft.load(folder, SITES))
    assert ("at most" in said) == (length == 100 * 2**20)


def test_a_large_tensor_is_not_read_before_its_shape_fits(tmp_path):
    key, n = "base_model.model.up.lora_A.weight", 2**32
    header = json.dumps({key: {"dtype": "F32", "shape": [2, n], "data_offsets": [0, 8 * n]}}).encode()
    folder = written(tmp_path / "a", header)
    with open(folder / "adapter_model.safetensors", "r+b") as f:
        f.truncate(8 + len(header) + 8 * n)  # 34 GB, sparse
    quickly(lambda: jlora.peft.load(folder, SITES))


CONFIGS = [
    (b"", "is not JSON"),
    (b"[]", "holds list, not an object"),
    (b"[" * 100_000, "is not JSON"),
    (b"\xff\xfe", "is not JSON"),
    (b"{" + b" " * (16 * 2**20) + b"}", "more than the 16,777,216"),
    (b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", "is not JSON"),
]


@pytest.mark.parametrize(("content", "message"), CONFIGS)
def test_configurations(content, message, tmp_path):
    (adapter(tmp_path / "a") / "adapter_config.json").write_bytes(content)
    assert message in quickly(lambda: jlora.peft.load(tmp_path / "a", SITES))


@pytest.mark.parametrize("name", ["a." * 63 + "a", "a." * 2_000_000, "ab" * 2_000_000], ids=["deep", "deeper", "long"])
def test_names_of_tensors_that_no_module_has(name, tmp_path):
    """Every module that such a one would be in has a name as long."""
    folder = written(tmp_path / "a", {f"base_model.model.{name}.lora_A.weight": entry()}, bytes(24))
    for call in (lambda: jlora.peft.load(folder, SITES), lambda: jlora.peft.read(folder)):
        assert re.search(r"whose name has .* letters in .* parts; no module is named like that", quickly(call))


@pytest.mark.parametrize("item", [b"[]", b"{}", b'""', b"1.5", b'{"a":0}'])
def test_json_of_many_values(item, tmp_path):
    """One takes up to thirty times its letters in memory."""
    raw = b'{"a":[' + (item + b",") * 1_300_000 + b"0]}"
    folder = written(tmp_path / "a", raw)
    assert re.search(r"The header of .* values; at most 1,200,000 are read", quickly(lambda: jlora.peft.read(folder)))
    (adapter(tmp_path / "b") / "adapter_config.json").write_bytes(raw)
    message = quickly(lambda: jlora.peft.load(tmp_path / "b", SITES))
    assert re.search(r"adapter_config.json has .* values; at most 1,200,000 are read", message)


def test_patterns_of_many_forms(tmp_path):
    content = json.loads((adapter(tmp_path / "a") / "adapter_config.json").read_text())
    content["alpha_pattern"] = {f"{i:010b}".replace("0", ".").replace("1", "a"): 1 for i in range(1024)}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(content))
    message = quickly(lambda: jlora.peft.load(tmp_path / "a", SITES))
    assert "alpha_pattern has 1,024 patterns with dots at 1,024 different places; at most 256 are read" in message


NAME = st.text("ab.", max_size=6)


@settings(max_examples=300, deadline=None)
@given(names=st.lists(NAME, max_size=4), name=NAME)
def test_look_ups_find_what_a_comparison_with_each_finds(names, name):
    found = _peft_match.Ends(names)
    assert found.match(name) == any(name == n or name.endswith(f".{n}") for n in names)
    assert found.match_letters(name) == any(name.endswith(n) for n in names)


LETTERS = st.lists(st.sampled_from(["a", "b", ".", r"\."]), min_size=1, max_size=5).map("".join)
PATTERN = st.builds("".join, st.tuples(st.sampled_from(["", "^"]), LETTERS, st.sampled_from(["", "$"])))


@settings(max_examples=300, deadline=None)
@given(patterns=st.lists(PATTERN, max_size=4, unique=True), name=st.text("ab.", min_size=1, max_size=6))
def test_patterns_find_what_peft_finds(patterns, name):
    """It runs each as it is, to the end of a name, from its beginning or after a dot; ``^`` there is never matched."""
    wanted = {i for i, pattern in enumerate(patterns) if re.match(rf"(.*\.)?({pattern})$", name)}
    found = _peft_match.Patterns("rank_pattern", {pattern: float(i) for i, pattern in enumerate(patterns)})
    if len(wanted) > 1:
        with pytest.raises(ValueError, match="Several patterns of rank_pattern match"):
            found.find(name, -1.0)
    else:
        assert found.find(name, -1.0) == next(iter(wanted), -1)


SLOW = [
    "(.*)*" * 30 + "x",
    "(.*)+" * 400 + "(x+x+)+y",
    "(u?){9999}p",
    "(((((.*.*){30}){30}){30}){30}){30}",
    "(((((){9999}){9999}){9999}){9999}){9999}",
    "(" * 500 + ")" * 500,
]


@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize(
    "field", ["alpha_pattern", "target_modules", "exclude_modules", "modules_to_save", "layers_pattern"]
)
def test_a_pattern_that_would_take_for_ever(field, pattern, tmp_path):
    """It is matched in linear time, or refused; ``re`` would not come back."""
    file = adapter(tmp_path / "a") / "adapter_config.json"
    value = {"alpha_pattern": {pattern: 3}, "modules_to_save": [pattern], "layers_pattern": [pattern]}.get(
        field, pattern
    )
    more = {"layers_to_transform": [0]} if field == "layers_pattern" else {}
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value} | more))
    begin = time.monotonic()
    with contextlib.suppress(ValueError):
        jlora.peft.load(tmp_path / "a", SITES)
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_pipes_and_devices(name, tmp_path):
    file = adapter(tmp_path / "a") / name
    file.unlink()
    os.mkfifo(file)
    assert "is not a regular file" in quickly(lambda: jlora.peft.load(tmp_path / "a", SITES))
    file.unlink()
    file.symlink_to("/dev/zero")
    assert "is not a regular file" in quickly(lambda: jlora.peft.load(tmp_path / "a", SITES))
    file.unlink()
    file.symlink_to(tmp_path / "nowhere")
    assert "There is no PEFT adapter" in quickly(lambda: jlora.peft.load(tmp_path / "a", SITES))


def test_links_into_a_cache_are_followed(tmp_path):
    folder = adapter(tmp_path / "blobs")
    (tmp_path / "a").mkdir()
    for file in folder.iterdir():
        (tmp_path / "a" / file.name).symlink_to(file)
    assert set(jlora.peft.load(tmp_path / "a", SITES)) == {"down/kernel", "up/kernel"}


def test_pickles_are_never_read(tmp_path):
    folder = adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "is a pickle, which can run anything and is never read" in quickly(lambda: jlora.peft.load(folder, SITES))


def test_tensors_that_are_cut_while_they_are_read(tmp_path):
    file = adapter(tmp_path / "a") / "adapter_model.safetensors"
    tensors = _files.Safetensors(file)
    file.write_bytes(file.read_bytes()[:-8])
    assert "was changed while it was read" in quickly(lambda: [tensors.read(name) for name in tensors.header])


MANY = settings(
    max_examples=int(os.environ.get("JLORA_FUZZ", 300)),
    deadline=None,
    derandomize="JLORA_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)


def attempt(folder, good):
    """Loads what may be damaged: the adapter, or a clear error."""
    try:
        lora, said = jlora.peft.load(folder, SITES), ""
    except ERRORS as error:
        lora, said = {}, str(error)
    assert bool(lora) != bool(said)
    assert len(said) < 3000
    if lora:
        assert set(lora) <= {"up/kernel", "down/kernel"}
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(lora))
    assert sorted(p.name for p in folder.iterdir()) == sorted(good)


@MANY
@given(data=st.data())
def test_bytes_that_were_changed(good, tmp_path, data):
    name = data.draw(st.sampled_from(sorted(good)))
    raw = bytearray(good[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        how = data.draw(st.sampled_from(["set", "cut", "double", "insert"]))
        if how == "set":
            raw[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del raw[at : at + data.draw(st.integers(1, 9))]
        elif how == "double":
            raw[at:at] = raw[at : at + data.draw(st.integers(1, 40))]
        else:
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        if not raw:
            break
    for file, content in good.items():
        (tmp_path / file).write_bytes(bytes(raw) if file == name else content)
    attempt(tmp_path, good)


WORDS = st.sampled_from(["LORA", "up", "down", "^up", "(a+)+", "", "up.lora_A.weight"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=4,
)


@MANY
@given(data=st.data())
def test_configurations_of_any_kind(good, tmp_path, data):
    config = json.loads(good["adapter_config.json"])
    names = [*config, "use_qalora", "trainable_token_indices", "layer_replication", "layers_to_transform", "new"]
    config |= data.draw(st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=3))
    (tmp_path / "adapter_model.safetensors").write_bytes(good["adapter_model.safetensors"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    attempt(tmp_path, good)


MODULES = ("up", "down", "up.base_layer", "..", "")
ROLES = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)
ROLES += ("weight", "bias", "base_layer.weight", "token_adapter.trainable_tokens_delta")
KEYS = st.sampled_from([f"base_model.model.{m}.{r}" for m in MODULES for r in ROLES]) | st.text(max_size=12)
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1}
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 5, 7]), max_size=4)


@MANY
@given(data=st.data())
def test_tensors_of_any_kind(good, tmp_path, data):
    start, header = 0, {}
    kinds = st.tuples(st.sampled_from(sorted(SIZES)), SHAPES)
    names = data.draw(st.dictionaries(KEYS, kinds, min_size=1, max_size=6))
    for key, (dtype, shape) in names.items():
        size = int(np.prod(shape, dtype=int)) * SIZES[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    raw = json.dumps(header).encode()
    (tmp_path / "adapter_config.json").write_bytes(good["adapter_config.json"])
    (tmp_path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(start))
    attempt(tmp_path, good)
