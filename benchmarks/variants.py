"""Other ways to evaluate the products of an adapter: what was measured before one was chosen.

    python -m benchmarks.variants [--quick] [--out variants.json]

A gradient step of the transformer of ``step.py``, its adapted layers written out in each way, next to jlora and to the floor:

* by hand, 2-D: ``x·W + (x·A)·(s·B)``, as the interpreter did until its factors had the rank first;
* rank first: the same with ``s·Aᵀ``, so that the gradient of ``A`` is a product whose result lies as its operands do;
* shared: layers of one input (q, k, v) take one product with their ``A`` side by side;
* one pass: a backward written out, which reads ``x`` and ``dy`` once for each product (``jax.custom_vjp``);
* formed: ``x·(W + s·A·B)`` forward and for ``dx``, the sum made anew in the backward, and no gradient of ``W`` ever.

Written out here, all of a layer takes matrices, the base too; jlora's program is that of ``step.py``, whose layers are Flax's. XLA
schedules the two in different orders, hence the memory.

Then what rounding does where the base is bf16, and single products: either way round, and beside a mere pass over their activations, which
is what none of them can do without.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import measure, models, suite, ways
from benchmarks.ways import FLOOR, SCALE

READ, WRITE = "reading", "reading and writing"
TITLE = "Other ways to evaluate an adapter"
Pair = tuple[jax.Array, jax.Array]


def by_hand(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return x @ w + (x @ a) @ (SCALE * b)


def rank_first(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return x @ w + (x @ (SCALE * a.T).T) @ b


@jax.custom_vjp
def one_pass(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return by_hand(x, w, a, b)


def _one_pass_forward(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> Any:
    thin = x @ a
    return x @ w + thin @ (SCALE * b), (x, w, a, b, thin)


def _one_pass_backward(kept: Any, dy: jax.Array) -> Any:
    x, w, a, b, thin = kept
    back = dy @ (SCALE * b).T
    return dy @ w.T + back @ a.T, None, x.T @ back, SCALE * thin.T @ dy


one_pass.defvjp(_one_pass_forward, _one_pass_backward)


@jax.custom_vjp
def formed(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return x @ (w + (a @ (SCALE * b)).astype(w.dtype))


def _formed_backward(kept: Any, dy: jax.Array) -> Any:
    x, w, a, b = kept
    back, thin = dy @ (SCALE * b).T, x @ a
    return dy @ (w + a @ (SCALE * b)).T, None, x.T @ back, SCALE * thin.T @ dy


formed.defvjp(lambda *args: (formed(*args), args), _formed_backward)

LAYERS: dict[str, Callable[..., jax.Array]] = {
    "by hand, 2-D": by_hand,
    "rank first": rank_first,
    "one pass": one_pass,
    "formed": formed,
}
SHARED = "rank first, shared"


def caller(s: ways.Setup, factors: dict[str, Pair], layer: Callable[..., jax.Array] | None) -> Callable[..., jax.Array]:
    """``call`` for a model's functions, with ``layer`` in the place of each adapted one; ``None`` shares products of one input."""
    (plain,) = ways._caller(models.Linen(s.model), s.params)
    thin: dict[tuple[int, str], jax.Array] = {}

    def adapted(name: str, x: jax.Array) -> jax.Array:
        w, (a, b) = s.params[name]["kernel"], factors[name]
        if layer is not None:
            return layer(x, w, a, b)
        kind, _, block = name.partition("_")
        group = [f"{k}_{block}" for k in "qkv"] if kind in "qkv" else [name]
        if (id(x), name) not in thin:
            wide = jnp.concatenate([SCALE * factors[g][0].T for g in group])
            parts = jnp.split(x @ wide.T, len(group), axis=1)
            thin.update({(id(x), g): part for g, part in zip(group, parts, strict=True)})
        return x @ w + thin[id(x), name] @ b

    flat: dict[
        int, tuple[jax.Array, jax.Array]
    ] = {}  # an input keeps one flattened form, by which layers that share it are known

    def call(name: str, x: jax.Array) -> jax.Array:
        if not s.model.layers[name].adapted:
            return plain(name, x)
        _, rows = flat.setdefault(id(x), (x, x.reshape(-1, x.shape[-1])))
        return adapted(name, rows).reshape(*x.shape[:-1], -1)

    return call


def run(quick: bool) -> dict[str, Any]:
    """Raw samples of each variant, with what the compiler says of it."""
    s = ways.setup(models.models(quick)[0])
    found, _ = ways.ways(s)

    def gradient(layer: Callable[..., jax.Array] | None) -> Callable[..., Any]:
        def loss(factors: dict[str, Pair], x: jax.Array, labels: jax.Array) -> jax.Array:
            call = caller(s, factors, layer)
            logits = s.model.body(call, s.model.inputs(call, x))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.grad(loss)

    programs = {
        name: (gradient(layer), (s.factors, s.x, s.labels)) for name, layer in [*LAYERS.items(), (SHARED, None)]
    }
    for name in ("jlora", FLOOR):
        way = found[name]
        programs[name] = (jax.grad(ways.loss(way)), (way.trained, way.rest, way.x, s.labels))
    results: dict[str, Any] = {}
    compiled, grads = {}, {}
    for name, (fn, args) in programs.items():
        suite.progress(f"compiling {name}")
        _, compiled[name] = measure.stages(fn, args)
        results[name] = {"flops": measure.flops(compiled[name]), **measure.memory(compiled[name])}
        grads[name] = compiled[name](*args)
    grads["jlora"] = found["jlora"].factors(grads["jlora"])
    worst = max(measure.relative_difference(grads[n], grads["by hand, 2-D"]) for n in grads if n != FLOOR)
    if worst > 1e-4:
        raise AssertionError(f"The variants disagree about the gradient, so their costs cannot be compared: {worst}")
    suite.progress("timing")
    runs = {name: partial(compiled[name], *args) for name, (_, args) in programs.items()}
    for name, samples in measure.in_turns(runs, 3 if quick else 41).items():
        results[name]["step"] = samples
    return {
        "about": s.model.about,
        "variants": results,
        "rounding": rounding(),
        "products": products(quick),
        "passes": passes(quick),
    }


def products(quick: bool) -> dict[str, dict[str, list[float]]]:
    """Seconds of single products in turns: the gradient of ``A`` either way round, and the second product added to ``x·W``."""
    tokens, sizes, found = (64, (32, 64), {}) if quick else (1024, (512, 2048), {})
    kept = jax.lax.optimization_barrier
    for size in sizes:
        for rank in (8, 32):
            x, back, thin, b = (
                jnp.ones(shape) for shape in ((tokens, size), (tokens, rank), (tokens, rank), (rank, size))
            )
            y = jnp.ones((tokens, size))
            for title, pair in {
                f"gradient of A ({size}, {rank}), tall / flat": (
                    (lambda x, dt: x.T @ dt, (x, back)),
                    (lambda x, dt: kept(dt.T @ x).T, (x, back)),
                ),
                f"y + t·B ({rank}, {size}), product / outer products": (
                    (lambda y, t, b: y + t @ b, (y, thin, b)),
                    (lambda y, t, b: y + sum(t[:, i, None] * b[i] for i in range(b.shape[0])), (y, thin, b)),
                ),
            }.items():
                suite.progress(title)
                compiled = [jax.jit(fn).lower(*args).compile() for fn, args in pair]
                runs = {str(i): partial(c, *args) for i, (c, (_, args)) in enumerate(zip(compiled, pair, strict=True))}
                found[title] = measure.in_turns(runs, 3 if quick else 101)
    return found


def passes(quick: bool) -> dict[str, dict[str, list[float]]]:
    """Seconds of each of the six thin products, as jlora's program has them, and of merely reading and writing as large activations."""
    tokens, sizes, found = (64, (32, 64), {}) if quick else (1024, (512, 2048), {})
    # Of the six, each has a twin of the same shapes: forward and backward, or of the one factor and the other.
    products: dict[str, Callable[..., jax.Array]] = {
        "x·A, dy·Bᵀ": lambda x, t, b: x @ b.T,
        "t·B, dt·Aᵀ": lambda x, t, b: t @ b,
        "tᵀ·dy, dtᵀ·x": lambda x, t, b: t.T @ x,
        READ: lambda x, t, b: x.sum(),
        WRITE: lambda x, t, b: 2 * x,
    }
    for size in sizes:
        for rank in (8, 32):
            suite.progress(f"thin products of {tokens} x {size}, rank {rank}")
            args = [jnp.ones(shape) for shape in ((tokens, size), (tokens, rank), (rank, size))]
            runs = {name: partial(jax.jit(fn).lower(*args).compile(), *args) for name, fn in products.items()}
            found[f"{tokens} x {size}, rank {rank}"] = measure.in_turns(runs, 3 if quick else 101)
    return found


def rounding() -> dict[str, float]:
    """Error of one adapted product in bf16, relative to what the adapter adds, for an update of 1 % of the weight."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((256, 512), (512, 512), (512, 8), (8, 512))
    x, w, a, b = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    b = b * 0.01 * jnp.linalg.norm(w) / jnp.linalg.norm(SCALE * a @ b)
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    wide = x.astype(jnp.float32), w.astype(jnp.float32)
    base, true = wide[0] @ wide[1], by_hand(*wide, a, b)
    half = a.astype(x.dtype), b.astype(x.dtype)
    found = {"base alone": x @ w + true - base, "factored": by_hand(x, w, *half), "formed": formed(x, w, a, b)}
    return {
        name: float(jnp.linalg.norm(y.astype(jnp.float32) - true) / jnp.linalg.norm(true - base))
        for name, y in found.items()
    }


def tables(results: dict[str, Any]) -> list[suite.Table]:
    floor, rows = results["variants"][FLOOR], []
    for name, r in results["variants"].items():
        low, middle, high = suite.ratios(r["step"], floor["step"])
        memory = (r["temporaries"] + r["results"]) / 2**20
        median = f"{1e3 * statistics.median(r['step']):.1f}"
        rows.append(
            [
                name,
                median,
                f"{middle:.3f} ({low:.3f}-{high:.3f})",
                f"{r['flops'] / floor['flops']:.3f}",
                f"{memory:.0f}",
            ]
        )
    errors = ", ".join(f"{name} {error:.0%}" for name, error in results["rounding"].items())
    note = f"error of a product in bf16, relative to an update of 1 % of the weight: {errors}"
    header = ["", "gradient, ms", "/ floor (quartiles)", "flops / floor", "memory, MiB"]
    single = [
        [title, *(f"{1e3 * statistics.median(r[way]):.3f}" for way in "01"), f"{suite.ratios(r['0'], r['1'])[1]:.2f}"]
        for title, r in results["products"].items()
    ]
    return [
        suite.Table(f"{TITLE}: {results['about']}", header, rows, note),
        suite.Table("Single products", ["", "first, ms", "second, ms", "first / second"], single),
        passes_table(results["passes"]),
    ]


def passes_table(passes: dict[str, dict[str, list[float]]]) -> suite.Table:
    rows = [[at, *(f"{1e3 * statistics.median(x):.3f}" for x in samples.values())] for at, samples in passes.items()]
    note = (
        f"ms; {READ}: the sum of activations of that size, {WRITE}: twice them. An adapted layer adds the six products; what is added "
        "to the base's result is read and written once more, unless XLA fuses the sum into what follows."
    )
    return suite.Table(
        "The six thin products, and one pass over their activations", ["", *next(iter(passes.values()))], rows, note
    )


def claims(results: dict[str, Any]) -> list[suite.Claim]:
    """What docs/decisions/0007 says, in counts."""
    r = results["variants"]
    flops = r["jlora"]["flops"] / r["by hand, 2-D"]["flops"]
    return [suite.Claim("jlora: no more flops than the factored product by hand", flops <= 1.01, f"{flops:.3f}")]


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
