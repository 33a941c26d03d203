"""What it costs to call a jitted step with an adapter of many factors: the tree taken apart, checked, and made again.

    python -m benchmarks.dispatch [--quick] [--out dispatch.json]

The factors are tiny, so that the arithmetic is nothing and the handling of the tree is all. They are held in turn as jlora's dict of
adapters, as a nested dict, as a flat tuple, and as one vector that the step takes apart inside ``jit``. ``jlora, read again`` is an
adapter of another ``jlora.sites`` of the same base, as one that was loaded: its fingerprint is equal to the one the step was compiled
for, and not the same object. Three steps: one that only takes the tree; one of gradient descent, which makes it again; one of Adam,
which takes and makes it three times.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import jlora
from benchmarks import measure, suite
from jlora._adapters import Fingerprint

TITLE = "Calling a jitted step: an adapter's tree against plainer ones"

WIDTH, RANK = 4, 2
PAIRS, QUICK = (10, 100, 1000), (5, 20)
JLORA, AGAIN, DICT, TUPLE, VECTOR = "jlora", "jlora, read again", "dict", "tuple", "vector"
TAKE, DESCENT, ADAM = "take", "gradient descent", "adam"
DONATED = ", donated"
PARTS = ("flatten", "unflatten")
TREES = {
    TAKE: (1, 0),
    DESCENT: (1, 1),
    ADAM: (3, 3),
}  # trees like the adapter's that a step is given, and that it makes


# --- What is called ---------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """The factors as they are held between steps, and their gradient inside ``jit``: cheap to compile, and different for each."""

    tree: Any
    gradient: Callable[[Any], Any]


def adapter(pairs: int) -> dict[str, Any]:
    """jlora's, of as many kernels as ``pairs``."""
    params = {f"layer{i:04d}": {"kernel": jnp.full((WIDTH, WIDTH), 0.5)} for i in range(pairs)}

    def model(params: Any, x: jax.Array) -> list[jax.Array]:
        return [x @ w["kernel"] for w in params.values()]

    found = jlora.sites(model, params, jnp.ones((1, WIDTH)))
    return jlora.init(jax.random.key(0), params, found, jlora.LoRA(rank=RANK, targets=".*"))


def layouts(pairs: int) -> dict[str, Layout]:
    """Every way to hold the same factors, by its name in the table."""
    lora = adapter(pairs)
    vector, unravel = ravel_pytree(lora)

    def gradient(tree: Any) -> Any:
        return jax.tree.map(jnp.sin, tree)

    return {
        JLORA: Layout(lora, gradient),
        AGAIN: Layout(adapter(pairs), gradient),
        DICT: Layout({path: x.arrays() for path, x in lora.items()}, gradient),
        TUPLE: Layout(tuple(jax.tree.leaves(lora)), gradient),
        VECTOR: Layout(vector, lambda vector: ravel_pytree(gradient(unravel(vector)))[0]),
    }


def make_step(kind: str, layout: Layout) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """``step(carried, x) -> (carried, number)``, and what is carried first."""
    tx = optax.adam(1e-3)

    def take(carried: Any, x: jax.Array) -> Any:
        return (), x + 1.0  # jit leaves out arguments that nothing reads: they are taken apart and checked all the same

    def descent(carried: Any, x: jax.Array) -> Any:
        (tree,) = carried
        return (jax.tree.map(lambda f, g: f - 0.001 * g, tree, layout.gradient(tree)),), x + 1.0

    def adam(carried: Any, x: jax.Array) -> Any:
        tree, state = carried
        updates, state = tx.update(layout.gradient(tree), state, tree)
        return (optax.apply_updates(tree, updates), state), x + 1.0

    first = (layout.tree, tx.init(layout.tree)) if kind == ADAM else (layout.tree,)
    return {TAKE: take, DESCENT: descent, ADAM: adam}[kind], first


class Stepper:
    """Steps on from what the last call made, and keeps the seconds until each call came back, its result perhaps not ready.

    It returns the number only: to wait for a tree would take it apart again.
    """

    def __init__(self, step: Any, carried: Any):
        self.step, self.carried, self.x = step, carried, jnp.ones(())
        self.seconds: list[float] = []

    def __call__(self) -> jax.Array:
        start = time.perf_counter()
        made, number = self.step(self.carried, self.x)
        self.seconds.append(time.perf_counter() - start)
        self.carried = made or self.carried
        return number


# --- Measuring --------------------------------------------------------------------------------------------------------


def bytecodes(fn: Callable[[], Any]) -> int:
    """Instructions of Python's that ``fn()`` runs."""
    seen = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal seen
        frame.f_trace_opcodes = True
        seen += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        fn()
    finally:
        sys.settrace(None)
    return seen


def comparisons(fn: Callable[[], Any]) -> int:
    """How often ``fn()`` compares two fingerprints by their values; one with itself does not count."""
    seen, equal = [], Fingerprint.__eq__
    Fingerprint.__eq__ = lambda self, other: seen.append(self) or equal(self, other)  # type: ignore[method-assign]
    try:
        fn()
    finally:
        Fingerprint.__eq__ = equal  # type: ignore[method-assign]
    return len(seen)


def measured(pairs: int, rounds: int) -> dict[str, Any]:
    """Of one size: seconds and counts of every step, by layout, and seconds of its parts."""
    held = layouts(pairs)
    steps = {}
    for kind, donated in ((TAKE, False), (DESCENT, False), (ADAM, False), (ADAM, True)):
        name = kind + DONATED * donated
        suite.progress(f"{pairs} pairs: {name}")
        steps[name] = of_step(kind, donated, held, rounds)
    return {"steps": steps, "parts": parts(held, rounds)}


def of_step(kind: str, donated: bool, held: dict[str, Layout], rounds: int) -> dict[str, Any]:
    """Of one step, by layout: seconds until it came back, seconds until its result was ready, and counts."""
    jitted: dict[str, Any] = {}
    runs = {}
    for name, layout in held.items():
        if name == AGAIN and kind != TAKE:
            continue  # what a step makes has the fingerprint that it was compiled for
        step, carried = make_step(kind, layout._replace(tree=jax.tree.map(jnp.copy, layout.tree)))
        compiled = jitted[name] = jitted[JLORA] if name == AGAIN else jax.jit(step, donate_argnums=(0,) * donated)
        runs[name] = Stepper(compiled, carried)
    ready = measure.in_turns(runs, rounds)
    return {
        name: {
            "returned": step.seconds[-rounds:],
            "ready": ready[name],
            "bytecodes": bytecodes(step),
            "comparisons of fingerprints": comparisons(step),
            "programs": jitted[name]._cache_size(),
        }
        for name, step in runs.items()
    }


def parts(held: dict[str, Layout], rounds: int) -> dict[str, measure.Samples]:
    """Seconds to take each layout's tree apart and to make it again."""

    def apart(tree: Any) -> Callable[[], None]:
        return lambda: (jax.tree.flatten(tree), None)[1]

    def again(leaves: Any, structure: Any) -> Callable[[], None]:
        return lambda: (jax.tree.unflatten(structure, leaves), None)[1]

    trees = {name: layout.tree for name, layout in held.items()}
    return {
        "flatten": measure.in_turns({name: apart(tree) for name, tree in trees.items()}, rounds),
        "unflatten": measure.in_turns({name: again(*jax.tree.flatten(tree)) for name, tree in trees.items()}, rounds),
    }


def run(quick: bool) -> dict[str, Any]:
    sizes, rounds = (QUICK, 20) if quick else (PAIRS, 200)
    return {"pairs": {str(pairs): measured(pairs, rounds) for pairs in sizes}}


# --- What a person reads ----------------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> list[suite.Table]:
    return [whole_steps(results["pairs"]), where_it_goes(results["pairs"]), read_again(results["pairs"])]


def micro(samples: list[float]) -> float:
    return 1e6 * statistics.median(samples)


def whole_steps(by_size: dict[str, Any]) -> suite.Table:
    """Microseconds of a step, by layout."""
    names = (JLORA, DICT, TUPLE, VECTOR)
    rows = []
    for kind in next(iter(by_size.values()))["steps"]:
        seconds = {size: {n: found["steps"][kind][n]["returned"] for n in names} for size, found in by_size.items()}
        for size, by in seconds.items():
            low, middle, high = suite.ratios(by[JLORA], by[DICT])
            rows.append(
                [kind, size, *(f"{micro(by[n]):.0f}" for n in names), f"{middle:.2f}", f"{low:.2f} - {high:.2f}"]
            )
        laws = [
            suite.exponent([int(size) for size in seconds], [micro(by[n]) for by in seconds.values()]) for n in names
        ]
        rows.append([kind, "growth", *(f"n^{law:.2f}" for law in laws), "", ""])
    header = ["step", "pairs", *(f"{name}, µs" for name in names), "jlora / dict", "quartiles"]
    note = "Medians, until the call comes back; growth: the power of the number of pairs that fits best."
    return suite.Table("A jitted step", header, rows, note)


def where_it_goes(by_size: dict[str, Any]) -> suite.Table:
    """Of jlora's steps: how much is the tree's, and how much the arrays'."""
    rows = []
    for kind in next(iter(by_size.values()))["steps"]:
        trees = TREES[kind.removesuffix(DONATED)]
        for size, found in by_size.items():
            whole, plain = (micro(found["steps"][kind][name]["returned"]) for name in (JLORA, TUPLE))
            tree = [n * micro(found["parts"][part][JLORA]) for n, part in zip(trees, PARTS, strict=True)]
            shares = [f"{x / whole:.0%}" for x in tree]
            codes = f"{bytecodes_a_node(found, kind, int(size)):.2f}"
            rows.append([kind, size, *(f"{x:.0f}" for x in (whole, plain, *tree)), *shares, codes])
    header = [
        "step",
        "pairs",
        "jlora, µs",
        "tuple, µs",
        "flatten, µs",
        "unflatten, µs",
        "flatten",
        "unflatten",
        "bytecodes a node",
    ]
    note = (
        "flatten and unflatten are timed apart, times the trees that the step takes and makes; tuple: the same step of the same arrays. "
        "Bytecodes: instructions of Python's, for each adapter node that the step takes or makes, beyond those of the tuple's step."
    )
    return suite.Table("Where a call of jlora's goes", header, rows, note)


def read_again(by_size: dict[str, Any]) -> suite.Table:
    """What an adapter costs whose fingerprint is equal to the compiled one's, but another object."""
    rows = []
    for size, found in by_size.items():
        same, again = (found["steps"][TAKE][name] for name in (JLORA, AGAIN))
        cells = [f"{micro(x['returned']):.0f}" for x in (same, again)]
        compared = [str(x["comparisons of fingerprints"]) for x in (same, again)]
        rows.append([size, *cells, f"{suite.ratios(again['returned'], same['returned'])[1]:.2f}", *compared])
    header = ["pairs", "the same, µs", "read again, µs", "ratio", "the same: comparisons", "read again: comparisons"]
    return suite.Table("A step that takes an adapter that was read again", header, rows)


def bytecodes_a_node(found: dict[str, Any], kind: str, pairs: int) -> float:
    """Instructions of Python's in a step, for each adapter node that it takes or makes, beyond those of a tuple's step."""
    ours, plain = (found["steps"][kind][name]["bytecodes"] for name in (JLORA, TUPLE))
    return (ours - plain) / (pairs * sum(TREES[kind.removesuffix(DONATED)]))


# --- Claims -----------------------------------------------------------------------------------------------------------


def claims(results: dict[str, Any]) -> list[suite.Claim]:
    by_size = results["pairs"]
    steps = [(name, x) for found in by_size.values() for by in found["steps"].values() for name, x in by.items()]
    programs = max(x["programs"] for _, x in steps)
    codes = {k: max(bytecodes_a_node(found, k, int(n)) for n, found in by_size.items()) for k in TREES}
    compared = max(x["comparisons of fingerprints"] for name, x in steps if name == JLORA)
    taken = {int(size): found["steps"][TAKE][AGAIN] for size, found in by_size.items()}
    again = max(x["comparisons of fingerprints"] / size for size, x in taken.items())
    return [
        suite.Claim("A step is compiled once, also for an adapter that was read again", programs == 1, f"{programs}"),
        suite.Claim("To take an adapter node runs no Python", codes[TAKE] < 1, f"{codes[TAKE]:.1f} bytecodes"),
        suite.Claim(
            "To take and make one runs at most 120 bytecodes", 2 * codes[DESCENT] <= 120, f"{2 * codes[DESCENT]:.1f}"
        ),
        suite.Claim("A loop that steps on compares no fingerprints", compared == 0, f"{compared}"),
        suite.Claim("An adapter that was read again compares one a node at most", again <= 1, f"{again:.2f} a node"),
    ]


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
