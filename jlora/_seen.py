"""What the abstract run behind ``jlora.sites`` knows of a value: which leaf it is a view of, along which axes, and what it depends on."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

Axes = frozenset[int]
NONE: Axes = frozenset()


class SiteUse(NamedTuple):
    """One use of a leaf: its ``kind`` (``linear``, ``conv``, ``lookup``, ``dense``), the primitive, the source line, and its input axes.

    ``note`` is what to say of a dense use if not that all of the leaf is needed; ``{}`` stands for the primitive and its line.
    """

    kind: str
    operation: str
    where: str
    inputs: tuple[int, ...] = ()
    note: str = ""


class Seen(NamedTuple):
    """A view of a leaf.

    Attributes:
        path: Of the leaf.
        axes: For each axis of the value the axes of the leaf it runs along.
        shape: Of the value.
        picked: Axes of the leaf along which slices were picked.
        rows: Those picked last, or that a constant was multiplied along: if nothing multiplies the rest, the value was activations.
        kind: The kind of use it was then.
    """

    path: str
    axes: tuple[Axes, ...]
    shape: tuple[int, ...]
    picked: Axes = NONE
    rows: Axes = NONE
    kind: str = "lookup"


class Source(NamedTuple):
    """What an activation came out of last: a product with the leaves at ``paths``, or a lookup in them."""

    paths: tuple[str, ...]
    lookup: bool


class Value(NamedTuple):
    """A value of the abstract run: a view of a leaf (of several, where they were joined) or an activation.

    Attributes:
        views: One for each leaf; none for an activation.
        reach: The uses of leaves that the value depends on with no other use between.
    """

    views: tuple[Seen, ...] = ()
    reach: frozenset[Source] = frozenset()


class Record(NamedTuple):
    use: SiteUse
    inputs: Axes
    batch: Axes
    window: tuple[int, ...] = ()
    groups: int = 1
    dilated: bool = False
    picked: Axes = NONE


def leaf(path: str, leaf: Any) -> Value:
    shape = np.shape(leaf)
    if 0 in shape or not jnp.issubdtype(lax.dtype(leaf), jnp.inexact):
        return Value()
    return Value((Seen(path, tuple(frozenset([d]) for d in range(len(shape))), shape),))


def union(groups: Iterable[Axes]) -> Axes:
    """All axes in any of ``groups``."""
    return frozenset().union(*groups)
