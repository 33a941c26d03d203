"""Saves that are killed, at calls that change a file and at random moments: what is at the name is the old one or the new one, whole.

``JLORA_KILLS=100`` kills each writer a hundred times at random, and once before every call that changes a file; a few are the sample here.
"""

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jlora
import jlora.export
import jlora.peft

pytest.importorskip("typer", reason='the command line needs pip install "jlora[cli]"')

import killed
from cli_case import call

KILLS = int(os.environ.get("JLORA_KILLS", "2"))


def net(params, x):
    return x @ params["up"]["kernel"] @ params["down"]["kernel"]


PARAMS = {"up": {"kernel": jnp.ones((3, 5))}, "down": {"kernel": jnp.ones((5, 7))}}
SITES = jlora.sites(net, PARAMS, jnp.ones((2, 3)))
LORA = jlora.init(jax.random.key(0), PARAMS, SITES, jlora.LoRA(rank=2, targets=".*"))
DATA = (*(jax.tree.map(np.asarray, x) for x in (LORA,)), SITES, jax.tree.map(np.asarray, PARAMS))

WRITERS = {
    "own": ("own", "own"),
    "peft": ("peft", "peft"),
    "export": ("export", "model"),
    "shards": ("shards", "model"),
    "tree": ("tree", "tree"),
    "merge": (["merge", "base", "peft{}", "OUT", "--conv1d", ""], "model"),
    "merge-tree": (["merge", "tree1", "own{}", "OUT"], "tree"),
    "convert": (["convert", "own{}", "OUT", "--to", "peft"], "peft"),
    "convert-back": (["convert", "peft{}", "OUT", "--to", "orbax", "--like", "own1"], "own"),
    "extract": (["extract", "base", "tuned{}", "OUT", "--rank", "2", "--conv1d", "", "--embedding", ""], "peft"),
    "resize": (["resize", "peft{}", "OUT", "--rank", "1"], "peft"),
    "combine": (["combine", "OUT", "own{}", "own1"], "own"),
}
"""By the name of a writer, what it is given and what it writes."""


class Killer:
    """The warm process, and a folder of inputs for the commands."""

    def __init__(self, here):
        self.here, self.log = here, here / "log"
        (here / "data").write_bytes(pickle.dumps(DATA))
        command = [sys.executable, str(Path(killed.__file__)), str(here / "data"), str(self.log)]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        for seed in (1, 2):
            for kind, name in (("own", f"own{seed}"), ("peft", f"peft{seed}"), ("tree", f"tree{seed}")):
                killed.save(kind, here / name, seed, DATA)
            killed.save("export", here / f"tuned{seed}", seed + 1, DATA)
        killed.save("export", here / "base", 1, DATA)

    def __call__(self, writer, folder, seed, **when):
        what = WRITERS[writer][0]
        task = {"cwd": str(self.here), **when}
        task |= (
            {"kind": what, "folder": str(folder), "seed": seed}
            if isinstance(what, str)
            else {"args": arguments(what, folder, seed)}
        )
        print(json.dumps(task), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        assert answer["status"] in (0, -9), self.log.read_text()[-4000:]
        return answer


def arguments(what, folder, seed):
    return [*(str(folder) if x == "OUT" else x.format(seed) for x in what), "--force"]


@pytest.fixture(scope="module")
def killer(tmp_path_factory):
    found = Killer(tmp_path_factory.mktemp("killed"))
    yield found
    found.process.communicate(timeout=60)
    assert found.process.returncode == 0


def save(killer, writer, folder, seed):
    """A save that is not killed, in this process."""
    what = WRITERS[writer][0]
    if isinstance(what, str):
        killed.save(what, folder, seed, DATA)
    else:
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(killer.here)
            call(*arguments(what, folder, seed))


def contents(writer, folder):
    """All that is read of a folder; raises if it is not whole."""
    kind = WRITERS[writer][1]
    if kind == "model":
        found = {name: source.read(name) for name, source in jlora.export.open_weights(folder).items()}
    elif kind == "tree":
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.restore(folder)
    else:
        found = jlora.load(folder) if kind == "own" else jlora.peft.read(folder)[0]
    return [
        (jax.tree_util.keystr(path), x.shape, np.asarray(x).tobytes())
        for path, x in jax.tree_util.tree_leaves_with_path(found)
    ]


ALONE = ("peft", "shards", "tree", "merge", "combine")  # the others are written alike


@pytest.mark.parametrize(
    ("writer", "exchange"), [*((w, True) for w in WRITERS), *((w, False) for w in ALONE)], ids=lambda x: str(x)
)
def test_the_old_or_the_new_one_is_there(writer, exchange, killer, tmp_path):
    folder = tmp_path / "place" / "saved"
    save(killer, writer, folder, 1)
    beside = folder.with_name("other")
    beside.mkdir()
    old = contents(writer, folder)
    whole = killer(writer, folder, 2, exchange=exchange)
    new = contents(writer, folder)
    assert whole["status"] == 0
    assert old != new
    draw = random.Random(writer)
    forced = list(range(1, whole["count"] + 1))
    if KILLS < 100:
        forced = sorted({*draw.sample(forced, KILLS), whole["count"] - 3})
    whens = [{"at": at} for at in forced] + [{"after": draw.uniform(0, whole["seconds"])} for _ in range(KILLS)]
    seen = set()
    for when in whens:
        save(killer, writer, folder, 1)
        assert sorted(p.name for p in folder.parent.iterdir()) == ["other", "saved"], when
        assert contents(writer, folder) == old, when
        assert killer(writer, folder, 2, exchange=exchange, **when)["status"] == -9 or "after" in when, when
        found = contents(writer, folder if WRITERS[writer][1] != "tree" else standing(folder))
        assert found in (old, new), when
        seen.add(found == new)
    save(killer, writer, folder, 1)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["other", "saved"]
    assert len(seen) == 2 or KILLS < 100


def standing(folder):
    """Where what orbax reads is, which knows nothing of saves that were killed between two renames."""
    from jlora import _folders

    return _folders.standing(folder)


@pytest.mark.parametrize("writer", ["own", "peft", "shards", "merge"])
def test_a_first_save_leaves_nothing_or_all(writer, killer, tmp_path):
    folder = tmp_path / "place" / "saved"
    folder.parent.mkdir()
    whole = killer(writer, folder, 2)
    new, draw = contents(writer, folder), random.Random(writer)
    for at in range(1, whole["count"] + 1) if KILLS >= 100 else draw.sample(range(1, whole["count"] + 1), 2):
        folder = tmp_path / f"place{at}" / "saved"
        folder.parent.mkdir()
        assert killer(writer, folder, 2, at=at)["status"] == -9
        try:
            found = contents(writer, folder)
        except FileNotFoundError:
            found = None
        assert found in (None, new), at
        save(killer, writer, folder, 2)
        assert contents(writer, folder) == new
        assert [p.name for p in folder.parent.iterdir()] == ["saved"], at
