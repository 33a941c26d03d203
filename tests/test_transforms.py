"""An adapted function is a JAX function: it composes with every transformation, and keeps the effects of the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import D, H, K, M, array
from jax import export, lax
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlora

PARAMS = {"u": array(D, M), "v": array(M, K), "s": array(2, K, K)}
X = array(H, D)


def net(params, x):
    hidden = jnp.tanh(jnp.tanh(x @ params["u"]) @ params["v"])
    return lax.scan(lambda c, w: (c + jnp.tanh(c @ w), None), hidden, params["s"])[0]


def adapter(fn=net, params=PARAMS, *args, seed=0, **rule):
    sites = jlora.sites(fn, params, *(args or (X,)))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets=list(sites), **rule))
    leaves, tree = jax.tree.flatten(lora)
    return jax.tree.unflatten(tree, [array(*x.shape, seed=seed + i) for i, x in enumerate(leaves)])


LORA, APPLY = adapter(), jlora.wrap(net)


def merged(lora, x):
    return net(jlora.merge(PARAMS, lora), x)


def factored(lora, x):
    return APPLY(PARAMS, lora, x)


def close(got, expected, tol=1e-4):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=tol * max(1.0, float(np.abs(y).max())), rtol=0)


def scalar(run):
    return lambda lora, x: jnp.sin(run(lora, x)).sum()


STACKED = jax.tree.map(lambda x, y: jnp.stack([x, y]), LORA, adapter(seed=7))
XS = jnp.stack([X, X[::-1]])
TRANSFORMS = {
    "vmap over inputs": lambda run: jax.vmap(run, (None, 0))(LORA, XS),
    "vmap over adapters": lambda run: jax.vmap(run, (0, None))(STACKED, X),
    "vmap over both": lambda run: jax.vmap(run)(STACKED, XS),
    "vmap over both, apart": lambda run: jax.vmap(jax.vmap(run, (None, 0)), (0, None))(STACKED, XS),
    "vmap of grad": lambda run: jax.vmap(jax.grad(scalar(run)))(STACKED, XS),
    "jvp": lambda run: jax.jvp(run, (LORA, X), (adapter(seed=3), X[::-1])),
    "linearize": lambda run: jax.linearize(lambda l: run(l, X), LORA)[1](adapter(seed=3)),
    "vjp": lambda run: jax.vjp(run, LORA, X)[1](run(LORA, X)),
    "jacobian": lambda run: jax.jacrev(run, argnums=1)(LORA, X),
    "hessian": lambda run: jax.hessian(lambda b: scalar(run)({**LORA, "v": dataclasses.replace(LORA["v"], b=b)}, X))(
        LORA["v"].b
    ),
    "hessian of inputs": lambda run: jax.hessian(scalar(run), argnums=1)(LORA, X[:1]),
    "checkpoint of grad": lambda run: jax.grad(jax.checkpoint(scalar(run)))(LORA, X),
    "jit of scan": lambda run: jax.jit(lambda l: lax.scan(lambda c, x: (c, run(l, x)), 0, XS)[1])(LORA),
    "map": lambda run: lax.map(lambda l: run(l, X), STACKED),
    "cond": lambda run: lax.cond(True, lambda l: run(l, X), lambda l: jnp.zeros((H, K)), LORA),
    "custom_vjp": lambda run: jax.grad(lambda l: scaled(run, l).sum())(LORA),
}


def scaled(run, lora):
    """A custom derivative around the adapted function: twice the true one."""
    fn = jax.custom_vjp(lambda l: run(l, X))
    fn.defvjp(lambda l: jax.vjp(lambda l: run(l, X), l), lambda pull, g: pull(2 * g))
    return fn(lora)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformations_of_apply_are_those_of_the_merged_model(name):
    close(TRANSFORMS[name](factored), TRANSFORMS[name](merged))


def test_function_that_closes_over_tracers():
    """A model may hold values of the trace around it: a temperature that is differentiated, a mask computed outside."""

    def outer(temperature, lora, run):
        mask = jnp.arange(K) < 4

        def fn(params, x):
            return jnp.where(mask[None], x @ params["u"] @ params["v"] / temperature, 0.0)

        return run(fn)(PARAMS, lora, X).sum()

    def base(fn):
        return lambda params, lora, x: fn(jlora.merge(params, lora), x)

    lora = {path: LORA[path] for path in "uv"}
    for transform in (jax.grad, lambda f: jax.jit(jax.grad(f)), lambda f: jax.jvp(f, (1.5,), (1.0,))[1]):
        got, expected = (transform(lambda t, run=run: outer(t, lora, run)) for run in (jlora.wrap, base))
        close(*(f(1.5) if callable(f) else f for f in (got, expected)))


def test_typed_and_legacy_keys_pass_through():
    def fn(params, x, key):
        noise = jax.random.normal(
            key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key), x.shape
        )
        return (x + noise) @ params["u"]

    for key in (jax.random.key(5), jax.random.PRNGKey(5)):
        lora = adapter(fn, {"u": PARAMS["u"]}, X, key)
        apply = jlora.wrap(fn)
        close(apply({"u": PARAMS["u"]}, lora, X, key), fn(jlora.merge({"u": PARAMS["u"]}, lora), X, key))
        batch = jax.vmap(lambda k: apply({"u": PARAMS["u"]}, lora, X, k))(jax.random.split(jax.random.key(1), 3))
        assert batch.shape == (3, H, M)
        assert bool((batch[0] != batch[1]).any())


# --- effects ---------------------------------------------------------------------------------------------------------


def effectful(log):
    """A model with effects in every kind of body, all around adapted weights."""

    def note(tag, x):
        io_callback(lambda x: log.append((tag, round(float(x), 3))), None, x.sum(), ordered=True)

    def body(c, w):
        c = jnp.tanh(c @ w)
        note("scan", c)
        return c, None

    def turn(state):
        i, c = state
        c = jnp.tanh(c @ PARAMS["s"][0] + c)
        note("while", c)
        return i + 1, c

    def more(state):
        jax.debug.callback(lambda i: log.append(("cond", int(i))), state[0], ordered=True)
        return state[0] < 2

    def fn(params, x):
        note("first", x)
        h = jax.jit(lambda w, x: (note("jit", x), x @ w)[1])(params["u"], x)
        h = h @ params["v"]
        note("between", h)
        h = lax.scan(body, h, params["s"])[0]
        _, h = lax.while_loop(more, turn, (0, h + 0.0 * (h @ params["s"][1])))
        h = lax.cond(h.sum() > -1e9, lambda h: (note("true", h), h @ params["s"][0])[1], lambda h: h, h)
        jax.debug.callback(lambda x: log.append(("last", round(float(x), 3))), h.sum(), ordered=True)
        return h

    return fn


@pytest.mark.parametrize("jit", [False, True])
def test_effects_keep_their_order_and_number(jit):
    logs = {"adapted": [], "merged": []}
    lora = adapter(effectful([]), PARAMS, X)
    maybe = jax.jit if jit else lambda f: f
    maybe(lambda lora: jlora.wrap(effectful(logs["adapted"]))(PARAMS, lora, X))(lora).block_until_ready()
    maybe(lambda lora: effectful(logs["merged"])(jlora.merge(PARAMS, lora), X))(lora).block_until_ready()
    jax.effects_barrier()
    assert [tag for tag, _ in logs["adapted"]] == [tag for tag, _ in logs["merged"]]
    assert len(logs["merged"]) == 1 + 1 + 1 + 2 + 5 + 1 + 1
    close([v for _, v in logs["adapted"]], [v for _, v in logs["merged"]], tol=2e-3)


def test_effects_inside_a_loop_that_carries_an_adapted_weight():
    log = []

    def fn(params, x):
        def more(state):
            jax.debug.callback(lambda i: log.append(int(i)), state[0], ordered=True)
            return state[0] < 3

        return lax.while_loop(more, lambda s: (s[0] + 1, jnp.tanh(s[1] @ params["w"])), (0, x))[1]

    params, x = {"w": array(K, K)}, array(H, K)
    lora = adapter(fn, params, x)
    log.clear()
    jax.jit(jlora.wrap(fn))(params, lora, x).block_until_ready()
    jax.effects_barrier()
    assert log == [0, 1, 2, 3]


# --- export ----------------------------------------------------------------------------------------------------------


def test_exported_function_runs_with_another_adapter():
    exported = export.export(jax.jit(lambda params, a, b, x: APPLY(params, unpack(a, b), x)))(PARAMS, *pack(LORA), X)
    again = export.deserialize(exported.serialize())
    for seed in (0, 7):
        lora = adapter(seed=seed)
        close(again.call(PARAMS, *pack(lora), X), merged(lora, X))


def pack(lora):
    return [{path: getattr(x, name) for path, x in lora.items()} for name in "ab"]


def unpack(a, b):
    return {path: dataclasses.replace(x, a=a[path], b=b[path]) for path, x in LORA.items()}


# --- weights that go dense -------------------------------------------------------------------------------------------


@jax.custom_vjp
def product(w, x):
    return x @ w


product.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))


@jax.custom_jvp
def forward(w, x):
    return x @ w


forward.defjvp(lambda p, t: (p[1] @ p[0], t[1] @ p[0] + p[1] @ t[0]))


def kernel(x, w, out):
    out[...] = x[...] @ w[...]


def by_hand(w, x):
    """A kernel written by hand, which sees its operands as they are."""
    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((H, M), jnp.float32), interpret=True)(x, w)


MASK = jnp.asarray(np.tril(np.ones((D, M), np.float32)))
DENSE = {
    "mul": ("mul", lambda p, x: jnp.tanh(x @ (p["w"] * MASK))),
    "norm": ("mul", lambda p, x: jnp.tanh(x @ (p["w"] / jnp.linalg.norm(p["w"])))),
    "columns' norms": ("mul", lambda p, x: jnp.tanh(x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True)))),
    "penalty": ("integer_pow|mul|square", lambda p, x: jnp.tanh(x @ p["w"]).sum() + (p["w"] ** 2).sum()),
    "changed after a rotation": ("sin", lambda p, x: jnp.tanh(x @ jnp.sin(jnp.eye(D) @ p["w"]))),
    "custom_vjp": ("custom_vjp_call", lambda p, x: jnp.tanh(product(p["w"], x))),
    "custom_jvp": ("custom_jvp_call", lambda p, x: jnp.tanh(forward(p["w"], x))),
    "pallas_call": ("pallas_call", lambda p, x: jnp.tanh(by_hand(p["w"], x))),
    "elementwise": ("sin", lambda p, x: jnp.tanh(x @ jnp.sin(p["w"]))),
    "cumulative": ("cumsum", lambda p, x: jnp.tanh(x @ jnp.cumsum(p["w"], axis=1))),
    "quantised on the way": ("round", lambda p, x: jnp.tanh(x @ (jnp.round(p["w"] * 8) / 8))),
    "selected": ("select_n", lambda p, x: jnp.tanh(x @ jnp.where(MASK > 0, p["w"], 0.5))),
    "from a branch": ("cond", lambda p, x: jnp.tanh(x @ lax.cond(x.sum() > 0, lambda: p["w"], lambda: p["w"][::-1]))),
    "selected for each example": (
        "select_n",
        lambda p, x: jax.vmap(
            lambda x: lax.cond(x.sum() > 0, lambda x: jnp.tanh(x @ p["w"]), lambda x: jnp.sin(x @ p["w"]), x)
        )(x),
    ),
    "out of a scan": (
        "scan",
        lambda p, x: jnp.tanh(x @ lax.scan(lambda c, _: (c, p["w"] * 1.0), 0, None, length=2)[1][1]),
    ),
    "scattered": ("scatter", lambda p, x: jnp.tanh(x @ jnp.zeros((D, 2 * M)).at[:, ::2].set(p["w"]))),
    "sorted": ("sort", lambda p, x: jnp.tanh(x @ jnp.sort(p["w"], axis=0))),
    "summed with data": ("add", lambda p, x: jnp.tanh(x @ (p["w"] + x.mean()))),
    "as a number": ("convert_element_type", lambda p, x: jnp.tanh(x @ p["w"].astype(jnp.int32).astype(jnp.float32))),
}


@pytest.mark.parametrize("name", DENSE)
def test_weight_that_has_to_be_dense_is_refused_or_right(name):
    """By default refused, with leaf, operation and line, by ``init`` and by ``wrap``; right where it is allowed."""
    operation, fn = DENSE[name]
    params = {"w": PARAMS["u"]}
    sites = jlora.sites(fn, params, X)
    assert list(sites.skipped) == ["w"], name
    with pytest.raises(ValueError, match=rf"'w' .*cannot be adapted.*({operation}).*test_transforms.py:\d+"):
        jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="w"))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="w", allow_dense=True))
    lora = jax.tree.map(lambda x: array(*x.shape), lora)
    apply = jlora.wrap(fn, dense="allow")
    expected = fn(jlora.merge(params, lora), X)
    close(apply(params, lora, X), expected)
    close(jax.jit(apply)(params, lora, X), expected)
    if name not in ("as a number", "pallas_call"):  # these have no derivative
        close(
            jax.grad(lambda l: jnp.sin(apply(params, l, X)).sum())(lora),
            jax.grad(lambda l: jnp.sin(fn(jlora.merge(params, l), X)).sum())(lora),
        )
    if name == "summed with data":  # might be an activation, so it is no target; wrap knows how to keep it factored
        return
    with pytest.raises(
        jlora.DenseWeightError, match=rf"(?s)'w' would have to be made dense.*({operation}).*test_transforms.py:\d+"
    ):
        jlora.wrap(fn)(params, lora, X)


def test_error_inside_a_shared_body_names_the_leaf():
    """A function that is called several times is evaluated once, with weights that have no names of their own."""

    @jax.jit
    def layer(w, x):
        return jnp.tanh(x @ (w * jnp.tril(jnp.ones((K, K)))))

    def fn(params, x):
        return layer(params[1], layer(params[0], x))

    params, x = [array(K, K), array(K, K)], array(H, K)
    rule = jlora.LoRA(rank=2, targets=".*", allow_dense=True)
    lora = jlora.init(jax.random.key(0), params, jlora.sites(fn, params, x), rule)
    with pytest.raises(
        jlora.DenseWeightError, match=r"(?s)adapted weight '0' would.*mul at .*test_transforms.py:\d+ \(.*layer\)"
    ):
        jax.jit(jlora.wrap(fn))(params, lora, x)
    close(jax.jit(jlora.wrap(fn, dense="allow"))(params, lora, x), fn(jlora.merge(params, lora), x))


def test_gathered_weight_of_an_unchecked_shard_map_is_refused():
    """Nothing tells there whether the other factor is the same on every device."""
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))

    def fn(params, x, tiled=True):
        def body(w, x):
            w = lax.all_gather(w, "i", axis=0, tiled=tiled)
            return jnp.tanh(x @ (w if tiled else w[0]))

        return jax.shard_map(body, mesh=mesh, in_specs=(P("i"), P("i")), out_specs=P("i"), check_vma=False)(
            params["w"], x
        )

    params = {"w": PARAMS["u"]}
    sites = jlora.sites(fn, params, X)
    with pytest.raises(ValueError, match="all of it is needed by all_gather"):
        jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="w"))
    rule = jlora.LoRA(rank=2, targets="w", allow_dense=True)
    lora = jax.tree.map(lambda f: f + 0.1, jlora.init(jax.random.key(0), params, sites, rule))
    for tiled in (True, False):
        with pytest.raises(jlora.DenseWeightError, match=r"(?s)'w' would have to be made dense.*all_gather"):
            jlora.wrap(fn)(params, lora, X, tiled=tiled)
        got = jlora.wrap(fn, dense="allow")(params, lora, X, tiled=tiled)
        close(got, fn(jlora.merge(params, lora), X, tiled=tiled))


def test_a_function_jitted_once_meets_data_and_constants(caplog):
    """JAX traces it once for both; whether its argument is data is told apart call by call."""
    times, pick = jax.jit(lambda a, b: a @ b), jax.jit(lambda t, i: jnp.take(t, i, axis=0))
    turn, order = array(D, D, seed=4), jnp.arange(D)[::-1]

    def fn(p, x, i):
        x = jnp.tanh(times(x, p["v"]))
        return jnp.tanh(x @ times(turn, p["w"])) + jnp.sin(x @ pick(p["w"], order)) + pick(p["v"], i)

    params = {"w": array(D, D, seed=2), "v": array(D, D, seed=3)}
    args = array(D, D), jnp.arange(D) % 3
    found = jlora.sites(fn, params, *args)
    assert {path: (site.kind, site.inputs) for path, site in found.items()} == {
        "w": ("linear", (0,)),
        "v": ("linear+lookup", (0,)),
    }
    lora = jlora.init(jax.random.key(0), params, found, jlora.LoRA(rank=2, targets="w"))
    lora = jax.tree.map(lambda x: array(*x.shape, seed=9), lora)
    apply = jlora.wrap(fn)
    np.testing.assert_allclose(apply(params, lora, *args), fn(jlora.merge(params, lora), *args), rtol=1e-4, atol=1e-5)
    with jax.log_compiles():
        apply(params, lora, *args)
    assert "Finished tracing" in caplog.text, "the log has to tell"
    # Op by op, what no weight enters is what JAX has compiled before.
    assert "Compiling" not in caplog.text


def test_data_that_a_function_closed_over_is_no_constant_to_be_kept():
    """Without arguments nothing tells a constant from data: a product is a use, and what follows may be anything."""
    x, params = array(D, D), {"w": array(D, D, seed=2)}

    def fn(p):
        return jnp.tanh(x @ p["w"])

    lora = jlora.init(jax.random.key(0), params, jlora.sites(fn, params), jlora.LoRA(rank=2, targets="w"))
    lora = jax.tree.map(lambda x: array(*x.shape, seed=9), lora)
    np.testing.assert_allclose(jlora.wrap(fn)(params, lora), fn(jlora.merge(params, lora)), rtol=1e-4, atol=1e-5)


def test_a_function_traced_ahead_keeps_its_weights_factored():
    """JAX 0.12 calls it by a primitive of its own."""
    p, x = {"w": array(D, M)}, array(3, D)
    traced = jax.jit(lambda p, x: jnp.tanh(x @ p["w"])).trace(p, x)

    def fn(p, x):
        return traced(p, x)

    lora = jlora.init(jax.random.key(0), p, jlora.sites(fn, p, x), jlora.LoRA(rank=2, targets="w"))
    lora = jax.tree.map(lambda a: array(*a.shape), lora)
    got = jax.value_and_grad(lambda lora: jlora.wrap(fn)(p, lora, x).sum())(lora)
    dense = jax.value_and_grad(lambda lora: fn(jlora.merge(p, lora), x).sum())(lora)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, dense)
