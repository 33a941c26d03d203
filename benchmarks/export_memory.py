"""Peak memory of writing a merged model, over what the base itself takes.

    python -m benchmarks.export_memory [--quick] [--out export_memory.json]

Each way in a process of its own, from a base in host memory: safetensors by ``jlora.export.save``, leaf by leaf, or by ``jlora.merge``
and a writer of whole files; an orbax checkpoint by ``jlora.export.save_orbax``, leaf by leaf, or by ``jlora.merge`` and orbax. What is
counted is the system's own figure of the resident set.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks import suite

suite.require("export_memory")

WAYS = ("jlora.export.save", "merge, then safetensors", "jlora.export.save_orbax", "merge, then orbax")
HEADER = ["way", "base, MB", "one leaf, MB", "peak over the base, MB"]

CODE = """
import resource, sys
import jax, jax.numpy as jnp, numpy as np
import jlora, jlora.export
way, width, leaves, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def fn(p, x):
    for w in p.values():
        x = x @ w
    return x

def write(way, params, folder):
    sites = jlora.sites(fn, params, jax.ShapeDtypeStruct((1, params["w00"].shape[0]), jnp.float32))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=8, targets="w.*"))
    if way == "jlora.export.save":
        jlora.export.save(folder, params, lora, sites=sites)
        return
    if way == "jlora.export.save_orbax":
        jlora.export.save_orbax(folder, params, lora)
        return
    merged = jlora.merge(params, lora)
    if way.endswith("orbax"):
        import orbax.checkpoint as ocp
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, merged)
    else:
        from safetensors.numpy import save_file
        save_file({k: np.asarray(x) for k, x in merged.items()}, folder)

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
write(way, {"w00": np.ones((64, 64), np.float32)}, folder + "-small")  # what is loaded and compiled once
rng = np.random.default_rng(0)  # orbax compresses what repeats itself
params = {f"w{i:02d}": rng.standard_normal((width, width), np.float32) for i in range(leaves)}
before = peak()
write(way, params, folder)
print(peak() - before)
"""


TITLE = "Peak memory of writing a merged model"


def peaks(ways: Sequence[str], width: int, leaves: int) -> list[dict]:
    """One row for each way."""
    found = []
    for way in ways:
        suite.progress(way)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", CODE, way, str(width), str(leaves), f"{folder}/model"]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found.append({"way": way, "base": 4 * leaves * width**2, "leaf": 4 * width**2, "peak": int(out)})
    return found


def rows(result: dict) -> list[list[str]]:
    """The table of a result."""
    return [[r["way"], *(f"{r[k] / 1e6:,.0f}" for k in ("base", "leaf", "peak"))] for r in result["ways"]]


def run(quick: bool) -> dict[str, Any]:
    """Quick, a base of 268 MB, and only what is claimed."""
    if quick:
        return {"ways": peaks([way for way in WAYS if "export" in way], 2048, 16)}
    return {"ways": peaks(WAYS, 5600, 16)}


def tables(result: dict) -> list[suite.Table]:
    return [suite.Table(TITLE, HEADER, rows(result))]


def claims(result: dict) -> list[suite.Claim]:
    """What docs/peft.md says: leaf by leaf, no copy of the base is made. What libraries allocate is more of a small base."""
    found = []
    for r in result["ways"]:
        if "export" in r["way"]:
            most, text = (0.5, "half") if r["base"] > 1e9 else (0.75, "three quarters")
            share = r["peak"] / r["base"]
            found.append(suite.Claim(f"{r['way']}: less than {text} of a base beside it", share < most, f"{share:.2f}"))
    return found


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
