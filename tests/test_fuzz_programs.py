"""Random programs: layers that use their weights in every way there is, one after another, against the dense merge.

A program maps activations (tokens, width) through some layers; each draws a way to use its weights from ``WAYS``. None of them may need
a weight dense, and none may make one in silence: axes of weights have odd sizes, while tokens and ranks are even, so that values as large
as a weight can be counted. ``JLORA_FUZZ=5000`` runs that many programs instead of the fixed sample.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from measure import weights_made

import jlora

N = 4  # tokens
WIDTHS = (3, 5, 7, 9)
WAYS = {}


def way(*shapes):
    """Adds a way to use weights of ``shapes``, given as letters: d and m are the widths before and after, others are sizes."""

    def add(fn):
        WAYS[fn.__name__] = (shapes, fn)
        return fn

    return add


@way("dm")
def dense(w, x, i):
    return x @ w


@way("md")
def transposed(w, x, i):
    return x @ w.T


@way("dm", "dm")
def summed(u, v, x, i):
    return x @ (u - 0.5 * v)


@way("dm", "dm")
def shifted(u, v, x, i):
    return x @ (u + 0.1) + x @ jnp.roll(v, 1, axis=1)


@way("dm", "d3")
def concatenated(u, v, x, i):
    return (x @ jnp.concatenate([u, v], axis=1))[:, : u.shape[1]] + (x @ v).sum()


@way("dm", "3m")
def padded(u, v, x, i):
    below = jnp.concatenate([v, jnp.pad(u, ((1, 0), (0, 0)))])
    return jnp.pad(x, ((0, 0), (4, 0)), constant_values=0.3) @ below


@way("3dm", "dm")
def stacked(u, v, x, i):
    return jnp.einsum("nd,sdm->snm", x, jnp.concatenate([u, v[None]])).sum(0)


@way("dm")
def permuted(w, x, i):
    d, m = w.shape
    return x @ w[np.arange(d)[::-1]][:, (np.arange(m) + 1) % m]


@way("dm")
def tiled(w, x, i):
    return (x @ jnp.tile(w, (1, 2)))[:, ::2]


@way("dm")
def gained(w, x, i):
    return x @ (w * jnp.linspace(0.5, 2, w.shape[1])[None] / jnp.linspace(1, 2, w.shape[0])[:, None])


@way("d3m")
def heads(w, x, i):
    return jnp.einsum("nd,dhm->nhm", x, w)[:, 0] + x @ w.reshape(w.shape[0], -1)[:, -w.shape[2] :]


@way("5dm")
def experts(w, x, i):
    return jnp.einsum("nem,ne->nm", jnp.einsum("nd,edm->nem", x, w), jax.nn.softmax(x @ jnp.ones((x.shape[1], 5))))


@way("5dm")
def chosen(w, x, i):
    return jnp.einsum("nd,ndm->nm", x, w[(i + jnp.arange(N)) % 5])


@way("5dm")
def ragged(w, x, i):
    return lax.ragged_dot(x, w, jnp.array([2, 0, 1, 0, 1], jnp.int32))


@way("5md")
def ragged_transposed(w, x, i):
    return lax.ragged_dot(x, w.transpose(0, 2, 1), jnp.zeros(5, jnp.int32).at[i].set(N))


@way("3dd", "dm")
def scanned(w, v, x, i):
    return lax.scan(lambda c, w: (c + jnp.tanh(c @ w), None), x, w)[0] @ v


@way("3dd", "dm")
def rematerialised(w, v, x, i):
    step = jax.checkpoint(lambda c, w: (c + jnp.tanh(c @ w @ w.T), None), prevent_cse=False)
    return lax.scan(step, x, w, reverse=True)[0] @ v


@way("dd", "dd", "dm")
def layered(u, v, w, x, i):
    block = jax.jit(lambda w, x: x + jnp.tanh(x @ w))
    return block(v, block(u, x)) @ w


@way("dd", "dm")
def looped(u, w, x, i):
    return lax.fori_loop(0, 2, lambda _, c: jnp.tanh(c @ u), x) @ w


@way("dm", "dm")
def branched(u, v, x, i):
    return lax.cond(i > 0, lambda x: x @ u, lambda x: jnp.sin(x @ v) + x @ u, x)


def orthogonal(n):
    return jnp.asarray(np.linalg.qr(np.random.default_rng(n).standard_normal((n, n)))[0])


@way("dm")
def rotated(w, x, i):
    return x @ (orthogonal(w.shape[0]) @ w @ orthogonal(w.shape[1]))


@way("dm")
def projected(w, x, i):
    u = orthogonal(w.shape[0])[:, :3]
    return x @ (u @ (u.T @ w))


@way("5dm")
def rotated_each(w, x, i):
    return jnp.einsum("nd,edm->nem", x, jnp.einsum("ecd,edm->ecm", jnp.stack([orthogonal(w.shape[1])] * 5), w)).sum(1)


@way("d3", "m3")
def absorbed(q, k, x, i):
    return x @ (q @ k.T)


@way("9m", "dm")
def looked_up(table, w, x, i):
    rows = table[jnp.argmax(x, axis=1)] + jnp.take(table, i, axis=0, mode="clip")[None]
    return x @ w + rows


def convolved(names):
    """A convolution over the tokens, whose input, kernel and output lie as ``names`` say."""

    def convolve(w, x, i):
        lhs, _, out = names
        x = lax.expand_dims(x if lhs.index("W") < lhs.index("C") else x.T, [lhs.index("N")])
        y = lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=names)
        return lax.transpose(y, [out.index(c) for c in "NWC"])[0]

    convolve.__name__ = "convolved_" + "_".join(names).lower()
    way(names[1].translate(str.maketrans("WIO", "3dm")))(convolve)


for _names in (("NWC", "WIO", "NWC"), ("NWC", "WIO", "NCW"), ("WCN", "OIW", "CNW"), ("CNW", "IWO", "WNC")):
    convolved(_names)


@way("dm")
def mapped(w, x, i):
    return jax.vmap(lambda x, s: (w * s).T @ x)(x, jnp.linspace(0.5, 1, N))


@way("dm")
def differentiated(w, x, i):
    return jax.grad(lambda x: jnp.sin(x @ w).sum())(x) @ w


@st.composite
def programs(draw):
    """Layers, as (name of the way, shapes of its weights), a seed and whether weights of equal shapes are tied."""
    width, layers = draw(st.sampled_from(WIDTHS)), []
    for _ in range(draw(st.integers(1, 4))):
        name, after = draw(st.sampled_from(sorted(WAYS))), draw(st.sampled_from(WIDTHS))
        sizes = {"d": width, "m": after}
        layers.append((name, [tuple(sizes.get(c) or int(c) for c in shape) for shape in WAYS[name][0]]))
        width = after
    return layers, draw(st.integers(0, 2**31)), draw(st.booleans())


def build(layers, tied):
    """The function and its parameters' shapes; tied weights are one leaf, used by several layers."""
    names, shapes = [], {}
    for k, (_, wanted) in enumerate(layers):
        mine = []
        for j, shape in enumerate(wanted):
            same = [n for n, s in shapes.items() if s == shape and n not in mine]
            mine.append(same[0] if tied and same else f"w{k}{j}")
            shapes[mine[-1]] = shape
        names.append(mine)

    def fn(params, x, i):
        for (name, _), mine in zip(layers, names, strict=True):
            x = jnp.tanh(WAYS[name][1](*(params[n] for n in mine), x, i))
        return x

    return fn, shapes


def check(program):
    layers, seed, tied = program
    fn, shapes = build(layers, tied)
    rng = np.random.default_rng(seed)

    def normal(shape, scale=0.5):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float64)

    params = {name: normal(shape) for name, shape in shapes.items()}
    args = normal((N, width_of(layers))), jnp.int32(rng.integers(0, 2))
    sites = jlora.sites(fn, params, *args)
    assert not sites.skipped, str(sites)
    rank = min(2, *(site.max_rank for site in sites.values()))
    rule = jlora.LoRA(rank=rank, targets=list(sites))
    lora = jax.eval_shape(lambda key: jlora.init(key, params, sites, rule), jax.random.key(0))
    lora = jax.tree.map(lambda f: normal(f.shape), lora)
    weights, apply = normal((N, 1), 1.0), jlora.wrap(fn)

    def adapted(lora, params, *args):
        return (apply(params, lora, *args) * weights).sum()

    def merged(lora, params, *args):
        return (fn(jlora.merge(params, lora), *args) * weights).sum()

    made = weights_made(jax.grad(adapted), lora, params, *args)
    own = weights_made(jax.grad(lambda x: (fn(params, x, *args[1:]) * weights).sum()), args[0])
    assert made <= own, f"{made} values as large as a weight, where the model makes {own}"
    both = jax.jit(lambda *args: [jax.value_and_grad(f)(*args) for f in (adapted, merged)])
    (got, grads), (expected, wanted) = both(lora, params, *args)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6 * max(1.0, float(np.abs(y).max())))


def width_of(layers):
    """The width of the activations that the first layer takes."""
    name, shapes = layers[0]
    return next(
        shape[letters.index("d")] for letters, shape in zip(WAYS[name][0], shapes, strict=True) if "d" in letters
    )


COUNT = int(os.environ.get("JLORA_FUZZ", "0"))


@settings(max_examples=COUNT or 40, deadline=None, derandomize=not COUNT)
@given(programs())
def test_any_program_of_layers(program):
    # In fp64: where a tanh is saturated, its gradient is a difference of two nearly equal numbers, and in fp32 half of the digits go.
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        check(program)


def test_every_way_by_itself():
    """Whatever the sample above draws, each way is tried."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for name, (shapes, _) in WAYS.items():
            sizes = {"d": 5, "m": 9}
            check(([(name, [tuple(sizes.get(c) or int(c) for c in shape) for shape in shapes])], 3, False))
