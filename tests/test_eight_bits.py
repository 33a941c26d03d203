"""Models whose weights or activations are floats of 8 bits: thin products are made in bf16 at least, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import array
from jax import lax
from measure import equations

import jlora

F8, F32 = jnp.float8_e4m3fn, jnp.float32
PE = {"preferred_element_type": F32}
NWC = ("NWC", "WIO", "NCW")
X, IDS = array(8, 16), jnp.arange(5)


def conv(p, x, **how):
    return lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=NWC, **PE, **how)


USES = {
    "dot": (lambda p, x: lax.dot(x, p["w"], **PE), array(16, 24), X),
    "dot_left": (lambda p, x: lax.dot(p["w"], x, **PE), array(24, 8), X),
    "dot_mixed": (lambda p, x: lax.dot(x.astype(jnp.float8_e5m2), p["w"], **PE), array(16, 24), X),
    "dot_bf16_activations": (lambda p, x: lax.dot(x.astype(jnp.bfloat16), p["w"], **PE), array(16, 24), X),
    "conv": (conv, array(3, 16, 6), array(2, 9, 16)),
    "conv_grouped": (lambda p, x: conv(p, x, feature_group_count=2), array(3, 8, 6), array(2, 9, 16)),
    "ragged": (lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([3, 5], jnp.int32), **PE), array(2, 16, 6), X),
    "lookup": (lambda p, i: p["w"][i].astype(F32), array(12, 8), IDS),
    "lookup_in_jit": (lambda p, i: jax.jit(lambda w: jnp.take(w, i, axis=0))(p["w"]).astype(F32), array(12, 8), IDS),
    "lookup_in_scan": (
        lambda p, i: lax.scan(lambda c, j: (c, jnp.take(p["w"], j, axis=0).astype(F32)), None, i)[1],
        array(12, 8),
        IDS,
    ),
    "lookup_in_vmap": (lambda p, i: jax.vmap(lambda j: p["w"][j].astype(F32))(i), array(12, 8), IDS),
    "lookup_with_an_axis_more": (lambda p, i: p["w"][i[None]][0].astype(F32), array(12, 8), IDS),
    "lookup_transposed": (lambda p, i: p["w"][i].T.astype(F32), array(12, 8), IDS),
    "lookup_sliced": (lambda p, i: p["w"][i][:, 1:].astype(F32), array(12, 8), IDS),
    "lookup_split": (lambda p, i: p["w"][i].reshape(-1, 2, 4).astype(F32), array(12, 8), IDS),
    "lookup_scaled": (lambda p, i: (p["w"][i] * 0.5).astype(F32), array(12, 8), IDS),
    "lookup_in_remat": (lambda p, i: jax.checkpoint(lambda w: w[i])(p["w"]).astype(F32), array(12, 8), IDS),
    "cast_weight": (lambda p, x: x.astype(F32) @ p["w"].astype(F32), array(16, 24), X),
}


def tiny(tree):
    return jax.tree.map(lambda x: x.astype(F8) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def wide(tree):
    return jax.tree.map(lambda x: x.astype(F32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def adapted(fn, params, x, **rule):
    sites = jlora.sites(fn, params, x)
    assert not sites.skipped, str(sites)
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=3, alpha=3, targets="w", **rule))
    return jax.tree.map(lambda f: array(*f.shape, dtype=f.dtype), lora)


def loss(y):
    """Small, as a mean over many tokens is: its gradient is less than the smallest float of 8 bits."""
    return 1e-4 * jnp.sin(y.astype(F32)).sum()


@pytest.mark.parametrize("use", USES)
def test_values_and_gradients_are_those_of_wider_floats(use):
    fn, w, x = USES[use]
    params, x = tiny({"w": w}), tiny(x)
    lora, apply = adapted(fn, params, x), jlora.wrap(fn)
    y, grads = apply(params, lora, x), jax.grad(lambda l: loss(apply(params, l, x)))(lora)
    # The same sums in fp32; only the model's own casts of activations to 8 bits are left in it.
    expected = fn(jlora.merge(wide(params), lora), wide(x))
    wanted = jax.grad(lambda l: loss(fn(jlora.merge(wide(params), l), wide(x))))(lora)
    assert y.dtype == fn(params, x).dtype
    assert error(y, expected) < 0.02
    for name in ("a", "b"):
        assert error(getattr(grads["w"], name), getattr(wanted["w"], name)) < 0.02


def error(got, expected):
    return float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize("use", USES)
def test_no_thin_value_is_of_8_bits(use):
    fn, w, x = USES[use]
    params, x = tiny({"w": w}), tiny(x)
    program = jax.make_jaxpr(jax.grad(lambda l: loss(jlora.wrap(fn)(params, l, x))))(adapted(fn, params, x))
    thin = [v.aval for e in equations(program) for v in (*e.invars, *e.outvars) if 3 in getattr(v.aval, "shape", ())]
    made = [t for t in thin if t.shape not in {w.shape, x.shape}]  # a kernel of a convolution has a window of 3
    assert made
    assert not [t for t in made if t.dtype == F8]


def test_a_result_of_8_bits_stays_one():
    """Only the gradient of the model's own result is rounded to 8 bits; here it is not small."""
    fn, params, x = lambda p, x: lax.dot(x, p["w"]), tiny({"w": array(16, 24)}), tiny(X)
    lora, apply = adapted(fn, params, x), jlora.wrap(fn)
    y = apply(params, lora, x)
    assert y.dtype == F8
    expected = fn(wide(params), wide(x)) + wide(x) @ jlora.delta(lora)["w"]
    np.testing.assert_allclose(wide(y), expected, atol=0.13 * float(jnp.abs(expected).max()))
    grads = jax.grad(lambda l: apply(params, l, x).astype(F32).sum())(lora)
    wanted = jax.grad(lambda l: (wide(x) @ jlora.delta(l)["w"]).sum())(lora)
    assert error(grads["w"].a, wanted["w"].a) < 0.02
    assert error(grads["w"].b, wanted["w"].b) < 0.02


def test_dropout_scales_in_more_than_8_bits():
    fn, params, x = USES["dot"][0], {"w": jnp.zeros((4, 4), F8)}, jnp.ones((64, 4), F8)
    lora = jlora.init(
        jax.random.key(0), params, jlora.sites(fn, params, x), jlora.LoRA(rank=4, alpha=4, targets="w", dropout=0.3)
    )
    lora = jax.tree.map(lambda f: jnp.eye(4), lora)
    y = np.unique(jlora.wrap(fn)(params, lora, x, dropout_key=jax.random.key(1)))
    np.testing.assert_allclose(y, [0, 1 / 0.7], rtol=0.005)  # in 8 bits, 1 / 0.7 is 1.375 or 1.5


@pytest.mark.parametrize("left", [False, True])
def test_an_algorithm_of_8_bits_is_for_the_base_only(left):
    """Algorithms that GPUs have; here the program is only traced."""
    preset = lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32
    fn = lambda p, x: lax.dot(*((p["w"].T, x.T) if left else (x, p["w"])), precision=preset, **PE)  # noqa: E731
    assert precisions(fn, F8) == [(F8, preset)]
    # An algorithm of wider floats is that of thin products too.
    preset = lax.DotAlgorithmPreset.BF16_BF16_F32
    assert {p for _, p in precisions(fn, jnp.bfloat16)} == {preset}


def test_an_algorithm_follows_its_operands():
    one = lax.DotAlgorithm(jnp.bfloat16, jnp.float32, jnp.float32)
    fn = lambda p, x: lax.dot(p["w"].T, x.T, precision=one, **PE)  # noqa: E731
    exchanged = one._replace(lhs_precision_type=jnp.float32, rhs_precision_type=jnp.bfloat16)
    # Activations are on the left of the first thin product, as the base has them on the right; the last has the factor on the left.
    assert [p for _, p in precisions(fn, F32)] == [one, exchanged, one]


def precisions(fn, dtype):
    """The dtype and precision of each product of the wrapped program."""
    params, x = {"w": array(16, 24).astype(dtype)}, X.astype(dtype)
    program = jax.make_jaxpr(lambda l: jlora.wrap(fn)(params, l, x))(adapted(fn, params, x))
    found = [e for e in equations(program) if e.primitive.name == "dot_general"]
    return [(e.invars[0].aval.dtype, e.params["precision"]) for e in found if e.params["precision"] is not None]


FORMED = {
    "cond": lambda p, i: lax.cond(i[0] > 0, lambda w: w[i], lambda w: w[i + 1], p["w"]).astype(F32),
    "concatenate": lambda p, i: jnp.concatenate([p["w"][i], p["w"][i]]).astype(F32),
    "scan": lambda p, i: lax.scan(lambda c, j: (c, p["w"][j]), None, i)[1].astype(F32),
    "dot": lambda p, i: lax.dot(p["w"][i], jnp.ones((8, 3), F8), **PE),
}


@pytest.mark.parametrize("how", FORMED)
def test_rows_that_would_round_their_gradient_to_zero_raise(how):
    """Where they are differentiated: forward they are what they are."""
    fn, params = FORMED[how], tiny({"w": array(12, 8)})
    lora = adapted(fn, params, IDS)
    apply = jlora.wrap(fn)
    assert jax.jit(apply)(params, lora, IDS).dtype == F32
    for run in (lambda f: f, jax.jit):
        with pytest.raises(
            ValueError, match=r"table 'w' are used in float8_e4m3fn(.*\n)*  Cast them where they are looked"
        ):
            run(jax.grad(lambda lora: apply(params, lora, IDS).sum()))(lora)
