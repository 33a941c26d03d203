"""Writing a PEFT adapter that means the same everywhere: the scale is in the factors, names are whole, ranks are one."""

import os
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora import _files, _hosts, _layouts, _paths, _peft_config
from jlora._adapters import Adapter, FullWeight, LowRank, fingerprint
from jlora._advice import Advised
from jlora._layouts import Axes, Layer
from jlora._names import ByName, Leaf, Names, Place, places
from jlora._peft_read import PREFIX, TENSORS
from jlora._sites import Site, Sites
from jlora._wrap import check_lora


def save(
    folder: str | os.PathLike[str],
    lora: Mapping[str, Adapter],
    *,
    names: Names = None,
    base_model: str | None = None,
    sites: Sites | None = None,
    params: Any = None,
    task_type: str | None = None,
    dtype: Any = None,
    portable: bool = True,
    overwrite: bool = False,
) -> None:
    r"""Saves an adapter as PEFT does, so that PEFT, vLLM and others load it.

    The scale is folded into B, so that ``lora_alpha = r`` and every reader finds the same update, whatever it makes of patterns and of
    ``use_rslora``; targets are listed by their whole names. The same adapter gives the same bytes.

    Args:
        folder: To write; it appears when it is complete.
        lora: Adapters by path. A leaf trained outright becomes a bias, or part of ``modules_to_save``.
        names: As for ``load``.
        base_model: What PEFT shall load as the base: ``base_model_name_or_path``.
        sites: What ``jlora.sites`` found; needed only for adapters that were saved before these kept how a leaf is used.
        params: The base's values; needed where ``modules_to_save`` takes more leaves of a module than were trained.
        task_type: As PEFT has it, such as ``"CAUSAL_LM"``; not needed by ``PeftModel.from_pretrained``.
        dtype: Of the tensors; by default that of the adapter.
        portable: Pad all factors with zeros to one rank. Otherwise ranks that differ are listed in ``rank_pattern``, by whole names,
            which vLLM does not read.
        overwrite: Replace an adapter that is already there.

    Raises:
        FileExistsError: there is something at ``folder``.
        ImportError: safetensors is not installed.
        ValueError: a leaf has no place in PEFT's format, a value is not finite, or several arrays would get one name.

    Example:
        See ``load``.
    """
    check_lora(lora)
    path = _files.folder(folder)
    options: dict[str, Any] = {"overwrite": overwrite, "marks": (_peft_config.FILE,), "what": "a PEFT adapter"}
    _files.check_free(path, **options)
    writer = Writer(lora, names, sites, params, dtype)
    for leaf, adapter in sorted(lora.items()):
        if isinstance(adapter, LowRank):
            writer.factors(leaf, adapter)
    for leaf, adapter in sorted(lora.items()):
        if isinstance(adapter, FullWeight):
            writer.whole(leaf, adapter)
        elif not isinstance(adapter, LowRank):
            raise TypeError(f"PEFT's format has no place for the adapter of '{leaf}'.\n  got: {type(adapter).__name__}")
    ranks = writer.finish(portable)
    with _files.new_folder(path, **options) as part:
        _files.write_safetensors(part / TENSORS, writer.tensors)
        _peft_config.write(
            part,
            modules=sorted(writer.modules),
            parameters=sorted(writer.parameters),
            saved=sorted(writer.saved),
            bias=writer.bias,
            base_model=base_model,
            task_type=task_type,
            **ranks,
        )


class Writer:
    """Collects the tensors of an adapter under PEFT's names."""

    def __init__(self, lora: Mapping[str, Adapter], names: Names, sites: Sites | None, params: Any, dtype: Any):
        self.lora, self.dtype, self.sites = lora, dtype, sites
        bases = {adapter.base for adapter in lora.values()}
        if len(bases) != 1:
            raise ValueError(f"These adapters were made for {len(bases)} different bases: save them apart.")
        (self.base,) = bases
        self.leaves: dict[str, Site] = {}
        if sites is not None:
            self._agree("sites", sites.base)
            self.leaves = {**sites, **sites.skipped}
        self.params: dict[str, Any] = {}
        if params is not None:
            paths, values, _ = _paths.flatten(params)
            self._agree("params", fingerprint(paths, values))
            self.params = dict(zip(paths, values, strict=True))
        self.places = places([Leaf(path, shape, self._batch(path)) for path, shape, _ in self.base.leaves], names)
        self.by_name = ByName(self.places)
        self.tensors: dict[str, np.ndarray] = {}
        self.pairs: dict[str, tuple[Layer, int, tuple[str, str]]] = {}  # by the key that patterns match
        self.modules: set[str] = set()
        self.parameters: set[str] = set()
        self.saved: set[str] = set()
        self.bias = "none"

    def _agree(self, name: str, other: Any) -> None:
        difference = self.base.difference(other)
        if difference:
            raise ValueError(f"The adapter was made for another base than {name}: {difference}.")

    def _batch(self, path: str) -> tuple[int, ...] | None:
        leaf: Any = self.lora.get(path)
        if isinstance(leaf, LowRank):
            return tuple(leaf.shape[d] for d in leaf.batch)
        known = isinstance(leaf, FullWeight) and leaf.use
        axes = _layouts.axes_of(leaf) if known else self._axes_in_sites(path)
        return tuple(axes.shape[d] for d in axes.batch) if axes is not None and axes.inputs else None

    def _axes_in_sites(self, path: str) -> Axes | None:
        return _layouts.axes_of(self.leaves[path]) if path in self.leaves else None

    def axes(self, path: str) -> Axes:
        """The axes of a leaf, as far as they are known."""
        adapter = self.lora[path]
        if isinstance(adapter, LowRank | FullWeight) and adapter.use:
            return _layouts.axes_of(adapter)
        found = self._axes_in_sites(path)
        if found is None and isinstance(adapter, LowRank):
            raise Advised(
                f"How the model uses '{path}' is not part of this adapter.",
                "Pass it: save(folder, lora, sites=jlora.sites(fn, params, x)).",
                "sites",
            )
        return found or _layouts.unknown(adapter.shape)

    def factors(self, path: str, adapter: LowRank) -> None:
        """Adds the factors of a leaf."""
        axes = self.axes(path)
        if axes.groups != 1:
            raise ValueError(
                f"PEFT has no factors for '{path}', a convolution in groups, or transposed.\n  Merge it instead."
            )
        several = self.places[path]
        if "lookup" in axes.use and "linear" in axes.use and len(several) < 2:
            raise Advised(
                f"'{path}' is looked up and multiplied with: in PyTorch it is an embedding and a head tied to it.",
                f"Name both: names={{'{path}': ('{several[0].weight.name}', 'lm_head.weight')}}.",
                "names",
                {path: [several[0].weight.name, "lm_head.weight"]},
            )
        for place in several:
            part = axes.at(place.at)
            layer = _layouts.layer_of(part, place)
            a, b = (_local(x, path)[place.at] for x in (adapter.a, adapter.b))
            b = b.astype(np.promote_types(b.dtype, np.float32)) * np.float32(adapter.scale)
            if layer == "parameter" and _layouts.is_across(part, place.weight):
                a, b = _layouts.turned_factors(a, b, len(part.batch))
                part = _layouts.turned(part)
            x, y = _layouts.factors_to_peft(a, b, part, layer)
            y = _layouts.rotate(y, place.weight.rotary_heads, back=False)
            self.pair(place, layer, adapter.rank, x.astype(self.dtype or a.dtype), y.astype(self.dtype or a.dtype))

    def pair(self, place: Place, layer: Layer, rank: int, x: np.ndarray, y: np.ndarray) -> None:
        """Adds one pair of tensors."""
        if self.by_name[place.weight.name] != place:
            raise Advised(
                f"'{place.weight.name}' is the name of two weights.", "Give each its own with names=...", "names"
            )
        module = place.weight.module
        key = place.weight.name if layer == "parameter" else module
        (self.parameters if layer == "parameter" else self.modules).add(key)
        inside = f"{PREFIX}{module}"
        if layer == "parameter":
            inside += ".base_layer" * self._wrappers(place)
        ends = ("lora_embedding_A", "lora_embedding_B") if layer == "embedding" else ("lora_A.weight", "lora_B.weight")
        names = (f"{inside}.{ends[0]}", f"{inside}.{ends[1]}")
        for name, tensor in zip(names, (x, y), strict=True):
            self.tensors[name] = _files.check_finite(name, tensor)
        self.pairs[key] = layer, rank, names

    def _wrappers(self, place: Place) -> int:
        """How many wrappers are around the one of this parameter: the first that the module registers is the innermost."""
        rivals = [
            p
            for path, adapter in self.lora.items()
            if isinstance(adapter, LowRank)
            for p in self.places[path]
            if p.weight.module == place.weight.module
        ]
        order = [p.weight.nesting for p in rivals]
        if len(rivals) > 1 and (None in order or len(set(order)) != len(order)):
            raise Advised(
                f"Several parameters of '{place.weight.module}' are adapted, and PEFT's keys do not name them: "
                f"{_paths.listing([p.weight.name for p in rivals])}.",
                "Say which the module registers first: Weight(name, nesting=0), Weight(name, nesting=1).",
                "names",
                {p.path: {"name": p.weight.name, "nesting": i} for i, p in enumerate(rivals)},
            )
        return sum((n or 0) > (place.weight.nesting or 0) for n in order)

    def whole(self, path: str, adapter: FullWeight) -> None:
        """Adds a leaf that was trained outright."""
        axes = self.axes(path)
        for place in self.places[path]:
            value = _layouts.to_torch(
                _layouts.at(_local(adapter.value, path), axes, place.at), axes.at(place.at), place.weight
            )
            self.put(path, place, value)

    def put(self, path: str, place: Place, value: np.ndarray) -> None:
        """Adds one whole tensor: a bias, or a parameter of a module that is saved as a whole."""
        module, _, last = place.weight.name.rpartition(".")
        siblings = {name: self.by_name[name] for name in self.by_name if name.rpartition(".")[0] == module}
        trained = {name for name, p in siblings.items() if isinstance(self.lora.get(p.path), FullWeight)}
        adapted = module in self.modules
        if last == "bias" and (adapted or trained == {place.weight.name}):
            self.bias = "all" if not adapted or self.bias == "all" else "lora_only"
            name = f"{module}.base_layer.bias" if adapted else place.weight.name
        else:
            self.saved.add(module)
            name = place.weight.name
            for other in sorted(set(siblings) - trained):
                self._untrained(other, siblings[other])
        value = value.astype(self.dtype or value.dtype)
        self.tensors[f"{PREFIX}{name}"] = _files.check_finite(name, value)

    def _untrained(self, name: str, place: Place) -> None:
        """PEFT saves a module with all of its parameters: those that were not trained are the base's."""
        if place.path not in self.params:
            raise Advised(
                f"PEFT saves the module '{place.weight.module}' whole, and '{place.path}' was not trained.",
                "Pass the base: save(folder, lora, params=params), or train it too with a Full rule.",
                "params",
            )
        axes = self._axes_in_sites(place.path) or _layouts.unknown(np.shape(self.params[place.path]))
        value = _layouts.at(self.params[place.path], axes, place.at)
        self.tensors[f"{PREFIX}{name}"] = _layouts.to_torch(value, axes.at(place.at), place.weight)

    def _check_nested(self) -> None:
        """Raises where PEFT would look for tensors under other names, or take them for another module's."""
        wrapped = {name.rpartition(".")[0] for name in self.parameters}
        for module in sorted(wrapped):
            ours = f"{PREFIX}{module}."
            inside = [k for k in self.tensors if k.startswith(ours) and ".lora_" not in k.removeprefix(PREFIX + module)]
            inside += [m for m in self.modules if m.startswith(f"{module}.")]
            if inside:
                raise ValueError(
                    f"Parameters of '{module}' are adapted, and so is '{inside[0].removeprefix(PREFIX)}' inside it: PEFT's keys for both "
                    "together are not written.\n  Leave one of them out."
                )
        for module in sorted(self.saved):
            alike = [m for m in (*self.modules, *wrapped) if m.endswith(module) or m.startswith(f"{module}.")]
            alike += [n for n in self.by_name if n.startswith(f"{module}.") and n.count(".") > module.count(".") + 1]
            if alike:
                raise ValueError(
                    f"PEFT would take modules_to_save='{module}' for '{alike[0]}' too.\n  Train that with a Full rule as well, or neither."
                )

    def finish(self, portable: bool) -> dict[str, Any]:
        """Brings all factors to one rank, or says which have another; returns what the configuration says of ranks."""
        self._check_nested()
        ranks = {key: rank for key, (_, rank, _) in self.pairs.items()}
        if not ranks:
            raise ValueError(
                "There are no factors in this adapter: PEFT has no place for leaves trained outright alone."
            )
        counts: dict[int, int] = defaultdict(int)
        for rank in ranks.values():
            counts[rank] += 1
        most = max(ranks.values()) if portable else max(counts, key=lambda r: (counts[r], r))
        if not portable:
            # Anchored: PEFT lets a pattern match the end of a longer name.
            others = {f"^{key}": rank for key, rank in ranks.items() if rank != most}
            return {"rank": most, "ranks": others, "alphas": others}
        for layer, rank, (a, b) in self.pairs.values():
            self.tensors[a], self.tensors[b] = _padded(self.tensors[a], self.tensors[b], layer, rank, most)
        return {"rank": most, "ranks": {}, "alphas": {}}


def _padded(x: np.ndarray, y: np.ndarray, layer: Layer, rank: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors with zeros up to rank ``most``."""
    if rank == most:
        return x, y
    if layer == "parameter":
        n = x.shape[0] // rank
        x = np.pad(x.reshape(n, rank, -1), ((0, 0), (0, most - rank), (0, 0))).reshape(n * most, -1)
        return x, np.pad(y.reshape(-1, rank, n), ((0, 0), (0, most - rank), (0, 0))).reshape(-1, most * n)
    more = most - rank
    return (
        np.pad(x, ((0, more), *((0, 0) for _ in x.shape[1:]))),
        np.pad(y, ((0, 0), (0, more), *((0, 0) for _ in y.shape[2:]))),
    )


def _local(x: Any, path: str) -> np.ndarray:
    if _hosts.spans(x):
        raise ValueError(
            f"'{path}' is spread over processes.\n  Save it with jlora.save, and convert what was saved in one process."
        )
    return np.asarray(x)
