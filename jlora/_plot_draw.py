"""What all pictures share: Matplotlib itself, the inks that a light or a dark figure needs, colour bars and frames."""

from typing import Any, NamedTuple

import numpy as np

Size = tuple[float, float]

SMALL, TEXT, TITLE = 7, 8, 9  # points
BLUE, ORANGE = "#0072b2", "#d55e00"


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


class Ink(NamedTuple):
    """Colours for a figure of one colour: dark on a light one, light on a dark one."""

    paper: Any  # the figure's own
    text: Any
    line: Any
    absent: Any  # cells of leaves without a value
    pale: Any  # cells of values that cannot be relative to a base of zeros
    full: Any  # cells of values that are not finite
    dark: bool  # whether the paper is


def ink_of(fig: Any) -> Ink:
    """The inks for a figure, or for part of one."""
    paper = np.array(_paper(fig))
    dark = bool(luminance(paper) < 0.5)
    far = np.full(3, float(dark))

    def mixed(share: float) -> tuple[float, ...]:
        return tuple(((1 - share) * paper + share * far).tolist())

    return Ink(mixed(0.0), mixed(0.8), mixed(0.4), mixed(0.25), mixed(0.08), mixed(1.0), dark)


def _paper(fig: Any) -> tuple[float, ...]:
    """The colour behind a figure: its own or, where that is none, of what it is part of. Nothing at all is taken for white."""
    *colour, alpha = fig.patch.get_facecolor()
    if alpha > 0:
        return tuple(colour)
    return (1.0, 1.0, 1.0) if fig.figure is fig else _paper(fig.figure)


def luminance(colour: Any) -> float:
    red, green, blue = colour[:3]
    return float(0.3 * red + 0.59 * green + 0.11 * blue)


def bar(fig: Any, mappable: Any, axes: Any, label: str, ticks: Any = None, extend: str = "neither") -> Any:
    """A colour bar of one width, not much higher than its labels need."""
    boxes = [ax.get_window_extent() for ax in axes]
    height = (max(box.y1 for box in boxes) - min(box.y0 for box in boxes)) / fig.dpi
    shrink = min(1.0, 4.0 / height)
    long = shrink * height
    made = fig.colorbar(
        mappable, ax=axes, format=ticks, shrink=shrink, aspect=max(4.0, long / 0.11), pad=0.02,
        extend=extend, extendfrac=0.1 / long,
    )  # fmt: skip
    ink = ink_of(fig).text
    made.set_label(label, fontsize=TEXT, color=ink)
    made.ax.tick_params(labelsize=SMALL, length=2, colors=ink)
    made.ax.yaxis.get_offset_text().set_fontsize(SMALL)
    made.outline.set_visible(False)
    return made


def frame(ax: Any) -> None:
    """Axes of curves."""
    ink = ink_of(ax.figure)
    ax.set_facecolor("none")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(ink.line)
    ax.tick_params(labelsize=SMALL, length=2, colors=ink.text, which="both")
    ax.grid(color=ink.line, alpha=0.25, lw=0.5)


def note(ax: Any, text: str) -> None:
    """Says in the middle of axes why nothing is drawn there."""
    ink = ink_of(ax.figure)
    box = {"facecolor": ink.paper, "edgecolor": "none", "pad": 2}
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize=SMALL, color=ink.text, bbox=box)
