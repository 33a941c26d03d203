"""Folding adapters into the base, leaf by leaf."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora import _jax, _overflow, _paths
from jlora._adapters import Adapter, FullWeight, LowRank, check_mergeable
from jlora._dtypes import as_float
from jlora._overflow import Overflow
from jlora._text import shown
from jlora._wrap import check_base, check_lora

Ends = tuple[jax.Array, ...]
"""Numbers that are finite if a leaf is; nothing where they are not known."""


def merge(
    params: Any,
    lora: Mapping[str, Adapter],
    *,
    dtype: Any = None,
    report: bool = False,
    overflow: Overflow = "raise",
) -> Any:
    r"""Returns ``params`` with every adapter folded in: $W + s\,A B$, added in the widest dtype; what was trained outright as it is.

    Pure and leaf by leaf; leaves without an adapter are returned as they are. Under ``jax.jit`` with ``donate_argnums=0`` it needs no
    second copy of the base.

    A finite weight and finite factors can have a sum that the leaf's dtype cannot hold, as float16 ends at 65504. That raises. A bound on
    the update, out of its factors, rules it out for most leaves; of the others the program that adds them also finds the largest and
    smallest values, and the call waits for these. Under a transformation (``jax.jit``, ``jax.grad``, ``jax.vmap``) values are not known,
    and nothing raises: the leaf holds infinities then. ``report`` tells there too: what is lost of such a leaf is not finite.

    Args:
        params: The base.
        lora: Adapters by path.
        dtype: Of the merged leaves of floats, a float of 16 bits or more; by default each keeps its own. A bf16 leaf stores only about 5
            to 10 % fine a small update: pass ``jnp.float32`` to keep all of it.
        report: Also return what rounding lost.
        overflow: ``"raise"``, or ``"allow"`` to store infinities (NaN in dtypes without them) where a leaf's dtype ends.

    Returns:
        A tree like ``params``, with the same structure and shardings. With ``report``, also a dict from path to the relative error of
        the update as stored, $\lVert \mathrm{stored} - \Delta \rVert / \lVert \Delta \rVert$ (0 for no update).

    Raises:
        TypeError: arguments in another order.
        ValueError: an adapter belongs to another base, or is for one kind of use of its leaf; ``dtype`` is not a supported storage dtype;
            an adapter is not finite; a merged leaf overflows its dtype.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> def model(params, x):
        ...     return jnp.tanh(x @ params["up"]) @ params["down"]
        >>> params = {"up": jnp.ones((3, 5)), "down": jnp.ones((5, 2))}
        >>> found = jlora.sites(model, params, jnp.ones((7, 3)))
        >>> lora = jlora.init(jax.random.key(0), params, found, jlora.LoRA(rank=2))
        >>> merged = jlora.merge(params, lora)
        >>> bool((merged["up"] == params["up"]).all())  # a fresh adapter is the identity
        True
    """
    check_lora(lora, params)
    check_mergeable(lora)
    dtype = as_float(dtype, "merge(dtype=...)")
    _overflow.check_choice(overflow)
    paths, leaves, tree = _paths.flatten(params)
    check_base(lora, paths, leaves)
    base = dict(zip(paths, leaves, strict=True))
    doubtful = _doubtful(base, lora, dtype) if overflow == "raise" else set()
    merged, lost, ends = [], {}, {}
    for path, leaf in base.items():
        if path in lora:
            leaf, lost[path], ends[path] = _fold(leaf, lora[path], dtype, report, path in doubtful)
        merged.append(leaf)
    _check_ends(ends, base, lora, dict(zip(paths, merged, strict=True)))
    out = jax.tree_util.tree_unflatten(tree, merged)
    return (out, lost) if report else out


def delta(lora: Mapping[str, Adapter], params: Any = None) -> dict[str, jax.Array]:
    r"""The dense update of every adapted leaf, $s\,A B$, by path, in the factors' dtype and the leaf's shape.

    Args:
        lora: Adapters by path.
        params: The base; needed only where a leaf is trained outright, whose update is its value less the base's.

    Raises:
        ValueError: a leaf is trained outright and ``params`` is not given, or ``params`` is another base; an adapter is for one kind of
            use of its leaf (``lora[path].delta()`` is the update of that).
    """
    check_lora(lora)
    check_mergeable(lora)
    if params is None:
        outright = [path for path, adapter in lora.items() if isinstance(adapter, FullWeight)]
        if outright:
            raise ValueError(
                f"'{shown(outright[0])}' is trained outright: its update is its value less the base's.\n"
                "  Pass the base: delta(lora, params)."
            )
        return {path: adapter.delta(None) for path, adapter in lora.items()}
    paths, leaves, _ = _paths.flatten(params)
    check_base(lora, paths, leaves)
    base = dict(zip(paths, leaves, strict=True))
    return {path: adapter.delta(base[path]) for path, adapter in lora.items()}


def _dtype_of(own: Any, wanted: Any) -> Any:
    """The dtype of a merged leaf."""
    return wanted if wanted is not None and jnp.issubdtype(own, jnp.floating) else own


def _doubtful(base: Mapping[str, Any], lora: Mapping[str, Adapter], dtype: Any) -> set[str]:
    r"""The leaves that may overflow.

    With $|W|$ at most the largest number of the leaf's dtype, $W + \Delta$ is rounded to no more if $|\Delta|$ is below half of that
    number's last place, which in float16 is 16; and $|\Delta| \le s\,r\,\max|A|\,\max|B|$. Half of it again is for rounding.
    """
    known = {p: x for p, x in lora.items() if isinstance(x, LowRank) and _is_known(x.a, x.b)}
    sizes = jax.device_get({path: _product_of_largest(x.a, x.b) for path, x in known.items()})
    doubtful = set(lora)
    for path, size in sizes.items():
        own = jax.dtypes.canonicalize_dtype(lax.dtype(base[path]))
        stored = _dtype_of(own, dtype)
        if jnp.issubdtype(stored, jnp.inexact) and jnp.finfo(own).max <= jnp.finfo(stored).max:
            adapter = known[path]
            place = float(jnp.finfo(stored).eps) * float(jnp.finfo(stored).max) / 8
            limit = min(place, float(jnp.finfo(adapter.a.dtype).max) / 2)  # in which the update is computed
            if float(size) * max(abs(adapter.scale), 1) * adapter.rank < limit:
                doubtful.remove(path)
    return doubtful


@jax.jit
def _product_of_largest(a: jax.Array, b: jax.Array) -> jax.Array:
    x, y = (jnp.max(jnp.abs(f).astype(jnp.float32), initial=0) for f in (a, b))
    return x * y


def _fold(leaf: Any, adapter: Adapter, dtype: Any, report: bool, doubtful: bool) -> tuple[jax.Array, Any, Ends]:
    w = jnp.asarray(leaf)
    dtype = _dtype_of(w.dtype, dtype)
    # What replaces the leaf is stored as it is: w + (value - w) is not the value where w is large.
    whole = jnp.asarray(adapter.value) if isinstance(adapter, FullWeight) else None
    update: Any = adapter.delta(w) if report or whole is None else None
    # The product of factors is nobody else's; what other kinds of adapters give may be their own array.
    ours = isinstance(adapter, LowRank) and not report
    stored, ends = _sum(w, update, dtype, ours, doubtful) if whole is None else _cast(whole, dtype, doubtful)
    sharding = None if isinstance(w, jax.core.Tracer) else w.sharding
    if sharding is not None and not isinstance(stored, jax.core.Tracer) and stored.sharding != sharding:
        stored = jax.device_put(stored, sharding)
    return stored, _lost(stored, w, update, whole) if report else None, ends


def _cast(whole: jax.Array, dtype: Any, doubtful: bool) -> tuple[jax.Array, Ends]:
    """A leaf that replaces the base's; as it is if it has the dtype already."""
    looked_at = doubtful and _is_known(whole)
    if whole.dtype == dtype:
        return whole, _ends(whole) if looked_at else ()
    return _narrowed(whole, dtype=dtype, ends=looked_at)


def _sum(w: jax.Array, update: jax.Array, dtype: Any, ours: bool, doubtful: bool) -> tuple[jax.Array, Ends]:
    """``w + update``, added in the widest dtype: one pass, in the update's own memory where it is ours and that can be."""
    fits = ours and update.dtype == dtype and _on_one_device(w) and _on_one_device(update)
    return (_added_in_place if fits else _added)(w, update, dtype=dtype, ends=doubtful and _is_known(w, update))


def _is_known(*arrays: Any) -> bool:
    """Whether values can be looked at: not while a program is traced, which makes one of what is computed from known arrays too."""
    return not _jax.is_staging() and not any(isinstance(x, jax.core.Tracer) for x in arrays)


def _on_one_device(x: jax.Array) -> bool:
    return _is_known(x) and len(x.devices()) == 1


def _add(w: jax.Array, update: jax.Array, dtype: Any, ends: bool) -> tuple[jax.Array, Ends]:
    wide = _jax.promote(w.dtype, update.dtype, dtype)
    return _with_ends((w.astype(wide) + update.astype(wide)).astype(dtype), ends)


def _narrow(whole: jax.Array, dtype: Any, ends: bool) -> tuple[jax.Array, Ends]:
    return _with_ends(whole.astype(dtype), ends)


def _with_ends(stored: jax.Array, wanted: bool) -> tuple[jax.Array, Ends]:
    """``stored``, with its ends if they are wanted."""
    return stored, _ends(stored) if wanted else ()


@jax.jit
def _ends(stored: jax.Array) -> Ends:
    """The largest value in size, or the largest and the smallest: one of them is infinite or NaN if any value is.

    XLA:CPU takes the first in one pass in 32 bits, but makes an array for it in float16, and for ``isfinite(stored).all()`` always.
    """
    parts = (stored.real, stored.imag) if jnp.iscomplexobj(stored) else (stored,)
    if parts[0].dtype.itemsize >= 4:
        return tuple(jnp.max(jnp.abs(x), initial=0) for x in parts)
    return tuple(end(x, initial=0) for x in parts for end in (jnp.max, jnp.min))


def _check_ends(
    ends: Mapping[str, Ends], base: Mapping[str, Any], lora: Mapping[str, Adapter], merged: Mapping[str, Any]
) -> None:
    """Raises if a leaf is not finite where the base is."""
    for path, found in jax.device_get(ends).items():
        if not all(np.isfinite(np.asarray(x, np.float64)) for x in found):
            w, adapter, stored = jnp.asarray(base[path]), lora[path], merged[path]
            gone = jnp.isfinite(w) & ~jnp.isfinite(stored)
            if not bool(gone.any()):
                continue
            if not all(bool(jnp.isfinite(x).all()) for x in adapter.arrays().values()):
                raise _overflow.not_finite(shown(path), "merge")
            raise _overflow.too_large(shown(path), _largest(w, adapter, gone), stored.dtype, "merge")


def _largest(w: jax.Array, adapter: Adapter, where: jax.Array) -> float:
    """The largest of some values of a merged leaf, as fp32 has them."""
    wide = _jax.promote(w.dtype, jnp.float32)
    w, adapter = jax.tree.map(lambda x: x.astype(wide), (w, adapter))
    total = adapter.value if isinstance(adapter, FullWeight) else w + adapter.delta(w)
    return float(jnp.max(jnp.where(where, jnp.abs(total), 0)))


_narrowed = jax.jit(_narrow, static_argnames=("dtype", "ends"))
_added = jax.jit(_add, static_argnames=("dtype", "ends"))
_added_in_place = jax.jit(_add, static_argnames=("dtype", "ends"), donate_argnames="update")


def _lost(stored: jax.Array, w: jax.Array, update: jax.Array, whole: jax.Array | None) -> jax.Array:
    """The error of a stored leaf, relative to its update."""
    wide = _jax.promote(w.dtype, update.dtype, stored.dtype, jnp.float32)
    stored, w, update = (x.astype(wide) for x in (stored, w, update))
    off = stored - w - update if whole is None else stored - whole.astype(wide)
    error, size = jnp.linalg.norm(off), jnp.linalg.norm(update)
    return jnp.where(size == 0, 0.0, error / jnp.where(size == 0, 1, size))  # of NaN: NaN
