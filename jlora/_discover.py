"""The abstract run behind ``jlora.sites``: follows each leaf of a parameter tree through a program, without computing anything.

A value is "a view of leaf P, whose axes run along these axes of P", or an activation. A product that meets a view records which
axes of the leaf it sums over; an operation that needs a view as it is records that. No name is looked at.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora import _jax
from jlora._primitives import USES, VIEWS, gain_axes, picked

Axes = frozenset[int]
NONE: Axes = frozenset()


class SiteUse(NamedTuple):
    """One use of a leaf: its ``kind`` (``linear``, ``conv``, ``lookup``, ``dense``), the primitive, and the source line."""

    kind: str
    operation: str
    where: str


class Seen(NamedTuple):
    """A view of a leaf: for each axis of the value the axes of the leaf it runs along, and those along which slices were picked."""

    path: str
    axes: tuple[Axes, ...]
    shape: tuple[int, ...]
    picked: Axes = NONE
    rows: Axes = NONE  # those picked last: if nothing multiplies the rest, they were rows of a table


class Source(NamedTuple):
    """What an activation came out of last: a product with the leaf at ``path``, or a lookup in it."""

    path: str
    lookup: bool


class Value(NamedTuple):
    """A value of the abstract run: a view of a leaf or an activation, and the uses of leaves it depends on with no other between."""

    view: Seen | None = None
    reach: frozenset[Source] = frozenset()


class Record(NamedTuple):
    use: SiteUse
    inputs: Axes
    batch: Axes


def leaf(path: str, leaf: Any) -> Value:
    shape = np.shape(leaf)
    if 0 in shape or not jnp.issubdtype(lax.dtype(leaf), jnp.inexact):
        return Value()
    return Value(Seen(path, tuple(frozenset([d]) for d in range(len(shape))), shape))


class Finder:
    """The abstract run, and what it found: records of uses, groups of axes that must play one role, and leaves that feed others."""

    def __init__(self) -> None:
        self.records: dict[str, dict[Any, Record]] = {}
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
        use = USES[name](eqn, position) if seen is not None else None
        if seen is None or use is None:
            self.dense(values[position], name)
            return [Value(None, _reach(values))]
        inputs, batch = (union(seen.axes[d] for d in group) for group in (use.summed, use.batch))
        # An axis of which a part was picked and a part remains, as in a fused q, k, v, is no batch axis.
        self.record(seen, name, use.kind, inputs, (batch | (seen.picked - union(seen.axes))) - inputs)
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
            gain = gain_axes(eqn, position, seen.shape)
            if gain is None or len(gain) == sum(n != 1 for n in seen.shape):
                return None
            self.merge(seen, gain, eqn)
        flow = VIEWS[name](eqn, seen.shape)
        for old in {source for source in flow if len(source) > 1}:
            self.merge(seen, old, eqn)
        took = union(seen.axes[d] for d in chosen)
        if name == "gather" and took and len(union(seen.axes) - took) < 2:  # what is left is no matrix: rows of a table
            self.record(seen, name, "lookup", took, seen.picked - took)
            return [Value(None, reach | {Source(seen.path, lookup=True)})]
        rows = took if took and (name == "gather" or len(union(seen.axes) - took) < 2) else seen.rows
        axes = tuple(union(seen.axes[d] for d in source if d not in chosen) for source in flow)
        return [Value(Seen(seen.path, axes, v.aval.shape, seen.picked | took, rows), reach) for v in eqn.outvars]

    def merge(self, seen: Seen, axes: Sequence[int], eqn: Any) -> None:
        """Notes that the leaf's axes under ``axes`` must all be inputs or all be outputs."""
        group = union(seen.axes[d] for d in axes)
        if len(group) > 1:
            self.merged.setdefault(seen.path, {}).setdefault(
                group, f"{eqn.primitive.name} at {_jax.where(self.within)}"
            )

    def record(self, seen: Seen, operation: str, kind: str, inputs: Axes, batch: Axes) -> None:
        known = self.records.setdefault(seen.path, {})
        key = (*map(id, self.within), kind, inputs, batch)
        if key not in known:
            where = _jax.where(self.within) if self.within else "its output"
            known[key] = Record(SiteUse(kind, operation, where), inputs, batch)

    def dense(self, value: Value, operation: str) -> None:
        """Notes that ``value``, if it is a view of a leaf, is needed as it is: rows of a table if it was gathered, else densely."""
        seen = value.view
        if seen is not None:
            if seen.rows:
                self.record(seen, operation, "lookup", seen.rows, seen.picked - seen.rows)
            else:
                self.record(seen, operation, "dense", NONE, NONE)


def _inline(finder: Finder, eqn: Any, values: list[Value]) -> list[Value]:
    return finder.run(_jax.subprogram(eqn), values)


def _barrier(finder: Finder, eqn: Any, values: list[Value]) -> list[Value]:
    return values


def _scan(finder: Finder, eqn: Any, values: list[Value]) -> list[Value]:
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


def _while(finder: Finder, eqn: Any, values: list[Value]) -> list[Value]:
    w = _jax.while_(eqn)
    head = w.cond_consts + w.body_consts
    cond_consts, body_consts, carry = values[: w.cond_consts], values[w.cond_consts : head], values[head:]
    forwarded = _jax.forwarded(w.body, w.body_consts, len(carry))

    def body(carried: list[Value]) -> tuple[list[Value], list[Value]]:
        finder.run(w.cond, [*cond_consts, *carried])
        return finder.run(w.body, [*body_consts, *carried]), []

    return _loop(finder, eqn, carry, forwarded, body)[0]


def _loop(
    finder: Finder, eqn: Any, carry: list[Value], forwarded: set[int], body: Any
) -> tuple[list[Value], list[Value]]:
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
            return [
                v if i in forwarded else Value(None, out.reach)
                for i, (v, out) in enumerate(zip(carry, outs, strict=True))
            ], ys
        carry = grown


def _cond(finder: Finder, eqn: Any, values: list[Value]) -> list[Value]:
    results = [finder.run(branch, values[1:]) for branch in _jax.branches(eqn)]
    for out in (out for result in results for out in result):
        finder.dense(out, "cond (returned from a branch)")
    return [Value(None, _reach([values[0], *outs])) for outs in zip(*results, strict=True)]


_BODIES: dict[str, Callable[[Finder, Any, list[Value]], list[Value]]] = {
    **dict.fromkeys(_jax.CALLS, _inline),
    "optimization_barrier": _barrier,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def _slice(seen: Seen) -> Seen:
    return seen._replace(axes=seen.axes[1:], shape=seen.shape[1:], picked=seen.picked | seen.axes[0])


def _reach(values: Sequence[Value]) -> frozenset[Source]:
    return frozenset().union(*(v.reach for v in values))


def union(groups: Iterable[Axes]) -> Axes:
    """All axes in any of ``groups``."""
    return frozenset().union(*groups)
