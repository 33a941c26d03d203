"""Heat maps, spectra and angles drawn on axes that are given."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _svd, algebra
from jlora._adapters import LowRank
from jlora._plot_grid import Grid, all_cut

Size = tuple[float, float]

SMALL, TEXT, TITLE = 7, 8, 9  # points
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # between the numbers of layers
INK, GREY, BLACK, BLUE, ORANGE = "#333333", "#d0d0d0", "#000000", "#0072b2", "#d55e00"
LINES = 48  # spectra in one panel; more are drawn as bands
PANELS = 12  # of spectra; with more kinds of weight, those with the same last name share one


def load_matplotlib() -> Any:
    """Matplotlib and what is used of it; never pyplot."""
    try:
        import matplotlib
        import matplotlib.axes
        import matplotlib.cm
        import matplotlib.collections
        import matplotlib.colors
        import matplotlib.figure
        import matplotlib.patches
        import matplotlib.ticker
        import matplotlib.transforms
    except ImportError:
        raise ImportError('jlora.plot needs Matplotlib, which is missing.\n  pip install "jlora[plot]"') from None
    return matplotlib


def figure(plt: Any, size: Size) -> Any:
    return plt.figure.Figure(figsize=size, layout="constrained")


def root(ax: Any) -> Any:
    """The figure that the axes are on, in whatever part of it."""
    fig = ax.figure
    while fig is not fig.figure:
        fig = fig.figure
    return fig


def extent(values: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """The lowest and the highest of all finite values."""
    every = np.concatenate([x.reshape(-1) for x in values.values()])
    every = every[np.isfinite(every)]
    return (float(every.min()), float(every.max())) if every.size else (0.0, 0.0)


def heat(
    ax: Any,
    grid: Grid,
    values: Mapping[str, np.ndarray],
    *,
    title: str,
    label: str,
    limits: tuple[float, float] | None = None,
    absent: str = "not adapted",
    colours: str = "viridis",
    percent: bool = False,
) -> None:
    """A heat map with its colour bar: what is not there is grey and crossed out, what is not finite is black."""
    plt = load_matplotlib()
    data, crossed = grid.fill(values)
    broken = ~np.ma.getmaskarray(data) & ~np.isfinite(data.filled(0.0))
    x, y = grid.edges()
    if grid.apart:  # a gap after the column without a layer
        data, crossed, broken = (_gap(cells) for cells in (data, crossed, broken))
    low, high = limits or (0.0, extent(values)[1])
    mesh = ax.pcolormesh(
        x, y, np.ma.masked_where(broken, data), cmap=colours, vmin=low, vmax=high if high > low else low + 1.0
    )
    legend = []
    for cells, colour, name in ((crossed, GREY, absent), (broken, BLACK, "not finite")):
        if cells.any():
            paint = plt.colors.ListedColormap([colour])
            ax.pcolormesh(x, y, np.ma.masked_where(~cells, np.ones(cells.shape)), cmap=paint)
            legend.append(plt.patches.Patch(facecolor=colour, edgecolor="none", label=name))
    strokes = [((x[j], y[i + 1]), (x[j + 1], y[i])) for i, j in np.argwhere(crossed | broken)]
    strokes += [((x[j], y[i]), (x[j + 1], y[i + 1])) for i, j in np.argwhere(broken)]
    ax.add_collection(plt.collections.LineCollection(strokes, colors="white", linewidths=0.8), autolim=False)
    _rule(ax, grid, x, y)
    if grid.roomy:
        _write(ax, mesh, x, y, percent)
    _ticks(ax, grid, x, y)
    ax.set_title(title, loc="left", fontsize=TITLE, color=INK)
    _bar(ax.figure, mesh, [ax], label, plt.ticker.PercentFormatter(1.0) if percent else None)
    if legend:
        far = 8 if grid.columns == [None] else 30  # points below the axes: under the numbers of layers
        below = ax.transAxes + plt.transforms.ScaledTranslation(0, -far / 72, ax.figure.dpi_scale_trans)
        ax.legend(
            handles=legend, loc="upper right", bbox_to_anchor=(1.0, 0.0), bbox_transform=below, ncols=2, fontsize=SMALL,
            frameon=False, borderaxespad=0.0, borderpad=0.0, handlelength=1.2, handleheight=1.0, columnspacing=1.0,
        )  # fmt: skip


def _bar(fig: Any, mappable: Any, axes: Any, label: str, ticks: Any = None) -> Any:
    """A colour bar of one width, not much higher than its labels need."""
    boxes = [ax.get_window_extent() for ax in axes]
    height = (max(box.y1 for box in boxes) - min(box.y0 for box in boxes)) / fig.dpi
    shrink = min(1.0, 4.0 / height)
    bar = fig.colorbar(
        mappable, ax=axes, format=ticks, shrink=shrink, aspect=max(4.0, shrink * height / 0.11), pad=0.02
    )
    bar.set_label(label, fontsize=TEXT, color=INK)
    bar.ax.tick_params(labelsize=SMALL, length=2, colors=INK)
    bar.ax.yaxis.get_offset_text().set_fontsize(SMALL)
    bar.outline.set_visible(False)
    return bar


def _gap(cells: Any) -> Any:
    """Cells with an empty column after the first."""
    if isinstance(cells, np.ma.MaskedArray):
        return np.ma.concatenate([cells[:, :1], np.ma.masked_all((len(cells), 1)), cells[:, 1:]], axis=1)
    return np.insert(cells, 1, False, axis=1)


def _rule(ax: Any, grid: Grid, x: np.ndarray, y: np.ndarray) -> None:
    """White lines between kinds, and between columns, where cells are large enough."""
    ends = np.cumsum([0, *grid.kinds.values()])
    if len(ends) <= 150:
        ax.hlines(y[ends], x[0], x[-1], colors="white", linewidths=1.0)
    if len(x) <= 50:
        ax.vlines(x, y[0], y[-1], colors="white", linewidths=0.6)


def _write(ax: Any, mesh: Any, x: np.ndarray, y: np.ndarray, percent: bool) -> None:
    """The values, into the cells."""
    cells = mesh.get_array().reshape(len(y) - 1, len(x) - 1)
    for i, j in np.argwhere(~np.ma.getmaskarray(cells)):
        red, green, blue, _ = mesh.to_rgba(cells[i, j])
        ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else INK
        text = f"{100 * cells[i, j]:.3g}%" if percent else f"{cells[i, j]:.3g}"
        middle = (x[j] + x[j + 1]) / 2, (y[i] + y[i + 1]) / 2
        ax.text(*middle, text, ha="center", va="center", fontsize=SMALL, color=ink)


def _ticks(ax: Any, grid: Grid, x: np.ndarray, y: np.ndarray) -> None:
    """Names of kinds and numbers of layers, as many as there is room for."""
    ends = np.cumsum([0, *grid.kinds.values()])
    names = [name if n == 1 else f"{name}  ×{n}" for name, n in grid.kinds.items()]
    size = ax.get_window_extent().size / ax.figure.dpi * 72
    step = max(1, ceil(len(names) * 6.5 / size[1]))
    middles = (y[ends[:-1]] + y[ends[1:]]) / 2
    ax.set_yticks(middles[::step], names[::step], fontsize=min(TEXT, max(5.5, 0.8 * size[1] / len(names))))
    ax.set_ylim(y[-1], y[0])
    ax.set_xlim(x[0], x[-1])
    layers = [i for i in grid.columns if i is not None]
    starts = x[-len(layers) - 1 : -1]
    step = next(s for s in STEPS if len(layers) / s * 16 <= size[0] or s == STEPS[-1])
    shown = [(at + 0.5, str(i)) for at, i in zip(starts, layers, strict=False) if i % step == 0] or [
        (at + 0.5, str(i)) for at, i in [*zip(starts, layers, strict=False)][::step]
    ]
    if grid.apart:
        shown.insert(0, (0.5, "none"))
    ax.set_xticks([at for at, _ in shown], [name for _, name in shown], fontsize=SMALL)
    ax.tick_params(length=0, colors=INK)
    ax.spines[:].set_visible(False)
    if layers:
        ax.set_xlabel("layer (slice of a stack)" if grid.by_batch else "layer", fontsize=TEXT, color=INK)


def panels_of(grid: Grid, paths: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
    """The slices of each panel, as path and index: by kind, or by the last part of its name, or all in one."""
    for name in (lambda kind: kind, lambda kind: kind.split("/")[-1], lambda kind: "all"):
        panels: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for path in paths:
            for i, kind in enumerate(grid.names(path)):
                panels[name(kind)].append((path, i))
        if len(panels) <= PANELS:
            break
    return panels


def draw_spectra(plt: Any, fig: Any, axes: Any, grid: Grid, panels: Any, found: Any, ranks: Any) -> None:
    """A panel for each group of slices: lines coloured by layer, or bands."""
    layers = [i for i in grid.columns if i is not None]
    colours = plt.cm.ScalarMappable(plt.colors.Normalize(min(layers, default=0), max(layers, default=1)), _dark(plt))
    most, lowest = max(x.shape[-1] for x in found.values()), 0.1
    bands = max(map(len, panels.values())) > LINES
    names = [name if len(name) <= 20 else f"…{name[-19:]}" for name in all_cut(list(panels), 20)]
    for ax, name, slices in zip(axes.flat, names, panels.values(), strict=False):
        curves = [_relative(found[path].reshape(-1, found[path].shape[-1])[i], most) for path, i in slices]
        lowest = min(lowest, *(float(np.nanmin(c)) for c in curves if np.isfinite(c).any()), lowest)
        if bands and len(curves) > 2:
            _band(ax, curves, BLUE, ((0, 100, 0.15), (10, 90, 0.3)))
        else:
            for curve, (path, i) in zip(curves, slices, strict=True):
                layer = grid.layers(path)[i]
                style = {"marker": "o", "markersize": 3} if len(curves) <= 2 else {}
                colour = INK if layer is None or len(layers) == 1 or bands else colours.to_rgba(layer)
                ax.plot(np.arange(1, most + 1), curve, color=colour, lw=0.9, **style)
        used = np.array([ranks[path].reshape(-1)[i] for path, i in slices])
        used = used[np.isfinite(used)]
        if used.size:
            ax.axvline(float(np.median(used)), color=INK, ls=":", lw=0.9)
        ax.set_title(name, loc="left", fontsize=TEXT, color=INK)
        ax.set_title(_span(used), loc="right", fontsize=SMALL, color=INK)
        _frame(ax)
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    first = axes.flat[0]
    first.set_yscale("log")
    first.set_ylim(0.7 * lowest, 1.5)
    first.set_xlim(0.5, most + 0.5)
    first.xaxis.set_major_locator(plt.ticker.MaxNLocator(4, integer=True))
    for ax in list(axes.flat)[max(0, len(panels) - axes.shape[1]) : len(panels)]:
        ax.tick_params(labelbottom=True)
    fig.suptitle("Singular values, relative to the largest", x=0.01, ha="left", fontsize=TITLE, color=INK)
    what = "median, 10–90 %, range; " if bands else ""
    rank = r"$r_\mathrm{eff}$"
    fig.supxlabel(f"index $i$  ({what}dotted: effective rank {rank})", fontsize=TEXT, color=INK)
    fig.supylabel(r"$\sigma_i\,/\,\sigma_1$", fontsize=TEXT, color=INK)
    if len(layers) > 1 and not bands:
        bar = _bar(fig, colours, list(axes.flat), "layer")
        bar.ax.yaxis.set_major_locator(plt.ticker.MaxNLocator(5, integer=True))


def shared_directions(one: Any, two: Any) -> np.ndarray:
    """Which of the principal angles of two updates are between directions that both have; shape of the angles."""
    live = [
        np.asarray(_svd.live(s) | ~jnp.isfinite(s)).sum(axis=-1, keepdims=True) for s in (_values(one), _values(two))
    ]
    return np.arange(min(one.rank, two.rank, _svd.smaller_side(one))) < np.minimum(*live)


def _values(x: LowRank) -> jax.Array:
    return algebra.spectrum({"": x})[""]


def overlap(cosines: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """The mean square of the cosines of shared directions; 0 if there are none."""
    squares = np.where(shared, cosines, 0.0) ** 2
    return np.asarray(squares.sum(axis=-1) / np.maximum(1, shared.sum(axis=-1)))


def draw_angles(plt: Any, ax: Any, sides: Sequence[Mapping[str, np.ndarray]]) -> None:
    """All principal angles: their cosines against their number."""
    most = max(x.shape[-1] for x in sides[0].values())
    for side, colour, name in zip(sides, (BLUE, ORANGE), ("input", "output"), strict=True):
        curves = [_padded(row, most) for x in side.values() for row in x.reshape(-1, x.shape[-1])]
        _band(ax, curves, colour, ((10, 90, 0.2),), name)
    ax.set_title("All principal angles", loc="left", fontsize=TITLE, color=INK)
    ax.set_xlabel("index $i$", fontsize=TEXT, color=INK)
    ax.set_ylabel(r"$\cos\theta_i$  (median, 10–90 %)", fontsize=TEXT, color=INK)
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlim(0.5, most + 0.5)
    ax.xaxis.set_major_locator(plt.ticker.MaxNLocator(8, integer=True))
    if ax.lines:
        ax.legend(fontsize=SMALL, frameon=False, loc="best")
    _frame(ax)


def _band(ax: Any, curves: Sequence[np.ndarray], colour: str, bands: Any, name: str | None = None) -> None:
    """The median of the curves, and bands between percentiles. NaN is no value."""
    every = np.stack(curves)
    index = np.flatnonzero(np.isfinite(every).any(axis=0))
    if index.size == 0:
        return
    every = every[:, index]
    for low, high, alpha in bands if len(curves) > 1 else ():
        ax.fill_between(index + 1, *np.nanpercentile(every, (low, high), axis=0), color=colour, alpha=alpha, lw=0)
    ax.plot(index + 1, np.nanmedian(every, axis=0), color=colour, lw=1.3, marker="o", markersize=2.5, label=name)


def _relative(values: np.ndarray, length: int) -> np.ndarray:
    """A spectrum relative to its largest value, without what is but its rounding; NaN up to ``length``."""
    largest = values[0]
    floor = largest * np.finfo(values.dtype).eps * max(8, len(values))
    keep = np.isfinite(values) & (values > floor)
    return _padded(np.where(keep, values / np.where(keep, largest, 1), np.nan), length)


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([values.astype(np.float64), np.full(length - len(values), np.nan)])


def _span(ranks: np.ndarray) -> str:
    """Effective ranks in a few characters: 3.1–5.2."""
    if not ranks.size:
        return "not finite"
    low, high = (f"{x:.1f}" for x in (ranks.min(), ranks.max()))
    return rf"$r_\mathrm{{eff}}$ {low if low == high else f'{low}–{high}'}"


def _dark(plt: Any) -> Any:
    """The colours of layers: without the last yellow, which a thin line on white does not show."""
    return plt.colors.ListedColormap(plt.colormaps["viridis"](np.linspace(0.0, 0.92, 256)))


def _frame(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(labelsize=SMALL, length=2, colors=INK)
    ax.grid(alpha=0.25, lw=0.5)
