"""Arrays whose axes have labels, and what a factored weight does with them: contractions, broadcasts, gains, reshapes.

A label says which axis of a value an axis of an array follows, so that arrays with different axes of one value can be put together.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _jax

RANK = -1
"""Label of the rank axis. Labels from 0 are axes of the value; those below ``RANK`` belong to activations."""

Labels = tuple[int, ...]


def contract(
    left: tuple[jax.Array, Labels],
    right: tuple[jax.Array, Labels],
    keep: set[int],
    order: Labels | None,
    precision: Any,
    dtype: Any,
    specs: dict[int, Any] | None,
) -> tuple[jax.Array, Labels]:
    """One pairwise contraction of labelled arrays on flattened operands.

    XLA:CPU has a fast path for products of matrices but not for products of higher rank, in particular in the backward pass, where a
    thin product of 3-D activations runs several times slower. So free axes are merged into one and contracted axes into one.

    Args:
        left: Array and its labels.
        right: The same.
        keep: Labels wanted later: a shared label in it is a batch axis, one not in it is summed over.
        order: Order of labels the caller would like, or ``None``.
        precision: As for ``lax.dot_general``.
        dtype: Of the result.
        specs: Mesh axes of each label, from ``mesh_axes``, if the arrays may be split over devices: then axes are not merged, for only
            the first of merged axes can stay split without communication. Else ``None``.

    Returns:
        The product and its labels: batch axes, then free axes of the operand that ``order`` names first, then those of the other.
    """
    if order is not None and _first_free(right[1], left[1], order) < _first_free(left[1], right[1], order):
        left, right, precision = right, left, _jax.swapped(precision)
    (x, xl), (y, yl) = sum_alone(*left, right[1], keep), sum_alone(*right, left[1], keep)
    batch = [d for d in xl if d in yl and d in keep]
    summed = [d for d in yl if d in xl and d not in keep]
    x_free, y_free = _ordered(xl, yl, order), _ordered(yl, xl, order)
    labels = (*batch, *x_free, *y_free)
    if specs is not None:
        sharding = _jax.explicit_sharding([specs.get(d) for d in labels], x, y)
        dims = ((_axes(xl, summed), _axes(yl, summed)), (_axes(xl, batch), _axes(yl, batch)))
        out = lax.dot_general(x, y, dims, precision=precision, preferred_element_type=dtype, out_sharding=sharding)
        # dot_general leaves free axes in the order the operands have them.
        found = (*batch, *(d for d in xl if d in x_free), *(d for d in yl if d in y_free))
        return jnp.transpose(out, [found.index(d) for d in labels]), labels
    sizes = dict(zip((*xl, *yl), (*x.shape, *y.shape), strict=True))
    x, x_axis = _matrix(x, xl, batch, x_free, summed)
    y, y_axis = _matrix(y, yl, batch, y_free, summed)
    over = tuple(range(len(batch)))
    out = lax.dot_general(
        x, y, (((x_axis,), (y_axis,)), (over, over)), precision=precision, preferred_element_type=dtype
    )
    return out.reshape([sizes[d] for d in labels]), labels


def mesh_axes(*arrays: tuple[Any, Labels]) -> dict[int, Any] | None:
    """The mesh axes of each label where they are known, from arrays and their labels; ``None`` if nothing can be split over devices."""
    found = [(_jax.mesh_spec(x), labels) for x, labels in arrays]
    if all(spec is None for spec, _ in found):
        return None
    return {
        d: axis
        for spec, labels in found
        if spec is not None
        for d, axis in zip(labels, spec, strict=False)
        if d != RANK
    }


def arrange(x: jax.Array, labels: Labels, out: Labels, shape: Sequence[int]) -> jax.Array:
    """``x`` with its axes in the order of ``out``, broadcast along those it does not have."""
    order = [d for d in out if d in labels]
    x = transpose(x, [labels.index(d) for d in order])
    if len(order) == len(out):
        return x
    return lax.broadcast_in_dim(x, shape, [i for i, d in enumerate(out) if d in labels])


def extend(part: jax.Array, labels: Labels, axes: Sequence[int], shape: Sequence[int]) -> tuple[jax.Array, Labels]:
    """Gives ``part`` those of ``axes`` that it does not have: it is constant along them."""
    new = tuple(dict.fromkeys(d for d in axes if d not in labels and shape[d] != 1))
    if not new:
        return part, labels
    wide = lax.broadcast_in_dim(part, [shape[d] for d in new] + list(part.shape), range(len(new), len(new) + part.ndim))
    return wide, (*new, *labels)


def in_rank(part: jax.Array, labels: Labels, axes: Sequence[int]) -> tuple[jax.Array, Labels]:
    """``part`` with ``axes`` as a part of its rank axis."""
    if not axes:
        return part, labels
    rest = [d for d in labels if d not in axes and d != RANK]
    moved = transpose(part, [labels.index(d) for d in (*rest, *axes, RANK)])
    return moved.reshape(*moved.shape[: len(rest)], -1), (*rest, RANK)


def apart_in_rank(part: jax.Array, labels: Labels, axes: Sequence[int]) -> tuple[jax.Array, Labels]:
    """``part`` with ``axes``, which it keeps, also as a part of its rank axis: zero where the two differ."""
    twins = {d: RANK - 1 - d for d in axes}
    for d, twin in twins.items():
        n, at = part.shape[labels.index(d)], labels.index(d)
        same = lax.expand_dims(jnp.eye(n, dtype=bool), [i for i in range(part.ndim) if i != at])
        part = jnp.where(same, lax.expand_dims(part, [part.ndim]), jnp.zeros((), part.dtype))
        labels = (*labels, twin)
    return in_rank(part, labels, list(twins.values()))


def scale_part(part: jax.Array, labels: Labels, gain: jax.Array, how: Callable[..., jax.Array]) -> jax.Array:
    """``part`` times (or by) ``gain``, a scalar or an array of the value's rank whose axes of size above one ``part`` has."""
    wide = _jax.promote(part.dtype, gain.dtype)
    part, gain = part.astype(wide), gain.astype(wide)
    if gain.ndim == 0:
        return how(part, gain)
    axes = [d for d in range(gain.ndim) if gain.shape[d] != 1]
    squeezed = lax.squeeze(gain, [d for d in range(gain.ndim) if d not in axes])
    order = [d for d in labels if d in axes]
    aligned = transpose(squeezed, [axes.index(d) for d in order])
    return how(part, lax.expand_dims(aligned, [i for i, d in enumerate(labels) if d not in axes]))


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[Labels, Labels]]:
    """Splits a reshape into independent smaller ones: pairs of old axes and new axes that hold the same elements, without unit axes.

    Example:
        >>> reshape_groups((6, 4, 5), (6, 1, 20))
        [((0,), (0,)), ((1, 2), (2,))]
    """
    olds, news = ([(i, n) for i, n in enumerate(shape) if n != 1] for shape in (old, new))
    groups, i, j = [], 0, 0
    while i < len(olds):
        i0, j0, left, right = i, j, olds[i][1], news[j][1]
        while left != right:
            if left < right:
                i += 1
                left *= olds[i][1]
            else:
                j += 1
                right *= news[j][1]
        i, j = i + 1, j + 1
        groups.append((tuple(a for a, _ in olds[i0:i]), tuple(a for a, _ in news[j0:j])))
    return groups


def transpose(x: jax.Array, order: Sequence[int]) -> jax.Array:
    """``x`` with its axes in ``order``; itself if that is their own."""
    return x if list(order) == list(range(x.ndim)) else jnp.transpose(x, order)


def sum_alone(x: jax.Array, labels: Labels, other: Labels, keep: set[int]) -> tuple[jax.Array, Labels]:
    """Sums away the axes that nobody else has: the update is constant along them."""
    alone = [i for i, d in enumerate(labels) if d not in other and d not in keep]
    if not alone:
        return x, labels
    return jnp.sum(x, axis=alone), tuple(d for i, d in enumerate(labels) if i not in alone)


def _matrix(
    x: jax.Array, labels: Labels, batch: list[int], free: list[int], summed: list[int]
) -> tuple[jax.Array, int]:
    """``x`` as ``(*batch, free, summed)``, or with the last two exchanged where that needs no transpose; and the axis of ``summed``."""
    swap = labels == (*batch, *summed, *free) and labels != (*batch, *free, *summed)
    order = (*batch, *summed, *free) if swap else (*batch, *free, *summed)
    x = transpose(x, [labels.index(d) for d in order])
    sizes = dict(zip(order, x.shape, strict=True))
    merged = [prod(sizes[d] for d in group) for group in ((summed, free) if swap else (free, summed))]
    return x.reshape([sizes[d] for d in batch] + merged), len(batch) + (0 if swap else 1)


def _ordered(labels: Labels, other: Labels, order: Labels | None) -> list[int]:
    free = [d for d in labels if d not in other]
    return free if order is None else sorted(free, key=lambda d: order.index(d))


def _first_free(labels: Labels, other: Labels, order: Labels) -> int:
    return min((order.index(d) for d in labels if d not in other and d in order), default=len(order))


def _axes(labels: Labels, wanted: Sequence[int]) -> tuple[int, ...]:
    return tuple(labels.index(d) for d in wanted)
