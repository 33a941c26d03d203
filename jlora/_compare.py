"""How two adapters of one leaf relate: norms, cosine, and the angles between the spaces that they read and write."""

from functools import partial
from math import sqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _jax, _svd
from jlora._adapters import LowRank
from jlora._svd import Svd


class Comparison(NamedTuple):
    """How two updates of one leaf relate, per batch slice; see ``compare``. What only one of two adapters could tell is ``None``."""

    norm_one: jax.Array | None
    norm_two: jax.Array | None
    cosine: jax.Array | None = None
    difference: jax.Array | None = None
    input_angles: jax.Array | None = None
    output_angles: jax.Array | None = None


def norm_of(x: Any, w: Any) -> jax.Array:
    """The norm of the update of an adapter of either kind."""
    if isinstance(x, LowRank):
        return _svd.norm(*_svd.matrices(x, scaled=True))
    return jnp.linalg.norm(_svd.dense(x, w).reshape(-1))


def compare(one: Any, two: Any, w: Any) -> Comparison:
    """What ``jlora.algebra.compare`` gives for one leaf; an adapter is ``None`` if it does not have it."""
    if one is None or two is None:
        return Comparison(*(None if x is None else norm_of(x, w) for x in (one, two)))
    if not (isinstance(one, LowRank) and isinstance(two, LowRank)):
        x, y = (_svd.dense(adapter, w).reshape(-1) for adapter in (one, two))
        wide = _jax.promote(x.dtype, y.dtype)
        x, y = x.astype(wide), y.astype(wide)
        sizes = jnp.linalg.norm(x), jnp.linalg.norm(y)
        cosine = jnp.real(jnp.vdot(_unit(x, sizes[0]), _unit(y, sizes[1])))
        return Comparison(*sizes, *_relation(*sizes, cosine, jnp.linalg.norm(x - y)))
    pairs = [_svd.matrices(x, scaled=True) for x in (one, two)]
    wide = _jax.promote(*(f.dtype for pair in pairs for f in pair))
    (a1, b1), (a2, b2) = first, second = [(a.astype(wide), b.astype(wide)) for a, b in pairs]
    sizes = _svd.norm(*first), _svd.norm(*second)
    apart = _svd.norm(jnp.concatenate([a1, a2], -1), jnp.concatenate([b1, -b2], -2))
    cosine = _svd.inner((a1, _unit(b1, sizes[0][..., None, None])), (a2, _unit(b2, sizes[1][..., None, None])))
    found = _relation(*sizes, cosine, apart)
    return Comparison(*sizes, *found, *angles(_svd.thin(*first), _svd.thin(*second)))


def _unit(x: jax.Array, norm: jax.Array) -> jax.Array:
    return x / jnp.where(norm > 0, norm, jnp.ones_like(norm)).astype(x.dtype)


def _relation(one: jax.Array, two: jax.Array, cosine: jax.Array, apart: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The cosine and the relative difference, where norms may be zero: then the products of units are, too."""
    ratio = apart / jnp.where(one > 0, one, jnp.ones_like(one))
    nothing = jnp.where(two > 0, jnp.full_like(one, jnp.inf), jnp.zeros_like(one))
    return jnp.clip(cosine, -1.0, 1.0), jnp.where(one > 0, ratio, nothing)


@jax.jit
def angles(one: Svd, two: Svd) -> tuple[jax.Array, jax.Array]:
    r"""The principal angles of the column spaces and of the row spaces of two decompositions, ascending, in radians.

    NaN beyond the lower of their numerical ranks: a direction that an update does not have makes no angle.
    """
    both = shared(one.s, two.s)
    left = _angles(*(s.u * _svd.live(s.s)[..., None, :].astype(s.u.dtype) for s in (one, two)))
    right = _angles(*(_svd.adjoint(s.vh) * _svd.live(s.s)[..., None, :].astype(s.vh.dtype) for s in (one, two)))
    return jnp.where(both, left, jnp.nan), jnp.where(both, right, jnp.nan)


@jax.jit
def shared(one: jax.Array, two: jax.Array) -> jax.Array:
    """Which of the principal angles of two updates are between directions that both have; of the updates' singular values."""
    count = partial(jnp.sum, axis=-1, keepdims=True, dtype=jnp.int32)
    ranks = jnp.minimum(*(count(_svd.live(s) | ~jnp.isfinite(s)) for s in (one, two)))
    return lax.broadcasted_iota(jnp.int32, (*one.shape[:-1], min(one.shape[-1], two.shape[-1])), one.ndim - 1) < ranks


def _angles(one: jax.Array, two: jax.Array) -> jax.Array:
    r"""Of two bases, whose columns are orthonormal or zero; a zero column is at a right angle to everything, and so comes last.

    With $Q_1^* Q_2 = Y C Z^*$ the pairs of principal vectors are $U = Q_1 Y$ and $V = Q_2 Z$, the cosines $C$ and the sines
    $\lVert v - c\,u \rVert$, which tell small angles as cosines cannot.
    """
    y, cosine, zh = jnp.linalg.svd(_svd.times(_svd.adjoint(one), two), full_matrices=False)
    cosine = jnp.clip(cosine, 0.0, 1.0)
    rest = _svd.times(two, _svd.adjoint(zh)) - _svd.times(one, y) * cosine[..., None, :].astype(one.dtype)
    small = jnp.arctan2(jnp.linalg.norm(rest, axis=-2), cosine)
    return jnp.where(cosine > sqrt(0.5), small, jnp.arccos(cosine))
