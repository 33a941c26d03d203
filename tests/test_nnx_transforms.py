"""NNX modules whose calls go through transformations of flax, which give every variable back, and linen modules inside NNX.

Truth is the module itself, and the dense merge.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import D, L, M, array
from flax import nnx
from jax.sharding import PartitionSpec as P

import jlora

ROWS = array(2, D)


def identity(f, **how):
    del how
    return f


def scanned(f, m, x):
    return nnx.scan(f, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(m.stack, x)


def looped(f, m, x):
    return nnx.fori_loop(0, 2, lambda i, c: (c[0], f(c[0], c[1])), (m.lin, x))[1]


def sharded(f, m, x):
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    return nnx.shard_map(f, mesh=mesh, in_specs=(P(), P("rows")), out_specs=P("rows"))(m.lin, x)


def layer(m, x):
    return jnp.tanh(m(x))


WAYS = {
    "remat": lambda m, x: nnx.remat(Block.block)(m, x),
    "jit": lambda m, x: nnx.jit(Block.block)(m, x),
    "jit twice": lambda m, x: nnx.jit(Block.block)(m, nnx.jit(Block.block)(m, x)),
    "remat of a part": lambda m, x: nnx.remat(layer)(m.lin, x),
    "remat in jit": lambda m, x: nnx.jit(nnx.remat(Block.block))(m, x),
    "jit in remat": lambda m, x: nnx.remat(nnx.jit(Block.block))(m, x),
    "without updates": lambda m, x: nnx.remat(layer, graph_updates=False)(m.lin, x),
    "vmap": lambda m, x: nnx.vmap(layer, in_axes=(None, 0))(m.lin, x),
    "remat in vmap": lambda m, x: nnx.vmap(nnx.remat(layer), in_axes=(None, 0))(m.lin, x),
    "remat in vmap of a stack": lambda m, x: nnx.vmap(nnx.remat(layer), in_axes=(0, None))(m.stack, x).sum(0),
    "cond": lambda m, x: nnx.cond(x.sum() > -1e9, layer, lambda m, x: x, m.lin, x),
    "remat in cond": lambda m, x: nnx.cond(x.sum() > -1e9, nnx.remat(layer), lambda m, x: x, m.lin, x),
    "remat in switch": lambda m, x: nnx.switch(jnp.int32(x.sum() < -1e9), [nnx.remat(layer), layer], m.lin, x),
    "fori": lambda m, x: looped(layer, m, x),
    "remat in fori": lambda m, x: looped(nnx.remat(layer), m, x),
    "scan": lambda m, x: scanned(layer, m, x),
    "remat in scan": lambda m, x: scanned(nnx.remat(layer), m, x),
    "scan in jit": lambda m, x: nnx.jit(lambda m, x: scanned(nnx.remat(layer), m, x))(m, x),
    "grad": lambda m, x: nnx.grad(lambda m, x: nnx.remat(layer)(m, x).sum(), argnums=1)(m.lin, x),
    "shard_map": lambda m, x: sharded(layer, m, x),
}


class Block(nnx.Module):
    """Parameters, batch statistics, a random stream, a value that is NaN and a number: none of them changes in a call."""

    def __init__(self, rngs, way):
        self.lin = nnx.Linear(D, D, rngs=rngs)
        self.norm = nnx.BatchNorm(D, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.stack = nnx.vmap(lambda rngs: nnx.Linear(D, D, rngs=rngs))(rngs.split(L))
        self.seen, self.number = nnx.Variable(jnp.full(3, jnp.nan)), nnx.Variable(1000)
        self.way = way

    def block(self, x):
        return jnp.tanh(self.drop(self.norm(self.lin(x))))

    def __call__(self, x):
        return WAYS[self.way](self, x)


def close(got, wanted):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(abs(b).max()))), got, wanted
    )


@pytest.mark.parametrize("way", WAYS)
def test_nnx_transformations_that_change_nothing(way, standard_promotion):
    module = Block(nnx.Rngs(0), way)
    fn, params = jlora.nnx.split(module)
    wanted = module(ROWS)
    close(fn(params, ROWS), wanted)
    close(jax.jit(fn)(params, ROWS), wanted)
    close(jax.vmap(fn, (None, 0))(params, ROWS[None])[0], wanted) if way != "shard_map" else None
    out, state = jax.jit(lambda p, x: fn(p, x, mutable=True))(params, ROWS)
    close(out, wanted)
    assert jax.tree.structure(state) == jax.tree.structure(fn.state)

    sites = jlora.sites(fn, params, ROWS)
    (path,) = sites
    lora = jlora.init(jax.random.key(1), params, sites, jlora.LoRA(rank=2, targets=path))
    lora = jax.tree.map(lambda a: array(*a.shape) / 2, lora)
    apply = jlora.wrap(fn)
    got = jax.jit(jax.value_and_grad(lambda lora: (apply(params, lora, ROWS) ** 2).sum()))(lora)
    close(got, jax.value_and_grad(lambda lora: (fn(jlora.merge(params, lora), ROWS) ** 2).sum())(lora))
    assert abs(float(got[0]) - float((wanted**2).sum())) > 1e-3


class Changes(nnx.Module):
    def __init__(self, rngs, what, transform):
        self.a, self.b = nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(D, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.count, self.what, self.transform = nnx.Variable(jnp.zeros(3)), what, transform

    def swap(self, x):
        a, b = self.a.kernel[...], self.b.kernel[...]
        self.a.kernel[...], self.b.kernel[...] = b, a
        return self.a(x)

    def write(self, x):
        self.a.bias[...] = 2.0 * self.a.bias[...] + 1.0
        return self.a(x)

    def add(self, x):
        self.count[...] += 1.0
        return self.a(x)

    def average(self, x):
        return self.norm(x)

    def draw(self, x):
        return self.drop(x)

    def __call__(self, x):
        return self.transform(getattr(Changes, self.what))(self, x)


@pytest.mark.parametrize("transform", [identity, nnx.jit, nnx.remat])
@pytest.mark.parametrize(
    ("what", "which"),
    [
        ("swap", r"writes the parameter '[ab]/kernel'.*\n.*another kind of variable"),
        ("write", r"writes the parameter 'a/bias'"),
        ("add", r"changes 'count'.*\n.*mutable=True"),
        ("average", r"changes 'norm/(mean|var)'"),
        ("draw", r"changes 'drop/rngs/count'"),
    ],
)
def test_nnx_changes_are_seen_through_transformations(what, which, transform):
    fn, params = jlora.nnx.split(Changes(nnx.Rngs(0), what, transform))
    calls = [fn, jax.jit(fn), lambda p, x: jax.grad(lambda p: fn(p, x).sum())(p), lambda p, x: jlora.sites(fn, p, x)]
    for call in calls:
        with pytest.raises(ValueError, match=which):
            call(params, ROWS)
    if what in ("swap", "write"):
        with pytest.raises(ValueError, match=which):
            jax.jit(lambda p, x: fn(p, x, mutable=True))(params, ROWS)
    else:
        out, state = jax.jit(lambda p, x: fn(p, x, mutable=True))(params, ROWS)
        again, _ = fn(params, ROWS, mutable=True, state=state)
        assert out.shape == again.shape


class Counted(nnx.Module):
    """Counts the runs of its Python code."""

    def __init__(self, rngs, transform):
        self.lin, self.transform, self.runs = nnx.Linear(D, M, rngs=rngs), transform, nnx.static(Runs())

    def __call__(self, x):
        self.runs.number += 1
        return self.transform(lambda m, x: m(x))(self.lin, x)


class Runs:
    number = 0


def test_nnx_a_call_is_traced_again_only_where_values_do_not_tell():
    for transform, eager, traced in ((identity, 1, 1), (nnx.remat, 1, 2), (nnx.jit, 1, 2)):
        module = Counted(nnx.Rngs(0), transform)
        fn, params = jlora.nnx.split(module)
        for call, runs in ((fn, eager), (jax.jit(fn), traced)):
            before = module.runs.number
            call(params, ROWS)
            assert module.runs.number - before == runs


class Looks(nnx.Module):
    def __init__(self, rngs, **how):
        self.lin, self.how = nnx.Linear(D, M, rngs=rngs), how

    def __call__(self, x):
        y = nnx.remat(lambda m, x: m(x), **self.how)(self.lin, x)
        return y if self.lin.bias[...].sum() < 1.0 else 2.0 * y


def test_nnx_a_call_that_looks_at_values_cannot_be_traced_again():
    """Differentiated without ``jit``, values are known; where the call is traced to find out what it changes, they are not."""
    fn, params = jlora.nnx.split(Looks(nnx.Rngs(0)))
    with pytest.raises(
        ValueError, match=r"(?s)Whether the call changes 'lin/bias' cannot be told: .*graph_updates=False"
    ):
        jax.grad(lambda p: fn(p, ROWS).sum())(params)
    fn, params = jlora.nnx.split(Looks(nnx.Rngs(0), graph_updates=False))
    assert jax.grad(lambda p: fn(p, ROWS).sum())(params)["lin"]["kernel"].shape == (D, M)


class Linen(nn.Module):
    """A linen module, for whose random streams ``ToNNX`` draws keys in every call."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(M)(x))
        return nn.Dense(3, name="head")(nn.BatchNorm(use_running_average=not train)(x))


def bridged():
    return nnx.bridge.ToNNX(Linen(), rngs=nnx.Rngs(0, dropout=1)).lazy_init(ROWS)


@pytest.mark.parametrize("part", [False, True])
def test_linen_module_in_nnx(part):
    module = Around(bridged()) if part else bridged()
    fn, params = jlora.nnx.split(module)
    np.testing.assert_array_equal(fn(params, ROWS), module(ROWS))
    sites = jlora.sites(fn, params, ROWS)
    at = "inner/" if part else ""
    assert set(sites) == {f"{at}Dense_0/kernel", f"{at}head/kernel"}
    lora = jlora.init(jax.random.key(1), params, sites, jlora.LoRA(rank=2, targets=".*Dense_0/kernel"))
    lora = jax.tree.map(lambda a: array(*a.shape), lora)
    apply = jlora.wrap(fn)
    got = jax.jit(jax.value_and_grad(lambda lora: (apply(params, lora, ROWS) ** 2).sum()))(lora)
    close(got, jax.value_and_grad(lambda lora: (fn(jlora.merge(params, lora), ROWS) ** 2).sum())(lora))


class Around(nnx.Module):
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return nnx.remat(lambda m, x: m(x))(self.inner, x)


def test_linen_module_in_nnx_that_trains():
    fn, params = jlora.nnx.split(bridged())
    sites = jlora.sites(fn, params, ROWS)
    lora = jlora.init(jax.random.key(1), params, sites, jlora.LoRA(rank=2, targets="Dense_0/kernel"))
    train = {"train": True, "mutable": ["batch_stats"]}
    out, state = jlora.wrap(fn)(params, lora, ROWS, **train)
    np.testing.assert_allclose(out, fn(params, ROWS, **train)[0], rtol=1e-6)
    again, _ = fn(params, ROWS, state=state, **train)
    assert (out != again).any()  # another mask
    assert (state["BatchNorm_0"]["mean"][...] != fn.state["BatchNorm_0"]["mean"][...]).any()


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(M)(x))


def test_linen_module_in_nnx_that_draws():
    fn, params = jlora.nnx.split(nnx.bridge.ToNNX(Masked(), rngs=nnx.Rngs(0)).lazy_init(ROWS))
    for call in (fn, jax.jit(fn, static_argnames="train")):
        call(params, ROWS)
        with pytest.raises(ValueError, match=r"changes 'to_nnx__rngs/\w+/count'.*\n.*rngs=nnx\.Rngs\(dropout=key\)"):
            call(params, ROWS, train=True)
    keys = [fn(params, ROWS, train=True, rngs=nnx.Rngs(dropout=jax.random.key(i))) for i in (3, 3, 4)]
    assert (keys[0] == keys[1]).all()
    assert (keys[0] != keys[2]).any()
    with pytest.raises(ValueError, match=r"module Masked has no parameters yet.\n.*lazy_init\(x\)"):
        jlora.nnx.split(nnx.bridge.ToNNX(Masked(), rngs=nnx.Rngs(0)))
