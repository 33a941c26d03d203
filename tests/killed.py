"""A warm process that forks a child for each save of ``test_killed.py``, which is killed in the middle of it.

It reads one JSON object a line: what to save, and when to kill it; it answers with one each. Nothing here may use a device of JAX before
the fork: threads do not survive it.
"""

import json
import os
import pickle
import signal
import sys
import time

import jax
import numpy as np

import jlora
import jlora.export
import jlora.peft
from jlora import _folders, _rename

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def save(kind, folder, seed, data):
    """One save of what ``data`` holds, with ``seed`` for all values."""
    lora, sites, params = data
    lora, params = (jax.tree.map(lambda x: np.full_like(x, seed), tree) for tree in (lora, params))
    if kind == "own":
        jlora.save(folder, lora, overwrite=True)
    elif kind == "peft":
        jlora.peft.save(folder, lora, overwrite=True)
    elif kind == "tree":
        jlora.export.save_orbax(folder, params, overwrite=True)
    else:
        jlora.export.save(
            folder,
            params,
            sites=sites,
            overwrite=True,
            shard_bytes=64 if kind == "shards" else 10**9,
            config={"n": seed},
        )


def command(args):
    """``jlora *args``."""
    from jlora._cli_app import app

    app(args, prog_name="jlora", standalone_mode=False)


def arm(at):
    """Kills this process before its call number ``at`` that changes a file; returns how many there were so far."""
    count = [0]

    def step():
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, args):
        if event in CHANGES or (event == "open" and args[2] & WRITES and args[0] != os.devnull):
            step()

    sync, call = os.fsync, _rename._call()

    def fsync(f):
        step()
        sync(f)

    def rename(*args):
        step()
        return call(*args)

    os.fsync, _rename._call = fsync, lambda: rename
    sys.addaudithook(hook)
    return count


def child(task, data, say):
    if not task.get("exchange", True):
        _folders.exchange = lambda *_: False  # a file system that has no such rename
    os.chdir(task["cwd"])
    jax.devices()
    os.write(say, b"r")
    start = time.perf_counter()
    count = arm(task.get("at", 0))
    if "args" in task:
        command(task["args"])
    else:
        save(task["kind"], task["folder"], task["seed"], data)
    done = {"count": count[0], "seconds": time.perf_counter() - start}
    os.write(say, json.dumps(done).encode())


def fork(task, data, log):
    hear, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            child(task, data, say)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(say)
    os.read(hear, 1)
    if "after" in task:
        time.sleep(task["after"])
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    with os.fdopen(hear, "rb") as f:
        said = f.read()
    return {"status": os.waitstatus_to_exitcode(status)} | (json.loads(said) if said else {})


def main():
    """Answers what it is asked; orbax and the commands are imported before the first fork."""
    import jlora._cli_app
    import jlora._orbax  # noqa: F401

    with open(sys.argv[1], "rb") as f:
        data = pickle.load(f)
    log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for line in sys.stdin:
        print(json.dumps(fork(json.loads(line), data, log)), flush=True)


if __name__ == "__main__":
    main()
