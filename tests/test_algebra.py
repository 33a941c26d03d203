"""The algebra of adapters against dense NumPy in fp64: every law on adapters with several input, output, window and batch axes."""

import dataclasses
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.linalg import subspace_angles

import jlora
import jlora.peft
from jlora import algebra

NAMES = [
    "dense",
    "heads_in",
    "contracted_apart",
    "experts_left",
    "unit_axes",
    "conv",
    "lookup_in_layers",
    "scan_of_scan",
    "nnx",
]
TOL = 2e-5


def trained(name, rank=3, dtype=jnp.float32, seed=5, **rule):
    """An adapter of a row of the table, every factor random."""
    case = BY_NAME[name]
    how = {"alpha": 3.0, "dropout": 0.1, "targets": list(case.expect), "dtype": dtype} | rule
    rule = jlora.LoRA(rank=rank, **how)
    shapes = jax.eval_shape(
        lambda: jlora.init(jax.random.key(3), case.params, case.sites(), rule)
    )  # nothing to compile
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in leaves])


def at_once(fn, *args):
    """``fn(*args)`` as one program, in haste: operation by operation, each new shape would cost a compilation for each."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})(*args)


def dense(x):
    """The update as matrices ``(*batch, inputs, outputs)`` in fp64."""
    n = len(x.batch)
    a, b = (np.asarray(f, np.float64) for f in (x.a, x.b))
    return x.scale * a.reshape(*a.shape[:n], -1, x.rank) @ b.reshape(*b.shape[:n], x.rank, -1)


def truncated(d, rank):
    u, s, vh = np.linalg.svd(d, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :], (s[..., :rank] ** 2).sum() / (s**2).sum()


def close(got, expected, tol=TOL):
    assert np.shape(got) == np.shape(expected)
    error = np.linalg.norm(np.asarray(got, np.float64) - expected)
    assert error <= tol * np.linalg.norm(expected), error / np.linalg.norm(expected)


def statics(x):
    return {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if f.name not in ("a", "b")}


def mean_square(lora):
    return sum((d**2 + d).sum() for d in (x.delta() for x in lora.values()))


grads_of = jax.grad(mean_square)


def assert_all_can_train(*grads):
    """By their ``grads_of``: every column of ``a`` and row of ``b`` gets a gradient, or its partner does."""
    for path, g in (item for tree in grads for item in tree.items()):
        n = len(g.batch)
        a, b = np.asarray(g.a).reshape(*g.a.shape[:n], -1, g.rank), np.asarray(g.b)
        a, b = np.abs(a).max(-2), np.abs(b.reshape(*b.shape[:n], g.rank, -1)).max(-1)
        assert ((a > 0) | (b > 0)).all(), path


# --- measures --------------------------------------------------------------------------------------------------------


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


# --- resize ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_resize_is_the_best_approximation(name):
    both = {dtype: trained(name, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)}
    resized = at_once(lambda loras: [algebra.resize(lora, 2, report=True) for lora in loras], list(both.values()))
    for (dtype, lora), (smaller, kept) in zip(both.items(), resized, strict=True):
        for path, x in lora.items():
            y = smaller[path]
            assert statics(y) == statics(x)
            assert (y.rank, y.a.dtype, y.b.dtype, y.shape) == (2, dtype, dtype, x.shape)
            expected, share = truncated(dense(x), 2)
            close(dense(y), expected, TOL if dtype == jnp.float32 else 1e-2)
            assert float(kept[path]) == pytest.approx(share, rel=1e-4)
        assert list(smaller) == list(lora)
        assert all(x is lora[path] for path, x in algebra.resize(lora, 3).items())


def grow_and_shrink(lora):
    grown, kept = algebra.resize(lora, 5, report=True)
    return grown, kept, algebra.resize(grown, 3), grads_of(grown)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("unit_axes",)])
def test_a_grown_adapter_is_the_same_and_can_train(name):
    lora = trained(name)
    grown, kept, back, grads = at_once(grow_and_shrink, lora)
    for path, x in lora.items():
        y = grown[path]
        assert statics(y) == statics(x)
        np.testing.assert_array_equal(y.a[..., :3], x.a)
        np.testing.assert_allclose(dense(y), dense(x), rtol=0, atol=1e-12)
        assert kept[path] == 1.0
        n = len(x.batch)
        new = np.asarray(y.a).reshape(*y.a.shape[:n], -1, 5)[..., 3:]
        fan_in = 1 if x.use == "lookup" else new.shape[-2]
        assert (np.abs(new) <= 1 / np.sqrt(fan_in)).all()
        assert np.abs(new).max() > 0.5 / np.sqrt(fan_in)
    assert_all_can_train(grads)
    close(dense(back[path]), dense(lora[path]))


def test_growing_gives_the_same_columns_and_growing_twice_new_ones():
    lora = trained("dense")
    jax.tree.map(np.testing.assert_array_equal, algebra.resize(lora, 5), algebra.resize(lora, 5))
    twice = algebra.resize(algebra.resize(lora, 5), 7)["w"]
    assert np.linalg.matrix_rank(np.asarray(twice.a)) == 7


def of_lower_rank(lora, fresh):
    trees = (
        algebra.resize(algebra.combine([lora, lora]), 6),
        algebra.resize(fresh, 1),
        algebra.combine([fresh, fresh], method="svd"),
        algebra.combine([fresh, fresh], method="ties", density=0.5),
    )
    return trees, [grads_of(tree) for tree in trees]


@pytest.mark.parametrize("name", ["dense", "experts", "lookup_in_layers"])
def test_an_update_of_a_lower_rank_leaves_room_to_train(name):
    """Columns of zeros in both factors would never get a gradient."""
    lora, fresh = trained(name, rank=5), BY_NAME[name].fresh()
    trees, grads = at_once(of_lower_rank, lora, fresh)
    assert_all_can_train(*grads)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(trees))
    w = next(iter(lora))
    close(dense(trees[0][w]), 2 * dense(lora[w]))
    assert not np.asarray(trees[1][w].b).any()


@pytest.mark.parametrize("name", ["experts", "heads_in", "conv", "attention"])
@pytest.mark.parametrize("energy", [0.3, 0.95, 1.0])
def test_energy_is_kept_by_the_lowest_rank_that_does(name, energy):
    lora = trained(name, rank=5)
    resized, kept = algebra.resize(lora, energy=energy, report=True)
    for path, x in lora.items():
        s = np.linalg.svd(dense(x), compute_uv=False) ** 2
        share = np.cumsum(s.reshape(-1, s.shape[-1]).sum(0)) / s.sum()
        rank = resized[path].rank
        assert rank == int(np.argmax(share >= energy - 1e-7)) + 1
        assert float(kept[path]) == pytest.approx(share[rank - 1], rel=1e-5)


def test_energy_does_not_count_rounding_nor_an_update_of_zero():
    lora = trained("dense")
    doubled = algebra.combine([lora, lora])
    assert algebra.resize(doubled, energy=1.0)["w"].rank == 3
    fresh, kept = algebra.resize(BY_NAME["dense"].fresh(), energy=0.5, report=True)
    assert (fresh["w"].rank, float(kept["w"])) == (1, 1.0)
    tiny = {"w": dataclasses.replace(lora["w"], a=lora["w"].a * 1e-25)}
    smaller, kept = algebra.resize(tiny, 1, report=True)
    assert float(kept["w"]) == pytest.approx(truncated(dense(lora["w"]), 1)[1], rel=1e-4)
    assert smaller["w"].b.any()


def test_ranks_by_path():
    lora = trained("attention")
    resized = at_once(lambda lora: algebra.resize(lora, {"q": 1, "[qk]": 2, "v": 7}), lora)
    assert {p: x.rank for p, x in resized.items()} == {"q": 1, "k": 2, "v": 7, "o": 3}
    assert list(algebra.resize({p: lora[p] for p in "qko"}, 3)) == ["q", "k", "o"]  # in their order
    with pytest.raises(
        ValueError, match=r"No low-rank adapter matches 'kk'.\n  nearest: .*k.*\n  A pattern must match"
    ):
        algebra.resize(lora, {"kk": 1})
    with pytest.raises(ValueError, match=r"Earlier patterns took every match of 'q'.*\n  matches: q"):
        algebra.resize(lora, {"[qk]": 1, "q": 2})
    with pytest.raises(ValueError, match=r"pattern '\*q' of a rank is not a regular expression"):
        algebra.resize(lora, {"*q": 1})
    with pytest.raises(ValueError, match=r"pattern 3 of a rank is not a regular expression"):
        algebra.resize(lora, {3: 1})


@pytest.mark.parametrize("rank", [0, -1, 2.0, "2", True])
def test_a_rank_is_a_whole_number(rank):
    for wrong in (
        lambda: algebra.resize(trained("dense"), rank),
        lambda: algebra.resize(trained("dense"), {"w": rank}),
    ):
        with pytest.raises(ValueError, match=r"A rank must be a whole number from 1 up"):
            wrong()
    with pytest.raises(ValueError, match=r"A rank must be a whole number from 1 up"):
        algebra.combine([trained("dense")], method="svd", rank=rank)


def test_what_resize_refuses():
    lora = trained("dense")
    with pytest.raises(ValueError, match=r"Rank 12 is above 11, the smaller side of 'w' \(11, 13\)"):
        algebra.resize(lora, 12)
    for how in ({}, {"rank": 2, "energy": 0.5}):
        with pytest.raises(ValueError, match=r"takes either rank or energy"):
            algebra.resize(lora, **how)
    for energy in (0, 1.1, -1, True, "all", float("nan")):
        with pytest.raises(ValueError, match=r"energy must be a number above 0, up to 1"):
            algebra.resize(lora, energy=energy)
    with pytest.raises(ValueError, match=r"not known under jit"):
        jax.jit(lambda lora: algebra.resize(lora, energy=0.5))(lora)
    with pytest.raises(ValueError, match=r"adapter of 'w' is not finite"):
        algebra.resize(jax.tree.map(lambda x: x * jnp.nan, lora), energy=0.5)
    with pytest.raises(ValueError, match=r"trained outright: resize would have no effect"):
        algebra.resize({"w": jlora.FullWeight(jnp.ones((3, 4)), lora["w"].base)}, 2)
    with pytest.raises(ValueError, match=r"The adapter is empty"):
        algebra.resize({}, 2)
    with pytest.raises(TypeError, match=r"lora must be a dict"):
        algebra.spectrum([lora])
    with pytest.raises(ValueError, match=r"factor a of an adapter must have 2 axes"):
        algebra.norms(jax.tree.map(lambda x: jnp.stack([x, x]), lora))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Own(jlora.Adapter):
    kind: ClassVar[str] = "own"
    labels: ClassVar[dict[str, str]] = {"x": "x"}
    x: jax.Array


def test_a_kind_of_ones_own_is_named():
    for call in (lambda t: algebra.resize(t, 2), algebra.spectrum, algebra.norms, lambda t: algebra.combine([t])):
        with pytest.raises(TypeError, match=r"knows LowRank and FullWeight adapters.\n  got: Own for 'v'"):
            call({**trained("dense"), "v": Own(jnp.ones(3))})


# --- combine ---------------------------------------------------------------------------------------------------------


def sums(loras, weights):
    return (
        algebra.combine(loras, weights),
        algebra.combine(loras, weights, method="svd", rank=2),
        algebra.combine(loras, weights, method="svd"),
        algebra.combine([loras[0], loras[2]]),
    )


@pytest.mark.parametrize("name", NAMES)
def test_combining_is_the_weighted_sum(name):
    rank = 2 if name != "unit_axes" else 3
    loras = [trained(name), trained(name, rank=rank, alpha=5.0, rslora=True, seed=7), trained(name, seed=8)]
    weights = [0.5, -2.0, 1.0]
    joined, short, usual, same = at_once(sums, loras, weights)
    for path, first in loras[0].items():
        expected = sum(w * dense(lora[path]) for w, lora in zip(weights, loras, strict=True))
        close(dense(joined[path]), expected)
        assert joined[path].rank == 6 + rank
        assert joined[path].scale == 1.0
        assert statics(joined[path]) == {**statics(first), "scale": 1.0}
        close(dense(short[path]), truncated(expected, 2)[0])
        close(dense(usual[path]), truncated(expected, 3)[0])
        assert usual[path].rank == 3
    for path, first in loras[0].items():
        assert statics(same[path]) == statics(first)
        np.testing.assert_array_equal(same[path].a[..., :3], first.a)
        close(dense(same[path]), dense(first) + dense(loras[2][path]))


def test_the_combination_runs():
    """The result is an adapter like any other."""
    case = BY_NAME["heads_in"]
    one, two = trained("heads_in"), trained("heads_in", seed=9)
    joined = algebra.combine([one, two], [0.5, 0.5])
    merged = jax.tree.map(lambda w, x, y: w + 0.5 * x + 0.5 * y, case.params, jlora.delta(one), jlora.delta(two))
    np.testing.assert_allclose(
        jlora.wrap(case.fn)(case.params, joined, *case.args), case.fn(merged, *case.args), atol=1e-3
    )


def test_leaves_that_only_some_have_are_carried_over():
    lora = trained("attention")
    one, two = {p: lora[p] for p in "qk"}, {p: lora[p] for p in "kv"}
    for how in (
        {},
        {"method": "svd"},
        {"method": "ties", "density": 1.0},
        {"method": "dare", "density": 1.0, "key": jax.random.key(0)},
    ):
        joined = algebra.combine([one, two], [3.0, 1.0], **how)
        assert list(joined) == ["q", "k", "v"]
        close(dense(joined["q"]), 3 * dense(lora["q"]))
        close(dense(joined["v"]), dense(lora["v"]))


def test_bf16_factors_are_combined_in_fp32_and_the_widest_dtype_wins():
    one, two = trained("dense", dtype=jnp.bfloat16), trained("dense", seed=7)
    for how in ({}, {"method": "svd", "rank": 6}):
        joined, narrow = at_once(lambda *both: [algebra.combine(x, **how)["w"] for x in both], [one, two], [one, one])
        assert joined.a.dtype == joined.b.dtype == jnp.float32
        close(dense(joined), dense(one["w"]) + dense(two["w"]))
        assert narrow.a.dtype == narrow.b.dtype == jnp.bfloat16
        close(dense(narrow), 2 * dense(one["w"]), 1e-2)
    assert jax.eval_shape(algebra.compare, one, two)["w"].cosine.dtype == jnp.float32


def reference_ties(updates, density):
    kept = []
    for d in updates:
        count = max(1, round(density * d.size))
        kept.append(np.where(np.abs(d) >= np.sort(np.abs(d).ravel())[-count], d, 0.0))
    kept = np.stack(kept)
    agree = (np.sign(kept) == np.sign(kept.sum(0))[None]) & (kept != 0)
    return (kept * agree).sum(0) / np.maximum(agree.sum(0), 1)


@pytest.mark.parametrize("name", ["experts", "heads_in", "conv"])
@pytest.mark.parametrize("density", [0.2, 0.6, 1.0])
def test_ties_trims_elects_and_averages(name, density):
    loras = [trained(name), trained(name, rank=2, seed=7), trained(name, seed=8)]
    weights = [1.0, 0.5, -1.0]
    expected = reference_ties([w * dense(x["w"]) for w, x in zip(weights, loras, strict=True)], density)
    how = {"method": "ties", "density": density}
    most = min(expected.shape[-2:])
    got, whole = at_once(lambda x: [algebra.combine(x, weights, rank=rank, **how)["w"] for rank in (None, most)], loras)
    assert got.rank == 3
    close(dense(got), truncated(expected, 3)[0], 1e-4)
    close(dense(whole), expected, 1e-4)


def test_dare_keeps_a_share_and_the_mean():
    lora = trained("dense", rank=11)
    d = dense(lora["w"])
    draw = {
        seed: dense(algebra.combine([lora], method="dare", density=0.25, key=jax.random.key(seed))["w"])
        for seed in range(40)
    }
    share = np.mean([np.isclose(x, 4 * d, atol=1e-3).mean() for x in draw.values()])
    assert share == pytest.approx(0.25, abs=0.03)
    for x in draw.values():
        assert (np.isclose(x, 4 * d, atol=1e-3) | np.isclose(x, 0, atol=1e-3)).all()
    assert np.corrcoef(np.mean(list(draw.values()), axis=0).ravel(), d.ravel())[0, 1] > 0.9
    how = {"method": "dare", "density": 0.25, "key": jax.random.key(1), "rank": 11}
    np.testing.assert_array_equal(algebra.combine([lora], **how)["w"].a, algebra.combine([lora], **how)["w"].a)
    # Each adapter, and each leaf, drops entries of its own; weights act on what is left.
    twice = dense(algebra.combine([lora, lora], [1.0, -1.0], **how)["w"])
    assert 0.2 < (np.abs(twice) > 1e-3).mean() < 0.6


def of_mixed_kinds(one, two, params):
    combined = [algebra.combine([one, two], [2.0, -0.5], params=params, method=method) for method in ("concat", "svd")]
    joined = algebra.combine([one, two], method="ties", density=0.5, params=params)
    return combined, joined, algebra.norms(one, params), algebra.compare(one, two, params)


def test_leaves_trained_outright():
    case = BY_NAME["nnx"]
    rules = [jlora.Full(targets="norm/.*"), jlora.Full(targets="up/kernel"), jlora.LoRA(rank=2, targets="down/kernel")]
    one = jlora.init(jax.random.key(0), case.params, case.sites(), rules)
    one = jax.tree.map(lambda x: x + 0.5, one)
    two = {**jax.tree.map(lambda x: 2.0 * x, one), "up/kernel": trained("nnx", rank=2)["up/kernel"]}
    w = {p: np.asarray(x, np.float64) for p, x in zip(*jlora._paths.flatten(case.params)[:2], strict=True)}
    updates = at_once(lambda *loras: [jlora.delta(lora, case.params) for lora in loras], one, two)
    combined, joined, sizes, found = at_once(of_mixed_kinds, one, two, case.params)
    for joint in combined:
        for path in ("norm/scale", "norm/bias", "up/kernel"):
            assert isinstance(joint[path], jlora.FullWeight)
            close(
                joint[path].value,
                w[path] + sum(c * np.asarray(u[path]) for c, u in zip((2.0, -0.5), updates, strict=True)),
            )
    path = "up/kernel"
    close(joined[path].value, w[path] + reference_ties([np.asarray(u[path], np.float64) for u in updates], 0.5))
    assert algebra.resize(one, 1)["norm/bias"] is one["norm/bias"]
    assert list(algebra.spectrum(one)) == ["down/kernel"]
    for path in one:
        close(sizes[path], np.linalg.norm(updates[0][path]))
    for path in one:
        x, y = (np.asarray(u[path], np.float64) for u in updates)
        close(found[path].cosine, (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
        close(found[path].difference, np.linalg.norm(x - y) / np.linalg.norm(x))
        assert (found[path].input_angles is None) == (path != "down/kernel")
    for wrong in (lambda: algebra.combine([one, two]), lambda: algebra.norms(one), lambda: algebra.compare(one, two)):
        with pytest.raises(ValueError, match=r"'norm/\w+' is trained outright.*\n  Pass the base"):
            wrong()
    with pytest.raises(ValueError, match=r"belongs to another base: there is no leaf"):
        algebra.norms(one, {"w": jnp.ones(3)})


@pytest.mark.parametrize("base", [1e8, -np.inf])
def test_leaves_trained_outright_are_summed_exactly(base):
    """Where their weights sum to one nothing of the base is in the sum, however large it is and whether it is there or not."""
    params = {"w": jnp.ones((3, 4)), "b": jnp.full(4, base, jnp.float32)}
    found = jlora.sites(lambda p, x: x @ p["w"] + p["b"][None], params, jnp.ones((2, 3)))
    lora = jlora.init(jax.random.key(0), params, found, jlora.Full(targets="b"))
    one, two = (jax.tree.map(lambda x, v=v: jnp.full_like(x, v), lora) for v in (1.0, 0.25))
    for weights, expected in (((1.0,), 1.0), ((2.0, -1.0), 1.75), ((0.5, 0.5), 0.625)):
        loras = [one, two][: len(weights)]
        combined = algebra.combine(loras, weights=list(weights), params=params)
        np.testing.assert_array_equal(combined["b"].value, expected)
        traced = jax.jit(lambda ws, loras=loras: algebra.combine(loras, weights=list(ws), params=params))
        np.testing.assert_array_equal(traced(weights)["b"].value, expected)


def test_what_combine_refuses():
    lora, key = trained("dense"), jax.random.key(0)
    wrong = {
        r"method must be 'concat', 'svd', 'ties' or 'dare'.\n  got: 'sum'": {"method": "sum"},
        r"'concat' has no use for rank.\n  .*the method 'svd', 'ties' or 'dare'\.": {"rank": 2},
        r"'svd' has no use for density.\n  .*the method 'ties' or 'dare'\.": {"method": "svd", "density": 0.5},
        r"'ties' has no use for key.\n  .*the method 'dare'\.": {"method": "ties", "density": 0.5, "key": key},
        r"'ties' needs a density": {"method": "ties"},
        r"'dare' needs a density": {"method": "dare", "key": key},
        r"Rank 12 is above 11, the smaller side of 'w'": {"method": "ties", "density": 0.5, "rank": 12},
        r"Rank 13 is above 11, the smaller side of 'w'": {"method": "svd", "rank": 13},
        r"one weight for each adapter.\n  got: 1 weights, 2 adapters": {"weights": [1.0]},
        r"A weight must be one finite number.\n  got: nan": {"weights": [1.0, float("nan")]},
        r"A weight must be one finite number.\n  got: 'a'": {"weights": [1.0, "a"]},
        r"A weight must be one finite number.\n  got: Array": {"weights": [1.0, jnp.ones(2)]},
    }
    for message, how in wrong.items():
        with pytest.raises(ValueError, match=message):
            algebra.combine([lora, lora], **how)
    for density in (0, 1.5, -0.1, True, "most"):
        with pytest.raises(ValueError, match=r"density must be a number above 0, up to 1"):
            algebra.combine([lora, lora], method="ties", density=density)
    with pytest.raises(TypeError, match=r"'dare' needs key="):
        algebra.combine([lora, lora], method="dare", density=0.5)
    with pytest.raises(TypeError, match=r"loras must be a sequence of adapters.\n  got: dict"):
        algebra.combine(lora)
    with pytest.raises(ValueError, match=r"There is no adapter to combine"):
        algebra.combine([])
    with pytest.raises(ValueError, match=r"A weight must be one finite number"):
        jax.jit(algebra.combine)([lora, lora], jnp.ones((2, 2)))
    imaginary = jax.tree.map(lambda x: x.astype(jnp.complex64), lora)
    with pytest.raises(ValueError, match=r"'ties' elects a sign.*complex"):
        algebra.combine([imaginary], method="ties", density=0.5)


def test_adapters_of_different_bases_or_axes_are_refused():
    lora = trained("dense")
    other = {"w": dataclasses.replace(lora["w"], base=trained("bias")["w"].base)}
    turned = {"w": dataclasses.replace(trained("kernel_left")["w"], base=lora["w"].base)}
    shorter = {"w": dataclasses.replace(lora["w"], b=lora["w"].b[:, :7])}
    for call in (algebra.combine, lambda pair: algebra.compare(*pair)):
        with pytest.raises(ValueError, match=r"belong to different bases: 'b' \(13,\) float32 is not part of"):
            call([lora, other])
        with pytest.raises(
            ValueError, match=r"split 'w' differently: inputs \(0,\), .*\n  Make both with the sites of one"
        ):
            call([lora, turned])
        with pytest.raises(ValueError, match=r"for different shapes of 'w': \(11, 13\) and \(11, 7\)"):
            call([lora, shorter])
    square = trained("residual")["w"]
    swapped = {"w": dataclasses.replace(square, inputs=(1,), outputs=(0,))}
    with pytest.raises(
        ValueError, match=r"split 'w' differently: inputs \(0,\), outputs \(1,\), batch \(\), and inputs \(1,\)"
    ):
        algebra.combine([{"w": square}, swapped])


# --- compare ---------------------------------------------------------------------------------------------------------


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


# --- extract ---------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"1 leaves differ that no rule covers: bias\.\n  Add a rule.*rest='ignore'"):
        algebra.extract(PARAMS, tuned, SITES, UP)
    assert list(algebra.extract(PARAMS, tuned, SITES, UP, rest="ignore")) == ["up"]
    for path, value in (("step", jnp.int32(3)), ("key", jax.random.key(1))):
        with pytest.raises(ValueError, match=f"no rule covers: {path}"):
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


# --- several devices, and numbers that are not real ------------------------------------------------------------------


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


# --- transforms and cost ---------------------------------------------------------------------------------------------


def measure(lora, weights):
    joined = algebra.combine([lora, lora], weights)
    small = algebra.combine([lora, lora], weights, method="svd")
    resized = algebra.resize(lora, 1, report=True), algebra.resize(joined, 1), algebra.resize(lora, 3)
    return joined, small, resized, algebra.spectrum(lora), algebra.norms(lora), algebra.compare(lora, joined)


def test_under_jit():
    lora, weights = trained("experts", rank=2), jnp.array([0.5, 2.0])
    got, expected = at_once(measure, lora, weights), measure(lora, weights)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    adapters = [jax.tree.leaves(x, is_leaf=lambda y: isinstance(y, jlora.LowRank)) for x in (got, expected)]
    for x, y in zip(*adapters, strict=True):
        if isinstance(x, jlora.LowRank):
            close(dense(x), dense(y))
        else:
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3)  # angles of a space with itself


@pytest.mark.parametrize("name", ["dense", "experts", "heads_in", "conv"])
def test_no_dense_update_is_formed(name):
    """No value as large as the leaf, in the programs of everything that promises it."""
    lora = trained(name, rank=1)
    text = str(jax.make_jaxpr(measure)(lora, jnp.array([0.5, 2.0])))
    sizes = [int(np.prod([int(n) for n in s.split(",")])) for s in re.findall(r"f32\[([\d,]+)\]", text)]
    assert sizes
    assert max(sizes) < np.prod(lora["w"].shape)


def whole_and_low(seed):
    rules = [jlora.Full(targets="v"), jlora.LoRA(rank=2, targets="w")]
    lora = jlora.init(jax.random.key(seed), TWO, TWO_SITES, rules)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(seed), x.shape), lora)


TWO = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 5))}
TWO_SITES = jlora.sites(lambda p, x: x @ p["w"] @ p["v"], TWO, jnp.ones((2, 3)))


def test_whole_leaves_whose_weights_sum_to_one_need_no_base():
    loras = [whole_and_low(i) for i in range(3)]
    weights = [0.5, 0.7, -0.2]
    for method in ({}, {"method": "svd", "rank": 2}):
        got = algebra.combine(loras, weights, **method)["v"]
        np.testing.assert_allclose(
            got.value, algebra.combine(loras, weights, params=TWO, **method)["v"].value, atol=1e-6
        )
        assert got.use == "linear"
    mixed = [loras[0], jlora.init(jax.random.key(0), TWO, TWO_SITES, jlora.LoRA(rank=1, targets="v"))]
    mixed[1] = jax.tree.map(lambda x: x + 0.1, mixed[1])
    want = loras[0]["v"].value + 2 * mixed[1]["v"].delta()
    np.testing.assert_allclose(algebra.combine(mixed, [1, 2])["v"].value, want, atol=1e-6)
    for bad in ({"weights": [0.5, 0.7, 0.2]}, {"method": "ties", "density": 0.5, "weights": [1, 0, 0]}):
        with pytest.raises(ValueError, match=r"'v' is trained outright.*\n  Pass the base"):
            algebra.combine(loras, **bad)
    with pytest.raises(ValueError, match="'v' is trained outright"):
        jax.jit(lambda w: algebra.combine(loras[:2], [w, 1 - w]))(0.5)
    jax.jit(lambda w: algebra.combine(loras[:2], [w, 1 - w], params=TWO))(0.5)


def test_adapters_that_know_a_part_of_their_base(tmp_path):
    """As read from PEFT's files: they are of one base if they agree where they meet."""
    both = whole_and_low(0)
    low = jlora.init(jax.random.key(1), TWO, TWO_SITES, jlora.LoRA(rank=2, targets="w"))
    one = jlora.init(jax.random.key(1), TWO, TWO_SITES, jlora.LoRA(rank=2, targets="v"))
    for name, lora in (("both", both), ("low", low), ("one", one)):
        jlora.peft.save(tmp_path / name, lora, names={"(w|v)": r"\1.weight"})
    (both, _), (low, _), (one, _) = (jlora.peft.read(tmp_path / name) for name in ("both", "low", "one"))
    for first, second in ((low, one), (one, low)):
        joined = algebra.combine([first, second])
        assert len({x.base for x in joined.values()}) == 1
        jlora.peft.save(tmp_path / "joined", joined, names=lambda path: path, overwrite=True)
        again, _ = jlora.peft.read(tmp_path / "joined")
        for path, x in {**low, **one}.items():
            np.testing.assert_allclose(again[path].delta(), x.delta(), atol=1e-6)
    assert set(algebra.compare(low, one)) == {"w.weight", "v.weight"}
    jlora.save(tmp_path / "kept", low)  # which is remembered
    assert set(algebra.combine([jlora.load(tmp_path / "kept"), one])) == {"w.weight", "v.weight"}
    with pytest.raises(ValueError, match=r"'v.weight' has factors in one adapter and is trained outright in another"):
        algebra.combine([both, one])
    fingerprint = type(low["w.weight"].base)
    changed = fingerprint([("w.weight", (5, 4), "float32")], partial=True)
    with pytest.raises(ValueError, match=r"different bases: 'w.weight' is \(5, 4\) float32, not \(4, 3\) float32"):
        algebra.combine([low, {"v.weight": dataclasses.replace(one["v.weight"], base=changed)}])
