"""A merged leaf that its dtype cannot hold: finite weights and factors whose sum is not. Every way to merge raises, unless told not to."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

import jlora
import jlora.export
from benchmarks import measure
from jlora import _merge


def made(dtype, size, factors=jnp.float32):
    """A base of ``dtype`` and an adapter whose update is about ``size``."""
    params = {"w": jnp.full((3, 5), 2.0, dtype), "v": jnp.ones((5, 2), jnp.float32)}
    sites = jlora.sites(lambda p, x: x @ p["w"].astype(x.dtype) @ p["v"], params, jnp.ones((7, 3)))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, alpha=2, targets=["w", "v"]))
    w = replace(lora["w"], a=jnp.ones((3, 2), factors), b=jnp.full((2, 5), size / 2, factors))
    return params, lora | {"w": w}, sites


NARROW = {
    "float16": (1e5, 65504),
    "bfloat16": (3.4e38, 3.3895e38),
    "float8_e4m3fn": (600.0, 448),
    "float8_e5m2": (7e4, 57344),
}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("sign", [1, -1])
def test_merge_raises_where_a_dtype_ends(dtype, sign):
    size, most = NARROW[dtype]
    params, lora, _ = made(dtype, sign * size)
    told = re.escape(
        f"'w' has values that {dtype} cannot hold: {abs(2 + sign * size):.5g}, where its largest is {most:.5g}"
    )
    with pytest.raises(ValueError, match=told + r"\.\n  Choose a wider dtype: merge\(\.\.\., dtype=jnp.float32\)"):
        jlora.merge(params, lora)
    with pytest.raises(ValueError, match=told):
        jlora.merge(params, lora, report=True)
    assert not np.isfinite(np.asarray(jlora.merge(params, lora, overflow="allow")["w"], np.float32)).any()
    wide = jlora.merge(params, lora, dtype=jnp.float32)["w"]
    np.testing.assert_allclose(wide, 2 + sign * size * np.ones((3, 5)), rtol=1e-6)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("rule", [jlora.LoRA(rank=2, targets="w"), jlora.Full(targets="w")])
def test_an_adapter_that_is_not_finite_raises(rule, value, tmp_path):
    params, _, sites = made(jnp.float32, 1.0)
    lora = jax.tree.map(lambda x: x.at[0].set(value), jlora.init(jax.random.key(0), params, sites, rule))
    told = r"The adapter of 'w' is not finite: .*\n.*take an earlier one"
    for report in (False, True):
        with pytest.raises(ValueError, match=told + r".* merge\(\.\.\., overflow='allow'\)"):
            jlora.merge(params, lora, report=report)
    with pytest.raises(ValueError, match=told):
        jlora.export.save_orbax(tmp_path / "a", params, lora)
    with pytest.raises(ValueError, match=told):
        jlora.export.save(tmp_path / "b", params, lora, sites=sites, names={"w": "m.w.weight"})
    assert not list(tmp_path.iterdir())
    merged, lost = jlora.merge(params, lora, report=True, overflow="allow")
    assert not np.isfinite(merged["w"]).all()
    assert not np.isfinite(lost["w"])
    assert not np.isfinite(jax.jit(lambda lora: jlora.merge(params, lora, report=True)[1])(lora)["w"])


def test_what_a_dtype_holds_is_merged():
    params, lora, _ = made(jnp.float16, 65000.0)
    assert (jlora.merge(params, lora)["w"] == 65000).all()


def test_a_whole_leaf_raises_too():
    params, _, sites = made(jnp.float16, 1.0)
    lora = jlora.init(jax.random.key(0), params, sites, jlora.Full(targets="w"))
    lora = jax.tree.map(lambda x: x + 1e5, lora)
    with pytest.raises(ValueError, match=r"'w' has values that float16 cannot hold: 1e\+05"):
        jlora.merge(params, lora)
    assert (jlora.merge(params, lora, dtype=jnp.float32)["w"] == 100_002).all()


def test_factors_whose_product_their_own_dtype_cannot_hold():
    params, lora, _ = made(jnp.float32, 1e5, jnp.float16)
    with pytest.raises(
        ValueError,
        match=r"the update of 'w' has values that the dtype of its factors cannot hold; the leaf reaches 99970",
    ):
        jlora.merge(params, lora)
    cast = jax.tree.map(lambda x: x.astype(jnp.float32), lora)  # what the message says
    np.testing.assert_allclose(jlora.merge(params, cast)["w"], 1e5, rtol=1e-3)
    with pytest.raises(ValueError, match=r"float32 cannot hold\.\n  The factors are finite, but their product is not"):
        jlora.merge(params, lora | {"w": replace(cast["w"], a=cast["w"].a * 1e20, b=cast["w"].b * 1e20)})


def test_what_is_not_finite_to_begin_with_is_no_overflow():
    params, lora, _ = made(jnp.float16, 1.0)
    masked = params | {"w": params["w"].at[0, 0].set(-jnp.inf)}
    merged = jlora.merge(masked, lora)["w"]
    assert np.isinf(merged).sum() == 1
    broken = lora | {"w": replace(lora["w"], b=lora["w"].b.at[0, 0].set(jnp.nan))}
    assert np.isnan(jlora.merge(params, broken, overflow="allow")["w"]).any()
    with pytest.raises(ValueError, match="cannot hold"):
        jlora.merge(masked, made(jnp.float16, 1e5)[1])


def test_under_transformations_nothing_raises_and_the_report_tells():
    """Values are not known there: the documentation says so."""
    params, lora, _ = made(jnp.float16, 1e5)
    merged, lost = jax.jit(lambda p, l: jlora.merge(p, l, report=True))(params, lora)
    assert np.isinf(merged["w"]).all()
    assert not np.isfinite(lost["w"])
    assert np.isfinite(lost["v"])
    jax.grad(lambda l: jlora.merge(params, l)["v"].sum())(lora)
    jaxpr = jax.make_jaxpr(lambda p, l: jlora.merge(p, l))(params, lora)
    assert "reduce_max" not in str(jaxpr)  # what nobody reads is not computed either


def test_overflow_is_one_of_two():
    params, lora, sites = made(jnp.float16, 1.0)
    with pytest.raises(ValueError, match=r"overflow must be 'raise' or 'allow'\.\n  got: 'clip'"):
        jlora.merge(params, lora, overflow="clip")
    with pytest.raises(ValueError, match="overflow must be 'raise' or 'allow'"):
        jlora.export.save("nowhere", params, lora, sites=sites, overflow="clip")


@pytest.mark.parametrize("factors", [jnp.float32, jnp.float16])
def test_exports_raise_too(tmp_path, factors):
    params, lora, sites = made(jnp.float16, 1e5, factors)
    ways = {
        "save": lambda **how: jlora.export.save(tmp_path / "m", params, lora, sites=sites, **how),
        "orbax": lambda **how: jlora.export.save_orbax(tmp_path / "o", params, lora, **how),
    }
    for save in ways.values():
        with pytest.raises(ValueError, match=r"Merging overflows: .*'w'.*\n  .*overflow='allow'"):
            save()
        assert list(tmp_path.iterdir()) == []
    for save in ways.values():
        save(overflow="allow")
    assert np.isinf(load_file(tmp_path / "m" / "model.safetensors")["w"]).all()
    with ocp.StandardCheckpointer() as c:
        assert np.isinf(c.restore(tmp_path / "o", params)["w"]).all()


def test_a_weight_without_an_adapter_that_the_dtype_cannot_hold(tmp_path):
    params, lora, sites = made(jnp.float32, 1.0)
    params = params | {"w": params["w"] * 1e5}
    with pytest.raises(ValueError, match="'w' has values that float16 cannot hold: 2e"):
        jlora.export.save(tmp_path / "m", params, {"v": lora["v"]}, sites=sites, dtype=jnp.float16)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_only_two_numbers_of_a_leaf_travel(kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, P("data", "model"))
        w, update = (jax.device_put(jnp.ones((8, 16), d), split) for d in (jnp.float16, jnp.float32))
        text = _merge._added.lower(w, update, dtype=jnp.float16, ends=True).compile().as_text()
        assert sum(c.bytes for c in measure.collectives(text)) <= 2 * 4
        params = {"w": w}
        sites = jlora.sites(lambda p, x: x @ p["w"].astype(jnp.float32), params, jnp.ones((4, 8)))
        lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="w"))
        assert jlora.merge(params, lora)["w"].sharding == split
        with pytest.raises(ValueError, match=r"'w' has values that float16 cannot hold"):
            jlora.merge(params, jax.tree.map(lambda x: x + 1e4, lora))
