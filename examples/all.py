"""Runs every example and writes the table of README from what they measured.

    python examples/all.py                   # each in full, one after another; keeps results and rewrites the table
    python examples/all.py --only moe        # some of them
    python examples/all.py --quick           # each in its quick mode; keeps nothing, fails if one fails
    python examples/all.py --table           # only rewrites the table, from examples/results
    python examples/all.py --check           # fails if README does not hold that table

A method's role follows from its name: the adapter is the first that starts with "LoRA", full fine-tuning the first that starts so, and the
base is "base", else the "linear probe" on it, else the first. Needs nothing but Python itself; the examples need the ``demo`` extra.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- families -->", "<!-- /families -->"
# In the order of the table, and what it calls them.
FAMILIES = {
    "text_classification": "Text classification",
    "forgetting": "Causal language model",
    "vision_transformer": "Vision transformer",
    "diffusion": "Diffusion",
    "speech": "Speech",
    "recommendation": "Recommendation",
    "captioning": "Image captioning",
    "moe": "Mixture of experts",
    "swapping": "Many adapters, one base",
}
COLUMNS = ("family", "model and data", "metric", "base", "LoRA", "full", "trained, LoRA / full", "time", "memory")


class Stop(Exception):
    """Ends the program with a message."""


# Running


def measure(name: str, file: Path, out: Path, quick: bool) -> dict | None:
    """Runs an example in a process of its own, and says how it went.

    Returns:
        What it wrote into ``results.json``, with its environment and wall time; ``None`` if it failed.
    """
    written = out / name / "results.json"
    written.unlink(missing_ok=True)  # so that an earlier run's is never taken for this one's
    print(f"{name:<22}", end="" if quick else "\n", flush=True)
    about = {} if quick else environment()
    command = [sys.executable, str(file), "--out", str(out / name), *["--quick"] * quick]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quick else {}
    start = time.perf_counter()
    # errors="replace": what a dying program prints may end in the middle of a character.
    child = subprocess.run(command, cwd=ROOT, text=True, errors="replace", **streams)
    seconds = time.perf_counter() - start
    passed = child.returncode == 0 and written.exists()
    print(f"{'passed' if passed else 'failed'} in {seconds:.0f} s", flush=True)
    if passed:
        return json.loads(written.read_text(encoding="utf-8")) | about | {"wall_seconds": round(seconds, 1)}
    print(child.stdout or "", end="")
    print(f"{name}: exit code {child.returncode}, {'a' if written.exists() else 'no'} results.json", flush=True)
    return None


def environment() -> dict[str, Any]:
    """Date, machine and versions; asked in another process, since this one must not hold an accelerator the examples need."""
    code = "import json, benchmarks.measure as m; print(json.dumps(m.environment()))"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(child.stdout)


# The table


def roles(rows: Sequence[dict]) -> tuple[dict, dict, dict | None]:
    """The rows of the base, the adapter and full fine-tuning, the last of which may be missing."""

    def first(prefix: str) -> dict | None:
        return next((row for row in rows if row["method"].lower().startswith(prefix)), None)

    adapter = first("lora")
    if adapter is None or adapter is rows[0]:
        methods = ", ".join(repr(row["method"]) for row in rows)
        raise Stop(f"A method must start with 'LoRA', and not be the first.\n  got: {methods}")
    return first("base") or first("linear probe") or rows[0], adapter, first("full fine-tuning")


def cells(name: str, result: dict) -> list[str]:
    """One line of the table, as ``COLUMNS``."""
    base, adapter, full = roles(result["rows"])
    metric = next(iter(base["values"]))
    arrow = "↓" if result["lower_is_better"] else "↑"
    values = [value(row, metric) if row else "-" for row in (base, adapter, full)]
    if base["method"] != "base":
        values[0] += f" ({base['method']})"
    trained, ratios = count(adapter["trained"]), ["-", "-"]
    if full:
        trained += f" / {count(full['trained'])} ({adapter['trained'] / full['trained']:.1%})"
        ratios = [f"{adapter[cost] / full[cost]:.2f}" for cost in ("seconds", "peak_bytes")]
    return [FAMILIES.get(name, name), result["about"], f"{metric} {arrow}", *values, trained, *ratios]


def value(row: dict, metric: str) -> str:
    """A metric, and its standard error where there is one."""
    spread = row["spread"].get(metric)
    return number(row["values"][metric]) + (f" ± {number(spread)}" if spread is not None else "")


def number(x: float) -> str:
    """Three or four digits that matter, as the examples print them."""
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"


def count(n: int) -> str:
    """A number of parameters in three digits: 852, 73.7k, 2.44M."""
    rounded = float(f"{n:.3g}")
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if rounded >= size:
            return f"{rounded / size:.{3 - len(str(int(rounded / size)))}f}{letter}"
    return str(n)


def markdown(results: dict[str, dict]) -> str:
    """README's table, and the line that says where its numbers are from."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|--:|--:|--:|--:|--:|--:|"]
    for name, result in results.items():
        family, about, *rest = (cell.replace("|", "\\|") for cell in cells(name, result))
        lines.append(f"| [{family}](examples/{name}.py) | {about} | {' | '.join(rest)} |")
    dates = sorted({result["date"][:10] for result in results.values()})
    where = sorted({f"{machine(result)}, jax {result['versions']['jax']}" for result in results.values()})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return "\n".join(lines) + (
        "\n\nTime (all steps, compiling apart) and memory (of a step) are LoRA's relative to full fine-tuning. "
        f"Measured on {'; '.join(where)}, {when}.\n`python examples/all.py` runs it all and writes this table."
    )


def machine(result: dict) -> str:
    """The devices, in a word or two."""
    devices, cores = result["machine"]["devices"], result["machine"]["cores"]
    return f"{cores} CPU cores" if set(devices) == {"cpu"} else f"{len(devices)} {devices[0]}"


def plain(results: dict[str, dict]) -> str:
    """The same for a terminal, with the wall time of each."""
    head = ["example", "wall", "metric", "base", "LoRA", "full"]
    rows = [[name, f"{r['wall_seconds']:.0f} s", *cells(name, r)[2:6]] for name, r in results.items()]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in [head, *rows])


def stored(folder: Path) -> dict[str, dict]:
    """The results kept in ``folder``, in the order of the table."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    if not found:
        raise Stop(f"There are no results in {folder}: run `python examples/all.py` first.")
    order = [*FAMILIES, *sorted(found.keys() - FAMILIES)]
    return {name: found[name] for name in order if name in found}


def with_table(page: str, table: str) -> str:
    """``page`` with ``table`` between its two markers, and all else as it was."""
    if page.count(START) != 1 or page.count(END) != 1 or page.index(START) > page.index(END):
        raise Stop(f"README needs one line {START} and, after it, one line {END}.")
    before, rest = page.split(START)
    return f"{before}{START}\n{table}\n{END}{rest.split(END)[1]}"


# The command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="run the quick modes; keep nothing, fail if one fails")
    mode.add_argument("--table", action="store_true", help="run nothing, rewrite README's table from the kept results")
    mode.add_argument("--check", action="store_true", help="run nothing, fail if README's table is not that one")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these examples (default: all)")
    parser.add_argument("--out", type=Path, help="folder for the runs (default: runs; --quick: a temporary one)")
    parser.add_argument("--examples", type=Path, default=ROOT / "examples", help="folder of the examples")
    args = parser.parse_args(argv)
    if args.only and (args.table or args.check):
        parser.error("--only chooses what to run; --table and --check run nothing")
    return args


def select(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """The files of examples, by name."""
    files = {name: folder / f"{name}.py" for name in names}
    missing = [name for name, file in files.items() if not file.exists()]
    if missing:
        raise Stop(f"There is no example {', '.join(missing)} in {folder}.\n  known: {', '.join(FAMILIES)}")
    return files


def run_quick(files: dict[str, Path], out: Path) -> int:
    """Runs the quick modes and prints what they found; returns how many failed."""
    results = {name: measure(name, file, out, quick=True) for name, file in files.items()}
    passed = {name: result for name, result in results.items() if result}
    if passed:
        print("\n" + plain(passed))
    return report_failures(results)


def run_full(files: dict[str, Path], out: Path, kept: Path) -> int:
    """Runs the examples in full, keeping the results of each as it ends; returns how many failed."""
    results = {}
    for name, file in files.items():
        results[name] = measure(name, file, out, quick=False)
        if results[name]:
            kept.mkdir(exist_ok=True)
            (kept / f"{name}.json").write_text(json.dumps(results[name], indent=1) + "\n", encoding="utf-8")
    return report_failures(results)


def report_failures(results: dict[str, dict | None]) -> int:
    """Names the examples that failed; returns how many."""
    failed = [name for name, result in results.items() if result is None]
    if failed:
        print(f"\nFailed: {', '.join(failed)}")
    return len(failed)


def run(args: argparse.Namespace) -> int:
    """Does what was asked for; returns the exit code."""
    folder = args.examples.resolve()
    kept, readme = folder / "results", folder.parent / "README.md"
    files = {} if args.table or args.check else select(folder, args.only or list(FAMILIES))
    if args.quick:
        with tempfile.TemporaryDirectory() as scratch:
            return min(run_quick(files, (args.out or Path(scratch)).resolve()), 1)
    page = readme.read_text(encoding="utf-8")
    with_table(page, "")  # raises before the hour that the runs take, and not after
    failed = run_full(files, (args.out or ROOT / "runs").resolve(), kept)
    wanted = with_table(page, markdown(stored(kept)))
    if args.check and page != wanted:
        raise Stop(f"The table in {readme.name} is not that of {kept.name}: run `python examples/all.py --table`.")
    if page != wanted:
        readme.write_text(wanted, encoding="utf-8")
    return min(failed, 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    try:
        return run(parse(argv))
    except Stop as stop:
        print(stop, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
