"""How costs grow: a gradient step and its tracing with depth, rank, length and weights adapted; init, merge, save and load with size.

    python -m benchmarks.scale [--quick] [--out scale.json]

Steps are those of the examples' Llama, unrolled, in fp32: one axis is varied at a time, and the others stay at ``CENTRE``. Three ways are
taken in turns: jlora, full fine-tuning, and the floor: the base frozen, and the gradient for the first norm's scale alone, which is what
any adapter of the first layer has to pay. Each growth law is the power that fits best, of whatever range was measured.
"""

import gc
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from benchmarks import measure, suite

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))  # the model is the examples'
import llama

TITLE = "Growth of costs with depth, rank, length, weights adapted and size of the base"

JLORA, FULL, FLOOR = "jlora", "full fine-tuning", "floor"
KERNELS = ("query", "value", "key", "out", "gate", "up", "down")
MARGIN = 1.02  # of flops: what the limit leaves out is the scale of the factors and the sum of the two branches
# Bytes that a saved adapter takes for each array beside its values. Arrays of at most 1 KiB are left out of this: orbax keeps them in
# nodes of its index, which it writes again and again, how often depends on timing.
BESIDE = 2**11


class Point(NamedTuple):
    """Of a step. ``kernels``: how many of each block's seven are adapted."""

    depth: int = 8
    rank: int = 16
    length: int = 128
    kernels: int = 7
    width: int = 384


class Plan(NamedTuple):
    """What is measured."""

    centre: Point
    axes: dict[str, tuple[int, ...]]
    rounds: int
    traces: int  # passes of what starts with nothing compiled
    layers: int  # of the bases of init, merge, save, load
    widths: tuple[int, ...]
    ranks: tuple[int, ...]  # at the second of the widths


PLAN = Plan(
    Point(),
    {"depth": (4, 8, 16, 32, 64), "rank": (4, 16, 64, 256), "length": (32, 128, 512, 1024), "kernels": (1, 2, 4, 7)},
    rounds=7,
    traces=3,
    layers=8,
    widths=(256, 512, 1024, 2048),
    ranks=(4, 16, 64, 256),
)
QUICK = Plan(
    Point(depth=1, rank=4, length=32, width=64),
    {"depth": (1, 2), "rank": (4, 16), "length": (32, 64)},
    rounds=2,
    traces=1,
    layers=1,
    widths=(128, 256),  # no factor is of 1 KiB or less: see BESIDE
    ranks=(4, 16),
)


def config(depth: int, width: int, vocab: int = 1000) -> llama.Config:
    """A Llama whose kernels are all at least ``width`` on either side, so that the rank can go up to that."""
    heads, hidden = width // 32, 11 * width // 4
    return llama.Config(vocab, width, hidden, depth, heads, heads, max_length=4096)


def noise(shapes: Any) -> Any:
    """Arrays of the given shapes, made without a program to compile."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.02 * rng.standard_normal(s.shape, s.dtype)), shapes)


# --- A gradient step --------------------------------------------------------------------------------------------------


class Program(NamedTuple):
    fn: Callable[..., Any]
    args: tuple[Any, ...]


def programs(point: Point) -> tuple[dict[str, Program], float]:
    """The gradient step of each way, and the flops that jlora's may save and add, next to full fine-tuning's.

    A kernel of k x m costs full fine-tuning 6nkm on n tokens, and a frozen one 4nkm; its factors add 6nr(k + m). The sum over the
    kernels is the limit 2/3 + r(k + m)/(km) of one of them; what is no kernel's costs both the same.
    """
    model = llama.Llama(config(point.depth, point.width))
    tokens = jnp.zeros((1, point.length), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    sites = jlora.sites(model.apply, shapes, tokens)
    targets = rf".*/({'|'.join(KERNELS[: point.kernels])})/kernel"
    rule = jlora.LoRA(rank=point.rank, alpha=2.0 * point.rank, targets=targets)
    lora = noise(jax.eval_shape(lambda key: jlora.init(key, shapes, sites, rule), jax.random.key(0)))
    params, apply = noise(shapes), jlora.wrap(model.apply)

    def loss(out: jax.Array) -> jax.Array:
        return -jnp.mean(jax.nn.log_softmax(out)[..., 0])

    def floor(scale: jax.Array, params: Any, tokens: jax.Array) -> jax.Array:
        block = params["params"]["blocks_0"]
        block = block | {"attention_norm": {"scale": scale}}
        return loss(model.apply({"params": params["params"] | {"blocks_0": block}}, tokens))

    scale = params["params"]["blocks_0"]["attention_norm"]["scale"]
    kernels = [x for x in jax.tree.leaves(params) if x.ndim == 2]  # the embedding too: it is the head, transposed
    saved = sum(2 * point.length * x.size for x in kernels)
    added = sum(6 * point.length * x.rank * sum(x.shape) for x in lora.values())
    return {
        JLORA: Program(jax.grad(lambda lora, params, x: loss(apply(params, lora, x))), (lora, params, tokens)),
        FULL: Program(jax.grad(lambda params, x: loss(model.apply(params, x))), (params, tokens)),
        FLOOR: Program(jax.grad(floor), (scale, params, tokens)),
    }, added - saved


def traced(program: Program) -> tuple[dict[str, float], Any, Any]:
    """Seconds to trace and to lower, from nothing, and what came of each."""
    jax.clear_caches()
    start = time.perf_counter()
    trace = jax.jit(lambda *args: program.fn(*args)).trace(*program.args)
    middle = time.perf_counter()
    lowered = trace.lower()
    return {"trace": middle - start, "lower": time.perf_counter() - middle}, trace, lowered


def measured_step(plan: Plan, point: Point) -> dict[str, Any]:
    """Raw samples and counts of each way."""
    found, change = programs(point)
    ways: dict[str, Any] = {name: {"trace": [], "lower": []} for name in found}
    last, runs = {}, {}
    for _, (name, program) in itertools.product(range(plan.traces), found.items()):
        seconds, *last[name] = traced(program)
        for stage, value in seconds.items():
            ways[name][stage].append(value)
    for name, (trace, lowered) in last.items():
        start = time.perf_counter()
        compiled = lowered.compile()
        ways[name] |= {
            "compile": time.perf_counter() - start,
            "equations": sum(1 for _ in measure.equations(trace.jaxpr)),
            "flops": measure.flops(compiled),
            **measure.memory(compiled),
        }
        runs[name] = partial(compiled, *found[name].args)
    for name, samples in measure.in_turns(runs, plan.rounds).items():
        ways[name]["step"] = samples
    return {"point": point._asdict(), "ways": ways, "limit": ways[FULL]["flops"] + change}


def programs_of_a_loop(point: Point) -> int:
    """How many programs three steps of jlora's are, each on the adapter that the last one made."""
    fn, (lora, *rest) = programs(point)[0][JLORA]
    step = jax.jit(lambda lora, *rest: jax.tree.map(lambda f, g: f - 0.1 * g, lora, fn(lora, *rest)))
    for _ in range(3):
        lora = step(lora, *rest)
    return step._cache_size()


def steps_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """What was measured by axis and value; the centre is measured once and stands in every axis."""
    seen: dict[Point, dict[str, Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    for axis, values in plan.axes.items():
        for value in values:
            point = plan.centre._replace(**{axis: value})
            if point not in seen:
                suite.progress(f"step: {axis} {value}")
                seen[point] = measured_step(plan, point)
                gc.collect()
            found.setdefault(axis, {})[str(value)] = seen[point]
    return found


# --- What is done once: init, merge, save, load -----------------------------------------------------------------------


def base(depth: int, width: int, vocab: int = 1000) -> tuple[Any, jlora.Sites]:
    """A Llama's parameters, and where they are used."""
    model, tokens = llama.Llama(config(depth, width, vocab)), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    sites = jlora.sites(model.apply, shapes, tokens)
    return jax.tree.map(lambda s: jnp.asarray(np.full(s.shape, 0.5, s.dtype)), shapes), sites


def adapter(params: Any, sites: jlora.Sites, rank: int, seed: Any = 1) -> dict[str, Any]:
    return jlora.init(jax.random.key(seed), params, sites, jlora.LoRA(rank=rank, targets="all-linear"))


def nbytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


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


def measured_size(plan: Plan, width: int, rank: int) -> dict[str, Any]:
    """Seconds and counts for one base and rank, beside what only copies the base, and only writes the factors."""
    params, sites = base(plan.layers, width)
    seconds = {"init, cold": cold(lambda: adapter(params, sites, rank), plan.traces)}
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
        seconds |= measure.in_turns(runs, plan.rounds)
        size = written(folder / "adapter")
    return {
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


def sizes_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """By width of the base, and by rank at the second of the widths."""
    seen = {}
    widths, ranks = ([(w, plan.ranks[0]) for w in plan.widths], [(plan.widths[1], r) for r in plan.ranks])
    for width, rank in dict.fromkeys((*widths, *ranks)):
        suite.progress(f"init, merge, save, load: width {width}, rank {rank}")
        seen[width, rank] = measured_size(plan, width, rank)
        gc.collect()
    return {"width": {str(at[0]): seen[at] for at in widths}, "rank": {str(at[1]): seen[at] for at in ranks}}


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


def run(quick: bool) -> dict[str, Any]:
    plan = QUICK if quick else PLAN
    return {
        "centre": plan.centre._asdict(),
        "steps": steps_of(plan),
        "programs of a loop": programs_of_a_loop(plan.centre),
        "sizes": sizes_of(plan),
        "same adapter": same_adapter(plan.widths[0], plan.ranks[0]),
        "memory of init": memory_of_init(plan.widths[1], plan.ranks[0]),
    }


# --- What a person reads ----------------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> list[suite.Table]:
    return [
        step_table(results),
        trace_table(results),
        size_table("width", results["sizes"]["width"], "parameters", "By size of the base: init, merge, save, load"),
        size_table("rank", results["sizes"]["rank"], "factor bytes", "By rank: init, merge, save, load"),
    ]


def law(sizes: Iterable[Any], values: Iterable[float]) -> str:
    """The growth of ``values`` with ``sizes``, as a cell."""
    return f"n^{suite.exponent([float(n) for n in sizes], list(values)):.2f}"


def total(way: dict[str, Any]) -> list[float]:
    """Seconds of tracing and lowering together, pass by pass."""
    return list(map(sum, zip(way["trace"], way["lower"], strict=True)))


def step_table(results: dict[str, Any]) -> suite.Table:
    """Seconds, flops and memory of a step, and the laws by which they grow."""
    rows = []
    for axis, by_value in results["steps"].items():
        medians = {
            n: [statistics.median(x["ways"][n]["step"]) for x in by_value.values()] for n in (JLORA, FULL, FLOOR)
        }
        for i, (value, found) in enumerate(by_value.items()):
            ours, full, floor = (found["ways"][name] for name in (JLORA, FULL, FLOOR))
            low, middle, high = suite.ratios(ours["step"], full["step"])
            times = [f"{1e3 * by[i]:.1f}" for by in medians.values()]
            flops = [f"{x / full['flops']:.3f}" for x in (ours["flops"], found["limit"])]
            memory = (ours["temporaries"] + ours["results"]) / (full["temporaries"] + full["results"])
            above = f"{suite.ratios(ours['step'], floor['step'])[1]:.2f}"
            rows.append(
                [axis, value, *times, f"{middle:.2f}", f"{low:.2f} - {high:.2f}", above, *flops, f"{memory:.2f}"]
            )
        rows.append([axis, "growth", *(law(by_value, by) for by in medians.values()), *[""] * 6])
    header = ["axis", "value", "jlora, ms", "full, ms", "floor, ms", "jlora / full", "middle half", "jlora / floor"]
    note = (
        f"Others at {results['centre']}. full: full fine-tuning; flops and memory (temporaries and results) relative to it; limit: "
        "2/3 + r(k + m)/(km) over all kernels, with what is no kernel's as in full fine-tuning; growth: the power that fits best."
    )
    return suite.Table("A gradient step", [*header, "flops", "limit", "memory"], rows, note)


def trace_table(results: dict[str, Any]) -> suite.Table:
    """Seconds to trace and lower, to compile, and the size of the traced program."""
    rows = []
    for axis, by_value in results["steps"].items():
        ways = {name: [x["ways"][name] for x in by_value.values()] for name in (JLORA, FULL)}
        medians = {name: [statistics.median(total(way)) for way in by] for name, by in ways.items()}
        for i, value in enumerate(by_value):
            ours, full = (by[i] for by in ways.values())
            low, middle, high = suite.ratios(total(ours), total(full))
            cells = [f"{by[i]:.2f}" for by in medians.values()] + [f"{middle:.2f}", f"{low:.2f} - {high:.2f}"]
            compiling = [f"{way['compile']:.2f}" for way in (ours, full)]
            rows.append([axis, value, *cells, *compiling, *(f"{way['equations']:,}" for way in (ours, full))])
        counts = [law(by_value, (way["equations"] for way in by)) for by in ways.values()]
        compiling = [law(by_value, (way["compile"] for way in by)) for by in ways.values()]
        times = [law(by_value, by) for by in medians.values()]
        rows.append([axis, "growth", *times, "", "", *compiling, *counts])
    header = ["axis", "value", "jlora, s", "full, s", "jlora / full", "middle half"]
    header += ["compile: jlora, s", "compile: full, s", "equations: jlora", "equations: full"]
    return suite.Table("To trace and lower a gradient step", header, rows)


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
        "writes the factors, as save has to. save and load also take digests, and save waits for the disk."
    )
    header = [axis, "parameters", "factor bytes", "bytes written beyond", *(f"{name}, s" for name in names)]
    return suite.Table(title, header, rows, note)


# --- Claims -----------------------------------------------------------------------------------------------------------


def claims(results: dict[str, Any]) -> list[suite.Claim]:
    return [*claims_of_steps(results), *claims_of_sizes(results)]


def claims_of_steps(results: dict[str, Any]) -> list[suite.Claim]:
    steps = results["steps"]
    points = [found for by_value in steps.values() for found in by_value.values()]
    counts = {axis: [x["ways"][JLORA]["equations"] for x in by_value.values()] for axis, by_value in steps.items()}
    grown = suite.exponent([int(n) for n in steps["depth"]], counts["depth"])
    others = {axis: len(set(counts[axis])) for axis in ("rank", "length")}
    flops = max(x["ways"][JLORA]["flops"] / x["limit"] for x in points)
    return [
        suite.Claim("Equations grow linearly with depth", grown <= 1.05, f"n^{grown:.3f}"),
        suite.Claim("... and not with rank or length", set(others.values()) == {1}, f"different counts: {others}"),
        suite.Claim(
            f"Flops of a gradient step are at most {MARGIN} of 2/3 + r(k + m)/(km)", flops <= MARGIN, f"{flops:.3f}"
        ),
        suite.Claim(
            "A loop of steps is one program", results["programs of a loop"] == 1, f"{results['programs of a loop']}"
        ),
    ]


def claims_of_sizes(results: dict[str, Any]) -> list[suite.Claim]:
    sizes = [found for by_value in results["sizes"].values() for found in by_value.values()]
    beyond = max((x["written"] - x["factor bytes"]) / x["arrays"] for x in sizes)
    least = min(x["written"] / x["factor bytes"] for x in sizes)
    small, large = results["same adapter"].values()
    apart, larger = abs(large["written"] - small["written"]), large["base bytes"] - small["base bytes"]
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
        suite.Claim("init makes no array of a base leaf's shape", created == 0, f"{created}"),
        suite.Claim(
            "init takes less memory beyond the factors than one leaf of the base",
            used < memory["smallest leaf"],
            f"{used:,} bytes, the smallest leaf that is adapted {memory['smallest leaf']:,}",
        ),
    ]


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
