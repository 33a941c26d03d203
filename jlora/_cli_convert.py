"""``jlora convert``: adapters of jlora's own and of PEFT, each made of the other."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jlora import _cli_adapters as adapters
from jlora import _cli_weights as models
from jlora import _files, _paths, _peft_files, peft
from jlora._advice import Advised
from jlora._cli_adapters import Opened, Writing
from jlora._cli_base import open_base, values_of
from jlora._cli_options import Adapter, Debug, Dropout, Dtype, Force, Json, Out, Ranks, command
from jlora._cli_show import Refusal, Screen, dash, shape
from jlora._text import counted

TELLS = (
    "--base tells the axes of matrices named kernel alone. What tells all: --like ADAPTER (jlora's own, for the same base), or in Python\n"
    "  jlora.save(folder, jlora.peft.load(peft_folder, jlora.sites(fn, params, x), names=...))."
)


@command(
    "jlora convert adapter peft-adapter --to peft --base-model meta-llama/Llama-3.2-1B",
    "jlora convert peft-adapter adapter --to orbax --like another-adapter",
    "jlora convert peft-adapter adapter --to orbax --base params --names names.json",
)
def convert(
    adapter: Adapter,
    out: Out,
    to: Annotated[Literal["peft", "orbax"], typer.Option(help="peft, or orbax: jlora's own.", show_default=False)],
    names: Annotated[
        Path | None, typer.Option(help="JSON: path or pattern of paths -> name in PyTorch, or {name, layout, ...}.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="To peft: the name of the base, for who loads it.")] = None,
    base_folder: Annotated[
        Path | None, typer.Option(help="To peft: PEFT's base, safetensors that names and shapes are compared with.")
    ] = None,
    task_type: Annotated[str | None, typer.Option(help="To peft: such as CAUSAL_LM.")] = None,
    like: Annotated[
        Path | None, typer.Option(help="An adapter of jlora's for the same base, which knows its axes.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The base, an orbax checkpoint of parameters.")] = None,
    dtype: Dtype = None,
    dropout: Dropout = None,
    rank_pattern: Ranks = False,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Makes a PEFT adapter of jlora's own, or the other way; then --like or --base has to tell the axes of the base's weights.

    To PEFT, --base is needed only where PEFT saves a module whole of which not all was trained.
    """
    screen, adapter = Screen(json), _files.folder(adapter)
    if adapters.format_of(adapter) == to:
        raise Refusal(f"{adapter} is {to} already.")
    inputs = [adapter, *(p for p in (like, base, base_folder) if p is not None)]
    out = adapters.free(out, to, force, inputs)
    table = adapters.names_of(names)
    written: dict[str, Any] = {"dtype": dtype, "portable": not rank_pattern, "overwrite": force}
    written |= {"base_model": base_model, "base_folder": base_folder, "task_type": task_type}
    if to == "peft":
        made = _to_peft(adapter, out, names=table, like=like, base=base, rate=dropout, **written)
    else:
        if any(x is not None for x in (base_model, base_folder, task_type)) or rank_pattern:
            raise Refusal("--base-model, --base-folder, --task-type and --rank-pattern are for --to peft.")
        made = _to_own(adapter, table, like, base)
        made = made._replace(lora=adapters.at_rate(made.lora, dropout))
        adapters.write(out, made, Writing(force, dtype))
    rows = [(path, shape(x.shape), dash(getattr(x, "rank", None))) for path, x in made.lora.items()]
    screen.table(("weight", "shape", "rank"), rows, right=(2,))
    screen.note(f"{counted(len(rows), 'weight')} written to {out} ({to})")
    sites = [{"path": p, "shape": list(x.shape), "rank": getattr(x, "rank", None)} for p, x in made.lora.items()]
    document: dict[str, Any] = {"out": str(out), "format": to, "sites": sites}
    if to == "peft":
        _show_names(screen, names, base_folder)
        document |= {"names": None if names is None else str(names)}
        document |= {"compared_with": None if base_folder is None else str(base_folder)}
    screen.document(document)


def _show_names(screen: Screen, names: Path | None, base_folder: Path | None) -> None:
    """Where PyTorch's names are from, and whether any base was asked for them."""
    if names is None:
        screen.note("names: made of the paths (jlora.peft.default_name), as no --names said others")
    if base_folder is None:
        screen.note("names were not compared with PEFT's base; --base-folder FOLDER does, before anything is written")
    else:
        screen.note(f"names and shapes are those of {base_folder}")


def _to_peft(
    adapter: Path, out: Path, *, like: Path | None, base: Path | None, rate: float | None, **options: Any
) -> Opened:
    found = adapters.open_adapter(adapter)
    found = found._replace(lora=adapters.at_rate(found.lora, rate))
    for option, name in (("base_model", "base_model_name_or_path"), ("task_type", "task_type")):
        options[option] = options[option] or found.about.get(name)
    params = None if base is None else values_of(open_base(base, "orbax"), [found])
    sites = None if params is None else peft._by_name(*_paths.flatten(params)[:2])
    sites = sites if like is None else adapters.sites_like(_files.folder(like))
    peft.save(out, found.lora, sites=sites, params=params, **options)
    return adapters.open_adapter(out)


def _to_own(adapter: Path, names: Any, like: Path | None, base: Path | None) -> Opened:
    if like is None and base is None:
        raise Refusal(
            "A PEFT adapter does not tell how the base's weights lie in JAX.\n"
            "  --like ADAPTER: one of jlora's adapters for the same base, which knows;\n"
            "  --base CHECKPOINT: an orbax checkpoint of Flax parameters, where a matrix named kernel is (in, out).\n"
            "  Otherwise in Python: jlora.peft.load(folder, jlora.sites(fn, params, x), names=...), and jlora.save."
        )
    files, values = _peft_files.open_adapter(adapter), None
    needed = adapters.needs_values(files)
    if base is not None:
        base = _files.folder(base)
        if models.kind_of(base, "--base takes the model that it is for.") != "checkpoint":
            raise Refusal(f"--base takes an orbax checkpoint of parameters.\n  got: {base}, safetensors")
        values = models.load_checkpoint(base, values=needed)
    shapes_only = values is not None and not needed
    target = adapters.sites_like(_files.folder(like)) if like is not None else values
    params = None if like is None and shapes_only else values
    try:
        lora = peft._load(lambda: files, target, names=names, params=params)
    except Advised as error:
        if error.need == "sites" and base is not None and like is None:
            raise Refusal(f"{error.problem}\n  {TELLS}") from error
        raise
    about = {k: files.about[k] for k in adapters.ABOUT[:-1] if isinstance(files.about.get(k), str)}
    return Opened(adapter, "orbax", lora, about, "")
