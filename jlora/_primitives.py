"""What each primitive does to a weight: the one table that discovery and evaluation both read.

``VIEWS`` says along which old axes each new axis of a view runs; ``JOINS`` says the same of primitives that make one weight of several.
``USES`` says which axes of a weight a product sums over, and which it matches with a batch axis. A primitive that is in none of them
needs the weight dense. Evaluation is in ``_views`` and ``_products``; primitives with a body (``jit``, ``scan``...) are in ``_interpret``.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jlora import _jax
from jlora._labelled import RANK, Labels, reshape_groups

Flow = list[Labels]
Eqn = Any


class Use(NamedTuple):
    """How one equation uses a weight: ``kind`` is ``"linear"``, ``"conv"`` or ``"lookup"``; of a convolution also its window, its groups,
    and whether the window has gaps.
    """

    kind: str
    summed: Labels
    batch: Labels
    window: Labels = ()
    groups: int = 1
    dilated: bool = False


class Dense(Exception):
    """Raised by a rule that cannot keep its weight factored; the interpreter turns it into an error for people, or goes dense.

    Its argument, if any, is the reason, for where the operation alone does not tell.
    """


# --- Views: which old axes each axis of the result runs along --------------------------------------------------------


def _same(eqn: Eqn, shape: Sequence[int]) -> Flow:
    return [(d,) for d in range(len(shape))]


def _squeeze(eqn: Eqn, shape: Sequence[int]) -> Flow:
    return [(d,) for d in range(len(shape)) if d not in eqn.params["dimensions"]]


def _broadcast_in_dim(eqn: Eqn, shape: Sequence[int]) -> Flow:
    source, new = {j: d for d, j in enumerate(eqn.params["broadcast_dimensions"])}, eqn.params["shape"]
    return [(source[j],) if j in source and shape[source[j]] == n else () for j, n in enumerate(new)]


def _reshape(eqn: Eqn, shape: Sequence[int]) -> Flow:
    source = {j: old for old, new in regrouped(eqn, shape) for j in new}
    return [source.get(j, ()) for j in range(len(eqn.params["new_sizes"]))]


def regrouped(eqn: Eqn, shape: Sequence[int]) -> list[tuple[Labels, Labels]]:
    """The independent parts of a reshape, which takes the old axes in the order of ``dimensions`` if it has them."""
    order = eqn.params["dimensions"] or range(len(shape))
    groups = reshape_groups([shape[d] for d in order], eqn.params["new_sizes"])
    return [(tuple(order[i] for i in old), new) for old, new in groups]


def _gather(eqn: Eqn, shape: Sequence[int]) -> Flow:
    numbers, ndim = eqn.params["dimension_numbers"], eqn.outvars[0].aval.ndim
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = iter(d for d in range(len(shape)) if d not in dropped)
    return [(next(kept),) if j in numbers.offset_dims else () for j in range(ndim)]


# Axes stay where they are; what happens along them is in ``view``.
_ELEMENTWISE = (
    "all_gather",
    "convert_element_type",
    "copy",
    "copy_p",
    "div",
    "dynamic_slice",
    "mul",
    "name",
    "neg",
    "pad",
    "pvary",
    "reduce_precision",
    "reshard",
    "rev",
    "sharding_constraint",
    "slice",
    "split",
    "stop_gradient",
    "tile",
)

VIEWS: dict[str, Callable[[Eqn, Sequence[int]], Flow]] = {
    "transpose": lambda eqn, shape: [(d,) for d in eqn.params["permutation"]],
    "squeeze": _squeeze,
    "unstack": lambda eqn, shape: [(d,) for d in range(len(shape)) if d != eqn.params["axis"]],
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "gather": _gather,
    **dict.fromkeys(_ELEMENTWISE, _same),
}


def is_weight(eqn: Eqn, position: int) -> bool:
    """Whether the result of a view can be a weight again: of floats, and complex if it was.

    The real part of A·B is not the product of the real parts.
    """
    before, after = eqn.invars[position].aval.dtype, eqn.outvars[0].aval.dtype
    return jnp.issubdtype(after, jnp.inexact) and jnp.issubdtype(before, jnp.complexfloating) <= jnp.issubdtype(
        after, jnp.complexfloating
    )


def is_empty(eqn: Eqn) -> bool:
    """Whether all that an equation makes is empty: then it does not matter what of."""
    return bool(eqn.outvars) and all(0 in getattr(v.aval, "shape", ()) for v in eqn.outvars)


def stacked(eqn: Eqn, shape: Sequence[int]) -> Flow:
    flow: Flow = [(d,) for d in range(len(shape))]
    flow.insert(eqn.params["axis"], ())
    return flow


JOINS: dict[str, Callable[[Eqn, Sequence[int]], Flow]] = {
    "stack": stacked,
    **dict.fromkeys(("add", "add_any", "concatenate", "sub"), _same),
}
"""Primitives that make one weight of several, or of one and a constant."""


def picked(eqn: Eqn, shape: Sequence[int]) -> Labels | None:
    """Axes of the weight along which a view takes single slices (a layer, an expert, rows); ``None`` if it takes partial windows."""
    name, p = eqn.primitive.name, eqn.params
    if name == "slice":
        return tuple(
            d
            for d, (i, j) in enumerate(zip(p["start_indices"], p["limit_indices"], strict=True))
            if j - i == 1 < shape[d]
        )
    if name == "dynamic_slice":
        return tuple(d for d, n in enumerate(p["slice_sizes"]) if n == 1 < shape[d])
    if name == "all_gather" and not p["tiled"]:
        return None
    if name == "unstack":
        return (p["axis"],) if shape[p["axis"]] > 1 else ()
    if name == "split":
        return (p["axis"],) if shape[p["axis"]] > 1 and set(p["sizes"]) == {1} else ()
    if name == "gather":
        numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
        # An index along an axis that is taken whole can only be zero, unless one out of bounds means something.
        safe = p["mode"] != lax.GatherScatterMode.FILL_OR_DROP
        mapped = {d for d in numbers.start_index_map if not (safe and sizes[d] == shape[d])}
        indexed = {*mapped, *numbers.operand_batching_dims}
        whole = all(n == (1 if d in indexed else shape[d]) for d, n in enumerate(sizes))
        return tuple(sorted(indexed)) if whole else None
    return ()


def gain_axes(eqn: Eqn, position: int, shape: Sequence[int]) -> Labels | None:
    """Axes of the result along which ``mul`` or ``div`` varies its factor; ``None`` if the result is not a scaled weight."""
    out = eqn.outvars[0].aval.shape
    if len(shape) != len(out) or any(n not in (1, m) for n, m in zip(shape, out, strict=True)):
        return None  # such as a scalar that scales an array
    gain = eqn.invars[1 - position].aval.shape
    return tuple(d for d, n in enumerate(gain) if n != 1)


# --- Uses: what a product sums over ----------------------------------------------------------------------------------


def _dot_use(eqn: Eqn, position: int) -> Use | None:
    met = meeting(eqn, position)
    return Use("linear", met.summed, met.batch)


class Meeting(NamedTuple):
    """How the two operands of a ``dot_general`` meet, in labels of one of them.

    Attributes:
        summed: Its axes that are summed over.
        batch: Its axes that are matched with axes of the other.
        other: For each axis of the other operand the axis it meets, or a label below ``RANK`` if it is free.
        out: For each axis of the result the axis it runs along, or the label of the other's.
    """

    summed: Labels
    batch: Labels
    other: Labels
    out: Labels


def meeting(eqn: Eqn, position: int) -> Meeting:
    """How the operand at ``position`` of a ``dot_general`` meets the other one."""
    contracted, batch = eqn.params["dimension_numbers"]
    summed, matched = tuple(contracted[position]), tuple(batch[position])
    met = dict(zip((*contracted[1 - position], *batch[1 - position]), (*summed, *matched), strict=True))
    other = tuple(met.get(i, RANK - 1 - i) for i in range(eqn.invars[1 - position].aval.ndim))
    mine = [d for d in range(eqn.invars[position].aval.ndim) if d not in met.values()]
    free = [d for d in other if d < RANK]
    return Meeting(summed, matched, other, (*matched, *(mine + free if position == 0 else free + mine)))


def is_mixed(eqn: Eqn, position: int, data: frozenset[Any]) -> bool:
    """Whether a product is a view: a constant multiplies the weight at ``position``, which may meet data later.

    A function without arguments has closed over its data, which look like constants. What sums several axes up into fewer numbers, such
    as the product of a weight with a fixed direction, is a use of the weight.
    """
    if eqn.primitive.name != "dot_general" or not data or _jax.among(eqn.invars[1 - position], data):
        return False
    shape = eqn.invars[position].aval.shape
    return sum(shape[d] > 1 for d in meeting(eqn, position).summed) < 2 or not is_small(eqn, position)


def is_lazy(eqn: Eqn, position: int) -> bool:
    """Whether the product of a weight with a constant may also be activations, where something needs it as an array.

    A constant with as many rows as it sums over (a rotation) leaves a weight what it is. Any other may just as well be an input that
    the function closed over, or a query that it learned.
    """
    return _rows(eqn, position) != _sums(eqn, position)


def is_small(eqn: Eqn, position: int) -> bool:
    """Whether the constant that a weight meets has fewer rows than it sums over: then this product is the weight's use."""
    return _rows(eqn, position) < _sums(eqn, position)


def _rows(eqn: Eqn, position: int) -> int:
    shape, labels = eqn.invars[1 - position].aval.shape, meeting(eqn, position).other
    return prod(n for n, d in zip(shape, labels, strict=True) if d < RANK)


def _sums(eqn: Eqn, position: int) -> int:
    shape = eqn.invars[position].aval.shape
    return prod(shape[d] for d in meeting(eqn, position).summed)


def _conv_use(eqn: Eqn, position: int) -> Use | None:
    if position == 0 or eqn.params["batch_group_count"] != 1:
        return None
    numbers = eqn.params["dimension_numbers"]
    _, summed, *spatial = numbers.rhs_spec
    # In the order in which the input has them, whatever that of the kernel: height before width in images (n, h, w, c).
    window = tuple(d for _, d in sorted(zip(numbers.lhs_spec[2:], spatial, strict=True)))
    return Use("conv", (summed, *spatial), (), window, _groups(eqn), _is_dilated(eqn, spatial))


def _is_dilated(eqn: Eqn, window: Sequence[int]) -> bool:
    """Whether a kernel's window has gaps; along an axis of size one there is nothing between."""
    sizes = eqn.invars[1].aval.shape
    return any(n != 1 and sizes[d] > 1 for d, n in zip(window, eqn.params["rhs_dilation"] or (), strict=False))


def _groups(eqn: Eqn) -> int:
    """The groups of a convolution; of a transposed one 0, or if it is in groups their number below zero."""
    groups = int(eqn.params["feature_group_count"])
    transposed = any(n != 1 for n in eqn.params["lhs_dilation"] or ())
    return groups if not transposed else 0 if groups == 1 else -groups


def ragged_use(eqn: Eqn, position: int) -> Use | None:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, batch), groups = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
    if position != 1 or len(groups) != 1 or numbers.lhs_ragged_dimensions[0] in (*contracted[0], *batch[0]):
        return None
    return Use("linear", tuple(contracted[1]), (*groups, *batch[1]))


USES: dict[str, Callable[[Eqn, int], Use | None]] = {
    "dot_general": _dot_use,
    "conv_general_dilated": _conv_use,
    "ragged_dot_general": ragged_use,
}
