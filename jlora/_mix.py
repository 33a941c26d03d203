r"""Products of a weight with a constant, evaluated: the result is a weight again.

A constant $R$ that multiplies a weight (a rotation, a whitening, a projection that is absorbed) multiplies one of its factors,

$$R\,(W + a b) = R W + (R a)\, b$$

so that nothing of the weight's size is made but $R W$, which is the model's own. A product of two adapted weights is the sum of two such
updates: those of the first, with the base of the second as the constant, and those of the second, with the whole first as the constant,

$$(W + a b)(V + c d) = W V + a\,(b V) + \big(W c + a\,(b c)\big)\, d$$

whose rank is the sum of the two.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import jax
from jax import lax

from jlora import _jax
from jlora._factored import Factored
from jlora._join import total
from jlora._labelled import RANK, Labels, arrange, contract, in_rank, mesh_axes
from jlora._primitives import Dense, Eqn, Meeting, is_lazy, meeting

TIED = "a constant multiplies its input and output axes at once"

Times = Callable[[jax.Array, Labels, set[int]], tuple[jax.Array, Labels]]
"""Of a factor, its labels and those to keep: the factor times what stands on the other side of the product."""


def by_constant(eqn: Eqn, position: int, values: Sequence[Any]) -> list[Any]:
    """The product of the factored value at ``position`` with a constant, as a factored value."""
    f, other = values[position], values[1 - position]
    (w,) = _jax.bind(eqn, [f.w, other] if position == 0 else [other, f.w])
    return [_mixed(eqn, position, f, w, _array_times(eqn, position, other))]


def by_weight(eqn: Eqn, left: Factored, right: Factored) -> list[Any]:
    """The product of two factored values, as a factored value."""
    (w,) = _jax.bind(eqn, [left.w, right.w])
    terms = [
        _mixed(eqn, 0, left, w, _array_times(eqn, 0, right.w)),
        _mixed(eqn, 1, right, w, _weight_times(eqn, left)),
    ]
    out = total(w, terms)
    if out is None:
        raise Dense
    return [out]


def _mixed(eqn: Eqn, position: int, f: Factored, w: jax.Array, times: Times) -> Factored:
    """``f`` with the base ``w``, and the factor that has the axes summed over multiplied by the other operand."""
    met = meeting(eqn, position)
    # Axes that both factors have, such as layers, cannot be summed in one of them: they become a part of the rank.
    folded = [d for d in met.summed if d in f.labels[0] and d in f.labels[1]]
    summed = {*met.summed}.difference(folded)
    sides = [i for i in (0, 1) if not summed & {*f.labels[1 - i]}]
    if not sides:
        raise Dense(TIED)
    # Where the update is constant along all of them, the factor that stays thin.
    i = min(sides, key=lambda i: (len(summed - {*f.labels[i]}), prod(f.parts[i].shape)))
    sides_of = list(zip(f.parts[:2], f.labels[:2], strict=True))
    sides_of[i] = times(*sides_of[i], {*met.out, *folded, RANK})
    new = {d: j for j, d in enumerate(met.out)} | {RANK: RANK}
    parts = [in_rank(part, labels, folded) for part, labels in sides_of] + [
        _first_along(part, labels, met.summed) for part, labels in zip(f.parts[2:], f.labels[2:], strict=True)
    ]
    value = replace(
        f,
        w=w,
        parts=tuple(part for part, _ in parts),
        labels=tuple(tuple(new[d] for d in labels) for _, labels in parts),
        picked=i if is_lazy(eqn, position) else f.picked,
    )
    return value.map_parts(w, lambda part, labels: (part, labels))


def _first_along(keys: jax.Array, labels: Labels, summed: Labels) -> tuple[jax.Array, Labels]:
    """The dropout keys without the axes that are summed over."""
    for d in [d for d in labels if d in summed]:
        keys = lax.index_in_dim(keys, 0, labels.index(d), keepdims=False)
        labels = tuple(e for e in labels if e != d)
    return keys, labels


def _array_times(eqn: Eqn, position: int, other: jax.Array) -> Times:
    labels_of_other = meeting(eqn, position).other

    def times(part: jax.Array, labels: Labels, keep: set[int]) -> tuple[jax.Array, Labels]:
        wide = _jax.promote(part.dtype, other.dtype)
        left, right = (other.astype(wide), labels_of_other), (part.astype(wide), labels)
        return contract(left, right, keep, None, lax.Precision.HIGHEST, wide, mesh_axes(left, right))

    return times


def _weight_times(eqn: Eqn, left: Factored) -> Times:
    """A factor of the right operand times ``left``, a weight: its base, and its own factors one after the other."""
    on_left, on_right = meeting(eqn, 0), meeting(eqn, 1)
    rank = (
        RANK - 1 - len(on_left.other)
    )  # as an axis of what ``left`` multiplies, the rank of the factor is one of its own

    def times(part: jax.Array, labels: Labels, keep: set[int]) -> tuple[jax.Array, Labels]:
        wide = _jax.promote(part.dtype, left.w.dtype)
        x, x_labels = part.astype(wide), tuple(rank if d == RANK else on_left.other[d] for d in labels)
        back = {on_left.other[d]: d for d in range(len(on_left.other))} | {rank: RANK} | dict(_free(on_left, on_right))
        out = tuple(d for d in dict.fromkeys((*range(len(left.shape)), *x_labels)) if back.get(d, d) in keep)
        sizes = dict(zip((*range(len(left.shape)), *x_labels), (*left.shape, *x.shape), strict=True))
        shape = [sizes[d] for d in out]
        base, whole = (left.w.astype(wide), tuple(range(len(left.shape)))), (x, x_labels)
        how = {"precision": lax.Precision.HIGHEST, "dtype": wide, "specs": mesh_axes(base, whole)}
        y = arrange(*contract(base, whole, {*out}, out, **how), out, shape)
        plain = replace(left, parts=left.parts[:2], labels=left.labels[:2])  # without dropout: no activations are here
        return y + plain.product(x, x_labels, out, shape, 0, **how), tuple(back[d] for d in out)

    return times


def _free(on_left: Meeting, on_right: Meeting) -> list[tuple[int, int]]:
    """For each axis of the left operand that the right one does not meet: its label there."""
    return [(d, label) for d, label in enumerate(on_right.other) if d not in on_left.other]
