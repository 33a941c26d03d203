"""``jlora info``, ``resize`` and ``combine``: adapters alone, without their base."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import typer

from jlora import _cli_adapters as adapters
from jlora import _cli_base, _files, algebra
from jlora._adapters import LowRank
from jlora._cli_adapters import Writing
from jlora._cli_options import Adapter, Base, Debug, Dropout, Dtype, Force, Json, Out, Ranks, Seed, command
from jlora._cli_show import Refusal, Screen, dash, number, percent, progress, shape
from jlora._cli_show import rank as rank_cell
from jlora._text import counted


@command("jlora info adapter", "jlora info adapter --json | jq '.sites[] | {path, rank, effective_rank}'")
def info(adapter: Adapter, json: Json = False, debug: Debug = False) -> None:
    """Shows what an adapter adapts: shapes, ranks, scales, parameters, the norm and the effective rank of each update, its base."""
    screen, files = Screen(json), adapters.open_files(adapter)
    added = adapters.added(files)
    found = adapters.open_adapter(adapter, without=added, files=files)
    with progress("measure", len(found.lora), json) as step:
        sites = [_site(path, x, step) for path, x in found.lora.items()]
    sites = sorted([*sites, *map(_added_site, added.values())], key=lambda s: str(s["path"])) if added else sites
    total = sum(site["parameters"] for site in sites)
    base: dict[str, Any] = {"name": found.about.get("base_model_name_or_path")}
    if found.format == "orbax":
        whole = next(iter(found.lora.values())).base
        base |= {"fingerprint": whole.digest, "leaves": len(whole.leaves)}

    def last(s: dict[str, Any]) -> tuple[str, str]:
        return number(s["norm"]), _range(s["effective_rank"])

    screen.table(
        ("weight", "use", "shape", "rank", "scale", "parameters", "norm", "effective rank"),
        [
            (
                s["path"],
                f"{s['use']} ({s['only']} only)" if s["only"] else s["use"],
                shape(s["shape"]),
                dash(s["rank"]),
                number(s["scale"]),
                f"{s['parameters']:,}",
                *last(s),
            )
            for s in sites
        ],
        right=(3, 4, 5, 6, 7),
    )
    screen.note(f"{counted(len(sites), 'weight')}, {counted(total, 'parameter')}; {found.format} ({found.version})")
    name = base["name"] or "not named"
    screen.note(
        f"base: {_files.shown(name)}"
        + (f", {counted(base['leaves'], 'leaf')}, {base['fingerprint'][:12]}" if "leaves" in base else "")
    )
    for key, value in found.about.items():
        if key not in adapters.ABOUT:
            screen.note(f"{_files.shown(key)}: {_files.shown(value)}")
    about = {"path": str(found.path), "format": found.format, "version": found.version, "base": base}
    screen.document({**about, "about": found.about, "parameters": total, "sites": sites})


def _described(path: str, kind: str, use: str, shape: Sequence[int], parameters: int) -> dict[str, Any]:
    out = {"path": path, "kind": kind, "use": use, "only": None, "shape": list(shape), "rank": None, "scale": None}
    return out | {"parameters": parameters, "norm": None, "effective_rank": None}


def _added_site(x: adapters.Added) -> dict[str, Any]:
    """What is added to something of the base: its own shape, as that of the whole is not in the file."""
    return _described(x.name, "added", x.use, x.shape, int(np.prod(x.shape, dtype=np.int64)))


def _site(path: str, x: Any, step: Callable[[str], None]) -> dict[str, Any]:
    out = _described(path, x.kind, "whole", x.shape, adapters.parameters(x))
    if isinstance(x, LowRank):
        values = algebra.spectrum({path: x})[path]
        ranks = np.asarray(algebra.effective_rank(values)).tolist()
        out |= {"use": x.use, "only": x.only or None, "rank": x.rank, "scale": x.scale, "effective_rank": ranks}
        out["norm"] = float(jnp.linalg.norm(values.reshape(-1)))
    step(path)
    return out


def _range(x: Any) -> str:
    """A number, or the least and the most of those of slices."""
    if not isinstance(x, list):
        return "-" if x is None else f"{x:.2f}"
    flat = np.ravel(x)
    return f"{flat.min():.2f}–{flat.max():.2f}"


@command("jlora resize adapter smaller --rank 8", "jlora resize adapter smaller --energy 0.99")
def resize(
    adapter: Adapter,
    out: Out,
    rank: Annotated[int | None, typer.Option(help="The new rank.", show_default=False)] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="The lowest rank that keeps this share of each squared norm.", show_default=False),
    ] = None,
    base: Base = None,
    dtype: Dtype = None,
    rank_pattern: Ranks = False,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Changes the rank of an adapter: the closest update of a lower rank, or the same update with room to train.

    PEFT's trained tokens and biases of B need --base, and become whole tensors.
    """
    screen = Screen(json)
    if (rank is None) == (energy is None):
        raise Refusal("Say either --rank or --energy.")
    form = adapters.format_of(_files.folder(adapter))
    if base is not None and not adapters.added(adapters.open_files(adapter)):
        raise Refusal(f"{adapter} can be resized without its base.\n  Leave out --base.")
    out = adapters.free(out, form, force, [adapter] if base is None else [adapter, base])
    (found,), _, _ = _cli_base.open_all([adapter], base, form)
    low = {path: x for path, x in found.lora.items() if isinstance(x, LowRank)}
    if not low:
        raise Refusal("Every leaf of the adapter is trained outright: there is no rank to change.")
    lora, kept = dict(found.lora), {}
    with progress("resize", len(low), json) as step:
        for path, x in low.items():
            one, share = algebra.resize({path: x}, rank, energy=energy, report=True)
            lora |= one
            kept[path] = float(share[path])
            step(path)
    adapters.write(out, found._replace(lora=lora), Writing(force, dtype, rank_pattern))
    ranks = {path: x.rank for path, x in lora.items() if isinstance(x, LowRank)}
    padded = adapters.ranks_in_file(lora, found.format, rank_pattern)
    sites: list[dict[str, Any]] = [
        {"path": p, "before": low[p].rank, "rank": ranks[p], "rank_in_file": padded[p], "energy": kept[p]} for p in low
    ]
    rows = [(s["path"], str(s["before"]), rank_cell(s["rank"], s["rank_in_file"]), percent(s["energy"])) for s in sites]
    screen.table(("weight", "rank before", "rank", "energy kept"), rows, right=(1, 2, 3))
    screen.note(f"{counted(len(lora), 'weight')} written to {out} ({found.format})")
    if found.format == "peft" and not rank_pattern and len({s["rank"] for s in sites}) > 1:
        most = max(s["rank"] for s in sites)
        screen.note(
            f"  padded with zeros to rank {most}, which all readers understand; --rank-pattern leaves the ranks"
        )
    screen.document({"out": str(out), "format": found.format, "sites": sites})


@command(
    "jlora combine sum one two --weights 0.5,0.5",
    "jlora combine sum one two --weights 1,-1 --method svd --rank 16",
    "jlora combine sum one two three --method dare --density 0.5 --seed 0",
)
def combine(
    out: Out,
    given: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="Of one base, in one format.")],
    weights: Annotated[str | None, typer.Option(help="One number for each, by commas; 1 if not said.")] = None,
    method: Annotated[Literal["concat", "svd", "ties", "dare"], typer.Option(help="concat is exact.")] = "concat",
    rank: Annotated[int | None, typer.Option(help="Of the result, but for concat, where ranks add up.")] = None,
    density: Annotated[float | None, typer.Option(help="ties, dare: the share of entries to keep.")] = None,
    seed: Seed = None,
    base: Base = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base's name, if the adapters name different ones.")
    ] = None,
    dtype: Dtype = None,
    dropout: Dropout = None,
    rank_pattern: Ranks = False,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Makes one adapter of several: the weighted sum of their updates, exact, truncated, or by TIES or DARE.

    Leaves trained outright need --base, unless their weights sum to 1.
    """
    screen, numbers = Screen(json), _numbers(weights, len(given))
    if (method == "dare") != (seed is not None):
        raise Refusal("The method dare needs a --seed, and nothing else does.")
    if len(given) == 1 and weights is None:
        raise Refusal(
            f"There is one adapter to combine, {given[0]}.\n  The order is: jlora combine OUT ADAPTER ADAPTER..."
        )
    if method in ("ties", "dare") and density is None:
        raise Refusal(f"The method {method} needs the share of entries to keep: --density 0.5.")
    form = adapters.check_same_format(given)
    out = adapters.free(out, form, force, given if base is None else [*given, base])
    found, params, _ = _cli_base.open_all(given, base, form)
    about = _common([x.about for x in found], base_model, "base_model_name_or_path" if len(found) > 1 else "")
    key = None if seed is None else jax.random.key(seed)
    options: dict[str, Any] = {"method": method, "rank": rank, "density": density, "key": key}
    paths = list(dict.fromkeys(path for x in found for path in x.lora))
    # One call: the key of DARE is folded by path and place, and whether all is of one base is asked of the whole.
    with progress("combine", 1, json) as step:
        lora = algebra.combine([x.lora for x in found], numbers, params=params, **options)
        step("")
    lora = adapters.at_rate(lora, dropout)
    adapters.write(out, found[0]._replace(lora=lora, about=about), Writing(force, dtype, rank_pattern))
    padded = adapters.ranks_in_file(lora, found[0].format, rank_pattern)
    origin = {path: [i for i, x in enumerate(found) if path in x.lora] for path in paths}
    sites: list[dict[str, Any]] = [
        {"path": p, "rank": getattr(x, "rank", None), "rank_in_file": padded.get(p), "of": origin[p]}
        for p, x in lora.items()
    ]
    rows = [
        (
            s["path"],
            "whole" if s["rank"] is None else rank_cell(s["rank"], s["rank_in_file"]),
            ", ".join(found[i].path.name for i in s["of"]),
        )
        for s in sites
    ]
    screen.table(("weight", "rank", "of"), rows, right=(1,))
    screen.note(f"{counted(len(sites), 'weight')} written to {out} ({found[0].format})")
    document = {"out": str(out), "format": found[0].format, "method": method, "weights": numbers}
    screen.document({**document, "inputs": [str(x.path) for x in found], "sites": sites})


def _numbers(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1.0] * count
    if not re.fullmatch(r"[^,]+(,[^,]+)*", text):
        raise Refusal(f"--weights takes numbers and commas: --weights 0.5,0.5.\n  got: {text!r}")
    try:
        found = [float(x) for x in text.split(",")]
    except ValueError:
        raise Refusal(f"--weights takes numbers and commas: --weights 0.5,0.5.\n  got: {text!r}") from None
    if len(found) != count:
        order = "\n  The order is: jlora combine OUT ADAPTER ADAPTER..." if len(found) == count + 1 else ""
        raise Refusal(
            f"There must be one weight for each adapter.\n  got: {counted(len(found), 'weight')}, {counted(count, 'adapter')}{order}"
        )
    return found


def _common(abouts: list[dict[str, Any]], base_model: str | None, name: str) -> dict[str, Any]:
    """What all adapters say of themselves; of their base they must say the same."""
    bases = {x[name] for x in abouts if name in x}
    if base_model is None and len(bases) > 1:
        listed = " and ".join(_files.shown(x) for x in sorted(map(str, bases)))
        raise Refusal(f"The adapters name different bases: {listed}.\n  If these are the same: --base-model NAME.")
    same = {k: v for k, v in abouts[0].items() if all(x.get(k) == v for x in abouts)}
    chosen = base_model or next(iter(bases), None)
    return same | ({} if chosen is None else {"base_model_name_or_path": chosen})
