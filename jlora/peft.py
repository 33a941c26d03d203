r"""PEFT adapters in and out: the folder of ``adapter_config.json`` and ``adapter_model.safetensors`` that everyone exchanges.

``load`` gives jlora's adapter of such a folder, ``save`` writes one. Nothing is guessed: axes come from ``jlora.sites``, names from a
table; every tensor is used exactly once. Needs ``pip install "jlora[peft]"``; PyTorch is not needed.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _files, _layouts, _paths
from jlora._adapters import Adapter, FullWeight, fingerprint
from jlora._advice import Advised
from jlora._dtypes import as_float
from jlora._init import of_site, whole_of_site
from jlora._layouts import Layer
from jlora._names import Names, Place, default_name
from jlora._names import Weight as Weight
from jlora._peft_files import Files, open_adapter
from jlora._peft_plain import sites_of
from jlora._peft_read import Pair, Reader
from jlora._peft_write import save as save
from jlora._rules import Only
from jlora._sharding import followed
from jlora._sites import Site, Sites
from jlora._text import counted, shown

__all__ = ["Weight", "default_name", "load", "read", "save"]


def load(
    folder: str | os.PathLike[str], base: Any, *, names: Names = None, params: Any = None, dtype: Any = None
) -> dict[str, Adapter]:
    r"""Loads a PEFT adapter into a base of this side.

    $W \mathrel{+}= s\,(B_{torch} A_{torch})^T$ with $s = \alpha/r$, or $\alpha/\sqrt r$ where the file says ``use_rslora``. Embeddings,
    convolutions, GPT-2's ``Conv1D``, experts in 3-D parameters, rank and alpha patterns, biases, ``modules_to_save`` and trainable
    tokens are read; what cannot be is refused. Factors of a leaf that is stacked over layers are stacked.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: What ``jlora.sites`` found, which tells the axes of every leaf; or the parameters, if all that the file adapts are 2-D
            leaves named ``kernel``, whose axes are ``(in, out)`` in Flax.
        names: The PyTorch name of each leaf: a dict from a path, or from a pattern that matches whole paths, to a name (``\1`` is what
            the pattern's first group matched, ``{}`` an index along a batch axis), or a function of a path. A value may be a ``Weight``,
            which also tells a layout, or several names (a tied table is ``("model.embed_tokens.weight", "lm_head.weight")``). Paths
            that a dict does not have get ``default_name``.
        params: The base's values, needed where the file has whole weights to compare with them or to put into them (a targeted
            embedding, trainable tokens). The factors are placed as the shardings of these imply.
        dtype: Of the adapter, a float of 16 bits or more; by default fp32 or wider.

    Returns:
        Adapters by path, as from ``jlora.init``.

    Raises:
        FileNotFoundError: there is no such adapter.
        ImportError: safetensors is not installed.
        ValueError: a tensor of the file is for nothing in the base, or one is missing; shapes do not fit; a value is not finite; the
            configuration asks for something that jlora does not have; the file is damaged, or carries other base weights.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, jlora, jlora.peft
        >>> def model(params, x):
        ...     return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]
        >>> params = {"up": {"kernel": jnp.ones((3, 5))}, "down": {"kernel": jnp.ones((5, 2))}}
        >>> sites = jlora.sites(model, params, jnp.ones((7, 3)))
        >>> lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="up/kernel"))
        >>> folder = tempfile.mkdtemp() + "/adapter"
        >>> jlora.peft.save(folder, lora, names={"(.*)/kernel": r"model.layers.0.\1_proj.weight"})
        >>> again = jlora.peft.load(folder, sites, names={"(.*)/kernel": r"model.layers.0.\1_proj.weight"})
        >>> bool(jnp.allclose(jlora.delta(again)["up/kernel"], jlora.delta(lora)["up/kernel"]))
        True

    References:
        Hu et al., 2021, arXiv:2106.09685, section 4.1; Kalajdzievski, 2023, arXiv:2312.03732 (``use_rslora``).
    """
    return _load(partial(open_adapter, _files.folder(folder)), base, names=names, params=params, dtype=dtype)


def _load(
    opened: Callable[[], Files], base: Any, *, names: Names = None, params: Any = None, dtype: Any = None
) -> dict[str, Adapter]:
    """``load``, of files that are opened once the other arguments are checked."""
    dtype = as_float(dtype)
    sites, values = _base(base, params)
    files = opened()
    files.tensors.check_digest()
    reader = Reader(files, sites, names, values)
    return _placed(_loaded(reader, dtype), params if params is not None else base)


def read(
    folder: str | os.PathLike[str], *, params: Mapping[str, Any] | None = None, dtype: Any = None
) -> tuple[dict[str, Adapter], Sites]:
    """Reads a PEFT adapter without its base: leaves have PyTorch's names and layout.

    To look at it, to change its rank, to combine it with others; ``save(folder, lora, names=lambda path: path)`` writes it again.
    Weights of the base that the file carries beside factors are left out.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        params: Values of the base by the name of their weight, needed where the file adds to them: to biases (``lora_bias``), and to a
            table of which it has some rows (trained tokens).
        dtype: Of the adapter, a float of 16 bits or more; by default fp32 or wider.

    Returns:
        The adapters by the name of their weight, and what the file tells of these.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: as for ``load``; the file needs its base to be understood (trained tokens and biases of B without ``params``, unnamed
            experts).
    """
    dtype = as_float(dtype)
    return _read(open_adapter(_files.folder(folder)), {} if params is None else params, dtype=dtype)


def _read(
    files: Files, params: Mapping[str, Any], *, dtype: Any = None, without: Collection[str] = ()
) -> tuple[dict[str, Adapter], Sites]:
    """``read``, but for some keys of the file."""
    files.tensors.check_digest()
    sites = sites_of(files, params, without)
    reader = Reader(files, sites, lambda path: path, params, alone=True, without=without)
    return _loaded(reader, dtype), sites


def _loaded(reader: Reader, dtype: Any) -> dict[str, Adapter]:
    pairs = reader.pairs()
    reader.check_all_there(pairs)
    by_path: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_path[pair.place.path].append(pair)
    lora: dict[str, Adapter] = {path: _assemble(reader, path, by_path[path], dtype) for path in by_path}
    full = _whole(reader, pairs, dtype)
    both = sorted(set(lora) & set(full))
    if both:
        raise ValueError(f"The adapter has factors and whole values for the same leaf: {_paths.listing(both)}.")
    found = lora | full
    return {path: found[path] for path in reader.leaves if path in found}


def _base(base: Any, params: Any) -> tuple[Sites, dict[str, Any]]:
    """Sites and the values that are known."""
    if isinstance(base, Sites):
        if params is None:
            return base, {}
        paths, leaves, _ = _paths.flatten(params)
        difference = base.base.difference(fingerprint(paths, leaves))
        if difference:
            raise ValueError(
                f"The sites were found for other parameters: {difference}.\n  Call jlora.sites again with these."
            )
    else:
        paths, leaves, _ = _paths.flatten(base if params is None else params)
        if not paths:
            raise ValueError("The base comes second, load(folder, sites) or load(folder, params); this one is empty.")
        base = _by_name(paths, leaves)
    return base, {p: x for p, x in zip(paths, leaves, strict=True) if not isinstance(x, jax.ShapeDtypeStruct)}


def _by_name(paths: list[str], leaves: list[Any]) -> Sites:
    """What parameters alone tell: a 2-D leaf that Flax calls ``kernel`` is (in, out); ``embedding`` is a table everywhere."""
    tells = "parameters alone do not tell its axes"
    found = []
    for path, x in zip(paths, leaves, strict=True):
        shape, last = tuple(np.shape(x)), path.split("/")[-1]
        if len(shape) == 2 and last == "kernel":
            found.append(Site(path, shape, x.dtype, "linear", (0,), (1,)))
        elif len(shape) == 2 and last == "embedding":
            found.append(Site(path, shape, x.dtype, "dense", reason=f"{tells}: it may be the output head as well"))
        else:
            found.append(Site(path, shape, x.dtype, "", reason=tells))
    return Sites(found, fingerprint(paths, leaves))


def _assemble(reader: Reader, path: str, pairs: list[Pair], dtype: Any) -> Adapter:
    """The adapter of one leaf out of the factors of its slices."""
    site = reader.leaves[path]
    slices: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray, float]] = {}
    for pair in pairs:
        a, b = (_files.floats(x, dtype) for x in reader.factors(pair))
        index = pair.place.at
        if index in slices and not _same(slices[index], (a, b, pair.scale)):
            raise ValueError(
                f"'{shown(path)}' is one leaf here, but its {len(pairs)} weights in PyTorch were adapted apart: "
                f"{_paths.listing([p.place.weight.name for p in pairs], 4)}.\n  Give the base a leaf for each."
            )
        slices[index] = a, b, pair.scale
    scale = max(s for _, _, s in slices.values())
    rank = max(a.shape[-1] for a, _, _ in slices.values())
    layers = {pair.layer for pair in pairs}
    only = _only(site, pairs)
    some, dropout = next(iter(slices.values())), 0.0 if layers == {"embedding"} else reader.config.dropout
    if () in slices:
        return of_site(jnp.asarray(some[0]), jnp.asarray(some[1]), site, scale, dropout, reader.sites.base, only)
    sizes = tuple(site.shape[d] for d in site.batch)
    rest = len(sizes) - len(next(iter(slices)))
    a_all = np.zeros((*sizes, *some[0].shape[rest:-1], rank), some[0].dtype)
    b_all = np.zeros((*sizes, rank, *some[1].shape[rest + 1 :]), some[1].dtype)
    for index, (a, b, s) in slices.items():
        a_all[index][..., : a.shape[-1]] = a
        b_all[index][(*([slice(None)] * rest), slice(a.shape[-1]))] = b * np.asarray(s / scale, b.dtype)
    return of_site(jnp.asarray(a_all), jnp.asarray(b_all), site, scale, dropout, reader.sites.base, only)


def _only(site: Site, pairs: list[Pair]) -> Only | None:
    """The kind of use that the factors of a leaf are for: a table and the head that is tied to it are two modules in PyTorch.

    PEFT adapts the one without the other, though they share the weight.
    """
    kinds: set[Only] = {_KINDS.get(pair.layer, "linear") for pair in pairs}
    return kinds.pop() if site.is_tied and len(kinds) == 1 else None


_KINDS: dict[Layer, Only] = {"embedding": "lookup", "conv": "conv"}


def _same(one: tuple[Any, Any, float], two: tuple[Any, Any, float]) -> bool:
    """Whether two pairs of factors have one product, up to rounding: the norm of the difference, by QR, without the products."""
    (a, b, s), (c, d, t) = one, two
    a, b, c, d = (
        x.reshape(-1, x.shape[-1]) if i % 2 == 0 else x.reshape(len(x), -1).T for i, x in enumerate((a, b, c, d))
    )
    both = (np.concatenate(x, axis=1).astype(np.float64) for x in ((a * s, -c * t), (b, d)))

    def norm(x: np.ndarray, y: np.ndarray) -> Any:
        left, right = (np.asarray(np.linalg.qr(z, mode="r")) for z in (x, y))
        return np.linalg.norm(left @ right.T)

    return bool(norm(*both) <= 1e-5 * norm(a * s, b))


def _whole(reader: Reader, pairs: list[Pair], dtype: Any) -> dict[str, Adapter]:
    """The leaves that the file replaces: biases, modules_to_save, tables with trained rows."""
    found: dict[str, dict[Place, np.ndarray]] = defaultdict(dict)
    lows = {pair.place.weight.name for pair in pairs}
    scales = {pair.keys["b_bias"]: pair for pair in pairs if "b_bias" in pair.keys}
    for key, part in reader.parts.items():
        if part.role in ("a", "b", "b_bias"):
            continue
        place = reader.by_name[part.name]
        if part.role == "tokens":
            found[place.path][place] = _with_rows(reader, key, part.module, place)
        elif (
            reader.alone
            and part.role in ("weight", "bias")
            and f"{part.module}.weight" in lows
            and not reader.is_trained(part)
        ):
            continue
        elif not reader.alone and not reader.is_trained(part):
            _check_equal(reader, key, place)
        else:
            reader.check_called(place)
            found[place.path][place] = _value(reader, key, place)
    for key, pair in scales.items():
        place = reader.by_name[f"{pair.place.weight.module}.bias"]
        start = found[place.path].get(place)
        start = _known(reader, place, key) if start is None else start
        more = _layouts.from_torch(reader.read(key), reader.axes(place), place.weight)
        found[place.path][place] = start + more.astype(start.dtype) * np.asarray(pair.scale, start.dtype)
    rows = {part.module for part in reader.parts.values() if part.role == "tokens"}
    for path, slices in found.items():
        of_rows = any(place.weight.module in rows for place in slices)
        # Of rows, PEFT looks for what is tied to the model's embedding, and never for what a head is tied to.
        knows = reader.config.knows_ties
        follows = knows and all(place.first for place in slices) if of_rows else reader.config.tying
        if not follows:
            _check_shared(reader, path, slices, _OF_ROWS if of_rows and not knows else "")
    return {path: _stack(reader, path, slices, dtype) for path, slices in found.items()}


def _check_shared(reader: Reader, path: str, slices: Mapping[Place, np.ndarray], more: str) -> None:
    """PEFT unties a table and a head of which it changes one: here they are one leaf. Of trained rows it keeps ties that it knows of."""
    given = {place.at for place in slices}
    lacking = [place.weight.name for place in reader.places[path] if place.at in given and place not in slices]
    if lacking or (reader.leaves[path].is_tied and all(place.first for place in slices)):
        other = _paths.listing(lacking, 3) if lacking else "those of its other uses, which names does not tell"
        raise ValueError(
            f"'{shown(path)}' is one leaf here, but the adapter replaces only some of its weights in PyTorch, not {other}.\n"
            f"  Give the base a leaf for each.{more}"
        )


_OF_ROWS = (
    " Or, if PEFT's model has a configuration with tie_word_embeddings, which keeps trained tokens tied, but is not in the file: put null\n"
    "  for auto_mapping and its name for base_model_name_or_path in adapter_config.json."
)
_PRECISION = {"bfloat16": 8e-3, "BF16": 8e-3, "float16": 1e-3, "F16": 1e-3}


def _value(reader: Reader, key: str, place: Place) -> np.ndarray:
    axes = reader.axes(place)
    x, wanted = reader.tensors.header[key].shape, _layouts.torch_shape(axes, place.weight)
    if x != wanted:
        raise ValueError(f"'{_files.shown(key)}' has shape {x}; '{shown(place.path)}' {axes.shape} is {wanted} there.")
    return _files.floats(_layouts.from_torch(reader.read(key), axes, place.weight))


def _known(reader: Reader, place: Place, key: str) -> np.ndarray:
    """The base's value at a place."""
    if place.path not in reader.params:
        raise Advised(
            f"'{_files.shown(key)}' needs the value of '{shown(place.path)}' in the base.",
            "Pass the parameters: load(folder, sites, params=params).",
            "params",
        )
    axes = _layouts.axes_of(reader.leaves[place.path])
    return _files.floats(_layouts.at(reader.params[place.path], axes, place.at))


def _check_equal(reader: Reader, key: str, place: Place) -> None:
    """Weights of the base that the file carries must be the base's: an adapter does not replace what it does not say it does."""
    mine, theirs = _known(reader, place, key), _value(reader, key, place)
    # As fine as both are stored: what was trained a little must not pass for rounding.
    base, file = str(np.asarray(reader.params[place.path]).dtype), reader.tensors.header[key].dtype
    precision = max(_PRECISION.get(base, 1e-5), _PRECISION.get(file, 1e-5))
    if mine.shape != theirs.shape or not np.allclose(mine, theirs, rtol=precision, atol=1e-6):
        raise ValueError(
            f"The adapter carries '{_files.shown(key)}', which is not what '{shown(place.path)}' is in the base, and does not list it in "
            "modules_to_save.\n  It was trained on another base, or its vocabulary was changed."
        )


def _with_rows(reader: Reader, key: str, module: str, place: Place) -> np.ndarray:
    """A table in which the trained rows are replaced."""
    table = _known(reader, place, key).copy()
    tokens = reader.config.tokens
    ids = next(
        (i for name, i in tokens.items() if name and (module == name or module.endswith(f".{name}"))),
        tokens.get("", ()),
    )
    rows = _files.floats(reader.read(key))
    if rows.shape != (len(ids), *table.shape[1:]) or max(ids, default=0) >= len(table):
        raise ValueError(
            f"'{_files.shown(key)}' has shape {rows.shape}, "
            f"for {counted(len(ids), 'trained token')} of '{shown(place.path)}' {table.shape}."
        )
    table[list(ids)] = rows
    return table


def _stack(reader: Reader, path: str, slices: Mapping[Place, np.ndarray], dtype: Any) -> FullWeight:
    """A whole leaf out of its slices; those that the file does not have are the base's."""
    several = {place.at: x for place, x in slices.items()}
    for place, x in slices.items():
        if not np.array_equal(x, several[place.at]):
            raise ValueError(f"'{shown(path)}' is one leaf here, but has two values in the adapter.")
    if () in several:
        value = _files.floats(several[()], dtype)
        return whole_of_site(jnp.asarray(value), reader.leaves[path], reader.sites.base)
    for place in reader.places[path]:
        if place.at not in several:
            several[place.at] = _known(reader, place, place.weight.name)
    axes = _layouts.axes_of(reader.leaves[path])
    value = np.zeros(axes.shape, next(iter(several.values())).dtype)
    for index, x in several.items():
        value[_layouts.slice_of(axes, index)] = x
    return whole_of_site(jnp.asarray(_files.floats(value, dtype)), reader.leaves[path], reader.sites.base)


def _placed(lora: dict[str, Adapter], params: Any) -> dict[str, Adapter]:
    where = {} if isinstance(params, Sites) else followed(lora, params)
    return {path: jax.device_put(x, where[path]) if path in where else x for path, x in lora.items()}
