"""What a person reads of ``benchmarks.gpu``, and what it claims."""

import math
import statistics
from typing import Any

from benchmarks import gpu_ways, suite
from benchmarks.gpu_program import BASE, BOTH, KINDS, THIN
from benchmarks.gpu_ways import FLOOR, FULL, HAND, JLORA, RANK

# Dense bf16 flops a second by the name that the driver gives the card; the PCIe and NVL kinds of an H100 have others.
PEAK = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}
TOLERANCE = 1e-4  # on gradients in fp32, relative: rounding in other orders of summation


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
    times_header = ["step ms", "quartiles", "/ by hand", "tokens/s", "MFU %", "rounds"]
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
