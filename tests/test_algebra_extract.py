"""Adapters out of two checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algebra_case import NAMES, assert_all_can_train, at_once, close, dense, grads_of, statics, trained, truncated
from cases import BY_NAME

import jlora
from jlora import algebra


@pytest.mark.parametrize(("name", "host"), [(name, i % 2 == 0) for i, name in enumerate(NAMES)])
def test_extract_finds_the_adapter_again(name, host):
    case, lora = BY_NAME[name], trained(name)
    params, tuned = case.params, at_once(jlora.merge, case.params, lora)
    if host:
        params, tuned = (jax.tree.map(np.asarray, tree) for tree in (params, tuned))
    rule = jlora.LoRA(rank=3, alpha=6.0, dropout=0.1, targets=list(case.expect))
    found, kept = algebra.extract(params, tuned, case.sites(), rule, report=True)
    assert set(found) == set(lora)
    for path, x in lora.items():
        close(dense(found[path]), dense(x), 1e-4)
        assert statics(found[path]) == {**statics(x), "scale": 2.0}
        assert kept[path] == pytest.approx(1.0, abs=1e-5)
        assert isinstance(kept[path], float)


@pytest.mark.parametrize("name", NAMES)
def test_extract_is_the_best_approximation(name):
    case, rng = BY_NAME[name], np.random.default_rng(0)
    paths, leaves, tree = jlora._paths.flatten(case.params)
    moved = [
        np.asarray(x) + rng.standard_normal(x.shape, np.float32) * (p in case.expect)
        for p, x in zip(paths, leaves, strict=True)
    ]
    params, tuned = jax.tree.map(np.asarray, case.params), jax.tree.unflatten(tree, moved)
    rank = 3 if name != "unit_axes" else 1
    rule = jlora.LoRA(rank=rank, targets=list(case.expect))
    found, kept = algebra.extract(params, tuned, case.sites(), rule, report=True)
    for path, x in found.items():
        i = paths.index(path)
        order = (*x.batch, *x.inputs, *x.outputs)
        d = (np.asarray(moved[i], np.float64) - np.asarray(leaves[i], np.float64)).transpose(order)
        expected, share = truncated(d.reshape(dense(x).shape), rank)
        close(dense(x), expected, 1e-4)
        assert kept[path] == pytest.approx(share, rel=1e-4)
        a, b = (np.sqrt((np.asarray(f, np.float64) ** 2).sum()) for f in (x.a, x.b))
        assert a == pytest.approx(b, rel=1e-4)  # evenly on both sides


PARAMS = {
    "up": jnp.ones((5, 7)),
    "down": jnp.ones((7, 3)),
    "bias": jnp.ones(3),
    "step": jnp.int32(0),
    "key": jax.random.key(0),
}


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"][None]


SITES = jlora.sites(model, PARAMS, jnp.ones((2, 5)))


UP = jlora.LoRA(rank=1, targets="up")


def test_extract_copies_leaves_trained_outright_and_refuses_to_lose_others():
    tuned = {**PARAMS, "up": PARAMS["up"] + 1.0, "bias": PARAMS["bias"] * 3.0}
    rules = [UP, jlora.Full(targets="bias"), jlora.LoRA(rank=2, targets="down")]
    lora, kept = algebra.extract(PARAMS, tuned, SITES, rules, report=True)
    np.testing.assert_array_equal(lora["bias"].value, tuned["bias"])
    assert lora["bias"].base == SITES.base
    assert kept["bias"] == kept["down"] == 1.0
    assert not lora["down"].b.any()
    assert_all_can_train(at_once(grads_of, {"down": lora["down"]}))
    x = jnp.linspace(-1, 1, 10).reshape(2, 5)
    np.testing.assert_allclose(at_once(jlora.wrap(model), PARAMS, lora, x), at_once(model, tuned, x), rtol=1e-5)
    with pytest.raises(ValueError, match=r"No rule covers 1 leaf that changed: bias\.\n  Add a rule.*rest='ignore'"):
        algebra.extract(PARAMS, tuned, SITES, UP)
    assert list(algebra.extract(PARAMS, tuned, SITES, UP, rest="ignore")) == ["up"]
    for path, value in (("step", jnp.int32(3)), ("key", jax.random.key(1))):
        with pytest.raises(ValueError, match=f"No rule covers 1 leaf that changed: {path}"):
            algebra.extract(PARAMS, {**tuned, "bias": PARAMS["bias"], path: value}, SITES, UP)


def test_extract_of_other_dtypes():
    """A checkpoint in bf16 that was tuned in fp32, and one in fp64 on the host: the difference is made in the wider dtype."""
    fine = 1e-3 * np.outer(np.arange(1.0, 6), np.ones(7))
    coarse = {"up": PARAMS["up"].astype(jnp.bfloat16)}

    def fn(p, x):
        return x @ p["up"].astype(jnp.float32)

    sites = jlora.sites(fn, coarse, jnp.ones((2, 5)))
    lora = algebra.extract(coarse, {"up": jnp.asarray(1 + fine, jnp.float32)}, sites, UP)
    close(dense(lora["up"]), fine, 1e-4)
    half = algebra.extract(
        coarse, {"up": np.asarray(1 + fine, np.float32)}, sites, jlora.LoRA(rank=1, targets="up", dtype=jnp.bfloat16)
    )
    assert half["up"].a.dtype == jnp.bfloat16
    host = {"up": np.ones((5, 7))}
    sites = jlora.sites(fn, {"up": jax.ShapeDtypeStruct((5, 7), jnp.float32)}, jnp.ones((2, 5)))
    single = {"up": np.ones((5, 7), np.float32)}
    lora = algebra.extract(single, {"up": host["up"] + 1e-9 * fine}, sites, UP)
    close(dense(lora["up"]), 1e-9 * fine, 1e-3)


def test_what_extract_refuses():
    tuned = {**PARAMS, "up": PARAMS["up"] + 1.0}
    shapes = jax.eval_shape(lambda: PARAMS)
    wrong = {
        r"rest must be 'error' or 'ignore'.\n  got: 'drop'": (tuned, {"rest": "drop"}),
        r"two checkpoints are the same in all leaves": (PARAMS, {}),
        r"two checkpoints are the same in the leaves that rules cover: down": (
            tuned, {"rest": "ignore", "rules": jlora.LoRA(rank=1, targets="down")},
        ),
        r"different leaves: there is no 'bias' in tuned.\n  nearest: bais": (
            {("bais" if p == "bias" else p): x for p, x in tuned.items()}, {},
        ),
        r"different leaves: there is no 'more' in params.\n  nearest": ({**tuned, "more": jnp.ones(3)}, {}),
        r"different shapes: 'up' is \(5, 7\) in params, \(7, 5\) in tuned": ({**tuned, "up": tuned["up"].T}, {}),
        r"needs the values of both checkpoints.\n  got: only the shape of": (shapes, {}),
        r"difference of 'up' is not finite": ({**tuned, "up": tuned["up"] * jnp.nan}, {}),
        r"sites were found for other parameters: 'up'": (tuned, {"params": {**PARAMS, "up": jnp.ones((5, 8))}}),
    }  # fmt: skip
    for message, (second, how) in wrong.items():
        how = {"params": PARAMS, "rules": UP} | how
        params, rules = how.pop("params"), how.pop("rules")
        with pytest.raises(ValueError, match=message):
            algebra.extract(params, second, SITES, rules, **how)
    huge = {**PARAMS, "up": np.full((5, 7), np.float32(3e38))}
    with pytest.raises(ValueError, match=r"difference of 'up' is not finite"):
        algebra.extract(huge, {**huge, "up": -huge["up"]}, SITES, UP)
    with pytest.raises(TypeError, match=r"sites from jlora.sites.\n  got: dict as sites"):
        algebra.extract(PARAMS, tuned, dict(SITES), UP)
    with pytest.raises(ValueError, match=r"No parameter matches target 'upp'"):
        algebra.extract(PARAMS, tuned, SITES, jlora.LoRA(rank=1, targets="upp"))
