r"""Adapters: what one leaf of the base is paired with. A new kind is a subclass that knows its update.

An adapter is a registered pytree node, so that ``jax.grad``, optax and orbax see its arrays and nothing else. ``enter`` says what
stands in the program where the leaf stood; the interpreter asks for no more, and does not know LoRA from any other kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora._factored import Branch, Factored
from jlora._labelled import RANK
from jlora._text import counted, shown


def static(**default: Any) -> Any:
    """A field that is part of the tree's structure and not a leaf of it."""
    return field(metadata={"static": True}, **default)


class Fingerprint:
    """The paths, shapes and dtypes of a parameter tree. Two are equal if these are, in any order; comparing and hashing cost nothing.

    Args:
        leaves: Path, shape and dtype of each leaf.
        partial: Whether the tree may have others: an adapter from elsewhere tells only of what it adapts.
    """

    def __init__(self, leaves: Any, *, partial: bool = False):
        self.leaves = tuple((str(path), tuple(map(int, shape)), str(dtype)) for path, shape, dtype in leaves)
        self.partial = partial
        self.digest = sha256(repr(tuple(sorted(self.leaves))).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Fingerprint({self.digest[:12]}, {counted(len(self.leaves), 'leaf')})"

    def joined(self, other: "Fingerprint") -> "Fingerprint":
        """What two that do not differ tell together."""
        if not (self.partial and other.partial):
            return other if self.partial else self
        found = {path: (path, shape, dtype) for path, shape, dtype in (*other.leaves, *self.leaves)}
        return Fingerprint([found[path] for path in sorted(found)], partial=True)

    def difference(self, other: "Fingerprint") -> str | None:
        """The first difference from ``other``, in words, or ``None``. What is partial does not tell that a leaf is not there."""
        mine, theirs = ({path: (shape, dtype) for path, shape, dtype in f.leaves} for f in (self, other))
        for path in mine | theirs:
            if path not in theirs and not other.partial:
                nnx = f"{path}/value" in theirs
                also = (
                    f" (there is '{shown(path)}/value', as in nnx.state: pass the tree of jlora.nnx.split)"
                    if nnx
                    else ""
                )
                return f"'{shown(path)}' {_spell(*mine[path])} is missing{also}"
            if path not in mine and not self.partial:
                return f"'{shown(path)}' {_spell(*theirs[path])} is not part of the adapter's base"
            if path in mine and path in theirs and mine[path] != theirs[path]:
                return f"'{shown(path)}' is {_spell(*theirs[path])}, not {_spell(*mine[path])}"
        return None


def _spell(shape: tuple[int, ...], dtype: str) -> str:
    return f"{shape} {shown(dtype)}"


class Adapter:
    """Base class of adapters. A subclass is a dataclass registered as a pytree node whose data fields are what is trained.

    Class attributes:
        kind: Name under which ``jlora.save`` files it.
        labels: For each data field, the label ``jlora.labels`` gives it.
    """

    kind: ClassVar[str]
    labels: ClassVar[dict[str, str]]
    base: Fingerprint

    def enter(self, w: jax.Array, branch: Branch, key: jax.Array | None) -> Any:
        """What stands in the program for the leaf ``w``: a ``Factored`` value, or an array of ``w``'s shape and dtype."""
        del branch, key
        return (w + self.delta(w)).astype(w.dtype)

    def delta(self, w: jax.Array | None) -> jax.Array:
        """The dense update of the leaf; ``w``, its base, may be ``None`` if the kind does not need it."""
        raise TypeError(f"{type(self).__name__} does not define delta.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf this adapts."""
        raise TypeError(f"{type(self).__name__} does not define shape.")

    def axes(self) -> dict[str, tuple[int | None, ...]]:
        """For each data field, the axis of the leaf that each of its axes runs along (``None``: none), so that it is split as that is."""
        return {name: tuple(range(len(self.shape))) for name in self.labels}

    def arrays(self) -> dict[str, jax.Array]:
        """The data fields by name."""
        return {name: getattr(self, name) for name in self.labels}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank(Adapter):
    r"""A low-rank update $s\,A B$ of one leaf.

    Attributes:
        a: Shape ``(*batch, *inputs, rank)``.
        b: Shape ``(*batch, rank, *outputs)``; zero at the start, so that the update is.
        inputs: Axes of the leaf that a product sums over.
        outputs: Axes of the leaf that remain.
        batch: Axes of the leaf along which every slice has factors of its own (layers of a scan, experts).
        scale: $s$: ``alpha / rank``, or ``alpha / sqrt(rank)`` with rank-stabilised scaling.
        dropout: Rate of dropout on the adapter branch.
        base: Fingerprint of the tree the adapter was made for.
        use: How the model uses the leaf, as ``Site.kind``: formats of other libraries file tables and convolutions apart.
        window: Of a convolution, the inputs that its window runs along.
        groups: Of a grouped convolution, the number of its groups; 0 of a transposed one, below zero if that is in groups.
        dilated: Of a convolution, whether its window has gaps, as ``Site.dilated``.
        only: The kind of use that has the update, ``"lookup"``, ``"linear"`` or ``"conv"``, where a leaf is used in several ways (a table
            that is also the output head); the other uses have the plain base. Empty for all uses.

    References:
        Hu et al., 2021, arXiv:2106.09685, section 4.1.
    """

    kind: ClassVar[str] = "low-rank"
    labels: ClassVar[dict[str, str]] = {"a": "a", "b": "b"}

    a: jax.Array
    b: jax.Array
    inputs: tuple[int, ...] = static()
    outputs: tuple[int, ...] = static()
    batch: tuple[int, ...] = static()
    scale: float = static()
    dropout: float = static()
    base: Fingerprint = static()
    use: str = static(default="")
    window: tuple[int, ...] = static(default=())
    groups: int = static(default=1)
    dilated: bool = static(default=False)
    only: str = static(default="")

    @property
    def rank(self) -> int:
        """The number of columns of ``a``."""
        return self.a.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf this adapts, from the factors."""
        n = len(self.batch)
        for name, x, ndim in (("a", self.a, n + len(self.inputs) + 1), ("b", self.b, n + 1 + len(self.outputs))):
            if len(getattr(x, "shape", ())) != ndim:
                got = counted(x.ndim, "axis") if hasattr(x, "ndim") else type(x).__name__
                raise ValueError(
                    f"The factor {name} of an adapter must have {counted(ndim, 'axis')}.\n  got: {got}\n"
                    "  Several adapters in one tree go through vmap: jax.vmap(apply, (None, 0, None))(params, stacked, x)."
                )
        sizes = dict(zip((*self.batch, *self.inputs), self.a.shape[:-1], strict=True))
        sizes |= dict(zip(self.outputs, self.b.shape[n + 1 :], strict=True))
        return tuple(sizes[d] for d in sorted(sizes))

    def axes(self) -> dict[str, tuple[int | None, ...]]:
        """The inputs in ``a``, the outputs in ``b``, the batch axes in both; the rank is no axis of the leaf."""
        return {"a": (*self.batch, *self.inputs, None), "b": (*self.batch, None, *self.outputs)}

    def enter(self, w: jax.Array, branch: Branch, key: jax.Array | None) -> Factored:
        """The leaf ``w`` with this update, factored."""
        parts, labels = [self.a, self.b], [(*self.batch, *self.inputs, RANK), (*self.batch, RANK, *self.outputs)]
        if key is not None and self.dropout > 0:
            sizes = self.a.shape[: len(self.batch)]
            parts.append(jax.random.split(key, sizes) if sizes else key)
            labels.append(self.batch)
        branch = branch._replace(only=self.only)
        whole = Factored(w, tuple(parts), tuple(labels), branch, scale=float(self.scale))
        return whole.map_parts(w, lambda part, ls: (part, ls))

    def delta(self, w: jax.Array | None = None) -> jax.Array:
        """``scale * a @ b`` in the leaf's shape and the factors' dtype, whichever uses have it."""
        del w
        shell = jax.ShapeDtypeStruct(self.shape, self.a.dtype)
        return self.enter(shell, Branch(""), None).update()  # type: ignore[arg-type]  # only the shape is read


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FullWeight(Adapter):
    """A leaf trained outright (a new head, a bias, a norm): it replaces the base's.

    Attributes:
        value: The trained leaf, shape of the base's; at least fp32, for updates smaller than bf16 can hold.
        base: Fingerprint of the tree the adapter was made for.
        use: How the model uses the leaf, as ``Site.kind``; empty if that is not known. It says, with the others, how the leaf lies
            in formats of other libraries; here nothing needs it.
        inputs: As of ``LowRank``, and so are the others; empty of a leaf without a product.
        outputs: See ``inputs``.
        batch: See ``inputs``.
        window: See ``inputs``.
        groups: See ``inputs``.
    """

    kind: ClassVar[str] = "full"
    labels: ClassVar[dict[str, str]] = {"value": "full"}

    value: jax.Array
    base: Fingerprint = static()
    use: str = static(default="")
    inputs: tuple[int, ...] = static(default=())
    outputs: tuple[int, ...] = static(default=())
    batch: tuple[int, ...] = static(default=())
    window: tuple[int, ...] = static(default=())
    groups: int = static(default=1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf."""
        return tuple(self.value.shape)

    def enter(self, w: jax.Array, branch: Branch, key: jax.Array | None) -> jax.Array:
        """The trained leaf in the base's dtype."""
        del branch, key
        return self.value.astype(w.dtype)

    def delta(self, w: jax.Array | None) -> jax.Array:
        """``value - w``."""
        if w is None:
            raise ValueError(
                "The update of a fully trained leaf is its value less the base's.\n  Pass the base: delta(lora, params)."
            )
        return self.value - jnp.asarray(w).astype(self.value.dtype)


KINDS: dict[str, type[Adapter]] = {cls.kind: cls for cls in (LowRank, FullWeight)}


def check_mergeable(lora: Mapping[str, Adapter]) -> None:
    """Raises if the update of a leaf is for one kind of its uses: no value of the leaf has the adapter's effect."""
    for path, x in lora.items():
        if isinstance(x, LowRank) and x.only:
            raise ValueError(
                f"'{shown(path)}' cannot be merged: its adapter is for one kind of use, {x.only}, and the base has one leaf for "
                f"all ({x.use}).\n"
                "  Keep the adapter beside the base (jlora.wrap), or untie the model: give it a leaf for each use."
            )


def is_adapter(x: Any) -> bool:
    """Whether ``x`` is an adapter node."""
    return isinstance(x, Adapter)


def fingerprint(paths: Any, leaves: Any) -> Fingerprint:
    """The fingerprint of a tree given as paths and leaves (arrays or ``ShapeDtypeStruct``s)."""
    return Fingerprint((p, np.shape(x), lax.dtype(x)) for p, x in zip(paths, leaves, strict=True))
