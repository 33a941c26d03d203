r"""Numerics of low-rank updates, slice by slice: the singular value decomposition of $A B$ without $A B$, and what is made of it.

With $A = Q_a R_a$ and $B^* = Q_b R_b$ the small core $R_a R_b^*$ has the singular values of $A B$, and its singular vectors are those of
$A B$ seen through $Q_a$ and $Q_b$. Everything is in fp32 or wider. A *matrix* here is one batch slice of a leaf: its inputs as rows, its
outputs as columns; batch axes lead. Above the line are arrays, below it one leaf and its adapters; dicts of them are ``jlora.algebra``'s.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import isclose, prod, sqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora import _jax
from jlora._adapters import Adapter, Fingerprint, FullWeight, LowRank
from jlora._advice import Advised
from jlora._init import fold_path, of_site, whole_of_site
from jlora._rules import Full, Rule
from jlora._sharding import shardings
from jlora._sites import Site

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
    a, b = (_whole(f).astype(wide) for f in (x.a, x.b))
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


def grow(x: LowRank, rank: int, path: str) -> LowRank:
    """``x`` with further columns in ``a`` as a fresh adapter has them, and zeros in ``b``: the update stays what it is."""
    a, b = matrices(x)
    new = rank - x.rank
    # By path and rank: grown again, an adapter must not get the same columns a second time.
    key = jax.random.fold_in(fold_path(jax.random.key(0), path), x.rank)
    bound = sqrt(3.0 / a.shape[-2]) * spare_norm(a.shape[-2], x.use)
    columns = jax.random.uniform(key, (*a.shape[:-1], new), jnp.finfo(a.dtype).dtype, -bound, bound).astype(a.dtype)
    zeros = jnp.zeros((*b.shape[:-2], new, b.shape[-1]), b.dtype)
    return rebuild(x, jnp.concatenate([a, columns], -1), jnp.concatenate([b, zeros], -2))


@partial(jax.jit, static_argnums=1)
def dense_svd(x: jax.Array, rank: int) -> Svd:
    """The decomposition of dense matrices ``(*batch, m, k)``, one slice after the other: all values, and vectors up to ``rank``."""
    *batch, m, k = x.shape

    def one(matrix: jax.Array) -> Svd:
        u, s, vh = jnp.linalg.svd(matrix, full_matrices=False)
        return Svd(u[:, :rank], s, vh[:rank])

    parts = lax.map(one, x.reshape(-1, m, k))
    return Svd(*(part.reshape(*batch, *part.shape[1:]) for part in parts))


def _whole(x: Any) -> Any:
    """``x`` on every device of its mesh: factors are small, and decompositions do not split."""
    if _jax.is_explicit(x):
        return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec()))
    if _is_split(x):
        return jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))
    return jnp.asarray(x)


def _placed(x: jax.Array, like: Any, rank_axis: int) -> jax.Array:
    """``x`` split as ``like`` is, but for the rank, which may be another."""
    if not _is_split(like):
        return x
    spec = [*like.sharding.spec, *[None] * (like.ndim - len(like.sharding.spec))]
    spec[rank_axis] = None
    return jax.device_put(x, NamedSharding(like.sharding.mesh, PartitionSpec(*spec)))


def _is_split(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and isinstance(x.sharding, NamedSharding)


# --- one leaf of two checkpoints, or of several adapters ---------------------------------------------------------


class Comparison(NamedTuple):
    """How two updates of one leaf relate, per batch slice; see ``compare``. What only one of two adapters could tell is ``None``."""

    norm_one: jax.Array | None
    norm_two: jax.Array | None
    cosine: jax.Array | None = None
    difference: jax.Array | None = None
    input_angles: jax.Array | None = None
    output_angles: jax.Array | None = None


def _both(w: Any, v: Any) -> tuple[Any, Any]:
    """Two leaves in one dtype that holds both: on the host if they are there, where fp64 is fp64."""
    if all(isinstance(x, np.ndarray) and x.dtype.kind in "biufc" for x in (w, v)):
        promote: Any = np.promote_types
    else:
        promote, w, v = _jax.promote, jnp.asarray(w), jnp.asarray(v)
        if jnp.issubdtype(w.dtype, jax.dtypes.prng_key) and w.dtype == v.dtype:
            w, v = jax.random.key_data(w), jax.random.key_data(v)
        if w.sharding != v.sharding:
            v = jax.device_put(v, w.sharding)
    dtype = promote(w.dtype, v.dtype)
    if jnp.issubdtype(dtype, jnp.inexact):
        dtype = promote(dtype, np.float32)
    return w.astype(dtype), v.astype(dtype)


def differ(w: Any, v: Any) -> bool:
    """Whether two leaves differ anywhere; NaN is the same as NaN."""
    w, v = _both(w, v)
    return not bool(((w == v) | ((w != w) & (v != v))).all())


def extract(w: Any, v: Any, rule: Rule, site: Site, base: Fingerprint) -> tuple[Adapter, float]:
    """The adapter of the difference of two leaves, and the share of its squared norm that is kept."""
    dtype = rule.dtype or _jax.promote(site.dtype, jnp.float32)
    if isinstance(rule, Full):
        return whole_of_site(jnp.array(v, dtype=dtype, copy=True), site, base), 1.0
    old, new = _both(w, v)
    with np.errstate(all="ignore"):  # what is not finite raises here
        moved = _whole(jnp.asarray(new - old))
    if not bool(jnp.isfinite(moved).all()):
        raise ValueError(
            f"The difference of '{site.path}' is not finite: a checkpoint holds NaN, infinity or numbers too large."
        )
    batch, inputs, outputs = (tuple(site.shape[d] for d in ds) for ds in (site.batch, site.inputs, site.outputs))
    m = prod(inputs)
    svd = dense_svd(moved.transpose(*site.batch, *site.inputs, *site.outputs).reshape(*batch, m, -1), rule.rank)
    a, b = factors(svd, rule.rank, spare_norm(m, site.kind), rule.scale)
    a, b = a.reshape(*batch, *inputs, rule.rank), b.reshape(*batch, rule.rank, *outputs)
    made = of_site(a.astype(dtype), b.astype(dtype), site, rule.scale, rule.dropout, base)
    if _is_split(w):
        made = jax.device_put(made, shardings({site.path: made}, {site.path: w.sharding})[site.path])
    return made, float(share(svd.s, rule.rank))


def rank_of(path: str, x: LowRank, energy: float) -> int:
    """The lowest rank that keeps ``energy`` of the squared norm of all slices; noise of rounding does not count."""
    values = singular_values(*matrices(x))
    if isinstance(values, jax.core.Tracer):
        raise ValueError(
            "resize(energy=...) chooses ranks by values, which are not known under jit.\n  Call it outside, or pass rank=."
        )
    if not bool(jnp.isfinite(values).all()):
        raise ValueError(f"The adapter of '{path}' is not finite: no rank keeps a share of it.")
    squares = np.asarray(jnp.where(live(values), values, jnp.zeros_like(values)), np.float64) ** 2
    sums = np.cumsum(squares.reshape(-1, squares.shape[-1]).sum(axis=0))
    return int(np.argmax(sums >= energy * sums[-1])) + 1


def resize(path: str, x: LowRank, rank: int) -> tuple[LowRank, jax.Array]:
    """``x`` with another rank, and the share of its squared norm that is kept."""
    one = jnp.float32(1.0)
    if rank > smaller_side(x):
        raise Advised(
            f"Rank {rank} is above {smaller_side(x)}, the smaller side of '{path}' {x.shape}.",
            "Lower it; resize takes a rank for each leaf: resize(lora, {pattern: rank}).",
            "rank",
        )
    if rank == x.rank:
        return x, one
    if rank > x.rank:
        return grow(x, rank, path), one
    a, b = matrices(x)
    svd = thin(a, b)
    spare = spare_norm(a.shape[-2], x.use)
    return rebuild(x, *factors(svd, rank, spare)), share(svd.s, rank)


# --- combine ---------------------------------------------------------------------------------------------------------

Terms = Sequence[tuple[Any, Any]]
Mix = Callable[[list[jax.Array]], jax.Array]


def template(terms: Terms) -> LowRank:
    """An adapter with the dtypes and the scale of the result, and the first one's other fields."""
    first, scales = terms[0][1], {x.scale for _, x in terms}
    dtypes = {name: _jax.promote(*(getattr(x, name).dtype for _, x in terms)) for name in ("a", "b")}
    scale = first.scale if len(scales) == 1 and first.scale > 0 else 1.0
    return replace(first, a=first.a.astype(dtypes["a"]), b=first.b.astype(dtypes["b"]), scale=scale)


def concat(terms: Terms, wide: bool = False) -> LowRank:
    """The factors side by side, weights and what differs of the scales in ``b``; with ``wide``, in the dtype of the computation."""
    like = template(terms)
    pairs = [matrices(x) for _, x in terms]
    dtype = _jax.promote(*(f.dtype for pair in pairs for f in pair))
    a = jnp.concatenate([f.astype(dtype) for f, _ in pairs], -1)
    gains = [jnp.asarray(w, dtype) * jnp.asarray(x.scale / like.scale, dtype) for w, x in terms]
    b = jnp.concatenate([f.astype(dtype) * g for (_, f), g in zip(pairs, gains, strict=True)], -2)
    if wide:
        like = replace(like, a=like.a.astype(dtype), b=like.b.astype(dtype))
    return rebuild(like, a, b)


def combine_low(path: str, terms: Terms, rank: int | None, mix: Mix | None) -> LowRank:
    """The weighted sum, or with ``mix`` what that makes of the dense updates, truncated."""
    like = template(terms)
    if rank is None:
        rank = min(max(x.rank for _, x in terms), smaller_side(like))
    if mix is None:
        whole, _ = resize(path, concat(terms, wide=True), rank)
        return rebuild(like, *matrices(whole))
    if rank > smaller_side(like):
        resize(path, like, rank)  # raises
    pairs = [matrices(x, scaled=True) for _, x in terms]
    dtype = _jax.promote(*(f.dtype for pair in pairs for f in pair))
    updates = [
        times(a.astype(dtype), b.astype(dtype) * jnp.asarray(w, dtype))
        for (w, _), (a, b) in zip(terms, pairs, strict=True)
    ]
    svd = dense_svd(mix(updates), rank)
    spare = spare_norm(pairs[0][0].shape[-2], like.use)
    return rebuild(like, *factors(svd, rank, spare, like.scale))


def needs_base(terms: Terms, *, dense: bool) -> bool:
    """Whether the base is needed: if a leaf is trained outright, and its share in the sum is not zero, or dense updates are wanted."""
    whole = [w for w, x in terms if isinstance(x, FullWeight)]
    if not whole or dense:
        return bool(whole)
    return any(isinstance(w, jax.core.Tracer) for w in whole) or not isclose(sum(map(float, whole)), 1.0, rel_tol=1e-9)


def combine_full(terms: Terms, w: Any, mix: Mix | None) -> FullWeight:
    """The base and what is made of the weighted updates, where one of the leaves is trained outright; ``w`` is ``None`` if not needed."""
    first = next(x for _, x in terms if isinstance(x, FullWeight))
    dtype = _jax.promote(*(x.value.dtype for _, x in terms if isinstance(x, FullWeight)))
    if w is None:
        wide = _jax.promote(dtype, jnp.float32)
        values = [x.value if isinstance(x, FullWeight) else _dense(x, None) for _, x in terms]
        parts = [v.astype(wide) * jnp.asarray(weight, wide) for v, (weight, _) in zip(values, terms, strict=True)]
        return replace(first, value=total(parts).astype(dtype))
    wide = _jax.promote(dtype, lax.dtype(w), jnp.float32)
    update = (mix or total)([_dense(x, w).astype(wide) * jnp.asarray(weight, wide) for weight, x in terms])
    return replace(first, value=(jnp.asarray(w).astype(wide) + update).astype(dtype))


def _dense(x: Any, w: Any) -> jax.Array:
    """The dense update of a leaf, in fp32 or wider."""
    arrays = {name: f.astype(_jax.promote(f.dtype, jnp.float32)) for name, f in x.arrays().items()}
    update: jax.Array = replace(x, **arrays).delta(w)
    return update


def total(updates: Sequence[jax.Array]) -> jax.Array:
    """The sum of the updates."""
    return sum(updates[1:], updates[0])


def ties(updates: Sequence[jax.Array], density: float) -> jax.Array:
    """The largest entries of each update, of those the ones that have the sign of the larger mass, averaged (arXiv:2306.01708)."""
    if any(jnp.iscomplexobj(x) for x in updates):
        raise ValueError(
            "The method 'ties' elects a sign for each entry, which complex numbers do not have.\n  Use another method: 'svd'."
        )
    kept = [_largest(x, density) for x in updates]
    sign = jnp.sign(sum(kept[1:], kept[0]))
    agree = [(jnp.sign(x) == sign) & (x != 0) for x in kept]
    total = sum((jnp.where(ok, x, jnp.zeros_like(x)) for ok, x in zip(agree, kept, strict=True)), jnp.zeros_like(sign))
    count = sum((ok.astype(sign.dtype) for ok in agree), jnp.zeros_like(sign))
    return total / jnp.maximum(count, 1.0)


def dare(updates: Sequence[jax.Array], density: float, keys: Sequence[jax.Array]) -> jax.Array:
    """The sum of the updates, each with a random share of its entries, scaled to keep its mean (arXiv:2311.03099)."""
    total = jnp.zeros_like(updates[0])
    for x, key in zip(updates, keys, strict=True):
        keep = jax.random.bernoulli(key, density, x.shape)
        total = total + jnp.where(keep, x / density, jnp.zeros_like(x))
    return total


def _largest(x: jax.Array, density: float) -> jax.Array:
    size = jnp.abs(x)
    count = max(1, round(density * x.size))
    least = jnp.sort(size.reshape(-1))[x.size - count]
    return jnp.where(size >= least, x, jnp.zeros_like(x))


# --- compare ---------------------------------------------------------------------------------------------------------


def norm_of(x: Any, w: Any) -> jax.Array:
    """The norm of the update of an adapter of either kind."""
    if isinstance(x, LowRank):
        return norm(*matrices(x, scaled=True))
    return jnp.linalg.norm(_dense(x, w).reshape(-1))


def compare(one: Any, two: Any, w: Any) -> Comparison:
    """What ``jlora.algebra.compare`` gives for one leaf; an adapter is ``None`` if it does not have it."""
    if one is None or two is None:
        return Comparison(*(None if x is None else norm_of(x, w) for x in (one, two)))
    if not (isinstance(one, LowRank) and isinstance(two, LowRank)):
        x, y = (_dense(adapter, w).reshape(-1) for adapter in (one, two))
        wide = _jax.promote(x.dtype, y.dtype)
        x, y = x.astype(wide), y.astype(wide)
        sizes = jnp.linalg.norm(x), jnp.linalg.norm(y)
        cosine = jnp.real(jnp.vdot(_unit(x, sizes[0]), _unit(y, sizes[1])))
        return Comparison(*sizes, *_relation(*sizes, cosine, jnp.linalg.norm(x - y)))
    pairs = [matrices(x, scaled=True) for x in (one, two)]
    wide = _jax.promote(*(f.dtype for pair in pairs for f in pair))
    (a1, b1), (a2, b2) = first, second = [(a.astype(wide), b.astype(wide)) for a, b in pairs]
    sizes = norm(*first), norm(*second)
    apart = norm(jnp.concatenate([a1, a2], -1), jnp.concatenate([b1, -b2], -2))
    cosine = inner((a1, _unit(b1, sizes[0][..., None, None])), (a2, _unit(b2, sizes[1][..., None, None])))
    found = _relation(*sizes, cosine, apart)
    return Comparison(*sizes, *found, *angles(thin(*first), thin(*second)))


def _unit(x: jax.Array, norm: jax.Array) -> jax.Array:
    return x / jnp.where(norm > 0, norm, jnp.ones_like(norm)).astype(x.dtype)


def _relation(one: jax.Array, two: jax.Array, cosine: jax.Array, apart: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The cosine and the relative difference, where norms may be zero: then the products of units are, too."""
    ratio = apart / jnp.where(one > 0, one, jnp.ones_like(one))
    nothing = jnp.where(two > 0, jnp.full_like(one, jnp.inf), jnp.zeros_like(one))
    return jnp.clip(cosine, -1.0, 1.0), jnp.where(one > 0, ratio, nothing)


@jax.jit
def angles(one: Svd, two: Svd) -> tuple[jax.Array, jax.Array]:
    r"""The principal angles of the column spaces and of the row spaces of two decompositions, ascending, in radians."""
    left = _angles(*(s.u * live(s.s)[..., None, :].astype(s.u.dtype) for s in (one, two)))
    right = _angles(*(adjoint(s.vh) * live(s.s)[..., None, :].astype(s.vh.dtype) for s in (one, two)))
    return left, right


def _angles(one: jax.Array, two: jax.Array) -> jax.Array:
    r"""Of two bases, whose columns are orthonormal or zero; a zero column is at a right angle to everything.

    With $Q_1^* Q_2 = Y C Z^*$ the pairs of principal vectors are $U = Q_1 Y$ and $V = Q_2 Z$, the cosines $C$ and the sines
    $\lVert v - c\,u \rVert$, which tell small angles as cosines cannot.
    """
    y, cosine, zh = jnp.linalg.svd(times(adjoint(one), two), full_matrices=False)
    cosine = jnp.clip(cosine, 0.0, 1.0)
    rest = times(two, adjoint(zh)) - times(one, y) * cosine[..., None, :].astype(one.dtype)
    small = jnp.arctan2(jnp.linalg.norm(rest, axis=-2), cosine)
    return jnp.where(cosine > sqrt(0.5), small, jnp.arccos(cosine))
