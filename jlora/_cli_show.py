"""How the command line shows what it did: tables, one JSON document, progress, and errors of one clear message."""

import functools
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from jlora._advice import Advised
from jlora._table import table
from jlora._text import printable, shown

OK, DIFFERENT, REFUSED, FAILED, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 130, 141


class Refusal(ValueError):
    """What was asked for cannot be done, in words for the command line."""


ADVICE = {
    "sites": "Pass what tells: --like ADAPTER (jlora's own, for the same base), or --base CHECKPOINT, where a matrix named kernel is "
    "(in, out).",
    "params": "Pass the base: --base BASE.",
    "names": "Say so in --names FILE, JSON from a path, or a pattern of paths, to a name in PyTorch",
    "base": "Pass the base that it was trained on.",
    "dropout": "Say which it shall have: convert and combine take --dropout RATE.",
    "factors": "Keep it in jlora's own format, or fold it into its base: jlora merge BASE ADAPTER OUT.",
    "dtype": "Choose a wider dtype: --dtype float32. To store infinities: --overflow allow.",
    "overflow": "The training diverged, or the factors need a wider dtype. To store infinities: --overflow allow.",
    "rank": "Lower --rank, or keep a share of each update: --energy 0.99.",
}
"""What is said of an argument in Python, as options say it."""


def in_options(error: BaseException) -> str:
    """The message of an error, its advice in words for the command line; of the system's, without its number."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    if not isinstance(error, Advised):
        return str(error)
    end = "" if error.need != "names" else f": {json.dumps(error.names)}." if error.names else "."
    return f"{error.problem}\n  {ADVICE[error.need]}{end}"


class Screen:
    """Standard output: tables and notes for people, or with ``as_json`` one document and nothing else."""

    def __init__(self, as_json: bool):
        self.as_json = as_json

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
        """A table, in colour if someone looks at it, and else in plain columns, two spaces apart, as wide as they have to be."""
        if self.as_json or not rows:
            return
        rows = [[shown(cell, 1000) for cell in row] for row in rows]
        if not sys.stdout.isatty():
            typer.echo(table(header, rows, right))
            return
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console()
        widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
        if (
            sum(widths) + 3 * len(widths) > console.width
        ):  # too narrow for columns: a path on its own line is still whole
            for first, *others in rows:
                console.print(Text(first, style="cyan"), overflow="fold")
                console.print(
                    Text("  " + "   ".join(f"{n} {cell}" for n, cell in zip(header[1:], others, strict=True)))
                )
            return
        grid = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
        for i, name in enumerate(header):
            grid.add_column(name, justify="right" if i in right else "left", no_wrap=True)
        for row in rows:
            grid.add_row(*(Text(cell, style="cyan" if i == 0 else "") for i, cell in enumerate(row)))
        console.print(grid)

    def note(self, text: str) -> None:
        """A line of prose."""
        if not self.as_json:
            typer.echo(printable(text))

    def document(self, content: dict[str, Any]) -> None:
        """The result for scripts; numbers that JSON does not have become ``null``."""
        if self.as_json:
            typer.echo(json.dumps(_plain(content), indent=2, allow_nan=False).replace("\x7f", "\\u007f"))


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    if isinstance(x, bool | int | str) or x is None:
        return x
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    return str(x)


@contextmanager
def progress(what: str, total: int, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A bar on standard error while work goes on, if someone looks at it; call what it gives with the name of each part done."""
    if quiet or not sys.stderr.isatty():
        yield lambda name: None
        return
    from rich import progress as bars
    from rich.console import Console
    from rich.markup import escape

    columns = [bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn()]
    columns += [bars.TimeRemainingColumn(), bars.TextColumn("[dim]{task.fields[name]}")]
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, name="")
        yield lambda name: bar.update(task, advance=1, name=escape(shown(name)))


def guarded(run: Callable[..., int | None]) -> Callable[..., None]:
    """A command whose every end is an exit code, and whose errors are messages. ``run`` returns a code, or ``None`` for success."""

    @functools.wraps(run)
    def call(*args: Any, **kwargs: Any) -> None:
        debug = bool(kwargs.get("debug"))
        try:
            code = run(*args, **kwargs) or OK
            sys.stdout.flush()
        except typer.Exit:
            raise
        except (BrokenPipeError, KeyboardInterrupt) as error:
            code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else _stop_writing()
            _report("interrupted: nothing is left half-written" if code == INTERRUPTED else "", debug)
        except (ValueError, ImportError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
            code = REFUSED
            _report(f"error: {in_options(error)}", debug)
        except OSError as error:
            code = FAILED
            _report(f"error: {in_options(error)}", debug)
        except Exception as error:  # the edge of the program: whoever calls it gets a message, and --debug the rest
            code = FAILED
            _report(f"error: {type(error).__name__}: {error}\n  This was not expected; --debug shows where.", debug)
        raise typer.Exit(code)

    return call


def _report(message: str, debug: bool) -> None:
    if debug:
        typer.echo(printable(traceback.format_exc()), err=True)
    if message:
        word, colon, rest = printable(message).partition(":")
        typer.echo(f"jlora: {typer.style(word, fg='red', bold=True)}{colon}{rest}", err=True)


def _stop_writing() -> int:
    """Whoever read standard output has gone: what is still to be flushed goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def number(x: Any, digits: int = 4) -> str:
    """A number for a table."""
    return "-" if x is None else f"{float(x):.{digits}g}"


def dash(x: Any) -> str:
    """What there may not be."""
    return "-" if x is None else str(x)


def percent(x: Any) -> str:
    """A share for a table, with the digits that tell nearly all from all."""
    if x is None:
        return "-"
    share = float(x)
    if 0 < share < 1 and not 5e-5 <= share < 0.9999:
        return "<0.01 %" if share < 0.5 else ">99.99 %"
    return f"{100 * share:.2f} %"


def shape(sizes: Sequence[int]) -> str:
    """A shape for a table."""
    return "×".join(map(str, sizes)) or "scalar"


def rank(own: int, in_file: int) -> str:
    """The rank of an update, and that which its factors are padded to, if it is another."""
    return str(own) if own == in_file else f"{own} ({in_file} in the file)"
