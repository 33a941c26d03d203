"""A table of what an adapter trains."""

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from jlora import _paths
from jlora._adapters import Adapter, LowRank
from jlora._table import table
from jlora._wrap import check_base, check_lora


def summary(params: Any, lora: Mapping[str, Adapter]) -> str:
    """A table to print: path, shape of the kernel, rank, trained parameters, and their share of the whole.

    Args:
        params: The base, or ``jax.ShapeDtypeStruct``s of it.
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
    rows = [
        (
            path,
            "×".join(map(str, lora[path].shape)) or "scalar",
            str(lora[path].rank) if isinstance(lora[path], LowRank) else lora[path].kind,  # type: ignore[attr-defined]
            f"{trained[path]:,}",
            f"{trained[path] / total:.3%}",
        )
        for path in paths
        if path in lora
    ]
    count = sum(trained.values())
    noun = "leaf" if len(rows) == 1 else "leaves"
    last = f"{len(rows)} {noun}, {count:,} trained of {total:,} parameters ({count / total:.3%})."
    return table(("path", "shape", "rank", "trained", "share"), rows, right=(2, 3, 4)) + "\n" + last
