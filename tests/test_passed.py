"""Which outputs of a program are its inputs: the answer is that of running it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jlora import _jax, _passed


@jax.custom_vjp
def halved(x, y):
    return x, 2.0 * y


halved.defvjp(lambda x, y: (halved(x, y), None), lambda _, g: (0.5 * g[0], 2.0 * g[1]))


def step(c, x):
    return (c[0], c[2], c[1]), (x[0], x[1] + 1.0)


def sharded(out_specs):
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(lambda x, y: (x, y), mesh=mesh, in_specs=(P("a"), P()), out_specs=out_specs, check_vma=False)


PROGRAMS = {  # function of three arrays, and for each output the input that it is
    "itself": (lambda x, y, z: (y, x, z + 0.0), [1, 0, None]),
    "jit": (lambda x, y, z: jax.jit(lambda a, b: (b, a, a + b))(x, z), [2, 0, None]),
    "nested": (
        lambda x, y, z: jax.checkpoint(jax.jit(lambda a, b: (jax.jit(lambda c: c)(b), a * 2.0)))(x, z),
        [2, None],
    ),
    "custom_vjp": (lambda x, y, z: halved(x, y), [0, None]),
    "cond": (lambda x, y, z: lax.cond(x.sum() > 0, lambda: (x, y, z), lambda: (x, z, y)), [0, None, None]),
    "scan": (
        lambda x, y, z: jax.tree.leaves(lax.scan(lambda c, x: step(c, jax.jit(lambda x: x)(x)), (x, y, z), (x, y))),
        [0, None, None, 0, None],
    ),
    "while": (
        lambda x, y, z: lax.while_loop(
            lambda c: c[1].sum() < 9.0, lambda c: (jax.jit(lambda x: x)(c[0]), c[1] + z), (x, y)
        ),
        [0, None],
    ),
    "shard_map": (lambda x, y, z: sharded((P("a"), P()))(x, y), [0, 1]),
    "shard_map to another split": (lambda x, y, z: sharded((P("a"), P("a")))(x, y), [0, None]),
    "barrier": (lambda x, y, z: lax.optimization_barrier((z, x)), [2, 0]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_outputs_that_are_inputs(name):
    fn, wanted = PROGRAMS[name]
    args = [jnp.arange(1.0, 5.0) * n for n in (1.0, 2.0, 3.0)]
    program = _jax.trace(lambda *args: list(fn(*args)), args)
    found = _passed.passed(program)
    assert found == wanted
    for out, source in zip(fn(*args), found, strict=True):
        if source is not None:
            np.testing.assert_array_equal(out, args[source])


def test_a_derivative_of_its_own_is_no_forward():
    """A carried weight that goes through a ``custom_vjp`` has the same value, and another derivative."""
    for fn, kept in ((jax.jit(lambda x, y: (x, y)), {0, 1}), (halved, set())):
        program = _jax.trace(lambda *args, fn=fn: list(fn(*args)), [jnp.ones(4)] * 2)
        assert _passed.forwarded(program, 0, 2) == kept
