"""What ``apply`` stops or refuses to differentiate is the same under every transformation, and costs nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import D, H, K, M, array
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlora

PARAMS = {"u": 0.1 * array(D, M), "v": 0.1 * array(M, K), "unused": array(M, K)}
X = array(H, D)


def net(params, x):
    return jnp.tanh(jnp.tanh(x @ params["u"]) @ params["v"])


def adapter(fn=net, params=PARAMS, **rule):
    sites = jlora.sites(fn, params, X)
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="u|v", **rule))
    return jax.tree.map(lambda x: 0.1 * array(*x.shape), lora)


LORA = adapter()


def sharded(loss):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))

    def local(lora, params, x):
        return lax.psum(loss(lora, params, x), "i")

    return jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("i")), out_specs=P())


def gradient(loss):
    return jax.grad(loss)


# Each makes a function of (lora, params, x) of a loss: its gradient with respect to the adapter, or the loss again.
WAYS = {
    "gradient": gradient,
    "jit of gradient": lambda loss: jax.jit(gradient(loss)),
    "gradient of jit": lambda loss: gradient(jax.jit(loss)),
    "jit of gradient of jit": lambda loss: jax.jit(gradient(jax.jit(loss))),
    "jit of gradient of gradient": lambda loss: jax.jit(gradient(lambda *args: total(gradient(loss)(*args)))),
    "jit of jvp": lambda loss: jax.jit(lambda l, p, x: jax.jvp(lambda l: loss(l, p, x), (l,), (l,))[1]),
    "jit of linearize": lambda loss: jax.jit(lambda l, p, x: jax.linearize(lambda l: loss(l, p, x), l)[1](l)),
    "jit of vmap of gradient": lambda loss: jax.jit(
        lambda l, p, x: jax.vmap(gradient(loss), (None, None, 0))(l, p, x[None])
    ),
    "vmap of jit of gradient": lambda loss: (
        lambda l, p, x: jax.vmap(jax.jit(gradient(loss)), (None, 0, None))(l, jax.tree.map(lambda w: w[None], p), x)
    ),
    "gradient in scan": lambda loss: (
        lambda l, p, x: lax.scan(lambda c, _: (c + total(gradient(loss)(l, p, x)), None), 0.0, None, length=2)[0]
    ),
    "gradient of scan": lambda loss: gradient(
        lambda l, p, x: lax.scan(lambda c, _: (c + loss(l, p, x), None), 0.0, None, length=2)[0]
    ),
    "gradient in cond": lambda loss: (
        lambda l, p, x: lax.cond(x.sum() > -1e9, lambda p: total(gradient(loss)(l, p, x)), lambda p: 0.0, p)
    ),
    "checkpoint of gradient": lambda loss: jax.checkpoint(gradient(loss)),
    "gradient of checkpoint": lambda loss: gradient(jax.checkpoint(loss)),
    "jit of gradient of shard_map": lambda loss: jax.jit(gradient(sharded(loss))),
    "loss": lambda loss: loss,
    "jit of loss": jax.jit,
    "shard_map of loss": lambda loss: jax.jit(sharded(loss)),
}


def total(tree):
    return sum(jnp.sin(x).sum() for x in jax.tree.leaves(tree))


def loss_of(apply):
    return lambda lora, params, x: jnp.square(apply(params, lora, x)).sum()


@pytest.mark.parametrize("name", WAYS)
def test_base_gradients_are_stopped_the_same_way_everywhere(name):
    def derivative(apply):
        made = WAYS[name](loss_of(apply))
        return jax.grad(lambda params: total(made(LORA, params, X)))(PARAMS)

    stopped = derivative(jlora.wrap(net))
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.zeros(x.shape)), stopped)
    got = derivative(jlora.wrap(net, train_base=True))
    expected = derivative(lambda params, lora, x: net(jlora.merge(params, lora), x))
    for path in ("u", "v"):
        assert float(jnp.abs(expected[path]).max()) > 0
        np.testing.assert_allclose(got[path], expected[path], rtol=1e-3, atol=1e-3 * np.abs(expected[path]).max())


def test_a_stopped_base_costs_nothing():
    """The program of the usual step has one equation more, which compiles to nothing, and none for leaves that are not read."""
    texts, sizes = [], []
    for train_base in (False, True):
        step = jax.grad(loss_of(jlora.wrap(net, train_base=train_base)))
        sizes.append(len(jax.make_jaxpr(step)(LORA, PARAMS, X).eqns))
        texts.append(jax.jit(step).lower(LORA, PARAMS, X).as_text())
    assert sizes[0] == sizes[1] + 1
    assert texts[0] == texts[1]


def test_an_adapted_function_can_be_adapted_again():
    inner = jlora.wrap(net)

    def outer(params, x):
        return inner(params, LORA, x)

    lora = adapter(outer, dropout=0.5)
    assert set(lora) == {"u", "v"}
    apply = jlora.wrap(outer)
    expected = net(jlora.merge(jlora.merge(PARAMS, lora), LORA), X)
    np.testing.assert_allclose(apply(PARAMS, lora, X), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.jit(apply)(PARAMS, lora, X), expected, rtol=1e-4, atol=1e-4)
    keyed = apply(PARAMS, lora, X, dropout_key=jax.random.key(0))
    assert bool((keyed != expected).any())


# --- dropout without a key ---------------------------------------------------------------------------------------------

DROPPED = adapter(dropout=0.5)
SAYS = r"dropout \(rate 0\.5 at 'u', and 1 more\), and apply is differentiated without a key(?s:.*)dropout_key=None"


@pytest.mark.parametrize("name", [name for name in WAYS if not name.endswith("loss")])
def test_an_adapter_with_dropout_is_not_differentiated_without_a_word(name):
    apply = jlora.wrap(net)
    with pytest.raises(ValueError, match=SAYS):
        WAYS[name](loss_of(apply))(DROPPED, PARAMS, X)
    got = WAYS[name](loss_of(lambda *args: apply(*args, dropout_key=None)))(DROPPED, PARAMS, X)
    expected = WAYS[name](loss_of(apply))(LORA, PARAMS, X)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", [name for name in WAYS if name.endswith("loss")])
def test_evaluation_without_a_dropout_key_is_as_it_was(name):
    made = WAYS[name](loss_of(jlora.wrap(net)))
    np.testing.assert_array_equal(made(DROPPED, PARAMS, X), made(LORA, PARAMS, X))
    jax.grad(lambda x: made(DROPPED, PARAMS, x))(X)  # nor does a derivative with respect to anything else need one
    with pytest.raises(ValueError, match=SAYS):
        jax.grad(made)(DROPPED, PARAMS, X)


def test_dropout_of_what_is_not_differentiated_needs_no_key():
    rules = [jlora.LoRA(rank=2, targets="u"), jlora.LoRA(rank=2, targets="v", dropout=0.5)]
    lora = jlora.init(jax.random.key(0), PARAMS, jlora.sites(net, PARAMS, X), rules)
    loss = loss_of(jlora.wrap(net))
    assert float(jnp.abs(jax.grad(lambda u: loss({**lora, "u": u}, PARAMS, X))(lora["u"]).b).max()) > 0
    with pytest.raises(ValueError, match=r"dropout \(rate 0\.5 at 'v'\), and"):
        jax.grad(lambda b: loss({**lora, "v": type(lora["v"])(**{**vars(lora["v"]), "b": b})}, PARAMS, X))(lora["v"].b)
