"""Writes the benchmarks' part of README, ``docs/benchmarks.md`` and its pictures from the committed results; measures nothing.

    python -m benchmarks.report [--check]

With ``--check`` nothing is written, and it fails if the pages say anything else than the results.
"""

import argparse
import collections
import importlib
import json
import re
from pathlib import Path
from typing import Any

from benchmarks import measure, suite
from benchmarks.__main__ import NAMES
from benchmarks.pictures import FIGURES
from benchmarks.suite import ROOT

RESULTS, README, PAGE = ROOT / "benchmarks" / "results", ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
PICTURES = ROOT / "docs" / "benchmarks"
MARKS = ("<!-- benchmarks -->", "<!-- /benchmarks -->")


def latest(name: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest committed results of a benchmark."""
    files = sorted(RESULTS.glob(f"{name}-*.json"), key=lambda path: path.stem[-10:])
    return (files[-1], json.loads(files[-1].read_text())) if files else None


def machine(results: dict[str, Any]) -> str:
    """Where, when and with what: a figure means nothing without."""
    kinds = collections.Counter(results["machine"]["devices"])  # earlier results list every device
    # What is only compiled runs nowhere: the devices that stand in for its target tell nothing.
    devices = results.get("target") or ", ".join(f"{n} x {kind}" if n > 1 else kind for kind, n in kinds.items())
    kept = {k: v for k, v in results["versions"].items() if k in ("jax", "flax", "torch", "peft", "qwix", "libtpu")}
    versions = ", ".join(f"{name} {version}" for name, version in kept.items())
    load = results.get("load before")
    busy = f" (load {load:.1f} before)" if load is not None else ""
    cpu = f"{results['machine']['cores']} cores of {results['machine']['cpu']}{busy}"
    return f"{results['date'][:10]}, {cpu}, device: {devices}; {versions}"


# --- README -----------------------------------------------------------------------------------------------------------


def readme(path: Path, results: dict[str, Any]) -> str:
    """The table of a training step: time relative to full fine-tuning for every model, counts for the first."""
    step = importlib.import_module("benchmarks.step")
    names = list(results["models"])
    first = results["models"][names[0]]["ways"]
    ways = list(dict.fromkeys(way for model in results["models"].values() for way in model["ways"]))
    rows = []
    for way in ways:
        cells = []
        for name in names:
            here = results["models"][name]["ways"]
            cells.append(f"{suite.ratios(here[way]['step'], here[step.FULL]['step'])[1]:.2f}" if way in here else "-")
        counts = ["-", "-"]
        if "flops" in first[way]:
            counts = [f"{first[way]['flops'] / first[step.FULL]['flops']:.2f}", str(first[way]["created"])]
        bold = (lambda x: f"**{x}**") if way == step.JLORA else str
        rows.append([bold(x) for x in (way, *cells, *counts)])
    header = ["", *names, "flops", "arrays of a kernel's size"]
    sizes = "; ".join(f"{name}: {model['about']}" for name, model in results["models"].items())
    missing = "".join(f" Missing: {name} ({why})." for name, why in results["missing"].items() if "," not in name)
    return (
        f"{measure.markdown(header, rows)}\n\n"
        f"One training step (forward, backward, Adam; fp32; rank {results['rank']}), time relative to full fine-tuning in the same run; "
        f"flops, and arrays of a kernel's size that the step computes (views count too), of the {names[0]}. {sizes}.{missing}\n\n"
        f"{above_floors(step, results['models'])}\n\nMeasured {machine(results)}; "
        f"`python -m benchmarks --only step` reproduces it ([samples]({path.relative_to(ROOT)})). [All benchmarks](docs/benchmarks.md).\n"
    )


def above_floors(step: Any, models: dict[str, Any]) -> str:
    """What an adapter adds to its base, in each framework."""
    pairs = {step.JLORA: step.FLOOR} | step.FLOORS
    found = {
        way: [suite.ratios(m["ways"][way]["step"], m["ways"][floor]["step"])[1] for m in models.values()]
        for way, floor in pairs.items()
        if all(way in m["ways"] for m in models.values())
    }
    said = "; ".join(f"{way} {', '.join(f'{x:.2f}' for x in ratios)}" for way, ratios in found.items())
    text = (
        "A floor is the frozen base alone, the gradient to its first activations: what an adapter costs is what a step takes above the "
        f"floor of its own framework. Times that floor, model by model: {said}."
    )
    if all(ours <= x for ratios in found.values() for ours, x in zip(found[step.JLORA], ratios, strict=True)):
        text += " Where PEFT is ahead, it is torch's base that is."
    return text


def within(text: str, marks: tuple[str, str], content: str) -> str:
    """``text`` with ``content`` between the marks."""
    pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise SystemExit(f"There must be one {marks[0]} with its end.")
    return pattern.sub(lambda _: f"{marks[0]}\n{content}{marks[1]}", text)


# --- docs/benchmarks.md -----------------------------------------------------------------------------------------------

INTRODUCTION = """# Benchmarks

Every figure is from one run of one script in [`benchmarks/`](../benchmarks), with its raw samples in
[`benchmarks/results/`](../benchmarks/results); times are medians of interleaved runs, meant as ratios. `python -m benchmarks` measures
all, in an hour or two on two cores; `--quick` checks in two minutes, on small sizes and fewer models, what README and these pages
claim in counts; `python -m benchmarks.report` writes this page. `pip install -e ".[demo]" -r benchmarks/requirements.txt` brings what they
run on and compare with; what is missing is named. `quality` fetches a model and reviews. Of the benchmark for GPUs there are no
results yet.

A ratio of times is the median of the ratios round by round, which is not the ratio of the medians beside it; quartiles are those of
the same ratios.
"""


def page() -> str:
    parts = [INTRODUCTION]
    for name in NAMES:
        found = latest(name)
        if found is None:
            continue
        path, results = found
        module = importlib.import_module(f"benchmarks.{name}")
        parts.append(f"## {module.TITLE}\n\n{about(module)}\n")
        if name in FIGURES:
            parts.append(f"![{module.TITLE}](benchmarks/{name}.png)\n")
        for table in module.tables(results):
            note = f"\n\n{table.note}" if table.note else ""
            parts.append(f"**{table.title}**\n\n{measure.markdown(table.header, table.rows)}{note}\n")
        gone = [f"Missing: {name} ({why})." for name, why in results.get("missing", {}).items()]
        source = f"`python -m benchmarks.{name}`, {machine(results)} ([samples](../{path.relative_to(ROOT)}))."
        parts.append("\n".join([*gone, source]) + "\n")
    return "\n".join(parts)


def about(module: Any) -> str:
    """The module's docstring without its first line, and without the command."""
    paragraphs = module.__doc__.strip().split("\n\n")
    return "\n\n".join([paragraphs[0], *(p.strip() for p in paragraphs[1:] if not p.startswith("    python -m"))])


# --- The command ------------------------------------------------------------------------------------------------------


def draw() -> None:
    """Draws the pictures into ``docs/benchmarks/``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    PICTURES.mkdir(exist_ok=True)
    for name, make in FIGURES.items():
        found = latest(name)
        if found is not None:
            figure = make(plt, found[1])
            figure.savefig(PICTURES / f"{name}.png", dpi=120, metadata={"Software": None})
            plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the pages say something else")
    args = parser.parse_args(argv)
    found = latest("step")
    if found is None:
        raise SystemExit(
            "There are no results of the step yet: python -m benchmarks --only step --out benchmarks/results"
        )
    wanted = {README: within(README.read_text(), MARKS, readme(*found)), PAGE: page()}
    if args.check:
        stale = [
            path.relative_to(ROOT) for path, text in wanted.items() if not path.exists() or path.read_text() != text
        ]
        if stale:
            raise SystemExit(
                f"Not what the results say: {', '.join(map(str, stale))}. Run python -m benchmarks.report."
            )
        print("README and docs/benchmarks.md say what the results say.")
        return
    draw()
    for path, text in wanted.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
