"""``jlora extract``: the adapter that comes closest to what full fine-tuning did to a model, weight by weight."""

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora import _cli_ties, _extract, _files, _paths, _svd
from jlora._adapters import Adapter, Fingerprint, fingerprint
from jlora._cli_adapters import Refusal, sites_like
from jlora._cli_tables import Tables
from jlora._cli_weights import Layout, Weights, load_checkpoint
from jlora._init import of_site, whole_of_site
from jlora._sites import Site
from jlora._text import counted
from jlora.peft import _by_name

Reader = Callable[[], np.ndarray]


class Pair(NamedTuple):
    """One tensor of both models.

    Attributes:
        name: Of the adapter's leaf.
        site: How it is used, with a reason if it can only be taken whole.
        base: Reads its value in the base.
        tuned: Reads its value in the tuned model.
        changed: Whether they differ.
        turned: Whether the values are the transpose of the site's matrix.
        fits: Whether an adapter of the base can have the tuned value at all: it has another shape, or holds no floats.
    """

    name: str
    site: Site
    base: Reader
    tuned: Reader
    changed: bool
    turned: bool = False
    fits: bool = True


class Found(NamedTuple):
    """What was found: adapters, per low-rank one the share of the squared norm that it keeps, and what was left.

    Attributes:
        lora: Adapters by name.
        kept: Shares by name.
        norms: Of the differences, by name.
        whole: Why tensors are whole, by name.
        ignored: Tensors that changed and that the adapter does not have, and why.
        same: Number of tensors that did not change.
    """

    lora: dict[str, Adapter]
    kept: dict[str, float]
    norms: dict[str, float]
    whole: dict[str, str]
    ignored: dict[str, str]
    same: int


class Wanted(NamedTuple):
    """How much to keep, and what to do with what has no low rank: ``error``, ``ignore`` or ``full``."""

    rank: int
    energy: float | None
    rest: str


def extract(pairs: list[Pair], base: Fingerprint | None, wanted: Wanted, step: Callable[[str], None]) -> Found:
    """Decomposes the differences one by one. ``base`` is the fingerprint of the whole base, ``None`` if only of what is adapted."""
    changed = [pair for pair in pairs if pair.changed]
    rest = {p.name: p.site.reason for p in changed if p.site.reason}
    _check_rest(rest, [p for p in changed if not p.fits], wanted.rest)
    if len(rest) == len(changed):
        raise Refusal("No matrix differs between the two models: the adapter would have no effect.")
    taken = [p for p in changed if wanted.rest == "full" or not p.site.reason]
    if base is None:
        taken += _siblings(pairs, taken)
        base = Fingerprint(sorted((p.name, p.site.shape, str(p.site.dtype)) for p in taken), partial=True)
    kept, norms = {}, {}
    made: dict[str, Adapter] = {}
    for pair in taken:
        if pair.site.reason:
            value = _files.check_finite(pair.name, pair.tuned())
            made[pair.name] = whole_of_site(jnp.asarray(_files.floats(value)), pair.site, base)
        else:
            made[pair.name], kept[pair.name], norms[pair.name] = _low(pair, pair.site, base, wanted)
        step(pair.name)
    lora = {name: made[name] for name in sorted(made)}
    whole = {p.name: p.site.reason for p in taken if p.site.reason}
    return Found(lora, kept, norms, whole, rest if wanted.rest == "ignore" else {}, len(pairs) - len(changed))


def _check_rest(rest: dict[str, str], unfit: list[Pair], wanted: str) -> None:
    """Raises if what gets no factors is neither to be left out, nor to be kept whole and can be."""
    refused = rest if wanted == "error" else {p.name: p.site.reason for p in unfit} if wanted == "full" else {}
    if not refused:
        return
    shown = "\n".join(f"    {_files.shown(name)}: {why}" for name, why in list(refused.items())[:12])
    more = f"\n    and {len(refused) - 12} more" if len(refused) > 12 else ""
    resized = any(RESIZED in p.site.reason for p in unfit)
    hints = [
        "Leave them out with --rest ignore."
        if unfit
        else "Keep them whole with --rest full, or leave them out with --rest ignore."
    ]
    if unfit and len(refused) > len(unfit):
        hints = ["Leave them out with --rest ignore. --rest full can keep whole only those that have the base's shape."]
    if resized:
        hints.append(
            "If the vocabulary was resized, resize the base's as well (in transformers: model.resize_token_embeddings(n),\n"
            "  model.save_pretrained(folder)), and extract from that."
        )
    what = "for which there are no factors" if wanted == "error" else "that no adapter of the base can have"
    raise Refusal(f"{counted(len(refused), 'tensor')} changed {what}:\n{shown}{more}\n  " + "\n  ".join(hints))


RESIZED = "in the tuned model"


def _unfit(name: str, read: tuple[Reader, Reader], shape: tuple[int, ...], reason: str) -> Pair:
    return Pair(name, _whole(name, shape, reason), *read, True, fits=False)


def _resized(one: tuple[int, ...], two: tuple[int, ...]) -> str:
    return f"it is {one} in the base and {two} {RESIZED}"


def _whole(name: str, shape: tuple[int, ...], reason: str) -> Site:
    """A tensor of PyTorch that lies as it does there."""
    return Site(name, shape, np.dtype(np.float32), "dense", reason=reason)


def _siblings(pairs: list[Pair], taken: list[Pair]) -> list[Pair]:
    """The other tensors of modules that PEFT can only save whole."""
    names = {p.name for p in taken}
    adapted = {p.name.rpartition(".")[0] for p in taken if not p.site.reason}
    alone = {p.name.rpartition(".")[0] for p in taken if p.site.reason and not p.name.endswith(".bias")} - adapted
    found = [p for p in pairs if p.name not in names and p.name.rpartition(".")[0] in alone]
    return [p._replace(site=_whole(p.name, p.base().shape, "its module is saved whole")) for p in found]


def _low(pair: Pair, site: Site, base: Fingerprint, wanted: Wanted) -> tuple[Adapter, float, float]:
    """The adapter of one difference, the share of its squared norm that is kept, and its norm."""
    w, v = pair.base(), pair.tuned()
    wide = np.promote_types(np.promote_types(w.dtype, v.dtype), np.float32)
    with np.errstate(all="ignore"):
        moved = v.astype(wide) - w.astype(wide)
    _files.check_finite(f"the difference of {pair.name}", moved)
    moved = moved.T if pair.turned else moved
    batch, inputs, outputs = (tuple(site.shape[d] for d in ds) for ds in (site.batch, site.inputs, site.outputs))
    rows = int(np.prod(inputs))
    matrices = jnp.asarray(moved.transpose(*site.batch, *site.inputs, *site.outputs).reshape(*batch, rows, -1))
    rank = min(wanted.rank, *matrices.shape[-2:])
    svd = _svd.dense_svd(matrices, rank)
    if wanted.energy is not None:
        shares = [float(_svd.share(svd.s, r)) for r in range(1, rank + 1)]
        rank = next((r for r, share in enumerate(shares, 1) if share >= wanted.energy), rank)
    a, b = _svd.factors(svd, rank, _svd.spare_norm(rows, site.kind))
    a, b = a.reshape(*batch, *inputs, rank), b.reshape(*batch, rank, *outputs)
    norm = float(np.linalg.norm(moved.reshape(-1)))
    return of_site(a, b, site, 1.0, 0.0, base), float(_svd.share(svd.s, rank)), norm


# --- Two models --------------------------------------------------------------------------------------------------------


def check(rank: int, energy: float | None) -> None:
    """Raises unless the numbers can be: before anything is read."""
    if rank < 1:
        raise Refusal(f"--rank must be at least 1.\n  got: {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise Refusal(f"--energy must be above 0, up to 1.\n  got: {energy}")


def pairs_of_safetensors(
    base: Weights, tuned: Weights, conv1d: str | None, embedding: str | None, step: Callable[[str], None]
) -> list[Pair]:
    """The tensors of two PyTorch models, compared."""
    check_same(set(base), set(tuned))
    layout = Layout(base, conv1d)
    tables = Tables(base, embedding)
    found = []
    for name in base:
        step(name)
        shape = base[name].shape
        read = _reader(base, name), _reader(tuned, name)
        if shape != tuned[name].shape:
            found.append(_unfit(name, read, shape, _resized(shape, tuned[name].shape)))
            continue
        if not (base.is_float(name) and tuned.is_float(name)):
            if base[name].dtype != tuned[name].dtype or not _same_bytes(base, tuned, name):
                found.append(_unfit(name, read, shape, f"it holds {base[name].dtype}, to which nothing can be added"))
            continue
        if not _extract.differ(read[0](), read[1]()):
            found.append(Pair(name, _whole(name, shape, "it did not change"), *read, False))
        elif len(shape) == 2 and name.endswith(".weight"):
            found += _matrix(name, shape, read, layout, tables)
        else:
            found.append(Pair(name, _whole(name, shape, f"{shape} is no matrix of a linear layer"), *read, True))
    tables.check_told()
    layout.check_used()
    return found


def _matrix(
    name: str, shape: tuple[int, ...], read: tuple[Reader, Reader], layout: Layout, tables: Tables
) -> list[Pair]:
    """A changed matrix: of a linear layer, of GPT-2's Conv1D, or a table, with the head that is tied to it."""
    dtype = np.dtype(np.float32)
    if tables.has(name):
        why = tables.tied_to_head(name)
        if not why:
            return [Pair(name, Site(name, shape, dtype, "lookup", (0,), (1,)), *read, True)]
        head = _cli_ties.head_of(tables.weights)
        table = Pair(name, _whole(name, shape, why), *read, True, fits=bool(head))
        # PEFT would change the table alone: whole, both have the tuned value.
        both = head and head not in tables.weights
        return [table, Pair(head, _whole(head, shape, f"it is tied to '{name}'"), *read, True)] if both else [table]
    turned = layout.is_conv1d(name)
    if turned is None:
        raise layout.needed(name, shape)
    shape = (shape[1], shape[0]) if turned else shape
    return [Pair(name, Site(name, shape, dtype, "linear", (1,), (0,)), *read, True, turned)]


def _reader(weights: Weights, name: str) -> Reader:
    return lambda: weights.read(name)


def _same_bytes(one: Weights, two: Weights, name: str) -> bool:
    out = io.BytesIO(), io.BytesIO()
    for weights, to in zip((one, two), out, strict=True):
        weights.copy(name, to)
    return out[0].getvalue() == out[1].getvalue()


def pairs_of_checkpoints(base: Path, tuned: Path, like: Path | None, begin: Any) -> tuple[list[Pair], Fingerprint]:
    """The leaves of two orbax checkpoints; their axes are known from an adapter, or where Flax calls a matrix ``kernel``."""
    params, news = load_checkpoint(base), load_checkpoint(tuned)
    (paths, old, _), (others, new, _) = _paths.flatten(params), _paths.flatten(news)
    check_same(set(paths), set(others))
    theirs = dict(zip(others, new, strict=True))
    mine = fingerprint(paths, old)
    alone = _by_name(paths, old)
    sites = {**alone.skipped, **alone}
    if like is not None:
        liked = sites_like(like)
        sites |= {p: s for p, s in {**liked.skipped, **liked}.items() if s.kind}
        difference = liked.base.difference(mine)
        if difference:
            raise Refusal(f"The adapter at {like} (--like) is for another base: {difference}.")
    with begin(len(paths)) as step:
        return list(_leaves(paths, old, theirs, sites, step)), mine


def _leaves(
    paths: list[str], old: list[Any], theirs: dict[str, Any], sites: dict[str, Site], step: Callable[[str], None]
) -> Iterator[Pair]:
    for path, x in zip(paths, old, strict=True):
        step(path)
        x, y = np.asarray(x), np.asarray(theirs[path])
        read = partial(np.asarray, x), partial(np.asarray, y)
        if x.shape != y.shape:
            yield _unfit(path, read, x.shape, _resized(x.shape, y.shape))
            continue
        if not jnp.issubdtype(x.dtype, jnp.floating):
            if not np.array_equal(x, y):
                yield _unfit(path, read, x.shape, f"it holds {x.dtype}, to which nothing can be added")
            continue
        site = sites[path]
        if not site.kind and x.ndim > 1:
            site = replace(site, reason="its axes are not known: only of a matrix named kernel, or with --like ADAPTER")
        elif site.reason:
            site = replace(site, kind="dense", reason=f"{x.shape} is no matrix" if x.ndim < 2 else site.reason)
        yield Pair(path, site, *read, _extract.differ(x, y))


def check_same(one: set[str], two: set[str]) -> None:
    if one == two:
        return
    lines = [
        f"only in {where}: {_paths.listing([_files.shown(n) for n in sorted(names)], 5)}"
        for where, names in (("the base", one - two), ("the tuned model", two - one))
        if names
    ]
    raise Refusal("The two models do not have the same tensors.\n  " + "\n  ".join(lines))
