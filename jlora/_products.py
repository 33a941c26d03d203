"""Products of activations with factored values, evaluated through the rank: matrices, groups of tokens, convolutions."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _jax
from jlora._labelled import RANK, Labels, arrange, contract, extend, mesh_axes, sum_alone
from jlora._primitives import Dense, Eqn, meeting, ragged_use

Matrix = Callable[[Any, int], Any]
"""Of activations and a number: those with that many first axes made one."""


def dot_general(eqn: Eqn, position: int, values: Sequence[Any], use: int, matrix: Matrix) -> list[Any]:
    r"""``x·W + (x·a)·b`` for any ``dot_general``: an axis of ``x`` takes the label of the axis of ``W`` it meets."""
    f, x = values[position], values[1 - position]
    (y,) = _jax.bind(eqn, [f.w, x] if position == 0 else [x, f.w])
    _, _, x_labels, out = meeting(eqn, position)
    x_free = [d for d in x_labels if d < RANK]
    # The result decides: an axis that is summed over has no place in what the thin product leaves.
    specs = mesh_axes((x, ()), (y, out))
    shape = y.shape
    if specs is None and len(x_free) > 1 and x_labels[: len(x_free)] == tuple(x_free):  # tokens of sequences are tokens
        x, (first, *others) = matrix(x, len(x_free)), x_free
        x_labels, out = (first, *x_labels[len(x_free) :]), tuple(d for d in out if d not in others)
        sizes = dict(zip((*x_labels, *range(len(f.shape))), (*x.shape, *f.shape), strict=True))
        shape = [sizes[d] for d in out]
    precision = _jax.thin_precision(eqn.params["precision"])
    if position == 0:
        precision = _jax.swapped(precision)
    how = {"dtype": _jax.thin_dtype(y.dtype), "precision": precision, "specs": specs}
    return [_added(y, f.product(x, x_labels, out, shape, use, **how).reshape(y.shape))]


def _added(y: jax.Array, update: jax.Array) -> jax.Array:
    """``y`` with the adapter's share, in the dtype of ``y``; the sum is made in the wider dtype of the two."""
    return y + update if y.dtype == update.dtype else (y.astype(update.dtype) + update).astype(y.dtype)


def ragged_dot_general(eqn: Eqn, position: int, values: Sequence[Any], use: int, _: Matrix) -> list[Any]:
    """A product of sorted tokens with the experts of their groups: one ragged product with each factor, through the rank."""
    x, f, sizes = values[:3]
    used = ragged_use(eqn, position)
    if used is None or len(values) != 3:
        raise Dense
    (y,) = _jax.bind(eqn, [x, f.w, sizes])
    numbers, (group, *batch) = eqn.params["ragged_dot_dimension_numbers"], used.batch
    (contracted, _), (x_batch, _) = numbers.dot_dimension_numbers
    met = dict(zip((*contracted, *x_batch), (*used.summed, *batch), strict=True))
    x_labels = tuple(met.get(i, RANK - 1 - i) for i in range(x.ndim))
    ragged = x_labels[numbers.lhs_ragged_dimensions[0]]
    # As ragged_dot_general orders its result.
    out = (
        *batch,
        *(d for d in x_labels if d < RANK),
        *(d for d in range(len(f.shape)) if d not in (*met.values(), group)),
    )
    f = f.scaled()
    first = 0 if set(used.summed) & set(f.labels[0]) else 1
    compute, precision = _jax.thin_dtype(x.dtype, f.w.dtype), _jax.thin_precision(eqn.params["precision"])
    t, labels = f.dropout(x.astype(compute), use), x_labels
    for i, dtype in ((first, _jax.thin_dtype(compute, y.dtype)), (1 - first, _jax.thin_dtype(y.dtype))):
        part, ls = f.parts[i].astype(t.dtype), f.labels[i]
        if i == first and group not in (*f.labels[0], *f.labels[1]):
            # One update for all groups; tokens that are in no group have none.
            part, ls = lax.broadcast(part, (f.shape[group],)), (group, *ls)
        keep = {*out} if i != first else {*out, *f.labels[1 - first]}
        if group in ls:
            t, labels = _ragged((t, labels), (part, ls), sizes, group, ragged, keep, precision, dtype)
        else:
            t, labels = contract((t, labels), (part, ls), keep, None, precision, dtype, None)
    return [_added(y, arrange(t, labels, out, y.shape))]


def _ragged(
    left: tuple[jax.Array, Labels],
    right: tuple[jax.Array, Labels],
    sizes: jax.Array,
    group: int,
    ragged: int,
    keep: set[int],
    precision: Any,
    dtype: Any,
) -> tuple[jax.Array, Labels]:
    """``contract`` where axis ``ragged`` of ``left`` is made of groups, each with its own slice of ``right`` along ``group``."""
    (x, xl), (part, pl) = sum_alone(*left, right[1], keep), right
    shared = [d for d in xl if d in pl]
    summed, batch = [d for d in shared if d not in keep], [d for d in shared if d in keep]
    numbers = lax.RaggedDotDimensionNumbers(
        (
            ([xl.index(d) for d in summed], [pl.index(d) for d in summed]),
            ([xl.index(d) for d in batch], [pl.index(d) for d in batch]),
        ),
        [xl.index(ragged)],
        [pl.index(group)],
    )
    out = lax.ragged_dot_general(x, part, sizes, numbers, precision=precision, preferred_element_type=dtype)
    return out, (*batch, *(d for d in xl if d not in shared), *(d for d in pl if d not in (*shared, group)))


def conv_general_dilated(eqn: Eqn, position: int, values: Sequence[Any], use: int, _: Matrix) -> list[Any]:
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
    ways = [bool(set(f.labels[i]) & set(spatial)) for i in (first, 1 - first)]
    if all(ways) or rhs_out in f.labels[first] or rhs_in in f.labels[1 - first]:
        raise Dense
    compute = _jax.thin_dtype(x.dtype, f.w.dtype)
    x, f = f.dropout(x.astype(compute), use), f.scaled()
    # An axis that neither factor has, for the update is constant along it, is one of the kernel all the same.
    constant = set(range(len(f.shape))).difference(*f.labels[:2])
    kernels = [
        _kernel(*extend(f.parts[i], f.labels[i], sorted(constant & of), f.shape), rank, len(f.shape)).astype(compute)
        for i, of, rank in (
            (first, {rhs_in, *(() if ways[1] else spatial)}, {RANK: rhs_out}),
            (1 - first, {rhs_out, *(spatial if ways[1] else ())}, {RANK: rhs_in}),
        )
    ]
    whole = p["feature_group_count"] == 1
    if ways[1]:
        evaluate = _mix_then_conv if whole else _mix_then_conv_groups
    else:
        evaluate = _conv_then_mix if whole else _conv_groups_then_mix
    return [_added(y, evaluate(eqn, x, kernels, y.dtype))]


def _conv_then_mix(eqn: Eqn, x: jax.Array, kernels: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """Two convolutions; the second is 1x1, and its input already lies as the output of ``eqn``."""
    out, wide = eqn.params["dimension_numbers"].out_spec, _jax.thin_dtype(x.dtype, dtype)
    t = _conv(eqn, x, kernels[0], wide, _jax.conv_sharding(eqn, whole=out[1]))
    return _mix(eqn, t, kernels[1], out, _jax.thin_dtype(dtype), _jax.conv_sharding(eqn))


def _mix_then_conv(eqn: Eqn, x: jax.Array, kernels: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """Two convolutions; the first is 1x1, and its output still lies as the input of ``eqn``."""
    lhs, wide = eqn.params["dimension_numbers"].lhs_spec, _jax.thin_dtype(x.dtype, dtype)
    t = _mix(eqn, x, kernels[0], lhs, wide, _jax.conv_sharding(eqn, like=x, whole=lhs[1]))
    return _conv(eqn, t, kernels[1], _jax.thin_dtype(dtype), _jax.conv_sharding(eqn))


def _conv(eqn: Eqn, x: jax.Array, kernel: jax.Array, dtype: Any, sharding: dict[str, Any]) -> jax.Array:
    """The convolution of ``eqn`` with another kernel, without groups."""
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "precision")
    how = {name: eqn.params[name] for name in names} | sharding
    return lax.conv_general_dilated(x, kernel.astype(x.dtype), preferred_element_type=dtype, **how)


def _mix(
    eqn: Eqn, x: jax.Array, kernel: jax.Array, layout: tuple[int, ...], dtype: Any, sharding: dict[str, Any]
) -> jax.Array:
    """The features of ``x`` mixed by a 1x1 kernel in the layout of ``eqn``'s kernel; ``x`` lies in ``layout``, and so does the result."""
    ones = (1,) * (len(layout) - 2)
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=ones,
        padding=[(0, 0) for _ in ones],
        dimension_numbers=lax.ConvDimensionNumbers(layout, eqn.params["dimension_numbers"].rhs_spec, layout),
        precision=eqn.params["precision"],
        preferred_element_type=dtype,
        **sharding,
    )


def _conv_groups_then_mix(eqn: Eqn, x: jax.Array, kernels: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """A grouped convolution: each group with the first kernel, then its own columns of the second."""
    p, numbers, groups = eqn.params, eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    (batch, features), (rhs_out, rhs_in, *spatial) = numbers.out_spec[:2], numbers.rhs_spec
    wide = _jax.thin_dtype(x.dtype, dtype)
    rows = _groups_to_batch(x, groups, *numbers.lhs_spec[:2])
    t = _conv(eqn, rows, kernels[0], wide, _jax.conv_sharding(eqn, whole=features))
    b = jnp.squeeze(kernels[1].astype(wide), spatial)
    b = (b if rhs_in < rhs_out else b.T).reshape(t.shape[features], groups, -1)  # (rank, groups, outputs)
    t = _batch_to_groups(t, groups, batch, features)  # (..., groups, rank)
    how = {"precision": p["precision"], "preferred_element_type": _jax.thin_dtype(dtype)}
    t = jnp.einsum("...gr,rgo->...go", t, b, **how)
    return jnp.moveaxis(t.reshape(*t.shape[:-2], -1), -1, features)


def _mix_then_conv_groups(eqn: Eqn, x: jax.Array, kernels: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """A grouped convolution whose second kernel has the window: one group after another, for the partitioner's sake, as below."""
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    lhs, rhs_out, features = numbers.lhs_spec, numbers.rhs_spec[0], numbers.out_spec[1]
    rows, wide = _groups_to_batch(x, groups, *lhs[:2]), _jax.thin_dtype(x.dtype, dtype)
    t = _mix(eqn, rows, kernels[0], lhs, wide, _jax.conv_sharding(eqn, like=x, whole=lhs[1]))
    t = _batch_to_groups(t, groups, *lhs[:2])  # (..., groups, rank)
    t = jnp.moveaxis(jnp.moveaxis(t, -2, 0), -1, 1 + lhs[1])
    b = kernels[1].reshape(*kernels[1].shape[:rhs_out], groups, -1, *kernels[1].shape[rhs_out + 1 :])

    def of_group(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _conv(eqn, pair[0], pair[1], _jax.thin_dtype(dtype), _jax.conv_sharding(eqn))

    y = jnp.moveaxis(lax.map(of_group, (t, jnp.moveaxis(b, rhs_out, 0))), 0, features)
    return y.reshape(*y.shape[:features], -1, *y.shape[features + 2 :])


def _groups_to_batch(x: jax.Array, groups: int, batch: int, features: int) -> jax.Array:
    """The groups of features as rows of the batch: all of them meet the same kernel.

    As a convolution in groups, with the kernel repeated, it would be the same, but XLA's partitioner computes such ones and their
    gradients wrongly on some meshes (jax 0.10.2 to 0.12.0, CPU), and repeated kernels are no faster anywhere.
    """
    split = x.reshape(*x.shape[:features], groups, -1, *x.shape[features + 1 :])
    batch += batch > features
    split = jnp.moveaxis(split, features, batch + (batch < features))
    batch -= batch > features
    return split.reshape(*split.shape[:batch], -1, *split.shape[batch + 2 :])


def _batch_to_groups(t: jax.Array, groups: int, batch: int, features: int) -> jax.Array:
    """The groups back out of the batch: the last axes are the groups and their features."""
    split = t.reshape(*t.shape[:batch], -1, groups, *t.shape[batch + 1 :])
    return jnp.moveaxis(split, (batch + 1, features + (features > batch)), (-2, -1))


def _kernel(part: jax.Array, labels: Labels, rank: dict[int, int], ndim: int) -> jax.Array:
    """``part`` in the layout of the whole kernel, with the rank where features are, and size one along axes it does not have."""
    axes = [rank.get(d, d) for d in labels]
    part = jnp.transpose(part, [axes.index(d) for d in sorted(axes)])
    return lax.expand_dims(part, [d for d in range(ndim) if d not in axes])
