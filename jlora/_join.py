r"""Values made of several weights: sums, concatenations and stacks of factored values, and zeros around one.

They are still one pair of factors. A sum of updates is an update of the summed rank,

$$a_1 b_1 + a_2 b_2 = [a_1\; a_2]\,[b_1;\, b_2]$$

and a concatenation is a sum of updates that are zero outside their piece. Where the pieces lie along a batch axis (layers that are stacked,
experts that are put side by side), their factors are put side by side as well, and the rank stays what it is.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _jax
from jlora._factored import Factored
from jlora._labelled import RANK, Labels, arrange
from jlora._primitives import Dense

Padding = tuple[int, int, int]
NOWHERE: Padding = (0, 0, 0)


def padded(f: Factored, w: jax.Array, config: Sequence[Padding]) -> Factored:
    """The value whose base is ``w``: ``f`` with zeros around it, ``config`` for each axis as ``lax.pad`` takes it."""
    f = f.scaled()
    parts, labels = list(f.parts[:2]), list(f.labels[:2])
    for d, padding in enumerate(config):
        if padding != NOWHERE and d not in labels[0] and d not in labels[1]:
            # Zero in both: whichever of them an axis of one factor is merged with later, the other can do without it.
            for i in (0, 1):
                parts[i], labels[i] = _along(parts[i], labels[i], d, f.shape[d])
    for i in (0, 1):
        zero = jnp.zeros((), parts[i].dtype)
        parts[i] = lax.pad(parts[i], zero, [NOWHERE if d == RANK else config[d] for d in labels[i]])
    return _value(w, parts, labels, [f])


def total(w: jax.Array, terms: Sequence[Factored]) -> Factored | None:
    """The value whose base is ``w`` and whose update is the sum of those of ``terms``; ``None`` if no thin pair of factors is it.

    Raises:
        Dense: Their rates of dropout differ.
    """
    if len(terms) == 1:
        return replace(terms[0], w=w)
    terms = [f.scaled() for f in terms]
    sides, wanted = _aligned(terms, w.shape)
    whole = {d for d, n in enumerate(w.shape) if n > 1}
    if len(rates := _rates(terms)) > 1:
        raise Dense(
            f"their adapters have dropout of different rates, {' and '.join(map(str, sorted(rates)))}: give them one"
        )
    if any(whole <= wanted[i] and not any(whole <= _axes(side[i][1]) for side in sides) for i in (0, 1)):
        return None
    orders = [(*sorted(wanted[0]), RANK), (RANK, *sorted(wanted[1]))]
    parts = [
        _concatenate([_arranged(*side[i], orders[i], w.shape) for side in sides], orders[i].index(RANK)) for i in (0, 1)
    ]
    return _value(w, parts, orders, terms)


def concatenated(w: jax.Array, pieces: Sequence[Any], axis: int) -> Factored | None:
    """The value whose base is ``w``, the concatenation of ``pieces`` along ``axis``; some of them may be plain arrays."""
    pieces = [piece.scaled() if isinstance(piece, Factored) else piece for piece in pieces]
    terms = [piece for piece in pieces if isinstance(piece, Factored)]
    if len(terms) == len(pieces) and _alike(terms, axis):
        orders = [(axis, *(d for d in labels if d != axis)) for labels in terms[0].labels[:2]]
        parts = [
            _concatenate([_arranged(f.parts[i], f.labels[i], orders[i], f.shape) for f in terms], 0) for i in (0, 1)
        ]
        return _value(w, parts, orders, terms)
    places, start = [], 0
    for piece in pieces:
        size = piece.shape[axis]
        if isinstance(piece, Factored):
            around = (start, w.shape[axis] - start - size, 0)
            places.append(padded(piece, w, [around if d == axis else NOWHERE for d in range(w.ndim)]))
        start += size
    return total(w, places)


def _alike(terms: Sequence[Factored], axis: int) -> bool:
    """Whether the factors of ``terms`` can be put side by side along ``axis``: a batch axis, or one along which all are constant."""
    first = terms[0]
    both = {axis in labels for f in terms for labels in f.labels[:2]}
    same = all([*map(_axes, f.labels[:2])] == [*map(_axes, first.labels[:2])] for f in terms)
    ranks = {f.parts[0].shape[f.labels[0].index(RANK)] for f in terms}
    return len(both) == 1 and same and len(ranks) == 1 and len(_rates(terms)) == 1


def _aligned(
    terms: Sequence[Factored], shape: Sequence[int]
) -> tuple[list[list[tuple[jax.Array, Labels]]], list[frozenset[int]]]:
    """The two factors of each term, in the order that keeps their sums thinnest, and the axes that the factors of the sum run along."""
    sides: list[list[tuple[jax.Array, Labels]]] = []
    wanted: list[frozenset[int]] = [frozenset(), frozenset()]
    for f in terms:
        pair = list(zip(f.parts[:2], f.labels[:2], strict=True))
        options = [[wanted[i] | _axes(side[i][1]) for i in (0, 1)] for side in (pair, pair[::-1])]
        size = [sum(prod(shape[d] for d in axes) for axes in option) for option in options]
        swap = size[1] < size[0]
        sides.append(pair[::-1] if swap else pair)
        wanted = options[swap]
    return sides, wanted


def _arranged(part: jax.Array, labels: Labels, order: Labels, shape: Sequence[int]) -> jax.Array:
    """``part`` with its axes in ``order``, repeated along those it does not have."""
    rank = part.shape[labels.index(RANK)]
    return arrange(part, labels, order, [rank if d == RANK else shape[d] for d in order])


def _along(part: jax.Array, labels: Labels, axis: int, size: int) -> tuple[jax.Array, Labels]:
    return lax.broadcast_in_dim(part, (size, *part.shape), range(1, part.ndim + 1)), (axis, *labels)


def _concatenate(parts: Sequence[jax.Array], axis: int) -> jax.Array:
    wide = _jax.promote(*(part.dtype for part in parts))
    return lax.concatenate([part.astype(wide) for part in parts], axis)


def _rates(terms: Sequence[Factored]) -> set[float]:
    """The rates of dropout of ``terms``. If they differ, the mask of one value will not do."""
    return {f.branch.dropout if len(f.parts) > 2 else 0.0 for f in terms}


def _value(w: jax.Array, parts: Sequence[jax.Array], labels: Sequence[Labels], terms: Sequence[Factored]) -> Factored:
    """One value out of ``terms``, with the name of all and the dropout key of the first.

    Raises:
        Dense: They act on different kinds of uses.
    """
    if len(kinds := {f.branch.only for f in terms}) > 1:
        raise Dense(f"their adapters act on different uses, {' and '.join(sorted(k or 'all' for k in kinds))}")
    name = " + ".join(dict.fromkeys(f.branch.path for f in terms))
    keys = [f.parts[2][(0,) * f.parts[2].ndim] for f in terms[:1] if len(f.parts) > 2]
    value = Factored(
        w,
        (*parts, *keys),
        (*labels, *(() for _ in keys)),
        terms[0].branch._replace(path=name),
        terms[0].picked if all(f.picked is not None for f in terms) else None,
    )
    return value.map_parts(w, lambda part, ls: (part, ls))


def _axes(labels: Labels) -> frozenset[int]:
    return frozenset(labels) - {RANK}
