"""Saves that are interrupted at each call to the system: the old one or the new one is there, whole, and so is what lies beside."""

import contextlib
import errno
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

CALLS = [(os, name) for name in ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")] + [(shutil, "rmtree")]


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


KINDS = [Own()]


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
        with pytest.MonkeyPatch.context() as patched:
            count = interrupt(patched, at, after)
            with contextlib.suppress(KeyboardInterrupt):
                kind.save(folder, 2)
        if count[0] < at:
            break
        found = kind.load(folder)
        assert found in (1, 2), at
        assert (folder / "notes.txt").read_text() == "mine", at
        seen.add(found)
        kind.save(folder, 3)
        assert kind.load(folder) == 3
        assert (folder / "notes.txt").read_text() == "mine", at
        shutil.rmtree(folder.parent)
    assert at > 4
    assert seen == {1, 2}


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
