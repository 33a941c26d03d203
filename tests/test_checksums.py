"""``checksums.json``: what differs from what was saved is refused by name, and what has none is read as before."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jlora
import jlora.export
import jlora.peft


def net(params, x):
    return x @ params["up"]["kernel"] @ params["down"]["kernel"]


PARAMS = {"up": {"kernel": jnp.ones((3, 5))}, "down": {"kernel": jnp.ones((5, 7))}}
SITES = jlora.sites(net, PARAMS, jnp.ones((2, 3)))
LORA = jax.tree.map(lambda x: x + 1, jlora.init(jax.random.key(0), PARAMS, SITES, jlora.LoRA(rank=2, targets=".*")))


def save(kind, folder):
    if kind == "peft":
        jlora.peft.save(folder, LORA)
    else:
        size = 64 if kind == "shards" else 10**9
        jlora.export.save(folder, PARAMS, sites=SITES, shard_bytes=size, config={"model_type": "mine"})


def load(kind, folder):
    if kind == "peft":
        return jlora.peft.load(folder, SITES)
    return jlora.export.load(folder, PARAMS, sites=SITES)


KINDS = ("peft", "one", "shards")


@pytest.mark.parametrize("kind", KINDS)
def test_each_file_is_listed_with_its_sha256(kind, tmp_path):
    """The same adapter gives the same ones."""
    for name in ("a", "b"):
        save(kind, tmp_path / name)
    sums = json.loads((tmp_path / "a" / "checksums.json").read_text())
    others = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir() if p.name != "checksums.json"}
    assert sums == {"sha256": {name: hashlib.sha256(others[name]).hexdigest() for name in sorted(others)}}
    assert (tmp_path / "a" / "checksums.json").read_bytes() == (tmp_path / "b" / "checksums.json").read_bytes()


def flipped(file, bit):
    raw = bytearray(file.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_loads_other_numbers(kind, tmp_path):
    """In any file that is read, ``checksums.json`` too, whose white space alone means nothing."""
    save(kind, tmp_path / "good")
    want = jax.tree.leaves(load(kind, tmp_path / "good"))
    rng = np.random.default_rng(0)
    for file in sorted(p.name for p in (tmp_path / "good").iterdir()):
        size = 8 * (tmp_path / "good" / file).stat().st_size
        for bit in rng.choice(size, 40, replace=False).tolist():
            shutil.copytree(tmp_path / "good", tmp_path / "bad", dirs_exist_ok=True)
            flipped(tmp_path / "bad" / file, bit)
            try:
                found = jax.tree.leaves(load(kind, tmp_path / "bad"))
            except ValueError as error:
                assert file in str(error) or "checksums.json" in str(error)  # noqa: PT017
                continue
            assert file in ("checksums.json", "config.json"), bit  # the latter is for others
            assert all(bool((x == y).all()) for x, y in zip(found, want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_changed_on_purpose(kind, tmp_path):
    """The message says what to do."""
    save(kind, tmp_path / "a")
    file = next((tmp_path / "a").glob("*.safetensors"))
    flipped(file, 8 * file.stat().st_size - 1 if kind == "peft" else 8 * file.stat().st_size - 10)
    with pytest.raises(
        ValueError, match=rf"{file.name} is not what was saved: .*\n.* remove checksums.json, and nothing"
    ):
        load(kind, tmp_path / "a")
    (tmp_path / "a" / "checksums.json").unlink()
    load(kind, tmp_path / "a")


def test_names_and_shapes_of_a_base_are_compared_without_reading_all_of_it(tmp_path, monkeypatch):
    save("one", tmp_path / "base")
    monkeypatch.setattr(hashlib, "file_digest", None)
    from jlora.export import open_weights

    assert set(open_weights(tmp_path / "base")) == {"up.weight", "down.weight"}


def test_a_file_is_hashed_once(tmp_path, monkeypatch):
    save("one", tmp_path / "a")
    real, read = hashlib.file_digest, []
    monkeypatch.setattr(hashlib, "file_digest", lambda f, how: read.append(f) or real(f, how))
    load("one", tmp_path / "a")
    assert len(read) == 1


FOREIGN = [
    "[]",
    "{",
    '{"sha256": {}}',
    '{"sha256": {"x": 3}}',
    '{"sha256": {"x": "0"}}',
    '{"md5": {"x": "0"}}',
    '{"sha256": ["x"]}',
]


@pytest.mark.parametrize("text", FOREIGN)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_checksums_is_refused(kind, text, tmp_path):
    save(kind, tmp_path / "a")
    (tmp_path / "a" / "checksums.json").write_text(text)
    with pytest.raises(ValueError, match=r"checksums.json (is damaged, or not jlora's|is not JSON|holds list)"):
        load(kind, tmp_path / "a")


@pytest.mark.parametrize("kind", KINDS)
def test_checksums_of_strangers_are_bounded(kind, tmp_path):
    save(kind, tmp_path / "a")
    file = tmp_path / "a" / "checksums.json"
    many = {f"{i}": "0" * 64 for i in range(100_001)}
    file.write_text(json.dumps({"sha256": many}))
    with pytest.raises(ValueError, match=r"checksums.json is damaged, or not jlora's"):
        load(kind, tmp_path / "a")
    with open(file, "wb") as f:
        f.truncate(2**34)
    with pytest.raises(
        ValueError, match=r"checksums.json has 17,179,869,184 bytes, more than the 16,777,216 it may have"
    ):
        load(kind, tmp_path / "a")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=r"checksums.json is not a regular file"):
        load(kind, tmp_path / "a")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_not_listed_was_not_saved(kind, tmp_path):
    save(kind, tmp_path / "a")
    (tmp_path / "a" / "checksums.json").write_text(json.dumps({"sha256": {"../x": "0" * 64}}))
    with pytest.raises(
        ValueError, match=r"checksums.json does not list .*, which lies beside it.\n .* remove checksums"
    ):
        load(kind, tmp_path / "a")


def test_a_model_of_others_in_one_file_needs_none(tmp_path):
    save("one", tmp_path / "a")
    save_file(
        {"up.weight": np.ones((5, 3), np.float32), "down.weight": np.ones((7, 5), np.float32)},
        tmp_path / "a" / "b.safetensors",
    )
    jlora.export.load(tmp_path / "a" / "b.safetensors", PARAMS, sites=SITES)


def test_an_overwrite_brings_its_own(tmp_path):
    save("shards", tmp_path / "a")
    jlora.export.save(tmp_path / "a", PARAMS, sites=SITES, overwrite=True)
    assert list(json.loads((tmp_path / "a" / "checksums.json").read_text())["sha256"]) == ["model.safetensors"]
    assert (tmp_path / "a" / "config.json").exists()  # nobody said another
    load("one", tmp_path / "a")


@pytest.mark.parametrize("limit", [0, 100, 900, 3000])
def test_a_full_disk_keeps_the_last_good_one(limit, tmp_path):
    """A limit on the size of files stands for a full disk: an ``OSError`` like those of other savers."""
    jlora.peft.save(tmp_path / "a", LORA)
    script = f"""
        import resource, signal, sys, jax, jax.numpy as jnp, jlora, jlora.peft
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        params = {{"up": {{"kernel": jnp.ones((300, 500))}}}}
        sites = jlora.sites(lambda p, x: x @ p["up"]["kernel"], params, jnp.ones((2, 300)))
        lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets=".*"))
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            jlora.peft.save(sys.argv[1], lora, overwrite=True)
        except OSError as error:
            print("OSError", error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "a")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=120
    )
    assert done.stdout.startswith("OSError"), done.stderr
    assert limit == 0 or "adapter_model.safetensors could not be written: " in done.stdout
    assert jlora.peft.load(tmp_path / "a", SITES).keys() == LORA.keys()
    assert os.listdir(tmp_path) == ["a"]
