"""One gradient step of a transformer, six ways: what adapting it costs, and what training all of it does.

    python -m benchmarks.step [--quick] [--out step.json]

All ways share one Flax model, one base and one batch, in fp32; those that adapt share the factors too, and their
gradients are checked against each other before anything is timed. There is no optimiser: the ways part in the gradient.
The floor is the gradient to the first activations with the base frozen: what any adapter of the first layer has to pay.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

import jlora
from benchmarks import measure

RANK, ALPHA = 8, 16.0
SCALE = ALPHA / RANK
TOLERANCE = 1e-4  # on gradients, relative: rounding of fp32 in other orders of summation


class Shape(NamedTuple):
    """Of the model and its batch."""

    blocks: int = 4
    width: int = 512
    heads: int = 8
    vocab: int = 1000
    batch: int = 8
    length: int = 128


QUICK = Shape(blocks=2, width=128, heads=4, length=32)


# --- The model --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and MLP; ``linear(features, name=...)`` makes every layer with a kernel."""

    heads: int
    linear: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        *outer, width = x.shape
        h = nn.LayerNorm()(x)
        q, k, v = (self.linear(width, name=name)(h).reshape(*outer, self.heads, -1) for name in "qkv")
        x = x + self.linear(width, name="o")(nn.dot_product_attention(q, k, v).reshape(x.shape))
        h = nn.gelu(self.linear(4 * width, name="up")(nn.LayerNorm()(x)))
        return x + self.linear(width, name="down")(h)


class Transformer(nn.Module):
    """Tokens to logits. ``body`` is all but the embedding."""

    shape: Shape
    linear: Callable[..., nn.Module] = partial(nn.Dense, use_bias=False)

    def setup(self):
        self.embed = nn.Embed(self.shape.vocab, self.shape.width)
        self.blocks = [Block(self.shape.heads, self.linear) for _ in range(self.shape.blocks)]
        self.norm = nn.LayerNorm()
        self.head = self.linear(self.shape.vocab)

    def body(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def __call__(self, tokens):
        return self.body(self.embed(tokens))


class LoRADense(nn.Module):
    """LoRA as one writes it by hand: the kernel stays in ``params``, the factors are in a collection of their own.

    Attributes:
        features: Columns of the kernel.
        flat: Take the adapter's products on matrices, ``(tokens, width)``, which XLA:CPU runs faster, most of all
            backward; else on the activations as they come.
    """

    features: int
    flat: bool

    @nn.compact
    def __call__(self, x):
        *outer, width = x.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (width, self.features))
        a = self.variable("lora", "a", jnp.zeros, (width, RANK)).value
        b = self.variable("lora", "b", jnp.zeros, (RANK, self.features)).value
        if not self.flat:
            return x @ kernel + SCALE * ((x @ a) @ b)
        update = (x.reshape(-1, width) @ a) @ (SCALE * b)
        return x @ kernel + update.reshape(*outer, self.features)


# --- The ways to take the gradient ------------------------------------------------------------------------------------

FULL, HAND = "full fine-tuning", "by hand, 2-D"


class Way(NamedTuple):
    """``logits(trained, params, tokens)``, to be differentiated for ``trained``."""

    logits: Callable[[Any, Any, jax.Array], jax.Array]
    trained: Any


def by_layer(lora: Any) -> Any:
    """jlora's tree of adapters, or of their gradients, as the modules see it: ``{block: {layer: {"a", "b"}}}``."""
    return unflatten_dict({path.removesuffix("/kernel"): {"a": x.a, "b": x.b} for path, x in lora.items()}, sep="/")


def make_ways(shape: Shape, params: Any, lora: Any, tokens: jax.Array) -> dict[str, Way]:
    """Every way by its name in the table. ``lora`` is jlora's tree; the others get the same factors in theirs."""
    model = Transformer(shape)

    def plain(params, tokens):
        return model.apply({"params": params}, tokens)

    def by_hand(flat):
        adapted = Transformer(shape, partial(LoRADense, flat=flat))
        return lambda factors, params, tokens: adapted.apply({"params": params, "lora": factors}, tokens)

    def formed(factors, params, tokens):
        weights, factors = flatten_dict(params), flatten_dict(factors)
        for layer in {path[:-1] for path in factors}:
            weights[*layer, "kernel"] += SCALE * factors[*layer, "a"] @ factors[*layer, "b"]
        return plain(unflatten_dict(weights), tokens)

    def floor(x, params, tokens):
        return model.apply({"params": params}, x, method="body")

    apply = jlora.wrap(plain)
    return {
        FULL: Way(lambda trained, params, tokens: plain(trained, tokens), params),
        "W + s·A·B formed": Way(formed, by_layer(lora)),
        "by hand, 3-D": Way(by_hand(flat=False), by_layer(lora)),
        HAND: Way(by_hand(flat=True), by_layer(lora)),
        "jlora": Way(lambda lora, params, tokens: apply(params, lora, tokens), lora),
        "floor": Way(floor, params["embed"]["embedding"][tokens]),
    }


def gradient(logits: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The gradient of the cross entropy for the first argument: ``(trained, params, tokens, labels)``."""

    def loss(trained, params, tokens, labels):
        picked = jnp.take_along_axis(nn.log_softmax(logits(trained, params, tokens)), labels[..., None], axis=-1)
        return -jnp.mean(picked)

    return jax.grad(loss)


def setup(shape: Shape) -> tuple[dict[str, Way], tuple[Any, ...]]:
    """The ways, and the arguments that their gradients share."""
    keys = jax.random.split(jax.random.key(0), 4)
    tokens, labels = (jax.random.randint(key, (shape.batch, shape.length), 0, shape.vocab) for key in keys[:2])
    model = Transformer(shape)
    params = model.init(keys[2], tokens)["params"]
    sites = jlora.sites(lambda params, tokens: model.apply({"params": params}, tokens), params, tokens)
    lora = jlora.init(keys[3], params, sites, jlora.LoRA(rank=RANK, alpha=ALPHA, targets=".*/kernel"))
    # A fresh B is zero, and so is then the gradient of A: nothing to compare.
    lora = {path: dataclasses.replace(x, b=0.01 * jax.random.normal(keys[3], x.b.shape)) for path, x in lora.items()}
    return make_ways(shape, params, lora, tokens), (params, tokens, labels)


# --- Measuring --------------------------------------------------------------------------------------------------------


def run(shape: Shape, rounds: int, repeats: int) -> dict[str, Any]:
    """Everything that is measured, raw."""
    ways, shared = setup(shape)
    gradients = {name: (gradient(way.logits), (way.trained, *shared)) for name, way in ways.items()}
    kernels = {x.shape for path, x in flatten_dict(shared[0]).items() if path[-1] == "kernel"}
    results: dict[str, Any] = {name: {"trace": [], "lower": [], "compile": []} for name in ways}
    compiled = {}
    for i in range(repeats + 1):
        for name, (fn, args) in gradients.items():
            progress(f"compiling, pass {i} of {repeats}: {name}")
            seconds, compiled[name] = measure.stages(fn, args)
            for stage, value in seconds.items() if i > 0 else ():  # the first pass is warm-up
                results[name][stage].append(value)
    worst = check({name: compiled[name](*gradients[name][1]) for name in ways if name not in (FULL, "floor")})
    progress(f"timing {rounds} rounds\n")
    steps = measure.in_turns({name: partial(compiled[name], *args) for name, (_, args) in gradients.items()}, rounds)
    for name, (fn, args) in gradients.items():
        results[name] |= {
            "step": steps[name],
            "flops": measure.flops(compiled[name]),
            **measure.memory(compiled[name]),
            "created": measure.created(fn, args, kernels),
            "trained": sum(x.size for x in jax.tree.leaves(args[0])),
        }
    forward = measure.created(ways[FULL].logits, (shared[0], *shared[:2]), kernels)
    return {"ways": results, "created by the forward pass": forward, "worst difference of gradients": worst}


def check(grads: dict[str, Any]) -> float:
    """The largest relative difference of gradients that should be the same; raises if it is more than rounding."""
    layers = {name: by_layer(g) if name == "jlora" else g for name, g in grads.items()}
    differences = {name: measure.relative_difference(g, layers[HAND]) for name, g in layers.items()}
    if max(differences.values()) > TOLERANCE:
        raise AssertionError(f"The ways disagree about the gradient, so their costs cannot be compared: {differences}")
    return max(differences.values())


def report(ways: dict[str, Any]) -> str:
    """Two tables: what was measured, and that relative to full fine-tuning and to LoRA by hand."""
    rows, ratios = [], []
    for name, way in ways.items():
        milli = {key: 1e3 * statistics.median(way[key]) for key in ("trace", "lower", "compile", "step")}
        low, _, high = (1e3 * x for x in statistics.quantiles(way["step"], n=4))
        counts = ["-" if name == "floor" else f"{way['trained']:,}", f"{way['flops'] / 1e9:.2f}", str(way["created"])]
        sizes = [f"{way[key] / 2**20:.1f}" for key in ("temporaries", "results")]
        times = [f"{milli[key]:.0f}" for key in ("trace", "lower", "compile")]
        steps = [f"{1e3 * min(way['step']):.1f}", f"{milli['step']:.1f}", f"{low:.1f} - {high:.1f}"]
        rows.append([name, *counts, *sizes, *times, *steps])
    for label, reference in (("full", ways[FULL]), ("by hand", ways[HAND])):
        ratios += [[f"{name} / {label}", *(f"{x:.2f}" for x in relative(way, reference))] for name, way in ways.items()]
    costs = ["trained", "GFLOP", "created", "temp MiB", "result MiB", "trace ms", "lower ms", "compile ms"]
    header = ["", *costs, "step ms: least", "median", "middle half"]
    titles = ["", "flops", "temp + result", "trace + lower", "step"]
    return f"{measure.table(header, rows)}\n\n{measure.table(titles, ratios)}"


def relative(way: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """Flops, memory, seconds to trace and lower, and seconds of a step: of one way, relative to another.

    Temporaries and results count together: XLA keeps temporaries in the room of results that are not made yet, so that
    large results make the temporaries look small. Times are compared pass by pass, so that the machine's noise cancels.
    """

    def ratio(*keys):
        sums = (map(sum, zip(*(w[key] for key in keys), strict=True)) for w in (way, other))
        return statistics.median(x / y for x, y in zip(*sums, strict=True))

    memory = [w["temporaries"] + w["results"] for w in (way, other)]
    return [way["flops"] / other["flops"], memory[0] / memory[1], ratio("trace", "lower"), ratio("step")]


def progress(message: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{message:60}", end="", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Costs of one gradient step: full fine-tuning, LoRA by hand, jlora.")
    parser.add_argument("--quick", action="store_true", help="a small model: under a minute")
    parser.add_argument("--out", type=Path, help="write everything that was measured, as JSON")
    args = parser.parse_args(argv)
    shape, rounds, repeats = (QUICK, 20, 2) if args.quick else (Shape(), 25, 5)
    results = {
        **measure.environment(),
        "shape": shape._asdict(),
        "rank": RANK,
        "jlora": jlora.__version__,
        **run(shape, rounds, repeats),
    }
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(", ".join(f"{key} {value}" for key, value in (results["versions"] | results["machine"]).items()))
    print(f"{shape}, rank {RANK}, fp32, jlora {jlora.__version__}")
    print(f"largest relative difference of the four LoRA gradients: {results['worst difference of gradients']:.0e}")
    print(f"arrays of a kernel's shape made by the base's forward pass: {results['created by the forward pass']}\n")
    print(report(results["ways"]))


if __name__ == "__main__":
    main()
