"""What tests of the command line share: how it is called, models, adapters and checkpoints on disk."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytest.importorskip("typer", reason='the command line needs pip install "jlora[cli]"')

import orbax.checkpoint as ocp
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from jlora import _cli_app

ROOT = Path(__file__).parent.parent
PEFT = Path(__file__).parent / "fixtures" / "peft"
CONV1D = ("--conv1d", ".*c_(attn|proj|fc).weight")


def call(*args, code=0):
    """Standard output of ``jlora *args``, or with a code of failure its standard error."""
    result = CliRunner().invoke(_cli_app.app, [str(x) for x in args])
    if result.exit_code != code:
        raise AssertionError(f"{args}: {result.exit_code}\n{result.output}") from result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    if code > 1:
        assert result.stdout == ""
        assert result.stderr.startswith(("jlora: ", "Usage: "))
        return result.stderr
    return result.stdout


def called(*args, code=0):
    return json.loads(call(*args, "--json", code=code))


def model(params, x):
    p = params["params"]
    x = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"])
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"]["mix"])
    return x @ p["down"]["kernel"]


KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "params": {
        "up": {"kernel": jax.random.normal(KEYS[0], (3, 5)), "bias": jnp.zeros(5)},
        "layers": {"mix": jax.random.normal(KEYS[1], (4, 5, 5))},
        "down": {"kernel": jax.random.normal(KEYS[2], (5, 7)).astype(jnp.bfloat16)},
    }
}
SITES = jlora.sites(model, PARAMS, jnp.ones((2, 3)))
UP, MIX, DOWN = "params/up/kernel", "params/layers/mix", "params/down/kernel"


def trained(seed, rules=None):
    rules = rules or [jlora.LoRA(rank=2, alpha=4, targets=(UP, MIX, DOWN))]
    lora = jlora.init(jax.random.key(seed), PARAMS, SITES, rules)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(seed), x.shape, x.dtype), lora)


def checkpoint(path, params):
    with ocp.StandardCheckpointer() as c:
        c.save(path.absolute(), params)
        c.wait_until_finished()
    return path


def restored(path):
    with ocp.StandardCheckpointer() as c:
        return c.restore(path.absolute(), PARAMS)


def base_of(kind, here, **config):
    """The base of a fixture as a folder like those on the Hugging Face hub."""
    folder = here / f"{kind}-base"
    folder.mkdir()
    shutil.copy(PEFT / kind / "base.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": re.split("[_-]", kind)[0]} | config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def same_updates(one, two, tol=1e-5):
    assert set(one) == set(two)
    for path in one:
        a, b = (np.asarray(x[path].delta(None)) for x in (one, two))
        assert np.linalg.norm(a - b) <= tol * np.linalg.norm(a) + 1e-9, path


NAMES = {MIX: "model.layers.{}.mix.weight", "params/(.*)/kernel": {"name": r"\1.weight"}}


def commands(here, own):
    """One call of each command that writes, but for its output; and what its output is."""
    base, params = base_of("llama", here), checkpoint(here / "params", PARAMS)
    after = tuned(base, lambda f: f.update({"lm_head.weight": f["lm_head.weight"] + low_rank((23, 24))}))
    (here / "names.json").write_text(json.dumps(NAMES))
    call("convert", "one", "p", "--to", "peft", "--names", "names.json")
    return [
        ("merge", base, PEFT / "llama", "OUT"),
        ("merge", params, "one", "OUT"),
        ("convert", "one", "OUT", "--to", "peft", "--names", "names.json"),
        ("convert", "p", "OUT", "--to", "orbax", "--names", "names.json", "--like", "one"),
        ("extract", base, after, "OUT", "--rank", 2),
        ("resize", "one", "OUT", "--rank", 1),
        ("resize", "p", "OUT", "--rank", 1),
        ("combine", "OUT", "one", "two"),
        ("combine", "OUT", "p", "p"),
    ]


def whole(seed, *rules):
    return trained(seed, [jlora.Full(targets=(MIX, "params/up/bias")), *(rules or [jlora.LoRA(rank=2, targets=UP)])])


def renamed(folder, change):
    found = load_file(folder / "model.safetensors")
    save_file({change(name): x for name, x in found.items()}, folder / "model.safetensors")


def low_rank(shape, rank=3, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return (rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))).astype(np.float32) / 10


def tuned(base, change):
    folder = base.with_name("tuned")
    shutil.copytree(base, folder)
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors")
    return folder
