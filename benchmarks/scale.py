"""How costs grow: a gradient step and its tracing with depth, rank, length and weights adapted; init, merge, save and load with size.

    python -m benchmarks.scale [--quick] [--out scale.json]

Steps are those of the examples' Llama, unrolled, in fp32: one axis is varied at a time, and the others stay at the values named below the
table, where all axes meet in one measurement. Kernels are adapted in the order query, value, key, out, gate, up, down. Three ways are
taken in turns: jlora, full fine-tuning, and the floor: the base frozen, and the gradient for the first norm's scale alone, which is what
is left if adapters cost nothing. Each growth law is the power that fits best, of whatever range was measured; n^0 does not grow.
"""

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jlora
from benchmarks import measure, scale_once, suite
from benchmarks.scale_once import config, law, llama, noise

TITLE = "Growth of costs with depth, rank, length, weights adapted and size of the base"

JLORA, FULL, FLOOR = "jlora", "full fine-tuning", "floor"
KERNELS = ("query", "value", "key", "out", "gate", "up", "down")
MARGIN = 1.02  # of flops: what the limit leaves out is the scale of the factors and the sum of the two branches


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
    widths=(256, 512, 1024, 2048, 4096),
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


def run(quick: bool) -> dict[str, Any]:
    plan = QUICK if quick else PLAN
    steps = steps_of(plan)
    sizes, missing = scale_once.sizes_of(plan.widths, plan.ranks, plan.layers, plan.rounds, plan.traces)
    return {
        "centre": plan.centre._asdict(),
        "steps": steps,
        "programs of a loop": programs_of_a_loop(plan.centre),
        "sizes": sizes,
        "same adapter": scale_once.same_adapter(plan.widths[0], plan.ranks[0]),
        "memory of init": scale_once.memory_of_init(plan.widths[1], plan.ranks[0]),
        "missing": missing,
    }


# --- What a person reads ----------------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> list[suite.Table]:
    return [
        step_table(results),
        trace_table(results),
        scale_once.size_table(
            "width", results["sizes"]["width"], "parameters", "By size of the base: init, merge, save, load"
        ),
        scale_once.size_table("rank", results["sizes"]["rank"], "factor bytes", "By rank: init, merge, save, load"),
    ]


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
    header = ["axis", "value", "jlora, ms", "full, ms", "floor, ms", "jlora / full", "quartiles", "jlora / floor"]
    note = (
        f"Others at {results['centre']}. full: full fine-tuning; flops and memory (temporaries and results) relative to it; limit: "
        "2/3 + r(k + m)/(km) over all kernels (k x m, at rank r), with what is no kernel's as in full fine-tuning; growth: the power that "
        "fits best."
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
    header = ["axis", "value", "jlora, s", "full, s", "jlora / full", "quartiles"]
    header += ["compile: jlora, s", "compile: full, s", "equations: jlora", "equations: full"]
    return suite.Table("To trace and lower a gradient step", header, rows)


# --- Claims -----------------------------------------------------------------------------------------------------------


def claims(results: dict[str, Any]) -> list[suite.Claim]:
    return [*claims_of_steps(results), *scale_once.claims_of_sizes(results)]


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


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
