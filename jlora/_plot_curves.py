"""Spectra and principal angles as curves."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jlora._compare import Comparison
from jlora._plot_draw import BLUE, ORANGE, SMALL, TEXT, TITLE, bar, frame, ink_of, note
from jlora._plot_grid import Grid, all_cut

LINES = 48  # spectra in one panel; more are drawn as bands
PANELS = 12  # of spectra; with more kinds of weight, those with the same last name share one


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


def draw_spectra(
    plt: Any, fig: Any, axes: Any, grid: Grid, panels: Any, found: Any, ranks: Any, units: Any = None
) -> None:
    """A panel for each group of slices: lines coloured by layer, or bands; relative to the norms in ``units``, if there are any."""
    layers = [i for i in grid.columns if i is not None]
    ink, most = ink_of(fig), max(x.shape[-1] for x in found.values())
    span = plt.colors.Normalize(min(layers, default=0), max(layers, default=1))
    colours = plt.cm.ScalarMappable(span, _clear(plt, ink.dark))
    bands = max(map(len, panels.values())) > LINES
    names = [name if len(name) <= 20 else f"…{name[-19:]}" for name in all_cut(list(panels), 20)]
    heights = []
    for ax, name, slices in zip(axes.flat, names, panels.values(), strict=False):
        curves = [_curve(found, units, path, i, most) for path, i in slices]
        heights += curves
        if bands and len(curves) > 2:
            _band(ax, curves, BLUE, ((0, 100, 0.15), (10, 90, 0.3)))
        else:
            style = {"marker": "o", "markersize": 3} if len(curves) <= 2 else {}
            for curve, (path, i) in zip(curves, slices, strict=True):
                layer = grid.layers(path)[i]
                colour = ink.text if layer is None or len(layers) == 1 or bands else colours.to_rgba(layer)
                ax.plot(np.arange(1, most + 1), curve, color=colour, lw=0.9, **style)
        used = np.array([ranks[path].reshape(-1)[i] for path, i in slices])
        used = used[np.isfinite(used)]
        if used.size:
            ax.axvline(float(np.median(used)), color=ink.text, ls=":", lw=0.9)
        ax.set_title(name, loc="left", fontsize=TEXT, color=ink.text)
        ax.set_title(_span(used), loc="right", fontsize=SMALL, color=ink.text)
        frame(ax)
        if used.size and not np.isfinite(curves).any():
            reasons = {"no update yet": used == 0, "the base is zero": used > 0}
            note(ax, "\n".join(reason for reason, on in reasons.items() if on.any()))
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    first = axes.flat[0]
    first.set_yscale("log")
    first.set_ylim(*_limits(heights))
    first.set_xlim(0.5, most + 0.5)
    first.xaxis.set_major_locator(plt.ticker.MaxNLocator(4, integer=True))
    for ax in list(axes.flat)[max(0, len(panels) - axes.shape[1]) : len(panels)]:
        ax.tick_params(labelbottom=True)
    unit = "the largest" if units is None else "the norm of the weight"
    fig.suptitle(f"Singular values, relative to {unit}", x=0.01, ha="left", fontsize=TITLE, color=ink.text)
    what = "median, 10–90 %, range; " if bands else ""
    rank = r"$r_\mathrm{eff}$"
    fig.supxlabel(f"index $i$  ({what}dotted: effective rank {rank})", fontsize=TEXT, color=ink.text)
    label = r"$\sigma_i\,/\,\sigma_1$" if units is None else r"$\sigma_i\,/\,\Vert W\Vert_F$"
    fig.supylabel(label, fontsize=TEXT, color=ink.text)
    if len(layers) > 1 and not bands:
        made = bar(fig, colours, list(axes.flat), "layer")
        made.ax.yaxis.set_major_locator(plt.ticker.MaxNLocator(5, integer=True))


def _curve(found: Any, units: Any, path: str, i: int, length: int) -> np.ndarray:
    """The spectrum of slice ``i`` of a leaf, relative to its largest value or to the norm of the base's slice; NaN up to ``length``."""
    values = found[path].reshape(-1, found[path].shape[-1])[i]
    unit = values[0] if units is None else units[path].reshape(-1)[i]
    floor = values[0] * np.finfo(values.dtype).eps * max(8, len(values))  # what is below is but rounding
    keep = np.isfinite(values) & (values > floor) & (unit > 0)
    return _padded(np.where(keep, values / np.where(keep, unit, 1), np.nan), length)


def _limits(curves: Sequence[np.ndarray]) -> tuple[float, float]:
    """From below the lowest value to above the highest, and a decade at least."""
    every = np.concatenate(curves)
    every = every[np.isfinite(every)]
    high = float(every.max()) if every.size else 1.0
    return 0.7 * min(float(every.min()) if every.size else high, 0.1 * high), 1.5 * high


def shared_directions(x: Comparison) -> np.ndarray:
    """Which of the principal angles of two updates are between directions that both have; all, if an update is not finite."""
    broken = ~np.isfinite(np.asarray(x.norm_one)) | ~np.isfinite(np.asarray(x.norm_two))
    return ~np.isnan(np.asarray(x.input_angles)) | broken[..., None]


def overlap(cosines: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """The mean square of the cosines of shared directions; 0 if there are none."""
    squares = np.where(shared, cosines, 0.0) ** 2
    return np.asarray(squares.sum(axis=-1) / np.maximum(1, shared.sum(axis=-1)))


def draw_angles(plt: Any, ax: Any, sides: Sequence[Mapping[str, np.ndarray]], nothing: str) -> None:
    """All principal angles: their cosines against their number; ``nothing`` says why, where there are none."""
    ink = ink_of(ax.figure)
    most = max(x.shape[-1] for x in sides[0].values())
    for side, colour, name in zip(sides, (BLUE, ORANGE), ("input", "output"), strict=True):
        curves = [_padded(row, most) for x in side.values() for row in x.reshape(-1, x.shape[-1])]
        _band(ax, curves, colour, ((10, 90, 0.2),), name)
    ax.set_title("All principal angles", loc="left", fontsize=TITLE, color=ink.text)
    ax.set_xlabel("index $i$", fontsize=TEXT, color=ink.text)
    ax.set_ylabel(r"$\cos\theta_i$  (median, 10–90 %)", fontsize=TEXT, color=ink.text)
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlim(0.5, most + 0.5)
    ax.xaxis.set_major_locator(plt.ticker.MaxNLocator(8, integer=True))
    if ax.lines:
        ax.legend(fontsize=SMALL, frameon=False, loc="best", labelcolor=ink.text)
    else:
        note(ax, nothing)
    frame(ax)


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


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([values.astype(np.float64), np.full(length - len(values), np.nan)])


def _span(ranks: np.ndarray) -> str:
    """Effective ranks in a few characters: 3.1–5.2."""
    if not ranks.size:
        return "not finite"
    low, high = (f"{x:.1f}" for x in (ranks.min(), ranks.max()))
    return rf"$r_\mathrm{{eff}}$ {low if low == high else f'{low}–{high}'}"


def _clear(plt: Any, dark: bool) -> Any:
    """The colours of layers: without the end that a thin line does not show, yellow on white or purple on black."""
    ends = (0.15, 1.0) if dark else (0.0, 0.92)
    return plt.colors.ListedColormap(plt.colormaps["viridis"](np.linspace(*ends, 256)))
