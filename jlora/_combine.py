"""Several adapters of one leaf as one: side by side, or mixed densely as TIES and DARE do, and truncated."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import isclose
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _jax, _svd
from jlora._adapters import FullWeight, LowRank
from jlora._init import fold_path
from jlora._resize import resize

Terms = Sequence[tuple[Any, Any]]
Mix = Callable[[list[jax.Array]], jax.Array]


def mixer(path: str, at: list[int], method: str, density: Any, key: Any) -> Mix | None:
    """What a method makes of the dense updates of one leaf, if it needs them: those of the adapters number ``at``."""
    if method == "ties":
        return partial(ties, density=density)
    if method == "dare":
        here = fold_path(key, path)
        return partial(dare, density=density, keys=[jax.random.fold_in(here, i) for i in at])
    return None


def template(terms: Terms) -> LowRank:
    """An adapter with the dtypes and the scale of the result, and the first one's other fields."""
    first, scales = terms[0][1], {x.scale for _, x in terms}
    dtypes = {name: _jax.promote(*(getattr(x, name).dtype for _, x in terms)) for name in ("a", "b")}
    scale = first.scale if len(scales) == 1 and first.scale > 0 else 1.0
    return replace(first, a=first.a.astype(dtypes["a"]), b=first.b.astype(dtypes["b"]), scale=scale)


def concat(terms: Terms, wide: bool = False) -> LowRank:
    """The factors side by side, weights and what differs of the scales in ``b``; with ``wide``, in the dtype of the computation."""
    like = template(terms)
    pairs = [_svd.matrices(x) for _, x in terms]
    dtype = _jax.promote(*(f.dtype for pair in pairs for f in pair))
    a = jnp.concatenate([f.astype(dtype) for f, _ in pairs], -1)
    gains = [jnp.asarray(w, dtype) * jnp.asarray(x.scale / like.scale, dtype) for w, x in terms]
    b = jnp.concatenate([f.astype(dtype) * g for (_, f), g in zip(pairs, gains, strict=True)], -2)
    if wide:
        like = replace(like, a=like.a.astype(dtype), b=like.b.astype(dtype))
    return _svd.rebuild(like, a, b)


def combine_low(path: str, terms: Terms, rank: int | None, mix: Mix | None) -> LowRank:
    """The weighted sum, or with ``mix`` what that makes of the dense updates, truncated."""
    like = template(terms)
    if rank is None:
        rank = min(max(x.rank for _, x in terms), _svd.smaller_side(like))
    if mix is None:
        whole, _ = resize(path, concat(terms, wide=True), rank)
        return _svd.rebuild(like, *_svd.matrices(whole))
    if rank > _svd.smaller_side(like):
        resize(path, like, rank)  # raises
    pairs = [_svd.matrices(x, scaled=True) for _, x in terms]
    dtype = _jax.promote(*(f.dtype for pair in pairs for f in pair))
    updates = [
        _svd.times(a.astype(dtype), b.astype(dtype) * jnp.asarray(w, dtype))
        for (w, _), (a, b) in zip(terms, pairs, strict=True)
    ]
    svd = _svd.dense_svd(mix(updates), rank)
    spare = _svd.spare_norm(pairs[0][0].shape[-2], like.only or like.use)
    return _svd.rebuild(like, *_svd.factors(svd, rank, spare, like.scale))


def needs_base(terms: Terms, *, dense: bool) -> bool:
    """Whether the base is needed: if a leaf is trained outright, and its share in the sum is not zero, or dense updates are wanted."""
    whole = [w for w, x in terms if isinstance(x, FullWeight)]
    if not whole or dense:
        return bool(whole)
    return any(isinstance(w, jax.core.Tracer) for w in whole) or not isclose(sum(map(float, whole)), 1.0, rel_tol=1e-9)


def combine_full(terms: Terms, w: Any, mix: Mix | None) -> FullWeight:
    r"""The base and what is made of the weighted updates, where one of the leaves is trained outright; ``w`` is ``None`` if not needed.

    With values $V_i$ of leaves trained outright and updates $U_j$ of others, the weighted sum of updates
    $W + \sum_i c_i (V_i - W) + \sum_j c_j U_j$ is $(1 - \sum_i c_i) W + \sum_i c_i V_i + \sum_j c_j U_j$: where the weights sum to one,
    nothing of the base is in it, and no difference of a large base and a small value is rounded.
    """
    first = next(x for _, x in terms if isinstance(x, FullWeight))
    dtype = _jax.promote(*(x.value.dtype for _, x in terms if isinstance(x, FullWeight)))
    wide = _jax.promote(dtype, jnp.float32, *(() if w is None else (lax.dtype(w),)))
    if mix is not None:
        update = mix([_svd.dense(x, w).astype(wide) * jnp.asarray(weight, wide) for weight, x in terms])
        return replace(first, value=(jnp.asarray(w).astype(wide) + update).astype(dtype))
    values = [x.value if isinstance(x, FullWeight) else _svd.dense(x, None) for _, x in terms]
    parts = [v.astype(wide) * jnp.asarray(weight, wide) for v, (weight, _) in zip(values, terms, strict=True)]
    if w is not None and needs_base(terms, dense=False):
        rest = jnp.asarray(1 - sum(weight for weight, x in terms if isinstance(x, FullWeight)), wide)
        base = jnp.asarray(w).astype(wide)
        parts.append(jnp.where(rest == 0, jnp.zeros_like(base), base * rest))
    return replace(first, value=total(parts).astype(dtype))


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
