"""Saves that are interrupted at each call to the system: the old one or the new one is there, whole, and so is what lies beside."""

import contextlib
import errno
import json
import os
import shutil
import stat
import threading
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
import jlora.export
import jlora.peft

CALLS = [(os, name) for name in ("mkdir", "rename", "replace", "fsync", "link", "unlink", "rmdir")]
CALLS += [(shutil, name) for name in ("rmtree", "copytree")]


def net(params, x):
    return x @ params["up"]["kernel"] @ params["down"]["kernel"]


PARAMS = {"up": {"kernel": jnp.ones((3, 5))}, "down": {"kernel": jnp.ones((5, 7))}}
SITES = jlora.sites(net, PARAMS, jnp.ones((2, 3)))


def adapter(seed):
    lora = jlora.init(jax.random.key(0), PARAMS, SITES, jlora.LoRA(rank=2, targets=".*"))
    return jax.tree.map(lambda x: x * 0 + seed, lora)


class Own:
    """``jlora.save``."""

    def save(self, folder, seed):
        jlora.save(folder, adapter(seed), overwrite=True)

    def load(self, folder):
        return float(jlora.load(folder, PARAMS)["up/kernel"].a.mean())


class Peft:
    """``jlora.peft.save``."""

    def save(self, folder, seed):
        jlora.peft.save(folder, adapter(seed), overwrite=True)

    def load(self, folder):
        return float(jlora.peft.load(folder, SITES)["up/kernel"].a.mean())


class Export:
    """``jlora.export.save``, of several files the first time and of one after."""

    def save(self, folder, seed):
        params = jax.tree.map(lambda x: x * 0 + seed, PARAMS)
        jlora.export.save(folder, params, sites=SITES, overwrite=True, shard_bytes=64 if seed % 2 else 10**9)

    def load(self, folder):
        loaded = jlora.export.load(folder, PARAMS, sites=SITES)
        (found,) = {float(x) for leaf in jax.tree.leaves(loaded) for x in leaf.reshape(-1)}
        return found


KINDS = [Own(), Peft(), Export()]


def interrupt(monkeypatch, at, after):
    """Makes the call number ``at`` of those to the system raise, before or after it is done; counts them all.

    Those of orbax are left out: its threads wait minutes for one that has died.
    """
    count = [0]

    def is_orbax():
        return any("orbax" in frame.filename for frame in traceback.extract_stack())

    def wrap(module, name, real):
        def call(*args, **kwargs):
            if threading.current_thread() is not threading.main_thread() or is_orbax():
                return real(*args, **kwargs)
            count[0] += 1
            hit = count[0] == at
            if hit and not after:
                raise KeyboardInterrupt(name)
            result = real(*args, **kwargs)
            if hit:
                raise KeyboardInterrupt(name)
            return result

        monkeypatch.setattr(module, name, call)

    for module, name in CALLS:
        wrap(module, name, getattr(module, name))
    return count


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_the_old_or_the_new_one_is_there(kind, after, tmp_path):
    """An interrupt at every call in turn, and the next save goes through."""
    at, seen = 0, set()
    while True:
        at += 1
        folder = tmp_path / f"{at}" / "saved"
        folder.parent.mkdir()
        kind.save(folder, 1)
        (folder / "notes.txt").write_text("mine")
        (folder / "run").mkdir()
        (folder / "run" / "optimizer.pt").write_text("mine")
        with pytest.MonkeyPatch.context() as patched:
            count = interrupt(patched, at, after)
            with contextlib.suppress(KeyboardInterrupt):
                kind.save(folder, 2)
        if count[0] < at:
            break
        found = kind.load(folder)
        assert found in (1, 2), at
        assert (folder / "notes.txt").read_text() == (folder / "run" / "optimizer.pt").read_text() == "mine", at
        seen.add(found)
        kind.save(folder, 3)
        assert kind.load(folder) == 3
        assert (folder / "notes.txt").read_text() == (folder / "run" / "optimizer.pt").read_text() == "mine", at
        shutil.rmtree(folder.parent)
    assert at > 4
    assert seen == {1, 2}


@pytest.mark.parametrize("kind", KINDS[1:], ids=lambda kind: type(kind).__name__)
def test_overwriting_leaves_nothing_of_the_old_one_and_all_of_others(kind, tmp_path):
    """Stale shards and their index would be read along; a link stays a link, and so does where it points."""
    folder = tmp_path / "saved"
    kind.save(folder, 1)
    first = {p.name for p in folder.iterdir()}
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "objects" / "ab").write_text("mine")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "latest").symlink_to("nowhere")
    kind.save(folder, 2)
    kind.save(tmp_path / "alone", 2)
    expected = {p.name for p in (tmp_path / "alone").iterdir()}
    assert {p.name for p in folder.iterdir()} == expected | {".git", "tokenizer.json", "latest"}
    assert (first == expected) == isinstance(kind, Peft)
    assert (folder / ".git" / "objects" / "ab").read_text() == "mine"
    assert os.readlink(folder / "latest") == "nowhere"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "saved"]


def test_shards_of_other_names_go_with_their_index(tmp_path):
    folder = tmp_path / "saved"
    Export().save(folder, 1)
    (shard,) = list(folder.glob("model-00001*"))
    index = json.loads((folder / jlora.export.INDEX).read_text())
    index["weight_map"] = {k: "part.safetensors" if v == shard.name else v for k, v in index["weight_map"].items()}
    index["weight_map"]["odd"] = "notes.txt"  # no weights, whatever it says
    (folder / jlora.export.INDEX).write_text(json.dumps(index))
    shard.rename(folder / "part.safetensors")
    for name in ("notes.txt", "other.safetensors"):
        (folder / name).write_text("mine")
    Export().save(folder, 2)
    assert {p.name for p in folder.iterdir()} == {
        "checksums.json",
        "model.safetensors",
        "notes.txt",
        "other.safetensors",
    }


def test_where_there_are_no_links_files_are_copied(tmp_path, monkeypatch):
    Peft().save(tmp_path / "saved", 1)
    (tmp_path / "saved" / "notes.txt").write_text("mine")

    def refused(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    Peft().save(tmp_path / "saved", 2)
    assert (tmp_path / "saved" / "notes.txt").read_text() == "mine"
    assert Peft().load(tmp_path / "saved") == 2


def refuse_folders(monkeypatch, error):
    real = os.fsync

    def fsync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise error
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch):
    Own().save(tmp_path / "saved", 1)
    refuse_folders(monkeypatch, OSError(errno.EINVAL, "Invalid argument"))
    Own().save(tmp_path / "saved", 2)
    assert Own().load(tmp_path / "saved") == 2
    assert len(list((tmp_path / "saved").glob("arrays-*"))) == 1


def test_a_new_one_that_may_not_last(tmp_path, monkeypatch):
    """Both are kept: which of them is there after a loss of power, nobody knows."""
    folder = tmp_path / "saved"
    Own().save(folder, 1)
    with monkeypatch.context() as patched:
        refuse_folders(patched, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(OSError, match=r"is the new one, but may not outlive a loss of power: .*Input/output error"):
            Own().save(folder, 2)
    assert Own().load(folder) == 2
    assert len(list(folder.glob("arrays-*"))) == 2
    Own().save(folder, 3)
    assert len(list(folder.glob("arrays-*"))) == 1


def test_folders_of_like_names_are_not_the_savers(tmp_path):
    """Only names that a save makes are its own: ``arrays-`` and twelve digits."""
    folder = tmp_path / "data"
    (folder / "arrays-train").mkdir(parents=True)
    np.save(folder / "arrays-train" / "x.npy", np.ones(3))
    with pytest.raises(FileExistsError, match="is not an adapter: it is left alone"):
        jlora.save(folder, adapter(1))
    Own().save(tmp_path / "saved", 1)
    shutil.move(folder / "arrays-train", tmp_path / "saved" / "arrays-train")
    (tmp_path / "saved" / ".adapter.json.swp").write_text("an editor's")
    Own().save(tmp_path / "saved", 2)
    assert (tmp_path / "saved" / "arrays-train" / "x.npy").exists()
    assert (tmp_path / "saved" / ".adapter.json.swp").exists()
    remains = tmp_path / "killed" / "arrays-0123456789ab.orbax-checkpoint-tmp-7"
    remains.mkdir(parents=True)
    Own().save(tmp_path / "killed", 1)
    assert not remains.exists()
