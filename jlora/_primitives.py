"""What each primitive does to a weight: the one table that discovery and evaluation both read.

``VIEWS`` says along which old axes each new axis of a view runs. ``USES`` says which axes of a weight a product sums over, and which it
matches with a batch axis. ``RULES`` evaluates both kinds on a ``Factored`` value. A primitive that is in none of them needs the
weight dense. Primitives with a body (``jit``, ``scan``...) are in ``_interpret``.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _jax
from jlora._factored import RANK, Factored, Labels, mesh_axes, reshape_groups, scale_part

Flow = list[Labels]
Eqn = Any


class Use(NamedTuple):
    """How one equation uses a weight: ``kind`` is ``"linear"``, ``"conv"`` or ``"lookup"``."""

    kind: str
    summed: Labels
    batch: Labels


class Dense(Exception):
    """Raised by a rule that cannot keep its weight factored; the interpreter turns it into an error for people, or goes dense."""


# --- Views: which old axes each axis of the result runs along --------------------------------------------------------


def _same(eqn: Eqn, shape: Sequence[int]) -> Flow:
    return [(d,) for d in range(len(shape))]


def _squeeze(eqn: Eqn, shape: Sequence[int]) -> Flow:
    return [(d,) for d in range(len(shape)) if d not in eqn.params["dimensions"]]


def _broadcast_in_dim(eqn: Eqn, shape: Sequence[int]) -> Flow:
    source, new = {j: d for d, j in enumerate(eqn.params["broadcast_dimensions"])}, eqn.params["shape"]
    return [(source[j],) if j in source and shape[source[j]] == n else () for j, n in enumerate(new)]


def _reshape(eqn: Eqn, shape: Sequence[int]) -> Flow:
    source = {j: old for old, new in _groups(eqn, shape) for j in new}
    return [source.get(j, ()) for j in range(len(eqn.params["new_sizes"]))]


def _groups(eqn: Eqn, shape: Sequence[int]) -> list[tuple[Labels, Labels]]:
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
    "convert_element_type",
    "copy",
    "copy_p",
    "div",
    "dynamic_slice",
    "mul",
    "name",
    "neg",
    "pvary",
    "reduce_precision",
    "reshard",
    "rev",
    "sharding_constraint",
    "slice",
    "split",
    "stop_gradient",
)

VIEWS: dict[str, Callable[[Eqn, Sequence[int]], Flow]] = {
    "transpose": lambda eqn, shape: [(d,) for d in eqn.params["permutation"]],
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "gather": _gather,
    **dict.fromkeys(_ELEMENTWISE, _same),
}


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
    """Axes of the weight along which ``mul`` or ``div`` varies its factor; ``None`` if the result is not a scaled weight."""
    if tuple(eqn.outvars[0].aval.shape) != tuple(shape):
        return None
    gain = eqn.invars[1 - position].aval.shape
    return tuple(d for d, n in enumerate(gain) if n != 1)


# --- Uses: what a product sums over ----------------------------------------------------------------------------------


def _dot_use(eqn: Eqn, position: int) -> Use | None:
    contracted, batch = eqn.params["dimension_numbers"]
    return Use("linear", tuple(contracted[position]), tuple(batch[position]))


def _conv_use(eqn: Eqn, position: int) -> Use | None:
    if position == 0 or eqn.params["batch_group_count"] != 1:
        return None
    _, summed, *spatial = eqn.params["dimension_numbers"].rhs_spec
    return Use("conv", (summed, *spatial), ())


USES: dict[str, Callable[[Eqn, int], Use | None]] = {"dot_general": _dot_use, "conv_general_dilated": _conv_use}


# --- Evaluation on a factored value ----------------------------------------------------------------------------------


def view(eqn: Eqn, position: int, values: Sequence[Any], use: int) -> list[Any]:
    """Applies a view primitive to the factored value at ``position``: to its base as it stands, to its factors axis by axis."""
    f: Factored = values[position]
    name = eqn.primitive.name
    if position != 0 and name != "mul":
        raise Dense
    if name == "gather":
        return [_take(eqn, values, use)]
    ws = _jax.bind(eqn, [*values[:position], f.w, *values[position + 1 :]])
    if not jnp.issubdtype(ws[0].dtype, jnp.inexact):
        raise Dense
    if name in _ALONG:
        return [f.map_parts(w, part) for w, part in zip(ws, _ALONG[name](eqn, f, values), strict=True)]
    (w,) = ws
    if name == "reshape":
        out = f.reshape(w, _groups(eqn, f.shape))
    elif name in ("mul", "div", "neg"):
        out = _scaled(eqn, position, values, w)
    elif name == "stop_gradient":
        out = f.map_parts(w, lambda part, labels: (lax.stop_gradient(part), labels))
    else:
        out = f.relabel(w, VIEWS[name](eqn, f.shape))
    if out is None:
        raise Dense
    return [out]


def _scaled(eqn: Eqn, position: int, values: Sequence[Any], w: jax.Array) -> Factored | None:
    f: Factored = values[position]
    if eqn.primitive.name == "neg":
        return f.gain(w, (), lambda part, labels: -part)
    axes = gain_axes(eqn, position, f.shape)
    how = lax.mul if eqn.primitive.name == "mul" else lax.div
    gain = jnp.asarray(values[1 - position])
    return None if axes is None else f.gain(w, axes, lambda part, labels: scale_part(part, labels, gain, how))


Along = Callable[[jax.Array, Labels], tuple[jax.Array, Labels]]


def _slice(eqn: Eqn, f: Factored, values: Sequence[Any]) -> list[Along]:
    starts, limits, strides = (eqn.params[k] for k in ("start_indices", "limit_indices", "strides"))
    windows = [slice(i, j, s) for i, j, s in zip(starts, limits, strides or [1] * len(starts), strict=True)]
    return [lambda part, ls: (part[tuple(slice(None) if d == RANK else windows[d] for d in ls)], ls)]


def _dynamic_slice(eqn: Eqn, f: Factored, values: Sequence[Any]) -> list[Along]:
    starts, sizes = values[1:], eqn.params["slice_sizes"]

    def along(part: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        begin = [jnp.zeros((), starts[0].dtype) if d == RANK else starts[d] for d in labels]
        size = [n if d == RANK else sizes[d] for n, d in zip(part.shape, labels, strict=True)]
        return lax.dynamic_slice(part, begin, size) if labels else part, labels

    return [along]


def _rev(eqn: Eqn, f: Factored, values: Sequence[Any]) -> list[Along]:
    return [lambda part, ls: (lax.rev(part, [i for i, d in enumerate(ls) if d in eqn.params["dimensions"]]), ls)]


def _split(eqn: Eqn, f: Factored, values: Sequence[Any]) -> list[Along]:
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]

    def piece(start: int, size: int) -> Along:
        return lambda part, ls: (
            lax.slice_in_dim(part, start, start + size, axis=ls.index(axis)) if axis in ls else part,
            ls,
        )

    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [piece(start, size) for start, size in zip(starts, sizes, strict=True)]


_ALONG: dict[str, Callable[..., list[Along]]] = {
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "rev": _rev,
    "split": _split,
}


def _take(eqn: Eqn, values: Sequence[Any], use: int) -> Any:
    """Rows of a table, or slices along batch axes: a lookup gives activations, a choice of layer or expert gives a weight."""
    f, indices = values
    numbers = eqn.params["dimension_numbers"]
    chosen = picked(eqn, f.shape)
    if chosen is None:
        raise Dense
    (w,) = _jax.bind(eqn, [f.w, indices])
    flow = VIEWS["gather"](eqn, f.shape)
    new = {old: j for j, source in enumerate(flow) for old in source} | {RANK: RANK}
    rows = [j for j in range(w.ndim) if j not in numbers.offset_dims]
    mode = eqn.params["mode"]

    def take(part: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        mine = [d for d in labels if d in chosen]
        if not mine:
            return part, tuple(new[d] for d in labels)
        rest = [d for d in labels if d not in chosen]
        moved = jnp.transpose(part, [labels.index(d) for d in mine + rest])
        index = tuple(_index_of(numbers, indices, d) for d in mine)
        # Where an index out of bounds fills the base with something, the update there is zero.
        got = moved.at[index].get(mode=mode, fill_value=0, wrap_negative_indices=False)
        return got, (*rows, *(new[d] for d in rest))

    taken = f.map_parts(w, take)
    if set(chosen) <= set(f.labels[0]) & set(f.labels[1]) | _units(f):
        return taken
    return taken.rows(0 if set(chosen) & set(f.labels[0]) else 1, use)


def _units(f: Factored) -> set[int]:
    return {d for d, n in enumerate(f.shape) if n == 1}


def _index_of(numbers: Any, indices: jax.Array, axis: int) -> jax.Array:
    """The indices along one axis of the operand, in the shape of the gather's batch dimensions."""
    if axis in numbers.start_index_map:
        return indices[..., numbers.start_index_map.index(axis)]
    along = numbers.start_indices_batching_dims[numbers.operand_batching_dims.index(axis)]
    return lax.broadcasted_iota(indices.dtype, indices.shape[:-1], along)


def dot_general(eqn: Eqn, position: int, values: Sequence[Any], use: int) -> list[Any]:
    r"""``x·W + (x·a)·b`` for any ``dot_general``: an axis of ``x`` takes the label of the axis of ``W`` it meets."""
    f, x = values[position], values[1 - position]
    contracted, batch = eqn.params["dimension_numbers"]
    (y,) = _jax.bind(eqn, [f.w, x] if position == 0 else [x, f.w])
    met = dict(
        zip((*contracted[1 - position], *batch[1 - position]), (*contracted[position], *batch[position]), strict=True)
    )
    x_labels = tuple(met.get(i, RANK - 1 - i) for i in range(x.ndim))
    x_free = [d for i, d in enumerate(x_labels) if i not in met]
    w_free = [d for d in range(len(f.shape)) if d not in met.values()]
    out = (*batch[position], *(w_free + x_free if position == 0 else x_free + w_free))
    # The result decides: an axis that is summed over has no place in what the thin product leaves.
    specs = mesh_axes((x, ()), (y, out))
    update = f.product(x, x_labels, out, y.shape, use, dtype=y.dtype, precision=_precision(eqn, position), specs=specs)
    return [y + update]


def _precision(eqn: Eqn, position: int) -> Any:
    """The precision for products whose left operand is the activations."""
    precision = eqn.params["precision"]
    return precision[::-1] if isinstance(precision, tuple) and position == 0 else precision


def conv_general_dilated(eqn: Eqn, position: int, values: Sequence[Any], use: int) -> list[Any]:
    """A convolution with the factor that sums over the input features, then one with the other.

    The factor that has the spatial axes is convolved with the window of the base; the other is a 1x1 kernel. In a grouped convolution
    every group shares the first factor and has columns of its own in the second, so that the update is low-rank as a matrix.
    """
    x, f = values[0], values[1]
    p, (rhs_out, rhs_in, *spatial) = eqn.params, eqn.params["dimension_numbers"].rhs_spec
    if position == 0 or p["batch_group_count"] != 1:
        raise Dense
    (y,) = _jax.bind(eqn, [x, f.w])
    first = 1 if (rhs_in in f.labels[1] and rhs_in not in f.labels[0]) or rhs_out in f.labels[0] else 0
    ways = [set(f.labels[i]) & set(spatial) for i in (first, 1 - first)]
    if all(ways) or rhs_out in f.labels[first] or rhs_in in f.labels[1 - first]:
        raise Dense
    compute = _jax.promote(x.dtype, f.w.dtype)
    kernels = [
        _kernel(f.parts[first], f.labels[first], {RANK: rhs_out}, len(f.shape)),
        _kernel(f.parts[1 - first], f.labels[1 - first], {RANK: rhs_in}, len(f.shape)),
    ]
    groups = p["feature_group_count"]
    if groups > 1:
        if ways[1]:
            raise Dense
        kernels[0] = jnp.concatenate([kernels[0]] * groups, axis=rhs_out)
    window = {k: p[k] for k in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")}
    none = {"window_strides": (1,) * len(spatial), "padding": ((0, 0),) * len(spatial)}
    steps = [none, window] if ways[1] else [window, none]
    t = f.dropout(x, use).astype(compute)
    for kernel, step, dtype in zip(kernels, steps, (compute, y.dtype), strict=True):
        t = lax.conv_general_dilated(
            t,
            kernel.astype(compute),
            dimension_numbers=p["dimension_numbers"],
            feature_group_count=groups,
            precision=p["precision"],
            preferred_element_type=dtype,
            **step,
        )
    return [y + t]


def _kernel(part: jax.Array, labels: Labels, rank: dict[int, int], ndim: int) -> jax.Array:
    """``part`` in the layout of the whole kernel, with the rank where features are, and size one along axes it does not have."""
    axes = [rank.get(d, d) for d in labels]
    part = jnp.transpose(part, [axes.index(d) for d in sorted(axes)])
    return lax.expand_dims(part, [d for d in range(ndim) if d not in axes])


RULES: dict[str, Callable[[Eqn, int, Sequence[Any], int], list[Any]]] = {
    **dict.fromkeys(VIEWS, view),
    "dot_general": dot_general,
    "conv_general_dilated": conv_general_dilated,
}
