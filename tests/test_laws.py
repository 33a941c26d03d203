"""The laws, each on every row of the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from measure import computed_values

import jlora

every = pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])


def assert_close(got, expected, tol: float) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, atol=tol * max(1.0, float(np.abs(y).max())), rtol=0)


def total(out) -> jax.Array:
    return sum(jnp.sin(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(out))


@every
def test_discovery_finds_roles(case: Case):
    found = case.sites()
    assert {path: (s.inputs, s.outputs, s.batch) for path, s in found.items()} == case.expect
    assert {*found, *found.skipped} == {
        jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in jax.tree.leaves_with_path(case.params)
    }


@every
def test_fresh_adapter_is_the_identity_bit_for_bit(case: Case):
    jit = jax.jit if case.exact_in_jit else lambda f: f
    got = jit(lambda p, lora, *a: jlora.wrap(case.fn)(p, lora, *a, *_static(case), **case.kwargs))(
        case.params, case.fresh(), *_dynamic(case)
    )
    expected = jit(lambda p, *a: case.fn(p, *a, *_static(case), **case.kwargs))(case.params, *_dynamic(case))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@every
def test_apply_equals_merge_then_base(case: Case):
    # Compiled as a whole: op by op every test would compile each of its operations.
    lora = case.trained()
    got = jax.jit(lambda l: jlora.wrap(case.fn)(case.params, l, *case.args, **case.kwargs))(lora)
    merged = jlora.merge(case.params, lora)
    assert jax.tree.structure(merged) == jax.tree.structure(case.params)
    run = jax.jit(lambda p: case.fn(p, *case.args, **case.kwargs))
    expected, base = run(merged), run(case.params)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert_close(got, expected, case.tol)
    change = max(
        float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(base), strict=True)
    )
    assert change > 10 * case.tol, "the adapter of this row changes too little for the comparison to mean anything"


@every
def test_gradients_are_those_of_the_dense_update(case: Case):
    lora = case.trained()
    got = jax.jit(jax.grad(lambda l: total(jlora.wrap(case.fn)(case.params, l, *case.args, **case.kwargs))))(lora)
    merged = jax.grad(lambda l: total(case.fn(jlora.merge(case.params, l), *case.args, **case.kwargs)))
    expected = jax.jit(merged)(lora)
    assert_close(got, expected, 5 * case.tol)
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(got))


@every
def test_gradient_program_computes_nothing_of_a_kernels_shape(case: Case):
    sites, lora = case.sites(), case.trained()
    # Inside a scan a stacked kernel has the shape of one layer.
    shapes = {s.shape for s in sites.values()} | {
        tuple(s.shape[d] for d in range(len(s.shape)) if d not in s.batch) for s in sites.values()
    }
    shapes = {s for s in shapes if sum(n > 1 for n in s) > 1}

    def loss(lora, params, *args):
        return total(jlora.wrap(case.fn)(params, lora, *args, *_static(case), **case.kwargs))

    def base(params, *args):
        return total(case.fn(params, *args, *_static(case), **case.kwargs))

    got = computed_values(jax.make_jaxpr(jax.grad(loss))(lora, case.params, *_dynamic(case)), shapes)
    allowed = computed_values(jax.make_jaxpr(base)(case.params, *_dynamic(case)), shapes)
    assert got <= allowed
    # The count can fail: forming the update in the step makes such values.
    dense = jax.make_jaxpr(jax.grad(lambda lora, p, *a: base(jlora.merge(p, lora), *a)))(
        lora, case.params, *_dynamic(case)
    )
    assert computed_values(dense, shapes) > allowed or not shapes


@every
def test_commutes_with_vmap_over_adapters(case: Case):
    apply = jlora.wrap(case.fn)
    several = [case.trained(seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *several)
    if not case.vmap:  # once JAX has the rule, this fails, and the rows need no exception
        with pytest.raises(NotImplementedError, match="ragged_dot vmap"):
            jax.vmap(lambda l: apply(case.params, l, *case.args, **case.kwargs))(stacked)
        return
    got = jax.jit(jax.vmap(lambda l: apply(case.params, l, *case.args, **case.kwargs)))(stacked)
    run = jax.jit(lambda l: apply(case.params, l, *case.args, **case.kwargs))
    expected = [run(l) for l in several]
    for i, out in enumerate(expected):
        assert_close(jax.tree.map(lambda x, i=i: x[i], got), out, case.tol)


@every
def test_commutes_with_jit_scan_and_remat(case: Case):
    lora = case.trained()

    def apply(params, lora, *args):
        return jlora.wrap(case.fn)(params, lora, *args, *_static(case), **case.kwargs)

    expected = apply(case.params, lora, *_dynamic(case))
    assert_close(jax.jit(apply)(case.params, lora, *_dynamic(case)), expected, case.tol)
    assert_close(jax.checkpoint(apply)(case.params, lora, *_dynamic(case)), expected, case.tol)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), lora)
    _, got = jax.lax.scan(lambda c, l: (c, apply(case.params, l, *_dynamic(case))), 0, stacked)
    assert_close(jax.tree.map(lambda x: x[0], got), expected, case.tol)


@every
def test_save_then_load_is_the_identity(case: Case, tmp_path):
    lora = case.trained()
    jlora.save(tmp_path / "adapter", lora)
    again = jlora.load(tmp_path / "adapter", case.params)
    assert jax.tree.structure(again) == jax.tree.structure(lora)
    for x, y in zip(jax.tree.leaves(lora), jax.tree.leaves(again), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_order_of_calls_does_not_matter():
    """Nothing global changes: base before adapter, adapter before base, and unrelated compiled code afterwards."""
    case = next(c for c in CASES if c.name == "linen_attention")
    unrelated = jax.jit(lambda w, x: jnp.sin(x @ w))
    weight, x = jnp.ones((5, 7)), jnp.ones((3, 5))
    base, apply = jax.jit(case.fn), jax.jit(jlora.wrap(case.fn))

    def everything(order: str) -> dict:
        calls = {
            "base": lambda: base(case.params, *case.args),
            "adapted": lambda: apply(case.params, case.trained(), *case.args),
            "unrelated": lambda: unrelated(weight, x),
        }
        return {name: calls[name]() for name in order.split()}

    orders = ["base adapted unrelated", "adapted base unrelated", "unrelated adapted base", "base unrelated adapted"]
    results = []
    for order in orders:
        jax.clear_caches()
        results.append(everything(order))
    for result in results[1:]:
        for name, value in results[0].items():
            np.testing.assert_array_equal(result[name], value)
    assert unrelated._cache_size() == 1


def _dynamic(case: Case) -> list:
    return [x for x in case.args if not isinstance(x, str)]


def _static(case: Case) -> list:
    return [x for x in case.args if isinstance(x, str)]
