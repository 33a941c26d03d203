"""Sums of adapters: weighted, TIES, DARE, of leaves trained outright, under jit, and what they cost."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algebra_case import NAMES, at_once, close, dense, statics, trained, truncated
from cases import BY_NAME

import jlora
import jlora.peft
from jlora import algebra


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
        r"one weight for each adapter.\n  got: 1 weight, 2 adapters": {"weights": [1.0]},
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
