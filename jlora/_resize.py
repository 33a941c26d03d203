"""One adapter with another rank: truncated, or with room to train."""

import re
from collections.abc import Mapping
from math import sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _paths, _svd
from jlora._adapters import LowRank
from jlora._advice import Advised
from jlora._algebra_checks import check_rank
from jlora._init import fold_path
from jlora._text import shown


def resize(path: str, x: LowRank, rank: int) -> tuple[LowRank, jax.Array]:
    """``x`` with another rank, and the share of its squared norm that is kept."""
    one = jnp.float32(1.0)
    if rank > _svd.smaller_side(x):
        raise Advised(
            f"Rank {rank} is above {_svd.smaller_side(x)}, the smaller side of '{shown(path)}' {x.shape}.",
            "Lower it; resize takes a rank for each leaf: resize(lora, {pattern: rank}).",
            "rank",
        )
    if rank == x.rank:
        return x, one
    if rank > x.rank:
        return _grow(x, rank, path), one
    a, b = _svd.matrices(x)
    svd = _svd.thin(a, b)
    spare = _svd.spare_norm(a.shape[-2], x.only or x.use)
    return _svd.rebuild(x, *_svd.factors(svd, rank, spare)), _svd.share(svd.s, rank)


def _grow(x: LowRank, rank: int, path: str) -> LowRank:
    """``x`` with further columns in ``a`` as a fresh adapter has them, and zeros in ``b``: the update stays what it is."""
    a, b = _svd.matrices(x)
    new = rank - x.rank
    # By path and rank: grown again, an adapter must not get the same columns a second time.
    key = jax.random.fold_in(fold_path(jax.random.key(0), path), x.rank)
    bound = sqrt(3.0 / a.shape[-2]) * _svd.spare_norm(a.shape[-2], x.only or x.use)
    columns = jax.random.uniform(key, (*a.shape[:-1], new), jnp.finfo(a.dtype).dtype, -bound, bound).astype(a.dtype)
    zeros = jnp.zeros((*b.shape[:-2], new, b.shape[-1]), b.dtype)
    return _svd.rebuild(x, jnp.concatenate([a, columns], -1), jnp.concatenate([b, zeros], -2))


def rank_of(path: str, x: LowRank, energy: float) -> int:
    """The lowest rank that keeps ``energy`` of the squared norm of all slices; noise of rounding does not count."""
    values = _svd.singular_values(*_svd.matrices(x))
    if isinstance(values, jax.core.Tracer):
        raise ValueError(
            "resize(energy=...) chooses ranks by values, which are not known under jit.\n  Call it outside, or pass rank=."
        )
    if not bool(jnp.isfinite(values).all()):
        raise ValueError(f"The adapter of '{shown(path)}' is not finite: no rank keeps a share of it.")
    squares = np.asarray(jnp.where(_svd.live(values), values, jnp.zeros_like(values)), np.float64) ** 2
    sums = np.cumsum(squares.reshape(-1, squares.shape[-1]).sum(axis=0))
    return int(np.argmax(sums >= energy * sums[-1])) + 1


def ranks_of(low: Mapping[str, LowRank], rank: Any) -> dict[str, int]:
    """The new rank of each leaf that gets one."""
    if not isinstance(rank, Mapping):
        return dict.fromkeys(low, check_rank(rank))
    ranks: dict[str, int] = {}
    for pattern, wanted in rank.items():
        try:
            found = [path for path in low if path == pattern or _paths.match(pattern, path)]
        except (re.error, TypeError) as error:
            raise ValueError(f"The pattern {pattern!r} of a rank is not a regular expression: {error}.") from None
        if not found:
            near = ", ".join(_paths.nearest(pattern, low))
            raise ValueError(
                f"No low-rank adapter matches {pattern!r}.\n  nearest: {near}\n  A pattern must match the whole path."
            )
        new = [path for path in found if path not in ranks]
        if not new:
            raise ValueError(
                f"Earlier patterns took every match of {pattern!r}: it would have no effect.\n  matches: {_paths.listing(found)}"
            )
        ranks |= dict.fromkeys(new, check_rank(wanted))
    return ranks
