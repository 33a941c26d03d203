"""What is done once, for ``scale.py``: init, merge, save and load by the size of the base and by the rank, and the claims about them."""

import gc
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import jlora
from benchmarks import measure, suite

sys.path.insert(0, str(suite.ROOT / "examples"))  # the model is the examples'
import llama

# Bytes that a saved adapter takes for each array beside its values. Arrays of at most 1 KiB are left out of this: orbax keeps them in
# nodes of its index, which it writes again and again, how often depends on timing.
BESIDE = 2**11
TIMES_THE_BASE = 2.5  # of memory: the base, what it is merged into, and some room


def config(depth: int, width: int, vocab: int = 1000) -> llama.Config:
    """A Llama whose kernels are all at least ``width`` on either side, so that the rank can go up to that."""
    heads, hidden = width // 32, 11 * width // 4
    return llama.Config(vocab, width, hidden, depth, heads, heads, max_length=4096)


def noise(shapes: Any) -> Any:
    """Arrays of the given shapes, made without a program to compile."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.02 * rng.standard_normal(s.shape, s.dtype)), shapes)


def abstract(depth: int, width: int, vocab: int = 1000) -> tuple[llama.Llama, jax.ShapeDtypeStruct, Any]:
    """A Llama, its input, and its parameters as shapes."""
    model, tokens = llama.Llama(config(depth, width, vocab)), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return model, tokens, jax.eval_shape(model.init, jax.random.key(0), tokens)


def base(depth: int, width: int, vocab: int = 1000) -> tuple[Any, jlora.Sites]:
    """A Llama's parameters, and where they are used."""
    model, tokens, shapes = abstract(depth, width, vocab)
    sites = jlora.sites(model.apply, shapes, tokens)
    return jax.tree.map(lambda s: jnp.asarray(np.full(s.shape, 0.5, s.dtype)), shapes), sites


def adapter(params: Any, sites: jlora.Sites, rank: int, seed: Any = 1) -> dict[str, Any]:
    return jlora.init(jax.random.key(seed), params, sites, jlora.LoRA(rank=rank, targets="all-linear"))


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def written(folder: Path) -> int:
    """Bytes of the files in ``folder``."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def cold(fn: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of ``fn()`` with nothing compiled."""
    seconds = []
    for _ in range(rounds):
        jax.clear_caches()
        start = time.perf_counter()
        jax.block_until_ready(fn())
        seconds.append(time.perf_counter() - start)
    return seconds


def measured_size(width: int, rank: int, layers: int, rounds: int, cold_rounds: int) -> dict[str, Any]:
    """Seconds and counts for one base and rank, beside what only copies the base, and only writes the factors."""
    params, sites = base(layers, width)
    seconds = {"init, cold": cold(lambda: adapter(params, sites, rank), cold_rounds)}
    lora = noise(adapter(params, sites, rank))  # the zeros of a fresh adapter are stored in no room
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {
            "init": lambda: adapter(params, sites, rank),
            "merge": lambda: jlora.merge(params, lora),
            "copy of the base": lambda: jax.tree.map(jnp.copy, params),
            "save": lambda: jlora.save(folder / "adapter", lora, overwrite=True),
            "load": lambda: jlora.load(folder / "adapter", params),
            "npz of the factors": lambda: np.savez(folder / "factors.npz", *map(np.asarray, jax.tree.leaves(lora))),
        }
        jlora.save(folder / "adapter", lora)  # for the warm-up of load
        seconds |= measure.in_turns(runs, rounds)
        size = written(folder / "adapter")
    path, one = next(iter(lora.items()))
    update = one.scale * np.asarray(one.a) @ np.asarray(one.b)
    before, merged = (flatten_dict(tree, sep="/")[path] for tree in (params, jlora.merge(params, {path: one})))
    return {
        "merge error": float(np.max(np.abs(merged - before - update)) / np.max(np.abs(update))),
        "expected bytes": 4 * rank * sum(sum(x.shape) for x in lora.values()),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "base bytes": nbytes(params),
        "factor bytes": nbytes(lora),
        "arrays": len(jax.tree.leaves(lora)),
        "least array": min(x.nbytes for x in jax.tree.leaves(lora)),
        "written": size,
        "created": measure.created(
            lambda seed: adapter(params, sites, rank, seed),
            (1,),
            [x.shape for x in jax.tree.leaves(params) if x.ndim == 2],
        ),
        "seconds": seconds,
    }


def sizes_of(
    widths: tuple[int, ...], ranks: tuple[int, ...], layers: int, rounds: int, cold_rounds: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """By width of the base at the first of the ranks, and by rank at the second of the widths; and the widths that have no room here."""
    seen, missing = {}, {}
    for width in widths:
        needed, free = TIMES_THE_BASE * nbytes(abstract(layers, width)[2]), measure.free_memory()
        if free is not None and needed > free:
            missing[f"width {width}"] = f"takes {needed / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} are free"
    by_width = [(w, ranks[0]) for w in widths if f"width {w}" not in missing]
    by_rank = [(widths[1], r) for r in ranks]
    for width, rank in dict.fromkeys((*by_width, *by_rank)):
        suite.progress(f"init, merge, save, load: width {width}, rank {rank}")
        seen[width, rank] = measured_size(width, rank, layers, rounds, cold_rounds)
        gc.collect()
    found = {"width": {str(at[0]): seen[at] for at in by_width}, "rank": {str(at[1]): seen[at] for at in by_rank}}
    return found, missing


def same_adapter(width: int, rank: int) -> dict[str, Any]:
    """Bytes of one adapter, saved for two bases that differ in a leaf that it does not adapt."""
    found = {}
    for vocab in (1000, 50_000):
        params, sites = base(1, width, vocab)
        lora = noise(adapter(params, sites, rank))
        with tempfile.TemporaryDirectory() as name:
            jlora.save(Path(name) / "adapter", lora)
            found[str(vocab)] = {
                "base bytes": nbytes(params),
                "written": written(Path(name)),
                "arrays": len(jax.tree.leaves(lora)),
            }
    return found


def memory_of_init(width: int, rank: int) -> dict[str, int]:
    """Bytes that the compiled ``init`` takes, and of the smallest leaf that it makes factors for."""
    params, sites = base(1, width)
    compiled = jax.jit(lambda params, seed: adapter(params, sites, rank, seed)).lower(params, 1).compile()
    lora = adapter(params, sites, rank)
    smallest = min(math.prod(x.shape) * 4 for x in lora.values())
    return measure.memory(compiled) | {"factor bytes": nbytes(lora), "smallest leaf": smallest}


# --- What a person reads, and the claims ------------------------------------------------------------------------------


def law(sizes: Iterable[Any], values: Iterable[float]) -> str:
    """The growth of ``values`` with ``sizes``, as a cell."""
    return f"n^{suite.exponent([float(n) for n in sizes], list(values)):.2f}"


def size_table(axis: str, by_value: dict[str, Any], size: str, title: str) -> suite.Table:
    """Seconds of what is done once, and the laws by which they grow with ``size``."""
    names = list(next(iter(by_value.values()))["seconds"])
    medians = {n: [statistics.median(found["seconds"][n]) for found in by_value.values()] for n in names}
    rows = []
    for i, (value, found) in enumerate(by_value.items()):
        cells = [
            f"{found['parameters']:,}",
            f"{found['factor bytes']:,}",
            f"{found['written'] - found['factor bytes']:,}",
        ]
        rows.append([value, *cells, *(f"{by[i]:.4f}" for by in medians.values())])
    sizes = [found[size] for found in by_value.values()]
    rows.append(["growth", "", "", "", *(law(sizes, by) for by in medians.values())])
    note = (
        f"Medians; growth: the power of {size} that fits best. Beside jlora's: what only copies the base, as merge has to, and what only "
        "writes the factors, as save has to. Bytes written beyond the factors are below zero where orbax compresses more than it adds. "
        "save and load also take digests, and save waits for the disk."
    )
    header = [axis, "parameters", "factor bytes", "bytes written beyond", *(f"{name}, s" for name in names)]
    return suite.Table(title, header, rows, note)


def claims_of_sizes(results: dict[str, Any]) -> list[suite.Claim]:
    sizes = [found for by_value in results["sizes"].values() for found in by_value.values()]
    beyond = max((x["written"] - x["factor bytes"]) / x["arrays"] for x in sizes)
    least = min(x["written"] / x["factor bytes"] for x in sizes)
    small, large = results["same adapter"].values()
    apart, larger = abs(large["written"] - small["written"]), large["base bytes"] - small["base bytes"]
    error = max(x["merge error"] for x in sizes)
    created, memory = max(x["created"] for x in sizes), results["memory of init"]
    used = memory["temporaries"] + memory["results"] - memory["factor bytes"]
    return [
        suite.Claim(
            f"save writes the factors and at most {BESIDE:,} bytes more for each array, all above 1 KiB",
            beyond <= BESIDE
            and least > 0.8
            and min(x["least array"] for x in sizes) > 2**10,  # noise cannot be stored in much less
            f"{beyond:,.0f} bytes, {least:.2f} of the factors at least",
        ),
        suite.Claim(
            "... however large the base is",  # how orbax packs its files is a matter of some hundred bytes
            apart <= BESIDE * small["arrays"] < larger / 100,
            f"{apart:,} bytes for a base of {larger:,} bytes more",
        ),
        suite.Claim(
            "init makes rank x (k + m) numbers for each k x m kernel",
            all(x["factor bytes"] == x["expected bytes"] for x in sizes),
            ", ".join(f"{x['factor bytes']:,}" for x in sizes),
        ),
        suite.Claim("merge adds s·A·B", error < 1e-3, f"{error:.1e} of the update"),
        suite.Claim("init makes no array of a base leaf's shape", created == 0, f"{created}"),
        suite.Claim(
            "init takes less memory beyond the factors than one leaf of the base",
            used < memory["smallest leaf"],
            f"{used:,} bytes, the smallest leaf that is adapted {memory['smallest leaf']:,}",
        ),
    ]
