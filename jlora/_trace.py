"""Tracing a call ``fn(params, *args, **kwargs)``: which arguments are arrays and which stay static Python values."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora import _jax
from jlora._text import shown


class Call(NamedTuple):
    """A traced call.

    Attributes:
        program: Takes the leaves of ``params``, then the array arguments.
        paths: Of the leaves of ``params``.
        leaves: Of ``params``.
        arrays: The array arguments.
        out_tree: Structure of what ``fn`` returned.
        data: Variables whose values depend on the array arguments; the others are made of parameters and constants.
        plain: By identity, equations of ``program`` that jlora wrote anew, as the function's own trace has them. Where no weight enters
            one, that is what to evaluate: JAX has compiled it before.
    """

    program: _jax.Program
    paths: list[str]
    leaves: list[Any]
    arrays: list[Any]
    out_tree: Any
    data: frozenset[_jax.Var]
    plain: dict[int, _jax.Eqn]


def check_function(fn: Any, call: str) -> None:
    """Raises unless ``fn`` is a function of parameters, and not a Flax module, which holds or makes its own."""
    bases = [f"{base.__module__}.{base.__qualname__}" for base in type(fn).__mro__]
    if any(name.startswith("flax.nnx.") and name.endswith(".Module") for name in bases):
        hint = "An NNX module holds its parameters: fn, params = jlora.nnx.split(module)."
    elif "flax.linen.module.Module" in bases:
        hint = "Pass the module's function of its parameters: module.apply."
    elif callable(fn):
        return
    else:
        hint = "Pass a function whose first argument is a tree of parameters."
    raise TypeError(f"The function comes first: {call}.\n  got: {type(fn).__name__} as fn\n  {hint}")


def shapes_of(fn: Any) -> dict[str, Any]:
    """Arguments by keyword of which a function has shapes but no values, for a call that computes nothing; most have none."""
    return dict(getattr(fn, "__jlora_shapes__", {}))


def is_array(x: Any) -> bool:
    """Whether an argument is traced. Python numbers, flags, strings and functions are not: they stay as they are."""
    if isinstance(x, np.ndarray | np.generic):
        number = x.dtype.kind not in "OSUV" or jax.dtypes.issubdtype(x.dtype, np.inexact)
        return number and not isinstance(x, np.bool_)  # a flag that came out of numpy is a flag
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct)


def trace_call(
    fn: Callable[..., Any], params: tuple[list[str], list[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Call:
    """Traces ``fn(params, *args, **kwargs)`` without computing anything.

    ``params`` come as ``_paths.flatten`` gives them; leaves may be ``jax.ShapeDtypeStruct``s.
    """
    paths, leaves, tree = params
    if not leaves:
        raise ValueError(
            f"The parameter tree has no leaves.\n  got: {tree}\n  Pass the parameters second: (fn, params, ...)."
        )
    for path, leaf in zip(paths, leaves, strict=True):
        if not is_array(leaf) and not isinstance(leaf, int | float | complex):
            raise TypeError(f"The leaf '{shown(path)}' of the parameters is not an array but {type(leaf).__name__}.")
    flat, arg_tree = jax.tree_util.tree_flatten((args, kwargs))
    dynamic = [is_array(x) for x in flat]
    arrays = [x for x, is_dynamic in zip(flat, dynamic, strict=True) if is_dynamic]
    out_tree = None

    def flat_fn(leaves: list[Any], arrays: list[Any]) -> list[Any]:
        nonlocal out_tree
        rest = iter(arrays)
        values = [next(rest) if is_dynamic else x for x, is_dynamic in zip(flat, dynamic, strict=True)]
        args, kwargs = jax.tree_util.tree_unflatten(arg_tree, values)
        out, out_tree = jax.tree_util.tree_flatten(fn(jax.tree_util.tree_unflatten(tree, leaves), *args, **kwargs))
        return out

    program = _jax.trace(flat_fn, (leaves, arrays))
    follower = _Follower()
    jaxpr = follower.follow(program.jaxpr, [False] * len(leaves) + [True] * len(arrays))
    program = _jax.Program(jaxpr, program.consts)
    return Call(program, paths, leaves, arrays, out_tree, frozenset(follower.data), follower.plain)


class _Follower:
    """Marks every variable of a program, and of the programs inside it, that depends on what is marked.

    JAX traces a jitted function once for all calls with equal shapes. Where such calls differ in which arguments are data, each kind of
    call gets a body of its own, or what is data in one would be data in all.
    """

    def __init__(self) -> None:
        self.data: set[_jax.Var] = set()
        self.plain: dict[int, _jax.Eqn] = {}  # by identity: equations that were written anew, as they stood
        self.made: dict[int, tuple[_jax.Jaxpr, dict[tuple[bool, ...], _jax.Jaxpr]]] = {}

    def follow(self, jaxpr: _jax.Jaxpr, inputs: Sequence[bool]) -> _jax.Jaxpr:
        """``jaxpr`` where the inputs marked in ``inputs`` are data."""
        _, known = self.made.setdefault(id(jaxpr), (jaxpr, {}))
        marks = tuple(inputs)
        if marks not in known:
            known[marks] = self.step_through(_jax.copy_of(jaxpr, self.plain) if known else jaxpr, marks)
        return known[marks]

    def step_through(self, jaxpr: _jax.Jaxpr, inputs: Sequence[bool]) -> _jax.Jaxpr:
        data = self.data
        data.update(v for v, marked in zip(jaxpr.invars, inputs, strict=True) if marked)
        eqns = []
        for eqn in jaxpr.eqns:
            marked = [_jax.among(v, data) for v in eqn.invars]
            outs = [any(marked)] * len(eqn.outvars)
            bodies = [self.follow(body.jaxpr, args) for body, args in _jax.bodies(eqn, marked)]
            if bodies and eqn.primitive.name in (*_jax.CALLS, *_jax.CUSTOM):
                outs = [_jax.among(v, data) for v in bodies[0].outvars]
            elif eqn.primitive.name == "optimization_barrier":
                outs = marked
            data.update(v for v, out in zip(eqn.outvars, outs, strict=True) if out)
            eqns.append(_jax.with_bodies(eqn, bodies, self.plain))
        return jaxpr if all(new is old for new, old in zip(eqns, jaxpr.eqns, strict=True)) else jaxpr.replace(eqns=eqns)
