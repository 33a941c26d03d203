"""The evaluator: runs a traced program in which some values are factored weights.

It is ``jax.core.eval_jaxpr`` with an environment and ``RULES``. An equation that no factored weight enters is bound as it stands.
Equations with a body are rebuilt with JAX's public functions around the same evaluator, so that a scanned, rematerialised or
conditional layer keeps its weights factored. Nothing here names LoRA.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _jax, _passed
from jlora._derivatives import is_stop, jlora_stop_gradient, refuse_derivatives
from jlora._factored import Factored
from jlora._mix import by_constant, by_weight
from jlora._primitives import JOINS, USES, VIEWS, Dense, is_empty, is_mixed
from jlora._products import Matrix, conv_general_dilated, dot_general, ragged_dot_general
from jlora._text import shown
from jlora._views import join, view

Eqn = Any

RULES: dict[str, Callable[[Eqn, int, Sequence[Any], int, Matrix], list[Any]]] = {
    **dict.fromkeys(VIEWS, view),
    "dot_general": dot_general,
    "conv_general_dilated": conv_general_dilated,
    "ragged_dot_general": ragged_dot_general,
}
"""Evaluate one equation with one factored value, at a position among the values, given the number of this use of the leaf and what
makes a matrix of activations."""


class DenseWeightError(ValueError):
    """An adapted weight would have to be formed as one dense array."""

    __module__ = "jlora"  # where people import it from


class Interpreter:
    """Evaluates programs; one object for one trace of the whole function.

    Args:
        data: Variables of the program that depend on the call's arguments.
        plain: By identity, what to evaluate for an equation that no weight enters; else the equation itself.
        allow_dense: Form a weight where an operation cannot keep it factored, instead of raising.
    """

    def __init__(self, data: frozenset[Any], plain: dict[int, Eqn], allow_dense: bool = False):
        self.data = data
        self.plain = plain
        self.allow_dense = allow_dense
        self.within: list[Eqn] = []  # the equation at hand and those around it
        self.used: dict[str, int] = {}  # uses so far of each adapted leaf: each has a dropout mask of its own
        self.repeated: set[int] = set()  # identities of bodies that the program calls several times
        self.shared: dict[Any, Any] = {}  # those bodies, evaluated by a function that JAX traces once
        self.affected: set[str] = (
            set()
        )  # the leaves that a use has the update of, of those whose update is for one kind of use
        self.names: dict[str, str] = {}  # in a shared body: the leaf that each weight is in the call at hand
        self.matrices: dict[
            int, tuple[Any, dict[int, Any]]
        ] = {}  # of the trace at hand: by identity, activations and their views

    def run(self, program: _jax.Program, args: Sequence[Any], inlined: bool = False) -> list[Any]:
        """Evaluates ``program`` on arrays and factored values; returns the same.

        Args:
            program: What to evaluate.
            args: Its arguments.
            inlined: Whether it is part of the trace that its caller is in, and not the body of a transformation.
        """
        outer, self.matrices = self.matrices, self.matrices if inlined else {}
        try:
            return self._run(program, args)
        finally:
            self.matrices = outer

    def _run(self, program: _jax.Program, args: Sequence[Any]) -> list[Any]:
        jaxpr, consts = program
        self.repeated.update(map(id, _jax.repeated(jaxpr)))
        env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        last, given = _jax.last_uses(jaxpr), {*jaxpr.constvars, *jaxpr.invars}

        def read(atom: Any) -> Any:
            return atom.val if _jax.is_literal(atom) else env[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            self.within.append(eqn)
            with _jax.location(eqn):
                outs = self.step(eqn, [read(v) for v in eqn.invars])
            self.within.pop()
            env.update(zip(eqn.outvars, outs, strict=True))
            for v in {v for v in (*eqn.invars, *eqn.outvars) if not _jax.is_literal(v) and last.get(v) == index}:
                value = env.pop(v)
                if v not in given:  # an argument is still the caller's
                    self.matrices.pop(id(value), None)
        return [read(v) for v in jaxpr.outvars]

    def step(self, eqn: Eqn, values: list[Any]) -> list[Any]:
        """Evaluates one equation."""
        name = eqn.primitive.name
        if name not in VIEWS and name not in BODIES:
            values = [self.rows(v) if isinstance(v, Factored) and v.looked_up else v for v in values]
        positions = [i for i, v in enumerate(values) if isinstance(v, Factored)]
        if not positions:
            return _jax.bind(self.plain.get(id(eqn), eqn), values)
        if name in BODIES:
            return BODIES[name](self, eqn, values)
        if is_stop(eqn):  # of a function adapted before, which this one calls
            return jlora_stop_gradient(values)
        if is_empty(eqn):
            return _jax.bind(eqn, [v.w if isinstance(v, Factored) else v for v in values])
        reason = ""
        try:
            if name in USES:
                values, positions = self.parted(values, positions)
                two = name == "dot_general" and len(positions) == 2
                if two or is_mixed(eqn, positions[-1], self.data):
                    for i in positions:  # what a later use makes of it is not told here
                        self.check_told(values[i], name)
                    return by_weight(eqn, *values) if two else by_constant(eqn, positions[-1], values)
            if name in JOINS:
                # Rows of a table that meet data are activations; those that meet other weights may be a weight in another order.
                if any(_jax.among(v, self.data) for i, v in enumerate(eqn.invars) if i not in positions):
                    values = [self.rows(v) for v in values]
                    for v in values:
                        self.check_told(v, name)
                return join(eqn, values) if any(isinstance(v, Factored) for v in values) else _jax.bind(eqn, values)
            if name in RULES and len(positions) == 1:
                position = positions[0]
                if not self.takes(eqn, position, values[position]):
                    return _jax.bind(eqn, [v.w if i == position else v for i, v in enumerate(values)])
                outs = RULES[name](eqn, position, values, self.count(values[position].branch.path), self.matrix)
                if name == "gather" and _jax.among(eqn.invars[1], self.data):
                    return [self.looked_up(out) for out in outs]
                return [self.looked_up(out) for out in outs] if values[position].looked_up else outs
        except Dense as error:
            reason = str(error)
        if name in (*_jax.CUSTOM, *_jax.OPAQUE):
            reason = "it has a derivative of its own, which takes arrays; of a solver, wrap the function inside (docs/guide.md, Solvers)"
        return _jax.bind(eqn, [self.dense(v, name, reason) for v in values])

    def takes(self, eqn: Eqn, position: int, value: Factored) -> bool:
        """Whether an equation is a use that has the update of its weight, or no use at all."""
        if not value.branch.only or eqn.primitive.name not in USES:
            return True
        if value.row is not None or self.data:  # where nothing is data, what the function closed over is
            met = [v for i, v in enumerate(eqn.invars[:2]) if i != position]
            if not any(_jax.among(v, self.data) for v in met):
                self.check_told(value, eqn.primitive.name)
        return self.affects(value, "conv" if eqn.primitive.name == "conv_general_dilated" else "linear")

    def affects(self, value: Factored, kind: str) -> bool:
        """Whether a use of a kind has the update of its weight; notes that it has."""
        if value.branch.takes(kind):
            self.affected.update(value.branch.path.split(" + "))
        return value.branch.takes(kind)

    def check_told(
        self, value: Any, operation: str, reason: str = "it is neither a lookup nor a product with data"
    ) -> None:
        """Raises if it matters for ``value`` what kind of use an operation is."""
        if isinstance(value, Factored) and value.branch.only:
            place = f" at {_jax.where(self.within)}" if self.within else ""
            raise DenseWeightError(
                f"The adapter of '{shown(self.name(value.branch.path))}' is for one kind of use, {value.branch.only}, and "
                f"what kind this is "
                f"cannot be told.\n  operation: {operation}{place}\n  reason: {reason or 'the weight is needed as it is'}\n"
                "  Move the operation out of the wrapped function, or adapt all uses: LoRA(only=None)."
            )

    def call(self, body: _jax.Program, key: Any, transform: Any, fn: Any, values: list[Any]) -> list[Any]:
        """``transform(fn)(values)``, where ``fn`` evaluates ``body``; made once if the program calls it several times.

        JAX then traces and lowers it once. Inside, weights have names of their position, so that calls with different leaves look alike.

        Args:
            body: What is called.
            key: Anything hashable that tells apart calls of the same body.
            transform: ``jax.jit``, or ``jax.checkpoint`` with its arguments.
            fn: Of a list of values.
            values: To call it with.
        """
        names = {f"#{i}": v.branch.path for i, v in enumerate(values) if isinstance(v, Factored)}
        anonymous = [self.fold(v, f"#{i}") if isinstance(v, Factored) else v for i, v in enumerate(values)]
        outer = self.names, self.used, self.affected
        run, affected = self.shared.setdefault((id(body.jaxpr), key), (transform(fn), set()))
        self.names, self.used = {name: self.name(path) for name, path in names.items()}, {}
        self.affected = affected  # what the first call notes holds for all
        try:
            outs = run(anonymous)
        finally:
            self.names, self.used, self.affected = outer
        self.affected |= {path for name, path in names.items() if name in affected}
        return [_rename(out, names) if isinstance(out, Factored) else out for out in outs]

    def fold(self, value: Factored, name: str) -> Factored:
        """The same weight for one call of a shared body: with ``name``, and dropout masks of its own."""
        return replace(value.refold(self.count(value.branch.path)), branch=value.branch._replace(path=name))

    def name(self, path: str) -> str:
        """The path, for people, of a weight that a shared body knows by its position."""
        return _renamed(path, self.names)

    def rows(self, value: Any) -> Any:
        """``value`` as activations, if it is rows of a table."""
        if not isinstance(value, Factored) or value.row is None:
            return value
        if not self.affects(value, "lookup"):
            return value.w
        if _jax.is_tiny(value.w.dtype):
            value = replace(value, parts=(*refuse_derivatives(value.parts[:2], self.rounded(value)), *value.parts[2:]))
        return value.rows(value.row, self.count(value.branch.path))

    def rounded(self, value: Factored) -> Callable[[], Exception]:
        """The error where rows in floats of 8 bits are used as they are: so would be their gradient."""
        place = f"\n  operation: {self.within[-1].primitive.name} at {_jax.where(self.within)}" if self.within else ""
        name, dtype = shown(self.name(value.branch.path)), value.w.dtype
        return lambda: ValueError(
            f"Rows of the adapted table '{name}' are used in {dtype}, in which most of their gradient is rounded to zero.{place}\n"
            f"  Cast them where they are looked up: table[ids].astype(jnp.bfloat16)."
        )

    def looked_up(self, value: Any) -> Any:
        """Rows that an argument picked, as activations; those in floats of 8 bits once they are cast, for their gradient's sake."""
        if not isinstance(value, Factored) or value.row is None:
            return value
        return replace(value, looked_up=True) if _jax.is_tiny(value.w.dtype) else self.rows(value)

    def matrix(self, x: Any, axes: int) -> Any:
        """``x`` with its first ``axes`` made one: the same array for all products that ``x`` enters.

        One for each would be kept for the backward pass for each, where JAX stacks what the steps of a scan keep.
        """
        _, views = self.matrices.setdefault(id(x), (x, {}))
        if axes not in views:
            views[axes] = x.reshape(prod(x.shape[:axes]), *x.shape[axes:])
        return views[axes]

    def parted(self, values: list[Any], positions: list[int]) -> tuple[list[Any], list[int]]:
        """Where two weights meet, one that may also be activations is; of two, the left one, as in ``x @ w``."""
        if len(positions) > 1:
            lazy = [i for i in positions if values[i].row is not None]
            values = [self.rows(v) if i in lazy[: len(positions) - 1] else v for i, v in enumerate(values)]
        return values, [i for i in positions if isinstance(values[i], Factored)]

    def count(self, path: str) -> int:
        """The number of this use of a leaf."""
        self.used[path] = self.used.get(path, -1) + 1
        return self.used[path]

    def dense(self, value: Any, operation: str, reason: str = "") -> Any:
        """``value`` as an array; raises if it is a factored weight and that is not allowed."""
        value = self.rows(value)
        if not isinstance(value, Factored):
            return value
        self.check_told(value, operation, reason)
        if not self.allow_dense:
            place = f" at {_jax.where(self.within)}" if self.within else ""
            why = f"  reason: {reason}\n" if reason else ""
            raise DenseWeightError(
                f"The adapted weight '{shown(self.name(value.branch.path))}' would have to be made dense, as {value.shape}.\n"
                f"  operation: {operation}{place}\n"
                f"{why}"
                "  Move the operation out of the wrapped function (a penalty on weights, say), leave the weight out of the\n"
                '  targets, train it outright with Full, or accept a full-size gradient: wrap(fn, dense="allow").'
            )
        return value.dense()


def _rename(value: Factored, names: dict[str, str]) -> Factored:
    return replace(value, branch=value.branch._replace(path=_renamed(value.branch.path, names)))


def _renamed(path: str, names: dict[str, str]) -> str:
    return " + ".join(names.get(part, part) for part in path.split(" + "))


Body = Callable[[Interpreter, Eqn, list[Any]], list[Any]]


def _jit(interp: Interpreter, eqn: Eqn, values: list[Any]) -> list[Any]:
    """Inlined, unless the same body is called several times; shardings that the inner ``jit`` fixed become constraints."""
    body, (ins, outs) = _jax.subprogram(eqn), _jax.jit_shardings(eqn)

    def inside(values: list[Any], inlined: bool = False) -> list[Any]:
        results = interp.run(body, [_constrain(v, s) for v, s in zip(values, ins, strict=True)], inlined)
        return [_constrain(v, s) for v, s in zip(results, outs, strict=True)]

    if id(body.jaxpr) not in interp.repeated or not _jax.is_staging():
        return inside(values, inlined=True)
    inside.__name__ = eqn.params.get("name", "call")
    return interp.call(body, (*ins, *outs), jax.jit, inside, values)


def _constrain(value: Any, sharding: Any) -> Any:
    if sharding is None or isinstance(value, Factored):
        return value
    return _jax.place(value, sharding)


def _remat(interp: Interpreter, eqn: Eqn, values: list[Any]) -> list[Any]:
    body, how = _jax.subprogram(eqn), _jax.remat(eqn)
    return interp.call(
        body, tuple(how.values()), partial(jax.checkpoint, **how), lambda values: interp.run(body, values), values
    )


def _shard_map(interp: Interpreter, eqn: Eqn, values: list[Any]) -> list[Any]:
    """Each axis of a factor is split over the mesh as the axis of the weight that it runs along."""
    body, how = _jax.subprogram(eqn), _jax.shard_map(eqn)
    specs = [_factor_specs(v, spec) for v, spec in zip(values, how.pop("in_specs"), strict=True)]

    def local(arrays: list[Any]) -> list[Any]:
        inside = [_local(v, *part) if isinstance(v, Factored) else part for v, part in zip(values, arrays, strict=True)]
        return [interp.dense(v, "shard_map (returned from its body)") for v in interp.run(body, inside)]

    arrays = [[v.w, *v.parts] if isinstance(v, Factored) else v for v in values]
    return list(jax.shard_map(local, in_specs=(specs,), **how | {"out_specs": list(how["out_specs"])})(arrays))


def _local(value: Factored, w: jax.Array, *parts: jax.Array) -> Factored:
    """One device's part of a weight: an axis may have come down to size one, which no factor keeps."""
    return replace(value, w=w, parts=parts).map_parts(w, lambda part, labels: (part, labels))


def _factor_specs(value: Any, spec: Any) -> Any:
    if not isinstance(value, Factored):
        return spec
    axes = dict(enumerate(spec))
    return [spec, *(jax.sharding.PartitionSpec(*(axes.get(d) for d in labels)) for labels in value.labels)]


def _scan(interp: Interpreter, eqn: Eqn, values: list[Any]) -> list[Any]:
    s = _jax.scan(eqn)
    consts, carry, xs = _split(values, s.num_consts, s.num_carry)
    kept, carried = _loop_carry(interp, eqn.primitive.name, carry, _passed.forwarded(s.body, s.num_consts, s.num_carry))
    unstacked = [v.unstack() if isinstance(v, Factored) else ([v], lambda one: one[0]) for v in xs]
    steps = jnp.arange(s.length) if _has_keys([*consts, *kept.values(), *xs]) else None

    def body(c: list[Any], x: Any) -> tuple[list[Any], list[Any]]:
        step, parts = x
        fixed = [_refold(v, step) for v in consts]
        full = _merge_carry({i: _refold(v, step) for i, v in kept.items()}, c)
        sliced = [_refold(inside(part), step) for (_, inside), part in zip(unstacked, parts, strict=True)]
        outs = interp.run(s.body, [*fixed, *full, *sliced])
        outs = [None if i in kept else interp.dense(v, "scan (returned from its body)") for i, v in enumerate(outs)]
        return [v for i, v in enumerate(outs[: s.num_carry]) if i not in kept], outs[s.num_carry :]

    out, ys = lax.scan(
        body, carried, (steps, [arrays for arrays, _ in unstacked]), length=s.length, reverse=s.reverse, unroll=s.unroll
    )
    return [*_merge_carry(kept, out), *ys]


def _while(interp: Interpreter, eqn: Eqn, values: list[Any]) -> list[Any]:
    w = _jax.while_(eqn)
    cond_consts, body_consts, carry = _split(values, w.cond_consts, w.body_consts)
    kept, carried = _loop_carry(interp, eqn.primitive.name, carry, _passed.forwarded(w.body, w.body_consts, len(carry)))
    steps = jnp.zeros((), jnp.int32) if _has_keys(body_consts + list(kept.values())) else None

    batched = w.cond.jaxpr.outvars[0].aval.ndim > 0

    def go(state: Any) -> jax.Array:
        (flag,) = interp.run(w.cond, [*cond_consts, *_merge_carry(kept, state[1])])
        return flag

    def cond(state: Any) -> jax.Array:
        return go(state).any()  # under vmap the condition has an axis of examples: turn while any wants to

    def body(state: Any) -> Any:
        step, c = state
        full = _merge_carry({i: _refold(v, step) for i, v in kept.items()}, c)
        outs = interp.run(w.body, [*(_refold(v, step) for v in body_consts), *full])
        outs = [interp.dense(v, "while (returned from its body)") for i, v in enumerate(outs) if i not in kept]
        if batched:  # examples whose loop has ended keep what they have
            outs = [_select(go(state), new, old) for new, old in zip(outs, c, strict=True)]
        return None if step is None else step + 1, outs

    return _merge_carry(kept, lax.while_loop(cond, body, (steps, carried))[1])


def _cond(interp: Interpreter, eqn: Eqn, values: list[Any]) -> list[Any]:
    index, *operands = values

    def branch(program: _jax.Program) -> Callable[[list[Any]], list[Any]]:
        return lambda vs: [interp.dense(v, "cond (returned from a branch)") for v in interp.run(program, vs)]

    found = [branch(p) for p in _jax.branches(eqn)]
    platforms = _jax.platforms(eqn)
    if platforms is not None:  # only the branch of the platform at hand is compiled
        named = {p: f for names, f in zip(platforms, found, strict=True) for p in names or ("default",)}
        return list(lax.platform_dependent(operands, **named))
    return lax.switch(interp.dense(index, "cond (its index)"), found, operands)


def _barrier(interp: Interpreter, eqn: Eqn, values: list[Any]) -> list[Any]:
    """``optimization_barrier`` takes and returns any number of values: it is here because it alone may meet several weights."""
    ws = _jax.bind(eqn, [v.w if isinstance(v, Factored) else v for v in values])
    return [replace(v, w=w) if isinstance(v, Factored) else w for v, w in zip(values, ws, strict=True)]


BODIES: dict[str, Body] = {
    "optimization_barrier": _barrier,
    **dict.fromkeys(_jax.CALLS, _jit),
    **dict.fromkeys(("remat2", "checkpoint"), _remat),
    "shard_map": _shard_map,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def _split(values: list[Any], first: int, second: int) -> tuple[list[Any], list[Any], list[Any]]:
    return values[:first], values[first : first + second], values[first + second :]


def _loop_carry(
    interp: Interpreter, loop: str, carry: list[Any], forwarded: set[int]
) -> tuple[dict[int, Any], list[Any]]:
    """Splits a loop's carry into weights that pass through unchanged, by position, and the rest as arrays."""
    kept = {i: v for i, v in enumerate(carry) if i in forwarded and isinstance(v, Factored)}
    return kept, [interp.dense(v, f"{loop} (carried and changed)") for i, v in enumerate(carry) if i not in kept]


def _merge_carry(kept: dict[int, Any], carried: Sequence[Any]) -> list[Any]:
    rest = iter(carried)
    return [kept[i] if i in kept else next(rest) for i in range(len(kept) + len(carried))]


def _select(go: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(lax.broadcast_in_dim(go, new.shape, range(go.ndim)), new, old)


def _has_keys(values: list[Any]) -> bool:
    return any(isinstance(v, Factored) and len(v.parts) > 2 for v in values)


def _refold(value: Any, step: Any) -> Any:
    return value.refold(step) if isinstance(value, Factored) and step is not None else value
