"""A table of what an adapter trains."""

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from jax.sharding import NamedSharding

from jlora import _paths
from jlora._adapters import Adapter, LowRank
from jlora._sharding import Split, names_of, splits
from jlora._table import table
from jlora._text import counted, shown
from jlora._wrap import check_base, check_lora


def summary(params: Any, lora: Mapping[str, Adapter]) -> str:
    """A table to print: path, shape of the kernel, rank, trained parameters, and their share of the whole.

    On a mesh of several devices also how the arrays of each adapter are split, and which of their axes are kept whole because the
    devices do not divide them.

    Args:
        params: The base, or ``jax.ShapeDtypeStruct``s of it (with shardings, if the table should tell how factors are split).
        lora: Adapters by path.

    Returns:
        The table, with a last line that sums up.

    Raises:
        ValueError: an adapter belongs to another base.
    """
    check_lora(lora, params)
    paths, leaves, _ = _paths.flatten(params)
    check_base(lora, paths, leaves)
    total = sum(prod(np.shape(leaf)) for leaf in leaves)
    trained = {path: sum(prod(np.shape(x)) for x in adapter.arrays().values()) for path, adapter in lora.items()}
    rows: list[tuple[str, ...]] = [
        (
            path,
            "×".join(map(str, lora[path].shape)) or "scalar",
            _rank(lora[path]),
            f"{trained[path]:,}",
            f"{trained[path] / total:.3%}",
        )
        for path in paths
        if path in lora
    ]
    header: tuple[str, ...] = ("path", "shape", "rank", "trained", "share")
    split = {path: _split(lora[path], leaf) for path, leaf in zip(paths, leaves, strict=True) if path in lora}
    if any(split.values()):
        header = (*header, "split over")
        rows = [(*row, _spelled(split[row[0]])) for row in rows]
    count = sum(trained.values())
    last = f"{counted(len(rows), 'leaf')}, {count:,} trained of {counted(total, 'parameter')} ({count / total:.3%})."
    return "\n".join([table(header, rows, right=(2, 3, 4)), last, *_whole(split)])


def _rank(adapter: Adapter) -> str:
    """``8``, ``8 (lookup only)``, or the kind of an adapter that has none."""
    if not isinstance(adapter, LowRank):
        return adapter.kind
    return f"{adapter.rank} ({adapter.only} only)" if adapter.only else str(adapter.rank)


def _split(adapter: Adapter, leaf: Any) -> dict[str, Split]:
    """How each array is split; empty on one device."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return {}
    return splits(adapter, sharding.spec, sharding.mesh)


def _spelled(split: Mapping[str, Split]) -> str:
    """``a (data, -) b (-, model)``."""
    axes = {name: ["+".join(map(str, names_of(axis))) or "-" for axis in s.spec] for name, s in split.items()}
    return "  ".join(f"{name} ({', '.join(found)})" for name, found in axes.items()) or "-"


def _whole(split: Mapping[str, Mapping[str, Split]]) -> list[str]:
    return [
        f"'{shown(path)}': the axis of size {size} of {name} is kept whole, since the devices along "
        f"{'+'.join(names_of(axis))} do not divide it."
        for path, arrays in split.items()
        for name, s in arrays.items()
        for size, axis in s.kept_whole
    ]
