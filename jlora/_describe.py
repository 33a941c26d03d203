"""What the arrays of an adapter mean, as JSON: kind, axes, scale and base of each leaf, written and read with every check.

``describe`` and ``restore_target`` serve checkpoints of the caller's own as well as ``jlora.save`` and ``jlora.load``.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _paths
from jlora._adapters import KINDS, Adapter, Fingerprint, FullWeight, LowRank, fingerprint
from jlora._advice import Advised
from jlora._sharding import followed
from jlora._text import shown
from jlora._wrap import check_base, check_lora

FORMAT, WITH_ONLY = 1, 2
"""Of descriptions, and of those with an adapter for one kind of use, which a version that does not know of it must not read as for all."""


def describe(lora: Mapping[str, Adapter], **meta: Any) -> dict[str, Any]:
    """What an adapter's arrays mean, as a dict for JSON: format, version, rules leaf by leaf, fingerprint of the base, ``meta``.

    Put it beside the arrays in a checkpoint of your own (``orbax.checkpoint.args.JsonSave``); ``restore_target`` reads it back.

    Args:
        lora: Adapters by path.
        **meta: Anything JSON can hold.

    Raises:
        TypeError: something in ``meta`` is not JSON.
        ValueError: the adapters were made for different bases.
    """
    from jlora import __version__

    check_lora(lora)
    bases = {adapter.base for adapter in lora.values()}
    if len(bases) != 1:
        raise ValueError(f"These adapters were made for {len(bases)} different bases: save them apart.")
    try:
        meta = json.loads(json.dumps(meta, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"The metadata must be JSON (strings, finite numbers, lists, dicts): {error}.") from None
    for adapter in lora.values():
        _ = adapter.shape  # raises for a stack of adapters, which load could not read
    (base,) = bases
    return {
        "format": WITH_ONLY if any(getattr(adapter, "only", "") for adapter in lora.values()) else FORMAT,
        "jlora": __version__,
        "adapters": {path: _entry(adapter) for path, adapter in sorted(lora.items())},
        "base": [[path, list(shape), dtype] for path, shape, dtype in base.leaves],
        **({"partial": True} if base.partial else {}),
        "meta": meta,
    }


def restore_target(description: Mapping[str, Any], params: Any = None) -> dict[str, Adapter]:
    """The adapter that ``describe`` described, with ``jax.ShapeDtypeStruct``s for arrays: the target to restore into.

    Args:
        description: What ``describe`` returned.
        params: The base, or ``jax.ShapeDtypeStruct``s of it: checked against the fingerprint; the factors get the shardings it implies.

    Raises:
        ValueError: the description is damaged or of a newer format; ``params`` is another base (the first difference is named).
    """
    try:
        if description["format"] not in (FORMAT, WITH_ONLY):
            raise ValueError(
                f"The adapter has format {shown(description['format'])}, this version of jlora reads {FORMAT} and "
                f"{WITH_ONLY}.\n  Update jlora."
            )
        base = Fingerprint(description["base"], partial=description.get("partial") is True)
        lora = {path: _from_entry(entry, base) for path, entry in description["adapters"].items()}
        shapes = {path: shape for path, shape, _ in base.leaves}
        for path, adapter in lora.items():
            _check_entry(path, adapter, shapes)
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"The description of the adapter is damaged: {type(error).__name__} {shown(error)}.") from None
    if not lora:
        raise ValueError("The description of the adapter is damaged: it names no leaf.")
    if params is None:
        return lora
    paths, leaves, _ = _paths.flatten(params)
    difference = base.difference(fingerprint(paths, leaves))
    if difference:
        raise Advised(
            f"The adapter was made for another base: {difference}.",
            "Pass the parameters it was trained on. To use it all the same wherever shapes agree, load it without them.",
            "base",
        )
    check_base(lora, paths, leaves)
    where = followed(lora, params)
    return {
        path: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), adapter, where[path])
        if path in where
        else adapter
        for path, adapter in lora.items()
    }


def _entry(adapter: Adapter) -> dict[str, Any]:
    if type(adapter) not in KINDS.values():
        raise TypeError(
            f"jlora can only save {', '.join(KINDS)} adapters.\n  got: {type(adapter).__name__}; keep it with orbax itself"
        )
    arrays = {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in adapter.arrays().items()}
    entry: dict[str, Any] = {"kind": adapter.kind, "arrays": arrays}
    if isinstance(adapter, LowRank):
        # The rule that makes this leaf again: alpha = scale * rank, whatever pattern or scaling chose it.
        rule = {
            "rank": adapter.rank,
            "alpha": adapter.scale * adapter.rank,
            "scale": adapter.scale,
            "dropout": adapter.dropout,
        }
        entry |= rule | {"dilated": adapter.dilated} | ({"only": adapter.only} if adapter.only else {})
    if isinstance(adapter, LowRank | FullWeight):
        entry |= {"inputs": adapter.inputs, "outputs": adapter.outputs, "batch": adapter.batch}
        entry |= {"use": adapter.use, "window": adapter.window, "groups": adapter.groups}
    return entry


def _from_entry(entry: Mapping[str, Any], base: Fingerprint) -> Adapter:
    if entry["kind"] not in KINDS:
        raise ValueError(
            f"The adapter has a leaf of kind '{shown(entry['kind'])}'; this version of jlora knows {', '.join(KINDS)}."
        )
    kind = KINDS[entry["kind"]]
    arrays = {name: _from_array(x) for name, x in entry["arrays"].items()}
    static: dict[str, Any] = {"base": base}
    # Adapters saved by 0.1 before these were kept do not have them: of whole leaves none, of factors but the first three.
    static |= {"use": str(entry.get("use", "")), "groups": int(entry.get("groups", 1))}
    roles = ("inputs", "outputs", "batch") if kind is LowRank or static["use"] else ()
    static |= {name: tuple(int(d) for d in entry[name]) for name in roles}
    static["window"] = tuple(int(d) for d in entry.get("window", ()))
    if kind is LowRank:
        static |= {"scale": float(entry["scale"]), "dropout": float(entry["dropout"])}
        static["dilated"] = bool(entry.get("dilated", False))
        static["only"] = entry.get("only", "")
        if static["only"] not in ("", *static["use"].split("+")):
            raise ValueError(
                f"The description of the adapter is damaged: only is {static['only']!r}, use is {static['use']!r}."
            )
        if not (math.isfinite(static["scale"]) and static["scale"] > 0):
            raise ValueError(f"The description of the adapter is damaged: scale is {static['scale']}.")
        if not 0 <= static["dropout"] < 1:
            raise ValueError(f"The description of the adapter is damaged: dropout is {static['dropout']}.")
    return kind(**arrays, **static)


def _from_array(x: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    shape, dtype = x["shape"], x["dtype"]
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**40 for n in shape) or len(shape) > 32:
        raise TypeError(f"shape {shown(shape)}")
    if not str(dtype).isidentifier() or not str(dtype).isascii() or np.dtype(dtype).name != dtype:
        raise TypeError(f"dtype {shown(dtype)}")
    return jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))


def _check_entry(path: str, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises unless an adapter that was read fits the leaf it says it is for."""
    if path not in shapes:
        raise ValueError(f"The description of the adapter is damaged: its base has no leaf '{shown(path)}'.")
    assert isinstance(adapter, LowRank | FullWeight)  # the kinds there are
    axes = sorted(d for group in (adapter.batch, adapter.inputs, adapter.outputs) for d in group)
    if axes != list(range(len(shapes[path]))) and (axes or isinstance(adapter, LowRank)):
        raise ValueError(f"The description of the adapter is damaged: '{shown(path)}' has axes {axes}.")
    if not set(adapter.window) <= set(adapter.inputs):
        raise ValueError(
            f"The description of the adapter is damaged: '{shown(path)}' has window {adapter.window}, inputs {adapter.inputs}."
        )
    floats = all(jnp.issubdtype(x.dtype, jnp.inexact) for x in adapter.arrays().values())
    ranks = {adapter.a.shape[-1], adapter.b.shape[len(adapter.batch)]} if isinstance(adapter, LowRank) else {1}
    if adapter.shape != shapes[path] or not floats or len(ranks) != 1:
        found = {name: f"{x.shape} {x.dtype}" for name, x in adapter.arrays().items()}
        raise ValueError(f"The description of the adapter is damaged: '{shown(path)}' {shapes[path]} has {found}.")
