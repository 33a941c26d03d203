r"""Numerics of low-rank updates, slice by slice: the singular value decomposition of $A B$ without $A B$.

With $A = Q_a R_a$ and $B^* = Q_b R_b$ the small core $R_a R_b^*$ has the singular values of $A B$, and its singular vectors are those of
$A B$ seen through $Q_a$ and $Q_b$. Everything is in fp32 or wider. A *matrix* here is one batch slice of a leaf: its inputs as rows, its
outputs as columns; batch axes lead. What is made of decompositions is in files of its own, ``_extract``, ``_resize``, ``_combine`` and
``_compare``, each for one leaf; dicts of them are ``jlora.algebra``'s.
"""

from dataclasses import replace
from functools import partial
from math import prod, sqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora import _jax
from jlora._adapters import LowRank

SUMMED = "highest"  # precision of every product here: accelerators would round its operands


class Svd(NamedTuple):
    """``u * s @ vh`` for each slice: ``u`` and ``vh`` with orthonormal columns and rows, ``s`` descending."""

    u: jax.Array
    s: jax.Array
    vh: jax.Array


def matrices(x: LowRank, scaled: bool = False) -> tuple[jax.Array, jax.Array]:
    """The factors as ``(*batch, m, rank)`` and ``(*batch, rank, k)``, in fp32 or wider; with ``scaled``, the second times the scale."""
    batch = x.a.shape[: len(x.batch)]
    wide = _jax.promote(x.a.dtype, x.b.dtype, jnp.float32)
    a, b = (whole(f).astype(wide) for f in (x.a, x.b))
    a, b = a.reshape(*batch, -1, x.rank), b.reshape(*batch, x.rank, -1)
    return a, b * jnp.asarray(x.scale, wide) if scaled else b


def rebuild(x: LowRank, a: jax.Array, b: jax.Array, **changes: Any) -> LowRank:
    """``x`` with other factors, given as matrices: in its dtypes, shapes and shardings, whatever their rank."""
    n, rank = len(x.batch), a.shape[-1]
    a = a.reshape(*x.a.shape[:-1], rank).astype(x.a.dtype)
    b = b.reshape(*x.b.shape[:n], rank, *x.b.shape[n + 1 :]).astype(x.b.dtype)
    return replace(x, a=_placed(a, x.a, x.a.ndim - 1), b=_placed(b, x.b, n), **changes)


def smaller_side(x: LowRank) -> int:
    """The highest rank that the update of ``x`` can have."""
    n = len(x.batch)
    return min(prod(x.a.shape[n:-1]), prod(x.b.shape[n + 1 :]))


def adjoint(x: jax.Array) -> jax.Array:
    """The conjugate transpose of each slice."""
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def times(x: jax.Array, y: jax.Array) -> jax.Array:
    """The product of each slice."""
    return jnp.matmul(x, y, precision=SUMMED)


@jax.jit
def thin(a: jax.Array, b: jax.Array) -> Svd:
    """The decomposition of ``a @ b``, with ``min(m, k, rank)`` values."""
    qa, ra = jnp.linalg.qr(a)
    qb, rb = jnp.linalg.qr(adjoint(b))
    u, s, vh = jnp.linalg.svd(times(ra, adjoint(rb)), full_matrices=False)
    return Svd(times(qa, u), s, times(vh, adjoint(qb)))


def core(a: jax.Array, b: jax.Array) -> jax.Array:
    """A small matrix with the singular values, and so the norm, of ``a @ b``."""
    return times(jnp.linalg.qr(a, mode="r"), adjoint(jnp.linalg.qr(adjoint(b), mode="r")))


@jax.jit
def singular_values(a: jax.Array, b: jax.Array) -> jax.Array:
    """Those of each ``a @ b``, descending, as many as ``thin`` gives."""
    return jnp.linalg.svd(core(a, b), compute_uv=False)


@jax.jit
def norm(a: jax.Array, b: jax.Array) -> jax.Array:
    """The Frobenius norm of each ``a @ b``. Through the core: the trace of Gram matrices would square rounding."""
    return jnp.linalg.norm(core(a, b), axis=(-2, -1))


@jax.jit
def inner(one: tuple[jax.Array, jax.Array], two: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The real part of the inner product of each ``a1 @ b1`` with ``a2 @ b2``."""
    (a1, b1), (a2, b2) = one, two
    return jnp.real(jnp.sum(jnp.conj(b1) * times(times(adjoint(a1), a2), b2), axis=(-2, -1)))


def live(s: jax.Array) -> jax.Array:
    """Which singular values are above the rounding of the largest; none are where all are zero."""
    return s > s[..., :1] * (jnp.finfo(s.dtype).eps * max(8, s.shape[-1]))


@partial(jax.jit, static_argnums=1)
def share(s: jax.Array, rank: int) -> jax.Array:
    """The share of the squared norm, over all slices, that the first ``rank`` values have; 1 where all are zero."""
    largest = jnp.max(s)
    one = jnp.ones_like(largest)
    squares = (s / jnp.where(largest > 0, largest, one)) ** 2  # relative: the squares of small values would vanish
    total = jnp.where(largest > 0, jnp.sum(squares), one)
    return jnp.where(largest > 0, jnp.sum(squares[..., :rank]) / total, one)


@partial(jax.jit, static_argnums=1)
def factors(svd: Svd, rank: int, spare: float, scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Factors of the best approximation of ``rank``, with the square roots of the singular values on both sides.

    A direction that the update does not have gets a column of norm ``spare`` in ``a``, and zeros in ``b``: with zeros in both, neither
    would ever get a gradient.
    """
    on = live(svd.s[..., :rank])
    root = jnp.sqrt(svd.s[..., :rank] / scale)
    left = jnp.where(on, root, jnp.asarray(spare, root.dtype))
    right = jnp.where(on, root, jnp.zeros_like(root))
    u, vh = svd.u[..., :rank], svd.vh[..., :rank, :]
    return u * left[..., None, :].astype(u.dtype), right[..., None].astype(vh.dtype) * vh


def spare_norm(inputs: int, use: str) -> float:
    """The norm a column of ``a`` has in a fresh adapter."""
    return sqrt(inputs / 3.0) if use == "lookup" else sqrt(1 / 3.0)


@partial(jax.jit, static_argnums=1)
def dense_svd(x: jax.Array, rank: int) -> Svd:
    """The decomposition of dense matrices ``(*batch, m, k)``, one slice after the other: all values, and vectors up to ``rank``."""
    *batch, m, k = x.shape

    def one(matrix: jax.Array) -> Svd:
        u, s, vh = jnp.linalg.svd(matrix, full_matrices=False)
        return Svd(u[:, :rank], s, vh[:rank])

    parts = lax.map(one, x.reshape(-1, m, k))
    return Svd(*(part.reshape(*batch, *part.shape[1:]) for part in parts))


def whole(x: Any) -> Any:
    """``x`` on every device of its mesh: factors are small, and decompositions do not split."""
    if _jax.is_explicit(x):
        return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec()))
    if is_split(x):
        return jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))
    return jnp.asarray(x)


def _placed(x: jax.Array, like: Any, rank_axis: int) -> jax.Array:
    """``x`` split as ``like`` is, but for the rank, which may be another."""
    if not is_split(like):
        return x
    spec = [*like.sharding.spec, *[None] * (like.ndim - len(like.sharding.spec))]
    spec[rank_axis] = None
    return jax.device_put(x, NamedSharding(like.sharding.mesh, PartitionSpec(*spec)))


def is_split(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and isinstance(x.sharding, NamedSharding)


def dense(x: Any, w: Any) -> jax.Array:
    """The dense update of a leaf, in fp32 or wider."""
    arrays = {name: f.astype(_jax.promote(f.dtype, jnp.float32)) for name, f in x.arrays().items()}
    update: jax.Array = replace(x, **arrays).delta(w)
    return update
