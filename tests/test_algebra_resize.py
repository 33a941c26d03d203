"""Adapters of another rank: the best approximation, and growing without a change."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algebra_case import NAMES, TOL, assert_all_can_train, at_once, close, dense, grads_of, statics, trained, truncated
from cases import BY_NAME

import jlora
from jlora import algebra


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
