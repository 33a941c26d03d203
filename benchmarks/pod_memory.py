"""What a training step of 8B and 70B parameters needs on each chip, as the compiler tells it: LoRA against full fine-tuning.

    python -m benchmarks.pod_memory [--quick] [--only 8B] [--out memory.json]

Llama shapes, bf16 base, Adam; the step is traced, split and compiled for 8 or 256 chips, and never run: no weight is made. By default the
compiler is the TPU's own (``pip install libtpu``), which needs no TPU; ``JLORA_TARGET`` names another kind (v5e, v6e), and ``cpu`` takes as
many simulated CPU devices, whose compiler keeps more temporaries (it computes bf16 products in fp32). Full fine-tuning keeps weights and
moments in fp32, LoRA factors and moments in fp32.
"""

import math
import os
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from benchmarks import llama_shapes, measure, suite

RANK, LENGTH = 16, 2048
TITLE = "Memory of a training step on each chip of a pod, compiled and not run"
LAYOUT = llama_shapes.Layout(inner="model", outer="data", batch="data")
# Shape, chips, mesh (data, model), sequences a step.
RUNS = {"8B, 8 chips": ("8B", (2, 4), 8), "70B, 256 chips": ("70B", (32, 8), 64)}
QUICK = {"tiny, 8 chips": ("tiny", (2, 4), 8)}
PARTS = ("base", "trained", "optimiser", "temporaries")


def per_chip(tree: Any) -> int:
    """Bytes of a tree on one chip."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def compiled(shape: llama_shapes.Shape, mesh: Mesh, batch: int, length: int, way: str) -> dict[str, Any]:
    """Bytes on one chip of each part of one training step, and what is trained."""
    fn = llama_shapes.model(shape, LAYOUT, mesh)
    base = llama_shapes.parameters(shape, LAYOUT, mesh, jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32, sharding=NamedSharding(mesh, P(LAYOUT.batch)))
    optimizer = optax.adam(1e-4)

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        return fn(params, params["embed"][tokens])

    def loss(y: jax.Array, tokens: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(y.astype(jnp.float32), tokens[:, 1:]).mean()

    if way == "LoRA":
        sites = jlora.sites(logits, base, tokens)
        trained = jax.eval_shape(lambda: jlora.init(jax.random.key(0), base, sites, jlora.LoRA(rank=RANK)))
        trained = placed(trained, jlora.shardings(trained, base))
        state = jax.eval_shape(optimizer.init, trained)
        state = placed(state, jlora.shardings(state, base))
        apply = jlora.wrap(logits)

        def objective(trained: Any, base: Any, tokens: jax.Array) -> jax.Array:
            return loss(apply(base, trained, tokens[:, :-1]), tokens)
    else:
        where = jax.tree.map(lambda x: x.sharding, base)
        trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), base)
        whole = NamedSharding(mesh, P())
        state = jax.eval_shape(optimizer.init, trained)
        state = placed(state, (optax.ScaleByAdamState(whole, where, where), optax.EmptyState()))
        base = None

        def objective(trained: Any, base: Any, tokens: jax.Array) -> jax.Array:
            return loss(logits(jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained), tokens[:, :-1]), tokens)

    def step(trained: Any, state: Any, base: Any, tokens: jax.Array) -> Any:
        value, grads = jax.value_and_grad(objective)(trained, base, tokens)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    out = jax.tree.map(lambda x: x.sharding, (trained, state))
    start = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*out, NamedSharding(mesh, P())))
    lowered = jitted.lower(trained, state, base, tokens)
    middle = time.perf_counter()
    program = lowered.compile()
    found = dict(zip(PARTS, (per_chip(base), per_chip(trained), per_chip(state)), strict=False))
    return found | {
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "trained parameters": sum(x.size for x in jax.tree.leaves(trained)),
        "collectives": len(measure.collectives(program.as_text())),
        "seconds to trace and lower": middle - start,
        "seconds to compile": time.perf_counter() - middle,
    }


HEADER = ["GiB on each chip", "parameters trained", *PARTS, "sum"]


def rows(results: dict[str, Any]) -> list[list[str]]:
    """A line for each model and way: what is trained, and the parts of memory."""
    lines = []
    for name, ways in results["results"].items():
        for way, found in ways.items():
            total = sum(found[part] for part in PARTS)
            cells = [f"{found[part] / 2**30:.2f}" for part in PARTS]
            trained = f"{found['trained parameters'] / 1e6:,.1f}M"
            lines.append([f"{name}: {way}", trained, *cells, f"{total / 2**30:.2f}"])
    return lines


def run(quick: bool, only: str = "") -> dict[str, Any]:
    """Everything that is measured; quick, it is compiled for CPU devices."""
    target = "cpu" if quick else os.environ.get("JLORA_TARGET", "v5p")
    llama_shapes.simulate(256)
    length = 64 if quick else LENGTH
    results: dict[str, Any] = {}
    runs = QUICK if quick else RUNS
    for name in suite.chosen(list(runs), only):
        shape, mesh_shape, batch = runs[name]
        chips = llama_shapes.devices(target, math.prod(mesh_shape))
        mesh = Mesh(np.array(chips).reshape(mesh_shape), ("data", "model"))
        for way in ("LoRA", "full fine-tuning"):
            suite.progress(f"compiling for {target}: {name}, {way}")
            results.setdefault(name, {})[way] = compiled(llama_shapes.SHAPES[shape], mesh, batch, length, way)
    shown = {name: [*run] for name, run in RUNS.items()}
    return {"target": target, "rank": RANK, "length": length, "runs": shown, "results": results}


def tables(results: dict[str, Any]) -> list[suite.Table]:
    note = (
        f"compiled for {results['target']}, rank {results['rank']}, {results['length']} tokens a sequence, mesh (data, model), blocks "
        "rematerialised"
    )
    return [suite.Table(TITLE, HEADER, rows(results), note)]


def claims(results: dict[str, Any]) -> list[suite.Claim]:
    """What docs/pod.md says of the state on each chip."""
    found = []
    for name, ways in results["results"].items():
        lora = ways["LoRA"]
        factors = 4 * lora["trained parameters"]
        share, moments = lora["trained"] / factors, lora["optimiser"] / factors
        split = f"{name}: a chip holds less than half of the factors"
        both = f"{name}: Adam keeps two moments of what a chip holds of the factors, and none of the base"
        found += [
            suite.Claim(split, share < 0.5, f"{share:.2f}"),
            suite.Claim(both, moments <= 2.01 * share < 1, f"{moments / share:.3f} times"),
        ]
    return found


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
