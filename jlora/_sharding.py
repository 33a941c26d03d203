"""Where factors live: each axis of a factor is split as the axis of the base that it runs along; the rank is not split."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jlora import _paths
from jlora._adapters import Adapter, LowRank


def shardings(lora: Mapping[str, Adapter], params_or_shardings: Any) -> Any:
    """The sharding of each array of ``lora``, derived from its base leaf's.

    Args:
        lora: Adapters by path (their arrays may be ``jax.ShapeDtypeStruct``s).
        params_or_shardings: The base's parameters, or a tree of the same structure that holds shardings or ``PartitionSpec``s.

    Returns:
        A tree like ``lora`` whose leaves are what the base has: ``NamedSharding``s or ``PartitionSpec``s for those, else the base
        leaf's own sharding (a single device).

    Raises:
        ValueError: an adapted leaf is missing, or a spec is longer than the leaf has axes.
    """
    keyed, _ = jax.tree_util.tree_flatten_with_path(params_or_shardings, is_leaf=_is_sharding)
    base = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in keyed}
    out = {}
    for path, adapter in lora.items():
        if path not in base:
            raise ValueError(
                f"The base has no leaf '{path}' to take a sharding from.\n  nearest: {', '.join(_paths.nearest(path, base))}"
            )
        out[path] = _of(path, adapter, getattr(base[path], "sharding", base[path]))
    return out


def _is_sharding(x: Any) -> bool:
    return isinstance(x, PartitionSpec | jax.sharding.Sharding)


def _of(path: str, adapter: Adapter, sharding: Any) -> Any:
    if not _is_sharding(sharding):
        raise ValueError(
            f"The base leaf '{path}' has no sharding.\n  got: {type(sharding).__name__}; pass arrays, shardings or PartitionSpecs"
        )
    spec = sharding if isinstance(sharding, PartitionSpec) else getattr(sharding, "spec", None)
    names = list(adapter.labels)
    if spec is None:  # one device, or a sharding that does not speak of axes
        found: dict[str, Any] = dict.fromkeys(names, sharding)
    else:
        ndim = len(adapter.shape)
        if len(spec) > ndim:
            raise ValueError(f"The spec {spec} of '{path}' is longer than its {ndim} axes.")
        found = dict(factor_specs(adapter, (*spec, *(None,) * (ndim - len(spec)))))
        if isinstance(sharding, NamedSharding):
            found = {
                name: NamedSharding(sharding.mesh, s, memory_kind=sharding.memory_kind) for name, s in found.items()
            }
    return jax.tree.unflatten(jax.tree.structure(adapter), [found[name] for name in names])


def factor_specs(adapter: Adapter, axes: Sequence[Any]) -> dict[str, PartitionSpec]:
    """The spec of each array of ``adapter``, given the mesh axes of each axis of its leaf."""
    if not isinstance(adapter, LowRank):
        return dict.fromkeys(adapter.labels, PartitionSpec(*axes))
    batch, inputs, outputs = ([axes[d] for d in group] for group in (adapter.batch, adapter.inputs, adapter.outputs))
    return {"a": PartitionSpec(*batch, *inputs, None), "b": PartitionSpec(*batch, None, *outputs)}
