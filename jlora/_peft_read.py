"""Reading a PEFT adapter: every tensor of the file is used exactly once, and belongs where it goes, or the call fails.

First the names and shapes of the header are matched with the leaves of the base; only then are tensors read.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora import _files, _layouts, _paths, _peft_config
from jlora._advice import Advised
from jlora._layouts import Axes, Layer
from jlora._names import ByName, Leaf, Names, Place, Weight, places
from jlora._peft_config import Config
from jlora._peft_declared import IN_PROJ, OUT_PROJ, Base, Declared
from jlora._peft_files import Files
from jlora._peft_keys import (
    BIASES,
    FACTORS,
    PREFIX,
    SOME,
    TRAINED,
    Part,
    check_once,
    containing,
    copies_of,
    joined,
    parts_of,
    path_of,
    wrappers_of,
)
from jlora._sites import Site, Sites
from jlora._text import counted, shown

SHARED = "shared"  # of the encoder-decoders of transformers (T5, BART), which look up through modules of their own
MAX_RANK = 1024  # or the larger side of the weight: more is no adapter


class Pair(NamedTuple):
    """Factors of one weight: where it is, what PEFT wraps it as, the keys of its tensors by role, its rank and scale."""

    place: Place
    layer: Layer
    axes: Axes
    keys: Mapping[str, str]
    rank: int
    scale: float
    swapped: bool


class Reader:
    """One adapter on its way from a file into a base.

    Args:
        files: Of the adapter.
        sites: Of the base.
        names: See ``jlora.peft.load``.
        params: Values of the base by path, where they are known.
        alone: Whether the sites are what the adapter itself told of its base.
        without: Keys of the file to leave out.
    """

    def __init__(
        self,
        files: Files,
        sites: Sites,
        names: Names,
        params: Mapping[str, Any],
        *,
        alone: bool = False,
        without: Collection[str] = (),
    ):
        self.config, self.tensors = files.config, files.tensors
        self.params, self.sites, self.alone = params, sites, alone
        self.leaves: dict[str, Site] = {**sites, **sites.skipped}
        named = [Leaf(path, shape, _batch(self.leaves[path])) for path, shape, _ in sites.base.leaves]
        self.places = places(named, names)
        self.by_name = ByName(self.places)
        self.own: dict[str, list[str]] = defaultdict(list)  # the names in each module
        for name in self.by_name:
            self.own[name.rpartition(".")[0]].append(name)
        modules = {module for name in self.by_name for module in containing(name)}
        keys = [key for key in self.tensors.header if key not in without]
        self.copies = copies_of(keys, self.config.saved, modules)
        self.parts = parts_of(keys, self.config.saved, modules)
        check_once(self.parts)
        self.wrappers = wrappers_of(self.parts.values())
        self.lost = [key for key, part in self.parts.items() if not self.is_known(part)]
        self.declared = declared_of(self.config, self.tensors, modules)

    def is_known(self, part: Part) -> bool:
        """Whether the base has the weight that a tensor is for."""
        if part.role in ("a", "b"):
            return bool(self.adapted(part.module))
        return (f"{part.module}.bias" if part.role == "b_bias" else part.name) in self.by_name

    def adapted(self, module: str) -> list[str]:
        """The names of what a module's factors may be for.

        Parameters that the configuration lists, each with a wrapper of its own; or what PEFT adapts if the module is the target: its
        weight, or the input projection of ``nn.MultiheadAttention``.
        """
        own = self.own.get(module, [])
        listed = [name for name in own if self.is_listed(name)]
        whole = [name for name in (f"{module}.weight", f"{module}.{IN_PROJ}") if name in own]
        return listed or whole[:1] or [n for n in own if self.by_name[n].path in self.sites and self.is_parameter(n)]

    def is_parameter(self, name: str) -> bool:
        """Whether a weight is of a kind that PEFT adapts only as a parameter: experts, and what is not named weight."""
        return self.layer(self.by_name[name]) == "parameter"

    def is_listed(self, name: str) -> bool:
        """Whether the configuration says that a parameter itself is adapted."""
        return self.config.is_parameter(name)

    def attention(self, module: str) -> str | None:
        """The ``nn.MultiheadAttention`` of which a module is the output projection, as far as names tell."""
        outer, _, last = module.rpartition(".")
        whole = f"{outer}.{IN_PROJ}"
        if last != OUT_PROJ or whole not in self.by_name or self.by_name[whole].weight.nesting is not None:
            return None
        return outer

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
        place = self.place(module, depth)
        name, outer = place.weight.name, self.attention(module)
        listed = self.is_listed(name)
        site = self.leaves[place.path]
        if site.reason and not site.uses and site.kind != "unused":  # no function was asked how it is used
            raise Advised(
                f"'{shown(place.path)}', for '{_files.shown(module)}', cannot be adapted: {site.reason}.",
                "Pass what tells: load(folder, jlora.sites(fn, params, x)).",
                "sites",
            )
        if site.reason and place.path not in self.sites:
            raise ValueError(f"'{shown(place.path)}', for '{_files.shown(module)}', cannot be adapted: {site.reason}.")
        layer, axes = self.layer(place), self.axes(place)
        layer = "parameter" if listed and layer == "linear" else layer
        if ("lora_embedding" in roles["a"]) != (layer == "embedding"):
            raise ValueError(
                f"'{_files.shown(roles['a'])}' is not what PEFT has for '{shown(place.path)}', which is used as {axes.use}."
            )
        if axes.groups != 1:
            raise ValueError(
                f"'{shown(place.path)}' is a convolution in groups, or transposed, where PEFT's factors are another shape.\n"
                "  Merge the adapter into its base with PEFT, and extract one."
            )
        if axes.dilated:
            raise ValueError(
                f"'{shown(place.path)}' is a dilated convolution, and PEFT computes lora_A without the dilation (up to "
                f"{_peft_config.VERSION}): "
                "what it trained is no update of this weight.\n"
                f"  Train it here, or without '{_files.shown(module)}'; merging it with PEFT gives another function than it trained."
            )
        if layer == "embedding":
            self.check_called(place)
        count = axes.experts if layer == "parameter" else 1
        rank = (a[0] if a else 0) // max(count, 1)
        swapped = layer == "parameter" and self.is_swapped(place, axes, rank, (a, b))
        turned = _layouts.turned(axes) if swapped else axes
        wanted = _layouts.factor_shapes(turned, layer, rank)
        flat = all(_without_ones(x) == _without_ones(w) for x, w in zip((a, b), wanted, strict=True))
        if not rank or not flat or rank > max(MAX_RANK, *axes.sizes):
            raise ValueError(
                f"The factors of '{_files.shown(module)}' do not fit '{shown(place.path)}' {axes.shape}.\n"
                f"  got: {a} and {b}; needed for rank r: {_spelled(_layouts.factor_shapes(turned, layer, 1), axes, layer)}"
            )
        whole = not listed and name.rpartition(".")[2] in ("weight", IN_PROJ)
        key = name if not whole else module if outer is None else outer
        times = 1 if outer is None else self.times(outer, module)
        return Pair(place, layer, axes, roles, rank, times * self.config.scale(key, rank), swapped)

    def check_called(self, place: Place) -> None:
        """Raises for the table of an encoder-decoder of transformers under the name of a module that nothing calls."""
        if is_uncalled(place.weight) and self.config.knows_ties:
            raise ValueError(
                f"The adapter of '{place.weight.module}' has no effect in PEFT: where transformers names a table that, encoder and decoder "
                "look up through\n  modules of their own. Train it here, or with trainable_token_indices, which PEFT keeps tied."
            )

    def times(self, attention: str, module: str) -> int:
        """How many times PEFT adds the update of an output projection of ``nn.MultiheadAttention``."""
        if attention not in self.wrappers or self.is_listed(f"{attention}.{IN_PROJ}"):
            raise ValueError(
                f"The adapter of '{shown(module)}' has no effect in PEFT, as nn.MultiheadAttention never calls it.\n"
                f"  The target was to be '{shown(attention)}'. "
                f"If '{shown(attention)}' is another module, say so in names: Weight('{shown(attention)}.{IN_PROJ}', nesting=0)."
            )
        if self.config.version > _peft_config.ADDS_TWICE:
            version = ".".join(map(str, self.config.version))
            raise ValueError(
                f"PEFT up to {_peft_config.VERSION} adds the update of '{shown(module)}' of nn.MultiheadAttention twice; this file is "
                f"of {version}, which may not.\n  Merge it into its base with PEFT, and extract an adapter."
            )
        return 2

    def place(self, module: str, depth: int) -> Place:
        """What the factors inside ``depth`` wrappers of a module are for: the innermost are for what the module registers first."""
        order = [self.by_name[name] for name in self.adapted(module)]
        nesting = {place.weight.nesting for place in order}
        count = self.wrappers[module]
        if len(order) != count or (count > 1 and (None in nesting or len(nesting) != count)):
            raise Advised(
                f"The adapter has factors for {count} of the parameters {', '.join(self.adapted(module))}, and does not name them.",
                "Say in names which the module registers first: Weight(name, nesting=0), Weight(name, nesting=1).",
                "names",
                {place.path: {"name": place.weight.name, "nesting": i} for i, place in enumerate(order)},
            )
        order.sort(key=lambda place: -(place.weight.nesting or 0))
        return order[depth]

    def is_swapped(self, place: Place, axes: Axes, rank: int, shapes: Any) -> bool:
        """Whether A runs along the outputs: PEFT took the last axis of experts for the inputs since 0.19, the middle one before."""
        straight, across = (
            _layouts.factor_shapes(x, "parameter", rank) == shapes for x in (axes, _layouts.turned(axes))
        )
        if straight != across:
            return across
        if axes.batch and self.alone:
            raise ValueError(
                f"The slices of '{shown(place.path)}' {axes.shape} are square: which way the factors lie depends on the "
                f"module (is_transposed), "
                "and on PEFT's version, and is not in the file.\n"
                "  Merge it with PEFT, or load it with its base: jlora.peft.load(folder, sites, names=...), and jlora.export.save."
            )
        if axes.batch and (place.weight.layout is None or not self.config.version):
            raise Advised(
                f"'{shown(place.path)}' is square: whether it is (experts, out, in) or (experts, in, out) in PyTorch is not in the file.",
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
                f"{counted(len(self.lost), 'tensor')} of the adapter {'is' if len(self.lost) == 1 else 'are'} "
                f"for nothing in the base: {_listed(self.lost)}.\n"
                f"  nearest to the first: {', '.join(near)}{self.shifted()}",
                "If the base has other names, pass names={path: name of the PyTorch parameter}.",
                "names",
            )
        have = {pair.place.weight.name for pair in pairs}
        begun = {(pair.place.path, pair.place.at) for pair in pairs}
        kinds = {(pair.place.path, pair.layer == "embedding") for pair in pairs}
        same = {
            place.weight.name
            for several in self.places.values()
            for place in several
            if (place.path, place.at) in begun and self.goes_along(place, kinds)
        }
        base = None if self.alone else self.base()
        self.declared.check_undeclared(alone=self.alone)
        self.declared.check_factors(self.base(), have, same)
        self.declared.check_missing(base)
        self.check_wrapped()
        self.check_copies()

    def goes_along(self, place: Place, kinds: Collection[tuple[str, bool]]) -> bool:
        """Whether PEFT adapts a weight because it adapts another that is the same leaf: not a head with its table, unless told to tie."""
        if self.config.tying or not self.leaves[place.path].is_tied:
            return True
        return (place.path, self.layer(place) == "embedding") in kinds

    def shifted(self) -> str:
        """In words, which beginning of their names the lost tensors have too much or too little, if that is all."""
        first = self.parts[self.lost[0]].module
        outer = next((m for m in sorted(self.own) if m.endswith(f".{first}")), None)
        inner = next((m for m in sorted(self.own) if m and first.endswith(f".{m}")), None)
        ways = ([("", outer.removesuffix(first))] if outer else []) + (
            [(first.removesuffix(inner), "")] if inner else []
        )
        for old, new in ways:
            moved = (
                part._replace(module=new + part.module.removeprefix(old))
                for part in map(self.parts.get, self.lost)
                if part
            )
            if all(map(self.is_known, moved)):
                how = (
                    f"'{_files.shown(old)}' before their names is too much"
                    if old
                    else f"'{new}' is missing before their names"
                )
                return f"\n  All would be there: {how}."
        return ""

    def check_copies(self) -> None:
        """Raises if what was trained is in the file twice, with two values."""
        for key, one in self.copies.items():
            if f".{TRAINED}." in key and not np.array_equal(self.read(key), self.read(one)):
                raise ValueError(
                    f"'{_files.shown(key)}' is a copy of '{_files.shown(one)}', which PEFT reads, and differs from it.\n"
                    "  The file was changed: save it again with PEFT."
                )

    def check_wrapped(self) -> None:
        """Raises if a key does not go through all wrappers that are around its module, and through no others."""
        for key, part in self.parts.items():
            own, module = self.wrappers.get(part.module, 0), part.module
            around = {outer: self.wrappers[outer] for outer in containing(module) if outer in self.wrappers}
            depths = {own}
            if part.role in FACTORS or part.role == "tokens":
                depths = {*range(own + 1)}
            elif own == 1 and not self.is_listed(f"{module}.weight") and self.adapted(module) == [f"{module}.weight"]:
                depths = {0, 1}  # before 0.7 PEFT's layers were the base's own, with factors beside the weight
            if part.around != around or part.depth not in depths:
                depth = part.depth if part.depth in depths else own
                wanted = f"{PREFIX}{joined(path_of(module, self.wrappers, depth), part.end)}"
                raise ValueError(
                    f"'{_files.shown(key)}' does not go through the wrappers that the file has around its module.\n"
                    f"  PEFT would name it '{_files.shown(wanted)}'."
                )

    def base(self) -> Base:
        """What of the base the configuration has to agree with."""
        every = [place for several in self.places.values() for place in several]
        weights = {p.weight.name: self.leaves[p.path].kind == "linear" for p in every if p.path in self.sites}
        twins = {p.weight.name: [q.weight.name for q in self.places[p.path] if q.at == p.at] for p in every}
        return Base([place.weight.name for place in every], weights, True, twins)

    def is_saved(self, module: str) -> bool:
        """Whether the configuration says that a module, or one that it is in, is saved whole."""
        return self.declared.is_saved(module)

    def is_trained(self, part: Part) -> bool:
        """Whether the configuration says that a whole weight was trained; else it is the base's, which PEFT saves beside it."""
        return self.declared.is_bias(part) or self.is_saved(part.module)

    def read(self, key: str) -> np.ndarray:
        """One tensor."""
        return _files.check_finite(_files.shown(key), self.tensors.read(key))

    def factors(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        """The factors of a slice in the leaf's layout."""
        x, y = (self.read(pair.keys[role]) for role in ("a", "b"))
        batch = len(pair.axes.batch)
        if pair.swapped:
            a, b = _layouts.factors_from_peft(x, y, _layouts.turned(pair.axes), pair.layer)
            a, b = _layouts.turned_factors(a, b, batch)
        else:
            a, b = _layouts.factors_from_peft(x, y, pair.axes, pair.layer)
        return a, _layouts.rotated_outputs(b, pair.place.weight.rotary_heads, batch, back=True)


def is_uncalled(weight: Weight) -> bool:
    """Whether nothing calls the module of a table, as far as its name tells."""
    return weight.module.rpartition(".")[2] == SHARED and weight.layout is None


def declared_of(config: Config, tensors: _files.Safetensors, modules: Collection[str] = ()) -> Declared:
    """What a file declares and has, all of it."""
    parts = parts_of(list(tensors.header), config.saved, modules)
    shapes = {key: tensors.header[key].shape for key in parts}
    some = tensors.metadata.get(BIASES) == SOME
    return Declared(config, parts, shapes, wrappers_of(parts.values()), some)


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
