"""The whole suite in one command: each benchmark in a process of its own, one after another, and all tables at the end.

    python -m benchmarks [--quick] [--only NAME ...] [--out RESULTS]

``--out`` takes a file, to which all results go as one JSON, or a folder, for one file each, named by benchmark, chip and date. Exits with 1
if a claim of README or docs fails, which is counted in flops, values, compilations and bytes, never in time.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks import suite

NAMES = (
    "step",
    "scale",
    "trace",
    "variants",
    "dispatch",
    "memory",
    "pod_memory",
    "export_memory",
    "collectives",
    "quality",
    "gpu",
)


def measured(name: str, quick: bool) -> dict[str, Any] | None:
    """The results of one benchmark, or ``None``, from a process of its own: its devices are its own, and so is its memory."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(out), *(["--quick"] if quick else [])]
        # Of its output only progress and errors are shown: tables come at the end.
        subprocess.run(command, cwd=suite.ROOT, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text()) if out.exists() else None


def timed(name: str, quick: bool) -> tuple[dict[str, Any] | None, float]:
    start = time.perf_counter()
    return measured(name, quick), time.perf_counter() - start


def on_cpu() -> bool:
    """Whether there is no accelerator, as a process that ends says, so that this one holds none."""
    code = "import jax; raise SystemExit(jax.default_backend() != 'cpu')"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


def file_name(name: str, results: dict[str, Any]) -> str:
    """Benchmark, chip and date."""
    chip = results.get("target") or next(iter(results["machine"]["devices"])).replace(" ", "-").lower()
    return f"{name}-{chip}-{results['date'][:10]}.json"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: the claims are checked, times mean little")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, help="a JSON file for everything, or a folder for one file each")
    args = parser.parse_args(argv)
    names, left = list(args.only), {}
    if "gpu" in names and not args.quick and args.only is NAMES and on_cpu():
        names.remove("gpu")
        left["gpu"] = "no accelerator here"
    # Where only counts matter, several at once; where times do, one after another.
    workers = min(4, os.cpu_count() or 1) if args.quick else 1
    results: dict[str, Any] = {}
    broken: list[str] = []  # the others are kept
    with ThreadPoolExecutor(workers) as pool:
        # The longest of the quick ones are last in the list: begun first, they do not run on alone at the end.
        started = {pool.submit(timed, name, args.quick): name for name in (reversed(names) if args.quick else names)}
        for i, future in enumerate(as_completed(started), 1):
            name = started[future]
            found, seconds = future.result()
            print(f"[{i}/{len(names)}] {name}: {seconds:.0f} s", file=sys.stderr, flush=True)
            if found is None:
                broken.append(name)
                continue
            results[name] = found
            write(args.out, results)
    names = [name for name in names if name in results]
    failed = [name for name in names if not suite.report(importlib.import_module(f"benchmarks.{name}"), results[name])]
    for name, why in left.items():
        print(f"not run: {name} ({why})")
    if failed or broken:
        said = {"Claims fail": failed, "Ended with an error, see above": broken}
        raise SystemExit("\n".join(f"{text}: {', '.join(which)}" for text, which in said.items() if which))


def write(out: Path | None, results: dict[str, Any]) -> None:
    """Writes what there is so far, beside and then in place."""
    if out is None:
        return
    files = {out / file_name(n, r): r for n, r in results.items()} if out.is_dir() else {out: results}
    for path, content in files.items():
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(beside, path)


if __name__ == "__main__":
    main()
