"""One training step of five models, as it is done without jlora, with it, and by other libraries.

    python -m benchmarks.step [--quick] [--only MODEL] [--out step.json]

Forward, backward and Adam in fp32, rank 8 on every linear map but embedding and classifier. All ways in JAX share one base and one batch;
those that adapt share the factors too, and their gradients are compared before anything is timed. The floor is the gradient to the first
activations with the base frozen: what is left if adapters and their optimiser cost nothing. It is a mark, not a bound: an adapter does
not need the gradient to the input of its own first layer.
PEFT runs transformers' own models of the same shapes on torch, which has floors of its own, so that one sees what is the adapter and what
is the base. Times are taken in turns, warm-up apart. A way that a model's layers do not fit is left out there: nnx.LoRA has no
convolutions. "created" counts values of a kernel's shape in the traced program, in either order of its axes, views among them.
"""

import os
import statistics
import sys
import time
from functools import partial
from typing import Any

import jax
import numpy as np

import jlora
from benchmarks import measure, models, suite, ways
from benchmarks.ways import BEST, FLOOR, FLOORS, FULL, HAND

TITLE = "One training step, next to every other way"
TOLERANCE = 2e-3  # on gradients, relative: rounding of fp32 in other orders of summation, most of all in convolutions
PEERS = ("torch", "peft", "transformers", "qwix")
JLORA = "jlora"
CLAIMED = (FULL, HAND, BEST, JLORA, FLOOR)


def run(quick: bool, only: str = "") -> dict[str, Any]:
    """Everything that is measured, raw, by model and way."""
    rounds, repeats = (3, 1) if quick else (15, 3)
    missing, found = suite.missing(PEERS), {}
    every = models.models(quick)
    names = suite.chosen([model.name for model in every], only)
    for model in every:
        if model.name in names:
            torch = not missing.keys() & set(PEERS[:3])
            few = quick and bool(found)  # peers are tried on the first model
            found[model.name], unfit = one(model, rounds, repeats, torch and not few, few)
            missing |= {f"{name}, {model.name}": why for name, why in unfit.items() if name not in missing}
    return {"rank": ways.RANK, "jlora": jlora.__version__, "models": found, "missing": missing}


def one(
    model: models.Model, rounds: int, repeats: int, torch: bool, few: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """The measurements of one model, and the ways that do not fit it; ``few``: only what is claimed."""
    s = ways.setup(model)
    found, unfit = ways.ways(s, peers=not few)
    found = {name: way for name, way in found.items() if name in CLAIMED or not few}
    programs = {name: ways.step(way, name) for name, way in found.items()}
    results: dict[str, Any] = {name: {"trace": [], "lower": [], "compile": []} for name in found}
    compiled = {}
    for _ in range(repeats):
        for name, (fn, args) in programs.items():
            suite.progress(f"{model.name}: compiling {name}")
            seconds, compiled[name] = measure.stages(fn, (*args, s.labels))
            for stage, value in seconds.items():
                results[name][stage].append(value)
    suite.progress(f"{model.name}: comparing gradients")
    worst = check(found, s)
    runs: dict[str, Any] = {name: partial(compiled[name], *args, s.labels) for name, (_, args) in programs.items()}
    for name, (fn, args) in programs.items():
        start = time.perf_counter()
        jax.block_until_ready(runs[name]())
        results[name] |= {
            "first": time.perf_counter() - start,
            "flops": measure.flops(compiled[name]),
            **measure.memory(compiled[name]),
            "created": measure.created(fn, (*args, s.labels), s.kernels),
            "trained": sum(x.size for x in jax.tree.leaves(found[name].trained)),
        }
    if torch:
        runs |= _torch(model, s, results)
    suite.progress(f"{model.name}: {rounds} rounds of {len(runs)} ways")
    for name, samples in measure.in_turns(runs, rounds).items():
        results[name]["step"] = samples
    size = sum(x.size for x in jax.tree.leaves(s.params))
    about = {"about": model.about, "parameters": size, "kernels": len(s.lora), "worst difference of gradients": worst}
    return about | {"ways": results}, unfit


def _torch(model: models.Model, s: ways.Setup, results: dict[str, Any]) -> dict[str, Any]:
    """Steps of PEFT, after their first run, which ``torch.compile`` compiles in."""
    import torch

    from benchmarks import peft_torch

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    runs = {}
    for name, (step, sizes) in peft_torch.ways(model, np.asarray(s.x), np.asarray(s.labels)).items():
        suite.progress(f"{model.name}: first step of {name}")
        ours = {"parameters": sum(x.size for x in jax.tree.leaves(s.params)), "trained": results[JLORA]["trained"]}
        if sizes["parameters"] != ours["parameters"] or sizes["trained"] not in (0, ours["trained"]):
            raise AssertionError(f"{name} adapts another model than the rest: {sizes}, not {ours}")
        start = time.perf_counter()
        step()
        results[name] = {"trained": sizes["trained"], "first": time.perf_counter() - start}
        runs[name] = step
    return runs


def check(found: dict[str, ways.Way], s: ways.Setup) -> float:
    """The largest relative difference of gradients that should be the same; raises if it is more than rounding."""
    grads = {
        name: way.factors(jax.jit(jax.grad(ways.loss(way)))(way.trained, way.rest, way.x, s.labels))
        for name, way in found.items()
        if way.factors
    }
    worst = {name: measure.relative_difference(g, {k: grads[HAND][k] for k in g}) for name, g in grads.items()}
    if max(worst.values()) > TOLERANCE:
        raise AssertionError(f"The ways disagree about the gradient, so their costs cannot be compared: {worst}")
    return max(worst.values())


def held(way: dict[str, Any]) -> int:
    """Bytes of temporaries and results together: XLA keeps temporaries in the room of results that are not made yet."""
    return way["temporaries"] + way["results"]


def tables(results: dict[str, Any]) -> list[suite.Table]:
    """A table for each model: times as ratios to full fine-tuning and to the floor, round by round."""
    found = []
    for name, model in results["models"].items():
        all_ways, rows = model["ways"], []
        for way, r in all_ways.items():
            below = way if way in FLOORS.values() else FLOORS.get(way, FLOOR)
            full, floor = (suite.ratios(r["step"], all_ways[other]["step"]) for other in (FULL, below))
            counts = ["-"] * 5
            if "flops" in r:
                compiling = (
                    statistics.median(map(sum, zip(*(r[k] for k in keys), strict=True)))
                    for keys in (("trace", "lower"), ("compile",))
                )
                base = all_ways[FULL]
                counts = [
                    f"{r['flops'] / base['flops']:.2f}",
                    f"{held(r) / held(base):.2f}",
                    str(r["created"]),
                    *(f"{x:.2f}" for x in compiling),
                ]
            first = sum(statistics.median(r[k]) for k in ("trace", "lower", "compile") if k in r) + r["first"]
            trained = "-" if way == below else f"{r['trained']:,}"
            spread = f"{full[1]:.2f} ({full[0]:.2f}-{full[2]:.2f})"
            rows.append(
                [
                    way,
                    trained,
                    f"{1e3 * statistics.median(r['step']):.1f}",
                    spread,
                    f"{floor[1]:.2f}",
                    *counts,
                    f"{first:.2f}",
                ]
            )
        header = [
            "",
            "trained",
            "step, ms",
            "/ full (quartiles)",
            "/ its floor",
            "flops / full",
            "memory / full",
            "created",
            "trace+lower, s",
            "compile, s",
            "first step, s",
        ]
        about = f"{name}: {model['about']}, {model['parameters']:,} parameters, rank {results['rank']} on {model['kernels']} kernels"
        note = (
            "memory: temporaries and results; created: arrays of a kernel's shape that the step computes; the gradients differ by "
            f"{model['worst difference of gradients']:.0e} at most"
        )
        found.append(suite.Table(about, header, rows, note))
    return found


def claims(results: dict[str, Any]) -> list[suite.Claim]:
    """What README says of a step, in counts."""
    found = []
    for name, model in results["models"].items():
        r = model["ways"]
        ours, hand = r[JLORA], r.get(BEST, r[HAND])
        flops, memory = ours["flops"] / hand["flops"], held(ours) / held(hand)
        found += [
            suite.Claim(f"{name}: as few flops as LoRA written by hand", flops <= 1.01, f"{flops:.3f}"),
            suite.Claim(f"{name}: no more memory than LoRA written by hand", memory <= 1.02, f"{memory:.3f}"),
            suite.Claim(
                f"{name}: no array of a kernel's shape that the floor has not",
                ours["created"] <= r[FLOOR]["created"],
                f"{ours['created']}, floor {r[FLOOR]['created']}",
            ),
            suite.Claim(
                f"{name}: fewer flops than full fine-tuning",
                ours["flops"] < r[FULL]["flops"],
                f"{ours['flops'] / r[FULL]['flops']:.2f}",
            ),
        ]
    return found


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
