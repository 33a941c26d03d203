"""What ``jlora.algebra`` takes: adapters of one base, numbers in range, a method with what it needs."""

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _paths
from jlora._adapters import Adapter, FullWeight, LowRank
from jlora._advice import Advised
from jlora._init import as_key
from jlora._text import counted, shown
from jlora._wrap import check_base, check_lora

Lora = Mapping[str, Adapter]

METHODS = {"concat": (), "svd": ("rank",), "ties": ("rank", "density"), "dare": ("rank", "density", "key")}
"""The methods of ``combine``, and the arguments that only some of them have."""


def check(lora: Any) -> None:
    check_lora(lora)
    for path, x in lora.items():
        if not isinstance(x, LowRank | FullWeight):
            raise TypeError(
                f"jlora.algebra knows LowRank and FullWeight adapters.\n  got: {type(x).__name__} for '{shown(path)}'\n"
                "  Leave it out: {path: x for path, x in lora.items() if isinstance(x, jlora.LowRank)}."
            )
        _ = x.shape  # raises for stacked factors


def several(loras: Any, weights: Any) -> tuple[list[Lora], list[Any]]:
    """The adapters, if they are of one base and agree on the axes of their leaves, and their weights."""
    if isinstance(loras, Mapping) or not isinstance(loras, Iterable):
        raise TypeError(f"loras must be a sequence of adapters.\n  got: {type(loras).__name__}")
    loras = list(loras)
    if not loras:
        raise ValueError("There is no adapter to combine.\n  Pass one or more: combine([one, two]).")
    for lora in loras:
        check(lora)
    weights = [1.0] * len(loras) if weights is None else list(weights)
    if len(weights) != len(loras):
        raise ValueError(
            f"There must be one weight for each adapter.\n  got: {counted(len(weights), 'weight')}, {counted(len(loras), 'adapter')}"
        )
    for w in weights:
        if not _is_number(w):
            raise ValueError(f"A weight must be one finite number.\n  got: {w!r}")
    seen: dict[str, Adapter] = {}
    loras = _of_one_base(loras)
    for path, x in ((path, x) for lora in loras for path, x in lora.items()):
        before = seen.setdefault(path, x)
        if x.shape != before.shape:
            raise ValueError(f"The adapters are for different shapes of '{shown(path)}': {before.shape} and {x.shape}.")
        if x.base.partial and len(x.shape) > 1 and isinstance(x, LowRank) != isinstance(before, LowRank):
            raise ValueError(
                f"'{shown(path)}' has factors in one adapter and is trained outright in another: which way it lies is not in "
                f"PEFT's files.\n"
                "  Load both with their base: jlora.peft.load(folder, sites)."
            )
        if isinstance(x, LowRank) and isinstance(before, LowRank) and _roles(x) != _roles(before):
            raise ValueError(
                f"The adapters split '{shown(path)}' differently: {_spelled(before)}, and {_spelled(x)}.\n"
                "  Make both with the sites of one function."
            )
        if getattr(x, "only", "") != getattr(before, "only", ""):
            raise ValueError(
                f"The adapters are for different uses of '{shown(path)}': {_only(before)}, and {_only(x)}.\n"
                "  No adapter has an update for each: keep them apart, or untie the model."
            )
        if isinstance(x, LowRank):
            seen[path] = x
    return loras, weights


def _of_one_base(loras: list[Lora]) -> list[Lora]:
    """The adapters, all of the base that they tell together."""
    first, *others = dict.fromkeys(x.base for lora in loras for x in lora.values())
    for other in others:
        difference = first.difference(other)
        if difference:
            raise ValueError(
                f"The adapters belong to different bases: {difference}.\n"
                "  Only updates of one base can be combined or compared."
            )
        first = first.joined(other)
    if not others:
        return loras
    return [{path: replace(x, base=first) for path, x in lora.items()} for lora in loras]  # type: ignore[type-var]


def _is_number(w: Any) -> bool:
    if isinstance(w, jax.core.Tracer):
        return w.ndim == 0 and bool(jnp.issubdtype(w.dtype, jnp.number))
    real = isinstance(w, numbers.Real) or (isinstance(w, jax.Array | np.ndarray) and w.ndim == 0)
    return real and bool(np.isfinite(w))


def _roles(x: LowRank) -> tuple[tuple[int, ...], ...]:
    return x.inputs, x.outputs, x.batch


def _only(x: Adapter) -> str:
    return f"{x.only} only" if isinstance(x, LowRank) and x.only else "all"


def _spelled(x: LowRank) -> str:
    return f"inputs {x.inputs}, outputs {x.outputs}, batch {x.batch}"


def values_of(loras: Sequence[Lora], params: Any, call: str) -> dict[str, Any]:
    """The base's leaves by path, empty if no adapter needs them."""
    outright = [path for lora in loras for path, x in lora.items() if isinstance(x, FullWeight)]
    if not outright:
        return {}
    if params is None:
        raise Advised(
            f"'{shown(outright[0])}' is trained outright: its update is its value less the base's.",
            f"Pass the base: {call}.",
            "params",
        )
    paths, leaves, _ = _paths.flatten(params)
    for lora in loras:
        check_base(lora, paths, leaves)
    return dict(zip(paths, leaves, strict=True))


def check_share(name: str, share: Any) -> None:
    if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 < float(share) <= 1:
        raise ValueError(f"{name} must be a number above 0, up to 1.\n  got: {share!r}")


def check_rank(rank: Any) -> int:
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or int(rank) < 1:
        raise ValueError(f"A rank must be a whole number from 1 up.\n  got: {rank!r}")
    return int(rank)


def check_method(method: Any, rank: Any, density: Any, key: Any) -> Any:
    """The key, if the method takes one; raises where a number is missing, or would have no effect."""
    if method not in METHODS:
        raise ValueError(f"method must be {_listed(METHODS)}.\n  got: {method!r}")
    takes = METHODS[method]
    for name, value in (("rank", rank), ("density", density), ("key", key)):
        if value is not None and name not in takes:
            others = _listed([other for other, names in METHODS.items() if name in names])
            raise ValueError(
                f"The method {method!r} has no use for {name}.\n  Leave it out, or use the method {others}."
            )
    if rank is not None:
        check_rank(rank)
    if "density" in takes:
        if density is None:
            raise ValueError(f"The method {method!r} needs a density, the share of entries to keep: density=0.5.")
        check_share("density", density)
    return as_key(key, "The method 'dare' needs key=, a PRNG key.") if "key" in takes else None


def _listed(names: Iterable[str]) -> str:
    *names, last = map(repr, names)
    return f"{', '.join(names)} or {last}" if names else last
