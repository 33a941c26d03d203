"""What ``jlora.sites`` returns: the leaves of a parameter tree that a function uses as weights, and which axes play which role."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora import _paths
from jlora._adapters import Fingerprint, fingerprint
from jlora._discover import Finder
from jlora._seen import Record, SiteUse, Value, leaf, union
from jlora._table import table
from jlora._text import counted, shown
from jlora._trace import check_function, shapes_of, trace_call


@dataclass(frozen=True)
class Site:
    """A leaf of the parameter tree and how the function uses it.

    Attributes:
        path: ``/``-joined keys.
        shape: Of the leaf.
        dtype: Of the leaf.
        kind: ``linear`` (a matrix product), ``conv``, ``lookup`` (rows of a table), several joined by ``+`` (a tied embedding is
            ``linear+lookup``), ``dense`` (a use that needs all of it) or ``unused``; empty where no function told.
        inputs: Axes that a product sums over, or that a lookup picks rows along.
        outputs: Axes that remain; of a leaf without any product the last axis.
        batch: Axes along which every slice is a weight of its own: layers of a scan, experts.
        uses: Every use found.
        head: Whether it is an output head: an output of the function depends on other weights only through it.
        window: Those of ``inputs`` that are the kernel spatial axes of a convolution, in the order in which its input has them.
        groups: Of a grouped convolution, the number of its groups; 0 of a transposed one, whose input is dilated, and below zero if that
            is in groups. One of stride 1 dilates nothing, and cannot be told from a plain one with more padding.
        dilated: Of a convolution, whether its window has gaps: ``rhs_dilation`` along more than one place.
        reason: Why the leaf cannot be adapted; empty if it can.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    kind: str
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    uses: tuple[SiteUse, ...] = ()
    head: bool = False
    reason: str = ""
    window: tuple[int, ...] = ()
    groups: int = 1
    dilated: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether no product or lookup tells what its axes are."""
        return self.kind in ("", "dense", "unused")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of uses of a leaf that can be adapted, of which an adapter may be for one only."""
        return () if self.is_plain else tuple(self.kind.split("+"))

    @property
    def is_tied(self) -> bool:
        """Whether rows of the leaf are looked up, and something multiplies it: a table that is the output head as well."""
        return "lookup" in self.kinds and len(self.kinds) > 1

    @property
    def size(self) -> int:
        """Number of parameters of the leaf."""
        return prod(self.shape)

    @property
    def max_rank(self) -> int:
        """The smaller side of each slice as a matrix: a higher rank adds nothing."""
        return min(prod(self.shape[d] for d in self.inputs), prod(self.shape[d] for d in self.outputs))


class Sites(Mapping[str, Site]):
    """The leaves that can be adapted, by path, in the order of the tree. ``print`` shows a table, also of those that cannot.

    Attributes:
        skipped: The other leaves, by path; each ``Site.reason`` says why it cannot be adapted.
        base: Fingerprint of the parameter tree.
    """

    def __init__(self, sites: Sequence[Site], base: Fingerprint):
        self._sites = {site.path: site for site in sites if not site.reason}
        self.skipped: Mapping[str, Site] = {site.path: site for site in sites if site.reason}
        self.base = base

    def __getitem__(self, path: str) -> Site:
        if path in self._sites:
            return self._sites[path]
        if path in self.skipped:
            raise KeyError(f"'{shown(path)}' cannot be adapted: {self.skipped[path].reason}.")
        near = _paths.nearest(path, [*self._sites, *self.skipped])
        raise KeyError(f"No leaf has the path '{shown(path)}'; nearest: {', '.join(near)}.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __contains__(self, path: object) -> bool:
        return path in self._sites

    def __repr__(self) -> str:
        return f"Sites({len(self)} that can be adapted, {len(self.skipped)} that cannot)"

    def __str__(self) -> str:
        def groups(s: Site) -> tuple[tuple[int, ...], ...]:
            return s.inputs, s.outputs, s.batch

        rows = [
            (s.path, _shape(s.shape), s.kind + " (head)" * s.head, *(_axes(s, g) for g in groups(s)), f"{s.size:,}")
            for s in self.values()
        ]
        total = sum(s.size for s in self.values())
        text = table(("path", "shape", "use", "inputs", "outputs", "batch", "parameters"), rows, right=(6,))
        text += f"\n{counted(len(self), 'weight')} can be adapted, {counted(total, 'parameter')}."
        if self.skipped:
            # What looks like a weight first: biases and gains are many, and nobody misses them.
            ordered = sorted(self.skipped.values(), key=lambda s: (-min(sum(n > 1 for n in s.shape), 2), s.path))
            rest = [(s.path, _shape(s.shape), s.reason) for s in ordered]
            text += f"\n\n{table(('path', 'shape', 'cannot be adapted because'), rest)}"
        return text


RETURNED = "the function returns it; in Flax, name what may change: mutable=['batch_stats'], not mutable=True"


def sites(fn: Callable[..., Any], params: Any, /, *args: Any, **kwargs: Any) -> Sites:
    """Finds the weights of ``fn(params, *args, **kwargs)`` that can be adapted, and how each leaf is used.

    Args:
        fn: Any JAX function whose first argument is a tree of parameters, such as a Flax module's ``apply``.
        params: Its parameters; ``jax.ShapeDtypeStruct``s will do, since nothing is computed.
        *args: Arguments of one call. Arrays (or ``ShapeDtypeStruct``s) are traced; flags, strings and Python numbers stay as they are.
        **kwargs: The same, by keyword.

    Returns:
        A mapping from path to ``Site``.

    Raises:
        TypeError: ``fn`` is not callable, or a leaf of ``params`` is not an array.
        ValueError: ``params`` is empty.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> def model(params, x):
        ...     return jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"]
        >>> params = {"up": jnp.ones((3, 5)), "down": jnp.ones((5, 2)), "bias": jnp.ones(2)}
        >>> found = jlora.sites(model, params, jnp.ones((7, 3)))
        >>> [(site.path, site.inputs, site.outputs, site.head) for site in found.values()]
        [('down', (0,), (1,), True), ('up', (0,), (1,), False)]
        >>> found.skipped["bias"].kind
        'dense'
    """
    check_function(fn, "sites(fn, params, *args)")
    call = trace_call(fn, _paths.flatten(params), args, shapes_of(fn) | kwargs)
    finder = Finder(call.data)
    leaves = [leaf(path, x) for path, x in zip(call.paths, call.leaves, strict=True)]
    outs = finder.run(call.program, [*leaves, *(Value() for _ in call.arrays)])
    last = {source for out in outs if len(out.reach) == 1 for source in out.reach} - finder.fed
    heads = {path for source in last if not source.lookup for path in source.paths}
    for out in outs:
        finder.dense(out, RETURNED)
    found = [
        _site(p, np.shape(x), lax.dtype(x), finder, p in heads) for p, x in zip(call.paths, call.leaves, strict=True)
    ]
    return Sites(found, fingerprint(call.paths, call.leaves))


def _site(path: str, shape: tuple[int, ...], dtype: np.dtype, finder: Finder, head: bool) -> Site:
    records = list(finder.records.get(path, {}).values())
    uses = tuple(record.use._replace(inputs=tuple(sorted(record.inputs))) for record in records)
    kind = "+".join(sorted({use.kind for use in uses} - {"dense"}))
    if any(use.kind == "dense" for use in uses) or not uses:
        kind = "dense" if uses else "unused"
    linear = [record for record in records if record.use.kind != "dense"]
    roles = _roles(len(shape), linear) if linear else ((), (), ())
    reason = _reason(path, shape, dtype, records, roles, finder)
    if not (roles[0] and roles[1]):  # no product tells: with allow_dense any split into two sides will do
        axes = tuple(range(len(shape)))
        roles = axes[:-1], axes[-1:], ()
    inputs, outputs, batch = roles
    window = tuple(dict.fromkeys(d for record in linear for d in record.window if d in inputs))
    groups = {record.groups for record in linear} or {1}
    return Site(
        path,
        tuple(shape),
        dtype,
        kind,
        inputs,
        outputs,
        batch,
        uses,
        head,
        reason,
        window,
        min(groups) if min(groups) < 1 else max(groups),
        any(record.dilated for record in linear),
    )


def _roles(ndim: int, records: list[Record]) -> tuple[tuple[int, ...], ...]:
    """Which axes are inputs, outputs and batch. Any split into inputs and outputs gives right results; the first use names it."""
    lead = next((r for r in records if r.use.kind == "lookup"), records[0])
    summed = union(r.inputs for r in records)
    batch = records[0].batch.intersection(*(r.batch for r in records)) - summed
    inputs = (lead.inputs | (lead.batch & summed)) - batch
    outputs = frozenset(range(ndim)) - inputs - batch
    if not outputs:
        # What a product matches with batch axes are the outputs; or the columns, where single ones were taken: all of them together.
        outputs = batch - frozenset.intersection(*(r.picked for r in records)) or batch
        batch -= outputs
    return tuple(tuple(sorted(group)) for group in (inputs, outputs, batch))


def _reason(path: str, shape: Sequence[int], dtype: Any, records: list[Record], roles: Any, finder: Finder) -> str:
    if not jnp.issubdtype(dtype, jnp.inexact):
        return f"it holds {dtype}, not floats"
    if 0 in shape:
        return "it is empty"
    if not records:
        return "the function does not use it"
    dense = [r.use for r in records if r.use.kind == "dense"]
    if any(use.operation == RETURNED for use in dense):
        return RETURNED
    if dense:
        more = f" and {len(dense) - 1} more" if len(dense) > 1 else ""
        note = dense[0].note or "all of it is needed by {}"
        return note.format(f"{dense[0].operation} at {dense[0].where}{more}")
    for group, place in finder.merged.get(path, {}).items():
        if not any(group - set(roles[2]) <= set(role) for role in roles[:2]):
            return f"{place} ties an input axis to an output axis"
    inputs, outputs, _ = roles
    if not inputs or not outputs:
        missing = "output" if inputs else "input"
        return f"it is not a matrix: {records[0].use.operation} at {records[0].use.where} leaves it no {missing} axis"
    return ""


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _axes(site: Site, axes: Sequence[int]) -> str:
    return " ".join(f"{d}:{site.shape[d]}" for d in axes) or "-"
