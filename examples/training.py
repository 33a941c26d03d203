"""What the examples share: a training loop that measures, a table of methods, a command line. None of it knows about adapters.

An example trains a tree with the base beside it. For LoRA the tree is the adapter; for full fine-tuning it is the parameters, and the
base is ``None``. Both go through the same loop.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fetch import FetchError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)

Loss = Callable[[Any, Any, Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A trained tree and what it took.

    Attributes:
        tree: What was trained.
        losses: Of each step.
        trained: Number of parameters trained.
        seconds: Of all steps, compiling not counted.
        peak_bytes: Memory of one step as the compiler reports it: arguments, results and temporaries.
    """

    tree: Any
    losses: np.ndarray
    trained: int
    seconds: float
    peak_bytes: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of an example's table: a method, its result, and what it took.

    Attributes:
        method: ``base``, ``LoRA rank 8``, ``full fine-tuning``...
        values: Numbers by the name of the metric, in the order of the columns.
        spread: Standard error of a metric over seeds, where there are several.
    """

    method: str
    values: dict[str, float]
    trained: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    spread: dict[str, float] = dataclasses.field(default_factory=dict)


def row(method: str, values: dict[str, float], fit: Fit | None = None, spread: dict[str, float] | None = None) -> Row:
    """A row from a fit, or of a method that trains nothing."""
    cost = (fit.trained, fit.seconds, fit.peak_bytes) if fit else (0, 0.0, 0)
    return Row(method, {name: float(value) for name, value in values.items()}, *cost, spread or {})


def fit(
    label: str,
    loss: Loss,
    tree: Any,
    base: Any,
    batches: Iterable[Any],
    steps: int,
    optimizer: optax.GradientTransformation,
    seed: int = 0,
    watch: Callable[[int, Any], None] | None = None,
) -> Fit:
    """Trains ``tree`` by ``loss(tree, base, batch, key)``, a mean over the batch.

    Args:
        label: For the progress bar.
        loss: Differentiated for ``tree`` alone; ``key`` is new for every step.
        tree: What is trained.
        base: What is not, passed through ``jit`` as an argument, so that it is never copied into the program.
        batches: At least ``steps`` trees of arrays, all of the same shapes.
        steps: How many of them to take.
        optimizer: Of optax.
        seed: Of the keys.
        watch: Called after every step with the number of steps taken and the tree; what it takes is not counted.

    Raises:
        FloatingPointError: the loss is not finite.
    """

    def step(tree: Any, state: Any, base: Any, batch: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(tree, base, batch, key)
        updates, state = optimizer.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, value

    keys = jax.random.split(jax.random.key(seed), steps)
    batches = iter(batches)
    first = next(batches)
    tree = jax.tree.map(jnp.array, tree)  # a copy: the first step gives its memory away
    state = optimizer.init(tree)
    with console.status(f"{label}: compiling"):
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(tree, state, base, first, keys[0]).compile()
    losses, seconds = [], 0.0
    with progress() as bar:
        task = bar.add_task(label, total=steps, loss="")
        for i in range(steps):
            batch = first if i == 0 else next(batches)
            start = time.perf_counter()
            tree, state, value = compiled(tree, state, base, batch, keys[i])
            losses.append(float(value))
            seconds += time.perf_counter() - start
            if not np.isfinite(losses[-1]):
                raise FloatingPointError(f"{label}: the loss is {losses[-1]} at step {i + 1}. Lower the learning rate.")
            bar.update(task, advance=1, loss=f"loss {np.mean(losses[-20:]):.3f}")
            if watch is not None:
                watch(i + 1, tree)
    m = compiled.memory_analysis()
    peak = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    return Fit(tree, np.asarray(losses), count(tree), seconds, peak)


def count(tree: Any) -> int:
    """Number of parameters of a tree."""
    return sum(x.size for x in jax.tree.leaves(tree))


def shuffled(size: int, batch: int, seed: int = 0) -> Iterable[np.ndarray]:
    """Endless batches of indices below ``size``, shuffled anew each time round."""
    rng, order = np.random.default_rng(seed), np.zeros(0, np.int64)
    while True:
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(size)])
        yield order[:batch]
        order = order[batch:]


def in_batches(fn: Callable[..., jax.Array], size: int, *arrays: np.ndarray) -> np.ndarray:
    """``fn(*arrays)`` taken ``size`` rows at a time; the last batch is filled up, so that one shape is compiled."""
    found = []
    for start in range(0, len(arrays[0]), size):
        rows = [x[start : start + size] for x in arrays]
        padded = [np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)]) for x in rows]
        found.append(np.asarray(fn(*padded))[: len(rows[0])])
    return np.concatenate(found)


def check_merged(merged: Any, factored: Any, what: str = "logits") -> None:
    """Raises unless a model with an adapter folded in, an ordinary one again, gives what the adapter beside the base gives.

    Args:
        merged: What the merged model gives.
        factored: What the adapted function gives.
        what: Its name, for the message.
    """
    # In numpy, whose max of NaNs is NaN: compiled for a CPU it can be -inf, which would pass.
    merged, factored = np.asarray(merged), np.asarray(factored)
    difference, largest = np.abs(merged - factored).max(), np.abs(factored).max()
    if not difference <= 1e-4 * largest:
        raise RuntimeError(f"Merged and factored {what} differ by {difference:.1e} ({what} up to {largest:.3g}).")


def progress() -> Progress:
    """A progress bar; hidden in a log, where it would leave nothing but empty lines."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def report(
    args: argparse.Namespace, title: str, about: str, rows: Sequence[Row], lower_is_better: bool = False
) -> None:
    """Prints the table and writes ``results.json`` into ``args.out``.

    Args:
        args: Of ``command_line``.
        title: The task, in a few words: ``"Sentiment of film reviews"``.
        about: Model and data: ``"MiniLM (BERT, 22.7M) on Rotten Tomatoes"``.
        rows: Base first, then the adapter, then others; all with the same metrics. The first metric is the one that counts.
        lower_is_better: Whether that metric is an error.
    """
    names = list(rows[0].values)
    table, cells = Table(title=f"{title}: {about}", title_justify="left"), []
    for r in rows:
        numbers = [number(r.values[n]) + (f" ± {number(r.spread[n])}" if n in r.spread else "") for n in names]
        cost = [f"{r.trained:,}", f"{r.seconds:.0f}", f"{r.peak_bytes / 1e6:,.0f}"] if r.trained else ["-"] * 3
        cells.append([r.method, *numbers, *cost])
    for name, *column in zip(["method", *names, "trained", "seconds", "MB a step"], *cells, strict=True):
        # On a narrow terminal a heading is broken into lines, and never what stands below it.
        table.add_column(name, justify="left" if name == "method" else "right", min_width=max(map(len, column)))
    for line in cells:
        table.add_row(*line)
    console.print(table)
    results = {"title": title, "about": about, "lower_is_better": lower_is_better, "quick": args.quick}
    write_json(args.out / "results.json", results | {"rows": [dataclasses.asdict(r) for r in rows]})
    console.print(f"Written to {args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")


def number(x: float) -> str:
    """Three or four digits that matter."""
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"


def write_json(path: Path, value: Any) -> None:
    """Writes ``path`` so that it is as before or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def command_line(
    doc: str, file: str, argv: Sequence[str] | None = None, flags: Mapping[str, str] | None = None
) -> argparse.Namespace:
    """Reads ``--quick``, ``--seed`` and ``--out`` (default ``runs/<name of the file>``, with ``_quick``), and makes that folder.

    ``flags`` are more switches of an example's own, with their help.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller and shorter, to see that it works")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--out", type=Path, help="folder for results (default: runs/NAME)")
    for flag, text in (flags or {}).items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / (Path(file).stem + "_quick" * args.quick)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def main(
    run: Callable[[argparse.Namespace], None], doc: str, file: str, flags: Mapping[str, str] | None = None
) -> None:
    """Runs an example; what a user can mend ends in a message and not in a traceback."""
    try:
        run(command_line(doc, file, flags=flags))
    except (FetchError, FloatingPointError) as error:
        console.print(str(error), style="red", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("\nInterrupted.", style="yellow")
        sys.exit(130)
