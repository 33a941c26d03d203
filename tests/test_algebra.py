"""The algebra of adapters against dense NumPy in fp64: every law on adapters with several input, output, window and batch axes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algebra_case import NAMES, at_once, close, dense, trained, truncated
from cases import BY_NAME
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.linalg import subspace_angles

import jlora
from jlora import algebra


@pytest.mark.parametrize("name", NAMES)
def test_spectrum_and_norms_are_those_of_the_dense_update(name):
    lora = trained(name)
    values, sizes = at_once(lambda lora: (algebra.spectrum(lora), algebra.norms(lora)), lora)
    for path, x in lora.items():
        d = dense(x)
        expected = np.linalg.svd(d, compute_uv=False)
        batch = tuple(x.shape[i] for i in x.batch)
        assert values[path].shape == (*batch, min(3, *d.shape[-2:]))
        close(values[path], expected[..., :3])
        close(sizes[path], np.linalg.norm(d, axis=(-2, -1)))
        assert sizes[path].shape == batch


def test_effective_rank():
    values = jnp.array([[3.0, 3.0, 3.0, 3.0], [5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [2.0, 1.0, 1.0, 0.0]])
    p = np.array([0.5, 0.25, 0.25])
    found, got = at_once(
        lambda values, lora: (algebra.effective_rank(values), algebra.effective_rank(algebra.spectrum(lora)["w"])),
        values,
        trained("experts"),
    )
    np.testing.assert_allclose(found, [4.0, 1.0, 0.0, np.exp(-(p * np.log(p)).sum())], rtol=1e-6)
    assert got.shape == (17,)
    assert ((got > 1) & (got <= 3)).all()


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2), st.integers(0, 2**31))
def test_any_shape_and_any_rank_even_above_the_smaller_side(m, k, rank, layers, seed):
    rng = np.random.default_rng(seed)
    batch = (layers,) if layers else ()
    a, b = (jnp.asarray(rng.standard_normal((*batch, *s)), jnp.float32) for s in ((m, rank), (rank, k)))
    n = len(batch)
    base = jlora.sites(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2))}, jnp.ones((2, 2))).base
    lora = {"w": jlora.LowRank(a, b, (n,), (n + 1,), tuple(range(n)), 0.5, 0.0, base)}
    expected = np.linalg.svd(dense(lora["w"]), compute_uv=False)
    ranks = sorted({1, min(m, k)})
    got, every = at_once(lambda x: (algebra.spectrum(x)["w"], [algebra.resize(x, new)["w"] for new in ranks]), lora)
    assert got.shape == (*batch, min(m, k, rank))
    np.testing.assert_allclose(got, expected[..., : got.shape[-1]], atol=1e-5 * expected.max())
    for new, resized in zip(ranks, every, strict=True):
        assert resized.rank == new
        np.testing.assert_allclose(dense(resized), truncated(dense(lora["w"]), new)[0], atol=2e-5 * expected.max())


@pytest.mark.parametrize("name", NAMES)
def test_compare_is_what_the_dense_updates_say(name):
    one, two = trained(name), trained(name, rank=2 if name != "unit_axes" else 3, seed=7)
    found = at_once(algebra.compare, one, two)
    for path, got in found.items():
        x, y = dense(one[path]), dense(two[path])
        sizes = [np.linalg.norm(d, axis=(-2, -1)) for d in (x, y)]
        close(got.norm_one, sizes[0])
        close(got.norm_two, sizes[1])
        np.testing.assert_allclose(got.cosine, (x * y).sum((-2, -1)) / sizes[0] / sizes[1], atol=1e-5)
        close(got.difference, np.linalg.norm(x - y, axis=(-2, -1)) / sizes[0])
        for index in np.ndindex(x.shape[:-2]):
            for angles, side in ((got.input_angles, lambda d: d), (got.output_angles, np.transpose)):
                spaces = [np.linalg.svd(side(d[index]))[0][:, : np.linalg.matrix_rank(d[index])] for d in (x, y)]
                expected = np.sort(subspace_angles(*spaces))
                np.testing.assert_allclose(angles[index][: len(expected)], expected, atol=2e-5)


def test_small_angles_and_small_differences_are_told():
    """A cosine in fp32 cannot tell an angle of 1e-4 from none."""
    lora = trained("dense")
    a = lora["w"].a
    q = jnp.linalg.qr(jnp.concatenate([a, trained("dense", seed=9)["w"].a], 1))[0]
    one = {"w": dataclasses.replace(lora["w"], a=q[:, :3])}
    two = {"w": dataclasses.replace(lora["w"], a=q[:, :3] + 1e-4 * q[:, 3:])}
    tiny = jax.tree.map(lambda x: x * 1e-9, one)
    pairs = [(one, two), (one, one), (tiny, tiny)]
    found, itself, small = at_once(lambda pairs: [algebra.compare(*pair)["w"] for pair in pairs], pairs)
    np.testing.assert_allclose(found.input_angles, 1e-4, rtol=1e-2)
    assert float(found.difference) == pytest.approx(1e-4, rel=1e-2)
    np.testing.assert_allclose(found.output_angles, 0.0, atol=2e-6)
    assert float(itself.difference) < 1e-6
    assert float(itself.cosine) == pytest.approx(1.0)
    assert float(small.cosine) == pytest.approx(1.0)


def test_updates_of_zero_give_numbers():
    fresh, lora = BY_NAME["experts"].fresh(), trained("experts", rank=2)
    np.testing.assert_array_equal(algebra.spectrum(fresh)["w"], np.zeros((17, 2)))
    np.testing.assert_array_equal(algebra.norms(fresh)["w"], np.zeros(17))
    pairs = {0.0: (fresh, fresh), 1.0: (lora, fresh), np.inf: (fresh, lora)}
    compared = at_once(lambda pairs: [algebra.compare(*pair)["w"] for pair in pairs], list(pairs.values()))
    for difference, found in zip(pairs, compared, strict=True):
        np.testing.assert_allclose(found.difference, np.full(17, difference), rtol=1e-5)
        np.testing.assert_array_equal(found.cosine, np.zeros(17))
        for angles in (found.input_angles, found.output_angles):
            np.testing.assert_array_equal(angles, np.full((17, 2), np.nan))


@pytest.mark.parametrize("name", ["dense", "experts", "conv"])
def test_padding_has_no_directions(name):
    """Zeros that bring factors to a higher rank change no angle, of slices of different ranks neither."""
    lora = trained(name, rank=2)
    x = lora["w"]
    if x.batch:  # the first slice has one direction
        x = dataclasses.replace(x, b=x.b.at[0, 1].set(0.0))
    more_a, more_b = (
        [(0, 2 if d == axis % f.ndim else 0) for d in range(f.ndim)] for f, axis in ((x.a, -1), (x.b, len(x.batch)))
    )
    padded = {"w": dataclasses.replace(x, a=jnp.pad(x.a, more_a), b=jnp.pad(x.b, more_b))}
    found, plain = at_once(lambda p, x: (algebra.compare(p, p)["w"], algebra.compare(x, x)["w"]), padded, {"w": x})
    for got, expected in ((found.input_angles, plain.input_angles), (found.output_angles, plain.output_angles)):
        assert got.shape[-1] == 4
        there = np.isfinite(expected)
        assert there.sum() == 2 * there[..., 0].size - bool(x.batch)
        np.testing.assert_array_equal(np.isfinite(got)[..., :2], there)
        assert np.isnan(got[..., 2:]).all()
        np.testing.assert_allclose(got[np.isfinite(got)], 0.0, atol=1e-3)


def test_leaves_of_one_adapter_only_are_reported():
    lora = trained("attention")
    found = algebra.compare({p: lora[p] for p in "qk"}, {p: lora[p] for p in "kv"})
    assert list(found) == ["q", "k", "v"]
    assert found["q"].norm_two is None
    assert found["v"].norm_one is None
    assert found["q"].cosine is found["v"].input_angles is None
    close(found["v"].norm_two, np.linalg.norm(dense(lora["v"])))


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_adapters_of_split_weights(mode):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(mode, mode))
    split = NamedSharding(mesh, P("x", "y"))
    params = {"w": jax.device_put(jnp.ones((6, 8)), split)}
    rng = np.random.default_rng(0)
    update = jnp.asarray(rng.standard_normal((6, 8)), jnp.float32)
    tuned = {"w": params["w"] + jax.device_put(update, split)}
    with jax.set_mesh(mesh):
        sites = jlora.sites(
            lambda p, x: jnp.dot(x, p["w"], out_sharding=P() if mode == AxisType.Explicit else None),
            params,
            jnp.ones((2, 6)),
        )
        lora = algebra.extract(params, tuned, sites, jlora.LoRA(rank=3, targets="w"))
        assert lora["w"].a.sharding.spec == P("x", None)
        assert lora["w"].b.sharding.spec == P(None, "y")
        expected = truncated(np.asarray(update, np.float64), 3)[0]
        close(dense(lora["w"]), expected, 1e-4)
        for tree, want in (
            (algebra.resize(lora, 2), truncated(expected, 2)[0]),
            (algebra.resize(lora, 5), expected),
            (algebra.combine([lora, lora]), 2 * expected),
            (algebra.combine([lora, lora], method="svd"), 2 * expected),
            (algebra.combine([lora, lora], method="ties", density=1.0), expected),
        ):
            close(dense(tree["w"]), want, 1e-4)
            assert tree["w"].a.sharding.is_equivalent_to(NamedSharding(mesh, P("x", None)), 2)
            assert tree["w"].b.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "y")), 2)
        small, sizes, found = at_once(
            lambda lora: (algebra.resize(lora, 2), algebra.norms(lora), algebra.compare(lora, lora)), lora
        )
        close(dense(small["w"]), truncated(expected, 2)[0], 1e-4)
        close(sizes["w"], np.linalg.norm(expected), 1e-4)
        assert float(found["w"].cosine) == pytest.approx(1.0, rel=1e-5)


def test_complex_factors():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape) + 1j * rng.standard_normal(shape), jnp.complex64)

    base = trained("dense")["w"].base
    one, two = ({"w": jlora.LowRank(draw(5, 3), draw(3, 7), (0,), (1,), (), 0.5, 0.0, base)} for _ in range(2))
    d, e = (0.5 * np.asarray(x["w"].a, np.complex128) @ np.asarray(x["w"].b, np.complex128) for x in (one, two))
    np.testing.assert_allclose(algebra.spectrum(one)["w"], np.linalg.svd(d, compute_uv=False)[:3], rtol=1e-5)
    u, s, vh = np.linalg.svd(d)
    smaller = algebra.resize(one, 2)["w"]
    np.testing.assert_allclose(smaller.delta(), (u[:, :2] * s[None, :2]) @ vh[:2], atol=1e-5)
    np.testing.assert_allclose(algebra.combine([one, two], [1.0, -1.0])["w"].delta(), d - e, atol=1e-5)
    found = algebra.compare(one, two)["w"]
    cosine = np.vdot(d, e).real / np.linalg.norm(d) / np.linalg.norm(e)
    assert float(found.cosine) == pytest.approx(cosine, abs=1e-5)
    np.testing.assert_allclose(found.input_angles, np.sort(subspace_angles(d[:, :3], e[:, :3])), atol=1e-5)
