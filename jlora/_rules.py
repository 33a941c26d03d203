"""Rules: which leaves to train, and how. The first rule that matches a leaf wins; one that matches nothing raises."""

import math
import numbers
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jlora import _paths
from jlora._sites import Site, Sites
from jlora._text import counted, shown

Targets = str | Callable[[Site], bool] | Sequence[str | Callable[[Site], bool]]
InitA = Literal["uniform", "normal"] | Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

Only = Literal["lookup", "linear", "conv"]

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoRA:
    r"""Low-rank updates $W + s\,A B$ of the leaves that ``targets`` names.

    Attributes:
        rank: $r$, the inner dimension of each update, 16 unless you say another; at most the smaller side of the weight.
        alpha: The update is scaled by ``alpha / rank``; 32 unless you say another, also with another rank.
        targets: ``"all-linear"`` (every weight of a matrix product or convolution, but the output head), a regular expression that
            must match a whole path, a predicate on ``Site``, or several of these.
        rslora: Scale by ``alpha / sqrt(rank)`` instead, which keeps the update's size the same at high ranks (arXiv:2312.03732).
        dropout: Rate of dropout on what enters the adapter branch, when ``apply`` is given a ``dropout_key``.
        dtype: Of the factors. By default fp32, or the leaf's dtype if that is wider: in bf16 the small steps of an optimiser vanish.
        init_a: ``"uniform"`` in ±1/sqrt(n), ``"normal"`` with standard deviation 1/sqrt(n), n being the number of inputs that a
            product sums over (1 for a lookup), or a function ``(key, shape, dtype) -> array``. B starts at zero.
        allow_dense: Also take leaves that some operation needs whole; ``wrap(fn, dense="allow")`` then runs them.
        only: Adapt one kind of use of each leaf, ``"lookup"``, ``"linear"`` or ``"conv"`` as in ``Site.kind``: of a table that is also the
            output head the one and not the other. Such an adapter cannot be merged, since the base has one leaf for both.

    Example:
        >>> import jlora
        >>> jlora.LoRA(rank=8, alpha=16, targets=".*/(query|value)/kernel").scale
        2.0

    References:
        Hu et al., 2021, arXiv:2106.09685, section 4.1.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: Targets = ALL_LINEAR
    rslora: bool = False
    dropout: float = 0.0
    dtype: Any = None
    init_a: InitA = "uniform"
    allow_dense: bool = False
    only: Only | None = None
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        _check(_is_int(self.rank) and self.rank >= 1, "rank", self.rank, "a whole number from 1 up")
        _check(_is_real(self.alpha) and 0 < self.alpha < math.inf, "alpha", self.alpha, "a finite number above 0")
        _check(
            _is_real(self.dropout) and 0 <= self.dropout < 1,
            "dropout",
            self.dropout,
            "a rate from 0 up to, not including, 1",
        )
        _check(
            callable(self.init_a) or self.init_a in ("uniform", "normal"),
            "init_a",
            self.init_a,
            "'uniform', 'normal' or a function",
        )
        kinds = get_args(Only)
        _check(self.only in (None, *kinds), "only", self.only, f"{', '.join(map(repr, kinds))} or None")
        dtype = None if self.dtype is None else jnp.dtype(self.dtype)
        _check(dtype is None or jnp.issubdtype(dtype, jnp.inexact), "dtype", self.dtype, "a floating dtype")
        scale = float(self.alpha) / (math.sqrt(self.rank) if self.rslora else self.rank)
        for name, value in (("rank", int(self.rank)), ("alpha", float(self.alpha)), ("dtype", dtype), ("scale", scale)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "targets", _targets(self.targets, "LoRA"))


@dataclass(frozen=True, kw_only=True)
class Full:
    """Trains the leaves that ``targets`` names outright: a new head, biases, norms.

    Attributes:
        targets: A regular expression that must match a whole path, a predicate on ``Site``, or several of these.
        dtype: Of the trained copy; by default fp32, or the leaf's dtype if that is wider.

    Example:
        >>> import jlora
        >>> rules = [jlora.Full(targets="head/.*"), jlora.LoRA(rank=8, targets="all-linear")]
    """

    targets: Targets
    dtype: Any = None

    def __post_init__(self) -> None:
        dtype = None if self.dtype is None else jnp.dtype(self.dtype)
        _check(dtype is None or jnp.issubdtype(dtype, jnp.inexact), "dtype", self.dtype, "a floating dtype", "Full")
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "targets", _targets(self.targets, "Full"))


Rule = LoRA | Full


def assign(rules: Rule | Iterable[Rule], sites: Sites) -> dict[str, tuple[Rule, Site]]:
    """Gives each leaf the first rule that matches it.

    Raises:
        TypeError: something in ``rules`` is not a rule.
        ValueError: a target matches nothing, or only leaves that earlier rules took; a leaf that cannot be adapted is named; a rank is
            above the smaller side of its weight.
    """
    listed: list[Any] = list(rules) if isinstance(rules, Iterable) else [rules]
    if not all(isinstance(rule, Rule) for rule in listed):
        raise TypeError(f"rules must be a LoRA or Full rule, or a list of them.\n  got: {rules!r}")
    if not listed:
        raise ValueError(
            "There is no rule: nothing would be trained.\n  Pass for example LoRA(rank=16, targets='all-linear')."
        )
    taken: dict[str, tuple[Rule, Site]] = {}
    for rule in listed:
        found = {site.path: site for target in _several(rule.targets) for site in _matches(rule, target, sites)}
        new = {path: (rule, site) for path, site in found.items() if path not in taken}
        if not new:
            raise ValueError(
                f"Earlier rules took every match of {_name(rule)}: it would have no effect.\n  matches: {_paths.listing(list(found))}"
            )
        taken |= new
    over = [(site, rule.rank) for rule, site in taken.values() if isinstance(rule, LoRA) and rule.rank > site.max_rank]
    if over:
        site, rank = over[0]
        more = f" and {len(over) - 1} more" if len(over) > 1 else ""
        raise ValueError(
            f"Rank {rank} is above {site.max_rank}, the smaller side of '{shown(site.path)}' {site.shape}{more}.\n"
            f"  Lower the rank, or give this weight a rule of its own before the others: LoRA(rank={site.max_rank}, targets={site.path!r})."
        )
    return taken


def _matches(rule: Rule, target: Any, sites: Sites) -> list[Site]:
    everything = {**sites, **sites.skipped}
    if callable(target):
        pool = everything.values() if isinstance(rule, Full) or rule.allow_dense else sites.values()
        found = [site for site in pool if target(site)]
        if not found:
            raise ValueError(
                f"The predicate {getattr(target, '__qualname__', target)!r} of {_name(rule)} accepts none of {counted(len(pool), 'leaf')}."
            )
    elif target == ALL_LINEAR:
        found = [site for site in sites.values() if ("linear" in site.kind or "conv" in site.kind) and not site.head]
        if not found:
            raise ValueError(f"No weight matches target 'all-linear'.{_left_out(sites)}")
    else:
        found = [site for path, site in everything.items() if target == path or _paths.match(target, path)]
        if not found:
            useless = [path for path, site in everything.items() if _objection(rule, site)]
            usable = [path for path in everything if path not in set(useless)]
            raise ValueError(f"No parameter matches target {target!r}.\n  {_advice(target, usable, useless)}")
    objections = [objection for site in found if (objection := _objection(rule, site))]
    if objections:
        others = [site.path for site in found if not _objection(rule, site)]
        hint = f"\n  Of its other matches it can take {_paths.listing(others, 4)}." if others else ""
        raise ValueError(objections[0] + hint)
    return found


def _left_out(sites: Sites) -> str:
    """Why ``"all-linear"`` may have found nothing: what looks like a weight, and is not in it."""
    heads = [site.path for site in sites.values() if site.head]
    blocked = [site for site in sites.skipped.values() if len(site.shape) > 1 and site.kind == "dense"]
    hints = [f"The output head is left out: name it to adapt it, targets={heads[0]!r}."] if heads else []
    if blocked:
        site, more = blocked[0], f" ({len(blocked)} such leaves)" if len(blocked) > 1 else ""
        hints.append(f"'{shown(site.path)}' {site.shape} is left out: {site.reason}{more}.")
    return "".join(f"\n  {hint}" for hint in hints or ["print(sites) shows how each leaf is used."])


def _advice(target: str, usable: list[str], useless: list[str]) -> str:
    """What a target that matches nothing may have meant, of the leaves that its rule can use, before those that it cannot."""
    if target.replace("_", "-").lower() == ALL_LINEAR:
        return f"Did you mean {ALL_LINEAR!r}?"
    partly, also = ([path for path in paths if re.search(target, path, re.DOTALL)] for paths in (usable, useless))
    if partly or also:
        rest = f"{_paths.listing(also, 4)}, which the rule cannot train" if also else ""
        found = ", and ".join([_paths.listing(partly, 4)] * bool(partly) + [rest] * bool(rest))
        return f"A target must match the whole path: '.*{target}.*' would match {found}."
    near = ", ".join(_paths.nearest(target, usable or useless))
    return f"nearest: {near}\n  A target must match the whole path; '.*' stands for any beginning or end."


def _objection(rule: Rule, site: Site) -> str | None:
    """Why a rule cannot train a leaf, and what to do."""
    if site.kind == "unused" or not jnp.issubdtype(site.dtype, jnp.inexact):
        return f"Training '{shown(site.path)}' would have no effect: {site.reason}.\n  Leave it out of the targets of {_name(rule)}."
    if isinstance(rule, LoRA) and site.reason and (not rule.allow_dense or len(site.shape) < 2):
        way_out = (
            "train it outright with a Full rule"
            if len(site.shape) < 2
            else "train it with a Full rule, or accept a full-size gradient with LoRA(allow_dense=True) and wrap(fn, dense='allow')"
        )
        advice = f"Leave it out of the targets of {_name(rule)}, or {way_out}."
        return f"'{shown(site.path)}' {site.shape} cannot be adapted: {site.reason}.\n  {advice}"
    if isinstance(rule, LoRA) and rule.only and rule.only not in site.kinds:
        return (
            f"'{shown(site.path)}' {site.shape} has no use of the kind {rule.only!r}: it is used as {site.kind or 'nothing told'}.\n"
            f"  Leave it out of the targets of {_name(rule)}, or leave out only={rule.only!r}."
        )
    return None


def _targets(targets: Any, rule: str) -> Any:
    several = isinstance(targets, list | tuple | set | frozenset)
    listed = (
        sorted(targets, key=repr) if isinstance(targets, set | frozenset) else list(targets) if several else [targets]
    )
    if not listed:
        raise ValueError(f"The targets of {rule} are empty: it would match nothing.")
    for target in listed:
        if callable(target):
            continue
        if not isinstance(target, str):
            raise TypeError(
                f"A target of {rule} must be 'all-linear', a regular expression or a predicate.\n  got: {target!r}"
            )
        try:
            re.compile(target)
        except re.error as error:
            hint = f"\n  Did you mean {'.' + target!r}?" if target.startswith("*") else ""
            raise ValueError(f"The target {target!r} of {rule} is not a regular expression: {error}.{hint}") from None
    return tuple(listed) if several else targets


def _several(targets: Any) -> tuple[Any, ...]:
    return targets if isinstance(targets, tuple) else (targets,)


def _name(rule: Rule) -> str:
    shown = ", ".join(getattr(t, "__qualname__", None) or repr(t) for t in _several(rule.targets))
    shown = f"[{shown}]" if isinstance(rule.targets, tuple) else shown
    return f"{type(rule).__name__}(targets={shown})"


def _check(ok: bool, name: str, got: Any, wanted: str, rule: str = "LoRA") -> None:
    if not ok:
        raise ValueError(f"{rule}({name}=...) must be {wanted}.\n  got: {got!r}")


def _is_int(x: Any) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _is_real(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)
