"""What a traced program really does: values it computes, counted in its jaxpr."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

# These show the base in another form; they compute nothing new from it.
_VIEWS = {
    "transpose", "reshape", "squeeze", "slice", "dynamic_slice", "broadcast_in_dim", "rev", "copy", "copy_p",
    "convert_element_type", "optimization_barrier", "name", "gather", "split", "reduce_precision", "sharding_constraint",
}  # fmt: skip


def equations(jaxpr: Any) -> Any:
    """Every equation of a program and of the programs inside it, but not those that only call one."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in jaxpr.eqns:
        inner = list(core.jaxprs_in_params(eqn.params))
        for sub in inner:
            yield from equations(sub)
        if not inner:
            yield eqn


def computed(eqn: Any) -> list[Any]:
    """The float values that an equation computes; a view computes none."""
    if eqn.primitive.name in _VIEWS:
        return []
    return [v for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.inexact)]


def computed_values(jaxpr: Any, shapes: set[tuple[int, ...]], ignore: tuple[str, ...] = ()) -> int:
    """How many float values of one of ``shapes`` (in any order of axes) a program computes, views and ``ignore`` not counted."""
    wanted = {tuple(sorted(shape)) for shape in shapes}
    return sum(
        tuple(sorted(v.aval.shape)) in wanted
        for eqn in equations(jaxpr)
        if eqn.primitive.name not in ignore
        for v in computed(eqn)
    )


def weights_made(fn: Any, *args: Any) -> int:
    """How many values ``fn(*args)`` computes that are as large as a weight: where only weights have odd axes, and no even ones.

    More than one of them has to be above one: vectors do not count.
    """
    return sum(
        all(n % 2 for n in v.aval.shape) and sum(n > 1 for n in v.aval.shape) > 1
        for eqn in equations(jax.make_jaxpr(fn)(*args))
        for v in computed(eqn)
    )


def flops(fn: Any, *args: Any) -> float:
    """Flops of the compiled ``fn(*args)``, as XLA counts them."""
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def temporaries(fn: Any, *args: Any) -> int:
    """Bytes of temporary memory of the compiled ``fn(*args)``."""
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes
