"""Dropout on the adapter branch: off without a key, unbiased, independent per site, per use, per scanned layer and per turn of a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME
from jax import lax

import jlora

N, D = 4096, 6
W = jnp.asarray(np.random.default_rng(0).standard_normal((D, D)), jnp.float32)
X = jnp.ones((N, D))


def adapted(fn, params, args, rate=0.5, targets=".*"):
    rule = jlora.LoRA(
        rank=D,
        alpha=D,
        targets=targets,
        dropout=rate,
        init_a=lambda key, shape, dtype: jnp.broadcast_to(jnp.eye(D), shape).astype(dtype),
    )
    lora = jlora.init(jax.random.key(0), params, jlora.sites(fn, params, *args), rule)
    eye = {path: jnp.broadcast_to(jnp.eye(D), adapter.b.shape) for path, adapter in lora.items()}
    lora = {path: type(adapter)(**{**vars(adapter), "b": eye[path]}) for path, adapter in lora.items()}
    return jlora.wrap(fn), lora


KEY = jax.random.key(1)


def kept(y, base):
    """Where the branch let its input through: the update is the identity, so it adds the input scaled, or nothing."""
    return np.asarray(jnp.abs(y - base) > 0.5)


def test_off_without_a_key_and_for_a_rate_of_zero():
    fn, params = (lambda p, x: x @ p["w"]), {"w": W}
    apply, lora = adapted(fn, params, (X,))
    np.testing.assert_allclose(apply(params, lora, X), X @ (W + jnp.eye(D)), rtol=1e-5)
    plain, zero = adapted(fn, params, (X,), rate=0.0)
    np.testing.assert_array_equal(plain(params, zero, X, dropout_key=KEY), plain(params, zero, X))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_rate_and_expectation(rate):
    fn, params = (lambda p, x: x @ p["w"]), {"w": W}
    apply, lora = adapted(fn, params, (X,), rate)
    y = apply(params, lora, X, dropout_key=KEY)
    mask = kept(y, X @ W)
    assert abs(mask.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / mask.size)
    np.testing.assert_allclose(np.asarray(y - X @ W)[mask], 1 / (1 - rate), rtol=1e-4)
    np.testing.assert_array_equal(y, apply(params, lora, X, dropout_key=KEY))
    assert (y != apply(params, lora, X, dropout_key=jax.random.key(2))).any()
    legacy = apply(params, lora, X, dropout_key=jax.random.PRNGKey(1))
    np.testing.assert_array_equal(legacy, y)


DENSE = jax.jit(lambda w, x: x @ w)
DENSE_REMAT = jax.checkpoint(lambda w, x: x @ w)
PROGRAMS = {
    "two sites": (lambda p, x: jnp.stack([x @ p["a"], x @ p["b"]]), {"a": 0 * W, "b": 0 * W}),
    "one site used twice": (lambda p, x: jnp.stack([x @ p["a"], x @ p["a"]]), {"a": 0 * W}),
    "layers of a scan": (lambda p, x: lax.scan(lambda c, w: (c, x @ w), 0.0, p["w"])[1], {"w": jnp.zeros((2, D, D))}),
    "layers of a scan under remat": (
        lambda p, x: lax.scan(jax.checkpoint(lambda c, w: (c, x @ w)), 0.0, p["w"])[1],
        {"w": jnp.zeros((2, D, D))},
    ),
    "turns of a scan over a constant": (
        lambda p, x: lax.scan(lambda c, _: (c, x @ p["w"]), 0.0, None, length=2)[1],
        {"w": 0 * W},
    ),
    "turns of a while loop": (
        lambda p, x: lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1].at[s[0]].set(x @ p["w"])), (0, jnp.zeros((2, N, D)))
        )[1],
        {"w": 0 * W},
    ),
    "a body that is jitted once and called for two sites": (
        lambda p, x: jnp.stack([DENSE(p["a"], x), DENSE(p["b"], x)]),
        {"a": 0 * W, "b": 0 * W},
    ),
    "a body that is rematerialised and called twice for one site": (
        lambda p, x: jnp.stack([DENSE_REMAT(p["a"], x), DENSE_REMAT(p["a"], x)]),
        {"a": 0 * W},
    ),
    "layers picked from a stack": (lambda p, x: jnp.stack([x @ p["w"][0], x @ p["w"][1]]), {"w": jnp.zeros((2, D, D))}),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_masks_are_independent(name):
    fn, params = PROGRAMS[name]
    apply, lora = adapted(fn, params, (X,))
    apply = jax.jit(apply)  # under it, a body of the model that comes again is evaluated once
    one, two = kept(apply(params, lora, X, dropout_key=KEY), 0.0)
    agree = (one == two).mean()
    assert abs(agree - 0.5) < 5 * 0.5 / np.sqrt(one.size)


def test_gradient_uses_the_mask_of_the_forward_pass():
    fn, params = jax.checkpoint(lambda p, x: x @ p["w"]), {"w": 0 * W}
    apply, lora = adapted(fn, params, (X,))
    y = apply(params, lora, X, dropout_key=KEY)
    grad = jax.grad(lambda x: apply(params, lora, x, dropout_key=KEY).sum())(X)
    np.testing.assert_allclose(grad, 2.0 * kept(y, 0.0), rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["conv", "conv_grouped", "lookup", "tied", "experts", "linen_scan_remat", "cond", "scan_of_scan", "chosen_layer"],
)
def test_every_kind_of_use_takes_dropout(name):
    case = BY_NAME[name]
    rule = jlora.LoRA(rank=case.rank, alpha=3.0, targets=list(case.expect), dropout=0.5)
    lora = jlora.init(jax.random.key(0), case.params, case.sites(), rule)
    lora = jax.tree.map(
        lambda x, y: y, lora, jax.tree.unflatten(jax.tree.structure(lora), jax.tree.leaves(case.trained()))
    )
    apply = jax.jit(lambda l, key: jlora.wrap(case.fn)(case.params, l, *case.args, dropout_key=key))
    first, again, other = (jax.tree.leaves(apply(lora, key))[0] for key in (KEY, KEY, jax.random.key(3)))
    off = jax.tree.leaves(apply(lora, None))[0]
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first != off).any()
    assert bool(jnp.isfinite(first).all())


JOINED = {
    "sum": lambda p, x: x @ (p["a"] + p["b"]),
    "concatenation along outputs": lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], axis=1),
    "concatenation along inputs": lambda p, x: jnp.concatenate([x, x], axis=1) @ jnp.concatenate([p["a"], p["b"]]),
}


@pytest.mark.parametrize("name", JOINED)
def test_a_joined_weight_sees_its_input_under_one_mask(name):
    """It is one linear map, so what it reads is dropped once, and not for each weight it is made of."""
    fn, params = JOINED[name], {"a": 0 * W, "b": 0 * W}
    apply, lora = adapted(fn, params, (X,))
    full = apply(params, lora, X)
    y = np.asarray(apply(params, lora, X, dropout_key=KEY) / full)
    if name == "concatenation along inputs":  # two inputs, two masks: both, one or none of them arrive
        share = [np.isclose(y, level).mean() for level in (0.0, 1.0, 2.0)]
        np.testing.assert_allclose(share, [0.25, 0.5, 0.25], atol=5 * 0.5 / np.sqrt(y.size))
    else:
        assert np.isclose(y, 0.0).mean() + np.isclose(y, 2.0).mean() == 1.0
        assert abs((y > 1.0).mean() - 0.5) < 5 * 0.5 / np.sqrt(N * D)
    if name == "concatenation along outputs":
        np.testing.assert_array_equal(y[:, :D], y[:, D:])


@pytest.mark.parametrize("name", JOINED)
def test_weights_joined_at_different_rates_are_refused_under_dropout(name):
    fn, params = JOINED[name], {"a": 0 * W, "b": 0 * W}
    sites = jlora.sites(fn, params, X)
    rules = [jlora.LoRA(rank=2, targets="a", dropout=0.5), jlora.LoRA(rank=2, targets="b", dropout=0.1)]
    lora = jlora.init(jax.random.key(0), params, sites, rules)
    apply = jlora.wrap(fn)
    jax.block_until_ready(apply(params, lora, X))
    with pytest.raises(jlora.DenseWeightError, match=r"dropout of different rates, 0\.1 and 0\.5: give them one"):
        apply(params, lora, X, dropout_key=KEY)
    lora = jax.tree.map(jnp.ones_like, lora)  # made dense, they see no dropout
    got = jlora.wrap(fn, dense="allow")(params, lora, X, dropout_key=KEY)
    np.testing.assert_allclose(got, fn(jlora.merge(params, lora), X), rtol=1e-5)
