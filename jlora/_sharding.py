"""Where factors live: each axis of a factor is split as the axis of the base that it runs along; the rank is not split."""

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import _paths
from jlora._adapters import Adapter, is_adapter
from jlora._text import counted, shown

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
            if not keys:
                raise ValueError(
                    "shardings takes the dict from path to adapter, and the base.\n  got: one adapter alone"
                )
            path = str(getattr(keys[-1], "key", ""))
            known[keys] = _of(path, adapter, _named(path, _where(path, _leaf(path, found), found), mesh, rules))
    if not nodes:
        return lora  # the state of an optimiser that has none
    if not known:
        raise ValueError(
            "There is no adapter in this tree: no sharding follows from the base.\n"
            "  Pass what jlora.init returned, or a tree that holds it."
        )
    rest = _whole(next(iter(jax.tree.leaves(list(known.values()), is_leaf=_is_sharding)), PartitionSpec()))
    return jax.tree.unflatten(tree, [known.get(keys, rest) for keys, _ in nodes])


def _leaf(path: str, found: Mapping[str, Any]) -> Any:
    leaf = next((found[p] for p in _spellings(path) if p in found), None)
    if leaf is None:
        raise ValueError(
            f"The base has no leaf '{shown(path)}' to take a sharding from.\n  nearest: {', '.join(_paths.nearest(path, found))}"
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


def _where(path: str, leaf: Any, found: Mapping[str, Any]) -> Any:
    """``_sharding`` of a leaf; one that nobody placed, among others on a mesh, is whole on every device of it."""
    sharding = _sharding(leaf)
    if isinstance(sharding, NamedSharding | PartitionSpec) or getattr(leaf, "committed", True):
        return sharding
    placed = (_sharding(x) for x in found.values())
    return next((_whole(s) for s in placed if isinstance(s, NamedSharding)), sharding)


def _named(path: str, sharding: Any, mesh: Mesh | None, rules: Any) -> Any:
    """``sharding`` with logical names replaced, and on ``mesh`` if one is given."""
    if not isinstance(sharding, PartitionSpec):
        return sharding
    if rules is not None:
        from flax import linen as nn  # here, so that `import jlora` stays quick

        known = {name for name, _ in rules}
        logical: Any = nn.logical_to_mesh_axes(tuple(sharding), rules)
        # What rules do not have is whole, as Flax has it; but the axes of a mesh are what they are.
        axes = set() if mesh is None else set(mesh.axis_names)
        mine = [bool(names_of(axis)) and set(names_of(axis)) <= axes - known for axis in sharding]
        sharding = PartitionSpec(*(a if m else b for a, b, m in zip(sharding, logical, mine, strict=True)))
    if mesh is None:
        return sharding
    sharding = PartitionSpec(*(None if axis is PartitionSpec.UNCONSTRAINED else axis for axis in sharding))
    unknown = [name for axis in sharding for name in names_of(axis) if name not in mesh.axis_names]
    if unknown:
        hint = "" if rules is not None else " Logical names need rules=, pairs of a name and its mesh axes."
        raise ValueError(
            f"The spec {sharding} of '{shown(path)}' names '{unknown[0]}', which the mesh does not have.\n"
            f"  its axes: {', '.join(map(repr, mesh.axis_names))}.{hint}"
        )
    return NamedSharding(mesh, sharding)


def _of(path: str, adapter: Adapter, sharding: Any) -> Any:
    if not _is_sharding(sharding):
        raise ValueError(
            f"The base leaf '{shown(path)}' has no sharding.\n  got: {type(sharding).__name__}; pass arrays, shardings or PartitionSpecs"
        )
    spec = sharding if isinstance(sharding, PartitionSpec) else getattr(sharding, "spec", None)
    fields = adapter.arrays()
    if spec is None:
        if len(sharding.device_set) > 1 and not sharding.is_fully_replicated:
            raise ValueError(
                f"The sharding of '{shown(path)}' does not say which axes are split.\n  got: {type(sharding).__name__}; pass "
                f"a NamedSharding"
            )
        return jax.tree.map(lambda _: sharding, adapter)
    shape = {p: s for p, s, _ in adapter.base.leaves}.get(path) or adapter.shape
    if len(spec) > len(shape):
        raise ValueError(f"The spec {spec} of '{shown(path)}' is longer than its {counted(len(shape), 'axis')}.")
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None

    def on(spec: PartitionSpec) -> Any:
        return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind) if mesh is not None else spec

    found = {name: on(split.spec) for name, split in splits(adapter, spec, mesh, shape).items()}
    # An optimiser's state may have something else in the place of a factor: nothing, its rows' means, a count.
    parts = [
        _stacked(found[name], np.ndim(x) - len(axes), on)
        if _follows(x, axes, shape)
        else jax.tree.map(lambda _: on(PartitionSpec()), x)
        for (name, x), axes in zip(fields.items(), adapter.axes().values(), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(adapter, is_leaf=lambda x: x is not adapter), parts)


def _follows(x: Any, axes: tuple[int | None, ...], shape: tuple[int, ...]) -> bool:
    """Whether the last axes of ``x`` are those of a factor that runs along ``axes`` of a leaf."""
    sizes = getattr(x, "shape", None)
    if sizes is None or len(sizes) < len(axes):
        return False
    last = sizes[len(sizes) - len(axes) :]
    return all(d is None or n == shape[d] for n, d in zip(last, axes, strict=True))


def _stacked(sharding: Any, more: int, on: Any) -> Any:
    """The sharding of a stack of factors: whole along the ``more`` axes in front."""
    if not more:
        return sharding
    return on(PartitionSpec(*[None] * more, *getattr(sharding, "spec", sharding)))


class Split(NamedTuple):
    """How one array of an adapter is split, and which of the base's mesh axes it cannot follow."""

    spec: PartitionSpec
    kept_whole: tuple[tuple[int, Any], ...]
    """Size and mesh axes of each axis that its devices do not divide."""


def splits(adapter: Adapter, spec: Iterable[Any], mesh: Any, shape: tuple[int, ...] | None = None) -> dict[str, Split]:
    """How each array of ``adapter`` is split over ``mesh``, if it is known, given the spec of its leaf (and its shape)."""
    axes = {d: None if axis is PartitionSpec.UNCONSTRAINED else axis for d, axis in enumerate(spec)}
    shape = adapter.shape if shape is None else shape
    out = {}
    for name, runs_along in adapter.axes().items():
        wanted = [None if d is None else axes.get(d) for d in runs_along]
        sizes = [1 if d is None else shape[d] for d in runs_along]
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


def followed(lora: Mapping[str, Adapter], params: Any) -> dict[str, Adapter]:
    """The shardings of the adapters whose leaf someone placed. What lives on the default device for want of a choice is left out."""
    paths, leaves, _ = _paths.flatten(params)
    placed = {
        path: leaf.sharding for path, leaf in zip(paths, leaves, strict=True) if path in lora and _is_placed(leaf)
    }
    return shardings({path: lora[path] for path in placed}, placed) if placed else {}


def _is_placed(leaf: Any) -> bool:
    return getattr(leaf, "sharding", None) is not None and getattr(leaf, "committed", True)
