"""Random programs: weights seen through chains of views, joins and products with constants, then used once; against the dense merge.

Compared are values and gradients, and what the gradient program computes. Axes of weights have odd sizes, while tokens and ranks are even:
so a value all of whose axes are odd is as large as a weight, and there may be no more of those than the model computes itself. Where
``sites`` accepts a leaf, ``wrap`` must keep it factored. ``JLORA_FUZZ=5000`` runs that many programs instead of the fixed sample.
"""

import os
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from measure import weights_made

import jlora

TOKENS = 4
SIZES = (1, 3, 5, 9)
LARGEST = 2000  # elements of a value


class Value:
    """A value of the program: its shape, and what makes it of parameters and the data ``i``, an index, and ``s``, a scalar.

    ``lazy`` if it may also be activations: a constant that is not square has multiplied it.
    """

    def __init__(self, shape, make, lazy=False):
        self.shape, self.make, self.lazy = tuple(shape), make, lazy

    def then(self, shape, fn):
        return Value(shape, lambda p, i, s: fn(self.make(p, i, s)), self.lazy)


def constant(*shape):
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape) / 2)


# --- One step: draws a value made of values, or None where it does not fit -------------------------------------------
def transpose(draw, v, axis):
    order = tuple(draw(st.permutations(range(len(v.shape)))))
    return v.then([v.shape[d] for d in order], lambda w: jnp.transpose(w, order))


def merge(draw, v, axis):
    if axis + 1 >= len(v.shape):
        return None
    new = (*v.shape[:axis], v.shape[axis] * v.shape[axis + 1], *v.shape[axis + 2 :])
    return v.then(new, lambda w: w.reshape(new))


def split(draw, v, axis):
    if v.shape[axis] % 3:
        return None
    new = (*v.shape[:axis], 3, v.shape[axis] // 3, *v.shape[axis + 1 :])
    return v.then(new, lambda w: w.reshape(new))


def window(draw, v, axis):
    n = v.shape[axis]
    stride = draw(st.sampled_from([1, 1, 2]))
    size = draw(st.sampled_from([k for k in range(1, n + 1, 2) if (k - 1) * stride < n]))
    start = draw(st.integers(0, n - (size - 1) * stride - 1))
    return v.then(
        _with(v.shape, axis, size),
        lambda w: lax.slice_in_dim(w, start, start + (size - 1) * stride + 1, stride, axis),
    )


def dynamic_window(draw, v, axis):
    size = draw(st.sampled_from(range(1, v.shape[axis] + 1, 2)))
    return Value(
        _with(v.shape, axis, size), lambda p, i, s: lax.dynamic_slice_in_dim(v.make(p, i, s), i, size, axis), v.lazy
    )


def pick(draw, v, axis):
    shape = v.shape[:axis] + v.shape[axis + 1 :]
    way = draw(st.sampled_from(["fixed", "clip", "fill", "dynamic"]))
    if way == "fixed":
        return v.then(shape, lambda w: lax.index_in_dim(w, 0, axis, keepdims=False))
    if way == "dynamic":
        return Value(shape, lambda p, i, s: lax.dynamic_index_in_dim(v.make(p, i, s), i, axis, keepdims=False), v.lazy)
    # Out of bounds a fill is zero, and so is the update: one of NaN has no gradient to compare.
    return Value(shape, lambda p, i, s: jnp.take(v.make(p, i, s), i, axis=axis, mode=way, fill_value=0), v.lazy)


def reorder(draw, v, axis):
    order = np.asarray(draw(st.lists(st.integers(0, v.shape[axis] - 1), min_size=3, max_size=3)))
    way = draw(st.sampled_from(["clip", "fill", "wrap"]))
    return v.then(_with(v.shape, axis, 3), lambda w: jnp.take(w, order, axis=axis, mode=way))


def expand(draw, v, axis):
    return v.then((*v.shape[:axis], 1, *v.shape[axis:]), lambda w: jnp.expand_dims(w, axis))


def squeeze(draw, v, axis):
    if v.shape[axis] != 1:
        return None
    return v.then(v.shape[:axis] + v.shape[axis + 1 :], lambda w: jnp.squeeze(w, axis))


def broadcast(draw, v, axis):
    shape = (*v.shape[:axis], 3, *v.shape[axis:])
    return v.then(shape, lambda w: jnp.broadcast_to(jnp.expand_dims(w, axis), shape))


def tile(w, n, axis):
    return jnp.tile(w, [n if d == axis else 1 for d in range(w.ndim)])


def repeat(draw, v, axis):
    way = draw(st.sampled_from([jnp.repeat, tile]))
    return v.then(_with(v.shape, axis, 3 * v.shape[axis]), lambda w: way(w, 3, axis=axis))


def pad(draw, v, axis):
    low, high, inner = draw(
        st.sampled_from([(1, 1, 0), (0, 2, 0), (2, 0, 0), (-1, 1, 0), (0, 0, 1), (3, -1, 0), (-1, -1, 0)])
    )
    size = v.shape[axis] + low + high + inner * (v.shape[axis] - 1)
    if size < 1 or size % 2 == 0:
        return None
    config = [(low, high, inner) if d == axis else (0, 0, 0) for d in range(len(v.shape))]
    return v.then(_with(v.shape, axis, size), lambda w: lax.pad(w, jnp.zeros((), w.dtype), config))


def flip(draw, v, axis):
    return v.then(v.shape, lambda w: jnp.flip(w, axis))


def roll(draw, v, axis):
    return v.then(v.shape, lambda w: jnp.roll(w, 1, axis))


def scale(draw, v, axis):
    way = draw(st.sampled_from([lambda w: -w / 1.5, lambda w: 0.7 * w, lambda w: w.astype(jnp.float64) * 2]))
    return v.then(v.shape, way)


def gain(draw, v, axis):
    wide = constant(v.shape[axis]).reshape([n if d == axis else 1 for d, n in enumerate(v.shape)]) + 2
    way = draw(st.sampled_from(["times", "over", "of data"]))
    if way == "of data":
        return Value(v.shape, lambda p, i, s: v.make(p, i, s) * (wide * s), v.lazy)
    return v.then(v.shape, (lambda w: w * wide) if way == "times" else (lambda w: w / wide))


def mixed(draw, v, axis):
    """A constant on either side, with as many rows as it sums over, more or fewer; sometimes one matrix for each slice."""
    rows, right = draw(st.sampled_from([v.shape[axis], 3, 5, 9])), draw(st.booleans())
    letters = "abcdefg"[: len(v.shape)]
    along = draw(st.sampled_from([None, *(c for d, c in enumerate(letters) if d != axis)]))
    by = ("" if along is None else along) + "z" + letters[axis]
    size = dict(zip(letters, v.shape, strict=True)) | {"z": rows}
    out = letters.replace(letters[axis], "z")
    matrix = constant(*(size[c] for c in by))
    equation = f"{letters},{by}->{out}" if right else f"{by},{letters}->{out}"
    new = v.then([size[c] for c in out], lambda w: jnp.einsum(equation, *((w, matrix) if right else (matrix, w))))
    new.lazy = v.lazy or rows != v.shape[axis]
    return new


def inside(draw, v, axis):
    """A view in a function that is jitted or rematerialised."""
    how = draw(st.sampled_from([jax.jit, jax.checkpoint]))
    return v.then(v.shape, lambda w: how(lambda w: jnp.flip(w, axis) * 0.5)(w))


VIEWS = (
    transpose, merge, split, window, dynamic_window, pick, reorder, expand, squeeze, broadcast, repeat, pad, flip, roll, scale, gain,
    mixed, mixed, inside,
)  # fmt: skip


def add(draw, u, v, axis):
    if u.shape != v.shape:
        return None
    way = draw(st.sampled_from([jnp.add, jnp.subtract]))
    return _both(u.shape, u, v, way)


def concatenate(draw, u, v, axis):
    if len(u.shape) != len(v.shape) or _with(u.shape, axis, 1) != _with(v.shape, axis, 1):
        return None
    shape = _with(u.shape, axis, u.shape[axis] + v.shape[axis] + 1)
    between = jnp.ones(_with(u.shape, axis, 1))
    return _both(shape, u, v, lambda u, v: jnp.concatenate([u, between, v], axis))


def stack(draw, u, v, axis):
    if u.shape != v.shape:
        return None
    shape = (*u.shape[:axis], 3, *u.shape[axis:])
    if draw(st.booleans()):
        return _both(shape, u, v, lambda u, v: jnp.stack([u, v, v], axis))
    return _both(shape, u, v, lambda u, v: jnp.stack([u, jnp.ones_like(u), v], axis))


def multiply(draw, u, v, axis):
    """A product of two weights along axes of one size."""
    along = [d for d, n in enumerate(v.shape) if n == u.shape[axis]]
    if not along:
        return None
    other = draw(st.sampled_from(along))
    shape = (*(n for d, n in enumerate(u.shape) if d != axis), *(n for d, n in enumerate(v.shape) if d != other))
    new = _both(shape, u, v, lambda u, v: jnp.tensordot(u, v, ((axis,), (other,))))
    new.lazy = new.lazy or any(prod(w.shape) != u.shape[axis] ** 2 for w in (u, v))
    return new


JOINS = (add, concatenate, stack, multiply)


def _with(shape, axis, size):
    return tuple(size if d == axis else n for d, n in enumerate(shape))


def _both(shape, u, v, fn):
    return Value(shape, lambda p, i, s: fn(u.make(p, i, s), v.make(p, i, s)), u.lazy or v.lazy)


# --- Programs --------------------------------------------------------------------------------------------------------
class Program(NamedTuple):
    """A function of weights, activations, an index and a scalar."""

    steps: list[Any]
    fn: Any
    weights: list[Any]
    activations: list[Any]
    seed: int
    counted: bool  # whether values as large as a weight can be told: none of them may be activations

    def __repr__(self):
        return f"weights {self.weights}, activations {self.activations}, seed {self.seed}: {'; '.join(self.steps)}"


@st.composite
def programs(draw_any):
    """A program, as the steps drawn for it."""
    drawn, said = [], []

    def draw(strategy):
        drawn.append(draw_any(strategy))
        return drawn[-1]

    def note(name):
        said.append(f"{name}({', '.join(getattr(x, '__name__', str(x)) for x in drawn)})")
        drawn.clear()

    stored = [
        [draw(st.sampled_from(SIZES)) for _ in range(draw(st.integers(2, 4)))] for _ in range(draw(st.integers(1, 2)))
    ]
    if draw(st.booleans()):  # weights that can be joined
        stored.append(stored[0])
    values = [Value(shape, lambda p, i, s, k=k: p[f"w{k}"]) for k, shape in enumerate(stored)]
    for _ in range(draw(st.integers(0, 6))):
        steps = st.sampled_from(VIEWS if draw(st.integers(0, 2)) else JOINS)
        at, step = draw(st.integers(0, len(values) - 1)), draw(steps)
        if not values[at].shape:
            continue
        axis = draw(st.integers(0, len(values[at].shape) - 1))
        drawn[:] = [at, axis]
        others = [values[draw(st.integers(0, len(values) - 1))]] if step in JOINS else []
        new = step(draw, values[at], *others, axis)
        if new is None or prod(new.shape) > LARGEST or len(new.shape) > 5:
            continue
        note(step.__name__)
        values = [new if v is values[at] or v in others else v for v in values]
        values = list(dict.fromkeys(values))
    drawn.clear()
    uses = [use(draw, v.shape) for v in values]
    note("use")
    x_shapes = [shape for shape, _ in uses]

    def fn(params, xs, i, s):
        return [jnp.tanh(fn(x, v.make(params, i, s), i)) for x, v, (_, fn) in zip(xs, values, uses, strict=True)]

    return Program(said, fn, stored, x_shapes, draw(st.integers(0, 2**31)), not any(v.lazy for v in values))


def use(draw, shape):
    """What data do to a weight of ``shape``: the shape of the activations, and a function of those, the weight and an index."""
    if shape and draw(st.integers(0, 3)) == 0:
        axis = draw(st.integers(0, len(shape) - 1))

        def look_up(x, w, i):
            return x + jnp.take(w, (i + jnp.arange(TOKENS)) % w.shape[axis], axis=axis, mode="clip")

        return [TOKENS if d == axis else n for d, n in enumerate(shape)], look_up
    letters = "abcdefgh"[: len(shape)]
    first = draw(st.integers(0, max(len(letters) - 1, 0)))
    summed = [c for d, c in enumerate(letters) if d == first or draw(st.integers(0, 3)) == 0]
    out = "".join(c for c in letters if c not in summed)
    batch = "".join(c for c in out if draw(st.integers(0, 3)) == 0)
    x_letters = "".join(draw(st.permutations([*summed, *batch, "z"])))
    size = dict(zip(letters, shape, strict=True)) | {"z": TOKENS}
    if draw(st.booleans()):
        return [size[c] for c in x_letters], lambda x, w, i: jnp.einsum(f"{x_letters},{letters}->{out}z", x, w)
    return [size[c] for c in x_letters], lambda x, w, i: jnp.einsum(f"{letters},{x_letters}->{out}z", w, x)


def check(program):
    _, fn, stored, x_shapes, seed, counted = program
    rng = np.random.default_rng(seed)

    def normal(shape):
        return jnp.asarray(rng.standard_normal(shape) / 2)

    params = {f"w{k}": normal(shape) for k, shape in enumerate(stored)}
    args = [normal(shape) for shape in x_shapes], jnp.int32(rng.integers(0, 3)), jnp.asarray(1.3)
    sites = jlora.sites(fn, params, *args)
    compare(fn, params, args, sites, list(sites), rng, counted=counted)
    if len(sites) > 1 and seed % 2:
        compare(fn, params, args, sites, [list(sites)[seed % len(sites)]], rng, counted=counted)
    unused = [path for path, site in sites.skipped.items() if site.kind == "unused"]
    dense = [path for path in sites.skipped if path not in unused]
    if dense:  # no matrix here, or its factors would mix: wrap must be right all the same when it may go dense
        compare(fn, params, args, sites, dense, rng, dense="allow")
    return len(sites)


def compare(fn, params, args, sites, targets, rng, dense="error", counted=False):
    if not targets:
        return
    ranks = [{**sites, **sites.skipped}[path].max_rank for path in targets]
    rule = jlora.LoRA(rank=max(1, min(2, *ranks)), targets=targets, allow_dense=dense == "allow")
    lora = jax.eval_shape(lambda key: jlora.init(key, params, sites, rule), jax.random.key(0))
    lora = jax.tree.map(lambda f: jnp.asarray(rng.standard_normal(f.shape), f.dtype), lora)
    apply = jlora.wrap(fn, dense=dense)

    def total(outs):
        return sum((out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum() for out in outs)

    def adapted(lora, params, *args):
        return total(apply(params, lora, *args))

    def merged(lora, params, *args):
        return total(fn(jlora.merge(params, lora), *args))

    # One program of both: compiling is what takes the time.
    both = jax.jit(lambda *args: [jax.value_and_grad(f)(*args) for f in (adapted, merged)])
    (got, grads), (expected, wanted) = both(lora, params, *args)
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-8)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-8 * max(1.0, float(np.abs(y).max())))
    # Factors of rank one have odd axes only, and rows that an index of the program itself picks are formed.
    if counted and min(ranks) > 1 and not any("lookup" in sites[path].kind for path in targets):
        made = weights_made(jax.grad(adapted), lora, params, *args)
        own = weights_made(lambda *args: total(fn(*args)), params, *args)
        assert made <= own, f"{made} values as large as a weight, where the model makes {own}"


COUNT = int(os.environ.get("JLORA_FUZZ", "0"))


@settings(
    max_examples=COUNT or 40,
    deadline=None,
    derandomize=not COUNT,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(programs())
def test_any_chain_of_views(program):
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        assert check(program) >= 0
