"""Heat maps: cells of a grid in colours, on a scale that a few outliers do not flatten."""

from collections.abc import Mapping
from math import ceil, floor, log10
from typing import Any

import numpy as np

from jlora._plot_draw import SMALL, TEXT, TITLE, bar, ink_of, load_matplotlib, luminance
from jlora._plot_grid import Grid, all_masked

STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # between the numbers of layers
BEYOND = {"viridis": ("#56b4e9", "#d55e00"), "RdYlBu_r": ("#0b0b3b", "#4d0013")}  # colours below and above a scale
FEW = 0.04  # share of the values that may lie beyond the colours: those of one layer of 25
ENOUGH = 8  # values; among fewer, none is an outlier
HATCH = "//////"


def scale(values: Mapping[str, np.ndarray], low: float | None = None) -> tuple[float, float]:
    """The ends of the colours: of all finite values but a few, where those would squeeze the others into less than half of it."""
    every = np.sort(np.concatenate([x.reshape(-1) for x in values.values()]))
    every = every[np.isfinite(every)]
    if not every.size:
        return (low or 0.0,) * 2
    start = float(every[0]) if low is None else low
    high = start + _end(every - start)
    return high - _end((high - every)[::-1]) if low is None else low, high


def _end(distances: np.ndarray) -> float:
    """The largest of ascending distances, without a few that are more than twice the next."""
    few = ceil(FEW * len(distances)) if len(distances) >= ENOUGH else 0
    end = float(distances[-1])
    for distance in distances[-2 : -2 - few : -1].tolist():
        if 0 < distance < end / 2:
            end = distance
    return end


def heat(
    ax: Any,
    grid: Grid,
    values: Mapping[str, np.ndarray],
    *,
    title: str,
    label: str,
    limits: tuple[float, float],
    absent: str = "not adapted",
    colours: str = "viridis",
    percent: bool = False,
    baseless: Mapping[str, np.ndarray] | None = None,
) -> None:
    """A heat map with its colour bar; cells beyond ``limits`` have colours of their own, and so have those without a finite value.

    ``baseless`` tells which values are relative to a base of zeros: their cells are hatched.
    """
    plt = load_matplotlib()
    ink = ink_of(ax.figure)
    data, crossed = grid.fill(values)
    hatched = grid.fill(baseless or {})[0].filled(0.0) > 0
    broken = ~np.ma.getmaskarray(data) & ~np.isfinite(data.filled(0.0)) & ~hatched
    x, y = grid.edges()
    if grid.apart:  # a gap after the column without a layer
        data, crossed, hatched, broken = (_gap(cells) for cells in (data, crossed, hatched, broken))
    low, high = limits
    under, over = BEYOND[colours]
    ax.grid(False)  # whatever the style: lines would cross the cells
    ax.set_facecolor("none")
    mesh = ax.pcolormesh(
        x, y, np.ma.masked_where(hatched | broken, data), vmin=low, vmax=high if high > low else low + 1.0,
        cmap=plt.colormaps[colours].with_extremes(under=under, over=over),
    )  # fmt: skip
    legend = []
    for cells, colour, hatch, name in (
        (crossed, ink.absent, None, absent),
        (hatched, ink.pale, HATCH, "the base is zero"),
        (broken, ink.full, None, "not finite"),
    ):
        if cells.any():
            paint = plt.colors.ListedColormap([colour])
            ax.pcolormesh(x, y, np.ma.masked_where(~cells, np.ones(cells.shape)), cmap=paint)
            style = {"hatch": hatch, "edgecolor": ink.line if hatch else "none", "linewidth": 0}
            legend.append(plt.patches.Patch(facecolor=colour, label=name, **style))
    _hatch(plt, ax, hatched, x, y, ink.line)
    strokes = [((x[j], y[i + 1]), (x[j + 1], y[i])) for i, j in np.argwhere(crossed | broken)]
    strokes += [((x[j], y[i]), (x[j + 1], y[i + 1])) for i, j in np.argwhere(broken)]
    ax.add_collection(plt.collections.LineCollection(strokes, colors=[ink.paper], linewidths=0.8), autolim=False)
    _rule(ax, grid, x, y, ink.paper)
    if grid.roomy:
        _write(ax, mesh, x, y, percent)
    _ticks(ax, grid, x, y, ink.text)
    ax.set_title(title, loc="left", fontsize=TITLE, color=ink.text)
    _scale_bar(plt, ax, mesh, label, percent)
    if legend:
        far = 8 if grid.columns == [None] else 30  # points below the axes: under the numbers of layers
        below = ax.transAxes + plt.transforms.ScaledTranslation(0, -far / 72, ax.figure.dpi_scale_trans)
        ax.legend(
            handles=legend, loc="upper right", bbox_to_anchor=(1.0, 0.0), bbox_transform=below, ncols=2, fontsize=SMALL,
            frameon=False, borderaxespad=0.0, borderpad=0.0, handlelength=1.2, handleheight=1.0, columnspacing=1.0,
            labelcolor=[ink.text] * len(legend),
        )  # fmt: skip


def _hatch(plt: Any, ax: Any, cells: np.ndarray, x: np.ndarray, y: np.ndarray, colour: Any) -> None:
    """Hatches cells; a mesh cannot."""
    corners = [[(x[j + k], y[i + h]) for h, k in ((0, 0), (0, 1), (1, 1), (1, 0))] for i, j in np.argwhere(cells)]
    if corners:
        style = {"facecolors": "none", "edgecolors": [colour], "linewidths": 0, "hatch": HATCH}
        ax.add_collection(plt.collections.PolyCollection(corners, **style), autolim=False)


def _scale_bar(plt: Any, ax: Any, mesh: Any, label: str, percent: bool) -> None:
    """The colour bar. Where values lie beyond it, it ends in an arrow, with the value that is farthest out."""
    drawn = mesh.get_array().compressed()
    below, above = drawn[drawn < mesh.norm.vmin], drawn[drawn > mesh.norm.vmax]
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below.size > 0, above.size > 0]
    ticks = plt.ticker.PercentFormatter(1.0) if percent else None
    made = bar(ax.figure, mesh, [ax], label, ticks, extend=extend)
    ink = ink_of(ax.figure).text
    for beyond, worst, at, side, shift in ((below, np.min, 0.0, "top", -1), (above, np.max, 1.0, "bottom", 1)):
        if beyond.size:
            text = f"{'to' if shift > 0 else 'from'} {_number(worst(beyond), percent)}"
            made.ax.annotate(
                text, (0.0, at), (0, shift * 10), xycoords="axes fraction", textcoords="offset points", va=side,
                ha="left", fontsize=SMALL, color=ink, annotation_clip=False,
            )  # fmt: skip


def _number(value: float, percent: bool) -> str:
    """A value in three digits, without an exponent where that is not too long."""
    value = 100 * value if percent else value
    size = abs(float(f"{value:.2e}"))  # rounded: 0.9999 has the digits of 1
    if size and not 1e-4 <= size < 1e5:
        text = f"{value:.0e}"
    else:
        text = f"{value:.{max(0, 2 - floor(log10(size)))}f}" if size else "0"
    return text.replace("-", "−") + "%" * percent


def _gap(cells: Any) -> Any:
    """Cells with an empty column after the first."""
    if isinstance(cells, np.ma.MaskedArray):
        return np.ma.concatenate([cells[:, :1], all_masked((len(cells), 1)), cells[:, 1:]], axis=1)
    return np.insert(cells, 1, False, axis=1)


def _rule(ax: Any, grid: Grid, x: np.ndarray, y: np.ndarray, colour: Any) -> None:
    """Lines between kinds, and between columns, where cells are large enough."""
    ends = np.cumsum([0, *grid.kinds.values()])
    if len(ends) <= 150:
        ax.hlines(y[ends], x[0], x[-1], colors=[colour], linewidths=1.0)
    if len(x) <= 50:
        ax.vlines(x, y[0], y[-1], colors=[colour], linewidths=0.6)


def _write(ax: Any, mesh: Any, x: np.ndarray, y: np.ndarray, percent: bool) -> None:
    """The values, into the cells."""
    cells = mesh.get_array().reshape(len(y) - 1, len(x) - 1)
    for i, j in np.argwhere(~np.ma.getmaskarray(cells)):
        ink = "white" if luminance(mesh.to_rgba(cells[i, j])) < 0.5 else "#333333"
        middle = (x[j] + x[j + 1]) / 2, (y[i] + y[i + 1]) / 2
        ax.text(*middle, _number(float(cells[i, j]), percent), ha="center", va="center", fontsize=SMALL, color=ink)


def _ticks(ax: Any, grid: Grid, x: np.ndarray, y: np.ndarray, colour: Any) -> None:
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
    ax.tick_params(length=0, colors=colour)
    ax.spines[:].set_visible(False)
    if layers:
        ax.set_xlabel("layer (slice of a stack)" if grid.by_batch else "layer", fontsize=TEXT, color=colour)
