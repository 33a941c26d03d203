"""What adapters add to the communication of a sharded model: the collectives in the compiled gradient step, counted.

    python -m benchmarks.collectives [--quick] [--out collectives.json]

Two layers of a Llama on a mesh (2, 4), split in each of the usual ways, compiled for eight simulated CPU devices. Nothing is run. Three
programs: the base's own step (frozen base, gradient to the first activation: what any adapter of the first layer has to pay), the step
of the adapter, and full fine-tuning. The compiler of a TPU cuts collectives into pieces and fuses them into products, so that their
text tells neither how many there are nor how much they move: it is not counted here.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from benchmarks import llama_shapes, measure

RANK, BATCH, LENGTH = 16, 8, 512
WAYS = ("base", "jlora", "full")


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


def run(shape: llama_shapes.Shape, names: list[str], length: int) -> dict[str, Any]:
    """Collectives of each program of each layout."""
    mesh = Mesh(np.array(llama_shapes.devices("cpu", 8)).reshape(2, 4), ("data", "model"))
    results = {}
    for name in names:
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Collectives of a gradient step, layout by layout.")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two layouts")
    parser.add_argument("--out", type=Path, help="write everything that was counted, as JSON")
    args = parser.parse_args(argv)
    llama_shapes.simulate(8)
    shape = llama_shapes.SHAPES["tiny" if args.quick else "1B"]._replace(layers=2)
    names = ["tensor parallel", "FSDP"] if args.quick else list(llama_shapes.LAYOUTS)
    length = 32 if args.quick else LENGTH
    results = {
        **measure.environment(),
        "target": "cpu",
        "shape": shape._asdict(),
        "rank": RANK,
        "tokens": [BATCH, length],
        "layouts": run(shape, names, length),
    }
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"Llama of {shape}, {BATCH} x {length} tokens, bf16, rank {RANK}, mesh (2, 4), compiled for CPU devices.")
    print("Collectives of one gradient step (MiB each chip sends or holds of their results):\n")
    print(measure.table(HEADER, rows(results)))


if __name__ == "__main__":
    main()
