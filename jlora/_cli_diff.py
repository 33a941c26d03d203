"""``jlora diff``: two adapters of one base, weight by weight."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import typer

from jlora import _cli_adapters as adapters
from jlora import _cli_base, _compare, _files, _paths, algebra
from jlora._adapters import FullWeight, LowRank
from jlora._cli_options import Base, Conv1d, Debug, Json, command
from jlora._cli_show import DIFFERENT, Refusal, Screen, number, progress


@command("jlora diff one two", "jlora diff one two --tol 1e-3 --json")
def diff(
    one: Annotated[Path, typer.Argument(metavar="ONE", help="Folder of an adapter.", show_default=False)],
    two: Annotated[Path, typer.Argument(metavar="TWO", help="Of one in the same format.", show_default=False)],
    tol: Annotated[float, typer.Option(help="The relative difference up to which updates count as the same.")] = 1e-5,
    base: Base = None,
    conv1d: Conv1d = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Compares two adapters of one base, weight by weight. Exit code 0: the same within --tol; 1: they differ.

    cosine: of the updates; difference: relative to the first; angles: the largest principal angles, in degrees, of the spaces that
    the updates read from and write to. A weight that one of them lacks has no update there: a norm of 0. Of leaves trained outright
    the values are compared, with --base their updates.
    """
    screen = Screen(json)
    if not 0 <= tol < float("inf"):
        raise Refusal(f"--tol must be a number from 0 up.\n  got: {tol}")
    form = adapters.check_same_format([one, two])
    if conv1d is not None and (form != "peft" or base is None):
        raise Refusal("--conv1d is for PEFT's adapters, with --base.")
    found, params, model = _cli_base.open_all([one, two], base, form)
    first, second = (x.lora for x in found)
    paths = list(dict.fromkeys([*first, *second]))
    with progress("compare", len(paths), json) as step:
        turned = partial(_turned, model, conv1d)
        sites = [_compared(path, first.get(path), second.get(path), params, turned, step) for path in paths]
    alone = [[path for path in a if path not in b] for a, b in ((first, second), (second, first))]
    same = not any(alone) and all(s["difference"] <= tol for s in sites)
    columns = ("norm_one", "norm_two", "cosine", "difference", "input_angle", "output_angle")
    rows = [(s["path"], s["compared"], *(number(s[c]) for c in columns)) for s in sites]
    screen.table(("weight", "compared", *(c.replace("_", " ") for c in columns)), rows, right=tuple(range(2, 8)))
    for path, names in zip((one, two), alone, strict=True):
        for name in names:
            screen.note(f"only in {path}: {_files.shown(name)}")
    values = [s["path"] for s in sites if s["compared"] == "values"]
    if values:
        screen.note(f"trained outright: {_paths.listing(values, 3)}; --base BASE compares the updates of what is")
    worst = max((s["difference"] for s in sites), default=0.0)
    screen.note(f"{'the same' if same else 'they differ'}: at most {number(worst)}, where {number(tol)} is allowed")
    screen.document({"same": same, "tol": tol, "sites": sites, "only_in_one": alone[0], "only_in_two": alone[1]})
    return 0 if same else DIFFERENT


Turned = Callable[[str, LowRank], bool]


def _turned(model: Any, conv1d: str | None, path: str, x: LowRank) -> bool:
    """Whether a whole leaf lies as the transpose of what the factors of another adapter are for: PEFT's may."""
    return isinstance(model, _cli_base.Values) and model.is_turned(path, x, conv1d)


def _compared(path: str, x: Any, y: Any, params: Any, turned: Turned, step: Callable[[str], None]) -> dict[str, Any]:
    """The worst of all slices: of the updates, or where these are not known of the values."""
    step(path)
    out: dict[str, Any] = {"path": path, "compared": "updates", "norm_one": None, "norm_two": None, "cosine": None}
    out |= {"difference": None, "input_angle": None, "output_angle": None}
    there = [a for a in (x, y) if a is not None]
    kinds = {type(a) for a in there}
    if FullWeight in kinds and params is None:
        return out | _values_compared(path, x, y)
    if len(there) < 2:
        size = _size(algebra.norms({path: there[0]}, params)[path])
        sizes = (size, 0.0) if y is None else (0.0, size)
        apart = 0.0 if size == 0 else (1.0 if y is None else float("inf"))
        return out | {"norm_one": sizes[0], "norm_two": sizes[1], "cosine": 0.0, "difference": apart}
    if len(kinds) > 1 and there[0].base.partial:
        found = _mixed(path, x, y, np.asarray(params[path]), turned)
    else:
        found = algebra.compare({path: x}, {path: y}, params)[path]
    out |= {"norm_one": _size(found.norm_one), "norm_two": _size(found.norm_two)}
    for name, angles in (("input_angle", found.input_angles), ("output_angle", found.output_angles)):
        out[name] = None if angles is None else _largest(np.asarray(angles))
    return out | {"cosine": float(found.cosine.min()), "difference": float(found.difference.max())}


def _mixed(path: str, x: Any, y: Any, w: np.ndarray, turned: Turned) -> Any:
    """Factors of PEFT compared with a whole leaf, which lies as the base has it."""
    low, full = (x, y) if isinstance(x, LowRank) else (y, x)
    if full.shape != w.shape:
        raise Refusal(f"'{_files.shown(path)}' is {w.shape} in the base; the adapter is for {full.shape}.")
    if turned(path, low):
        w, full = np.swapaxes(w, -2, -1), adapters.changed(full, value=jnp.swapaxes(full.value, -2, -1))
    return _compare.compare(*((low, full) if low is x else (full, low)), w)


def _largest(angles: np.ndarray) -> float | None:
    """In degrees, of those that there are: directions that an update does not have make none."""
    return None if np.isnan(angles).all() else float(np.rad2deg(np.nanmax(angles)))


def _size(norms: Any) -> float:
    return float(jnp.linalg.norm(jnp.reshape(norms, -1)))


def _values_compared(path: str, x: Any, y: Any) -> dict[str, Any]:
    """Of leaves trained outright, without their base. A value differs from any update, and from none."""
    values = [np.asarray(a.value, np.float64) if isinstance(a, FullWeight) else None for a in (x, y)]
    one, two = values
    sizes = [None if v is None else float(np.linalg.norm(v)) for v in values]
    out: dict[str, Any] = {"compared": "values", "norm_one": sizes[0], "norm_two": sizes[1], "difference": float("inf")}
    if one is None or two is None:
        return out
    if one.shape != two.shape:
        raise Refusal(f"The adapters are for different shapes of '{_files.shown(path)}': {one.shape} and {two.shape}.")
    size, apart = float(np.linalg.norm(one)), float(np.linalg.norm(one - two))
    relative = apart / size if size > 0 else (float("inf") if apart > 0 else 0.0)
    return out | {"difference": relative}
