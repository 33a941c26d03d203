"""Weights inside functions that have a derivative of their own, such as solvers: what ``sites`` says of them, and the way that works.

Truth is the dense merge through the solver itself.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import D, M, array
from jax import lax
from jax.experimental.ode import odeint

import jlora

P = {"w": array(D, M) / 4, "v": array(M, D) / 4, "o": array(D, 3)}
Y = array(D)
TIMES = jnp.array([0.0, 1.0])


def net(p, y):
    return jnp.tanh(y @ p["w"]) @ p["v"]


def ode(f, y, *args):
    return odeint(lambda y, t, *args: f(*args, y), y, TIMES, *args)[-1]


def root(f, y, *args):
    """The ``z`` with ``z = y + f(z) / 4``."""

    def iterate(g, z):
        return lax.fori_loop(0, 30, lambda i, z: z - g(z), z)

    def residual(z):
        return z - y - f(*args, z) / 4

    return lax.custom_root(residual, y, iterate, lambda g, b: jnp.linalg.solve(jax.jacobian(g)(b), b))


def linear(f, y, *args):
    """The ``z`` with ``z + J J' z = y``, where ``J`` is the derivative of ``f`` at ``y``."""

    def system(z):
        back, forth = jax.vjp(lambda y: f(*args, y), y)[1], lambda t: jax.jvp(lambda y: f(*args, y), (y,), (t,))[1]
        return z + forth(*back(z))

    return jax.scipy.sparse.linalg.cg(system, y, maxiter=50)[0]


SOLVERS = {
    "odeint": (ode, "custom_vjp_call"),
    "custom_root": (root, "(custom_jvp_call|call_hi_primitive)"),  # the latter since JAX 0.12
    "cg": (linear, "custom_linear_solve"),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_weights_inside_a_solver(name, standard_promotion):
    solve, primitive = SOLVERS[name]
    found = jlora.sites(lambda p, y: solve(net, y, p), P, Y)
    for path in ("w", "v"):
        reason = found.skipped[path].reason
        assert re.match(rf"it is used inside {primitive} at \S*test_solvers\.py.*: wrap the function inside", reason)

    lora = jlora.init(jax.random.key(0), P, jlora.sites(net, P, Y), jlora.LoRA(rank=2, targets=["w", "v"]))
    lora = jax.tree.map(lambda a: array(*a.shape) / 4, lora)
    inside = jlora.wrap(net)
    ways = [lambda lora: solve(inside, Y, P, lora), lambda lora: solve(lambda y: inside(P, lora, y), Y)]
    dense = jax.jit(jax.value_and_grad(lambda lora: (solve(net, Y, jlora.merge(P, lora)) ** 2).sum()))(lora)
    for way in ways:
        got = jax.jit(jax.value_and_grad(lambda lora, way=way: (way(lora) ** 2).sum()))(lora)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, dense)
    assert abs(dense[0] - (solve(net, Y, P) ** 2).sum()) > 1e-2
    assert min(float(abs(g).max()) for g in jax.tree.leaves(dense[1])) > 1e-3


@pytest.mark.parametrize("name", SOLVERS)
def test_weights_behind_a_solver(name, standard_promotion):
    solve, _ = SOLVERS[name]

    def fn(p, y):
        return solve(lambda y: jnp.tanh(y) / 2, y @ p["w"]) @ p["v"]

    lora = jlora.init(jax.random.key(0), P, jlora.sites(fn, P, Y), jlora.LoRA(rank=2, targets=["w", "v"]))
    lora = jax.tree.map(lambda a: array(*a.shape), lora)
    got = jax.jit(jax.value_and_grad(lambda lora: (jlora.wrap(fn)(P, lora, Y) ** 2).sum()))(lora)
    dense = jax.jit(jax.value_and_grad(lambda lora: (fn(jlora.merge(P, lora), Y) ** 2).sum()))(lora)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, dense)


def test_a_leaf_that_a_solver_gets_and_does_not_read(standard_promotion):
    found = jlora.sites(lambda p, y: ode(net, y, p) @ p["o"], P, Y)
    assert not found
    assert "is passed to custom_vjp_call at" in found.skipped["o"].reason
    assert "does not read it, though its derivative may: leave it out" in found.skipped["o"].reason
    found = jlora.sites(lambda p, y: ode(net, y, {"w": p["w"], "v": p["v"]}) @ p["o"], P, Y)
    assert list(found) == ["o"]


@jax.custom_vjp
def scaled(w, x):
    return w, x @ jnp.ones((D, 2))


scaled.defvjp(lambda w, x: (scaled(w, x), None), lambda _, g: (g[0] * 0.5, jnp.zeros(D)))


def test_what_is_said_of_other_functions_with_a_derivative_of_their_own():
    def reason(fn):
        return jlora.sites(fn, P, Y).skipped["w"].reason

    along = reason(lambda p, y: y @ scaled(p["w"], y)[0])
    assert along.startswith("it is passed through custom_vjp_call at ")
    assert along.endswith("which has a derivative of its own")
    assert reason(lambda p, y: y @ jax.nn.relu(p["w"])).startswith("all of it is needed by custom_jvp_call at ")

    @jax.custom_vjp
    def outer(w, y):
        return ode(lambda w, y: jnp.tanh(y @ w) @ w.T, y, w)

    outer.defvjp(lambda w, y: (outer(w, y), None), lambda _, g: None)
    assert reason(lambda p, y: outer(p["w"], y)).startswith("it is used inside custom_vjp_call at ")
    twice = reason(lambda p, y: outer(p["w"], y) + outer(p["w"], 2.0 * y))
    assert " and 1 more, which has a derivative of its own" in twice


def test_wrapping_the_solver_names_the_way_out(standard_promotion):
    lora = jlora.init(jax.random.key(0), P, jlora.sites(net, P, Y), jlora.LoRA(rank=2, targets="w"))
    with pytest.raises(jlora.DenseWeightError, match=r"(?s)custom_vjp_call.*of a solver, wrap the function inside"):
        jlora.wrap(lambda p, y: ode(net, y, p))(P, lora, Y)
