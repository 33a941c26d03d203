"""Random programs: a weight seen through a chain of views, then multiplied; against the dense merge, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import jlora


def steps(draw, shape):
    """Draws a chain of views for a weight of ``shape``; each is a function of the value and the scalar index ``i``."""
    chain = []
    for _ in range(draw(st.integers(0, 5))):
        ndim = len(shape)
        kind = draw(
            st.sampled_from(
                ["transpose", "merge", "split", "slice", "pick", "dynamic", "expand", "repeat", "gain", "flip", "scale"]
            )
        )
        axis = draw(st.integers(0, max(ndim - 1, 0)))
        if kind == "transpose":
            order = tuple(draw(st.permutations(range(ndim))))
            chain.append(lambda w, i, order=order: jnp.transpose(w, order))
            shape = [shape[d] for d in order]
        elif kind == "merge" and axis + 1 < ndim:
            new = [*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]]
            chain.append(lambda w, i, new=tuple(new): w.reshape(new))
            shape = new
        elif kind == "split" and ndim and shape[axis] % 2 == 0:
            new = [*shape[:axis], 2, shape[axis] // 2, *shape[axis + 1 :]]
            chain.append(lambda w, i, new=tuple(new): w.reshape(new))
            shape = new
        elif kind == "slice" and ndim and shape[axis] > 2:
            chain.append(lambda w, i, axis=axis: jax.lax.slice_in_dim(w, 1, w.shape[axis], axis=axis))
            shape = [n - (d == axis) for d, n in enumerate(shape)]
        elif kind in ("pick", "dynamic") and ndim > 2:
            chain.append(
                lambda w, i, axis=axis, fixed=kind == "pick": jnp.take(w, 0 if fixed else i, axis=axis, mode="clip")
            )
            shape = [n for d, n in enumerate(shape) if d != axis]
        elif kind == "expand":
            chain.append(lambda w, i, axis=axis: jnp.expand_dims(w, axis))
            shape = [*shape[:axis], 1, *shape[axis:]]
        elif kind == "repeat" and ndim:
            chain.append(lambda w, i, axis=axis: jnp.repeat(w, 2, axis=axis))
            shape = [n * (1 + (d == axis)) for d, n in enumerate(shape)]
        elif kind == "gain" and ndim:
            gain = np.linspace(0.5, 1.5, shape[axis], dtype=np.float32).reshape(
                [n if d == axis else 1 for d, n in enumerate(shape)]
            )
            chain.append(lambda w, i, gain=gain: w * gain)
        elif kind == "flip" and ndim:
            chain.append(lambda w, i, axis=axis: jnp.flip(w, axis))
        elif kind == "scale":
            chain.append(lambda w, i: -w / 1.5)
    return chain, shape


@st.composite
def programs(draw):
    """A function of one weight ``w``, activations and an index; with the shapes of both and a seed."""
    stored = [draw(st.sampled_from([1, 2, 3, 4, 6])) for _ in range(draw(st.integers(2, 4)))]
    chain, shape = steps(draw, stored)
    letters = "abcdefgh"[: len(shape)]
    first = draw(st.integers(0, max(len(letters) - 1, 0)))
    summed = [c for d, c in enumerate(letters) if d == first or draw(st.integers(0, 3)) == 0]
    out = "".join(c for c in letters if c not in summed)
    batch = "".join(c for c in out if draw(st.integers(0, 3)) == 0)
    x = "".join(draw(st.permutations([*summed, *batch, "z"])))
    size = dict(zip(letters, shape, strict=True)) | {"z": 3}

    def fn(params, x_value, i):
        w = params["w"]
        for view in chain:
            w = view(w, i)
        return jnp.tanh(jnp.einsum(f"{x},{letters}->{out}z", x_value, w))

    return fn, stored, [size[c] for c in x], draw(st.integers(0, 2**31))


def check(program):
    fn, stored, x_shape, seed = program
    rng = np.random.default_rng(seed)
    params = {"w": jnp.asarray(rng.standard_normal(stored), jnp.float32)}
    args = jnp.asarray(rng.standard_normal(x_shape), jnp.float32), jnp.int32(rng.integers(0, 2))
    sites = jlora.sites(fn, params, *args)
    if sites.skipped:  # no matrix here, or its factors would mix: wrap must be right all the same when it may go dense
        rule = jlora.LoRA(rank=1, targets="w", allow_dense=True)
    else:
        rule = jlora.LoRA(rank=min(2, sites["w"].max_rank), targets="w")
    lora = jlora.init(jax.random.key(0), params, sites, rule)
    lora = jax.tree.map(lambda f: jnp.asarray(rng.standard_normal(f.shape), f.dtype), lora)
    apply = jlora.wrap(fn, dense="allow" if sites.skipped else "error")

    def total(run):
        return lambda lora: (run(lora) * jnp.cos(jnp.arange(3.0))).sum()

    got, grads = jax.value_and_grad(total(lambda lora: apply(params, lora, *args)))(lora)
    expected, wanted = jax.value_and_grad(total(lambda lora: fn(jlora.merge(params, lora), *args)))(lora)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3 * max(1.0, float(np.abs(y).max())))
    return not sites.skipped


@settings(max_examples=40, deadline=None)
@given(programs())
def test_any_chain_of_views(program):
    with jax.numpy_rank_promotion("allow"):
        assert check(program) in (True, False)
