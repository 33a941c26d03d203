"""What the commands of ``jlora`` have in common: the application, options, and how one is added."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

import jlora
from jlora._cli_show import guarded

app = typer.Typer(
    name="jlora",
    help="Work with LoRA adapters: jlora's own (orbax) and PEFT's. Exit codes: 0 done, 1 they differ (diff), 2 refused, 3 failed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Adapter = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="Folder of an adapter, jlora's or PEFT's.", show_default=False)
]
Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder to write; it appears when it is complete.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Base = Annotated[
    Path | None,
    typer.Option(
        metavar="BASE", help="The base, for leaves trained outright: a model of safetensors (PEFT), or a checkpoint."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what OUT is, if it is of the same kind.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of what is written; by default as it was.")
]
Ranks = Annotated[
    bool,
    typer.Option(
        "--rank-pattern", help="PEFT: leave ranks that differ, which vLLM does not read, and do not pad them."
    ),
]
Dropout = Annotated[
    float | None, typer.Option(min=0, help="Rate of dropout that training shall use; by default as it was.")
]
Seed = Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Of what is random.", show_default=False)]
Conv1d = Annotated[
    str | None,
    typer.Option(metavar="PATTERN", help="Whole names of GPT-2's Conv1D weights, which are (in, out); '' for none."),
]


def command(*examples: str) -> Callable[[Callable[..., int | None]], Callable[..., None]]:
    """Adds a command, with examples for its help."""
    lines = "\n\n".join(["Examples:", *examples])

    def add(run: Callable[..., int | None]) -> Callable[..., None]:
        summary = (run.__doc__ or "").split(". ")[0].removesuffix(".")
        return app.command(epilog=lines, short_help=summary)(guarded(run))

    return add


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jlora {jlora.__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Options of all commands."""
