r"""Merged parameters where the base model goes: safetensors under PyTorch names, an orbax checkpoint, a serialised function.

Leaves are merged and written one by one, so that no second copy of the base is in memory. Safetensors need
``pip install "jlora[peft]"``.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checksums, _files, _folders, _hosts, _layouts, _paths
from jlora._adapters import Adapter, check_mergeable, fingerprint
from jlora._artifact import arrays as arrays
from jlora._artifact import function as function
from jlora._dtypes import FLOATS
from jlora._export_config import Ends, as_mapping, kept
from jlora._export_tree import save_orbax as save_orbax
from jlora._fold import Fold, Rounding
from jlora._fold import stochastic_round as stochastic_round
from jlora._names import ByName, Leaf, Names, Place, Weight, check_named, places
from jlora._overflow import Overflow
from jlora._sites import Site, Sites
from jlora._text import shown
from jlora._wrap import check_base, check_lora

INDEX = "model.safetensors.index.json"
ONE = "model.safetensors"


class _Entry(NamedTuple):
    """One tensor to write."""

    name: str
    place: Place
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def save(
    folder: str | os.PathLike[str],
    params: Any,
    lora: Mapping[str, Adapter] | None = None,
    *,
    sites: Sites,
    names: Names = None,
    dtype: Any = None,
    rounding: Rounding = "nearest",
    key: Any = None,
    overflow: Overflow = "raise",
    shard_bytes: int = 5 * 10**9,
    config: Any = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, float]:
    r"""Writes ``params``, with ``lora`` folded in, as the safetensors of the PyTorch model of these names.

    Args:
        folder: To write; it appears when it is complete. ``model.safetensors``, or shards of it with an index as Hugging Face has them.
        params: The base.
        lora: Adapters by path, or ``None`` for the base alone.
        sites: What ``jlora.sites`` found, which tells the axes of every leaf.
        names: As for ``jlora.peft.load``; every leaf of ``params`` has a name. A name that is ``None``, or ``()``, leaves the leaf
            out, if it is not adapted.
        dtype: Of the tensors; by default each leaf's own.
        rounding: To ``dtype``: ``"nearest"`` loses what is smaller than half a unit of the last place; ``"stochastic"`` rounds up or down
            with the probability that keeps the mean.
        key: A PRNG key, for stochastic rounding.
        overflow: As for ``jlora.merge``: ``"raise"``, or ``"allow"`` to store infinities where a tensor's dtype ends.
        shard_bytes: The most bytes of one file; a tensor that is larger has a file of its own.
        config: What ``config.json`` holds: a mapping, or an object with ``to_dict()``, such as a configuration of transformers. Where the
            written head differs from the embedding, ``tie_word_embeddings`` is made false in it: transformers drops the head otherwise.
        overwrite: Replace an export that is already there: its weights, all shards of them, and ``config.json`` if ``config`` is given.
            Other files in the folder stay; of a ``config.json`` that stays, ``tie_word_embeddings`` is made what it has to be.
        progress: Called with the name, the number written and the number of all tensors.

    Returns:
        For each adapted leaf what rounding lost of its update, $\lVert \mathrm{stored} - \Delta \rVert / \lVert \Delta \rVert$.

    Raises:
        FileExistsError: there is something at ``folder``.
        TypeError: ``config`` is neither, or holds what JSON has not.
        ValueError: ``config`` and the weights disagree on whether head and embedding are one, and the flag cannot be changed; two
            leaves have one name; an adapted leaf has none; an adapter or ``sites`` belongs to another base; a tensor overflows its
            dtype.

    References:
        Gupta et al., 2015, arXiv:1502.02551 (stochastic rounding).
    """
    path = _files.folder(folder)
    options: dict[str, Any] = {"overwrite": overwrite, "marks": (ONE, INDEX), "what": "an export"}
    _folders.check_free(path, **options)
    config = as_mapping(config)
    export = _Export(params, lora, sites, names, Fold(dtype, rounding, key, overflow))
    shards = _shards(export.entries, shard_bytes)
    ends = Ends((e.name, e.shape, export.is_both(e.place.path)) for e in export.entries)
    config = kept(path, config, ends)
    done = 0
    with _folders.new_folder(path, **options) as part:
        for file, entries in shards.items():
            with open(part / file, "wb") as f:
                _files.write_header(
                    f, (_files.Entry(e.name, _files.SPELLED[e.dtype], e.shape, e.bytes) for e in entries)
                )
                for entry in entries:
                    contents = export.contents(entry)
                    ends.saw(entry.name, contents)
                    f.write(contents)
                    done += 1
                    if progress is not None:
                        progress(entry.name, done, len(export.entries))
                f.flush()
                os.fsync(f.fileno())
        if len(shards) > 1:
            _files.write_json(part / INDEX, _index(shards))
        if config is not None:
            ends.mend(config)
            _files.write_json(part / "config.json", config)
    return export.fold.lost


def load(
    folder: str | os.PathLike[str],
    params: Any,
    *,
    sites: Sites,
    names: Names = None,
    ignore: str | Sequence[str] = (),
) -> Any:
    """Reads the safetensors of a PyTorch model into the structure of ``params``.

    Args:
        folder: With ``model.safetensors``, or shards of it and their index; or one such file.
        params: Arrays or ``ShapeDtypeStruct``s: the structure, shapes, dtypes and shardings of the result.
        sites: What ``jlora.sites`` found, which tells the axes of every leaf.
        names: As for ``save``; a leaf without a name keeps its value of ``params``.
        ignore: Tensors that the tree does not have, such as buffers: names, or patterns of whole names.

    Returns:
        A tree like ``params``. A leaf of integers that JAX has not, as of 64 bits where it has 32, is a NumPy array.

    Raises:
        FileNotFoundError: there is nothing of that kind.
        ValueError: a tensor is missing, left over, of another shape, not finite, or its file is damaged; its dtype is of another kind
            than the leaf's, or the leaf cannot hold an integer of it; what is to be ignored is not there.
    """
    where = _files.folder(folder)
    tree = _Tree(params, sites, names)
    sources = open_weights(where)
    for source in set(sources.values()):
        source.check_digest()
    missing = sorted({name for name in tree.by_name if tree.by_name[name].first} - set(sources))
    left = sorted(set(sources) - set(tree.by_name) - _ignored(ignore, sources))
    if missing or left:
        what = [
            f"missing: {_paths.listing(missing, 4)}" if missing else "",
            f"left over: {_paths.listing(left, 4)}; if the tree does not have them: load(..., ignore=[...])"
            if left
            else "",
        ]
        raise ValueError(f"The weights at {where} are not those of this model.\n  " + "\n  ".join(filter(None, what)))
    out = []
    for leaf_path, leaf in zip(tree.paths, tree.leaves, strict=True):
        found = tree.places[leaf_path]
        out.append(_gather(tree, leaf_path, leaf, found, sources) if found else leaf)
    return jax.tree_util.tree_unflatten(tree.structure, out)


def _ignored(ignore: str | Sequence[str], sources: Mapping[str, Any]) -> set[str]:
    """The tensors that are left out."""
    found: set[str] = set()
    for pattern in [ignore] if isinstance(ignore, str) else ignore:
        try:
            names = {name for name in sources if name == pattern or _paths.match(pattern, name)}
        except re.error as error:
            raise ValueError(f"ignore={pattern!r} is not a regular expression: {error}.") from None
        if not names:
            near = ", ".join(_paths.nearest(pattern, sources))
            raise ValueError(f"No tensor has the name {pattern!r} of ignore.\n  nearest: {near}")
        found |= names
    return found


def open_weights(folder: Path) -> dict[str, _files.Safetensors]:
    """The checked files of a model by the name of each tensor, all open: they are of one model, whatever is saved there meanwhile."""
    return _folders.steady(folder, _open_weights)


def _open_weights(folder: Path) -> dict[str, _files.Safetensors]:
    sums = _checksums.read(folder if folder.is_dir() else folder.parent)
    if (folder / INDEX).exists():
        index = _files.read_json(folder / INDEX, digest=sums.of(INDEX)).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(x, str) for x in index.values()):
            raise ValueError(f"{folder / INDEX} has no weight_map.")
        shards = {}
        for name in sorted(set(index.values())):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{folder / INDEX} names the file '{_files.shown(name)}', which is not beside it.")
            shards[name] = _files.Safetensors(folder / name, _files.BITS, sums.of(name))
        every = Counter(t for shard in shards.values() for t in shard.header)
        twice, times = every.most_common(1)[0]
        if times > 1:
            raise ValueError(f"'{_files.shown(twice)}' is in two files of {folder}.")
        wrong = [t for t, file in index.items() if t not in shards[file].header]
        if wrong or len(every) != len(index):
            for shard in shards.values():  # a damaged one is told by its name
                shard.check_digest()
            raise ValueError(
                f"{folder / INDEX} and its files do not agree: {_paths.listing([_files.shown(x) for x in wrong or shards], 4)}."
            )
        return {name: shards[file] for name, file in index.items()}
    file = folder if folder.suffix == ".safetensors" else folder / ONE
    if not file.exists():
        raise FileNotFoundError(f"There are no weights at {folder}: neither {ONE} nor {INDEX}.")
    one = _files.Safetensors(file, _files.BITS, sums.of(file.name, needed=folder != file))
    return dict.fromkeys(one.header, one)


class _Tree:
    """A parameter tree and the names of its leaves."""

    def __init__(self, params: Any, sites: Sites, names: Names):
        if not isinstance(sites, Sites):
            raise TypeError(f"sites must be what jlora.sites found.\n  got: {type(sites).__name__}")
        self.paths, self.leaves, self.structure = _paths.flatten(params)
        difference = sites.base.difference(fingerprint(self.paths, self.leaves))
        if difference:
            raise ValueError(
                f"The sites were found for other parameters: {difference}.\n  Call jlora.sites again with these."
            )
        self.sites: dict[str, Site] = {**sites, **sites.skipped}
        self.axes = {p: _layouts.axes_of(self.sites[p]) for p in self.paths}
        named = [
            Leaf(p, a.shape, tuple(a.shape[d] for d in a.batch) if a.inputs else None) for p, a in self.axes.items()
        ]
        self.places = places(named, names)
        self.by_name = ByName(self.places)

    def place(self, name: str) -> tuple[Place, _layouts.Axes, Weight]:
        found = self.by_name[name]
        return found, self.axes[found.path].at(found.at), found.weight


class _Export:
    """Merges one leaf at a time, and keeps the last one for the slices that are still to be written."""

    def __init__(self, params: Any, lora: Any, sites: Sites, names: Names, fold: Fold):
        self.fold = fold
        if lora is not None:
            check_lora(lora, params)
        self.tree, self.lora = _Tree(params, sites, names), lora or {}
        check_base(self.lora, self.tree.paths, self.tree.leaves)
        check_mergeable(self.lora)
        check_named(self.lora, self.tree.places)
        self.params = dict(zip(self.tree.paths, self.tree.leaves, strict=True))
        self.entries = list(self._entries())
        self._last: tuple[str, np.ndarray] | None = None

    def _entries(self) -> Iterator[_Entry]:
        for path in self.tree.paths:
            leaf = self.params[path]
            if _hosts.spans(leaf):
                raise ValueError(f"'{shown(path)}' is spread over processes: export what was saved in one process.")
            own = np.dtype(leaf.dtype)
            for place in (p for p in self.tree.places[path] if p.first):
                if str(own) not in FLOATS:
                    raise ValueError(
                        f"'{shown(path)}' holds {own}, which is no weight.\n  Leave it out: names={{'{shown(path)}': ()}}."
                    )
                place, axes, weight = self.tree.place(place.weight.name)
                shape = _layouts.torch_shape(axes, weight)
                yield _Entry(weight.name, place, shape, self.fold.dtype_of(own))

    def is_both(self, path: str) -> bool:
        """Whether a leaf is looked up and multiplied with."""
        return {"lookup", "linear"} <= set(self.tree.sites[path].kind.split("+"))

    def contents(self, entry: _Entry) -> bytes:
        """The contents of one tensor."""
        path = entry.place.path
        if self._last is None or self._last[0] != path:
            self._last = None  # let go before the next one is made
            self._last = path, self.fold.merged(path, self.params[path], self.lora.get(path))
        axes = self.tree.axes[path]
        x = _layouts.at(self._last[1], axes, entry.place.at)
        x = np.ascontiguousarray(_layouts.to_torch(x, axes.at(entry.place.at), entry.place.weight))
        return x.reshape(-1).view(np.uint8).data  # type: ignore[return-value]


def _shards(entries: list[_Entry], limit: int) -> dict[str, list[_Entry]]:
    """Entries by file, in order, each file at most ``limit`` bytes."""
    if limit < 1:
        raise ValueError(f"shard_bytes must be at least 1.\n  got: {limit}")
    groups: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.bytes
    if len(groups) == 1:
        return {ONE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _index(shards: Mapping[str, list[_Entry]]) -> dict[str, Any]:
    total = sum(e.bytes for entries in shards.values() for e in entries)
    return {
        "metadata": {"total_size": total},
        "weight_map": {e.name: file for file, entries in shards.items() for e in entries},
    }


def _gather(tree: _Tree, path: str, leaf: Any, found: list[Place], sources: Mapping[str, _files.Safetensors]) -> Any:
    """One leaf out of its tensors."""
    axes, value = tree.axes[path], np.zeros(leaf.shape, leaf.dtype)
    for place in found:
        part, name = axes.at(place.at), place.weight.name
        if not place.first and name not in sources:
            continue
        wanted = _layouts.torch_shape(part, place.weight)
        shape = sources[name].header[name].shape
        if shape != wanted:
            raise ValueError(f"'{shown(name)}' has shape {shape}; '{shown(path)}' {axes.shape} is {wanted} there.")
        x = _files.check_finite(name, sources[name].read(name))
        x = _layouts.from_torch(_cast(x, name, path, value.dtype), part, place.weight)
        at = _layouts.slice_of(axes, place.at)
        if not place.first and not np.array_equal(value[at], x):
            raise ValueError(
                f"'{shown(path)}' is one leaf here, but '{shown(name)}' and '{shown(found[0].weight.name)}' differ."
            )
        value[at] = x
    if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype and value.dtype.kind in "iu":
        return value  # JAX would cut off the upper half
    sharding = getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None
    return jnp.asarray(value) if sharding is None else jax.device_put(value, sharding)


def _cast(x: np.ndarray, name: str, path: str, dtype: np.dtype) -> np.ndarray:
    """A tensor in the dtype of its leaf: floats are rounded, integers must fit."""
    kinds = [
        next((k for k in (jnp.floating, jnp.integer, jnp.bool_) if jnp.issubdtype(d, k)), None)
        for d in (x.dtype, dtype)
    ]
    if kinds[0] is not kinds[1]:
        raise ValueError(f"'{shown(name)}' holds {x.dtype}; '{shown(path)}' is {dtype}.")
    cast = x.astype(dtype)
    if kinds[0] is jnp.integer and not np.array_equal(cast, x):
        raise ValueError(f"'{shown(name)}' has integers of {x.dtype} that '{shown(path)}' cannot hold in {dtype}.")
    return cast
