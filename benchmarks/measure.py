"""What the benchmarks measure, and how: times in turns, XLA's own counts of a compiled program, values made in a jaxpr.

Nothing here knows about adapters. Every time comes back as its raw samples, so that a reader can judge the noise.
"""

import collections
import datetime
import importlib.metadata
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

# Of XLA, where only counts are taken, which it knows before it makes code: most of what a quick run would wait for.
COUNTS_ONLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

Samples = dict[str, list[float]]


def stages(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[dict[str, float], Any]:
    """Seconds to trace, lower and compile ``fn(*args)`` with JAX's caches empty, and the compiled program."""
    jax.clear_caches()
    start = time.perf_counter()
    traced = jax.jit(fn).trace(*args)
    after_trace = time.perf_counter()
    lowered = traced.lower()
    after_lower = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    return {"trace": after_trace - start, "lower": after_lower - after_trace, "compile": end - after_lower}, compiled


def in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> Samples:
    """Seconds of each run in each round, warm-up apart.

    One run of each per round, so that a slow minute of the machine falls on all alike. Each round starts with another.
    """
    samples: Samples = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    names = list(runs)
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            jax.block_until_ready(runs[name]())
            samples[name].append(time.perf_counter() - start)
    return samples


def flops(compiled: Any) -> float:
    """Flops of a compiled program, as XLA counts them."""
    return compiled.cost_analysis()["flops"]


def count_only() -> None:
    """Takes counts alone from here on, in this process and those it starts; before JAX's first device."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COUNTS_ONLY}"


def memory(compiled: Any) -> dict[str, int]:
    """Bytes of a compiled program's temporaries and of its results; its arguments not counted."""
    analysis = compiled.memory_analysis()
    return {"temporaries": analysis.temp_size_in_bytes, "results": analysis.output_size_in_bytes}


def free_memory() -> int | None:
    """Bytes that the system can give a process without swapping; ``None`` where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


class Collective(NamedTuple):
    """A collective operation of a compiled program: its kind, and the bytes of its result on one device."""

    kind: str
    bytes: int


_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")


def collectives(hlo: str) -> list[Collective]:
    """Every collective in the text of a compiled program; one in the body of a loop counts once."""
    found = []
    for result, kind, started in _COLLECTIVE.findall(hlo):
        sizes = [_bytes(dtype, dims) for dtype, dims in _ARRAY.findall(result)]
        # One that is started has its operand in its result too, and on some backends scalars of context.
        found.append(Collective(kind, max(sizes) if started and kind != "all-reduce" else sum(sizes)))
    return found


def _bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype).group())
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a program and of the programs inside it, but for those that only hold one."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        inner = list(core.jaxprs_in_params(eqn.params))
        for sub in inner:
            yield from equations(sub)
        if not inner:
            yield eqn


def created(fn: Callable[..., Any], args: tuple[Any, ...], shapes: Iterable[tuple[int, ...]]) -> int:
    """How many float arrays of one of ``shapes``, in either order of the axes, the program of ``fn(*args)`` makes.

    Views count, since nothing promises that XLA makes them free, and so do constants. ``stop_gradient`` does not: it is the identity.
    """
    wanted = {tuple(sorted(shape)) for shape in shapes}
    program = jax.make_jaxpr(fn)(*args)
    made = [v.aval for eqn in equations(program) if eqn.primitive.name != "stop_gradient" for v in eqn.outvars]
    made += [jax.typeof(x) for x in program.consts]
    return sum(tuple(sorted(x.shape)) in wanted and jnp.issubdtype(x.dtype, jnp.floating) for x in made)


def relative_difference(tree: Any, other: Any) -> float:
    """The largest difference of two trees of arrays, each leaf relative to its largest entry."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return max(float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))) for x, y in pairs)


def load() -> float | None:
    """Processes that ran or waited to run, on average over the last minute: before anything is measured, those of others."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def environment() -> dict[str, Any]:
    """Date, machine and versions: what a number means nothing without. Starts JAX's devices."""
    packages = [
        name
        for name in ("jax", "jaxlib", "flax", "numpy", "optax", "libtpu", "torch", "peft", "transformers", "qwix")
        if _is_installed(name)
    ]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "devices": dict(collections.Counter(device.device_kind for device in jax.devices())),
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
    }


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cpu() -> str:
    # The model name alone can be as vague as "Intel Xeon Processor"; family and model number identify it.
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            info = dict(line.split(":", 1) for line in lines.read().split("\n\n")[0].splitlines() if ":" in line)
    except OSError:
        return platform.processor() or "unknown"
    facts = {key.strip(): value.strip() for key, value in info.items()}
    return f"{facts.get('model name', 'unknown')} (family {facts.get('cpu family')}, model {facts.get('model')})"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(n) if i == 0 else cell.rjust(n) for i, (cell, n) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """The same as a table of Markdown."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
