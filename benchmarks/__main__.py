"""The whole suite in one command: each benchmark in a process of its own, and all tables at the end.

    python -m benchmarks [--quick] [--only NAME ...] [--out RESULTS]

They run one after another; with ``--quick``, where only counts matter, several at once. ``--out`` takes a file, to which all results go
as one JSON, or a folder, for one file each, named by benchmark, chip and date; what is done is written at once, and stays after Ctrl-C.
Exits with 1 if a claim of README or docs fails, which is counted in flops, values, compilations and bytes, never in time, or could not
be tried.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
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


class Runs:
    """Benchmarks in processes of their own: their devices are their own, and so is their memory. All end with this one."""

    def __init__(self, quick: bool):
        self.quick, self._running, self._stopped = quick, set[subprocess.Popen[bytes]](), False

    def __call__(self, name: str) -> tuple[dict[str, Any] | None, float]:
        """The results of one benchmark, or ``None``, and the seconds it took."""
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "results.json"
            command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(out), *["--quick"][: self.quick]]
            # Of its output only progress and errors are shown: tables come at the end. Ctrl-C reaches this process alone.
            child = subprocess.Popen(command, cwd=suite.ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
            self._running.add(child)
            if self._stopped:
                stop([child])
            child.wait()
            self._running.discard(child)
            found = json.loads(out.read_text()) if out.exists() else None
        return found, time.perf_counter() - start

    def stop(self) -> None:
        self._stopped = True
        stop(list(self._running))


def stop(children: "list[subprocess.Popen[bytes]]", seconds: float = 5.0) -> None:
    """Ends processes and those they started: asked first, for some of those are out of reach from here."""
    send(children, signal.SIGTERM)
    end = time.monotonic() + seconds
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, end - time.monotonic()))
    send(children, signal.SIGKILL)


def send(children: "list[subprocess.Popen[bytes]]", number: signal.Signals) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)


def on_cpu() -> bool:
    """Whether there is no accelerator, as a process that ends says, so that this one holds none."""
    code = "import jax; raise SystemExit(jax.default_backend() != 'cpu')"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: the claims are checked, times mean little")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--out", type=suite.out_path, help="a JSON file for everything, or a folder for one file each")
    args = parser.parse_args(argv)
    names, left = list(args.only), {}
    lacking = {name: why for name in names if (why := suite.lacking(name))}
    names = [name for name in names if name not in lacking]
    if "gpu" in names and not args.quick and args.only is NAMES and on_cpu():
        names.remove("gpu")
        left["gpu"] = "no accelerator here"
    with suite.terminable():
        results, broken = collected(names, args.quick, args.out)
    names = [name for name in names if name in results]
    failed = [name for name in names if not suite.report(importlib.import_module(f"benchmarks.{name}"), results[name])]
    for name, why in (left | lacking).items():
        print(f"not run: {name} ({why})")
    said = {"Claims fail": failed, "Ended with an error, see above": broken, "Not run": list(lacking)}
    if any(said.values()):
        raise SystemExit("\n".join(f"{text}: {', '.join(which)}" for text, which in said.items() if which))


def collected(names: list[str], quick: bool, out: Path | None) -> tuple[dict[str, Any], list[str]]:
    """The results of all benchmarks, written as they come, and those that ended with an error: the others are kept."""
    results: dict[str, Any] = {}
    broken: list[str] = []
    runs = Runs(quick)
    # Where only counts matter, several at once; where times do, one after another.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1) if quick else 1) as pool:
        # The longest of the quick ones are last in the list: begun first, they do not run on alone at the end.
        started = {pool.submit(runs, name): name for name in (reversed(names) if quick else names)}
        try:
            for i, future in enumerate(as_completed(started), 1):
                name = started[future]
                found, seconds = future.result()
                print(f"[{i}/{len(names)}] {name}: {seconds:.0f} s", file=sys.stderr, flush=True)
                if found is None:
                    broken.append(name)
                    continue
                results[name] = found
                write(out, results)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            runs.stop()
            kept = f"{', '.join(results)} in {out}" if out is not None and results else "nothing"
            print(f"\nStopped; written: {kept}.", file=sys.stderr)
            raise SystemExit(130) from None
    return results, broken


def write(out: Path | None, results: dict[str, Any]) -> None:
    """Writes what there is so far."""
    if out is None:
        return
    if not out.is_dir():
        suite.write(out, results)
        return
    for name, found in results.items():
        suite.write(out / suite.file_name(name, found), found)


if __name__ == "__main__":
    main()
