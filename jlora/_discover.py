"""The abstract run behind ``jlora.sites``: follows each leaf of a parameter tree through a program, without computing anything.

A value is "a view of leaf P, whose axes run along these axes of P", or an activation. A product that meets a view records which
axes of the leaf it sums over; an operation that needs a view as it is records that. No name is looked at.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jlora import _jax, _passed
from jlora._derivatives import is_stop
from jlora._primitives import (
    JOINS,
    USES,
    VIEWS,
    gain_axes,
    is_empty,
    is_lazy,
    is_mixed,
    is_small,
    is_weight,
    meeting,
    picked,
)
from jlora._seen import NONE, Axes, Record, Seen, SiteUse, Source, Value, union

# Why a leaf that enters a program with a derivative of its own cannot be adapted.
INSIDE = (
    "it is used inside {}, which has a derivative of its own: wrap the function inside, and hand the adapter through the "
    "arguments (docs/guide.md, Solvers)"
)
ALONG = "it is passed through {}, which has a derivative of its own"
UNREAD = "it is passed to {}, which does not read it, though its derivative may: leave it out of what is passed"
_NOTES = ("", INSIDE, ALONG, UNREAD)  # of an equation that takes a leaf several times, the first is said


class Finder:
    """The abstract run, and what it found: records of uses, groups of axes that must play one role, and leaves that feed others.

    Args:
        data: The variables of the program that depend on the call's arguments. What is made of parameters and constants alone stays a
            weight where data would make it an activation: a sum with it, rows picked by it.
    """

    def __init__(self, data: frozenset[Any]) -> None:
        self.data = data
        self.records: dict[str, dict[Any, Record]] = {}
        self.merged: dict[str, dict[Axes, str]] = {}
        self.fed: set[Source] = set()
        self.within: list[Any] = []  # the equation at hand and those around it
        self.checked = True  # whether the shard_map around it, if any, knows what differs between devices

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
        if is_stop(eqn):
            return values
        positions = [i for i, v in enumerate(values) if v.views]
        if not positions or is_empty(eqn):
            if name in USES and len(_reach(values)) > 1:  # a product of two activations, as in attention
                self.fed |= _reach(values)
            return [Value((), _reach(values))] * len(eqn.outvars)
        if name in USES:
            return self.product(eqn, values, positions)
        if name in JOINS:
            out = self.join(eqn, values, positions)
            if out is not None:
                return out
        for i in positions if name == "mul" else positions[:1] if positions[:1] == [0] else ():
            out = self.view(eqn, values, i) if name in VIEWS else None
            if out is not None:
                for j in positions:
                    if j != i:
                        self.dense(values[j], name)
                return out
        notes = self.notes(eqn, values)
        for i in sorted(positions, key=lambda i: _NOTES.index(notes[i])):
            self.dense(values[i], name, notes[i])
        return [Value((), _reach(values))] * len(eqn.outvars)

    def notes(self, eqn: Any, values: list[Value]) -> list[str]:
        """What an equation with a derivative of its own does with each operand that is a weight."""
        if eqn.primitive.name not in _jax.CUSTOM:
            return [INSIDE if eqn.primitive.name in _jax.OPAQUE else ""] * len(values)
        inner = Finder(self.data)
        inner.within, inner.checked = [*self.within], self.checked
        numbered = [v._replace(views=tuple(s._replace(path=str(i)) for s in v.views)) for i, v in enumerate(values)]
        outs = inner.run(_jax.subprogram(eqn), numbered)
        along = {seen.path for out in outs for seen in out.views}

        def note(i: str) -> str:
            uses = [record.use for record in inner.records.get(i, {}).values()]
            if not uses:
                return ALONG if i in along else UNREAD
            return INSIDE if any(use.kind != "dense" or use.note == INSIDE for use in uses) else ""

        return [note(str(i)) for i in range(len(values))]

    def product(self, eqn: Any, values: list[Value], positions: list[int]) -> list[Value]:
        """A product with a weight. Where two leaves meet, the one on the right is the weight, as in ``x @ w``."""
        name = eqn.primitive.name
        if len(positions) > 1:
            lazy = [i for i in positions if all(seen.rows or _is_vector(seen) for seen in values[i].views)]
            if not lazy and name == "dot_general" and not any(is_small(eqn, i) for i in positions):
                return self.mix(eqn, values, positions)
            others = lazy[: len(positions) - 1] or positions[:-1]
            for i in others:
                self.dense(values[i], f"{name} with another weight")
            positions = [i for i in positions if i not in others]
        (position,) = positions
        if is_mixed(eqn, position, self.data):
            return self.mix(eqn, values, positions)
        use = USES[name](eqn, position)
        if use is None:
            self.dense(values[position], name)
            return [Value((), _reach(values))]
        for seen in values[position].views:
            inputs, batch = (union(seen.axes[d] for d in group) for group in (use.summed, use.batch))
            window = tuple(axis for d in use.window for axis in sorted(seen.axes[d]))
            # An axis of which a part was picked and a part remains, as in a fused q, k, v, is no batch axis.
            batch = (batch | (seen.picked - union(seen.axes))) - inputs
            self.record(seen, name, use.kind, inputs, batch, window, use.groups, use.dilated)
        self.fed |= _reach([v for i, v in enumerate(values) if i != position])
        paths = tuple(sorted({seen.path for seen in values[position].views}))
        return [Value((), frozenset([Source(paths, lookup=False)]))]

    def mix(self, eqn: Any, values: list[Value], positions: list[int]) -> list[Value]:
        """A product of a weight with a constant, or of two weights: a weight still, if something else multiplies it."""
        views, shape = [], eqn.outvars[0].aval.shape
        for i in positions:
            met = meeting(eqn, i)
            for seen in values[i].views:
                self.merge(seen, met.summed, eqn)
                inputs, batch = (union(seen.axes[d] for d in group) for group in (met.summed, met.batch))
                if is_small(eqn, i):
                    self.record(seen, "dot_general", "linear", inputs, (batch | seen.picked) - inputs)
                axes = tuple(seen.axes[d] if d >= 0 else inputs for d in met.out)
                new = seen._replace(axes=axes, shape=shape)
                views.append(new._replace(rows=inputs, kind="linear") if is_lazy(eqn, i) and not seen.rows else new)
        self.fed |= _reach([v for i, v in enumerate(values) if i not in positions])
        reach = _reach([values[i] for i in positions])
        if paths := tuple(sorted({seen.path for seen in views if seen.rows})):
            reach |= {Source(paths, lookup=False)}
        return [Value(tuple(dict.fromkeys(views)), reach)]

    def join(self, eqn: Any, values: list[Value], positions: list[int]) -> list[Value] | None:
        """One weight made of several, or ``None`` where data is among them."""
        (out,), views = eqn.outvars, []
        if any(_jax.among(v, self.data) for i, v in enumerate(eqn.invars) if i not in positions):
            return None
        for i in positions:
            flow = JOINS[eqn.primitive.name](eqn, eqn.invars[i].aval.shape)
            if len(flow) != out.aval.ndim or (
                eqn.primitive.name in _SUMS and eqn.invars[i].aval.shape != out.aval.shape
            ):
                return None
            views += [
                seen._replace(axes=tuple(union(seen.axes[d] for d in source) for source in flow), shape=out.aval.shape)
                for seen in values[i].views
            ]
        return [Value(tuple(dict.fromkeys(views)), _reach(values))]

    def view(self, eqn: Any, values: list[Value], position: int) -> list[Value] | None:
        """A view of a view, or ``None`` if the result is no weight any more."""
        reach = _reach(values)
        if not is_weight(eqn, position):
            return None
        made = [new for seen in values[position].views if (new := self.see(eqn, position, seen)) is not None]
        if len(made) < len(values[position].views):
            return None
        rows = [(seen, took) for seen, took in made if took]
        if rows:
            for seen, took in rows:
                seen = _looked_up(seen, took)
                self.record(seen, eqn.primitive.name, seen.kind, seen.rows, seen.picked - seen.rows)
            return [Value((), reach | {Source(tuple(sorted({seen.path for seen, _ in rows})), lookup=True)})]
        return [
            Value(tuple(dict.fromkeys(new._replace(shape=v.aval.shape) for new, _ in made)), reach) for v in eqn.outvars
        ]

    def see(self, eqn: Any, position: int, seen: Seen) -> tuple[Seen, Axes] | None:
        """What a view primitive makes of one leaf's view, and the axes along which it looks up rows, if that is all it does."""
        name, chosen = eqn.primitive.name, picked(eqn, seen.shape)
        if chosen is None or (name == "all_gather" and not self.checked):
            return None
        if name in ("mul", "div"):
            gain = gain_axes(eqn, position, seen.shape)
            if gain is None or all(d in gain for d, n in enumerate(seen.shape) if n != 1):
                return None
            self.merge(seen, gain, eqn)
        flow = VIEWS[name](eqn, seen.shape)
        for old in {source for source in flow if len(source) > 1}:
            self.merge(seen, old, eqn)
        took, rest = (union(axes) for axes in _parted(seen.axes, chosen))
        axes = tuple(union(seen.axes[d] for d in source if d not in chosen) for source in flow)
        if name == "gather" and took:
            new = [j for j in range(len(flow)) if j not in eqn.params["dimension_numbers"].offset_dims]
            if new and not _jax.among(eqn.invars[1], self.data):
                # An index that no argument decides puts slices in another order: a weight still, if something multiplies it.
                axes = tuple(took if j in new else group for j, group in enumerate(axes))
                seen = seen._replace(axes=axes)
                return seen if len(rest - took) > 1 else _looked_up(seen, took), NONE
            if len(rest - took) < 2:  # what is left is no matrix
                return seen, took
        seen = seen._replace(axes=axes, picked=seen.picked | took)
        if took and (name == "gather" or len(rest - took) < 2):
            seen = _looked_up(seen, took)
        return seen, NONE

    def merge(self, seen: Seen, axes: Sequence[int], eqn: Any) -> None:
        """Notes that the leaf's axes under ``axes`` must all be inputs or all be outputs."""
        group = union(seen.axes[d] for d in axes)
        if len(group) > 1:
            self.merged.setdefault(seen.path, {}).setdefault(
                group, f"{eqn.primitive.name} at {_jax.where(self.within)}"
            )

    def record(
        self,
        seen: Seen,
        operation: str,
        kind: str,
        inputs: Axes,
        batch: Axes,
        window: tuple[int, ...] = (),
        groups: int = 1,
        dilated: bool = False,
        note: str = "",
    ) -> None:
        known = self.records.setdefault(seen.path, {})
        key = (*map(id, self.within), kind, inputs, batch)
        if key not in known:
            where = _jax.where(self.within) if self.within else "its output"
            use = SiteUse(kind, operation, where, note=note)
            known[key] = Record(use, inputs, batch, window, groups, dilated, seen.picked)

    def dense(self, value: Value, operation: str, note: str = "") -> None:
        """Notes that ``value``, if it is a view of a leaf, is needed as it is: rows of a table if it was gathered, else densely."""
        for seen in value.views:
            if seen.rows:
                self.record(seen, operation, seen.kind, seen.rows, seen.picked - seen.rows)
            else:
                self.record(seen, operation, "dense", NONE, NONE, note=note)


_SUMS = ("add", "add_any", "sub")


def _inline(finder: Finder, eqn: Any, values: list[Value]) -> list[Value]:
    return finder.run(_jax.subprogram(eqn), values)


def _barrier(finder: Finder, eqn: Any, values: list[Value]) -> list[Value]:
    return values


def _shard_map(finder: Finder, eqn: Any, values: list[Value]) -> list[Value]:
    """Inside, a value has the shape of one device's part of it."""
    body = _jax.subprogram(eqn)
    inside = [
        v._replace(views=tuple(_part(seen, x.aval.shape) for seen in v.views))
        for v, x in zip(values, body.jaxpr.invars, strict=True)
    ]
    before, finder.checked = finder.checked, _jax.shard_map(eqn)["check_vma"]
    outs = finder.run(body, inside)
    finder.checked = before
    for out in outs:
        finder.dense(out, "shard_map (returned from its body)")
    return [Value((), out.reach) for out in outs]


def _part(seen: Seen, shape: tuple[int, ...]) -> Seen:
    """One device's part of a view. Where it has but one slice along an axis (its layers, its expert), that was picked."""
    one = union(axes for axes, n, whole in zip(seen.axes, shape, seen.shape, strict=True) if n == 1 < whole)
    return seen._replace(shape=shape, picked=seen.picked | one)


def _scan(finder: Finder, eqn: Any, values: list[Value]) -> list[Value]:
    s = _jax.scan(eqn)
    head = s.num_consts + s.num_carry
    consts, carry, xs = values[: s.num_consts], values[s.num_consts : head], values[head:]
    slices = [v._replace(views=tuple(map(_slice, v.views))) for v in xs]
    forwarded = _passed.forwarded(s.body, s.num_consts, s.num_carry)

    def body(carried: list[Value]) -> tuple[list[Value], list[Value]]:
        outs = finder.run(s.body, [*consts, *carried, *slices])
        return outs[: s.num_carry], outs[s.num_carry :]

    carried, ys = _loop(finder, eqn, carry, forwarded, body)
    for y in ys:
        finder.dense(y, "scan (returned from its body)")
    return [*carried, *(y._replace(views=()) for y in ys)]


def _while(finder: Finder, eqn: Any, values: list[Value]) -> list[Value]:
    w = _jax.while_(eqn)
    head = w.cond_consts + w.body_consts
    cond_consts, body_consts, carry = values[: w.cond_consts], values[w.cond_consts : head], values[head:]
    forwarded = _passed.forwarded(w.body, w.body_consts, len(carry))

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
    carry = [v if i in forwarded else v._replace(views=()) for i, v in enumerate(carry)]
    while True:
        outs, ys = body(carry)
        for i, out in enumerate(outs):
            if i not in forwarded:
                finder.dense(out, f"{eqn.primitive.name} (returned from its body)")
        grown = [v._replace(reach=v.reach | out.reach) for v, out in zip(carry, outs, strict=True)]
        if grown == carry:
            # After the last turn a carry depends on what the body makes of it; the initial value only matters without any turn.
            return [
                v if i in forwarded else Value((), out.reach)
                for i, (v, out) in enumerate(zip(carry, outs, strict=True))
            ], ys
        carry = grown


def _cond(finder: Finder, eqn: Any, values: list[Value]) -> list[Value]:
    results = [finder.run(branch, values[1:]) for branch in _jax.branches(eqn)]
    for out in (out for result in results for out in result):
        finder.dense(out, "cond (returned from a branch)")
    return [Value((), _reach([values[0], *outs])) for outs in zip(*results, strict=True)]


_BODIES: dict[str, Callable[[Finder, Any, list[Value]], list[Value]]] = {
    **dict.fromkeys(_jax.CALLS, _inline),
    "optimization_barrier": _barrier,
    "shard_map": _shard_map,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def _parted(axes: tuple[Axes, ...], chosen: Sequence[int]) -> tuple[list[Axes], list[Axes]]:
    """Axes in ``chosen``, and the others."""
    return [axes[d] for d in chosen], [group for d, group in enumerate(axes) if d not in chosen]


def _is_vector(seen: Seen) -> bool:
    return sum(n > 1 for n in seen.shape) < 2


def _looked_up(seen: Seen, rows: Axes) -> Seen:
    """The view as rows of a table, unless it was a product with a constant: rows of activations are activations."""
    return seen if seen.rows and seen.kind == "linear" else seen._replace(rows=rows, kind="lookup")


def _slice(seen: Seen) -> Seen:
    return seen._replace(axes=seen.axes[1:], shape=seen.shape[1:], picked=seen.picked | seen.axes[0])


def _reach(values: Sequence[Value]) -> frozenset[Source]:
    return frozenset().union(*(v.reach for v in values))
