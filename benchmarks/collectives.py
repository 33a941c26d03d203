"""What adapters add to the communication of a sharded model: the collectives in the compiled gradient step, counted.

    python -m benchmarks.collectives [--quick] [--out collectives.json]

Two layers of a Llama on a mesh (2, 4), split in each of the usual ways, compiled for eight simulated CPU devices. Nothing is run. Three
programs: the base's own step (frozen base, gradient to the first activation; an adapter of the first layer needs all of it but that last
gradient, which is why it can move less), the step
of the adapter, and full fine-tuning. The compiler of a TPU cuts collectives into pieces and fuses them into products, so that their
text tells neither how many there are nor how much they move: it is not counted here.
"""

import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from benchmarks import llama_shapes, measure, suite

RANK, BATCH, LENGTH = 16, 8, 512
WAYS = ("base", "jlora", "full")
TITLE = "Collectives of a gradient step on a mesh"


def programs(shape: llama_shapes.Shape, layout: llama_shapes.Layout, mesh: Mesh, length: int) -> dict[str, Any]:
    """The three gradient steps, each as a jitted function and the shapes of its arguments; and the adapter's shapes."""
    fn = llama_shapes.model(shape, layout, mesh, unroll=True)
    params = llama_shapes.parameters(shape, layout, mesh, jnp.bfloat16)
    del params["embed"]
    where = NamedSharding(mesh, P(layout.batch, layout.stream, None))
    x = jax.ShapeDtypeStruct((BATCH, length, shape.width), jnp.bfloat16, sharding=where)
    sites = jlora.sites(fn, params, x)
    lora = jax.eval_shape(
        lambda: jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=RANK, targets="all-linear"))
    )
    placed = jlora.shardings(lora, params)
    lora = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), lora, placed)
    apply = jlora.wrap(fn)

    def loss(y: jax.Array) -> jax.Array:
        return jnp.square(y.astype(jnp.float32)).sum()

    def out(tree: Any) -> Any:
        return jax.tree.map(lambda a: a.sharding, tree)

    return {
        "base": (jax.jit(jax.grad(lambda x, p: loss(fn(p, x))), out_shardings=out(x)), (x, params)),
        "jlora": (
            jax.jit(jax.grad(lambda lora, p, x: loss(apply(p, lora, x))), out_shardings=out(lora)),
            (lora, params, x),
        ),
        "full": (jax.jit(jax.grad(lambda p, x: loss(fn(p, x))), out_shardings=out(params)), (params, x)),
    }


def count(shape: llama_shapes.Shape, names: list[str], length: int) -> dict[str, Any]:
    """Collectives of each program of each layout."""
    mesh = Mesh(np.array(llama_shapes.devices("cpu", 8)).reshape(2, 4), ("data", "model"))
    results = {}
    for name in names:
        suite.progress(f"compiling: {name}")
        found = {}
        for way, (fn, args) in programs(shape, llama_shapes.LAYOUTS[name], mesh, length).items():
            collectives = measure.collectives(fn.lower(*args).compile().as_text())
            found[way] = {
                "count": len(collectives),
                "bytes": sum(c.bytes for c in collectives),
                "largest": max((c.bytes for c in collectives), default=0),
                "kinds": {
                    kind: sum(c.kind == kind for c in collectives) for kind in sorted({c.kind for c in collectives})
                },
            }
            if way == "jlora":
                local = [
                    math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(args[0])
                ]
                found["adapter bytes"] = sum(local)
                found["whole adapter bytes"] = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(args[0]))
        results[name] = found
    return results


HEADER = ["collectives of a step (MiB)", "base", "jlora", "full", "added, MiB", "adapter on a chip, MiB"]


def rows(results: dict[str, Any]) -> list[list[str]]:
    """A line for each layout: count and MiB of each program, what the adapter adds, and how large it is."""
    lines = []
    for name, found in results["layouts"].items():
        cells = [f"{found[way]['count']} ({found[way]['bytes'] / 2**20:.1f})" for way in WAYS]
        more = found["jlora"]["bytes"] - found["base"]["bytes"]
        lines.append([name, *cells, f"{more / 2**20:+.2f}", f"{found['adapter bytes'] / 2**20:.2f}"])
    return lines


def run(quick: bool) -> dict[str, Any]:
    """Everything that is counted."""
    llama_shapes.simulate(8)
    shape = llama_shapes.SHAPES["tiny" if quick else "1B"]._replace(layers=2)
    names = ["tensor parallel", "FSDP"] if quick else list(llama_shapes.LAYOUTS)
    length = 32 if quick else LENGTH
    about = {"target": "cpu", "shape": shape._asdict(), "rank": RANK, "tokens": [BATCH, length]}
    return about | {"layouts": count(shape, names, length)}


def tables(results: dict[str, Any]) -> list[suite.Table]:
    batch, length = results["tokens"]
    note = (
        f"Llama of {results['shape']}, {batch} x {length} tokens, bf16, rank {results['rank']}, mesh (2, 4), compiled for CPU devices; "
        "in brackets the MiB each chip sends or holds of their results"
    )
    return [suite.Table(TITLE, HEADER, rows(results), note)]


def claims(results: dict[str, Any]) -> list[suite.Claim]:
    """What docs/pod.md says: the adapter's own traffic is of its own size, or of its thin activations', never of the base's."""
    found = []
    for name, r in results["layouts"].items():
        more = r["jlora"]["bytes"] - r["base"]["bytes"]
        thin = 2 * math.prod(results["tokens"]) * results["rank"] * 4 * 14 * results["shape"]["layers"]
        text = f"{name}: no more bytes than the adapter and its thin activations have"
        found.append(suite.Claim(text, more <= 4 * r["adapter bytes"] + thin, f"{more:,} more"))
        if name != "data parallel":  # whose base is not split
            held = r["adapter bytes"] / r["whole adapter bytes"]
            found.append(
                suite.Claim(
                    f"{name}: factors are split as their weights are", held <= 0.75, f"{held:.2f} of them on a chip"
                )
            )
    return found


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
