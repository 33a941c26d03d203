"""Writing a PEFT adapter that means the same everywhere: the scale is in the factors, names are whole, ranks are one."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import _files, _folders, _hosts, _layouts, _paths, _peft_base, _peft_config
from jlora._adapters import Adapter, FullWeight, LowRank, fingerprint
from jlora._advice import Advised
from jlora._dtypes import as_float
from jlora._layouts import Axes, Layer
from jlora._names import ByName, Leaf, Names, Place, Weight, check_named, places
from jlora._peft_declared import IN_PROJ, OUT_PROJ
from jlora._peft_keys import BIASES, PREFIX, SOME, TENSORS, containing, ends, path_of
from jlora._peft_read import is_uncalled
from jlora._sites import Site, Sites
from jlora._text import shown
from jlora._wrap import check_lora


def save(
    folder: str | os.PathLike[str],
    lora: Mapping[str, Adapter],
    *,
    names: Names = None,
    base_model: str | None = None,
    base_folder: str | os.PathLike[str] | None = None,
    sites: Sites | None = None,
    params: Any = None,
    task_type: str | None = None,
    dtype: Any = None,
    dropout: float | None = None,
    portable: bool = True,
    overwrite: bool = False,
) -> None:
    r"""Saves an adapter as PEFT does, so that PEFT, vLLM and others load it.

    The scale is folded into B, so that ``lora_alpha = r`` and every reader finds the same update, whatever it makes of patterns and of
    ``use_rslora``; targets are listed by their whole names, or are a pattern of these where one is the end of another module's name.
    The same adapter gives the same bytes.

    Args:
        folder: To write; it appears when it is complete.
        lora: Adapters by path. A leaf trained outright becomes a bias, or part of ``modules_to_save``.
        names: As for ``load``.
        base_model: What PEFT shall load as the base: ``base_model_name_or_path``.
        base_folder: Where the base's safetensors are: every weight that is written has to be there, in its shape, or nothing is written.
            Only headers are read. Where files name weights from inside the model, or from around it (``h.0.`` for
            ``transformer.h.0.``), one and the same prefix may be missing from their names, or stand before all.
        sites: What ``jlora.sites`` found; needed only for adapters that were saved before these kept how a leaf is used.
        params: The base's values; needed where ``modules_to_save`` takes more leaves of a module than were trained.
        task_type: As PEFT has it, such as ``"CAUSAL_LM"``; not needed by ``PeftModel.from_pretrained``.
        dtype: Of the tensors, a float of 16 bits or more; by default that of the adapter.
        dropout: The rate that the configuration names, with which PEFT trains all factors but those of tables; by default that of the
            adapter, if it has one. Nothing but training uses it.
        portable: Pad all factors with zeros to one rank. Otherwise ranks that differ are listed in ``rank_pattern``, by whole names,
            which vLLM does not read.
        overwrite: Replace an adapter that is already there. Other files in the folder stay.

    Raises:
        FileExistsError: there is something at ``folder``.
        ImportError: safetensors is not installed.
        ValueError: a leaf has no place in PEFT's format, nor have leaves trained outright without factors beside them; rates of dropout
            differ; a value is not finite, or several arrays would get one name; the base at ``base_folder`` lacks a weight, or has it in
            another shape.

    Example:
        See ``load``.
    """
    check_lora(lora)
    path = _files.folder(folder)
    options: dict[str, Any] = {"overwrite": overwrite, "marks": (_peft_config.FILE,), "what": "a PEFT adapter"}
    _folders.check_free(path, **options)
    writer = Writer(lora, names, sites, params, as_float(dtype))
    for leaf, adapter in sorted(lora.items()):
        if isinstance(adapter, LowRank):
            writer.factors(leaf, adapter)
    for leaf, adapter in sorted(lora.items()):
        if isinstance(adapter, FullWeight):
            writer.whole(leaf, adapter)
        elif not isinstance(adapter, LowRank):
            raise TypeError(
                f"PEFT's format has no place for the adapter of '{shown(leaf)}'.\n  got: {type(adapter).__name__}"
            )
    ranks = writer.finish(portable)
    rate = _peft_config.dropout_of(writer.rates, sorted(writer.parameters), dropout)
    others = [] if base_folder is None else _peft_base.check(_files.folder(base_folder), writer.wanted)
    with _folders.new_folder(path, **options) as part:
        _files.write_safetensors(part / TENSORS, writer.tensors, {BIASES: SOME} if writer.has_some_biases() else None)
        _peft_config.write(
            part,
            modules=writer.targets(others),
            parameters=sorted(writer.parameters),
            saved=sorted(writer.saved),
            bias=writer.bias,
            dropout=rate,
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
        check_named(lora, self.places)
        self.by_name = ByName(self.places)
        self.tensors: dict[str, np.ndarray] = {}
        self.pairs: dict[str, tuple[Layer, int, tuple[str, str]]] = {}  # by the key that patterns match
        self.modules: set[str] = set()
        self.parameters: set[str] = set()
        self.saved: dict[str, str] = {}  # modules that are saved whole, by their path
        self.wanted: dict[str, _peft_base.Wanted] = {}  # what the base has to have
        self.bias = "none"
        self.biases: set[str] = set()  # those that are written
        self.rates: dict[str, float] = {}

    def _agree(self, name: str, other: Any) -> None:
        difference = self.base.difference(other)
        if difference:
            raise ValueError(f"The adapter was made for another base than {shown(name)}: {difference}.")

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
                f"How the model uses '{shown(path)}' is not part of this adapter.",
                "Pass it: save(folder, lora, sites=jlora.sites(fn, params, x)).",
                "sites",
            )
        return found or _layouts.unknown(adapter.shape)

    def factors(self, path: str, adapter: LowRank) -> None:
        """Adds the factors of a leaf."""
        axes = self.axes(path)
        if axes.groups != 1:
            raise ValueError(
                f"PEFT has no factors for '{shown(path)}', a convolution in groups, or transposed.\n  Merge it instead."
            )
        if axes.dilated:
            raise ValueError(
                f"No factors of '{shown(path)}', a dilated convolution, mean the same to PEFT, which computes lora_A without "
                f"the dilation (up to "
                f"{_peft_config.VERSION}).\n  Merge it instead."
            )
        for place in self.uses(path, adapter):
            part = axes.at(place.at)
            layer = _layouts.layer_of(part, place)
            # nn.Linear, or GPT-2's Conv1D: the adapters of both are the same.
            either = layer == "linear" and place.weight.layout is None and "lookup" not in axes.use
            if layer == "embedding":
                self._check_called(place)
            self._want(place, part, either=either)
            a, b = (_local(x, path)[place.at] for x in (adapter.a, adapter.b))
            dtype = self.dtype or jnp.promote_types(a.dtype, b.dtype)
            b = b.astype(np.promote_types(b.dtype, np.float32)) * np.float32(adapter.scale)
            b = _layouts.rotated_outputs(b, place.weight.rotary_heads, len(part.batch), back=False)
            if layer == "parameter" and _layouts.is_across(part, place.weight):
                a, b = _layouts.turned_factors(a, b, len(part.batch))
                part = _layouts.turned(part)
            x, y = _layouts.factors_to_peft(a, b, part, layer)
            if layer != "embedding":
                self.rates[path] = adapter.dropout
            self.pair(place, layer, adapter.rank, x.astype(dtype), y.astype(dtype))

    def uses(self, path: str, adapter: LowRank | FullWeight) -> list[Place]:
        """The places of what an adapter changes: PEFT has a module for the lookups of a tied table, and one for the products with it."""
        use, several, only = self.axes(path).use, self.places[path], getattr(adapter, "only", "")
        tied = "lookup" in use and use != "lookup"
        if tied and only != "lookup" and several and all(place.first for place in several):
            raise Advised(
                f"'{shown(path)}' is looked up and multiplied with: in PyTorch it is an embedding and a head tied to it.",
                f"Name both: names={{'{shown(path)}': ('{shown(several[0].weight.name)}', 'lm_head.weight')}}.",
                "names",
                {path: [several[0].weight.name, "lm_head.weight"]},
            )
        return [place for place in several if not only or not tied or place.first == (only == "lookup")]

    @staticmethod
    def _check_called(place: Place) -> None:
        if is_uncalled(place.weight):
            raise ValueError(
                f"PEFT's adapter of '{shown(place.weight.module)}' has no effect: where transformers names a table that (T5, "
                f"BART), encoder and "
                "decoder\n  look up through modules of their own. Leave it out, or merge it. "
                f"If '{shown(place.weight.module)}' is another module, say so: Weight('{shown(place.weight.name)}', layout='in_out')."
            )

    def pair(self, place: Place, layer: Layer, rank: int, x: np.ndarray, y: np.ndarray) -> None:
        """Adds one pair of tensors."""
        if self.by_name[place.weight.name] != place:
            raise Advised(
                f"'{shown(place.weight.name)}' is the name of two weights.", "Give each its own with names=...", "names"
            )
        module = place.weight.module
        if not module:
            raise ValueError(
                f"'{shown(place.path)}' is a parameter of the model itself, which PEFT does not adapt.\n  Leave it out."
            )
        key = place.weight.name if layer == "parameter" else module
        (self.parameters if layer == "parameter" else self.modules).add(key)
        depth = self._depth(place) if layer == "parameter" else 0
        inside = f"{PREFIX}{path_of(module, self.wrappers, depth)}"
        ends = ("lora_embedding_A", "lora_embedding_B") if layer == "embedding" else ("lora_A.weight", "lora_B.weight")
        names = (f"{inside}.{ends[0]}", f"{inside}.{ends[1]}")
        for name, tensor in zip(names, (x, y), strict=True):
            self.tensors[name] = _files.check_finite(name, tensor)
        self.pairs[key] = layer, rank, names

    @cached_property
    def held(self) -> dict[str, list[Weight]]:
        """The parameters that are adapted themselves, by the module that holds them."""
        found: dict[str, list[Weight]] = defaultdict(list)
        for place, layer in self._adapted():
            if layer == "parameter":
                found[place.weight.module].append(place.weight)
        return dict(found)

    @cached_property
    def wrappers(self) -> dict[str, int]:
        """How many wrappers PEFT will have around each module."""
        modules = {place.weight.module: 1 for place, layer in self._adapted() if layer != "parameter"}
        return modules | {module: len(several) for module, several in self.held.items()}

    def _adapted(self) -> Iterator[tuple[Place, Layer]]:
        for path, adapter in self.lora.items():
            if isinstance(adapter, LowRank):
                axes = self.axes(path)
                for place in self.uses(path, adapter):
                    yield place, _layouts.layer_of(axes.at(place.at), place)

    def _depth(self, place: Place) -> int:
        """How many wrappers are around the one of this parameter: the first that the module registers is the innermost."""
        rivals = self.held[place.weight.module]
        order = [w.nesting for w in rivals]
        if len(rivals) > 1 and (None in order or len(set(order)) != len(order)):
            raise Advised(
                f"Several parameters of '{shown(place.weight.module)}' are adapted, and PEFT's keys do not name them: "
                f"{_paths.listing([w.name for w in rivals])}.",
                "Say which the module registers first: Weight(name, nesting=0), Weight(name, nesting=1).",
                "names",
                {self.by_name[w.name].path: {"name": w.name, "nesting": i} for i, w in enumerate(rivals)},
            )
        return sum((n or 0) > (place.weight.nesting or 0) for n in order)

    def _want(self, place: Place, axes: Axes, *, either: bool = False) -> None:
        shape = _layouts.torch_shape(axes, place.weight)
        shapes = (shape, shape[::-1]) if either and shape != shape[::-1] else (shape,)
        self.wanted[place.weight.name] = _peft_base.Wanted(shapes, not place.first)

    def whole(self, path: str, adapter: FullWeight) -> None:
        """Adds a leaf that was trained outright."""
        axes = self.axes(path)
        for place in self.uses(path, adapter):
            if "lookup" in axes.use:
                self._check_called(place)
            self._want(place, axes.at(place.at))
            value = _layouts.to_torch(
                _layouts.at(_local(adapter.value, path), axes, place.at), axes.at(place.at), place.weight
            )
            self.put(path, place, value)

    def put(self, path: str, place: Place, value: np.ndarray) -> None:
        """Adds one whole tensor: a bias, or a parameter of a module that is saved as a whole."""
        module, _, last = place.weight.name.rpartition(".")
        siblings = {name: self.by_name[name] for name in self.by_name if name.rpartition(".")[0] == module}
        trained = {name for name, p in siblings.items() if isinstance(self.lora.get(p.path), FullWeight)}
        around = self.wrappers.get(module, 0)
        if last == "bias" and (around or trained == {place.weight.name}):
            self.biases.add(place.weight.name)
            self.bias = "all" if not around or self.bias == "all" else "lora_only"
            name = f"{path_of(module, self.wrappers, around)}.bias"
        else:
            self.saved[path_of(module, self.wrappers)] = module
            name = f"{path_of(module, self.wrappers)}.{last}"
            for other in sorted(set(siblings) - trained):
                self._untrained(other, siblings[other])
        value = value.astype(self.dtype or value.dtype)
        self.tensors[f"{PREFIX}{name}"] = _files.check_finite(name, value)

    def has_some_biases(self) -> bool:
        """Whether biases are written, and not all that PEFT would train with them."""
        every = {name for name in self.by_name if name.rpartition(".")[2] == "bias"}
        every -= {name for name in every if self.bias == "lora_only" and name.rpartition(".")[0] not in self.wrappers}
        whole = {name for name in every if name.rpartition(".")[0] in self.saved.values()}
        return self.bias != "none" and (self.base.partial or not every <= self.biases | whole)

    def _untrained(self, name: str, place: Place) -> None:
        """PEFT saves a module with all of its parameters: those that were not trained are the base's."""
        if place.path not in self.params:
            raise Advised(
                f"PEFT saves the module '{shown(place.weight.module)}' whole, and '{shown(place.path)}' was not trained.",
                "Pass the base: save(folder, lora, params=params), or train it too with a Full rule.",
                "params",
            )
        axes = self._axes_in_sites(place.path) or _layouts.unknown(np.shape(self.params[place.path]))
        self._want(place, axes.at(place.at))
        value = _layouts.at(self.params[place.path], axes, place.at)
        inside = path_of(place.weight.module, self.wrappers)
        self.tensors[f"{PREFIX}{inside}.{name.rpartition('.')[2]}"] = _layouts.to_torch(
            value, axes.at(place.at), place.weight
        )

    def _check_wrapped(self) -> None:
        """Raises where PEFT could not put its wrappers, or would put others."""
        for module, held in self.held.items():
            if module in self.modules:
                raise ValueError(
                    f"PEFT adapts either '{shown(module)}' or its parameters, and '{shown(held[0].name)}' is one.\n"
                    f"  Say that '{shown(module)}.weight' is one too: Weight('{shown(module)}.weight', nesting=0), "
                    f"Weight('{shown(held[0].name)}', nesting=1)."
                )
            outer = next((m for m in containing(module) if m in self.held), None)
            if outer is not None:
                both = f"'{self.held[outer][0].name}' and '{held[0].name}'"
                raise ValueError(
                    f"PEFT cannot adapt parameters of '{shown(outer)}' and of '{shown(module)}' inside it: {both}.\n"
                    "  Leave one of them out."
                )
        for name in sorted(self.parameters):
            taken = [n for n in self.by_name if n.endswith(f".{name}") and n not in self.parameters]
            if taken:
                raise ValueError(
                    f"PEFT would take target_parameters='{shown(name)}' for '{shown(taken[0])}' too.\n  Adapt that as well, or neither."
                )
        for module in sorted(self.modules):
            outer, _, last = module.rpartition(".")
            whole = f"{outer}.{IN_PROJ}"
            if last == OUT_PROJ and whole in self.by_name and self.by_name[whole].weight.nesting is None:
                raise ValueError(
                    f"No adapter of '{shown(module)}' means the same to every PEFT: nn.MultiheadAttention never calls it, "
                    f"and where '{shown(outer)}' is "
                    f"the target, PEFT adds its update twice (up to {_peft_config.VERSION}).\n"
                    f"  Leave it out, or merge it. If '{shown(outer)}' is another module, say so: Weight('{whole}', nesting=0)."
                )

    def _check_saved(self) -> None:
        """Raises where PEFT would not save a module, or others as well: it compares the ends of paths."""
        adapted = {path_of(m, self.wrappers) for m in self.wrappers}
        for path, module in self.saved.items():
            outer = module.rpartition(".")[0]
            if outer in self.wrappers:
                raise ValueError(
                    f"PEFT refuses modules_to_save='{shown(module)}' where parameters of '{shown(outer)}', which it is in, are adapted.\n"
                    f"  Leave out '{shown(module)}' or {_paths.listing([w.name for w in self.held.get(outer, ())] or [outer])}."
                )
            alike = [m for m in sorted(adapted) if m.endswith(path) or m.startswith(f"{path}.")]
            alike += [n for n in self.by_name if n.startswith(f"{module}.") and n.count(".") > module.count(".") + 1]
            if alike:
                raise ValueError(
                    f"PEFT would take modules_to_save='{shown(path)}' for '{shown(alike[0])}' too.\n  Train that with a Full "
                    f"rule as well, or neither."
                )

    def targets(self, others: Iterable[str] = ()) -> list[str] | str:
        """The modules to adapt by their names, or where PEFT would take one for the end of another's, a pattern of these alone.

        Args:
            others: Names of parameters of the base, beside those that are known here.
        """
        known = {module for name in (*self.by_name, *others) for module in containing(name)} - self.modules
        if any(end in self.modules for module in known for end in ends(module)):
            return f"(?:{'|'.join(map(re.escape, sorted(self.modules)))})"
        return sorted(self.modules)

    def finish(self, portable: bool) -> dict[str, Any]:
        """Brings all factors to one rank, or says which have another; returns what the configuration says of ranks."""
        self._check_wrapped()
        self._check_saved()
        ranks = {key: rank for key, (_, rank, _) in self.pairs.items()}
        if not ranks:
            raise Advised(
                "There are no factors in this adapter: PEFT has no place for leaves trained outright alone.",
                "Write them into the base: jlora.export.save(folder, params, lora, sites=sites). Or train with a LoRA rule beside Full.",
                "factors",
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
            f"'{shown(path)}' is spread over processes.\n  Save it with jlora.save, and convert what was saved in one process."
        )
    return np.asarray(x)
