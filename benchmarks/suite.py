"""What every benchmark of the suite is: a module with these four names, one for each claim it stands for.

* ``TITLE``: what it shows, in a line.
* ``run(quick) -> dict`` (and ``only``, if parts of it can be run alone): measures; raw samples, of which
  JSON can be made. Peers that are not installed are named under ``"missing"``.
* ``tables(results) -> list[Table]``: what a person reads.
* ``claims(results) -> list[Claim]``: what README or docs say that this can refute, in flops, values, compilations or bytes, never in time.

``main(module)`` is its command line. ``python -m benchmarks`` runs them all, each in a process of its own.
"""

import _thread
import argparse
import contextlib
import importlib.util
import inspect
import json
import os
import signal
import statistics
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import measure

ROOT = Path(__file__).parent.parent


class Table(NamedTuple):
    """What a person reads. ``note`` says below it what a column means, or what went wrong."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


class Claim(NamedTuple):
    """A sentence of README or docs, whether it holds, and the figure that says so."""

    text: str
    holds: bool
    measured: str


def ratios(samples: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the ratios of two series measured in turns: a slow minute falls on both."""
    found = [x / y for x, y in zip(samples, other, strict=True)]
    low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
    return low, middle, high


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The ``p`` for which ``values`` grow most nearly as ``sizes**p``: the slope of a line through their logarithms."""
    from numpy import log, polyfit

    return round(float(polyfit(log(sizes), log(values), 1)[0]), 9) + 0.0  # no -0.0, whose sign is rounding's


def missing(names: Sequence[str]) -> dict[str, str]:
    """Those of ``names`` that cannot be imported, and how to get them."""
    return {
        name: "not installed: pip install -r benchmarks/requirements.txt"
        for name in names
        if importlib.util.find_spec(name) is None
    }


# What benchmarks cannot be imported or run without, beside the core packages. Peers that only some rows are of are not here.
NEEDS = {
    "quality": ("matplotlib", "rich", "safetensors", "tokenizers", "huggingface_hub"),
    "export_memory": ("safetensors",),
}


def lacking(name: str) -> str:
    """Why benchmark ``name`` cannot run here; empty if it can."""
    gone = [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]
    return f'not installed: {", ".join(gone)}; pip install -e ".[demo]"' if gone else ""


def require(name: str) -> None:
    """Ends the program with the reason if benchmark ``name`` cannot run here."""
    why = lacking(name)
    if why:
        raise SystemExit(f"benchmarks.{name}: {why}")


def chosen(names: Sequence[str], only: str) -> list[str]:
    """Those of ``names`` that contain ``only``, in any case; ends the program if none does."""
    found = [name for name in names if only.lower() in name.lower()]
    if not found:
        raise SystemExit(f"--only {only}: there are only {', '.join(names)}.")
    return found


def file_name(name: str, results: dict[str, Any]) -> str:
    """Benchmark, chip and date."""
    chip = results.get("target") or next(iter(results["machine"]["devices"])).replace(" ", "-").lower()
    return f"{name}-{chip}-{results['date'][:10]}.json"


def out_path(text: str) -> Path:
    """Where results go, before anything is measured: a folder that is there or ends in a slash, and is made then, or a file."""
    path = Path(text)
    if text.endswith("/"):
        path.mkdir(parents=True, exist_ok=True)
    if not path.is_dir() and not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.absolute().parent}")
    return path


def write(path: Path, content: Any) -> None:
    """Writes JSON beside and then in place."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(beside, path)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Here a terminating signal is an interrupt, as Ctrl-C is, and no interrupt is lost."""
    before, hook = signal.signal(signal.SIGTERM, signal.default_int_handler), sys.unraisablehook

    def again(lost: Any) -> None:
        # Python drops what is raised in a callback of the garbage collector, and JAX has one. Not sent from here: it would be dropped too.
        if issubclass(lost.exc_type, KeyboardInterrupt):
            threading.Timer(0.01, _thread.interrupt_main).start()
        else:
            hook(lost)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)


def progress(message: str) -> None:
    """Says on stderr what is being done; over one line in a terminal."""
    end, start = ("", "\r\x1b[K") if sys.stderr.isatty() else ("\n", "")
    print(f"{start}  {message}", end=end, file=sys.stderr, flush=True)


def show(table: Table) -> None:
    """Prints a table: with rich where that is installed, else as aligned text."""
    if importlib.util.find_spec("rich") is None:
        print(f"\n{table.title}\n\n{measure.table(table.header, table.rows)}\n{table.note}")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    shown = RichTable(title=table.title, caption=table.note or None, box=box.SIMPLE_HEAD, title_justify="left")
    for i, name in enumerate(table.header):
        shown.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*row)
    console = Console()
    # In a file there is no width to keep to, and a folded table is hard to read.
    (console if console.is_terminal else Console(width=200)).print(shown)


def report(module: Any, results: dict[str, Any]) -> bool:
    """Prints tables and claims of one benchmark; whether all claims hold."""
    for table in module.tables(results):
        show(table)
    for name, why in results.get("missing", {}).items():
        print(f"missing: {name} ({why})")
    claims = module.claims(results)
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}: {claim.text} [{claim.measured}]")
    return all(claim.holds for claim in claims)


def main(module: Any, argv: list[str] | None = None) -> None:
    """The command line of one benchmark; exits with 1 if a claim fails."""
    parser = argparse.ArgumentParser(description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: the claims are checked, the times mean little"
    )
    parser.add_argument(
        "--out", type=out_path, help="write everything that was measured: a JSON file, or a folder for one"
    )
    options = inspect.signature(module.run).parameters
    if "only" in options:
        parser.add_argument("--only", default="", help="parts whose name contains this")
    args = parser.parse_args(argv)
    if args.quick:
        measure.count_only()
    parts = {"only": args.only} if "only" in options else {}
    before = measure.load()
    try:
        with terminable():
            found = module.run(args.quick, **parts)  # first: a benchmark may say how many devices the CPU is to have
    except KeyboardInterrupt:
        print("\nStopped; nothing was written.", file=sys.stderr)
        raise SystemExit(130) from None
    results = measure.environment() | {"load before": before, "quick": args.quick} | found
    if args.out:
        name = file_name(module.__spec__.name.rpartition(".")[2], results)
        write(args.out / name if args.out.is_dir() else args.out, results)
    if not report(module, results):
        raise SystemExit(1)
