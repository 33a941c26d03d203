"""Where factors live: each axis of a factor is split as the axis of the base that it runs along; the rank is not split."""

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import _paths
from jlora._adapters import Adapter, is_adapter

# Flax keeps an array that has metadata in a box; its contents have this key below the path of the box.
_BOXED = "/value"


def shardings(lora: Any, base: Any, *, mesh: Mesh | None = None, rules: Any = None) -> Any:
    """The sharding of each array of ``lora``, derived from its base leaf's.

    ``a`` is split as the input axes of its leaf are, ``b`` as the output axes, both as the batch axes (layers of a scan, experts);
    the rank is never split. An axis that the devices of its mesh axes do not divide is kept whole, which ``jlora.summary`` tells.

    Args:
        lora: Adapters by path, or any tree that holds such dicts: an optimiser's state is split as the adapter it belongs to, and
            what is no adapter in it (a count) is whole on every device. Arrays may be ``jax.ShapeDtypeStruct``s.
        base: The base's parameters, or a tree of the same structure that holds shardings or ``PartitionSpec``s, for instance from
            ``flax.linen.get_partition_spec`` or ``flax.nnx.get_partition_spec``. Where an array is in a box of
            ``flax.linen.with_partitioning``, the names in the box count, unless it is split over a mesh already.
        mesh: Turns ``PartitionSpec``s and names into ``NamedSharding``s on this mesh.
        rules: Pairs of a logical axis name and the mesh axes it goes to, as ``flax.linen.logical_to_mesh`` takes.

    Returns:
        A tree like ``lora`` whose leaves are what the base has: ``NamedSharding``s or ``PartitionSpec``s for those, else the base
        leaf's own sharding (a single device).

    Raises:
        ValueError: there is no adapter, an adapted leaf is missing, a spec is longer than the leaf has axes, or names an axis that
            the mesh does not have.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jax.sharding import PartitionSpec as P
        >>> params = {"w": jnp.ones((8, 6))}
        >>> sites = jlora.sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 8)))
        >>> lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="w"))
        >>> where = jlora.shardings(lora, {"w": P("embed", "mlp")}, rules=[("embed", None), ("mlp", "model")])
        >>> where["w"].a, where["w"].b
        (P(None, None), P(None, 'model'))
    """
    keyed, _ = jax.tree_util.tree_flatten_with_path(base, is_leaf=_has_sharding)
    found = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in keyed}
    nodes, tree = jax.tree_util.tree_flatten_with_path(lora, is_leaf=is_adapter)
    known = {}
    for keys, adapter in nodes:
        if is_adapter(adapter):
            path = str(getattr(keys[-1], "key", "")) if keys else ""
            known[keys] = _of(path, adapter, _named(path, _sharding(_leaf(path, found)), mesh, rules))
    if not known:
        raise ValueError(
            "There is no adapter in this tree: no sharding follows from the base.\n"
            "  Pass what jlora.init returned, or a tree that holds it."
        )
    rest = _whole(jax.tree.leaves(list(known.values()), is_leaf=_is_sharding)[0])
    return jax.tree.unflatten(tree, [known.get(keys, rest) for keys, _ in nodes])


def _leaf(path: str, found: Mapping[str, Any]) -> Any:
    leaf = next((found[p] for p in _spellings(path) if p in found), None)
    if leaf is None:
        raise ValueError(
            f"The base has no leaf '{path}' to take a sharding from.\n  nearest: {', '.join(_paths.nearest(path, found))}"
        )
    return leaf


def _whole(like: Any) -> Any:
    """Of what is whole on every device: a sharding of the kind of ``like``."""
    if isinstance(like, NamedSharding):
        return NamedSharding(like.mesh, PartitionSpec())
    return PartitionSpec() if isinstance(like, PartitionSpec) else like


def _spellings(path: str) -> Iterator[str]:
    """A path as it is, and as it is with or without a box around the leaf."""
    yield path
    yield path.removesuffix(_BOXED) if path.endswith(_BOXED) else path + _BOXED


def _has_sharding(x: Any) -> bool:
    return _is_sharding(x) or hasattr(x, "get_partition_spec")


def _is_sharding(x: Any) -> bool:
    return isinstance(x, PartitionSpec | jax.sharding.Sharding)


def _sharding(leaf: Any) -> Any:
    """What a leaf says of where it lives: a sharding that it is or has, or the names in its box."""
    if _is_sharding(leaf):
        return leaf
    inside = [x for x in (getattr(x, "sharding", None) for x in jax.tree.leaves(leaf)) if x is not None]
    if inside and (isinstance(inside[0], NamedSharding) or not hasattr(leaf, "get_partition_spec")):
        return inside[0]
    return leaf.get_partition_spec() if hasattr(leaf, "get_partition_spec") else leaf


def _named(path: str, sharding: Any, mesh: Mesh | None, rules: Any) -> Any:
    """``sharding`` with logical names replaced, and on ``mesh`` if one is given."""
    if not isinstance(sharding, PartitionSpec):
        return sharding
    if rules is not None:
        from flax import linen as nn  # here, so that `import jlora` stays quick

        sharding = nn.logical_to_mesh_axes(tuple(sharding), rules)
    if mesh is None:
        return sharding
    unknown = [name for axis in sharding for name in names_of(axis) if name not in mesh.axis_names]
    if unknown:
        hint = "" if rules is not None else " Logical names need rules=, pairs of a name and its mesh axes."
        raise ValueError(
            f"The spec {sharding} of '{path}' names '{unknown[0]}', which the mesh does not have.\n"
            f"  its axes: {', '.join(map(repr, mesh.axis_names))}.{hint}"
        )
    return NamedSharding(mesh, sharding)


def _of(path: str, adapter: Adapter, sharding: Any) -> Any:
    if not _is_sharding(sharding):
        raise ValueError(
            f"The base leaf '{path}' has no sharding.\n  got: {type(sharding).__name__}; pass arrays, shardings or PartitionSpecs"
        )
    names = list(adapter.labels)
    spec = sharding if isinstance(sharding, PartitionSpec) else getattr(sharding, "spec", None)
    if spec is None:  # one device, or a sharding that does not speak of axes
        return jax.tree.unflatten(jax.tree.structure(adapter), [sharding for _ in names])
    if len(spec) > len(adapter.shape):
        raise ValueError(f"The spec {spec} of '{path}' is longer than its {len(adapter.shape)} axes.")
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    found: dict[str, Any] = {name: split.spec for name, split in splits(adapter, spec, mesh).items()}
    if isinstance(sharding, NamedSharding):
        found = {n: NamedSharding(sharding.mesh, s, memory_kind=sharding.memory_kind) for n, s in found.items()}
    return jax.tree.unflatten(jax.tree.structure(adapter), [found[name] for name in names])


class Split(NamedTuple):
    """How one array of an adapter is split, and which of the base's mesh axes it cannot follow."""

    spec: PartitionSpec
    kept_whole: tuple[tuple[int, Any], ...]
    """Size and mesh axes of each axis that its devices do not divide."""


def splits(adapter: Adapter, spec: Iterable[Any], mesh: Any) -> dict[str, Split]:
    """How each array of ``adapter`` is split over ``mesh``, if it is known, given the spec of its leaf."""
    axes = dict(enumerate(spec))
    out = {}
    for name, runs_along in adapter.axes().items():
        wanted = [None if d is None else axes.get(d) for d in runs_along]
        sizes = [1 if d is None else adapter.shape[d] for d in runs_along]
        whole = [
            mesh is not None and n % prod(mesh.shape[a] for a in names_of(axis)) != 0
            for n, axis in zip(sizes, wanted, strict=True)
        ]
        out[name] = Split(
            PartitionSpec(*(None if w else axis for w, axis in zip(whole, wanted, strict=True))),
            tuple((n, axis) for w, n, axis in zip(whole, sizes, wanted, strict=True) if w),
        )
    return out


def names_of(axis: Any) -> tuple[Any, ...]:
    """The mesh axes in one entry of a ``PartitionSpec``."""
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)
