"""Merged parameters under their own names: an orbax checkpoint of a tree like the base, written leaf by leaf."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora import _files, _folders, _hosts, _paths
from jlora._adapters import Adapter, check_mergeable
from jlora._fold import Fold, Rounding
from jlora._overflow import Overflow
from jlora._text import check_text, shown
from jlora._wrap import check_base, check_lora

MARKS = ("_METADATA", "_CHECKPOINT_METADATA")
Progress = Callable[[str, int, int], None] | None


def save_orbax(
    folder: str | os.PathLike[str],
    params: Any,
    lora: Mapping[str, Adapter] | None = None,
    *,
    dtype: Any = None,
    rounding: Rounding = "nearest",
    key: Any = None,
    overflow: Overflow = "raise",
    overwrite: bool = False,
    progress: Progress = None,
) -> dict[str, float]:
    r"""Writes ``params``, with ``lora`` folded in, as an orbax checkpoint of a tree like ``params``.

    It is what ``StandardCheckpointer().save(folder, jlora.merge(params, lora))`` writes, but a leaf is merged when its turn comes, so that
    no second copy of the base is in memory. Leaves that are NumPy arrays stay that, and those on a mesh keep their shardings.
    Restored without a target, keys of dicts that are no strings come back as strings, which is orbax's way.

    Args:
        folder: To write; it appears when it is complete. ``orbax.checkpoint.StandardCheckpointer().restore(folder)`` reads it.
        params: The base.
        lora: Adapters by path, or ``None`` for the base alone.
        dtype: Of leaves of floats; by default each leaf's own.
        rounding: As for ``save``.
        key: A PRNG key, for stochastic rounding.
        overflow: As for ``jlora.merge``: ``"raise"``, or ``"allow"`` to store infinities where a tensor's dtype ends.
        overwrite: Replace a checkpoint that is already there. Other files in the folder stay.
        progress: Called with the path, the number written and the number of all leaves.

    Returns:
        For each adapted leaf what rounding lost of its update, $\lVert \mathrm{stored} - \Delta \rVert / \lVert \Delta \rVert$.

    Raises:
        FileExistsError: there is something at ``folder``.
        ValueError: an adapter belongs to another base; a leaf is empty, no array, or spread over processes, or overflows its dtype.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, jlora, jlora.export, orbax.checkpoint as ocp
        >>> params, x = {"w": jnp.ones((3, 5))}, jnp.ones((2, 3))
        >>> sites = jlora.sites(lambda p, x: x @ p["w"], params, x)
        >>> lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="w"))
        >>> folder = tempfile.mkdtemp()
        >>> lost = jlora.export.save_orbax(f"{folder}/merged", params, lora)
        >>> with ocp.StandardCheckpointer() as checkpointer:
        ...     back = checkpointer.restore(f"{folder}/merged")
        >>> bool((back["w"] == jlora.merge(params, lora)["w"]).all())
        True
    """
    fold = Fold(dtype, rounding, key, overflow)
    write_merged(_files.folder(folder), params, lora, fold, overwrite=overwrite, progress=progress)
    return fold.lost


def write_merged(
    path: Path,
    params: Any,
    lora: Mapping[str, Adapter] | None,
    fold: Fold,
    *,
    overwrite: bool = False,
    progress: Progress = None,
) -> None:
    """Writes the merged leaves; ``fold`` says how they are merged."""
    from jlora import _orbax  # here: nothing else of an export needs orbax, which takes long to import

    options: dict[str, Any] = {"overwrite": overwrite, "marks": MARKS, "what": "a checkpoint"}
    _folders.check_free(path, **options)
    if lora is not None:
        check_lora(lora, params)
    paths, leaves, tree = _paths.flatten(params)
    check_base(lora or {}, paths, leaves)
    check_mergeable(lora or {})

    def made(name: str, leaf: Any) -> Any:
        merged = fold.merged(name, leaf, (lora or {}).get(name))
        return jax.device_put(merged, leaf.sharding) if isinstance(leaf, jax.Array) else merged

    promised = []
    for name, leaf in zip(paths, leaves, strict=True):
        own = _check(name, leaf)
        kind = _orbax.Later if isinstance(leaf, jax.Array) else _orbax.HostLater
        promised.append(kind(name, np.shape(leaf), fold.dtype_of(own), partial(made, name, leaf)))
    done = 0

    def written(name: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(name, done, len(paths))

    with _folders.new_folder(path, **options) as part:
        _orbax.write(part, jax.tree_util.tree_unflatten(tree, promised), written)


def _check(name: str, leaf: Any) -> np.dtype:
    """The dtype of a leaf that can be written."""
    check_text(name)
    if _hosts.spans(leaf):
        raise ValueError(
            f"'{shown(name)}' is spread over processes.\n"
            "  All of them together: orbax.checkpoint.StandardCheckpointer().save(folder, jlora.merge(params, lora))."
        )
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic) or not isinstance(leaf.dtype, np.dtype):
        raise ValueError(f"'{shown(name)}' is no array of numbers.\n  got: {type(leaf).__name__}")
    if 0 in np.shape(leaf):
        raise ValueError(
            f"'{shown(name)}' {np.shape(leaf)} is empty, which orbax does not save.\n  Take it out of the tree."
        )
    return np.dtype(leaf.dtype)
