"""Updates folded into weights one at a time, in host memory, and rounding: to the nearest, or at random so that the mean is kept."""

from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora import _files, _jax, _overflow
from jlora._adapters import Adapter, FullWeight, LowRank
from jlora._dtypes import as_float
from jlora._init import as_key, fold_path
from jlora._overflow import Overflow

Rounding = Literal["nearest", "stochastic"]


class Fold:
    r"""Merges leaves, and keeps account of what rounding lost.

    Args:
        dtype: Of the merged leaves and of those without an adapter, if they are floats; ``None`` for each leaf's own.
        rounding: To that.
        key: A PRNG key, for stochastic rounding. Each leaf has its own out of it, by its name.
        overflow: Whether a finite leaf that its dtype cannot hold raises.

    Attributes:
        lost: For each merged leaf, what is lost of its update: $\lVert \mathrm{stored} - \Delta \rVert / \lVert \Delta \rVert$.
    """

    def __init__(
        self, dtype: Any = None, rounding: Rounding = "nearest", key: Any = None, overflow: Overflow = "raise"
    ):
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding must be 'nearest' or 'stochastic'.\n  got: {rounding!r}")
        if (rounding == "stochastic") != (key is not None):
            raise ValueError(
                "Stochastic rounding needs a key, and nothing else does: save(..., rounding='stochastic', key=key)."
            )
        _overflow.check_choice(overflow)
        self.overflow = overflow
        self.key = None if key is None else as_key(key, "key must be one PRNG key.")
        self.dtype = as_float(dtype)
        self.lost: dict[str, float] = {}

    def dtype_of(self, own: np.dtype) -> np.dtype:
        """The dtype in which a leaf of dtype ``own`` is stored."""
        return self.dtype if self.dtype is not None and jnp.issubdtype(own, jnp.floating) else own

    def merged(self, name: str, w: Any, adapter: Adapter | None) -> np.ndarray:
        """A leaf with its adapter folded in. No more than the update and the sum are there at once."""
        w = np.asarray(w)
        if adapter is None:
            return self.stored(name, w, self.dtype_of(w.dtype))
        if isinstance(adapter, FullWeight):
            return self.replaced(name, w, np.asarray(adapter.value))
        update = np.asarray(adapter.delta(None if isinstance(adapter, LowRank) else jnp.asarray(w)))
        return self.added(name, w, update, all(np.isfinite(x).all() for x in adapter.arrays().values()))

    def added(self, name: str, w: np.ndarray, update: np.ndarray, finite: bool = True) -> np.ndarray:
        """``w + update``, added in the wider of their dtypes, at least fp32; ``finite`` tells whether what ``update`` is made of is."""
        wide = _wide(w, update)
        total = w.astype(wide, copy=False) + update.astype(wide, copy=False)
        stored = self._cast(name, total, self.dtype_of(w.dtype))
        self._check(name, stored, total, w, finite)
        self.lost[name] = _lost(stored, w, update, wide)
        return stored

    def replaced(self, name: str, w: np.ndarray, value: np.ndarray) -> np.ndarray:
        """``value`` in place of ``w``."""
        wide = _wide(w, value)
        stored = self._cast(name, value, self.dtype_of(w.dtype))
        self._check(name, stored, value, w, bool(np.isfinite(value).all()))
        self.lost[name] = _lost(stored, w, value.astype(wide, copy=False) - w.astype(wide, copy=False), wide)
        return stored

    def stored(self, name: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """``x`` in ``dtype``."""
        if x.dtype == dtype:
            return x
        y = self._cast(name, x, dtype)
        self._check(name, y, x, x)
        return y

    def _cast(self, name: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
        if x.dtype == dtype:
            return x
        if self.key is not None and jnp.finfo(dtype).bits < jnp.finfo(x.dtype).bits:
            with jax.enable_x64(True) if x.dtype == np.float64 else nullcontext():
                return np.asarray(stochastic_round(fold_path(self.key, name), jnp.asarray(x), dtype))
        with np.errstate(all="ignore"):
            return x.astype(dtype)

    def _check(self, name: str, stored: np.ndarray, exact: np.ndarray, source: np.ndarray, finite: bool = True) -> None:
        """Raises if a value is not finite as it is stored, though its source is; ``finite`` tells whether the adapter is."""
        if self.overflow == "allow" or np.isfinite(stored).all():
            return
        gone = np.isfinite(source) & ~np.isfinite(stored)
        if gone.any():
            if not finite:
                raise _overflow.not_finite(_files.shown(name), "save")
            value = float(np.abs(exact[gone]).max())
            raise _overflow.too_large(_files.shown(name), value, stored.dtype, "save")


def _wide(*arrays: np.ndarray) -> np.dtype:
    return np.dtype(_jax.promote(np.float32, *(x.dtype for x in arrays)))


def _lost(stored: np.ndarray, w: np.ndarray, update: np.ndarray, wide: np.dtype) -> float:
    """The relative error of an update as it is stored; row by row, so that nothing of the leaf's size is made."""
    error = size = 0.0
    rows = (stored, w, update) if w.ndim > 1 else (x.reshape(1, -1) for x in (stored, w, update))
    with np.errstate(all="ignore"):  # infinities that were asked for
        for s, x, u in zip(*rows, strict=True):
            u = u.astype(wide)
            off = s.astype(wide) - x.astype(wide) - u
            error, size = error + float(np.vdot(off, off)), size + float(np.vdot(u, u))
    return (error / size) ** 0.5 if size != 0 else 0.0  # of NaN: NaN


def stochastic_round(key: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
    r"""``x`` in a narrower ``dtype``, rounded to one of its two neighbours there so that the mean over keys is ``x``.

    It works on the bits: XLA takes subnormal numbers for zero on some devices, while here they are rounded as all others are. What is
    beyond the largest number of ``dtype`` is rounded to the nearest, and infinities and NaNs stay what they are.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jnp.full(10_000, 1.001)  # the neighbours in bf16 are 1 and 1.0078
        >>> rounded = stochastic_round(jax.random.key(0), x, jnp.bfloat16).astype(jnp.float32)
        >>> bool(abs(rounded.mean() - 1.001) < 1e-3), float(x.astype(jnp.bfloat16)[0])
        (True, 1.0)

    References:
        Gupta et al., 2015, arXiv:1502.02551.
    """
    wide, narrow = jnp.finfo(x.dtype), jnp.finfo(dtype)
    if narrow.bits >= wide.bits:
        raise ValueError(f"{jnp.dtype(dtype)} is not narrower than {x.dtype}: there is nothing to round.")
    return _rounded(key, x, dtype=jnp.dtype(dtype))


@partial(jax.jit, static_argnames="dtype")
def _rounded(key: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
    wide, narrow = jnp.finfo(x.dtype), jnp.finfo(dtype)
    word, out = (jnp.dtype(f"uint{info.bits}") for info in (wide, narrow))
    bits = lax.bitcast_convert_type(x, word)
    sign, size = bits >> (wide.bits - 1), bits & jnp.asarray(2 ** (wide.bits - 1) - 1, word)
    field = (size >> wide.nmant).astype(jnp.int32)
    digits = size & jnp.asarray(2**wide.nmant - 1, word)
    digits = jnp.where(field > 0, digits | jnp.asarray(2**wide.nmant, word), digits)
    # Where the narrow dtype is subnormal, its last place stays where it is, and more digits go.
    exponent = jnp.maximum(field, 1) + (narrow.maxexp - wide.maxexp)
    drop = wide.nmant - narrow.nmant + jnp.maximum(1 - exponent, 0)
    most = wide.nmant - narrow.nmant + max(wide.maxexp - narrow.maxexp, 0)
    shift = jnp.minimum(drop, wide.bits - 1).astype(word)
    upper = (jnp.maximum(exponent, 1) - 1).astype(
        word
    ) << narrow.nmant  # a carry out of the digits goes into the exponent
    made = upper + ((digits + _random(key, drop, most, word)) >> shift)
    largest = jnp.asarray(((2 ** (narrow.bits - 1 - narrow.nmant) - 1) << narrow.nmant) - 1, word)
    near = lax.bitcast_convert_type(x.astype(dtype), out)
    rounded = (made | sign << (narrow.bits - 1)).astype(out)
    return lax.bitcast_convert_type(jnp.where(upper + (digits >> shift) < largest, rounded, near), dtype)


def _random(key: jax.Array, drop: jax.Array, most: int, word: Any) -> jax.Array:
    r"""What to add before the last ``drop`` (at most ``most``) binary digits go: uniform below $2^{drop}$.

    Where a word cannot hold that many, there is a carry out of those that fit only if each of the others is drawn as zero. Of the others
    64 are drawn: a chance below $2^{-64}$ is none.
    """
    fit = jnp.iinfo(word).bits - 1
    keys = jax.random.split(key, 3)
    below = jnp.asarray(1, word) << jnp.minimum(drop, fit).astype(word)
    added = jax.random.bits(keys[0], drop.shape, word) & (below - 1)
    if most <= fit:
        return added
    zeros = jnp.zeros(drop.shape, jnp.int32)
    for i in range(2):
        drawn = lax.clz(jax.random.bits(keys[1 + i], drop.shape, jnp.uint32)).astype(jnp.int32)
        zeros = jnp.where(zeros == 32 * i, zeros + drawn, zeros)
    return jnp.where(zeros >= drop - fit, added, 0)
