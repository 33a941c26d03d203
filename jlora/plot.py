r"""Pictures of trained adapters: the norm of the update by layer, its spectra, two adapters compared by the angles between their spaces.

``import jlora.plot``; needs Matplotlib: ``pip install "jlora[plot]"``. Every function takes dicts from path to adapter and returns a
``matplotlib.figure.Figure`` that pyplot knows nothing of: no window opens, no setting changes. The numbers are those of ``jlora.algebra``;
nothing is written to disk (``fig.savefig``). Works on values, so not under ``jax.jit``.

A heat map has a row for each kind of weight that is adapted and a column for each layer, read off the paths: the layer is the number of a
part that names a layer or block (``layers/3``, ``blocks_3``); else the first batch axis of a scanned leaf; else the first number that
differs between leaves that are alike (``Dense_0``, ``Dense_1``). Experts (further batch axes, or ``experts/5``) are thin rows of their
kind. A leaf without a layer is in a column of its own. Which leaves the base has, and the adapter has not, is known from its fingerprint.
Text and lines are dark on a light figure and light on a dark one.
"""

from collections.abc import Mapping
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _jax, _paths, algebra
from jlora._adapters import Adapter, LowRank
from jlora._algebra_checks import values_of
from jlora._compare import Comparison
from jlora._plot_curves import draw_angles, draw_spectra, overlap, panels_of, shared_directions
from jlora._plot_draw import figure, load_matplotlib, root
from jlora._plot_grid import grid_of
from jlora._plot_heat import heat, scale
from jlora._text import shown
from jlora._wrap import check_base, check_lora

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lora = Mapping[str, Adapter]
Size = tuple[float, float]


def norms(
    lora: Lora,
    params: Any = None,
    *,
    relative: bool | None = None,
    ax: "Axes | None" = None,
    figsize: Size | None = None,
) -> "Figure":
    r"""Draws the Frobenius norm of each update as a heat map: layers are columns, kinds of weight rows.

    Args:
        lora: Adapters by path.
        params: The base. With it, norms are relative to those of the base's weights, $\lVert\Delta W\rVert_F / \lVert W\rVert_F$, slice by
            slice. A leaf trained outright needs it in any case.
        relative: Whether norms are relative; by default, if there is ``params``.
        ax: Axes to draw on; by default, those of a new figure.
        figsize: Size of the new figure in inches; by default, what the number of cells needs.

    Returns:
        The figure. Grey, with a stroke: the base has the leaf, the adapter does not. Blank: the base has no such leaf. Hatched:
        the base is zero there, as a bias often is before training, and nothing is relative to it (``relative=False`` draws the norm). Black
        and crossed out: the value is not finite. A few values far beyond all others have the colour of the colour bar's arrow; the number
        above it is the highest.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: ``lora`` is no adapter, or holds a kind of one's own or no values; ``params`` has none; ``ax`` is none.
        ValueError: the adapter is empty; ``params`` is missing where it is needed, or another base; both ``ax`` and ``figsize`` are given.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, jlora.plot
        >>> params = {f"layer_{i}": {"up": jnp.ones((5, 7)), "down": jnp.ones((7, 5))} for i in range(3)}
        >>> def model(params, x):
        ...     for w in params.values():
        ...         x = x @ w["up"] @ w["down"]
        ...     return x
        >>> found = jlora.sites(model, params, jnp.ones((2, 5)))
        >>> lora = jlora.init(jax.random.key(0), params, found, jlora.LoRA(rank=2, targets="all-linear"))
        >>> fig = jlora.plot.norms(lora, params)
        >>> fig.axes[0].collections[0].get_array().shape
        (2, 3)
    """
    plt = load_matplotlib()
    _check_values("norms", lora)
    _check_ax(plt, ax, figsize)
    if relative is None:
        relative = params is not None
    if relative and params is None:
        raise ValueError(
            "Norms relative to those of the base need the base.\n  Pass it: norms(lora, params), or relative=False."
        )
    base = {} if params is None else _base("norms", lora, params)
    values = {path: np.asarray(x) for path, x in algebra.norms(lora, params).items()}
    baseless = {}
    if relative:
        units = {path: _base_norm(lora[path], w) for path, w in base.items()}
        baseless = {path: (units[path] == 0) & np.isfinite(x) for path, x in values.items()}
        with np.errstate(all="ignore"):  # what is relative to zeros is marked
            values = {path: x / units[path] for path, x in values.items()}
    grid = grid_of(lora)
    if ax is None:
        width, height, beside = grid.size()
        fig = figure(plt, figsize or (width + beside + 1.3, height + 1.0))
        ax = fig.subplots()
    update = r"$\Vert\Delta W\Vert_F$"
    label = rf"{update} / $\Vert W\Vert_F$" if relative else f"{update}  (units of the weights)"
    heat(
        ax,
        grid,
        values,
        title="Relative norm of the update" if relative else "Norm of the update",
        label=label,
        limits=scale(values, 0.0),
        percent=relative,
        baseless=baseless,
    )
    return root(ax)


def spectra(lora: Lora, params: Any = None, *, figsize: Size | None = None) -> "Figure":
    r"""Draws the singular values of each update, relative to its largest or to the base, and the effective rank by layer and kind.

    A panel for each kind of weight: a line for each leaf or slice, coloured by layer; the median and bands of quantiles if there are more
    than 48. The dotted line is the median effective rank. Kinds that have the same last name share a panel if there are more than 12.
    Values within the rounding of the largest are left out. Below, the heat map of ``jlora.algebra.effective_rank``.

    Args:
        lora: Adapters by path. Leaves trained outright have no spectrum and are left out.
        params: The base. With it, singular values are relative to the norm of the base's weight, $\sigma_i / \lVert W\rVert_F$, slice by
            slice: not only how an update falls off, but how large it is. The root of the sum of their squares is what ``norms`` draws.
        figsize: Size of the figure in inches; by default, what panels and cells need.

    Returns:
        The figure. An update of zero has no line, and effective rank 0; neither has a line what is relative to a weight of zeros. A panel
        without any line says why. Grey in the heat map: the base has the leaf, but the adapter none of low rank for it.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: ``lora`` is no adapter, or holds a kind of one's own or no values; ``params`` has none.
        ValueError: the adapter is empty, or has no low-rank leaf, or none with an update (a fresh one); ``params`` is another base.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, jlora.plot
        >>> params = {"w": jnp.ones((5, 7))}
        >>> found = jlora.sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 5)))
        >>> lora = jlora.init(jax.random.key(0), params, found, jlora.LoRA(rank=3, targets="w"))
        >>> fig = jlora.plot.spectra(jax.tree.map(lambda x: x + 0.1, lora))
        >>> [ax.get_title("left") for ax in fig.axes]
        ['w']

    References:
        Roy & Vetterli, 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO.
    """
    plt = load_matplotlib()
    _check_values("spectra", lora)
    found = {path: np.asarray(x) for path, x in algebra.spectrum(lora).items()}
    if not found:
        raise ValueError(
            f"The adapter has no low-rank leaf, and so no spectrum.\n  got: {_paths.listing(list(lora))}, trained outright\n"
            "  Draw the norms: jlora.plot.norms(lora, params)."
        )
    if not any(x.any() for x in found.values()):
        raise ValueError(
            "No low-rank leaf has an update yet: all singular values are 0, and there is no spectrum to draw.\n"
            f"  got: {_paths.listing(list(found))}, the product of whose factors is 0, as in a fresh adapter\n"
            "  Train the adapter first."
        )
    lora = {path: lora[path] for path in found}
    ranks = {path: np.asarray(algebra.effective_rank(jnp.asarray(x))) for path, x in found.items()}
    ranks = {path: np.where(np.isfinite(found[path]).all(-1), x, np.nan) for path, x in ranks.items()}
    base = {} if params is None else _base("spectra", lora, params)
    units = {path: _base_norm(lora[path], w) for path, w in base.items()} if base else None
    grid = grid_of(lora)
    panels = panels_of(grid, list(found))
    columns = min((4, 3, 5), key=lambda n: -len(panels) % n) if len(panels) > 4 else len(panels)
    lines = ceil(len(panels) / columns)
    width, height, beside = grid.size()
    # With one value in each panel, the panels' titles say what the heat map would.
    above, below = 1.55 * lines + 0.75, height + 1.0 if max(map(len, panels.values())) > 1 else 0.0
    wide = max(2.0 * columns + 1.2, (width + beside + 1.3) * (below > 0), 4.2)
    fig = figure(plt, figsize or (wide, above + below))
    top, bottom = fig.subfigures(2, 1, height_ratios=(above, below)) if below else (fig, None)
    axes = top.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    draw_spectra(plt, top, axes, grid, panels, found, ranks, units)
    if bottom is not None:
        most = max(x.rank for x in lora.values() if isinstance(x, LowRank))
        label = f"effective rank (rank {most})" if len({x.shape[-1] for x in found.values()}) == 1 else "effective rank"
        needs = min(1.0, (1.6 * width + beside + 1.3) / fig.get_figwidth())  # cells of a narrow map would be bars
        ax = bottom.add_subplot(bottom.add_gridspec(1, 2, width_ratios=(needs, 1.001 - needs))[0])
        title = "Effective rank of the update"
        heat(ax, grid, ranks, title=title, label=label, limits=scale(ranks), absent="not low-rank")
    return fig


def angles(one: Lora, two: Lora, params: Any = None, *, figsize: Size | None = None) -> "Figure":
    r"""Draws how two adapters of one base relate: the angles between what they read and write, and the cosine of their updates.

    Two heat maps show the overlap of the input and of the output spaces, the mean of $\cos^2\theta_i$ over the principal angles: 1 if one
    space contains the other, 0 if they are at right angles. Directions that an update does not have (its singular value is 0) do not
    count. With orthonormal bases of $n$ directions it is $\lVert U_1^* U_2 \rVert_F^2 / n$, the similarity of subspaces of the LoRA paper.
    A third map shows the cosine of the updates as vectors; the last panel all angles, $\cos\theta_i$ against $i$, as the median over
    leaves and slices and the band from 10 to 90 %.

    Args:
        one: Adapters by path.
        two: Adapters by path, of the same base.
        params: The base; needed only where a leaf is trained outright. Such a leaf has a cosine, and no angles.
        figsize: Size of the figure in inches; by default, what the number of cells needs.

    Returns:
        The figure. Colours end at the largest value (but for a few far beyond all others), and not below 0.1. Grey, with a stroke: not in
        both adapters, or not low-rank in both. Where an update is zero, overlap and cosine are 0; a last
        panel without any angle says why.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: an argument is no adapter, or holds a kind of one's own or no values.
        ValueError: no leaf has a low rank in both; the adapters are empty, belong to different bases, or split a leaf differently; neither
            has an update (both are fresh); a leaf is trained outright and ``params`` is not given.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, jlora.plot
        >>> params = {"w": jnp.ones((5, 7))}
        >>> found = jlora.sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 5)))
        >>> lora = jlora.init(jax.random.key(0), params, found, jlora.LoRA(rank=3, targets="w"))
        >>> one = jax.tree.map(lambda x: x + 1.0, lora)
        >>> fig = jlora.plot.angles(one, jlora.algebra.combine([one], [-1.0]))
        >>> [float(ax.collections[0].get_array().item()).__round__(3) for ax in fig.axes[:3]]
        [1.0, 1.0, -1.0]

    References:
        Hu et al., 2021, arXiv:2106.09685, section 7.2; Björck & Golub, 1973, "Numerical methods for computing angles between linear
        subspaces".
    """
    plt = load_matplotlib()
    for name, lora in (("one", one), ("two", two)):
        _check_values("angles", lora, name)
    values_of([one, two], params, "angles(one, two, params)")  # raises in the words of this function, not of compare
    both = algebra.compare(one, two, params)
    cosine = {path: np.asarray(x.cosine) for path, x in both.items() if x.cosine is not None}
    shared = {path: shared_directions(x) for path, x in both.items() if x.input_angles is not None}
    sides = [
        {path: np.where(on, np.cos(np.asarray(getattr(both[path], name))), np.nan) for path, on in shared.items()}
        for name in ("input_angles", "output_angles")
    ]
    if not sides[0]:
        raise ValueError(
            "No leaf has a low rank in both adapters: there are no angles between them.\n"
            f"  got: {_paths.listing(list(one))}; and {_paths.listing(list(two))}"
        )
    nothing = _why_no_angles(both, any(on.any() for on in shared.values()))
    grid = grid_of(
        {**one, **two, **{path: x for lora in (one, two) for path, x in lora.items() if isinstance(x, LowRank)}}
    )
    width, height, beside = grid.size()
    fig = figure(plt, figsize or (2 * min(max(0.75 * width, 2.2), 4.5) + beside + 2.2, 2 * (max(height, 1.4) + 0.9)))
    axes = fig.subplots(2, 2)
    overlaps = [{path: overlap(x, shared[path]) for path, x in side.items()} for side in sides]
    limits = (0.0, max(0.1, *(scale(x, 0.0)[1] for x in overlaps)))
    for ax, name, values in zip(axes[0], ("input", "output"), overlaps, strict=True):
        title, label = f"Overlap of the {name} spaces", r"mean $\cos^2\theta_i$"
        heat(ax, grid, values, title=title, label=label, limits=limits, absent="not low-rank in both")
    axes[0, 1].tick_params(labelleft=False)
    most = max(0.1, scale({path: np.abs(x) for path, x in cosine.items()}, 0.0)[1])
    heat(
        axes[1, 0], grid, cosine, title="Cosine of the updates", label=r"$\cos(\Delta W_1, \Delta W_2)$",
        limits=(-most, most), absent="not in both", colours="RdYlBu_r",
    )  # fmt: skip
    draw_angles(plt, axes[1, 1], sides, nothing)
    return fig


# --- what the arguments are ------------------------------------------------------------------------------------------


def _check_values(name: str, lora: Any, argument: str = "lora") -> None:
    """Raises if this is no adapter, or a factor has no value: a picture needs one."""
    check_lora(lora, name=argument)
    for path, x in lora.items():
        for leaf in jax.tree.leaves(x):
            if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
                raise TypeError(
                    f"jlora.plot.{name} draws values.\n  got: {type(leaf).__name__} in the adapter of '{shown(path)}'\n"
                    "  Call it outside of jit and vmap, with arrays."
                )


def _check_ax(plt: Any, ax: Any, figsize: Any) -> None:
    if ax is not None and not isinstance(ax, plt.axes.Axes):
        raise TypeError(f"ax must be the axes of a Matplotlib figure: fig.subplots().\n  got: {type(ax).__name__}")
    if ax is not None and figsize is not None:
        raise ValueError(
            "figsize is the size of a new figure, and ax part of one that exists.\n  Leave one of them out."
        )


def _base(name: str, lora: Lora, params: Any) -> dict[str, Any]:
    """The leaves of the base that are adapted, by path."""
    paths, leaves, _ = _paths.flatten(params)
    check_base(lora, paths, leaves)
    base = {path: w for path, w in zip(paths, leaves, strict=True) if path in lora}
    for path, w in base.items():
        if isinstance(w, jax.core.Tracer | jax.ShapeDtypeStruct):
            raise TypeError(
                f"jlora.plot.{name} needs the values of the base.\n  got: {type(w).__name__} at '{shown(path)}'"
            )
    return base


def _base_norm(x: Adapter, w: Any) -> np.ndarray:
    """The norm of each batch slice of a leaf of the base, as ``algebra.norms`` has them of its update."""
    batch = x.batch if isinstance(x, LowRank) else ()
    return np.asarray(_slice_norms(jnp.asarray(w), tuple(d for d in range(np.ndim(w)) if d not in batch)))


def _why_no_angles(both: Mapping[str, Comparison], shared: bool) -> str:
    """What a panel of angles says if it has none, though directions may be shared; raises if neither adapter has an update."""
    norms = {"one": [x.norm_one for x in both.values()], "two": [x.norm_two for x in both.values()]}
    fresh = [name for name, sizes in norms.items() if not any(np.any(x) for x in sizes if x is not None)]
    if len(fresh) == 2:
        raise ValueError(
            "Neither adapter has an update yet: there are no angles between them.\n"
            f"  got: {_paths.listing(list(both))}, all updates 0, as in a fresh adapter\n  Train at least one of them first."
        )
    if fresh:
        return f"'{fresh[0]}' has no update yet"
    return "not finite" if shared else "no low-rank leaf has\nan update in both"


@partial(jax.jit, static_argnums=1)
def _slice_norms(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    size = jnp.abs(w.astype(_jax.promote(w.dtype, jnp.float32)))
    return jnp.sqrt(jnp.sum(size * size, axis=axes))
