"""Where a leaf of a parameter tree is found in a PyTorch model: its name there, and how its axes lie.

The names of a ported model are a table that its author knows. A name may stand for many weights: of a leaf that is scanned over layers,
each ``{}`` in it is an index along one of the leaf's leading batch axes.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from jlora import _paths
from jlora._advice import Advised
from jlora._text import counted, shown

_STACKS = re.compile(r"layers?|blocks?|h")
_NUMBERED = re.compile(r"(?<![^/])(layers?|blocks?|h|experts?)_(\d+)(?![^/])")
_LAST = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


@dataclass(frozen=True)
class Weight:
    """A parameter of a PyTorch model.

    Attributes:
        name: As in its ``state_dict``, such as ``model.layers.{}.mlp.up_proj.weight``; each ``{}`` is an index along a batch axis.
        layout: ``"out_in"`` as in ``nn.Linear``, or ``"in_out"`` as in GPT-2's ``Conv1D``. Needed only where a square matrix does not
            tell: to write a whole weight (by default ``"out_in"``), and for square experts.
        rotary_heads: Number of heads, if the leaf has rotary pairs side by side ``(x0, x1), (x2, x3), ...`` and the PyTorch weight
            ``(x0, x[d/2]), ...``: then the outputs of each head are exchanged.
        is_transposed: Of experts that are ``"in_out"``: whether their module has this attribute, which PEFT asks since 0.19.
        nesting: Says that PEFT adapts the parameter itself (``target_parameters``), not its module, and where several of a module are:
            the place of this one among them, from 0, in the order in which the module registers them. PEFT's keys do not name it.
        transposed: Of ``nn.ConvTranspose1d`` to ``3d``, whose weight is (in, out, window): ``"reversed"`` if its window runs the other way
            than the leaf's, as that of Flax's ``ConvTranspose`` does; ``"as_is"`` if it is the same, as with ``transpose_kernel=True``.
    """

    name: str
    layout: Literal["out_in", "in_out"] | None = None
    rotary_heads: int | None = None
    nesting: int | None = None
    is_transposed: bool = False
    transposed: Literal["reversed", "as_is"] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or "/" in self.name:
            raise ValueError(
                f"The name of a PyTorch parameter is its keys joined by dots, as in its state_dict.\n  got: {self.name!r}"
            )
        if self.name.startswith("base_model."):
            raise ValueError(
                f"The name of a PyTorch parameter is that of the base, without PEFT's 'base_model.model.'.\n  got: {self.name!r}"
            )
        if self.layout not in (None, "out_in", "in_out"):
            raise ValueError(f"Weight(layout=...) must be 'out_in' or 'in_out'.\n  got: {self.layout!r}")
        if self.rotary_heads is not None and not (type(self.rotary_heads) is int and self.rotary_heads > 0):
            raise ValueError(
                f"Weight(rotary_heads=...) must be the number of heads, 1 or more; where nothing is rotated leave it out.\n"
                f"  got: {self.rotary_heads!r}"
            )
        if self.transposed not in (None, "reversed", "as_is"):
            raise ValueError(f"Weight(transposed=...) must be 'reversed' or 'as_is'.\n  got: {self.transposed!r}")

    @property
    def module(self) -> str:
        """The module that PEFT would wrap: the parameter itself is named ``weight``, or is a parameter of this module."""
        return self.name.rpartition(".")[0]


Named = str | Weight | Sequence[str | Weight] | None
Names = Mapping[str, Named] | Callable[[str], Named] | None


class Place(NamedTuple):
    """One weight of the PyTorch model that a leaf, or a slice of it, is.

    Attributes:
        path: Of the leaf.
        at: Index of the slice, along the leaf's leading batch axes.
        weight: Without ``{}``.
        first: Whether this is the first of the leaf's names. The others share it in PyTorch, where files hold it once.
    """

    path: str
    at: tuple[int, ...]
    weight: Weight
    first: bool


class Leaf(NamedTuple):
    """What naming has to know of a leaf: its path, its shape, and the sizes of its batch axes if a product told them."""

    path: str
    shape: tuple[int, ...]
    batch: tuple[int, ...] | None


def places(leaves: Iterable[Leaf], names: Names = None) -> dict[str, list[Place]]:
    """The places of each leaf, by path.

    Raises:
        ValueError: a path of ``names`` matches no leaf; a name has more ``{}`` than its leaf has batch axes.
    """
    leaves = list(leaves)
    table = _table(names)
    unused = set(table) if table is not None else set()
    found = {
        leaf.path: [
            place
            for i, weight in enumerate(_named(leaf, names, table, unused))
            for place in _expand(leaf, weight, i == 0)
        ]
        for leaf in leaves
    }
    if unused:
        path = sorted(unused)[0]
        near = ", ".join(_paths.nearest(path, [leaf.path for leaf in leaves]))
        raise ValueError(f"No leaf has the path {path!r} of names.\n  nearest: {near}")
    return found


def check_named(adapted: Iterable[str], found: Mapping[str, list[Place]]) -> None:
    """Raises if a leaf that is adapted has no place: it would be left out."""
    for path in adapted:
        if path in found and not found[path]:
            raise Advised(
                f"'{shown(path)}' is adapted, but names gives it no name: its adapter would be lost.",
                "Give it one with names=..., or take it out of the adapter.",
                "names",
            )


class ByName:
    """Places by the name of their weight. Two leaves may share a name as long as nobody asks for it."""

    def __init__(self, found: Mapping[str, list[Place]]):
        self._places: dict[str, list[Place]] = {}
        for place in (place for several in found.values() for place in several):
            self._places.setdefault(place.weight.name, []).append(place)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, name: str) -> Place:
        first, *others = self._places[name]
        if others:
            other = (
                f"'{first.path}' and '{others[0].path}'" if first.path != others[0].path else f"'{first.path}' twice"
            )
            raise Advised(
                f"'{shown(name)}' is the name of {shown(other)}.", "Give each its own with names=...", "names"
            )
        return first


def default_name(path: str, batch: Sequence[int] | None = None, ndim: int = 0) -> str:
    """The name that a Flax tree ported from PyTorch suggests.

    ``/`` becomes ``.``; ``params`` at the front goes; ``kernel``, ``embedding`` and ``scale`` become ``weight``; ``layers_3`` becomes
    ``layers.3``; and a stack of layers gets its index, ``layers.{}``.

    Example:
        >>> default_name("params/model/layers_3/mlp/up_proj/kernel")
        'model.layers.3.mlp.up_proj.weight'
        >>> default_name("params/model/layers/mlp/up_proj/kernel", batch=(32,))
        'model.layers.{}.mlp.up_proj.weight'
    """
    parts = _NUMBERED.sub(r"\1/\2", path).split("/")
    parts = parts[1:] if parts[0] == "params" and len(parts) > 1 else parts
    parts[-1] = _LAST.get(parts[-1], parts[-1])
    stacked = bool(batch) if batch is not None else ndim > 1
    if stacked:
        stack = next((i for i, part in enumerate(parts[:-1]) if _STACKS.fullmatch(part)), None)
        if stack is not None and not parts[stack + 1].isdigit():
            parts.insert(stack + 1, "{}")
    return ".".join(parts)


def _table(names: Names) -> Mapping[str, Named] | None:
    if names is None or callable(names):
        return None
    if not isinstance(names, Mapping):
        raise TypeError(
            "names must be a dict from paths (or patterns that match whole paths) to names, or a function of a path.\n"
            f"  got: {type(names).__name__}"
        )
    for pattern in names:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"The path {pattern!r} of names is not a regular expression: {error}.") from None
    return names


def _named(leaf: Leaf, names: Names, table: Mapping[str, Named] | None, unused: set[str]) -> list[Weight]:
    default = default_name(leaf.path, leaf.batch, len(leaf.shape))
    named: Any = default
    if callable(names):
        named = names(leaf.path)
    elif table is not None:
        for pattern, value in table.items():
            match = _paths.match(pattern, leaf.path)
            if match or pattern == leaf.path:
                unused.discard(pattern)
                named = _filled(value, match)
                break
    several = () if named is None else [named] if isinstance(named, str | Weight) else named
    if not isinstance(several, Sequence):
        raise TypeError(
            f"The name of '{shown(leaf.path)}' must be a string, a Weight, or several; or None, if it has none.\n  got: {named!r}"
        )
    return [Weight(w) if isinstance(w, str) else w for w in several]


def _filled(named: Named, match: re.Match[str] | None) -> Named:
    r"""``named`` with what the pattern's groups matched in place of ``\1`` and ``\g<name>``."""
    if match is None:
        return named
    try:
        if isinstance(named, str):
            return match.expand(named)
        if isinstance(named, Weight):
            return replace(named, name=match.expand(named.name))
    except (re.error, IndexError) as error:
        raise ValueError(f"The name {named!r} does not fit its pattern {match.re.pattern!r}: {error}.") from None
    return [_filled(n, match) for n in named] if isinstance(named, Sequence) else named  # type: ignore[misc]


def _expand(leaf: Leaf, weight: Weight, first: bool) -> Iterable[Place]:
    holes = weight.name.count("{}")
    sizes = leaf.batch if leaf.batch is not None else leaf.shape[:holes]
    if holes > len(sizes):
        raise ValueError(
            f"The name '{shown(weight.name)}' has {counted(holes, 'index')}, but "
            f"'{shown(leaf.path)}' {leaf.shape} has {counted(len(sizes), 'batch axis')}."
        )
    for index in itertools.product(*map(range, sizes[:holes])):
        name = weight.name
        for i in index:
            name = name.replace("{}", str(i), 1)
        yield Place(leaf.path, index, replace(weight, name=name), first)
