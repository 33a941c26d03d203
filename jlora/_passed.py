"""Which outputs of a traced program are inputs of it, unchanged.

JAX gives every output of an equation a variable of its own, also where the body returns what it was given, as the bodies of ``nnx.jit``
and ``nnx.remat`` return each variable of a module. Here such an output is followed back to the input that it is.
"""

from collections.abc import Sequence
from typing import Any

from jlora import _jax

_KEEP = ("optimization_barrier", "sharding_constraint", "reshard", "copy", "copy_p", "pvary")
"""Primitives that return the values they are given, each in its place."""


def passed(program: _jax.Program) -> list[int | None]:
    """For each output of ``program`` the number of the input whose value it always has, if there is one."""
    return _Passed((*_jax.CALLS, *_jax.CUSTOM), _KEEP).of(program)


def forwarded(body: _jax.Program, first: int, count: int) -> set[int]:
    """Which of the ``count`` carried values, inputs ``first`` onwards of ``body``, come out as they went in, with their derivatives."""
    return {i for i, source in enumerate(_Passed(_jax.CALLS).of(body)[:count]) if source == first + i}


class _Passed:
    """Finds inputs among outputs, seeing through the primitives ``calls``, which call one program, and ``keep``."""

    def __init__(self, calls: Sequence[str], keep: Sequence[str] = ()):
        self.calls, self.keep = calls, keep
        self.known: dict[int, list[int | None]] = {}  # of each program inside, by identity: many call one several times

    def of(self, program: _jax.Program) -> list[int | None]:
        jaxpr = program.jaxpr
        if id(jaxpr) not in self.known:
            source: dict[Any, int] = {v: i for i, v in enumerate(jaxpr.invars)}
            for eqn in jaxpr.eqns:
                for out, i in zip(eqn.outvars, self.through(eqn), strict=True):
                    if i is not None and _jax.among(eqn.invars[i], source.keys()):
                        source[out] = source[eqn.invars[i]]
            self.known[id(jaxpr)] = [None if _jax.is_literal(v) else source.get(v) for v in jaxpr.outvars]
        return self.known[id(jaxpr)]

    def through(self, eqn: Any) -> Sequence[int | None]:
        """For each output of ``eqn`` the number of the operand that it is."""
        name = eqn.primitive.name
        if name in self.calls:
            return self.of(_jax.subprogram(eqn))
        if name in self.keep:
            return range(len(eqn.outvars))
        return _LOOK[name](self, eqn) if name in _LOOK else [None] * len(eqn.outvars)

    def cond(self, eqn: Any) -> list[int | None]:
        found = zip(*(self.of(branch) for branch in _jax.branches(eqn)), strict=True)
        return [None if first is None or {first} != {first, *rest} else first + 1 for first, *rest in found]

    def scan(self, eqn: Any) -> list[int | None]:
        """A carried value comes out in its own place; slices that come out of each step are the stack again."""
        s = _jax.scan(eqn)
        head = s.num_consts + s.num_carry
        return [
            i if i is not None and (i == s.num_consts + j if j < s.num_carry else i >= head) else None
            for j, i in enumerate(self.of(s.body))
        ]

    def loop(self, eqn: Any) -> list[int | None]:
        w = _jax.while_(eqn)
        return [w.cond_consts + i if i == w.body_consts + j else None for j, i in enumerate(self.of(w.body))]

    def shard_map(self, eqn: Any) -> list[int | None]:
        how, found = _jax.shard_map(eqn), self.of(_jax.subprogram(eqn))
        return [
            i if i is not None and how["in_specs"][i] == spec else None
            for i, spec in zip(found, how["out_specs"], strict=True)
        ]


_LOOK = {"cond": _Passed.cond, "scan": _Passed.scan, "while": _Passed.loop, "shard_map": _Passed.shard_map}
