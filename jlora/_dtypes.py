"""Dtypes that weights are stored in: what one is cast to keeps its values, up to rounding."""

from typing import Any

import jax.numpy as jnp
import numpy as np

FLOATS = {name: jnp.dtype(name) for name in ("float64", "float32", "float16", "bfloat16")}
"""By name. Integers and floats of eight bits would need scales, and a complex number is none that formats of weights have."""


def as_float(dtype: Any, call: str = "") -> np.dtype | None:
    """The argument ``dtype`` of ``call`` if weights can be stored in it; ``None`` stays that.

    Raises:
        ValueError: it is no such dtype.
    """
    if dtype is None:
        return None
    try:
        found = np.dtype(jnp.dtype(dtype))
    except TypeError:
        found = None
    if found is None or str(found) not in FLOATS:
        raise ValueError(f"{call or 'dtype'} must be one of {', '.join(FLOATS)}.\n  got: {dtype!r}")
    return found
