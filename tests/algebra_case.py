"""What tests of the algebra of adapters share: adapters of many cases, their dense updates, and what is close."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from cases import BY_NAME

import jlora

NAMES = [
    "dense",
    "heads_in",
    "contracted_apart",
    "experts_left",
    "unit_axes",
    "conv",
    "lookup_in_layers",
    "scan_of_scan",
    "nnx",
]


TOL = 2e-5


def trained(name, rank=3, dtype=jnp.float32, seed=5, **rule):
    """An adapter of a row of the table, every factor random."""
    case = BY_NAME[name]
    how = {"alpha": 3.0, "dropout": 0.1, "targets": list(case.expect), "dtype": dtype} | rule
    rule = jlora.LoRA(rank=rank, **how)
    shapes = jax.eval_shape(
        lambda: jlora.init(jax.random.key(3), case.params, case.sites(), rule)
    )  # nothing to compile
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in leaves])


def at_once(fn, *args):
    """``fn(*args)`` as one program, in haste: operation by operation, each new shape would cost a compilation for each."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})(*args)


def dense(x):
    """The update as matrices ``(*batch, inputs, outputs)`` in fp64."""
    n = len(x.batch)
    a, b = (np.asarray(f, np.float64) for f in (x.a, x.b))
    return x.scale * a.reshape(*a.shape[:n], -1, x.rank) @ b.reshape(*b.shape[:n], x.rank, -1)


def truncated(d, rank):
    u, s, vh = np.linalg.svd(d, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :], (s[..., :rank] ** 2).sum() / (s**2).sum()


def close(got, expected, tol=TOL):
    assert np.shape(got) == np.shape(expected)
    error = np.linalg.norm(np.asarray(got, np.float64) - expected)
    assert error <= tol * np.linalg.norm(expected), error / np.linalg.norm(expected)


def statics(x):
    return {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if f.name not in ("a", "b")}


def mean_square(lora):
    return sum((d**2 + d).sum() for d in (x.delta() for x in lora.values()))


grads_of = jax.grad(mean_square)


def assert_all_can_train(*grads):
    """By their ``grads_of``: every column of ``a`` and row of ``b`` gets a gradient, or its partner does."""
    for path, g in (item for tree in grads for item in tree.items()):
        n = len(g.batch)
        a, b = np.asarray(g.a).reshape(*g.a.shape[:n], -1, g.rank), np.asarray(g.b)
        a, b = np.abs(a).max(-2), np.abs(b.reshape(*b.shape[:n], g.rank, -1)).max(-1)
        assert ((a > 0) | (b > 0)).all(), path
