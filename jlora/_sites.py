"""Discovery: which leaves of a parameter tree a function uses as weights, found by an abstract run of its program.

The run is the interpreter's with another environment. A value is "a view of leaf P, whose axes run along these axes of P", or an
activation; a product that meets such a view records which axes it sums over. Nothing is computed and no name is looked at.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora import _jax, _paths
from jlora._adapters import Fingerprint, fingerprint
from jlora._primitives import USES, VIEWS, gain_axes, picked
from jlora._table import table
from jlora._trace import trace_call

Axes = frozenset[int]
NONE: Axes = frozenset()


class SiteUse(NamedTuple):
    """One use of a leaf: ``kind`` is ``linear``, ``conv``, ``lookup`` or ``dense``; ``operation`` the primitive, ``where`` the source line."""

    kind: str
    operation: str
    where: str


@dataclass(frozen=True)
class Site:
    """A leaf of the parameter tree and how the function uses it.

    Attributes:
        path: ``/``-joined keys.
        shape: Of the leaf.
        dtype: Of the leaf.
        kind: ``linear`` (a matrix product), ``conv``, ``lookup`` (rows of a table), several joined by ``+`` (a tied embedding is
            ``linear+lookup``), ``dense`` (a use that needs all of it) or ``unused``.
        inputs: Axes that a product sums over, or that a lookup picks rows along.
        outputs: Axes that remain.
        batch: Axes along which every slice is a weight of its own: layers of a scan, experts.
        uses: Every use found.
        head: Whether it is an output head: an output of the function depends on other weights only through it.
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
            raise KeyError(f"'{path}' cannot be adapted: {self.skipped[path].reason}.")
        raise KeyError(f"No leaf has the path '{path}'; nearest: {', '.join(_paths.nearest(path, [*self._sites, *self.skipped]))}.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __contains__(self, path: object) -> bool:
        return path in self._sites

    def __repr__(self) -> str:
        return f"Sites({len(self)} that can be adapted, {len(self.skipped)} that cannot)"

    def __str__(self) -> str:
        rows = [
            (s.path, _shape(s.shape), s.kind + (" (head)" if s.head else ""), *(_axes(s, g) for g in (s.inputs, s.outputs, s.batch)), f"{s.size:,}")
            for s in self.values()
        ]
        total = sum(s.size for s in self.values())
        text = table(("path", "shape", "use", "inputs", "outputs", "batch", "parameters"), rows, right=(6,))
        text += f"\n{len(self)} weights can be adapted, {total:,} parameters."
        if self.skipped:
            rest = [(s.path, _shape(s.shape), s.reason) for s in self.skipped.values()]
            text += f"\n\n{table(('path', 'shape', 'cannot be adapted because'), rest)}"
        return text


def sites(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Sites:
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
    if not callable(fn):
        raise TypeError(f"sites takes the function first: sites(fn, params, *args).\n  got: {type(fn).__name__} as fn")
    call = trace_call(fn, params, args, kwargs)
    finder = _Finder()
    leaves = [_leaf(path, leaf) for path, leaf in zip(call.paths, call.leaves, strict=True)]
    outs = finder.run(call.program, [*leaves, *(Value() for _ in call.arrays)])
    last = {source for out in outs if len(out.reach) == 1 for source in out.reach} - finder.fed
    heads = {source.path for source in last if not source.lookup}
    for out in outs:
        finder.dense(out, "being returned")
    found = [_site(p, np.shape(x), lax.dtype(x), finder, p in heads) for p, x in zip(call.paths, call.leaves, strict=True)]
    return Sites(found, fingerprint(call.paths, call.leaves))


class Seen(NamedTuple):
    """A view of a leaf: for each axis of the value the axes of the leaf it runs along, and those along which slices were picked."""

    path: str
    axes: tuple[Axes, ...]
    shape: tuple[int, ...]
    picked: Axes = NONE
    rows: bool = False  # picked by a gather: if nothing multiplies the rest, they were rows of a table


class Source(NamedTuple):
    """What an activation came out of last: a product with the leaf at ``path``, or a lookup in it."""

    path: str
    lookup: bool


class Value(NamedTuple):
    """A value of the abstract run: a view of a leaf or an activation, and the uses of leaves it depends on with no other between."""

    view: Seen | None = None
    reach: frozenset[Source] = frozenset()


class _Record(NamedTuple):
    use: SiteUse
    inputs: Axes
    batch: Axes


def _leaf(path: str, leaf: Any) -> Value:
    shape = np.shape(leaf)
    if not jnp.issubdtype(lax.dtype(leaf), jnp.inexact):
        return Value()
    return Value(Seen(path, tuple(frozenset([d]) for d in range(len(shape))), shape))


class _Finder:
    """The abstract run, and what it found: records of uses, groups of axes that must play one role, and leaves that feed others."""

    def __init__(self) -> None:
        self.records: dict[str, dict[Any, _Record]] = {}
        self.merged: dict[str, dict[Axes, str]] = {}
        self.fed: set[Source] = set()
        self.within: list[Any] = []  # the equation at hand and those around it

    def run(self, program: _jax.Program, args: Sequence[Value]) -> list[Value]:
        jaxpr, consts = program
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*(Value() for _ in consts), *args), strict=True))

        def read(atom: Any) -> Value:
            return Value() if _jax.is_literal(atom) else env[atom]

        for eqn in jaxpr.eqns:
            self.within.append(eqn)
            env.update(zip(eqn.outvars, self.step(eqn, [read(v) for v in eqn.invars]), strict=True))
            self.within.pop()
        return [read(v) for v in jaxpr.outvars]

    def step(self, eqn: Any, values: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        if name in _BODIES:
            return _BODIES[name](self, eqn, values)
        positions = [i for i, v in enumerate(values) if v.view is not None]
        if positions and name in USES:
            return self.product(eqn, values, positions)
        for i in positions if name == "mul" else positions[:1] if positions[:1] == [0] else ():
            out = self.view(eqn, values, i) if name in VIEWS else None
            if out is not None:
                for j in positions:
                    if j != i:
                        self.dense(values[j], name)
                return out
        for i in positions:
            self.dense(values[i], name)
        return [Value(None, _reach(values))] * len(eqn.outvars)

    def product(self, eqn: Any, values: list[Value], positions: list[int]) -> list[Value]:
        """A product with a weight. Where two leaves meet, the one on the right is the weight, as in ``x @ w``."""
        name, position = eqn.primitive.name, positions[-1]
        for i in positions[:-1]:
            self.dense(values[i], f"{name} with another weight")
        seen = values[position].view
        use = USES[name](eqn, position, len(seen.axes)) if seen is not None else None
        if seen is None or use is None:
            self.dense(values[position], name)
            return [Value(None, _reach(values))]
        inputs, batch = (_union(seen.axes[d] for d in group) for group in (use.summed, use.batch))
        self.record(seen, name, use.kind, inputs, (batch | seen.picked) - inputs)
        self.fed |= _reach([v for i, v in enumerate(values) if i != position])
        return [Value(None, frozenset([Source(seen.path, lookup=False)]))]

    def view(self, eqn: Any, values: list[Value], position: int) -> list[Value] | None:
        """A view of a view, or ``None`` if the result is no weight any more."""
        seen, name, reach = values[position].view, eqn.primitive.name, _reach(values)
        if seen is None or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact):
            return None
        chosen = picked(eqn, seen.shape)
        if chosen is None:
            return None
        if name in ("mul", "div"):
            axes = gain_axes(eqn, position, seen.shape)
            if axes is None or len(axes) == sum(n != 1 for n in seen.shape):
                return None
            self.merge(seen, axes, eqn)
        if name == "reshape":
            if eqn.params["dimensions"]:
                return None
            for old in {flow for flow in VIEWS[name](eqn, seen.shape) if len(flow) > 1}:
                self.merge(seen, old, eqn)
        flow = VIEWS[name](eqn, seen.shape)
        took = _union(seen.axes[d] for d in chosen)
        if name == "gather":
            if len(_union(seen.axes) - took) < 2:
                self.record(seen, name, "lookup", took, NONE)
                return [Value(None, reach | {Source(seen.path, lookup=True)})]
            flow = [() if set(source) & set(chosen) else source for source in flow]
        rows = seen.rows or name == "gather"
        outs = []
        for v in eqn.outvars:
            axes = tuple(_union(seen.axes[d] for d in source if d not in chosen) for source in flow)
            outs.append(Value(Seen(seen.path, axes, v.aval.shape, seen.picked | took, rows), reach))
        return outs

    def merge(self, seen: Seen, axes: Sequence[int], eqn: Any) -> None:
        """Notes that the leaf's axes under ``axes`` must all be inputs or all be outputs."""
        group = _union(seen.axes[d] for d in axes)
        if len(group) > 1:
            self.merged.setdefault(seen.path, {}).setdefault(group, f"{eqn.primitive.name} at {_jax.where(self.within)}")

    def record(self, seen: Seen, operation: str, kind: str, inputs: Axes, batch: Axes) -> None:
        known = self.records.setdefault(seen.path, {})
        key = (*map(id, self.within), kind, inputs, batch)
        if key not in known:
            where = _jax.where(self.within) if self.within else "its output"
            known[key] = _Record(SiteUse(kind, operation, where), inputs, batch)

    def dense(self, value: Value, operation: str) -> None:
        """Notes that ``value``, if it is a view of a leaf, is needed as it is: rows of a table if it was gathered, else densely."""
        seen = value.view
        if seen is not None:
            if seen.rows:
                self.record(seen, operation, "lookup", seen.picked, NONE)
            else:
                self.record(seen, operation, "dense", NONE, NONE)


def _inline(finder: _Finder, eqn: Any, values: list[Value]) -> list[Value]:
    return finder.run(_jax.subprogram(eqn), values)


def _barrier(finder: _Finder, eqn: Any, values: list[Value]) -> list[Value]:
    return values


def _scan(finder: _Finder, eqn: Any, values: list[Value]) -> list[Value]:
    s = _jax.scan(eqn)
    head = s.num_consts + s.num_carry
    consts, carry, xs = values[: s.num_consts], values[s.num_consts : head], values[head:]
    slices = [v if v.view is None else v._replace(view=_slice(v.view)) for v in xs]
    forwarded = _jax.forwarded(s.body, s.num_consts, s.num_carry)

    def body(carried: list[Value]) -> tuple[list[Value], list[Value]]:
        outs = finder.run(s.body, [*consts, *carried, *slices])
        return outs[: s.num_carry], outs[s.num_carry :]

    carried, ys = _loop(finder, eqn, carry, forwarded, body)
    for y in ys:
        finder.dense(y, "scan (returned from its body)")
    return [*carried, *(y._replace(view=None) for y in ys)]


def _while(finder: _Finder, eqn: Any, values: list[Value]) -> list[Value]:
    w = _jax.while_(eqn)
    head = w.cond_consts + w.body_consts
    cond_consts, body_consts, carry = values[: w.cond_consts], values[w.cond_consts : head], values[head:]
    forwarded = _jax.forwarded(w.body, w.body_consts, len(carry))

    def body(carried: list[Value]) -> tuple[list[Value], list[Value]]:
        finder.run(w.cond, [*cond_consts, *carried])
        return finder.run(w.body, [*body_consts, *carried]), []

    return _loop(finder, eqn, carry, forwarded, body)[0]


def _loop(finder: _Finder, eqn: Any, carry: list[Value], forwarded: set[int], body: Any) -> tuple[list[Value], list[Value]]:
    """Runs a loop's body until what its carry depends on no longer grows."""
    for i, v in enumerate(carry):
        if i not in forwarded:
            finder.dense(v, f"{eqn.primitive.name} (carried and changed)")
    carry = [v if i in forwarded else v._replace(view=None) for i, v in enumerate(carry)]
    while True:
        outs, ys = body(carry)
        for i, out in enumerate(outs):
            if i not in forwarded:
                finder.dense(out, f"{eqn.primitive.name} (returned from its body)")
        grown = [v._replace(reach=v.reach | out.reach) for v, out in zip(carry, outs, strict=True)]
        if grown == carry:
            # After the last turn a carry depends on what the body makes of it; the initial value only matters without any turn.
            return [v if i in forwarded else Value(None, out.reach) for i, (v, out) in enumerate(zip(carry, outs, strict=True))], ys
        carry = grown


def _cond(finder: _Finder, eqn: Any, values: list[Value]) -> list[Value]:
    results = [finder.run(branch, values[1:]) for branch in _jax.branches(eqn)]
    for out in (out for result in results for out in result):
        finder.dense(out, "cond (returned from a branch)")
    return [Value(None, _reach([values[0], *outs])) for outs in zip(*results, strict=True)]


_BODIES: dict[str, Callable[[_Finder, Any, list[Value]], list[Value]]] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "remat2", "checkpoint"), _inline),
    "optimization_barrier": _barrier,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def _slice(seen: Seen) -> Seen:
    return seen._replace(axes=seen.axes[1:], shape=seen.shape[1:], picked=seen.picked | seen.axes[0])


def _reach(values: Sequence[Value]) -> frozenset[Source]:
    return frozenset().union(*(v.reach for v in values))


def _union(groups: Any) -> Axes:
    return frozenset().union(*groups)


def _site(path: str, shape: tuple[int, ...], dtype: np.dtype, finder: _Finder, head: bool) -> Site:
    records = list(finder.records.get(path, {}).values())
    uses = tuple(record.use for record in records)
    kind = "+".join(sorted({use.kind for use in uses} - {"dense"}))
    if any(use.kind == "dense" for use in uses) or not uses:
        kind = "dense" if uses else "unused"
    linear = [record for record in records if record.use.kind != "dense"]
    inputs, outputs, batch = _roles(len(shape), linear) if linear else ((), tuple(range(len(shape))), ())
    reason = _reason(path, shape, dtype, records, (inputs, outputs, batch), finder)
    return Site(path, tuple(shape), dtype, kind, inputs, outputs, batch, uses, head, reason)


def _roles(ndim: int, records: list[_Record]) -> tuple[tuple[int, ...], ...]:
    """Which axes are inputs, outputs and batch. Any split into inputs and outputs gives right results; the first use names it."""
    lead = next((r for r in records if r.use.kind == "lookup"), records[0])
    summed = _union(r.inputs for r in records)
    batch = records[0].batch.intersection(*(r.batch for r in records)) - summed
    inputs = (lead.inputs | (lead.batch & summed)) - batch
    outputs = frozenset(range(ndim)) - inputs - batch
    return tuple(tuple(sorted(group)) for group in (inputs, outputs, batch))


def _reason(path: str, shape: Sequence[int], dtype: Any, records: list[_Record], roles: Any, finder: _Finder) -> str:
    if not jnp.issubdtype(dtype, jnp.inexact):
        return f"it holds {dtype}, not floats"
    if not records:
        return "the function does not use it"
    dense = [r.use for r in records if r.use.kind == "dense"]
    if dense:
        first = f"{dense[0].operation} at {dense[0].where}"
        return f"all of it is needed by {first}" + (f" and {len(dense) - 1} more" if len(dense) > 1 else "")
    for group, place in finder.merged.get(path, {}).items():
        if not any(group <= set(role) for role in roles):
            return f"input and output axes are merged by {place}"
    inputs, outputs, _ = roles
    if not inputs or not outputs or prod(shape[d] for d in outputs) == 1 and len(outputs) == 0:
        return f"it is not a matrix: {records[0].use.operation} at {records[0].use.where} leaves it no {'input' if not inputs else 'output'} axis"
    return ""


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _axes(site: Site, axes: Sequence[int]) -> str:
    return " ".join(f"{d}:{site.shape[d]}" for d in axes) or "-"
