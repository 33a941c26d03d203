"""Pictures: what is drawn are the numbers of ``jlora.algebra``, each in its place; looks are for eyes."""

import dataclasses
import io
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME
from matplotlib import rc_context
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import jlora
from jlora import algebra, plot
from jlora._adapters import Fingerprint
from jlora._plot_heat import _number


def made(shapes, rank=3, skip=(), batch=None, seed=0):
    """A random adapter of a base with these paths and shapes, without the paths in ``skip``; the last two axes are the weight's."""
    base = Fingerprint((path, shape, "float32") for path, shape in shapes.items())
    rng, lora = np.random.default_rng(seed), {}
    for path, shape in shapes.items():
        if path in skip:
            continue
        n = len(shape) - 2
        a, b = rng.standard_normal((*shape[:-1], rank)), rng.standard_normal((*shape[:n], rank, shape[-1]))
        factors = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
        lora[path] = jlora.LowRank(*factors, (n,), (n + 1,), tuple(range(n)), 0.5, 0.0, base)
    return lora


def layers(count, kinds="qkv", form="model/layers/{}/attn/{}/kernel", shape=(5, 7)):
    return {form.format(i, kind): shape for i in range(count) for kind in kinds}


def tree(shapes, seed=1):
    """Parameters of these shapes, as a flat dict: paths are its keys."""
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}


def heat(ax):
    """The values of a heat map, masked where there is none."""
    mesh = next(c for c in ax.collections if isinstance(c, QuadMesh))
    return mesh.get_array()


def marks(ax):
    """How many cells each entry of the legend of a heat map stands for."""
    extra = [c for c in ax.collections if isinstance(c, QuadMesh)][1:]
    names = [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else []
    return {name: int(mesh.get_array().count()) for name, mesh in zip(names, extra, strict=True)}


def rows(ax):
    return [t.get_text() for t in ax.get_yticklabels()]


def columns(ax):
    return [t.get_text() for t in ax.get_xticklabels()]


def drawn(fig):
    """Draws all of it; a warning would raise."""
    assert isinstance(fig, Figure)
    fig.savefig(io.BytesIO(), format="png", dpi=40)
    return fig


# --- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model/layers/{}/attn/{}/kernel", "p/blocks_{}/{}/w", "Block{}/{}", "h.{}.{}.weight"])
def test_a_cell_is_the_norm_of_a_leaf(form):
    shapes = layers(12, form=form)
    lora = made(dict(reversed(shapes.items())))
    ax = drawn(plot.norms(lora)).axes[0]
    norms = algebra.norms(lora)
    expected = [[norms[form.format(i, kind)] for i in range(12)] for kind in "vkq"]
    np.testing.assert_allclose(heat(ax).filled(np.nan), expected, rtol=1e-6)
    assert rows(ax) == ["v", "k", "q"]
    assert columns(ax)[0] == "0"
    assert [int(t) + 0.5 for t in columns(ax)] == ax.get_xticks().tolist()
    assert ax.get_xlabel() == "layer"
    assert marks(ax) == {}


def test_relative_to_the_base():
    shapes = layers(3) | {"stack/w": (4, 5, 7)}
    lora, params = made(shapes), tree(shapes)
    fig = drawn(plot.norms(lora, params))
    values = heat(fig.axes[0])
    norms = algebra.norms(lora)
    size = np.linalg.norm(params["stack/w"], axis=(1, 2))
    np.testing.assert_allclose(values[-1, :4], norms["stack/w"] / size, rtol=1e-5)
    path = "model/layers/1/attn/k/kernel"
    assert values[1, 1] == pytest.approx(float(norms[path]) / np.linalg.norm(params[path]), rel=1e-5)
    assert values.count() == 9 + 4
    bar = fig.axes[1]
    assert bar.get_ylabel().count("Vert_F") == 2
    assert all(t.get_text().endswith("%") for t in bar.yaxis.get_ticklabels())
    plain = plot.norms(lora, params, relative=False)
    assert heat(plain.axes[0])[1, 1] == pytest.approx(float(norms[path]), rel=1e-6)
    assert "units of the weights" in plain.axes[1].get_ylabel()


def test_what_is_not_adapted_is_not_zero():
    shapes = layers(6) | {"model/layers/2/router/w": (5, 7)}
    skip = [f"model/layers/{i}/attn/{k}/kernel" for i, k in ((1, "q"), (5, "q"), (5, "k"), (5, "v"))]
    lora = made(shapes, skip=skip)
    zero = "model/layers/0/attn/q/kernel"
    lora[zero] = jax.tree.map(jnp.zeros_like, lora[zero])
    ax = drawn(plot.norms(lora)).axes[0]
    values = heat(ax)
    assert values.shape == (4, 6)
    assert values[0, 0] == 0.0
    assert values.mask[0].tolist() == [False, True, False, False, False, True]
    assert values.count() == len(lora)
    assert marks(ax) == {"not adapted": 4}  # the router is in layer 2 only: the rest of its row is blank
    assert columns(ax)[-1] == "5"


def test_leaves_without_a_layer_have_a_column_of_their_own():
    lora = made(layers(3) | {"lm_head/kernel": (5, 7), "model/embed/embedding": (11, 5)})
    ax = drawn(plot.norms(lora)).axes[0]
    values = heat(ax)
    assert values.shape == (5, 1 + 1 + 3)  # and a gap
    assert columns(ax) == ["none", "0", "1", "2"]
    assert rows(ax) == ["q", "k", "v", "lm_head/kernel", "model/embed/embedding"]
    assert values.mask.tolist() == 3 * [[True, True, False, False, False]] + 2 * [[False, True, True, True, True]]
    assert values[4, 0] == pytest.approx(float(algebra.norms(lora)["model/embed/embedding"]))


def test_slices_of_a_stack_are_layers_and_experts_thin_rows():
    lora = made(
        {"blocks/Dense_0/kernel": (4, 5, 7), "blocks/Dense_1/kernel": (4, 5, 7), "blocks/experts/up": (4, 3, 5, 7)}
    )
    ax = drawn(plot.norms(lora)).axes[0]
    norms = algebra.norms(lora)
    expected = np.concatenate(
        [norms["blocks/Dense_0/kernel"][None], norms["blocks/Dense_1/kernel"][None], norms["blocks/experts/up"].T]
    )
    np.testing.assert_allclose(heat(ax).filled(np.nan), expected, rtol=1e-6)
    assert rows(ax) == ["Dense_0/kernel", "Dense_1/kernel", "experts/up  ×3"]
    assert ax.get_xlabel() == "layer (slice of a stack)"


def test_experts_by_axis_and_by_path():
    by_axis = {f"layers/{i}/experts/up": (3, 5, 7) for i in range(2)}
    by_path = {f"layers/{i}/mlp/experts/{e}/down": (5, 7) for i in range(2) for e in range(4)}
    lora = made(by_axis | by_path | layers(2, "q", "layers/{}/attn/{}"), skip=["layers/1/mlp/experts/2/down"])
    ax = drawn(plot.norms(lora)).axes[0]
    norms, values = algebra.norms(lora), heat(ax)
    np.testing.assert_allclose(values[:3, 1], norms["layers/1/experts/up"], rtol=1e-6)
    assert values[3 + 3, 0] == pytest.approx(float(norms["layers/0/mlp/experts/3/down"]))
    assert rows(ax) == ["experts/up  ×3", "mlp/experts/down  ×4", "attn/q"]
    assert marks(ax) == {"not adapted": 1}
    alone = drawn(plot.norms(made({"experts": (6, 5, 7)}))).axes[0]
    assert heat(alone).shape == (6, 1)
    assert rows(alone) == ["experts  ×6"]


def test_a_number_is_a_layer_only_if_it_differs():
    assert heat(plot.norms(made({"Dense_0/kernel": (5, 7)})).axes[0]).shape == (1, 1)
    ax = plot.norms(made({f"Dense_{i}/kernel": (5, 7) for i in range(3)})).axes[0]
    assert (heat(ax).shape, columns(ax)) == ((1, 3), ["0", "1", "2"])
    ax = plot.norms(
        made({f"0/layers/{i}/w1": (5, 7) for i in range(3)} | {f"0/layers/{i}/w2": (5, 7) for i in range(3)})
    ).axes[0]
    assert (heat(ax).shape, rows(ax)) == ((2, 3), ["w1", "w2"])


def test_a_leaf_trained_outright():
    lora = made(layers(3) | {"model/layers/0/experts/w": (4, 5, 7), "model/layers/1/experts/w": (4, 5, 7)})
    params = tree({path: x.shape for path, x in lora.items()})
    for path in ("model/layers/1/experts/w", "model/layers/2/attn/q/kernel"):
        lora[path] = jlora.FullWeight(jnp.asarray(params[path]) + 1.0, lora[path].base)
    lora = {path: dataclasses.replace(x, base=base_of(params)) for path, x in lora.items()}
    values = heat(drawn(plot.norms(lora, params)).axes[0])
    w = params["model/layers/2/attn/q/kernel"]
    assert values[0, 2] == pytest.approx(np.sqrt(w.size) / np.linalg.norm(w), rel=1e-5)
    assert values.count() == 9 + 4 + 1
    with pytest.raises(ValueError, match=r"'model/layers/2/attn/q/kernel' is trained outright"):
        plot.norms(lora)


def base_of(params):
    return Fingerprint((path, w.shape, "float32") for path, w in params.items())


def test_values_that_are_not_finite_are_marked():
    lora = made(layers(4))
    path = "model/layers/2/attn/k/kernel"
    lora[path] = jax.tree.map(lambda x: x * jnp.nan, lora[path])
    params = tree({p: x.shape for p, x in lora.items()})
    params["model/layers/3/attn/q/kernel"] *= 0
    ax = drawn(plot.norms(lora, params)).axes[0]
    assert marks(ax) == {"the base is zero": 1, "not finite": 1}
    assert heat(ax).count() == 12 - 2
    assert heat(plot.norms(lora, params, relative=False).axes[0]).count() == 12 - 1
    params[path] *= 0  # zeros do not hide that an update is broken
    params["model/layers/0/attn/v/kernel"] *= np.nan
    assert marks(drawn(plot.norms(lora, params)).axes[0]) == {"the base is zero": 1, "not finite": 2}
    fig = drawn(plot.spectra(lora))
    assert marks(fig.axes[-2]) == {"not finite": 1}
    assert marks(drawn(plot.angles(lora, made(layers(4), seed=3))).axes[0]) == {"not finite": 1}
    broken = {path: lora[path]}
    assert drawn(plot.spectra(broken)).axes[0].get_title("right") == "not finite"
    assert notes(drawn(plot.angles(broken, {path: made(layers(4))[path]})).axes[3]) == ["not finite"]


@pytest.mark.parametrize("name", ["dense", "heads_in", "conv", "lookup_in_layers", "scan_of_scan", "nnx", "linen_scan"])
def test_every_way_to_use_a_weight(name):
    case = BY_NAME[name]
    lora = case.trained()
    slices = sum(x.size for x in algebra.norms(lora).values())
    assert heat(drawn(plot.norms(lora, case.params)).axes[0]).count() == slices
    drawn(plot.spectra(lora))
    assert heat(drawn(plot.angles(lora, case.trained(7))).axes[2]).count() == slices


# --- colours ---------------------------------------------------------------------------------------------------------


def loud(lora, path, factor):
    return lora | {path: dataclasses.replace(lora[path], b=factor * lora[path].b)}


def colours(ax):
    """The ends of the colours, and the mesh."""
    mesh = next(c for c in ax.collections if isinstance(c, QuadMesh))
    return *mesh.get_clim(), mesh


def notes(ax):
    return [text.get_text() for text in ax.texts if text.get_text()]


def test_an_outlier_does_not_flatten_the_colours():
    path = "model/layers/4/attn/k/kernel"
    lora = loud(made(layers(9)), path, 50.0)
    ax, bar = drawn(plot.norms(lora)).axes
    sizes = {p: float(x) for p, x in algebra.norms(lora).items()}
    low, high, mesh = colours(ax)
    assert (low, high) == (0.0, pytest.approx(max(x for p, x in sizes.items() if p != path)))
    assert heat(ax)[1, 4] == pytest.approx(sizes[path])  # the value itself is true
    assert mesh.colorbar.extend == "max"
    assert notes(bar) == [f"to {sizes[path]:.0f}"]
    assert mesh.to_rgba(sizes[path]) != mesh.to_rgba(high)
    ax, bar = drawn(plot.norms(made(layers(9)))).axes
    assert (colours(ax)[2].colorbar.extend, notes(bar)) == ("neither", [])


def test_numbers_in_cells_are_true_beyond_the_colours():
    shapes = layers(4)
    lora = loud(made(shapes), "model/layers/1/attn/q/kernel", 1000.0)
    params = tree(shapes)
    ax = drawn(plot.norms(lora, params)).axes[0]
    true = {f"{100 * x:.0f}%" for x in heat(ax).compressed() if x > 10}
    assert len(true) == 1
    assert true < set(notes(ax))
    assert len(notes(ax)) == 12


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.99999, "1.00"),
        (-0.0302, "−0.0302"),
        (2087.4, "2087"),
        (12.345, "12.3"),
        (3e-7, "3e−07"),
        (2e6, "2e+06"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert _number(value, False) == text
    assert _number(value / 100, True) == text + "%"


def test_a_whole_group_of_larger_values_is_no_outlier():
    lora = made(layers(9))
    for i in range(9):
        lora = loud(lora, f"model/layers/{i}/attn/v/kernel", 50.0)
    low, high, mesh = colours(plot.norms(lora).axes[0])
    assert (low, high) == (0.0, pytest.approx(float(max(algebra.norms(lora).values()))))
    assert mesh.colorbar.extend == "neither"


def test_an_effective_rank_far_below_the_others_does_not_flatten_the_colours():
    path = "model/layers/2/attn/q/kernel"
    usual = made({path: (5, 7)}, rank=5)[path]
    lora = {p: dataclasses.replace(x, a=usual.a + 0.01 * x.a, b=usual.b) for p, x in made(layers(9), rank=5).items()}
    lora[path] = algebra.resize(algebra.resize(lora, {path: 1}), {path: 5})[path]
    ax = next(x for x in drawn(plot.spectra(lora)).axes if x.get_title("left").startswith("Effective"))
    low, _, mesh = colours(ax)
    others = np.delete(heat(ax).ravel(), 2)
    assert low == pytest.approx(others.min())
    assert mesh.colorbar.extend == "min"
    assert notes(mesh.colorbar.ax) == ["from 1.00"]


def test_one_trained_leaf_among_fresh_ones_has_the_whole_scale():
    lora = made(layers(9))
    path = "model/layers/2/attn/q/kernel"
    lora = {p: x if p == path else dataclasses.replace(x, b=0.0 * x.b) for p, x in lora.items()}
    assert colours(plot.norms(lora).axes[0])[1] == pytest.approx(float(algebra.norms(lora)[path]))


def test_ink_is_dark_on_a_light_figure_and_light_on_a_dark_one():
    lora = made(layers(3), skip=["model/layers/1/attn/q/kernel"])
    for face, dark in (("white", False), ("#fff8e0", False), ("#101020", True), ("none", False)):
        fig = Figure(facecolor=face, layout="constrained")
        ax = fig.subfigures(1, 1).subplots()
        drawn(plot.norms(lora, ax=ax))
        texts = [ax.title, ax.xaxis.label, *ax.get_yticklabels(), *ax.get_legend().get_texts()]
        texts = [text for text in [*texts, ax._left_title, colours(ax)[2].colorbar.ax.yaxis.label] if text.get_text()]
        assert len(texts) == 7
        assert {max(to_rgb(text.get_color())) > 0.5 for text in texts} == {dark}, face
    with rc_context({"figure.facecolor": "black", "axes.grid": True, "text.color": "white"}):
        fig = drawn(plot.spectra(lora))
        assert min(to_rgb(fig.axes[0]._left_title.get_color())) > 0.5
        assert min(to_rgb(drawn(plot.angles(lora, lora)).axes[3].get_legend().get_texts()[0].get_color())) > 0.5


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_are_short_and_tell_rows_apart():
    kinds = [f"net/{side}/layers/{{}}/inner_0/{w}/kernel" for side in ("encoder", "decoder") for w in ("to_q", "to_k")]
    ax = plot.norms(made({kind.format(i): (5, 7) for kind in kinds for i in range(2)})).axes[0]
    assert rows(ax) == ["encoder/to_q", "encoder/to_k", "decoder/to_q", "decoder/to_k"]
    long = [f"{x}_of_a_very_long_name/{y}_another/{x}" for x, y in ("ab", "cd")]
    assert rows(plot.norms(made(dict.fromkeys(long, (5, 7)))).axes[0]) == ["…/b_another/a", "…/d_another/c"]
    same = [f"{x}_of_a_very_long_name/and_another" for x in "ab"]
    ax = plot.norms(made({f"{name}{y}/w": (5, 7) for name in same for y in "cd"})).axes[0]
    assert rows(ax)[0] == "a_of_a_very_long_name/and_anotherc"  # cut, it would be that of another
    assert rows(plot.norms(made({f"{x * 40}": (5, 7) for x in "ab"})).axes[0])[0] == "…" + 25 * "a"
    assert rows(plot.norms(made({"a/b/c/d/kernel": (5, 7)})).axes[0]) == ["d/kernel"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["head/kernel", "head/bias"], ["head/kernel", "head/bias"]),
        (["params/model/head/w", "params/model/head/b"], ["head/w", "head/b"]),
        (["params/Conv_0/kernel", "params/Conv_1/kernel", "params/Dense_0/kernel", "params/Dense_0/bias"],
         ["Conv/kernel", "Dense_0/kernel", "Dense_0/bias"]),
        (["Dense_0/kernel", "Dense_0/bias", "Dense_1/kernel", "Dense_1/bias"], ["Dense/kernel", "Dense/bias"]),
        (["layers/0/q/kernel", "layers/0/k/kernel", "layers/1/q/kernel", "out/kernel", "out/bias"],
         ["q", "k", "out/kernel", "out/bias"]),
        (["kernel", "bias"], ["kernel", "bias"]),
    ],
)  # fmt: skip
def test_a_parameter_is_named_with_its_module(paths, names):
    assert rows(plot.norms(made(dict.fromkeys(paths, (5, 7)))).axes[0]) == names


def test_experts_of_a_scanned_stack_that_have_one_axis_of_slices():
    """An einsum over all experts at once leaves them no axis of their own; the layers are still layers."""
    lora = made({"blocks/attn/q": (4, 5, 7), "blocks/experts/up": (4, 5, 7), "blocks/experts/down": (4, 3, 5, 7)})
    ax = drawn(plot.norms(lora)).axes[0]
    assert rows(ax) == ["attn/q", "experts/up", "experts/down  ×3"]
    assert heat(ax).shape == (5, 4)
    np.testing.assert_allclose(heat(ax)[1], algebra.norms(lora)["blocks/experts/up"], rtol=1e-6)
    apart = drawn(plot.norms(made({"blocks/q": (4, 5, 7), "moe/experts/up": (4, 5, 7)}))).axes[0]
    assert rows(apart) == ["blocks/q", "experts/up  ×4"]


def test_hundreds_of_leaves():
    lora = made(layers(125, "qkvo"), rank=1)
    ax = drawn(plot.norms(lora)).axes[0]
    assert heat(ax).count() == 500
    assert 5 < len(columns(ax)) < 40
    odd = made({f"thing{chr(97 + i // 26)}{chr(97 + i % 26)}/w": (3, 2) for i in range(500)}, rank=1)
    ax = drawn(plot.norms(odd)).axes[0]
    assert heat(ax).shape == (500, 1)
    assert len(rows(ax)) < 200
    assert ax.figure.get_size_inches()[1] < 15


# --- spectra ---------------------------------------------------------------------------------------------------------


def test_a_line_for_each_leaf_and_a_panel_for_each_kind():
    lora = made(layers(5) | {"model/head/w": (5, 7)})
    fig = drawn(plot.spectra(lora))
    panels = {ax.get_title("left"): ax for ax in fig.axes if ax.get_visible() and len(ax.lines) > 1}
    assert list(panels) == ["q", "k", "v", "head/w"]
    values = algebra.spectrum(lora)
    for kind, ax in panels.items():
        paths = [path for path in lora if f"/{kind}/kernel" in path or path == f"model/{kind}"]
        curves, median = ax.lines[:-1], ax.lines[-1]
        assert len(curves) == len(paths)
        for curve, path in zip(curves, paths, strict=True):
            np.testing.assert_allclose(curve.get_ydata(), values[path] / values[path][0], rtol=1e-6)
        ranks = [float(algebra.effective_rank(values[path])) for path in paths]
        assert median.get_xdata()[0] == pytest.approx(np.median(ranks), rel=1e-5)
        assert f"{min(ranks):.1f}" in ax.get_title("right")
        assert ax.get_yscale() == "log"
    ranks = {path: algebra.effective_rank(x) for path, x in values.items()}
    below = next(ax for ax in fig.axes if ax.get_title("left") == "Effective rank of the update")
    assert heat(below)[1, 1 + 1 + 2] == pytest.approx(float(ranks["model/layers/2/attn/k/kernel"]), rel=1e-5)
    assert heat(below).count() == 16
    assert {ax.get_ylabel() for ax in fig.axes} >= {"layer", "effective rank (rank 3)"}


def test_many_slices_are_bands_and_many_kinds_share_panels():
    lora = made({"blocks/w": (60, 5, 7), "head": (5, 7)})
    ax, single = drawn(plot.spectra(lora)).axes[:2]
    s = np.asarray(algebra.spectrum(lora)["blocks/w"])
    (line,) = [x for x in ax.lines if len(x.get_xdata()) == 3]
    np.testing.assert_allclose(line.get_ydata(), np.median(s / s[:, :1], axis=0), rtol=1e-5)
    assert len(ax.collections) == 2
    assert len(single.collections) == 0
    shapes = {
        f"{block}/{part}{i}x/{w}": (5, 7)
        for block in ("down", "up")
        for part in "ab"
        for i in range(3)
        for w in ("to_q", "to_k")
    }
    fig = drawn(plot.spectra(made(shapes)))
    assert [ax.get_title("left") for ax in fig.axes][:2] == ["to_q", "to_k"]
    fig = drawn(plot.spectra(made({f"w{chr(97 + i)}": (5, 7) for i in range(14)})))
    assert fig.axes[0].get_title("left") == "all"
    assert len(fig.axes[0].lines) == 15


def test_ranks_that_differ():
    lora = made({"up": (5, 7)}, rank=4) | made({"down": (5, 7)}, rank=2)
    fig = drawn(plot.spectra(lora))
    up, down = fig.axes
    assert np.isfinite(up.lines[0].get_ydata()).sum() == 4
    assert np.isfinite(down.lines[0].get_ydata()).sum() == 2
    grown = algebra.resize(lora, {"down": 4})
    np.testing.assert_allclose(plot.spectra(grown).axes[1].lines[0].get_ydata()[2:], np.nan)  # rounding is left out


def test_spectra_relative_to_the_base():
    shapes = layers(3) | {"stack/w": (4, 5, 7)}
    lora, params = made(shapes), tree(shapes)
    fig = drawn(plot.spectra(lora, params))
    queries, keys, _, stack = fig.axes[:4]
    values, sizes = algebra.spectrum(lora), algebra.norms(lora)
    path = "model/layers/1/attn/k/kernel"
    curve = keys.lines[1].get_ydata()
    np.testing.assert_allclose(curve, values[path] / np.linalg.norm(params[path]), rtol=1e-5)
    assert np.sqrt((curve**2).sum()) == pytest.approx(float(sizes[path]) / np.linalg.norm(params[path]), rel=1e-5)
    for i, line in enumerate(stack.lines[:4]):
        expected = values["stack/w"][i] / np.linalg.norm(params["stack/w"][i])
        np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-5)
    low, high = fig.axes[0].get_ylim()
    assert low < min(line.get_ydata().min() for line in queries.lines[:3])
    assert high > curve.max()
    assert "Vert W" in fig.subfigs[0]._supylabel.get_text()
    params[path] *= 0
    assert np.isnan(drawn(plot.spectra(lora, params)).axes[1].lines[1].get_ydata()).all()
    with pytest.raises(ValueError, match=r"another base: there is no leaf"):
        plot.spectra(lora, {"v": jnp.ones((5, 7))})
    with pytest.raises(TypeError, match=r"plot.spectra needs the values of the base.\n  got: ShapeDtypeStruct"):
        plot.spectra(lora, {p: jax.ShapeDtypeStruct(w.shape, jnp.float32) for p, w in params.items()})


def test_leaves_trained_outright_have_no_spectrum():
    lora = made({"up": (5, 7), "down": (5, 7)})
    lora["down"] = jlora.FullWeight(jnp.ones((5, 7)), lora["down"].base)
    assert [ax.get_title("left") for ax in drawn(plot.spectra(lora)).axes] == ["up"]
    lora = made(layers(3, "q"))
    path = "model/layers/1/attn/q/kernel"
    lora[path] = jlora.FullWeight(jnp.ones((5, 7)), lora[path].base)
    assert marks(drawn(plot.spectra(lora)).axes[-2]) == {"not low-rank": 1}
    lora = {"down": jlora.FullWeight(jnp.ones((5, 7)), made({"down": (5, 7)})["down"].base)}
    with pytest.raises(ValueError, match=r"no low-rank leaf, and so no spectrum.\n  got: down, trained outright"):
        plot.spectra({"down": lora["down"]})


# --- angles ----------------------------------------------------------------------------------------------------------


def test_overlaps_and_cosines_are_those_of_compare():
    one, two = made(layers(4)), made(layers(4), rank=2, seed=9)
    missing = "model/layers/3/attn/v/kernel"
    del two[missing]
    reads, writes, cosine, every = drawn(plot.angles(one, two)).axes[:4]
    found = algebra.compare(one, two)
    for i in range(4):
        for j, kind in enumerate("qkv"):
            path = f"model/layers/{i}/attn/{kind}/kernel"
            if path == missing:
                assert all(heat(ax).mask[j, i] for ax in (reads, writes, cosine))
                continue
            assert heat(reads)[j, i] == pytest.approx(float((jnp.cos(found[path].input_angles) ** 2).mean()), rel=1e-5)
            assert heat(writes)[j, i] == pytest.approx(
                float((jnp.cos(found[path].output_angles) ** 2).mean()), rel=1e-5
            )
            assert heat(cosine)[j, i] == pytest.approx(float(found[path].cosine), rel=1e-5)
    assert (marks(reads), marks(cosine)) == ({"not low-rank in both": 1}, {"not in both": 1})
    low, high = next(c for c in cosine.collections if isinstance(c, QuadMesh)).get_clim()
    assert low == -high
    angles = np.stack([x.input_angles for x in found.values() if x.cosine is not None])
    np.testing.assert_allclose(every.lines[0].get_ydata(), np.median(np.cos(angles), axis=0), rtol=1e-5)
    assert [t.get_text() for t in every.get_legend().get_texts()] == ["input", "output"]


def test_one_space_and_two_at_right_angles():
    lora = made({"w": (6, 8)}, rank=2)
    x = lora["w"]
    eye = jnp.eye(8, dtype=jnp.float32)
    one = {"w": dataclasses.replace(x, a=eye[:6, :2], b=eye[:2])}
    two = {"w": dataclasses.replace(x, a=eye[:6, 2:4], b=3.0 * eye[:2])}
    reads, writes, cosine = plot.angles(one, two).axes[:3]
    assert [float(heat(ax).item()) for ax in (reads, writes, cosine)] == pytest.approx([0.0, 1.0, 0.0], abs=1e-6)
    thin = algebra.resize(one, 4)  # directions without an update do not count
    reads, writes, cosine, every = plot.angles(thin, thin).axes[:4]
    assert [float(heat(ax).item()) for ax in (reads, writes, cosine)] == pytest.approx([1.0, 1.0, 1.0], abs=1e-6)
    assert every.lines[0].get_xdata().tolist() == [1, 2]


def test_angles_and_a_leaf_trained_outright():
    lora, params = made({"up": (5, 7), "down": (5, 7)}), tree({"up": (5, 7), "down": (5, 7)})
    other = dict(lora)
    lora["down"] = jlora.FullWeight(jnp.ones((5, 7)), lora["down"].base)
    reads, _, cosine = drawn(plot.angles(lora, other, params)).axes[:3]
    assert marks(reads) == {"not low-rank in both": 1}
    assert heat(cosine).count() == 2
    with pytest.raises(ValueError, match=r"'down' is trained outright.*\n  Pass the base: angles\(one, two, params\)"):
        plot.angles(lora, other)
    with pytest.raises(ValueError, match=r"No leaf has a low rank in both adapters.*\n  got: down; and up, down"):
        plot.angles({"down": lora["down"]}, other, params)
    with pytest.raises(ValueError, match=r"No leaf has a low rank in both adapters.*\n  got: up; and down"):
        plot.angles({"up": lora["up"]}, {"down": other["down"]})


# --- figures, and what is refused ------------------------------------------------------------------------------------


def test_draws_on_axes_of_a_figure_that_exists():
    lora = made(layers(3))
    fig = Figure(layout="constrained")
    left, right = fig.subplots(1, 2)
    assert plot.norms(lora, ax=right) is fig
    assert heat(right).count() == 9
    assert not left.collections
    part = fig.subfigures(1, 1)
    assert plot.norms(lora, ax=part.subplots()) is fig
    drawn(fig)
    assert plot.norms(lora, figsize=(4, 3)).get_size_inches().tolist() == [4, 3]
    assert plot.spectra(lora, figsize=(4, 3)).get_size_inches().tolist() == [4, 3]
    assert plot.angles(lora, lora, figsize=(4, 3)).get_size_inches().tolist() == [4, 3]
    with pytest.raises(ValueError, match=r"figsize is the size of a new figure.*\n  Leave one of them out"):
        plot.norms(lora, ax=left, figsize=(4, 3))
    with pytest.raises(TypeError, match=r"ax must be the axes of a Matplotlib figure.*\n  got: Figure"):
        plot.norms(lora, ax=fig)


def test_pyplot_and_settings_are_left_alone():
    code = (
        "import sys, jax.numpy as jnp, jlora, jlora.plot; assert 'matplotlib' not in sys.modules; import matplotlib\n"
        "seen = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"  # that one asks pyplot
        "before = seen()\n"
        "sites = jlora.sites(lambda p, x: x @ p['w'], {'w': jnp.ones((5, 7))}, jnp.ones((2, 5)))\n"
        "base = sites.base\n"
        "lora = {'w': jlora.LowRank(jnp.ones((5, 2)), jnp.ones((2, 7)), (0,), (1,), (), 1.0, 0.0, base)}\n"
        "jlora.plot.norms(lora), jlora.plot.spectra(lora), jlora.plot.angles(lora, lora)\n"
        "assert 'matplotlib.pyplot' not in sys.modules and seen() == before"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True, timeout=300)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    lora = made({"w": (5, 7)})
    for call in (plot.norms, plot.spectra, lambda lora: plot.angles(lora, lora)):
        with pytest.raises(ImportError, match=re.escape('pip install "jlora[plot]"')):
            call(lora)


def test_what_is_refused():
    lora = made({"w": (5, 7)})
    for name, call in (
        ("lora", plot.norms),
        ("lora", plot.spectra),
        ("two", lambda x: plot.angles(lora, x)),
        ("one", lambda x: plot.angles(x, lora)),
    ):
        with pytest.raises(ValueError, match=r"The adapter is empty"):
            call({})
        wanted = rf"(?s){name} must be a dict from path to adapter.*got: parameters, dict with the array 'w' \(5, 7\)"
        with pytest.raises(TypeError, match=wanted):
            call({"w": jnp.ones((5, 7))})
        with pytest.raises(TypeError, match=r"draws values.\n  got: ShapeDtypeStruct in the adapter of 'w'"):
            call(jax.eval_shape(lambda: lora))
    with pytest.raises(TypeError, match=r"plot.norms draws values.\n  got: .*Tracer in the adapter of 'w'"):
        jax.jit(lambda x: plot.norms(x) and 0)(lora)
    with pytest.raises(ValueError, match=r"need the base.\n  Pass it: norms\(lora, params\)"):
        plot.norms(lora, relative=True)
    with pytest.raises(ValueError, match=r"another base: there is no leaf 'w'"):
        plot.norms(lora, {"v": jnp.ones((5, 7))})
    with pytest.raises(ValueError, match=r"another base: 'w' has shape \(7, 5\)"):
        plot.norms(lora, {"w": jnp.ones((7, 5))})
    with pytest.raises(TypeError, match=r"needs the values of the base.\n  got: ShapeDtypeStruct at 'w'"):
        plot.norms(lora, {"w": jax.ShapeDtypeStruct((5, 7), jnp.float32)})
    with pytest.raises(ValueError, match=r"different bases"):
        plot.angles(lora, made({"w": (5, 7), "v": (5, 7)}))
