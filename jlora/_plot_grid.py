"""Where a leaf is drawn: its layer and its kind, read off the paths of all leaves."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import log2, prod
from typing import Any, NamedTuple

import numpy as np

from jlora._adapters import Adapter, LowRank

Lora = Mapping[str, Adapter]
LONG = 26  # characters of a name
GAP = 0.5  # columns between the one without a layer and the first with

NUMBER = re.compile(r"(?:(.+)[_-]|(.*(?:layer|block)s?))?(\d+)", re.IGNORECASE | re.DOTALL)
LAYER = re.compile(r"(?!.*norm).*(layer|block).*|h", re.IGNORECASE | re.DOTALL)
EXPERT = re.compile(r".*expert.*", re.IGNORECASE | re.DOTALL)
PARAMETER = re.compile(
    r"kernel|weight|embedding|scale|bias|[wb]", re.IGNORECASE | re.DOTALL
)  # tells nothing without its module


class _Path(NamedTuple):
    """A path, and the numbers in it."""

    parts: list[str]
    at: list[int]  # the parts that have a number
    values: list[int]
    names: list[str]  # what each of them counts

    def kind(self, *but: int | None) -> str:
        """The path without the numbers that are named, by their place among numbers."""
        stars = {self.at[i]: self.parts[self.at[i]].rstrip("0123456789") + "*" for i in but if i is not None}
        return "/".join(stars.get(i, part) for i, part in enumerate(self.parts))

    def first(self, pattern: re.Pattern[str], but: int | None = None) -> int | None:
        """The first number that counts what the pattern names."""
        return next((i for i, name in enumerate(self.names) if i != but and pattern.fullmatch(name)), None)


def _read(path: str) -> _Path:
    parts = re.split(r"[/.]", path)
    found = [(i, m) for i, part in enumerate(parts) if (m := NUMBER.fullmatch(part))]
    names = [m[1] or m[2] or (parts[i - 1] if i else "") for i, m in found]
    return _Path(parts, [i for i, _ in found], [int(m[3]) for _, m in found], names)


def all_masked(shape: tuple[int, ...]) -> Any:
    """Cells without a value, with zeros behind the mask: Matplotlib computes with those, and whatever memory holds may overflow."""
    return np.ma.array(np.zeros(shape), mask=True)


class Grid(NamedTuple):
    """The cells of a heat map: columns are layers, rows are the parts of kinds (one, or one for each expert)."""

    kinds: dict[str, int]  # name -> parts
    columns: list[int | None]
    where: dict[
        str, tuple[np.ndarray, np.ndarray]
    ]  # path -> rows and columns of its slices; of leaves not adapted, too
    by_batch: bool  # layers are slices of leaves

    def fill(self, values: Mapping[str, np.ndarray]) -> tuple[Any, np.ndarray]:
        """The cells' values, masked where there are none, and where there is a leaf without one."""
        shape = (sum(self.kinds.values()), len(self.columns))
        out = all_masked(shape)
        leaf = np.zeros(shape, bool)
        for path, (rows, columns) in self.where.items():
            leaf[rows, columns] = True
            if path in values:
                out[rows, columns] = values[path].reshape(-1)
        return out, leaf & np.ma.getmaskarray(out)

    def names(self, path: str) -> list[str]:
        """The kind of each slice."""
        by_row = [name for name, n in self.kinds.items() for _ in range(n)]
        return [by_row[row] for row in self.where[path][0]]

    def layers(self, path: str) -> list[int | None]:
        """The layer of each slice."""
        return [self.columns[i] for i in self.where[path][1]]

    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Where columns and rows begin and end: the column without a layer stands apart, and experts are thin rows."""
        x = np.arange(len(self.columns) + 1.0)
        if self.apart:
            x = np.concatenate([[0.0, 1.0], x[1:] + GAP])
        heights = [min(n, 1 + log2(n)) / n for n in self.kinds.values() for _ in range(n)]
        return x, np.concatenate([[0.0], np.cumsum(heights)])

    @property
    def apart(self) -> bool:
        """Whether there is a column without a layer beside columns with."""
        return self.columns[0] is None and len(self.columns) > 1

    @property
    def roomy(self) -> bool:
        """Whether values can be written into cells."""
        return len(self.columns) <= 8 and set(self.kinds.values()) == {1} and len(self.kinds) <= 16

    def size(self) -> tuple[float, float, float]:
        """Inches that the cells need, and the names of kinds beside them."""
        x, y = self.edges()
        cell = 0.55 if self.roomy else min(0.2, 8.0 / x[-1])
        return max(1.5, cell * x[-1]), max(1.3, min(0.22 * y[-1], 12.0)), 0.068 * max(map(len, self.kinds)) + 0.25


class _Leaf(NamedTuple):
    """A leaf to draw, adapted or not."""

    path: _Path
    template: str  # the path without any number
    sizes: list[int]  # of its batch axes


class _Cells(NamedTuple):
    """Where the slices of a leaf are drawn."""

    kind: str
    layers: list[int | None]
    parts: list[int]


def grid_of(lora: Lora) -> Grid:
    """Finds layer, kind and part of each leaf of ``lora``, and of the leaves of its base that are of the same kinds."""
    cells, by_batch = _cells(_leaves(lora))
    adapted = dict.fromkeys(cells[path].kind for path in lora)
    cells = {path: cell for path, cell in cells.items() if cell.kind in adapted}
    single = {cell.kind: set(cell.layers) == {None} for cell in cells.values()}
    kinds = sorted(adapted, key=lambda kind: single[kind])
    parts = [max(1 + max(cell.parts, default=0) for cell in cells.values() if cell.kind == kind) for kind in kinds]
    starts = dict(zip(kinds, np.cumsum([0, *parts]).tolist(), strict=False))
    columns = sorted({i for cell in cells.values() for i in cell.layers}, key=lambda i: -1 if i is None else i)
    place = {layer: i for i, layer in enumerate(columns)}
    where = {
        path: (np.array(cell.parts, int) + starts[cell.kind], np.array([place[i] for i in cell.layers], int))
        for path, cell in cells.items()
    }
    return Grid(dict(zip(_short(kinds, single), parts, strict=True)), columns, where, by_batch)


def _leaves(lora: Lora) -> dict[str, _Leaf]:
    """The leaves of ``lora``, then those of its base that differ from one of them by numbers only."""
    leaves: dict[str, _Leaf] = {}
    axes: dict[str, tuple[int, ...]] = {}
    for path, x in lora.items():
        p = _read(path)
        batch = x.batch if isinstance(x, LowRank) else ()
        leaves[path] = _Leaf(p, p.kind(*range(len(p.at))), [x.shape[d] for d in batch])
        axes[leaves[path].template] = batch or axes.get(leaves[path].template, ())
    for path, shape, _ in next(iter(lora.values())).base.leaves:
        p = _read(path)
        template = p.kind(*range(len(p.at)))
        if path not in lora and template in axes and len(shape) > max(axes[template], default=-1):
            leaves[path] = _Leaf(p, template, [shape[d] for d in axes[template]])
    return leaves


def _cells(leaves: Mapping[str, _Leaf]) -> tuple[dict[str, _Cells], bool]:
    """Where each leaf is drawn, and whether layers are slices of leaves."""
    alike: dict[str, list[_Leaf]] = defaultdict(list)
    for leaf in leaves.values():
        alike[leaf.template].append(leaf)
    at = {template: same[0].path.first(LAYER) for template, same in alike.items()}
    batched = {template: same[0] for template, same in alike.items() if at[template] is None and same[0].sizes}
    # The one batch axis of experts is no stack of layers, unless they are part of one.
    stacked = {template for template, leaf in batched.items() if len(leaf.sizes) > bool(EXPERT.search(template))}
    stacks = [batched[template] for template in stacked]
    stacked |= {name for name in batched.keys() - stacked if any(_is_part(batched[name], stack) for stack in stacks)}
    if not stacked:  # beside a stack of layers, a number that differs tells weights of one layer apart
        at = {template: _differs(alike[template]) if i is None else i for template, i in at.items()}
    cells = {}
    for name, (path, template, sizes) in leaves.items():
        i = at[template]
        expert = path.first(EXPERT, but=i)
        layers: list[int | None] = [None if i is None else path.values[i]]
        if template in stacked and sizes:
            layers, sizes = list(range(sizes[0])), sizes[1:]
        n = prod(sizes)
        first = 0 if expert is None else n * path.values[expert]
        cells[name] = _Cells(
            path.kind(i, expert),
            [layer for layer in layers for _ in range(n)],
            [*range(first, first + n)] * len(layers),
        )
    return cells, bool(stacked)


def _is_part(experts: _Leaf, stack: _Leaf) -> bool:
    """Whether experts are in the same stack of layers as another leaf: what holds them holds that, too, in as many slices."""
    parts = experts.path.parts
    home = parts[: next(i for i, part in enumerate(parts) if EXPERT.fullmatch(part))]
    return bool(home) and stack.path.parts[: len(home)] == home and stack.sizes[0] == experts.sizes[0]


def _differs(leaves: Sequence[_Leaf]) -> int | None:
    """The first number in which leaves differ that differ by numbers only."""
    columns = zip(*(leaf.path.values for leaf in leaves), strict=True)
    return next((i for i, values in enumerate(columns) if len(set(values)) > 1), None)


def _short(kinds: Sequence[str], single: Mapping[str, bool]) -> list[str]:
    """Names for the kinds: without what all of those with layers (or without) have in common, and without the layer itself."""
    names: dict[str, str] = {}
    for group in ([k for k in kinds if not single[k]], [k for k in kinds if single[k]]):
        split = [k.split("/") for k in group]
        bare = [_uncounted(parts) or parts for parts in split]
        if len({tuple(parts) for parts in bare}) == len(split):
            split = bare
        common = set.intersection(*map(set, split)) if len(split) > 1 else set(split[0][:-2]) if split else set()
        bare = [_without(parts, common) for parts in split]
        if len({tuple(parts) for parts in bare}) == len(split):
            split = bare
        names |= {kind: "/".join(parts) for kind, parts in zip(group, split, strict=True)}
    times = Counter(names.values())
    names = {kind: name if times[name] == 1 else kind for kind, name in names.items()}
    return all_cut([names[kind] for kind in kinds], LONG)


def _without(parts: Sequence[str], common: set[str]) -> list[str]:
    """The parts that are not in common. Where only names of parameters are left, ``kernel``, they keep the module that has them."""
    kept = [i for i, part in enumerate(parts) if part not in common] or [len(parts) - 1]
    if all(PARAMETER.fullmatch(parts[i]) for i in kept):
        kept = [*[i for i in range(kept[0]) if not PARAMETER.fullmatch(parts[i])][-1:], *kept]
    return [parts[i] for i in kept]


def _uncounted(parts: Sequence[str]) -> list[str]:
    """The parts of a kind without those that only count layers, ``layers`` and ``*`` or ``blocks_*``; others keep their name."""
    out = []
    for part, after in zip(parts, [*parts[1:], ""], strict=True):
        name = part.rstrip("*").rstrip("_-")
        counts = "*" in part or after == "*"
        if name and not (counts and LAYER.fullmatch(name) and not EXPERT.fullmatch(name)):
            out.append(name)
    return out


def all_cut(names: Sequence[str], length: int) -> list[str]:
    """The names without their first parts, where they are too long, since the last ones say more; whole if that is not unique."""
    cut = []
    for name in names:
        parts = name.split("/")
        while len(parts) > 1 and len(name) > length:
            parts = parts[1:]
            name = "/".join(["…", *parts])
        cut.append(name if len(name) <= length else f"…{name[1 - length :]}")
    return cut if len(set(cut)) == len(cut) else list(names)
