"""NNX modules as pure functions of their parameters, and back, beyond what the laws say."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cases import D, M, X
from flax import nnx

import jlora
import jlora.export


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.lin = nnx.Linear(D, M, rngs=rngs)
        self.norm = nnx.BatchNorm(M, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.lin(x)))

    def double(self, x):
        return 2.0 * self.lin(x)


def test_nnx_round_trip():
    module = Noisy(nnx.Rngs(0))
    module.eval()
    fn, params = jlora.nnx.split(module)
    assert set(params) == {"lin", "norm"}
    np.testing.assert_array_equal(fn(params, X), module(X))
    np.testing.assert_array_equal(fn(params, X, method="double"), module.double(X))
    lora = jlora.init(jax.random.key(0), params, jlora.sites(fn, params, X), jlora.LoRA(rank=2, targets="lin/kernel"))
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    again = jlora.nnx.merge(fn, jlora.merge(params, lora))
    assert isinstance(again, Noisy)
    np.testing.assert_allclose(again(X), jlora.wrap(fn)(params, lora, X), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(module(X), fn(params, X))  # the first module is as it was


def test_nnx_state_that_changes_is_not_lost():
    fn, params = jlora.nnx.split(Noisy(nnx.Rngs(0)))
    with pytest.raises(
        ValueError,
        match=r"The call changes '(norm/mean|drop/rngs/count)\S*'.*which a pure function cannot.*\n.*mutable=True",
    ):
        fn(params, X)
    out, state = fn(params, X, mutable=True)
    assert not any((x is y) for x, y in [(jax.tree.leaves(state)[0], jax.tree.leaves(fn.state)[0])])
    second, _ = fn(params, X, mutable=True, state=state)
    assert (out != second).any()
    lora = jlora.init(
        jax.random.key(0), params, jlora.sites(fn, params, X, mutable=True), jlora.LoRA(rank=2, targets="lin/kernel")
    )
    adapted, _ = jlora.wrap(fn)(params, lora, X, mutable=True)
    np.testing.assert_allclose(adapted, out, rtol=1e-6)
    module = jlora.nnx.merge(fn, params, state)
    np.testing.assert_array_equal(module.norm.mean[...], state["norm"]["mean"][...])


class Writes(nnx.Module):
    def __init__(self, rngs, what):
        self.lin, self.what = nnx.Linear(D, M, rngs=rngs), what
        self.norm = nnx.BatchNorm(M, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        y = self.lin(x)
        if self.what == "sow":
            self.y = nnx.Intermediate(y)
        if self.what == "param":
            self.lin.bias[...] = 2.0 * self.lin.bias[...] + 1.0
        if self.what == "jit":
            return nnx.jit(lambda m, x: m.norm(x))(self, y)
        return self.norm(y)


def test_nnx_calls_that_write():
    fn, params = jlora.nnx.split(Writes(nnx.Rngs(0), "sow"))
    with pytest.raises(ValueError, match=r"The call changes 'y'"):
        fn(params, X)
    out, state = fn(params, X, mutable=True)
    assert state["y"][...].shape == out.shape
    again, _ = fn(params, X, mutable=True, state=state)  # what the call created is not handed on
    np.testing.assert_array_equal(again, out)
    np.testing.assert_array_equal(jlora.nnx.merge(fn, params, state)(X), out)
    del state["norm"]["mean"]
    with pytest.raises(ValueError, match=r"not the state of Writes: it lacks 'norm/mean'.*\n.*fn\.state"):
        fn(params, X, mutable=True, state=state)
    fn, params = jlora.nnx.split(Writes(nnx.Rngs(0), "param"))
    with pytest.raises(ValueError, match=r"The call writes the parameter 'lin/bias'"):
        fn(params, X, mutable=True)
    fn, params = jlora.nnx.split(Writes(nnx.Rngs(0), "jit"))
    assert fn(params, X).shape == (*X.shape[:-1], M)


@pytest.mark.parametrize("evaluated", [True, False])
def test_nnx_sites_of_a_module_without_values(evaluated):
    """Weights are found by shapes; batch statistics and random streams need no values either."""
    how = {} if evaluated else {"mutable": True}
    modules = [nnx.eval_shape(lambda: Noisy(nnx.Rngs(0))), Noisy(nnx.Rngs(0))]
    found = []
    for module in modules:
        if evaluated:
            module.eval()
        fn, params = jlora.nnx.split(module)
        found.append(jlora.sites(fn, params, X, **how))
    assert dict(found[0]) == dict(found[1])
    assert found[0].base == found[1].base
    shapes, params, real = *jlora.nnx.split(modules[0]), jlora.nnx.split(modules[1])[1]
    with pytest.raises(ValueError, match=r"split without values.*shape of '(norm|drop)/\S+' is known.*\n.*state=state"):
        shapes(real, X, **how)
    if evaluated:
        fn, _ = jlora.nnx.split(modules[1])
        np.testing.assert_array_equal(shapes(real, X, state=fn.state), fn(real, X))


def test_nnx_state_in_place_of_its_parameters_is_named(tmp_path):
    module = nnx.Linear(D, M, rngs=nnx.Rngs(0))
    fn, params = jlora.nnx.split(module)
    sites = jlora.sites(fn, params, X)
    jlora.save(tmp_path / "a", jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="kernel")))
    with pytest.raises(
        ValueError, match=r"another base: '\w+' .* is missing \(there is '\w+/value', .* jlora\.nnx\.split"
    ):
        jlora.load(tmp_path / "a", nnx.state(module, nnx.Param))


class Listed(nnx.Module):
    """More layers than there are digits: by the order of strings the eleventh comes second."""

    def __init__(self, rngs):
        self.ls = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(12)])

    def __call__(self, x):
        for layer in self.ls:
            x = jnp.tanh(layer(x))
        return x


def listed():
    module = Listed(nnx.Rngs(0))
    fn, params = jlora.nnx.split(module)
    rules = [jlora.LoRA(rank=2, targets="ls/(2|11)/kernel"), jlora.Full(targets="ls/10/bias")]
    lora = jlora.init(jax.random.key(0), params, jlora.sites(fn, params, X), rules)
    return module, fn, params, jax.tree.map(lambda x: x + 0.1, lora)


def test_nnx_items_of_a_list_have_strings_for_keys(tmp_path):
    module, fn, params, lora = listed()
    assert set(params["ls"]) == {str(i) for i in range(12)}
    assert list(lora) == ["ls/10/bias", "ls/11/kernel", "ls/2/kernel"]
    numbered = {"ls": {int(i): layer for i, layer in params["ls"].items()}}
    for tree in (params, numbered):
        np.testing.assert_array_equal(fn(tree, X), module(X))
        np.testing.assert_array_equal(jlora.nnx.merge(fn, tree)(X), module(X))
    merged = jlora.merge(params, lora)
    wanted = jlora.wrap(fn)(params, lora, X)
    np.testing.assert_allclose(jlora.nnx.merge(fn, merged)(X), wanted, rtol=1e-4, atol=1e-5)
    jlora.export.save_orbax(tmp_path / "m", params, lora)
    with ocp.StandardCheckpointer() as checkpointer:
        back = checkpointer.restore(tmp_path / "m")
    assert jax.tree.structure(back) == jax.tree.structure(params)
    np.testing.assert_allclose(fn(back, X), wanted, rtol=1e-4, atol=1e-5)
    artifact = jlora.export.function(fn, params, lora, X).serialize()
    served = jax.export.deserialize(artifact).call(params, jlora.export.arrays(lora), X)
    np.testing.assert_allclose(served, wanted, rtol=1e-4, atol=1e-5)


def test_nnx_adapters_saved_when_lists_had_numbers_are_the_same(tmp_path):
    _, fn, params, _ = listed()
    numbered = {"ls": {int(i): layer for i, layer in params["ls"].items()}}
    rule = jlora.LoRA(rank=2, targets="ls/(2|11)/kernel")
    before = jlora.init(jax.random.key(0), numbered, jlora.sites(fn, numbered, X), rule)
    jlora.save(tmp_path / "a", before)
    loaded = jlora.load(tmp_path / "a", params)
    now = jlora.init(jax.random.key(0), params, jlora.sites(fn, params, X), rule)
    assert jax.tree.structure(loaded) == jax.tree.structure(now)
    jax.tree.map(np.testing.assert_array_equal, loaded, now)


def test_nnx_parameters_of_another_module_are_refused():
    _, fn, params, lora = listed()
    short = {"ls": {i: layer for i, layer in params["ls"].items() if i != "11"}}
    long = {"ls": params["ls"] | {"12": params["ls"]["0"]}}
    misspelt = {"sl": params["ls"]}
    for call in (fn, lambda tree, x: jlora.nnx.merge(fn, tree)):
        with pytest.raises(ValueError, match=r"not the parameters of Listed: they lack 'ls/11'.\n  nearest: ls/1"):
            call(short, X)
        with pytest.raises(ValueError, match=r"they also have 'ls/12'.\n  nearest: .*\n.*jlora\.nnx\.split returned"):
            call(long, X)
        with pytest.raises(ValueError, match=r"they lack 'ls'.\n  nearest: sl"):
            call(misspelt, X)
        with pytest.raises(TypeError, match=r"(?s)parameters of Listed come first.*got: an adapter.*jlora\.merge"):
            call(lora, X)


def test_nnx_wrong_arguments():
    with pytest.raises(TypeError, match=r"split takes an nnx.Module"):
        jlora.nnx.split(nn.Dense(M))
    with pytest.raises(TypeError, match=r"merge takes the function that jlora\.nnx\.split returned"):
        jlora.nnx.merge(lambda p: p, {})
