"""What a PEFT adapter alone tells of its base: the weights that it adapts, under PyTorch's names and in PyTorch's layout."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jlora import _files, _peft_config
from jlora._adapters import Fingerprint
from jlora._advice import Advised
from jlora._peft_declared import IN_PROJ
from jlora._peft_files import Files
from jlora._peft_keys import ends, joined, parts_of
from jlora._sites import Site, Sites
from jlora._text import counted

UNKNOWN = "the adapter replaces it"
_CHANGED = {"tokens": "weight", "b_bias": "bias"}
"""Of what a file holds beside factors and whole weights, the parameter that it changes."""


def sites_of(files: Files, params: Mapping[str, Any], without: Collection[str] = ()) -> Sites:
    """Sites of the base that an adapter is for, as far as the adapter tells.

    Args:
        files: Of the adapter.
        params: Values of the base by PyTorch's names, where they are known.
        without: Keys of the file to leave out.

    Raises:
        ValueError: a module has several adapted parameters, which the file does not name.
    """
    config, tensors = files.config, files.tensors
    parts = parts_of([key for key in tensors.header if key not in without], config.saved)
    adapted = {part.module for part in parts.values() if part.role == "a"}
    found: dict[str, Site] = {}
    pairs: dict[tuple[str, int], dict[str, tuple[str, tuple[int, ...]]]] = defaultdict(dict)
    for key, part in parts.items():
        shape = tensors.header[key].shape
        if part.role in ("a", "b"):
            pairs[part.module, part.depth][part.role] = key, shape
        elif part.role == "tokens" and f"{part.module}.weight" not in params:
            raise Advised(
                f"'{_files.shown(key)}' replaces rows of a table, which is not in the file.",
                "Load it with its base: jlora.peft.load(folder, sites, params=params).",
                "params",
            )
        elif not (part.role == "weight" and part.module in adapted):
            name = joined(part.module, _CHANGED.get(part.role, part.role))
            shape = np.shape(params[name]) if part.role == "tokens" else shape
            found[name] = Site(name, shape, np.dtype(np.float32), "dense", reason=UNKNOWN)
    listed: dict[str, list[str]] = defaultdict(list)  # parameters of the configuration, by the module that holds them
    for name in config.targets.parameters:
        listed[name.rpartition(".")[0]].append(name.rpartition(".")[2])
    holders = {module for part in parts.values() for module in part.around}
    for (module, depth), pair in pairs.items():
        if set(pair) != {"a", "b"}:
            raise ValueError(f"The adapter is incomplete: '{_files.shown(module)}' has only one factor.")
        names = [last for end in ends(module) for last in listed.get(end, ())[:2]]
        site = _site(config, module, depth, names, pair["a"], pair["b"], module in holders)
        if site.path in found:
            raise ValueError(
                f"Several parameters of '{_files.shown(module)}' are adapted, and the file does not name them.\n"
                "  Load it with its base: jlora.peft.load(folder, sites, names=...)."
            )
        found[site.path] = site
    ordered = [found[path] for path in sorted(found)]
    return Sites(ordered, Fingerprint(((s.path, s.shape, s.dtype) for s in ordered), partial=True))


def _site(
    config: _peft_config.Config,
    module: str,
    depth: int,
    several: list[str],
    a: tuple[str, tuple[int, ...]],
    b: tuple[str, tuple[int, ...]],
    holds: bool,
) -> Site:
    """The site that a pair is for: of ``several``, which the configuration lists for its module, if that is one parameter.

    ``holds`` tells whether the module holds others that the adapter changes.
    """
    (key, x), (_, y) = a, b
    dtype = np.dtype(np.float32)
    if len(x) < 2 or len(y) != len(x):
        raise ValueError(f"The factors of '{_files.shown(module)}' have shapes {x} and {y}.")
    if "lora_embedding" in key:
        return Site(f"{module}.weight", (x[1], y[0]), dtype, "lookup", (0,), (1,))
    if len(x) > 2:
        window = tuple(range(2, len(x)))
        return Site(f"{module}.weight", (y[0], *x[1:]), dtype, "conv", (1, *window), (0,), window=window)
    if not several and not depth:
        # Of what PEFT wraps as a module, only nn.MultiheadAttention has modules inside.
        return Site(f"{module}.{IN_PROJ if holds else 'weight'}", (y[0], x[1]), dtype, "linear", (1,), (0,))
    name = f"{module}.{several[0]}" if len(several) == 1 else f"{module}.*"
    rank = config.rank_of(name)
    if x[0] % rank:
        raise ValueError(f"'{_files.shown(key)}' has {counted(x[0], 'row')}, which cannot be experts of rank {rank}.")
    if x[0] == rank:
        return Site(name, (y[0], x[1]), dtype, "linear", (1,), (0,))
    return Site(name, (x[0] // rank, y[0], x[1]), dtype, "linear", (2,), (1,), (0,))
