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
    is_leaf = lambda x: isinstance(x, PartitionSpec | jax.sharding.Sharding)  # noqa: E731
    keyed, _ = jax.tree_util.tree_flatten_with_path(params_or_shardings, is_leaf=is_leaf)
    base = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in keyed}
    out = {}
    for path, adapter in lora.items():
        if path not in base:
            raise ValueError(f"The base has no leaf '{path}' to take a sharding from.\n  nearest: {', '.join(_paths.nearest(path, base))}")
        sharding = getattr(base[path], "sharding", base[path])
        out[path] = jax.tree.map(lambda x: x, adapter, is_leaf=lambda x: False) if sharding is None else _of(path, adapter, sharding)
    return out


def _of(path: str, adapter: Adapter, sharding: Any) -> Any:
    spec = sharding if isinstance(sharding, PartitionSpec) else getattr(sharding, "spec", None)
    if spec is None:
        return jax.tree.map(lambda _: sharding, adapter)
    ndim = len(adapter.shape)
    if len(spec) > ndim:
        raise ValueError(f"The spec {spec} of '{path}' is longer than its {ndim} axes.")
    axes = (*spec, *(None,) * (ndim - len(spec)))
    specs = factor_specs(adapter, axes)
    if isinstance(sharding, NamedSharding):
        specs = {name: NamedSharding(sharding.mesh, s, memory_kind=sharding.memory_kind) for name, s in specs.items()}
    leaves, tree = jax.tree.flatten(adapter)
    return jax.tree.unflatten(tree, [specs[name] for name in adapter.labels][: len(leaves)])


def factor_specs(adapter: Adapter, axes: Sequence[Any]) -> dict[str, PartitionSpec]:
    """The spec of each array of ``adapter``, given the mesh axes of each axis of its leaf."""
    if not isinstance(adapter, LowRank):
        return dict.fromkeys(adapter.labels, PartitionSpec(*axes))
    batch, inputs, outputs = ([axes[d] for d in group] for group in (adapter.batch, adapter.inputs, adapter.outputs))
    return {"a": PartitionSpec(*batch, *inputs, None), "b": PartitionSpec(*batch, None, *outputs)}
