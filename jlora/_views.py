"""Views and joins of factored values, evaluated: the base as the program has it, the factors axis by axis."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _jax
from jlora._factored import Factored
from jlora._join import concatenated, padded, total
from jlora._labelled import RANK, Labels, extend, scale_part
from jlora._primitives import VIEWS, Dense, Eqn, gain_axes, is_weight, picked, regrouped, stacked


def view(eqn: Eqn, position: int, values: Sequence[Any], *_: Any) -> list[Any]:
    """Applies a view primitive to the factored value at ``position``: to its base as it stands, to its factors axis by axis."""
    f: Factored = values[position]
    name = eqn.primitive.name
    if position != 0 and name != "mul":
        raise Dense
    if name == "gather":
        return [_take(eqn, values)]
    ws = _jax.bind(eqn, [*values[:position], f.w, *values[position + 1 :]])
    if not is_weight(eqn, position):
        raise Dense
    if name == "pad":
        return [padded(f, ws[0], [tuple(c) for c in eqn.params["padding_config"]])]
    if name in _ALONG:
        return [f.map_parts(w, part) for w, part in zip(ws, _ALONG[name](eqn, f, values), strict=True)]
    (w,) = ws
    if name == "reshape":
        out = f.reshape(w, regrouped(eqn, f.shape))
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
    # Under vmap, a weight that all examples share may meet a gain of each: it is repeated along their axis.
    wide = f.relabel(w, [(d,) if n == m else () for d, (n, m) in enumerate(zip(f.shape, w.shape, strict=True))])
    return None if axes is None else wide.gain(w, axes, lambda part, labels: scale_part(part, labels, gain, how))


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


def _unstack(eqn: Eqn, f: Factored, values: Sequence[Any]) -> list[Along]:
    axis = eqn.params["axis"]

    def piece(index: int) -> Along:
        def along(part: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
            if axis in labels:
                part = lax.index_in_dim(part, index, labels.index(axis), keepdims=False)
            return part, tuple(d - (d > axis) for d in labels if d != axis)

        return along

    return [piece(i) for i in range(f.shape[axis])]


def _reshard(eqn: Eqn, f: Factored, values: Sequence[Any]) -> list[Along]:
    """Each axis of a factor goes where the axis of the weight goes that it runs along."""
    return [lambda part, ls: (_jax.reshard(eqn, part, [None if d == RANK else d for d in ls]), ls)]


def _all_gather(eqn: Eqn, f: Factored, values: Sequence[Any]) -> list[Along]:
    """The whole weight of its shards: a factor that runs along the axis is gathered too, if the other is the same on every device."""
    axis, names = eqn.params["all_gather_dimension"], eqn.params["axis_name"]
    gathered = set(names if isinstance(names, tuple) else (names,))
    apart = any(gathered & _jax.varies(part) for part, ls in zip(f.parts, f.labels, strict=True) if axis not in ls)
    if apart or not gathered <= _jax.varies(f.w):  # nothing is known where the shard_map does not check
        raise Dense

    def along(part: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
        if axis not in labels:
            return part, labels
        groups = eqn.params["axis_index_groups"]
        return lax.all_gather(part, names, axis=labels.index(axis), tiled=True, axis_index_groups=groups), labels

    return [along]


def _tile(eqn: Eqn, f: Factored, values: Sequence[Any]) -> list[Along]:
    reps = eqn.params["reps"]
    return [lambda part, ls: (jnp.tile(part, [1 if d == RANK else reps[d] for d in ls]), ls)]


_ALONG: dict[str, Callable[..., list[Along]]] = {
    "all_gather": _all_gather,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "rev": _rev,
    "split": _split,
    "tile": _tile,
    "unstack": _unstack,
    "reshard": _reshard,
}


def join(eqn: Eqn, values: Sequence[Any]) -> list[Any]:
    """One weight made of several: their sum, or side by side."""
    name = eqn.primitive.name
    (w,) = _jax.bind(eqn, [v.w if isinstance(v, Factored) else v for v in values])
    if name == "concatenate":
        out = concatenated(w, values, eqn.params["dimension"])
    elif name == "stack":
        out = concatenated(w, [_unstacked(eqn, v) for v in values], eqn.params["axis"])
    else:
        terms = [
            _negated(v) if name == "sub" and i == 1 else v for i, v in enumerate(values) if isinstance(v, Factored)
        ]
        # A smaller array is repeated along axes that its factors do not have.
        out = None if any(v.shape != w.shape for v in terms) else total(w, terms)
    if out is None:
        raise Dense
    return [out]


def _negated(f: Factored) -> Factored:
    return replace(f, parts=(f.parts[0], -f.parts[1], *f.parts[2:]))


def _unstacked(eqn: Eqn, value: Any) -> Any:
    """A piece of a stack with its axis of size one."""
    if not isinstance(value, Factored):
        return lax.expand_dims(value, [eqn.params["axis"]])
    return value.relabel(lax.expand_dims(value.w, [eqn.params["axis"]]), stacked(eqn, value.shape))


def _take(eqn: Eqn, values: Sequence[Any]) -> Factored:
    """Slices along batch axes (a layer, an expert), or rows of one factor: rows of a table, or a weight in another order."""
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
    constant = set(chosen).difference(*f.labels[:2])
    if constant and mode == lax.GatherScatterMode.FILL_OR_DROP:
        # No factor has these axes, so none was filled: the update of what is out of bounds is zero by a mask.
        inside = [(i >= 0) & (i < f.shape[d]) for d in constant for i in [_index_of(numbers, indices, d)]]
        taken = _masked(taken, rows, jnp.stack(inside).all(axis=0))
    if set(chosen) <= set(f.labels[0]) & set(f.labels[1]) | _units(f):
        return taken
    return replace(taken, picked=0 if set(chosen) & set(f.labels[0]) else 1)


def _masked(f: Factored, axes: Sequence[int], mask: jax.Array) -> Factored:
    """The value with its update where ``mask``, an array along ``axes``, says so, and zero elsewhere."""
    part, labels = extend(f.parts[0], f.labels[0], axes, f.shape)
    along = [d for d in axes if f.shape[d] != 1]
    mask = mask.reshape([f.shape[d] for d in along])
    aligned = lax.expand_dims(
        jnp.transpose(mask, [along.index(d) for d in labels if d in along]),
        [i for i, n in enumerate(labels) if n not in along],
    )
    thin = {*labels} <= {*axes, RANK}
    parts = (part * aligned.astype(part.dtype), *f.parts[1:])
    return replace(f, parts=parts, labels=(labels, *f.labels[1:]), picked=0 if thin else f.picked)


def _units(f: Factored) -> set[int]:
    return {d for d, n in enumerate(f.shape) if n == 1}


def _index_of(numbers: Any, indices: jax.Array, axis: int) -> jax.Array:
    """The indices along one axis of the operand, in the shape of the gather's batch dimensions."""
    if axis in numbers.start_index_map:
        return indices[..., numbers.start_index_map.index(axis)]
    along = numbers.start_indices_batching_dims[numbers.operand_batching_dims.index(axis)]
    return lax.broadcasted_iota(indices.dtype, indices.shape[:-1], along)
