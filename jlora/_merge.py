"""Folding adapters into the base, leaf by leaf."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _jax, _paths
from jlora._adapters import Adapter, FullWeight, LowRank
from jlora._dtypes import as_float
from jlora._text import shown
from jlora._wrap import check_base, check_lora


def merge(params: Any, lora: Mapping[str, Adapter], *, dtype: Any = None, report: bool = False) -> Any:
    r"""Returns ``params`` with every adapter folded in: $W + s\,A B$, added in the widest dtype; what was trained outright as it is.

    Pure and leaf by leaf; leaves without an adapter are returned as they are. Under ``jax.jit`` with ``donate_argnums=0`` it needs no
    second copy of the base.

    Args:
        params: The base.
        lora: Adapters by path.
        dtype: Of the merged leaves of floats, a float of 16 bits or more; by default each keeps its own. A bf16 leaf stores only about 5
            to 10 % fine a small update: pass ``jnp.float32`` to keep all of it.
        report: Also return what rounding lost.

    Returns:
        A tree like ``params``, with the same structure and shardings. With ``report``, also a dict from path to the relative error of
        the update as stored, $\lVert \mathrm{stored} - \Delta \rVert / \lVert \Delta \rVert$ (0 for no update).

    Raises:
        TypeError: arguments in another order.
        ValueError: an adapter belongs to another base; ``dtype`` is none that weights are stored in.

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
    dtype = as_float(dtype, "merge(dtype=...)")
    paths, leaves, tree = _paths.flatten(params)
    check_base(lora, paths, leaves)
    merged, lost = [], {}
    for path, leaf in zip(paths, leaves, strict=True):
        if path in lora:
            leaf, lost[path] = _fold(leaf, lora[path], dtype, report)
        merged.append(leaf)
    out = jax.tree_util.tree_unflatten(tree, merged)
    return (out, lost) if report else out


def delta(lora: Mapping[str, Adapter], params: Any = None) -> dict[str, jax.Array]:
    r"""The dense update of every adapted leaf, $s\,A B$, by path, in the factors' dtype and the leaf's shape.

    Args:
        lora: Adapters by path.
        params: The base; needed only where a leaf is trained outright, whose update is its value less the base's.

    Raises:
        ValueError: a leaf is trained outright and ``params`` is not given, or ``params`` is another base.
    """
    check_lora(lora)
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


def _fold(leaf: Any, adapter: Adapter, dtype: Any, report: bool) -> tuple[jax.Array, Any]:
    w = jnp.asarray(leaf)
    dtype = dtype if dtype is not None and jnp.issubdtype(w.dtype, jnp.floating) else w.dtype
    # What replaces the leaf is stored as it is: w + (value - w) is not the value where w is large.
    whole = jnp.asarray(adapter.value) if isinstance(adapter, FullWeight) else None
    update: Any = adapter.delta(w) if report or whole is None else None
    # The product of factors is nobody else's; what other kinds of adapters give may be their own array.
    ours = isinstance(adapter, LowRank) and not report
    stored = _sum(w, update, dtype, ours) if whole is None else whole.astype(dtype)
    sharding = None if isinstance(w, jax.core.Tracer) else w.sharding
    if sharding is not None and not isinstance(stored, jax.core.Tracer) and stored.sharding != sharding:
        stored = jax.device_put(stored, sharding)
    return stored, _lost(stored, w, update, whole) if report else None


def _sum(w: jax.Array, update: jax.Array, dtype: Any, ours: bool) -> jax.Array:
    """``w + update``, added in the widest dtype: one pass, in the update's own memory where it is ours and that can be."""
    fits = ours and update.dtype == dtype and _on_one_device(w) and _on_one_device(update)
    return (_added_in_place if fits else _added)(w, update, dtype=dtype)


def _on_one_device(x: jax.Array) -> bool:
    return not isinstance(x, jax.core.Tracer) and len(x.devices()) == 1


def _add(w: jax.Array, update: jax.Array, dtype: Any) -> jax.Array:
    wide = _jax.promote(w.dtype, update.dtype, dtype)
    return (w.astype(wide) + update.astype(wide)).astype(dtype)


_added = jax.jit(_add, static_argnames="dtype")
_added_in_place = jax.jit(_add, static_argnames="dtype", donate_argnames="update")


def _lost(stored: jax.Array, w: jax.Array, update: jax.Array, whole: jax.Array | None) -> jax.Array:
    """The error of a stored leaf, relative to its update."""
    wide = _jax.promote(w.dtype, update.dtype, stored.dtype, jnp.float32)
    stored, w, update = (x.astype(wide) for x in (stored, w, update))
    off = stored - w - update if whole is None else stored - whole.astype(wide)
    error, size = jnp.linalg.norm(off), jnp.linalg.norm(update)
    return jnp.where(size > 0, error / jnp.where(size > 0, size, 1), 0.0)
