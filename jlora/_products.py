"""Products of activations with factored values, evaluated through the rank: matrices, groups of tokens, convolutions."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _jax
from jlora._labelled import RANK, Labels, arrange, contract, extend, mesh_axes
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
    how = {"dtype": y.dtype, "precision": _precision(eqn, position), "specs": specs}
    return [y + f.product(x, x_labels, out, shape, use, **how).reshape(y.shape)]


def _precision(eqn: Eqn, position: int) -> Any:
    """The precision for products whose left operand is the activations."""
    precision = eqn.params["precision"]
    return precision[::-1] if isinstance(precision, tuple) and position == 0 else precision


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
    compute = _jax.promote(x.dtype, f.w.dtype)
    t, labels = f.dropout(x, use).astype(compute), x_labels
    for i, dtype in ((first, compute), (1 - first, y.dtype)):
        part, ls = f.parts[i].astype(compute), f.labels[i]
        keep = {*out} if i != first else {*out, *f.labels[1 - first]}
        if group in ls:
            t, labels = _ragged((t, labels), (part, ls), sizes, group, ragged, keep, eqn.params["precision"], dtype)
        else:
            t, labels = contract((t, labels), (part, ls), keep, None, eqn.params["precision"], dtype, None)
    return [y + arrange(t, labels, out, y.shape)]


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
    (x, xl), (part, pl) = left, right
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
    ways = [set(f.labels[i]) & set(spatial) for i in (first, 1 - first)]
    if all(ways) or rhs_out in f.labels[first] or rhs_in in f.labels[1 - first]:
        raise Dense
    f = f.scaled()
    compute = _jax.promote(x.dtype, f.w.dtype)
    # An axis that neither factor has, for the update is constant along it, is one of the kernel all the same.
    constant = set(range(len(f.shape))).difference(*f.labels[:2])
    kernels = [
        _kernel(*extend(f.parts[i], f.labels[i], sorted(constant & of), f.shape), rank, len(f.shape))
        for i, of, rank in (
            (first, {rhs_in, *(() if ways[1] else spatial)}, {RANK: rhs_out}),
            (1 - first, {rhs_out, *(spatial if ways[1] else ())}, {RANK: rhs_in}),
        )
    ]
    groups = p["feature_group_count"]
    if groups > 1 and ways[1]:
        raise Dense
    window = {k: p[k] for k in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")}
    none = {"window_strides": (1,) * len(spatial), "padding": ((0, 0),) * len(spatial)}

    def conv(t: jax.Array, kernel: jax.Array, step: dict[str, Any], dtype: Any, like: Any) -> jax.Array:
        how = {
            "dimension_numbers": p["dimension_numbers"],
            "precision": p["precision"],
            "preferred_element_type": dtype,
        }
        return lax.conv_general_dilated(t, kernel.astype(compute), **how, **step, **_jax.conv_sharding(eqn, like))

    x = f.dropout(x, use).astype(compute)
    if groups == 1:
        steps = [none, window] if ways[1] else [window, none]
        t = conv(x, kernels[0], steps[0], compute, None)
        return [y + conv(t, kernels[1], steps[1], y.dtype, y)]
    numbers = p["dimension_numbers"]
    t = conv(_groups_to_batch(x, groups, *numbers.lhs_spec[:2]), kernels[0], window, compute, None)
    b = jnp.squeeze(kernels[1].astype(compute), spatial)
    b = (b if rhs_in < rhs_out else b.T).reshape(t.shape[numbers.out_spec[1]], groups, -1)  # (rank, groups, outputs)
    t = _batch_to_groups(t, groups, *numbers.out_spec[:2])  # (..., groups, rank)
    t = jnp.einsum("...gr,rgo->...go", t, b, precision=p["precision"], preferred_element_type=y.dtype)
    return [y + jnp.moveaxis(t.reshape(*t.shape[:-2], -1), -1, numbers.out_spec[1])]


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
