"""What is said when a merged weight is not finite: it is too large for the dtype that it is stored in, or its adapter is not finite."""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jlora._advice import Advised

Overflow = Literal["raise", "allow"]


def check_choice(overflow: Any) -> None:
    """Raises unless ``overflow`` is one of its two values."""
    if overflow not in ("raise", "allow"):
        raise ValueError(f"overflow must be 'raise' or 'allow'.\n  got: {overflow!r}")


def not_finite(name: str, call: str) -> Advised:
    """The error for a leaf whose adapter holds NaN or infinity; ``name`` and ``call`` as of ``too_large``."""
    return Advised(
        f"The adapter of '{name}' is not finite: it would be merged into NaN or infinity.",
        f"The training diverged: take an earlier one. To merge it as it is: {call}(..., overflow='allow').",
        "overflow",
    )


def too_large(name: str, value: float, dtype: Any, call: str) -> Advised:
    """The error for a leaf whose largest merged value is ``value`` in fp32.

    Args:
        name: Of the leaf, as it may be shown.
        value: Infinite if fp32 does not hold it either.
        dtype: What the leaf is stored in.
        call: The call to change.
    """
    dtype = np.dtype(dtype)
    also = "" if dtype == np.float32 else ", and float32 cannot either"
    most = float(jnp.finfo(dtype).max)
    allow = f"To store infinities: {call}(..., overflow='allow')."
    if not np.isfinite(value):
        return Advised(
            f"Merging overflows: '{name}' has values that {dtype} cannot hold{also}.",
            f"The factors are finite, but their product is not: the training diverged. {allow}",
            "overflow",
        )
    if value <= most:
        return Advised(
            f"Merging overflows: the update of '{name}' has values that the dtype of its factors cannot hold; "
            f"the leaf reaches {value:.5g}.",
            f"Cast the adapter: jax.tree.map(lambda x: x.astype(jnp.float32), lora). {allow}",
            "overflow",
        )
    return Advised(
        f"Merging overflows: '{name}' has values that {dtype} cannot hold: {value:.5g}, where its largest is {most:.5g}.",
        f"Choose a wider dtype: {call}(..., dtype=jnp.float32). {allow}",
        "dtype",
    )
