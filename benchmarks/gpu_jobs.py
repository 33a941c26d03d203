"""Measures ways to train a Llama on one GPU, in a process of its own: what ``benchmarks.gpu`` starts.

    python -m benchmarks.gpu_jobs jobs.json

A job is a dict: ``kind``, ``case``, ``way``, ``steps``, ``dtype``, ``name`` (of the files it leaves) and ``profile``. The program is
compiled before any weight is made: that is where it is known whether it fits, and buffers that the compiler tries kernels on are then
not part of the peak.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from benchmarks import measure
from benchmarks.gpu_torch import measure_torch
from benchmarks.gpu_ways import (
    CASES,
    FLOOR,
    FULL,
    HAND,
    JLORA,
    RANK,
    SCALE,
    WARM_UP,
    Case,
    Way,
    attention,
    base,
    by_layer,
    flat,
    kernels,
    make_way,
    merged,
    objective,
    step,
    summed_wide,
)

# For the arrays a step creates, counted in its jaxpr: no product of these sizes is a side of any kernel.
COUNTED = {"batch": 3, "length": 37}


def arguments(name: str, way: Way, case: Case, dtype: Any) -> tuple[Any, ...]:
    """Shapes of what a step takes."""
    params = jax.eval_shape(lambda: base(case.shape, dtype))
    tokens = jax.ShapeDtypeStruct((case.batch, case.length + 1), jnp.int32)
    first = jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32)
    trained = jax.eval_shape(way.start, params, first)
    return trained, jax.eval_shape(way.optimizer.init, trained), None if name == FULL else params, tokens


def size(tree: Any) -> int:
    """Bytes of a tree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def dot_flops(jaxpr: Any) -> int:
    """Flops of all matrix products of a program, bodies of scans as often as they run; of a kernel of cuDNN nothing is known."""
    total = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "dot_general":
            ((left, _), _), x = eqn.params["dimension_numbers"], eqn.invars[0].aval
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(x.shape[d] for d in left)
        inner = sum(map(dot_flops, core.jaxprs_in_params(eqn.params)))
        total += inner * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return total


def counts(name: str, case: Case, dtype: Any, attend: Callable[..., jax.Array]) -> dict[str, int]:
    """What is known of a step without compiling it."""
    way = make_way(name, case.shape, attend, dtype)
    args = arguments(name, way, case, dtype)
    small = case._replace(**COUNTED)
    xla = partial(jax.nn.dot_product_attention, is_causal=True)  # takes any length; makes nothing of a kernel's shape
    counted = make_way(name, case.shape, xla, dtype)
    trained, _, params, tokens = arguments(name, counted, small, dtype)
    n, sizes = case.shape.layers, [*kernels(case.shape).values(), (case.shape.width, case.shape.vocab)]
    return {
        "trained": 0 if name == FLOOR else sum(math.prod(x.shape) for x in jax.tree.leaves(args[0])),
        "dots": dot_flops(jax.make_jaxpr(step(way))(*args)),
        "created": measure.created(
            jax.grad(objective(counted)), (trained, params, tokens), [*sizes, *((n, *one) for one in sizes)]
        ),
    }


def measure_jax(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Everything about one way in JAX. One that does not fit says so under ``"does not fit"``."""
    case, name, dtype, device = CASES[job["case"]], job["way"], jnp.dtype(job["dtype"]), jax.devices()[0]
    attend, which = attention(case, dtype)
    way = make_way(name, case.shape, attend, dtype)
    args = arguments(name, way, case, dtype)
    found = {"device": device.device_kind, "attention": which, **counts(name, case, dtype, attend)}
    limit = (device.memory_stats() or {}).get("bytes_limit", math.inf)
    if size(args) > limit:
        return found | {"does not fit": f"{size(args) / 2**30:.0f} GiB before any temporary, of {limit / 2**30:.0f}"}
    try:
        start = time.perf_counter()
        compiled = jax.jit(step(way), donate_argnums=(0, 1)).lower(*args).compile()
        found["seconds to compile"] = time.perf_counter() - start
        found |= of_program(compiled)
        needed = found["arguments"] + found["temporaries"] + found["results"] - found["aliases"]
        if needed > limit:
            return found | {"does not fit": f"{needed / 2**30:.0f} GiB, of {limit / 2**30:.0f}"}
        (folder / f"{job['name']}.hlo").write_text(compiled.as_text())
        return found | run_steps(compiled, name, way, case, job, folder)
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        return found | {"does not fit": f"ran out of memory: {str(error).splitlines()[0]}"}


def of_program(compiled: Any) -> dict[str, Any]:
    """XLA's own counts. Flops: the body of a loop counts once, and what is a kernel of a library may not count."""
    memory = compiled.memory_analysis()
    return {
        "flops": (compiled.cost_analysis() or {}).get("flops"),
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "aliases": memory.alias_size_in_bytes,
    }


def run_steps(compiled: Any, name: str, way: Way, case: Case, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Times of steps, each waited for, the peak of memory, and a trace if asked for."""

    def peak() -> int | None:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    tokens = jax.random.randint(jax.random.key(2), (case.batch, case.length + 1), 0, case.shape.vocab)
    params = base(case.shape, jnp.dtype(job["dtype"]))
    trained = way.start(params, tokens[:, :-1])
    state = way.optimizer.init(trained)
    params = None if name == FULL else params
    jax.block_until_ready((trained, state, params))
    before, samples, losses = peak(), [], []

    def advance() -> None:
        nonlocal trained, state
        trained, state, value = compiled(trained, state, params, tokens)
        losses.append(float(jax.block_until_ready((trained, state, value))[2]))

    for _ in range(WARM_UP):
        advance()
    for _ in range(job["steps"]):
        start = time.perf_counter()
        advance()
        samples.append(time.perf_counter() - start)
    found = {"step": samples, "losses": losses, "peak": peak(), "peak before the first step": before}
    if job["profile"]:
        with jax.profiler.trace(str(folder / f"{job['name']}.trace")):
            for _ in range(job["profile"]):
                advance()
    return found


def check(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The largest relative difference of each way's gradients from those of LoRA by hand, in fp32 with a B that is not zero."""
    del folder
    case = CASES[job["case"]]
    attend = partial(jax.nn.dot_product_attention, is_causal=True)
    params = base(case.shape, jnp.float32)
    tokens = jax.random.randint(jax.random.key(2), (case.batch, case.length + 1), 0, case.shape.vocab)
    ways = {name: make_way(name, case.shape, attend, jnp.float32) for name in job["ways"]}
    lora = ways[JLORA].start(params, tokens[:, :-1])
    lora = {
        path: dataclasses.replace(x, b=0.01 * jax.random.normal(jax.random.key(3), x.b.shape))
        for path, x in lora.items()
    }
    found = {}
    for name, way in ways.items():
        grads = jax.jit(jax.grad(objective(way)))(lora if name == JLORA else by_layer(lora), params, tokens)
        found[name] = by_layer(grads) if name == JLORA else grads
    return {name: measure.relative_difference(grads, found[HAND]) for name, grads in found.items()}


def rounding(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What bf16 leaves of an update, factored and formed, for updates of several sizes relative to the weight.

    Against the same bf16 weights and activations multiplied in fp64: the error of the output, and the slope of what the update changed
    in it over what it should have changed: 1 if the update arrives whole, 0 if it is lost in the weight's rounding.
    """
    del folder
    width, tokens = job["width"], job["tokens"]
    keys = jax.random.split(jax.random.key(4), 4)
    w = (jax.random.normal(keys[0], (width, width)) / width**0.5).astype(jnp.bfloat16)
    x = jax.random.normal(keys[1], (tokens, width)).astype(jnp.bfloat16)
    a, b = jax.random.normal(keys[2], (width, RANK)), jax.random.normal(keys[3], (RANK, width))
    wide = [np.asarray(z.astype(jnp.float32), np.float64) for z in (x, w)]
    plain_output = wide[0] @ wide[1]
    found: dict[str, Any] = {}
    for share in (1e-4, 1e-3, 1e-2, 1e-1):
        update = SCALE * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        gain = share * np.linalg.norm(wide[1]) / np.linalg.norm(update)
        lora = {"w": {"a": a, "b": b * gain}}
        wanted = wide[0] @ (gain * update)
        for name, project in (("factored", flat), ("formed", merged), ("factored, summed in fp32", summed_wide)):
            (y,) = jax.jit(lambda x, lora, project=project: project(x, {"w": w}, lora, "w"))(x, lora)
            y = np.asarray(y.astype(jnp.float32), np.float64)
            error = np.linalg.norm(y - plain_output - wanted) / np.linalg.norm(plain_output + wanted)
            slope = np.sum((y - plain_output) * wanted) / np.sum(wanted * wanted)
            found.setdefault(str(share), {})[name] = {"error": float(error), "slope": float(slope)}
    return found


KINDS = {"jax": measure_jax, "torch": measure_torch, "check": check, "rounding": rounding}


def main(path: str) -> None:
    """Does the jobs in a file one after the other; what each found is in the results file as soon as it is known.

    Once the time that the jobs may take is over, those that can be missed are.
    """
    spec = json.loads(Path(path).read_text())
    found: dict[str, Any] = {}
    results = Path(spec["results"])
    begin = time.perf_counter()

    def write() -> None:
        whole = results.with_suffix(".part")
        whole.write_text(json.dumps(found))
        whole.replace(results)  # this process may be ended at any time

    for job in spec["jobs"]:
        start = time.perf_counter()
        if start - begin > spec["seconds"] and not job["required"]:
            found[job["name"]] = {"skipped": f"the {spec['seconds']:.0f} s were spent"}
            continue
        found[job["name"]] = KINDS[job["kind"]](job, Path(spec["folder"]))
        found[job["name"]]["seconds in all"] = time.perf_counter() - start
        if len(spec["jobs"]) > 1:
            found[job["name"]].pop("peak", None)  # it would be that of all jobs so far
        write()
    write()


if __name__ == "__main__":
    main(sys.argv[1])
