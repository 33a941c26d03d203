"""Reading a PEFT adapter: every tensor of the file is used exactly once, and belongs where it goes, or the call fails.

First the names and shapes of the header are matched with the leaves of the base; only then are tensors read.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora import _files, _layouts, _paths, _peft_config
from jlora._advice import Advised
from jlora._layouts import Axes, Layer
from jlora._names import ByName, Leaf, Names, Place, places
from jlora._peft_config import Config
from jlora._sites import Site, Sites

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."

MAX_RANK = 1024  # or the larger side of the weight: more is no adapter

_ROLES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "b_bias",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".token_adapter.trainable_tokens_delta": "tokens",
    ".base_layer.weight": "weight",
    ".base_layer.bias": "bias",
}


class Part(NamedTuple):
    """What one tensor of the file is: the module it belongs to, how many wrappers are inside it, and its role there."""

    module: str
    depth: int
    role: str


class Pair(NamedTuple):
    """Factors of one weight: where it is, what PEFT wraps it as, the keys of its tensors by role, its rank and scale."""

    place: Place
    layer: Layer
    axes: Axes
    keys: Mapping[str, str]
    rank: int
    scale: float
    swapped: bool


def part_of(key: str) -> Part:
    """Reads a key of the file."""
    if not key.startswith(PREFIX):
        raise ValueError(
            f"The tensor '{_files.shown(key)}' does not begin with '{PREFIX}': it is not part of an adapter."
        )
    name = key.removeprefix(PREFIX)
    if name.endswith(".lora_magnitude_vector"):
        raise ValueError(f"The adapter has DoRA's magnitudes ('{_files.shown(key)}'), which jlora does not have.")
    for suffix, role in _ROLES.items():
        if name.endswith(suffix):
            module = name.removesuffix(suffix)
            bare = module
            while bare.endswith(".base_layer"):
                bare = bare.removesuffix(".base_layer")
            return Part(bare, (len(module) - len(bare)) // len(".base_layer"), role)
    if ".lora_" in name or ".token_adapter." in name:
        raise ValueError(f"The tensor '{_files.shown(key)}' is of a kind that jlora does not know.")
    module, _, last = name.rpartition(".")
    return Part(module, 0, last)


class Reader:
    """One adapter on its way from a file into a base.

    Args:
        folder: Of the adapter.
        sites: Of the base.
        names: See ``jlora.peft.load``.
        params: Values of the base by path, where they are known.
        alone: Whether the sites are what the adapter itself told of its base.
    """

    def __init__(self, folder: Path, sites: Sites, names: Names, params: Mapping[str, Any], *, alone: bool = False):
        self.config: Config = _peft_config.read(folder)
        self.tensors = open_tensors(folder)
        self.params, self.sites, self.alone = params, sites, alone
        self.leaves: dict[str, Site] = {**sites, **sites.skipped}
        named = [Leaf(path, shape, _batch(self.leaves[path])) for path, shape, _ in sites.base.leaves]
        self.places = places(named, names)
        self.by_name = ByName(self.places)
        self.parts = {key: part_of(key) for key in self.tensors.header}
        self.lost = [key for key, part in self.parts.items() if not self.is_known(part)]

    def is_known(self, part: Part) -> bool:
        """Whether the base has the weight that a tensor is for."""
        last = part.role if part.role in ("bias",) else "weight"
        if part.role in ("a", "b"):
            return f"{part.module}.weight" in self.by_name or bool(self.parameters(part.module))
        if part.role == "b_bias":
            return f"{part.module}.bias" in self.by_name
        return f"{part.module}.{last if part.role in ('tokens', 'weight') else part.role}" in self.by_name

    def parameters(self, module: str) -> list[str]:
        """The names of the parameters of a module that PEFT wraps one by one: experts, and what is not named weight."""
        return [
            name
            for name in self.by_name
            if name.rpartition(".")[0] == module
            and self.by_name[name].path in self.sites
            and self.layer(self.by_name[name]) == "parameter"
        ]

    def axes(self, place: Place) -> Axes:
        """The axes of the slice at a place."""
        return _layouts.axes_of(self.leaves[place.path]).at(place.at)

    def layer(self, place: Place) -> Layer:
        """As what PEFT wraps the weight there."""
        return _layouts.layer_of(self.axes(place), place)

    # --- Factors ---

    def pairs(self) -> list[Pair]:
        """All factors, with everything checked that the header tells."""
        keys: dict[tuple[str, int], dict[str, str]] = defaultdict(dict)
        for key, part in self.parts.items():
            if part.role in ("a", "b", "b_bias") and key not in self.lost:
                keys[part.module, part.depth][part.role] = key
        found = []
        for (module, depth), roles in keys.items():
            lacking = {"a", "b"} - set(roles)
            if lacking:
                there = next(iter(roles.values()))
                raise ValueError(
                    f"The adapter is incomplete: '{_files.shown(there)}' has no lora_{lacking.pop().upper()}."
                )
            found.append(self.pair(module, depth, roles))
        return found

    def pair(self, module: str, depth: int, roles: Mapping[str, str]) -> Pair:
        """The factors of one module."""
        a, b = (self.tensors.header[roles[role]].shape for role in ("a", "b"))
        if f"{module}.weight" in self.by_name and not self.parameters(module):
            place, key = self.by_name[f"{module}.weight"], module
        else:
            place = self.nested(module, depth)
            key = place.weight.name
        site = self.leaves[place.path]
        if site.reason and not site.uses and site.kind != "unused":  # no function was asked how it is used
            raise Advised(
                f"'{place.path}', for '{_files.shown(module)}', cannot be adapted: {site.reason}.",
                "Pass what tells: load(folder, jlora.sites(fn, params, x)).",
                "sites",
            )
        if site.reason and place.path not in self.sites:
            raise ValueError(f"'{place.path}', for '{_files.shown(module)}', cannot be adapted: {site.reason}.")
        layer, axes = self.layer(place), self.axes(place)
        if ("lora_embedding" in roles["a"]) != (layer == "embedding"):
            raise ValueError(
                f"'{_files.shown(roles['a'])}' is not what PEFT has for '{place.path}', which is used as {axes.use}."
            )
        if axes.groups != 1:
            raise ValueError(
                f"'{place.path}' is a convolution in groups, or transposed, where PEFT's factors are another shape.\n"
                "  Merge the adapter into its base with PEFT, and extract one."
            )
        count = axes.experts if layer == "parameter" else 1
        rank = (a[0] if a else 0) // max(count, 1)
        swapped = layer == "parameter" and self.is_swapped(place, axes, rank, (a, b))
        turned = _layouts.turned(axes) if swapped else axes
        wanted = _layouts.factor_shapes(turned, layer, rank)
        flat = all(_without_ones(x) == _without_ones(w) for x, w in zip((a, b), wanted, strict=True))
        if not rank or not flat or rank > max(MAX_RANK, *axes.sizes):
            raise ValueError(
                f"The factors of '{_files.shown(module)}' do not fit '{place.path}' {axes.shape}.\n"
                f"  got: {a} and {b}; needed for rank r: {_spelled(_layouts.factor_shapes(turned, layer, 1), axes, layer)}"
            )
        return Pair(place, layer, axes, roles, rank, self.config.scale(key, rank), swapped)

    def nested(self, module: str, depth: int) -> Place:
        """Which parameter of a module the factors inside ``depth`` wrappers are for."""
        names = self.parameters(module)
        there = sorted({p.depth for p in self.parts.values() if p.module == module and p.role == "a"})
        if there != list(range(len(there))):
            raise ValueError(f"The adapter is incomplete: '{_files.shown(module)}' has wrappers {there}.")
        if len(names) == 1:
            return self.by_name[names[0]]
        order = [self.by_name[name] for name in names]
        wanted = self.config_parameters(module, names)
        order = [place for place in order if place.weight.name in wanted] if wanted else order
        if len(order) != len(there) or (any(place.weight.nesting is None for place in order) and len(order) > 1):
            raise Advised(
                f"The adapter has factors for {len(there)} of the parameters {', '.join(names)}, and does not name them.",
                "Say in names which the module registers first: Weight(name, nesting=0), Weight(name, nesting=1).",
                "names",
                {place.path: {"name": place.weight.name, "nesting": i} for i, place in enumerate(order)},
            )
        order.sort(key=lambda place: -(place.weight.nesting or 0))
        return order[depth]

    def config_parameters(self, module: str, names: Iterable[str]) -> list[str]:
        """Those of a module's parameters that the configuration lists."""
        return [n for n in names if self.config.is_parameter(n)]

    def is_swapped(self, place: Place, axes: Axes, rank: int, shapes: Any) -> bool:
        """Whether A runs along the outputs: PEFT took the last axis of experts for the inputs since 0.19, the middle one before."""
        straight, across = (
            _layouts.factor_shapes(x, "parameter", rank) == shapes for x in (axes, _layouts.turned(axes))
        )
        if straight != across:
            return across
        if axes.batch and self.alone:
            raise ValueError(
                f"The slices of '{place.path}' {axes.shape} are square: which way the factors lie depends on the module (is_transposed), "
                "and on PEFT's version, and is not in the file.\n"
                "  Merge it with PEFT, or load it with its base: jlora.peft.load(folder, sites, names=...), and jlora.export.save."
            )
        if axes.batch and (place.weight.layout is None or not self.config.version):
            raise Advised(
                f"'{place.path}' is square: whether it is (experts, out, in) or (experts, in, out) in PyTorch is not in the file.",
                "Say so in names: Weight(name, layout='out_in').",
                "names",
                {place.path: {"name": "...", "layout": "out_in"}},
            )
        return _layouts.is_across(axes, place.weight, old=self.config.version < (0, 19))

    # --- The whole ---

    def check_all_there(self, pairs: list[Pair]) -> None:
        """Raises if tensors are left over or missing."""
        if self.lost:
            near = _paths.nearest(self.parts[self.lost[0]].module, {n.rpartition(".")[0] for n in self.by_name}, 2)
            raise Advised(
                f"{len(self.lost)} tensors of the adapter are for nothing in the base: {_listed(self.lost)}.\n"
                f"  nearest to the first: {', '.join(near)}",
                "If the base has other names, pass names={path: name of the PyTorch parameter}.",
                "names",
            )
        have = {pair.place.weight.name for pair in pairs}
        begun = {(pair.place.path, pair.place.at) for pair in pairs}
        missing = [
            place.weight.name
            for path, several in self.places.items()
            for place in several
            if place.weight.name not in have and ((path, place.at) in begun or self.is_target(place))
        ]
        if missing:
            raise ValueError(
                f"The adapter lacks factors for {len(missing)} weights: {_listed(missing)}.\n"
                "  The file was cut, or the base shares a weight that PEFT has twice (a tied head)."
            )

    def is_target(self, place: Place) -> bool:
        """Whether the configuration says that a weight is adapted."""
        module = place.weight.module
        if self.is_saved(module):
            return False
        if place.path not in self.sites or self.config.partial or not place.weight.name.endswith(".weight"):
            return False
        return any(module == t or module.endswith(f".{t}") for t in self.config.targets)

    def is_saved(self, module: str) -> bool:
        """Whether the configuration says that a module, or one that it is in, is saved whole; PEFT compares the ends of names."""
        parts = module.split(".")
        around = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        return any(name.endswith(m) for name in around for m in self.config.saved)

    def read(self, key: str) -> np.ndarray:
        """One tensor."""
        return _files.check_finite(_files.shown(key), self.tensors.read(key))

    def factors(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        """The factors of a slice in the leaf's layout."""
        x, y = (self.read(pair.keys[role]) for role in ("a", "b"))
        if pair.swapped:
            a, b = _layouts.factors_from_peft(x, y, _layouts.turned(pair.axes), pair.layer)
            return _layouts.turned_factors(a, b, len(pair.axes.batch))
        y = _layouts.rotate(y, pair.place.weight.rotary_heads, back=True)
        return _layouts.factors_from_peft(x, y, pair.axes, pair.layer)


def open_tensors(folder: Path) -> _files.Safetensors:
    """The checked file of an adapter's tensors."""
    file = folder / TENSORS
    if not file.exists():
        pickled = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).exists()]
        hint = (
            f"\n  {pickled[0]} is a pickle, which can run anything and is never read: save it again with PEFT, which writes safetensors."
            if pickled
            else ""
        )
        raise FileNotFoundError(f"There is no PEFT adapter at {folder}: it has no {TENSORS}.{hint}")
    return _files.Safetensors(file)


def _batch(site: Site) -> tuple[int, ...] | None:
    return None if site.is_plain else tuple(site.shape[d] for d in site.batch)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    head, tail = shape[:2], list(shape[2:])
    return (*head, *(() if all(n == 1 for n in tail) else tail))


def _spelled(shapes: tuple[tuple[int, ...], tuple[int, ...]], axes: Axes, layer: Layer) -> str:
    times = f"{axes.experts}·r" if layer == "parameter" and axes.experts > 1 else "r"
    a = ", ".join([times, *map(str, shapes[0][1:])])
    b = ", ".join([str(shapes[1][0]), times, *map(str, shapes[1][2:])])
    return f"({a}) and ({b})"


def _listed(keys: Iterable[str]) -> str:
    return _paths.listing([_files.shown(key) for key in keys], 5)
