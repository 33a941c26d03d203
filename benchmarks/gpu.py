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
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# The card belongs to the processes that measure; this one only asks what it is.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from benchmarks import gpu_ways, suite
from benchmarks.gpu_ways import COMPILED, EAGER, FLOOR, FORMED, FULL, HAND, JLORA, NAIVE, ON_A, RANK, SHARED

TITLE = "One training step on one GPU: jlora, LoRA by hand, full fine-tuning, PEFT + torch"
TORCH = (EAGER, COMPILED)
MAIN = (JLORA, HAND, NAIVE, FULL, FLOOR, *TORCH)
VARIANTS = (SHARED, FORMED, ON_A)
# Dense bf16 flops a second by the name that the driver gives the card; the PCIe and NVL kinds of an H100 have others.
PEAK = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}


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
QUICK = (JLORA, HAND, FLOOR, FULL, NAIVE, *VARIANTS)
REQUIRED = (JLORA, HAND, "check")  # what the claims are about
TOLERANCE = 1e-4  # on gradients in fp32, relative: rounding in other orders of summation


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
        # The times mean little, and compiling is most of what it takes.
        fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        return env | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{env.get('XLA_FLAGS', '')} {fast}"}
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
            [sys.executable, "-m", "benchmarks.gpu_ways", str(spec)],
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


# --- What a compiled program and its trace tell -----------------------------------------------------------------------

BASE, THIN, BOTH = "products of the base", "thin products", "base and thin in one kernel"
KINDS = (BASE, THIN, BOTH, "attention", "head and loss", "optimiser", "elementwise and the rest", "of no operation")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_SHAPE = re.compile(r"\b[a-z]+\d+\w*\[([\d,]*)\]")
_PRODUCT = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul|cublas)')
_CONTROL = ("while", "call", "conditional", "async-start", "async-update", "async-done")


class Instruction(NamedTuple):
    """One of a compiled program: the dimensions of its results, and the rest of its line."""

    shapes: list[tuple[int, ...]]
    opcode: str
    rest: str


class Program:
    """The text of a compiled program, taken apart."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = self.computations.setdefault(found[1], {})
            elif found := _INSTRUCTION.match(line):
                shapes = [tuple(int(n) for n in dims.split(",") if n) for dims in _SHAPE.findall(found[2])]
                current[found[1]] = Instruction(shapes, found[3], found[4])
        self.home = {name: of for of, inside in self.computations.items() for name in inside}

    def called(self, one: Instruction, attribute: str = r"\w+") -> list[str]:
        """The computations that an instruction names in attributes of that name."""
        names = re.findall(rf"\b{attribute}=\{{?%?([\w.\-]+)", one.rest)
        return [name for name in names if name in self.computations]

    def products(self, of: str, one: Instruction) -> list[bool]:
        """For each product of matrices in an instruction of computation ``of``, whether the rank is one of its sides."""
        if one.opcode == "fusion":
            return [
                thin for name in self.called(one, "calls") for inner in self.computations[name].values()
                for thin in self.products(name, inner)
            ]  # fmt: skip
        if one.opcode != "dot" and not (one.opcode == "custom-call" and _PRODUCT.search(one.rest)):
            return []
        operands = [self.computations[of].get(name) for name in re.findall(r"[\w.\-]+", one.rest.split("), ")[0])]
        shapes = one.shapes + [shape for x in operands if x is not None for shape in x.shapes]
        # Of a stack the first axis counts layers; one product for several factors has a multiple of the rank.
        sides = {n for shape in shapes if len(shape) > 1 for n in shape[-2:]}
        return [bool(sides & {RANK, 2 * RANK, 3 * RANK})]

    def kind(self, name: str) -> str:
        """What an instruction is for, by the scopes the model gives names to and by the sizes of its products."""
        of = self.home[name]
        one = self.computations[of][name]
        found = re.search(r'op_name="([^"]*)"', one.rest)
        scope = found[1] if found else ""
        if "fmha" in one.rest:
            return "attention"
        for word, kind in (("optimiser", "optimiser"), ("attention", "attention"), ("head", "head and loss")):
            if re.search(rf"\b{word}\b", scope):
                return kind
        thin = self.products(of, one)
        if not thin:
            return "elementwise and the rest"
        return THIN if all(thin) else BOTH if any(thin) else BASE

    def products_in_loops(self) -> dict[str, int]:
        """How many instructions of each kind that multiplies the bodies of loops have: what one layer takes, forward and back."""
        instructions = [one for inside in self.computations.values() for one in inside.values()]
        todo = [name for one in instructions if one.opcode == "while" for name in self.called(one, "body")]
        seen: list[str] = []
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.append(name)
                todo += [
                    n for one in self.computations[name].values() if one.opcode in _CONTROL for n in self.called(one)
                ]
        found = Counter(self.kind(name) for of in seen for name in self.computations[of])
        return {kind: found[kind] for kind in (BASE, THIN, BOTH)}


def events(trace: Path) -> Iterator[Any]:
    """What ran on the device: of a GPU its streams, of a CPU the threads of XLA."""
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    threads = [plane for plane in planes if plane.name == "/host:CPU" and jax.default_backend() == "cpu"]
    for plane in devices or threads:
        for line in plane.lines:
            if not devices or line.name.startswith(
                "Stream"
            ):  # other lines of a device repeat these by operation or module
                yield from line.events


def profile(trace: Path, program: Program, steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds of the device and kernels of a step, by what they are for."""
    found = {kind: {"ms": 0.0, "kernels": 0.0} for kind in KINDS}
    for event in events(trace):
        name = dict(event.stats).get("hlo_op")
        if name is None and event.name.startswith(("Memcpy", "Memset")):
            kind = "of no operation"
        elif name is None:
            continue
        elif name not in program.home:
            kind = "of no operation"
        elif program.computations[program.home[name]][name].opcode in _CONTROL:
            continue  # its body is there too
        else:
            kind = program.kind(name)
        found[kind]["ms"] += event.duration_ns / 1e6 / steps
        found[kind]["kernels"] += 1 / steps
    return found


# --- Reading ----------------------------------------------------------------------------------------------------------


def model_flops(case: gpu_ways.Case, way: str) -> float:
    """Flops that a step needs, without what it computes twice: the products of the model, of causal attention the half that counts."""
    s, tokens = case.shape, case.batch * case.length
    sides = gpu_ways.kernels(s).values()
    dense = 2 * tokens * (s.layers * sum(d * k for d, k in sides) + s.width * s.vocab)
    attention = 2 * s.layers * tokens * case.length * s.heads * s.head_dim
    thin = 2 * tokens * s.layers * RANK * sum(d + k for d, k in sides)
    # Backward each product costs once for its activations and once for its weight.
    return (3 if way == FULL else 2) * dense + 3 * attention + (0 if way in (FULL, FLOOR) else 3 * thin)


def why_not(found: dict[str, Any]) -> str:
    """Why a way has no times."""
    return next(
        (f"{key}: {found[key]}" for key in ("does not fit", "failed", "skipped") if key in found), "not measured"
    )


def first(way: dict[str, Any]) -> dict[str, Any]:
    """The first round of a way that has times, else the first."""
    return next((one for one in way["rounds"] if "step" in one), way["rounds"][0])


def medians(way: dict[str, Any]) -> list[float]:
    """The median step of each round that has times."""
    return [statistics.median(one["step"]) for one in way["rounds"] if "step" in one]


def over(way: dict[str, Any], other: dict[str, Any] | None, of: Any) -> str:
    """A figure of one way over that of another, if both have it."""
    x, y = (of(one) if one else None for one in (way, other))
    return f"{x / y:.3f}" if x and y else "-"


def gib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**30:.2f}"


def steps_table(results: dict[str, Any], case: str) -> suite.Table:
    """What a step of each way takes."""
    ways, sizes = results["ways"][case], gpu_ways.CASES[case]
    rows, notes, unknown = [], [], set()
    for name, way in ways.items():
        found, times = first(way), [x for one in way["rounds"] for x in one.get("step", [])]
        known = [f"{found['trained'] / 1e6:.2f}" if "trained" in found else "-", str(found.get("created", "-"))]
        memory = [gib(found.get("peak")), gib(found.get("temporaries"))]
        if not times:
            rows.append([name, *["-"] * 6, *memory, *known])
            notes.append(f"{name}: {why_not(found)}")
            continue
        low, middle, high = statistics.quantiles(times, n=4)
        device = found["device"]
        unknown |= {device} - set(PEAK)
        used = f"{100 * model_flops(sizes, name) / middle / PEAK[device]:.1f}" if device in PEAK else "-"
        speed = f"{sizes.batch * sizes.length / middle:,.0f}"
        against = over(way, ways.get(HAND), lambda one: statistics.median(medians(one) or [0]))
        if found.get("peak") and found["peak"] == found.get("peak before the first step"):
            notes.append(f"{name}: the peak is that of making the weights, a step's is lower")
        if "graphs" in found:
            notes.append(f"{name}: by {found['backend']}; {found['graphs']} graphs, 2 if all blocks share one")
        if not all(map(math.isfinite, found["losses"])):
            notes.append(f"{name}: the loss is not finite")
        spread, rounds = f"{1e3 * low:.1f} - {1e3 * high:.1f}", str(len(medians(way)))
        rows.append([name, f"{1e3 * middle:.1f}", spread, against, speed, used, rounds, *memory, *known])
    notes += [f"no MFU: no peak is known of {device}" for device in sorted(unknown)]
    attention = {first(way)["attention"] for way in ways.values() if "attention" in first(way)}
    notes.append(
        f"{sizes.batch} x {sizes.length} tokens; attention in JAX: {'; '.join(sorted(attention))}, in torch: sdpa"
    )
    times_header = ["step ms", "middle half", "/ by hand", "tokens/s", "MFU %", "rounds"]
    header = ["", *times_header, "peak GiB", "temporaries GiB", "trained M", "created"]
    return suite.Table(f"{case}: a training step", header, rows, "\n".join(notes))


def drift_table(results: dict[str, Any], case: str) -> suite.Table | None:
    """Medians of each round, if there was more than one."""
    ways = {name: medians(way) for name, way in results["ways"][case].items()}
    most = max(map(len, ways.values()))
    if most < 2:
        return None
    rows = [[name, *(f"{1e3 * x:.1f}" for x in times), *["-"] * (most - len(times))] for name, times in ways.items()]
    return suite.Table(
        f"{case}: median ms of each round of processes", ["", *(f"round {i + 1}" for i in range(most))], rows
    )


def counts_table(results: dict[str, Any], case: str) -> suite.Table:
    """Counts, relative to LoRA by hand."""
    ways, products = results["ways"][case], results["kernels"].get(case, {})
    hand, rows = ways.get(HAND), []
    for name, way in ways.items():
        if "dots" in first(way):
            ratios = [
                over(way, hand, lambda one, key=key: first(one).get(key)) for key in ("dots", "flops", "temporaries")
            ]
            rows.append([name, *ratios, *(str(products.get(name, {}).get(kind, "-")) for kind in (BASE, THIN, BOTH))])
    ratios_header = [f"{what} / by hand" for what in ("flops of products", "flops as XLA counts", "temporaries")]
    header = ["", *ratios_header, "base", "thin", "both in one"]
    note = (
        "The last three: kernels that multiply, in the loops over layers, forward, recomputed and back; attention apart.\n"
        "XLA counts the body of a loop once."
    )
    return suite.Table(f"{case}: what XLA makes of it", header, rows, note)


def profile_table(results: dict[str, Any], case: str) -> suite.Table:
    """Where the time goes: what a way has above the floor is the adapter's."""
    ways = results["profile"][case]
    rows = [
        [kind, *(f"{way[kind]['ms']:.2f} ({way[kind]['kernels']:.0f})" for way in ways.values())]
        for kind in KINDS
        if any(way[kind]["kernels"] for way in ways.values())
    ]
    rows.append(["together", *(f"{sum(x['ms'] for x in way.values()):.2f}" for way in ways.values())])
    note = "What a way has above the floor is the adapter's. Traced with kernels launched one by one; on a CPU, threads overlap."
    return suite.Table(f"{case}: ms of the device a step (kernels)", ["", *ways], rows, note)


def rounding_table(results: dict[str, Any]) -> suite.Table:
    rows = [
        [share, name, f"{x['error']:.2e}", f"{x['slope']:.3f}"]
        for share, found in results["rounding"].items()
        if isinstance(found, dict)
        for name, x in found.items()
    ]
    note = "Slope: what the update changes in the output over what it should; 1 if it arrives whole. Against products in fp64."
    return suite.Table("What rounding to bf16 leaves of an update", ["|s·A·B| / |W|", "", "error", "slope"], rows, note)


def tables(results: dict[str, Any]) -> list[suite.Table]:
    """Rounding and profile first, the steps last."""
    measured = any(isinstance(found, dict) for found in results["rounding"].values())
    shown: list[suite.Table | None] = [rounding_table(results)] if measured else []
    cases = results["ways"]
    shown += [profile_table(results, case) for case in results["profile"]]
    shown += [drift_table(results, case) for case in cases]
    shown += [counts_table(results, case) for case in cases]
    shown += [steps_table(results, case) for case in cases]
    found = [table for table in shown if table is not None]
    skipped = [f"skipped: {name}: {why}" for name, why in results["skipped"].items()]
    return [*found[:-1], found[-1]._replace(note="\n".join([found[-1].note, *skipped]))]


def claims(results: dict[str, Any]) -> list[suite.Claim]:
    """What README says of jlora beside LoRA by hand, for every case that ran, and that both compute the same."""
    worst = results["check"].get(JLORA)
    measured = f"{worst:.1e}" if worst is not None else why_not(results["check"])
    made = [
        suite.Claim("jlora's gradients are those of LoRA by hand", worst is not None and worst <= TOLERANCE, measured)
    ]
    for case, ways in results["ways"].items():
        jlora, hand = (first(ways[name]) if name in ways else {"skipped": "no time"} for name in (JLORA, HAND))
        if "skipped" in jlora or "skipped" in hand:
            continue  # the tables say so; a claim does not fail for want of time
        for key, label, limit in (("dots", "flops of products", 1.01), ("temporaries", "temporaries", 1.02)):
            text = f"{case}: jlora takes no more {label} than LoRA by hand, within {limit - 1:.0%}"
            if key in jlora and key in hand:
                ratio = jlora[key] / hand[key]
                made.append(suite.Claim(text, ratio <= limit, f"{ratio:.4f}"))
            else:
                made.append(suite.Claim(text, False, f"jlora {why_not(jlora)}; by hand {why_not(hand)}"))
        if jlora.get("flops") and hand.get("flops"):
            ratio = jlora["flops"] / hand["flops"]
            made.append(suite.Claim(f"{case}: nor more flops as XLA counts them", ratio <= 1.01, f"{ratio:.4f}"))
        count = jlora.get("created")
        text = f"{case}: jlora's gradient makes no array of a kernel's shape"
        made.append(suite.Claim(text, count == 0, why_not(jlora) if count is None else str(count)))
    if len(made) == 1:
        made.append(suite.Claim("jlora and LoRA by hand were measured", False, "neither case came to it in its time"))
    return made


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
