"""Time to trace and lower a Llama-shaped model against its depth, without and with adapters.

    python -m benchmarks.trace [--quick] [--out trace.json]

Layers are unrolled, as Flax modules are unless they are scanned, so that the program grows with depth. Nothing is compiled or run, and
parameters are shapes only. Two programs: the forward pass, and the gradient step (of all parameters without adapters, of the adapter
with them). Times of both ways are taken in turns. ``jitted`` is a stack of one block that the model itself jits: a body that jlora
evaluates once.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jlora
from benchmarks import measure, suite

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))  # the model is the examples'
import llama

DEPTHS, QUICK = (4, 8, 16, 32), (2, 4, 8)
RULE = jlora.LoRA(rank=16, targets="all-linear")
KERNELS = 7  # of a layer, of both models
TOKENS = jax.ShapeDtypeStruct((1, 128), jnp.int32)


def flax_model(depth: int) -> tuple[Callable[..., Any], Any, Any]:
    """A Llama of Linen modules: function, shapes of its parameters and of its input."""
    config = llama.Config(
        vocab=32000, width=1024, hidden=2816, layers=depth, heads=16, kv_heads=8, max_length=4096, theta=1e4
    )
    model = llama.Llama(config)
    return model.apply, jax.eval_shape(model.init, jax.random.key(0), TOKENS), TOKENS


def jitted_model(depth: int) -> tuple[Callable[..., Any], Any, Any]:
    """A stack of one jitted block, in plain JAX."""

    @jax.jit
    def block(w: Any, x: jax.Array) -> jax.Array:
        q, k, v = x @ w["q"], x @ w["k"], x @ w["v"]
        x = x + jax.nn.softmax(q @ k.T / 32.0) @ v @ w["o"]
        return x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]

    def fn(params: Any, x: jax.Array) -> jax.Array:
        for w in params["layers"]:
            x = block(w, x)
        return x @ params["head"]

    sizes = dict.fromkeys("qkvo", (1024, 1024)) | {"gate": (1024, 2816), "up": (1024, 2816), "down": (2816, 1024)}
    layer = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sizes.items()}
    params = {"layers": [layer] * depth, "head": jax.ShapeDtypeStruct((1024, 32000), jnp.float32)}
    return fn, params, jax.ShapeDtypeStruct((128, 1024), jnp.float32)


def programs(fn: Callable[..., Any], params: Any, x: Any) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """What is traced, by name: a function and the shapes of its arguments."""
    sites = jlora.sites(fn, params, x)
    lora = jax.eval_shape(lambda key: jlora.init(key, params, sites, RULE), jax.random.key(0))
    apply = jlora.wrap(fn)

    def loss(out: jax.Array) -> jax.Array:
        return jnp.square(out).mean()

    return {
        "forward, plain": (fn, (params, x)),
        "forward, jlora": (apply, (params, lora, x)),
        "gradient, plain": (jax.grad(lambda params, x: loss(fn(params, x))), (params, x)),
        "gradient, jlora": (jax.grad(lambda lora, params, x: loss(apply(params, lora, x))), (lora, params, x)),
    }


def seconds(fn: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, float]:
    """Seconds to trace and to lower, from nothing."""
    jax.clear_caches()
    start = time.perf_counter()
    traced = jax.jit(lambda *args: fn(*args)).trace(*args)
    middle = time.perf_counter()
    traced.lower()
    return {"trace": middle - start, "lower": time.perf_counter() - middle}


TITLE = "Tracing and lowering, against depth"


def run(quick: bool) -> dict[str, Any]:
    """Raw samples, by model, depth and program."""
    depths, rounds = (QUICK, 1) if quick else (DEPTHS, 5)
    results: dict[str, Any] = {}
    for name, make in (("flax", flax_model), ("jitted", jitted_model)):
        for depth in depths:
            suite.progress(f"{name}, {depth} layers")
            found = programs(*make(depth))
            equations = {
                program: sum(1 for _ in measure.equations(jax.make_jaxpr(fn)(*args)))
                for program, (fn, args) in found.items()
            }
            samples: dict[str, Any] = {program: {"trace": [], "lower": []} for program in found}
            for i in range(rounds + 1):
                for program, call in found.items():
                    measured = seconds(*call)
                    for stage, value in measured.items() if i > 0 else ():  # the first round is warm-up
                        samples[program][stage].append(value)
            results.setdefault(name, {})[str(depth)] = samples
            for program, count in equations.items():
                samples[program]["equations"] = count
    return {"results": results}


def total(samples: dict[str, list[float]]) -> float:
    """Median seconds of tracing and lowering together."""
    return statistics.median(map(sum, zip(samples["trace"], samples["lower"], strict=True)))


def growth(by_depth: dict[str, Any], program: str) -> float:
    """Seconds a layer in the deeper half over those in the shallower half: 1 if the growth is linear, 2 if it is quadratic."""
    depths = sorted(map(int, by_depth))
    low, middle, high = depths[0], depths[-2], depths[-1]
    cost = {d: total(by_depth[str(d)][program]) for d in (low, middle, high)}
    return ((cost[high] - cost[middle]) / (high - middle)) / ((cost[middle] - cost[low]) / (middle - low))


def tables(results: dict[str, Any]) -> list[suite.Table]:
    """Seconds, and jlora's over plain."""
    rows = []
    for model, by_depth in results["results"].items():
        for kind in ("forward", "gradient"):
            for depth, samples in by_depth.items():
                plain, ours = (total(samples[f"{kind}, {way}"]) for way in ("plain", "jlora"))
                rows.append([f"{model}, {kind}", depth, f"{plain:.2f}", f"{ours:.2f}", f"{ours / plain:.2f}"])
            laws = [f"{growth(by_depth, f'{kind}, {way}'):.2f}" for way in ("plain", "jlora")]
            rows.append([f"{model}, {kind}", "growth", *laws, ""])
    note = "growth: seconds a layer in the deeper half over those in the shallower; 1 is linear"
    return [suite.Table(TITLE, ["trace + lower, s", "layers", "plain", "jlora", "ratio"], rows, note)]


def claims(results: dict[str, Any]) -> list[suite.Claim]:
    """What the guide says, in equations of the program."""
    found = []
    for model, by_depth in results["results"].items():
        counts = [by_depth[d]["gradient, jlora"].get("equations", 0) for d in by_depth]
        depths = [int(d) for d in by_depth]
        steps = [(b - a) / (n - m) for a, b, m, n in zip(counts, counts[1:], depths, depths[1:], strict=False)]
        text = f"{model}: the program grows by the same for every layer"
        found.append(suite.Claim(text, max(steps) <= 1.01 * min(steps), ", ".join(f"{x:.0f}" for x in steps)))
        first, last = by_depth[str(depths[0])], by_depth[str(depths[-1])]
        grown = {
            way: last[f"forward, {way}"]["equations"] - first[f"forward, {way}"]["equations"]
            for way in ("plain", "jlora")
        }
        more = (grown["jlora"] - grown["plain"]) / (depths[-1] - depths[0]) / KERNELS
        text = f"{model}: an adapted kernel adds at most 8 equations to the forward pass"
        found.append(suite.Claim(text, more <= 8, f"{more:.1f}"))
    return found


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
