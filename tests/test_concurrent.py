"""Readers and savers of one folder at once: a load is of one save, and of two saves one is there, whole."""

import os
import shutil
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
import jlora.export
import jlora.peft
from jlora import _checkpoint, _claims, _files, _folders


def net(params, x):
    return x @ params["up"]["kernel"] @ params["down"]["kernel"]


PARAMS = {"up": {"kernel": jnp.ones((3, 5))}, "down": {"kernel": jnp.ones((5, 7))}}
SITES = jlora.sites(net, PARAMS, jnp.ones((2, 3)))
LORA = jlora.init(jax.random.key(0), PARAMS, SITES, jlora.LoRA(rank=2, targets=".*"))


def save(kind, folder, seed, overwrite=True):
    lora = jax.tree.map(lambda x: x * 0 + seed, LORA)
    if kind == "own":
        jlora.save(folder, lora, overwrite=overwrite)
    elif kind == "peft":
        jlora.peft.save(folder, lora, overwrite=overwrite)
    else:
        params = jax.tree.map(lambda x: x * 0 + seed, PARAMS)
        sizes = {"one": 10**9, "shards": 64}[kind]
        jlora.export.save(folder, params, sites=SITES, overwrite=overwrite, shard_bytes=sizes)


def load(kind, folder):
    """The values of what is loaded: one of one save."""
    if kind == "own":
        found = {path: x.a for path, x in jlora.load(folder, PARAMS).items()}
    elif kind == "peft":
        found = {path: x.a for path, x in jlora.peft.load(folder, SITES).items()}
    else:
        found = jlora.export.load(folder, PARAMS, sites=SITES)
    return {float(x) for leaf in jax.tree.leaves(found) for x in np.ravel(leaf)}


KINDS = ("own", "peft", "one", "shards")


def at_read(monkeypatch, number, act):
    """Calls ``act`` before the read of tensor ``number``."""
    count, real = [0], _files.Safetensors.read

    def read(self, name):
        count[0] += 1
        if count[0] == number:
            act()
        return real(self, name)

    monkeypatch.setattr(_files.Safetensors, "read", read)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_an_overwrite_between_two_reads(kind, number, tmp_path, monkeypatch):
    """All tensors are of the files that were opened."""
    save(kind, tmp_path / "a", 1)
    at_read(monkeypatch, number, lambda: save(kind, tmp_path / "a", 2))
    assert load(kind, tmp_path / "a") == {1}
    assert load(kind, tmp_path / "a") == {2}


def test_an_adapter_read_without_its_base_is_of_one_save(tmp_path, monkeypatch):
    save("peft", tmp_path / "a", 1)
    at_read(monkeypatch, 2, lambda: save("peft", tmp_path / "a", 2))
    lora, _ = jlora.peft.read(tmp_path / "a")
    assert {float(x) for a in lora.values() for x in np.ravel(a.a)} == {1}


@pytest.mark.parametrize("kind", KINDS[1:])
def test_an_overwrite_between_the_files_of_a_folder(kind, tmp_path, monkeypatch):
    """The configuration, or the index, is of the old one; the old tensors are gone: all are opened again."""
    save(kind, tmp_path / "a", 1)
    real, saved = _files.Safetensors.__init__, []

    def init(self, *args, **kwargs):
        if not saved:
            saved.append(True)
            save(kind, tmp_path / "a", 2)
        real(self, *args, **kwargs)

    monkeypatch.setattr(_files.Safetensors, "__init__", init)
    assert load(kind, tmp_path / "a") == {2}
    assert saved


@pytest.mark.parametrize("kind", KINDS[1:])
def test_each_file_of_tensors_is_opened_once(kind, tmp_path, monkeypatch):
    save(kind, tmp_path / "a", 1)
    opened, real = [], _files.open_regular
    monkeypatch.setattr(_files, "open_regular", lambda file, *args: opened.append(file.name) or real(file, *args))
    load(kind, tmp_path / "a")
    assert len(opened) == len(set(opened)) >= 2


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    """In place, as others save: nothing says which tensors are of which."""
    save("peft", tmp_path / "a", 1)
    save("peft", tmp_path / "b", 2)
    (tmp_path / "a" / "checksums.json").unlink()
    file = tmp_path / "a" / "adapter_model.safetensors"

    def change():
        file.write_bytes((tmp_path / "b" / file.name).read_bytes())
        os.utime(file, ns=(1, 1))  # clocks of files are coarse

    at_read(monkeypatch, 2, change)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors was changed while it was read.\n  Load it again"):
        jlora.peft.load(tmp_path / "a", SITES)


def test_a_folder_that_never_stands_still_is_refused(tmp_path, monkeypatch):
    save("peft", tmp_path / "a", 1)
    real = _files.Safetensors.__init__

    def init(self, *args, **kwargs):
        real(self, *args, **kwargs)
        save("peft", tmp_path / "a", 2)

    monkeypatch.setattr(_files.Safetensors, "__init__", init)
    with pytest.raises(ValueError, match=r"a was replaced each of 10 times while it was read.\n  Load it when"):
        jlora.peft.load(tmp_path / "a", SITES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_beside_a_saver(kind, tmp_path):
    """Whatever the moment, it gets the old or the new one, whole, and no error."""
    save(kind, tmp_path / "a", 1)
    stop, errors = threading.Event(), []

    def saver():
        try:
            for seed in range(2, 12):
                save(kind, tmp_path / "a", seed)
        except BaseException as error:
            errors.append(error)
        stop.set()

    thread = threading.Thread(target=saver)
    thread.start()
    seen = []
    while not stop.is_set():
        (value,) = load(kind, tmp_path / "a")
        seen.append(value)
    thread.join()
    assert not errors
    assert seen == sorted(seen)
    assert load(kind, tmp_path / "a") == {11}


@pytest.mark.parametrize("moment", ["_open", "restore_target", "_check_precision"])
def test_a_load_during_which_the_adapter_is_replaced(moment, tmp_path, monkeypatch):
    """Its arrays are gone: they are looked for again. Those that are open already are read to their end."""
    save("own", tmp_path / "a", 1)
    real, saved = getattr(_checkpoint, moment), []

    def replace(*args):
        if moment == "_open":
            real(*args)
        if not saved:
            saved.append(True)
            save("own", tmp_path / "a", 2)
        return real(*args)

    monkeypatch.setattr(_checkpoint, moment, replace)
    assert load("own", tmp_path / "a") == {1 if moment == "_check_precision" else 2}


def test_an_adapter_that_is_damaged_is_still_said_to_be(tmp_path):
    save("own", tmp_path / "a", 1)
    shutil.rmtree(next((tmp_path / "a").glob("arrays-*")))
    with pytest.raises(ValueError, match=r"is damaged: the folder arrays-.* is missing"):
        jlora.load(tmp_path / "a")


def two_savers(kind, folder, monkeypatch):
    """The first is stopped just before it sweeps, and goes on when the second is done."""
    gate, done = threading.Event(), threading.Event()
    module, name = (_checkpoint, "_sweep") if kind == "own" else (_folders, "_put")
    real = getattr(module, name)

    def slow(*args):
        if threading.current_thread().name == "first":
            gate.set()
            done.wait()
        real(*args)

    monkeypatch.setattr(module, name, slow)
    first = threading.Thread(target=save, args=(kind, folder, 2), name="first")
    first.start()
    gate.wait()
    save(kind, folder, 3)
    done.set()
    first.join()


@pytest.mark.parametrize("exchange", [True, False], ids=["", "two renames"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_savers(kind, exchange, tmp_path, monkeypatch):
    """One of them is there, whole, and nothing of the other."""
    folder = tmp_path / "place" / "a"
    save(kind, folder, 1)
    if not exchange:
        monkeypatch.setattr(_folders, "exchange", lambda *_: False)
    two_savers(kind, folder, monkeypatch)
    assert load(kind, folder) == ({3} if kind == "own" else {2})
    assert os.listdir(folder.parent) == ["a"]
    if kind == "own":
        assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_save_that_is_under_way_is_not_swept(kind, tmp_path, monkeypatch):
    """Another one, complete from its start to its end, in the middle of it."""
    folder = tmp_path / "a"
    save(kind, folder, 1)
    module, name = (_checkpoint, "_put") if kind == "own" else (_folders, "_take_along")
    real, saved = getattr(module, name), []

    def between(*args):
        if not saved:
            saved.append(True)
            save(kind, folder, 3)
        return real(*args)

    monkeypatch.setattr(module, name, between)
    save(kind, folder, 2)
    assert load(kind, folder) == {2}


@pytest.mark.parametrize("kind", KINDS)
def test_two_first_saves(kind, tmp_path, monkeypatch):
    """Neither said that it may overwrite the other: the second is refused, and the first stays."""
    folder = tmp_path / "a"
    module, name = (_checkpoint, "_put") if kind == "own" else (_folders, "_put")
    real, saved = getattr(module, name), []

    def between(*args):
        if not saved:
            saved.append(True)
            save(kind, folder, 3, overwrite=False)
        return real(*args)

    monkeypatch.setattr(module, name, between)
    with pytest.raises(FileExistsError, match=r"There is already an? .* at"):
        save(kind, folder, 2, overwrite=False)
    assert load(kind, folder) == {3}
    assert os.listdir(tmp_path) == ["a"]
    assert kind != "own" or len(list(folder.iterdir())) == 2


def test_savers_in_processes(tmp_path):
    """Each saves an adapter several times; the last one is there, and nothing else."""
    script = """
        import sys, jax, jax.numpy as jnp, jlora
        params = {"up": jnp.ones((3, 5))}
        sites = jlora.sites(lambda p, x: x @ p["up"], params, jnp.ones((2, 3)))
        lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="up"))
        for _ in range(5):
            jlora.save(sys.argv[1], jax.tree.map(lambda x: x * 0 + int(sys.argv[2]), lora), overwrite=True)
            (value,) = {float(x) for x in jlora.load(sys.argv[1], params)["up"].a.reshape(-1)}
            assert value in (1, 2)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "a")]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    savers = [subprocess.Popen([*command, str(n)], stderr=subprocess.PIPE, text=True, env=env) for n in (1, 2)]
    said = [p.communicate(timeout=120)[1] for p in savers]
    assert [p.returncode for p in savers] == [0, 0], said
    assert len(set(np.ravel(jlora.load(tmp_path / "a")["up"].a).tolist())) == 1
    assert len(os.listdir(tmp_path / "a")) == 2


@pytest.mark.parametrize(("host", "process", "dead"), [("", -1, True), ("", 0, False), ("elsewhere", -1, False)])
def test_where_there_are_no_locks_the_process_is_looked_for(host, process, dead, tmp_path, monkeypatch):
    import socket

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    number = gone.pid if process < 0 else os.getpid()

    def none(*_, **__):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(_claims, "_lock", none)
    with _claims.claim(tmp_path / "lock"), _claims.unclaimed(tmp_path / "lock") as free:
        assert not free  # this process is alive
    (tmp_path / "lock").write_text(f"{host or socket.gethostname()} {number}\n")
    with _claims.unclaimed(tmp_path / "lock") as free:
        assert free == dead


@pytest.mark.parametrize("kind", KINDS)
def test_threads_of_one_process_save_at_once(kind, tmp_path):
    failed = []

    def savings(i):
        for k in range(4):
            try:
                save(kind, tmp_path / f"a{i}", 10 * i + k)
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=savings, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert [load(kind, tmp_path / f"a{i}") for i in range(3)] == [{3.0}, {13.0}, {23.0}]
