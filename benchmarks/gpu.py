"""One training step of a Llama on one GPU, in bf16: jlora, LoRA by hand in JAX, full fine-tuning, PEFT + torch, and the floor.

    python -m benchmarks.gpu [--quick] [--out gpu.json]

Forward, backward and the Adam update of what is trained, 8192 tokens a step, blocks rematerialised, rank 16 on every kernel but the head,
factors in fp32 over a frozen base in bf16. Every way runs in a process of its own, several rounds of them in turns while time permits. A
stage that finds its time spent is skipped, and named. Without a GPU, or with ``--quick``, a tiny model stands in.

JAX keeps its own allocator, whose peak counts the bytes that arrays and temporaries take and not the pool that it holds for them; torch's
peak counts the same of its own. Both are of the steps alone, if making the weights took less. JAX processes share a cache of compiled
programs and of the kernels that the compiler chose, so that two ways do not differ by chance in the kernel of the same product.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# The card belongs to the processes that measure; this one only asks what it is.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from benchmarks import gpu_ways, measure, suite
from benchmarks.gpu_program import Program, profile
from benchmarks.gpu_tables import claims as claims
from benchmarks.gpu_tables import tables as tables
from benchmarks.gpu_tables import why_not
from benchmarks.gpu_ways import COMPILED, EAGER, FLOOR, FORMED, FULL, HAND, JLORA, NAIVE, ON_A, RANK, SHARED

TITLE = "One training step on one GPU: jlora, LoRA by hand, full fine-tuning, PEFT + torch"
TORCH = (EAGER, COMPILED)
MAIN = (JLORA, HAND, NAIVE, FULL, FLOOR, *TORCH)
VARIANTS = (SHARED, FORMED, ON_A)


class Stage(NamedTuple):
    """Ways of one case, and the seconds they may take together. ``profile``: steps that are traced, not timed."""

    name: str
    case: str
    ways: Sequence[str]
    seconds: float
    profile: int = 0


SECONDS = 450.0
STAGES = (
    Stage("1B", "1B", MAIN, 190),
    Stage("7B", "7B", (JLORA, HAND, EAGER, FULL, FLOOR, COMPILED), 170),
    Stage("variants of 1B", "1B", (HAND, *VARIANTS), 80),
    Stage("profile of 1B", "1B", (JLORA, HAND, FLOOR), 70, profile=3),
    Stage("1B again", "1B", MAIN, 150),
    Stage("7B again", "7B", (JLORA, HAND, EAGER, COMPILED), 150),
)
STEPS = {"tiny": 4, "1B": 12, "7B": 6}
QUICK_SECONDS = 50.0
QUICK = (JLORA, HAND, FLOOR, FULL)
REQUIRED = (JLORA, HAND, "check")  # what the claims are about


# --- Running ----------------------------------------------------------------------------------------------------------


def job(kind: str, case: str, way: str, name: str, **more: Any) -> dict[str, Any]:
    """What a process is asked for."""
    cuda = jax.default_backend() == "gpu"
    asked = {
        "kind": kind,
        "case": case,
        "way": way,
        "name": name,
        "dtype": "bfloat16",
        "steps": STEPS[case],
        "profile": 0,
    }
    # Without a GPU, torch's compiler would spend the time on C++.
    torch = {"device": "cuda" if cuda else "cpu", "backend": "inductor" if cuda else "aot_eager"}
    return asked | torch | {"required": way in REQUIRED} | more


def checks(quick: bool) -> list[dict[str, Any]]:
    """The jobs that no GPU is needed for."""
    sizes = {"width": 256, "tokens": 128} if quick else {"width": 2048, "tokens": 1024}
    compared = (JLORA, HAND, FORMED) if quick else (JLORA, *gpu_ways.PROJECTIONS)
    return [
        job("check", "tiny", "check", "check", ways=compared),
        job("rounding", "tiny", "rounding", "rounding", **sizes),
    ]


def environment(folder: Path, cpu: bool, profile: bool) -> dict[str, str]:
    """Of a process that measures: it may hold the card, all its kinds of cache are shared and end with this run."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("XLA_PYTHON_CLIENT_")}
    if cpu:
        return env | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{env.get('XLA_FLAGS', '')} {measure.COUNTS_ONLY}"}
    # Kernels launched as one CUDA graph would not tell which operation they belong to.
    flags = {"XLA_FLAGS": f"{env.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="} if profile else {}
    caches = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    return env | caches | flags | {"XLA_CLIENT_MEM_FRACTION": "0.90", "TOKENIZERS_PARALLELISM": "false"}


def spawn(jobs: list[dict[str, Any]], folder: Path, cpu: bool, soft: float, hard: float) -> dict[str, Any]:
    """Results of jobs done in one process, by name; of those that it did not come to, why.

    Args:
        jobs: What to do.
        folder: Where the processes of this run leave their files.
        cpu: No GPU for them.
        soft: Seconds after which jobs that are not required are skipped.
        hard: Seconds after which the process is ended.
    """
    spec, results, log = (folder / f"{jobs[0]['name']}.{kind}" for kind in ("job", "json", "log"))
    spec.write_text(json.dumps({"jobs": jobs, "folder": str(folder), "results": str(results), "seconds": soft}))
    missed: dict[str, str] = {}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_jobs", str(spec)],
            cwd=suite.ROOT,
            env=environment(folder, cpu, any(one["profile"] for one in jobs)),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that processes it starts, torch's compilers, end with it
        )
        try:
            if process.wait(hard) != 0:
                missed = {"failed": f"{process.returncode}"}
        except subprocess.TimeoutExpired:
            missed = {"skipped": f"stopped after {hard:.0f} s"}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found = json.loads(results.read_text()) if results.exists() else {}
    if "failed" in missed:  # its last words
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        missed["failed"] += f": {lines[-1][:300] if lines else 'it said nothing'}"
    return {one["name"]: dict(missed) for one in jobs} | found


def run(quick: bool) -> dict[str, Any]:
    """Everything that is measured, raw."""
    start = time.perf_counter()
    gpu = jax.default_backend() == "gpu"
    absent = suite.missing(["torch", "peft", "transformers"])
    results: dict[str, Any] = {
        "rank": RANK,
        "cases": {name: case._asdict() | {"shape": case.shape._asdict()} for name, case in gpu_ways.CASES.items()},
        "ways": {},
        "profile": {},
        "kernels": {},
        "skipped": {} if gpu else {"1B and 7B": "there is no GPU: a tiny model stands in"},
        "missing": absent,
    }
    folder = Path(tempfile.mkdtemp(prefix="jlora-gpu-"))
    try:
        if quick or not gpu:
            run_small(results, folder, absent, quick, gpu, start)
        else:
            run_stages(results, folder, absent, start)
    finally:
        shutil.rmtree(folder)
    return results | {"seconds": time.perf_counter() - start}


def run_small(
    results: dict[str, Any], folder: Path, absent: dict[str, str], quick: bool, gpu: bool, start: float
) -> None:
    """The tiny model: all ways in JAX in one process, those in torch in another."""
    suite.progress("tiny: jax")
    jobs = [
        job("jax", "tiny", way, f"tiny-{i}", profile=2 if way in (JLORA, HAND, FLOOR) else 0)
        for i, way in enumerate(QUICK)
    ]
    first, *rest = checks(quick)
    jobs = [*jobs[:2], first, *jobs[2:4], *rest, *jobs[4:]]
    found = spawn(jobs, folder, not gpu, 0.5 * QUICK_SECONDS, 10 * QUICK_SECONDS)
    results["check"], results["rounding"] = found["check"], found["rounding"]
    for one in jobs:
        if one["kind"] == "jax":
            keep(results, folder, one, found[one["name"]], timed=True)
    if absent:
        return
    left = QUICK_SECONDS - (time.perf_counter() - start)
    if left < 5:
        results["skipped"]["PEFT + torch"] = f"the {QUICK_SECONDS:.0f} s were spent"
        return
    suite.progress("tiny: torch")
    jobs = [job("torch", "tiny", way, f"torch-{i}") for i, way in enumerate(TORCH)]
    found = spawn(jobs, folder, not gpu, left / 2, 4 * left)
    for one in jobs:
        keep(results, folder, one, found[one["name"]], timed=True)


def run_stages(results: dict[str, Any], folder: Path, absent: dict[str, str], start: float) -> None:
    """The stages one after the other; each way in a process of its own."""
    end = start + SECONDS
    suite.progress("checks on the CPU")
    found = spawn(checks(quick=False), folder, True, 60, 90)
    results["check"], results["rounding"] = found["check"], found["rounding"]
    for stage in STAGES:
        stop = min(time.perf_counter() + stage.seconds, end)
        for way in stage.ways:
            if way in TORCH and absent:
                continue
            left = stop - time.perf_counter()
            if left < least(results, stage.case, way):
                spent = "the time of the stage" if stop < end else f"{SECONDS:.0f} s, the time of all"
                results["skipped"][f"{stage.name}: {way}"] = f"{spent} is spent"
                continue
            suite.progress(f"{stage.name}: {way}")
            name = re.sub(r"\W+", "-", f"{stage.name} {way}")
            one = job("torch" if way in TORCH else "jax", stage.case, way, name, profile=stage.profile)
            keep(results, folder, one, spawn([one], folder, False, left, left)[name], timed=not stage.profile)


def least(results: dict[str, Any], case: str, way: str) -> float:
    """Seconds a way can be expected to take: as last time, or as the least that any process takes to start and compile."""
    rounds = results["ways"].get(case, {}).get(way, {"rounds": []})["rounds"]
    return min((one["seconds in all"] for one in rounds if "seconds in all" in one), default=20.0)


def keep(results: dict[str, Any], folder: Path, one: dict[str, Any], found: dict[str, Any], timed: bool) -> None:
    """Files what a job found, and what its program and its trace tell."""
    case, way = one["case"], one["way"]
    if timed:
        results["ways"].setdefault(case, {}).setdefault(way, {"rounds": []})["rounds"].append(found)
    elif "step" not in found:
        results["skipped"][f"profile of {case}: {way}"] = why_not(found)
    text = folder / f"{one['name']}.hlo"
    if not text.exists():
        return
    program = Program(text.read_text())
    results["kernels"].setdefault(case, {})[way] = program.products_in_loops()
    traces = sorted((folder / f"{one['name']}.trace").glob("**/*.xplane.pb"))
    if one["profile"] and traces:
        found = profile(traces[-1], program, one["profile"])
        if any(kind["kernels"] for kind in found.values()):
            results["profile"].setdefault(case, {})[way] = found
        else:  # without CUPTI, or the right to use it
            results["skipped"][f"profile of {case}: {way}"] = "the trace shows no kernel of the device"


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
