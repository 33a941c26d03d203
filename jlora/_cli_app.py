"""``jlora merge`` and ``extract``, and with the other commands the whole application.

What these do is in ``_cli_merge.py``, ``_cli_extract.py`` and the library; here is what they take and show.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import typer

from jlora import _cli_adapters as adapters
from jlora import _cli_algebra as _cli_algebra
from jlora import _cli_convert as _cli_convert
from jlora import _cli_diff as _cli_diff
from jlora import _cli_extract as extraction
from jlora import _cli_merge as merging
from jlora import _cli_weights as models
from jlora import _files
from jlora._adapters import LowRank
from jlora._cli_adapters import Opened, Writing
from jlora._cli_options import Adapter, Conv1d, Debug, Dtype, Force, Json, Out, Ranks, Seed, command
from jlora._cli_options import app as app
from jlora._cli_show import Refusal, Screen, number, percent, progress, shape
from jlora._cli_show import rank as rank_cell
from jlora._fold import Fold
from jlora._text import counted


@command(
    "jlora merge llama adapter llama-merged",
    "jlora merge gpt2 adapter gpt2-merged --conv1d '.*c_(attn|proj|fc).weight'",
    "jlora merge llama adapter llama-merged --dtype bfloat16 --rounding stochastic --seed 0",
)
def merge(
    base: Annotated[
        Path,
        typer.Argument(metavar="BASE", help="Folder of a model: safetensors, or an orbax checkpoint of parameters."),
    ],
    adapter: Adapter,
    out: Out,
    to: Annotated[
        Literal["safetensors", "orbax"] | None, typer.Option(help="Format of OUT, which is that of BASE.")
    ] = None,
    dtype: Dtype = None,
    rounding: Annotated[
        Literal["nearest", "stochastic"], typer.Option(help="Stochastic rounding keeps small updates in the mean.")
    ] = "nearest",
    seed: Seed = None,
    overflow: Annotated[
        Literal["raise", "allow"], typer.Option(help="What to do with values that the dtype cannot hold.")
    ] = "raise",
    conv1d: Conv1d = None,
    prefix: Annotated[
        str | None,
        typer.Option(metavar="OLD=NEW", help="Names of the adapter that begin with OLD begin with NEW in BASE."),
    ] = None,
    tied: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NAME", help="Head and embedding, which are one in BASE.")
    ] = None,
    add_new: Annotated[
        bool, typer.Option("--add-new", help="Add whole tensors that BASE does not have: a head.")
    ] = False,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Folds an adapter into its base and writes the merged model: a PEFT adapter into safetensors, tensor by tensor, or jlora's own
    into an orbax checkpoint. Other files of BASE are copied; tells what rounding lost of each update.
    """
    screen, base, adapter = Screen(json), _files.folder(base), _files.folder(adapter)
    kind = models.kind_of(base, "The order of merge is: jlora merge BASE ADAPTER OUT.")
    _check_kinds(kind, adapters.format_of(adapter), to, base, adapter)
    if (rounding == "stochastic") != (seed is not None):
        raise Refusal("Stochastic rounding needs a --seed, and nothing else does.")
    key = None if seed is None else jax.random.key(seed)
    fold = Fold(dtype, rounding, key, overflow)
    out = adapters.free(out, kind, force, [base, adapter])
    begin = functools.partial(progress, "merge", quiet=json)
    options = Names(conv1d, prefix, tied or [], add_new)
    merged = _merge_checkpoint if kind == "checkpoint" else _merge_safetensors
    report = merged(base, adapter, out, fold, options, force, begin)
    _show_merged(screen, out, "orbax" if kind == "checkpoint" else kind, dtype, report)


class Names(NamedTuple):
    """What was said of the names of a base of safetensors."""

    conv1d: str | None
    prefix: str | None
    tied: list[str]
    add_new: bool


def _merge_checkpoint(
    base: Path, adapter: Path, out: Path, fold: Fold, names: Names, force: bool, begin: Any
) -> merging.Report:
    if names != Names(None, None, [], False):
        raise Refusal("--conv1d, --prefix, --tied and --add-new are for safetensors.")
    return merging.merge_checkpoint(base, adapter, out, fold, force, begin)


def _merge_safetensors(
    base: Path, adapter: Path, out: Path, fold: Fold, names: Names, force: bool, begin: Any
) -> merging.Report:
    weights = models.Weights(base)
    renamed = ("", "") if names.prefix is None else _split("--prefix", names.prefix)
    tied = dict(_split("--tied", x) for x in names.tied)
    found = merging.open_adapter(adapter, weights, renamed)
    plan = merging.Plan(weights, found, conv1d=names.conv1d, renamed=renamed, tied=tied, add_new=names.add_new)
    with begin(len(weights) + len(plan.added)) as step:
        return merging.merge_safetensors(plan, out, fold, force, step)


def _show_merged(screen: Screen, out: Path, form: str, dtype: str | None, report: merging.Report) -> None:
    rows = [(name, percent(x)) for name, x in report.lost.items()]
    rows += [(name, "whole") for name in [*report.replaced, *report.added]]
    screen.table(("merged", "lost in rounding"), rows, right=(1,))
    worst = max(report.lost.values(), default=0.0)
    screen.note(
        f"{counted(len(rows), 'weight')} merged into {out}; at most {percent(worst)} of an update lost in rounding"
    )
    if worst > 0.01:
        screen.note("  --dtype float32 keeps it all; --rounding stochastic --seed 0 keeps it in the mean.")
    if report.untied:
        said = "is false" if "config.json" in report.copied else "must be false, and is not there"
        screen.note(f"the head is a weight of its own now: tie_word_embeddings in config.json {said}")
    for what, names in (("copied", report.copied), ("left out", report.left_out)):
        if names:
            screen.note(f"{what}: {', '.join(map(_files.shown, names))}")
    merged = [{"path": name, "lost": x} for name, x in report.lost.items()]
    document: dict[str, Any] = {"out": str(out), "format": form, "dtype": dtype, "merged": merged}
    listed = ("replaced", "added", "untied", "copied", "left_out")
    screen.document(document | {name: getattr(report, name) for name in listed})


def _check_kinds(kind: str, form: str, to: str | None, base: Path, adapter: Path) -> None:
    if kind == "safetensors" and form == "orbax":
        raise Refusal(
            f"{adapter} is jlora's own, {base} are safetensors with PyTorch's names, which it does not know.\n"
            "  jlora convert ADAPTER PEFT --to peft --names names.json, and merge that.\n"
            "  In Python: jlora.export.save(folder, params, lora, sites=sites, names=names)."
        )
    if kind == "checkpoint" and form == "peft":
        raise Refusal(
            f"{adapter} is PEFT's, with PyTorch's names, {base} is an orbax checkpoint.\n"
            f"  jlora convert ADAPTER OWN --to orbax --base BASE, and merge that."
        )
    if to is not None and to != ("orbax" if kind == "checkpoint" else "safetensors"):
        raise Refusal(
            f"{base} can be written as it is, not --to {to}: the names and axes of the other format are not in it.\n"
            "  In Python: jlora.export.save(folder, params, lora, sites=sites), or jlora.export.load."
        )


def _split(option: str, text: str) -> tuple[str, str]:
    one, equal, two = text.partition("=")
    if not equal:
        raise Refusal(f"{option} takes two names: {option} one=two.\n  got: {text!r}")
    return one, two


# --- extract -----------------------------------------------------------------------------------------------------------


@command(
    "jlora extract llama llama-tuned adapter --rank 32",
    "jlora extract llama llama-tuned adapter --rank 64 --energy 0.95 --rest full",
    "jlora extract params params-tuned adapter --rank 16 --like another-adapter",
)
def extract(
    base: Annotated[
        Path,
        typer.Argument(metavar="BASE", help="Folder of a model: safetensors, or an orbax checkpoint of parameters."),
    ],
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The same model after training, in the same format.")],
    out: Out,
    rank: Annotated[int, typer.Option(help="Of each update, at most.", show_default=False)],
    energy: Annotated[
        float | None, typer.Option(help="The lowest rank, up to --rank, that keeps this share of the squared norm.")
    ] = None,
    rest: Annotated[
        Literal["error", "ignore", "full"], typer.Option(help="What changed and is no matrix: full keeps it whole.")
    ] = "error",
    conv1d: Conv1d = None,
    embedding: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Safetensors: whole names of embeddings; '' for none.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="Orbax: an adapter for the same base, which knows its axes.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="The name of the base, for who loads the adapter.")] = None,
    dtype: Dtype = None,
    rank_pattern: Ranks = False,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Makes an adapter of what full fine-tuning did: of two models, the difference of each matrix truncated to a low rank."""
    screen, base, tuned = Screen(json), _files.folder(base), _files.folder(tuned)
    extraction.check(rank, energy)
    order = "extract makes an adapter of two models: jlora extract BASE TUNED OUT."
    kind = models.kind_of(base, order)
    if models.kind_of(tuned, order) != kind:
        raise Refusal(f"Both models must be of one format.\n  got: {base} ({kind}) and {tuned}")
    is_peft = kind == "safetensors"
    if (is_peft and like is not None) or (not is_peft and (conv1d is not None or embedding is not None)):
        raise Refusal("--conv1d and --embedding are for safetensors, --like is for orbax checkpoints.")
    out = adapters.free(out, "peft" if is_peft else "orbax", force, [base, tuned])
    about = {} if base_model is None else {"base_model_name_or_path": base_model}
    begin = functools.partial(progress, "compare", quiet=json)
    if is_peft:
        one, two = models.Weights(base), models.Weights(tuned)
        with begin(len(one)) as step:
            pairs = extraction.pairs_of_safetensors(one, two, conv1d, embedding, step)
        leaves = None
    else:
        like = None if like is None else _files.folder(like)
        pairs, leaves = extraction.pairs_of_checkpoints(base, tuned, like, begin)
    with progress("decompose", sum(p.changed for p in pairs), json) as step:
        found = extraction.extract(pairs, leaves, extraction.Wanted(rank, energy, rest), step)
    made = Opened(out, "peft" if is_peft else "orbax", found.lora, about, "")
    adapters.write(out, made, Writing(force, dtype, rank_pattern))
    _show_extracted(screen, out, made, found, adapters.ranks_in_file(found.lora, made.format, rank_pattern))


def _show_extracted(
    screen: Screen, out: Path, made: Opened, found: extraction.Found, padded: Mapping[str, int]
) -> None:
    sites: list[dict[str, Any]] = [
        {"path": path, "shape": list(x.shape), "rank": x.rank, "rank_in_file": padded[path]}
        | {"energy": found.kept[path], "norm": found.norms[path]}
        for path, x in found.lora.items()
        if isinstance(x, LowRank)
    ]
    rows = [
        (s["path"], shape(s["shape"]), rank_cell(s["rank"], s["rank_in_file"]), percent(s["energy"]), number(s["norm"]))
        for s in sites
    ]
    rows += [(path, shape(found.lora[path].shape), "-", "whole", "-") for path in found.whole]
    screen.table(("weight", "shape", "rank", "energy kept", "norm"), rows, right=(2, 3, 4))
    squares = [s["norm"] ** 2 for s in sites]
    kept = sum(n * s["energy"] for n, s in zip(squares, sites, strict=True)) / sum(squares)
    screen.note(f"{counted(len(rows), 'weight')} written to {out} ({made.format}); {percent(kept)} of the energy kept")
    if found.same:
        screen.note(f"{counted(found.same, 'tensor')} did not change")
    for what, reasons in (("kept whole", found.whole), ("ignored", found.ignored)):
        for name, why in reasons.items():
            screen.note(f"{what}: {_files.shown(name)}: {_files.shown(why, 500)}")
    document: dict[str, Any] = {
        "out": str(out),
        "format": made.format,
        "energy": kept,
        "sites": sites,
        "whole": list(found.whole),
    }
    document |= {"ignored": list(found.ignored), "reasons": found.whole | found.ignored, "unchanged": found.same}
    screen.document(document)
