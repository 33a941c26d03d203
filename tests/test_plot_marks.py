"""Pictures of what has no value: a base of zeros, an update that is not there yet, and angles that are no number."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME
from test_plot import drawn, heat, layers, made, marks, notes, rows, tree

import jlora
from jlora import algebra, plot


def hatched(ax):
    """The middles of the hatched cells of a heat map."""
    found = [c for c in ax.collections if c.get_hatch()]
    return sorted(tuple(p.vertices[:4].mean(0).tolist()) for c in found for p in c.get_paths())


def test_a_trained_bias_that_was_zero_is_not_broken():
    """Biases start at zero in Flax: nothing is relative to them, and nothing is wrong with them."""
    params = {f"Dense_{i}": {"kernel": jnp.ones((5, 5)), "bias": jnp.zeros(5)} for i in range(3)}
    params["Dense_1"]["bias"] += 1.0

    def model(params, x):
        for layer in params.values():
            x = x @ layer["kernel"] + layer["bias"][None]
        return x

    rules = jlora.LoRA(rank=2, targets=".*/kernel"), jlora.Full(targets=".*/bias")
    sites = jlora.sites(model, params, jnp.ones((2, 5)))
    lora = jax.tree.map(lambda x: x + 0.5, jlora.init(jax.random.key(0), params, sites, rules))
    ax = drawn(plot.norms(lora, params)).axes[0]
    assert rows(ax) == ["Dense/bias", "Dense/kernel"]
    assert marks(ax) == {"the base is zero": 2}
    assert hatched(ax) == [(0.5, 0.5), (2.5, 0.5)]
    (patch,) = ax.get_legend().get_patches()
    assert patch.get_hatch()
    assert heat(ax).count() == 4
    assert heat(ax)[0, 1] == pytest.approx(0.5)
    ax = drawn(plot.norms(lora, params, relative=False)).axes[0]
    assert (marks(ax), hatched(ax), heat(ax).count()) == ({}, [], 6)


def test_hatched_cells_beside_the_column_without_a_layer():
    shapes = layers(2, "q") | {"stack/w": (3, 5, 7), "head/w": (5, 7)}
    lora, params = made(shapes), tree(shapes)
    params["stack/w"][1] *= 0
    params["head/w"] *= 0
    ax = drawn(plot.norms(lora, params)).axes[0]
    assert [name.split("/")[-2:] for name in rows(ax)] == [["q", "kernel"], ["stack", "w"], ["head", "w"]]
    assert marks(ax) == {"the base is zero": 2}
    assert hatched(ax) == [(0.5, 2.5), (3.0, 1.5)]
    cells = heat(plot.norms(lora).axes[0])
    assert not cells.data[cells.mask].any()  # Matplotlib computes with what is behind the mask


def test_a_fresh_adapter():
    case = BY_NAME["attention"]
    lora, trained = case.fresh(), case.trained()
    assert not heat(drawn(plot.norms(lora, case.params)).axes[0]).any()
    with pytest.raises(
        ValueError, match=r"No low-rank leaf has an update yet.*\n  got: .*\bq, k.*\n  Train the adapter"
    ):
        plot.spectra(lora)
    with pytest.raises(
        ValueError, match=r"Neither adapter has an update yet.*\n  got: .*\bq, k.*\n  Train at least one"
    ):
        plot.angles(lora, lora)
    for pair, name in (((lora, trained), "one"), ((trained, lora), "two")):
        reads, *_, every = drawn(plot.angles(*pair)).axes[:4]
        assert not heat(reads).any()
        assert (marks(reads), notes(every), len(every.lines)) == ({}, [f"'{name}' has no update yet"], 0)


def still(x):
    """A leaf as a fresh adapter has it."""
    return dataclasses.replace(x, b=0.0 * x.b)


def test_leaves_without_an_update_beside_others():
    lora = {path: still(x) if "/k/" in path else x for path, x in made(layers(3)).items()}
    lora["model/layers/1/attn/q/kernel"] = still(lora["model/layers/1/attn/q/kernel"])
    panels = {ax.get_title("left"): ax for ax in drawn(plot.spectra(lora)).axes[:3]}
    assert {name: notes(ax) for name, ax in panels.items()} == {"q": [], "k": ["no update yet"], "v": []}
    assert "0.0" in panels["k"].get_title("right")
    queries = {path: still(x) if "/q/" not in path else x for path, x in made(layers(3)).items()}
    values = {path: still(x) if "/v/" not in path else x for path, x in made(layers(3), seed=5).items()}
    every = drawn(plot.angles(queries, values)).axes[3]
    assert notes(every) == ["no low-rank leaf has\nan update in both"]
    assert notes(drawn(plot.angles(queries, lora)).axes[3]) == []


def test_a_panel_without_lines_says_whether_it_is_for_the_base():
    shapes = layers(3)
    params = {path: 0 * w if "/k/" in path else w for path, w in tree(shapes).items()}
    lora = made(shapes)
    assert [notes(ax) for ax in drawn(plot.spectra(lora, params)).axes[:3]] == [[], ["the base is zero"], []]
    path = "model/layers/1/attn/k/kernel"
    lora[path] = still(lora[path])
    assert notes(drawn(plot.spectra(lora, params)).axes[1]) == ["no update yet\nthe base is zero"]


def test_angles_that_are_no_number_leave_the_others():
    """Beyond the directions that both updates have, and for a leaf that one of them has not trained, ``compare`` has NaN."""
    one, two = made(layers(3), rank=4), algebra.resize(made(layers(3), rank=2, seed=4), 4)
    path = "model/layers/0/attn/q/kernel"
    two[path] = still(two[path])
    found = algebra.compare(one, two)
    assert np.isnan(found[path].input_angles).all()
    reads, _, cosine, every = drawn(plot.angles(one, two)).axes[:4]
    assert (marks(reads), marks(cosine), heat(reads).count()) == ({}, {}, 9)
    assert heat(reads)[0, 0] == 0.0
    angles = np.stack([x.input_angles for p, x in found.items() if p != path])
    assert np.isnan(angles).any(axis=0).tolist() == [False, False, True, True]
    other = found["model/layers/1/attn/k/kernel"].input_angles[:2]
    assert heat(reads)[1, 1] == pytest.approx(float((np.cos(other) ** 2).mean()), rel=1e-5)
    assert every.lines[0].get_xdata().tolist() == [1, 2]
    np.testing.assert_allclose(every.lines[0].get_ydata(), np.median(np.cos(angles[:, :2]), axis=0), rtol=1e-5)
