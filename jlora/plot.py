r"""Pictures of trained adapters: the norm of the update by layer, its spectra, two adapters compared by the angles between their spaces.

``import jlora.plot``; needs Matplotlib: ``pip install "jlora[plot]"``. Every function takes dicts from path to adapter and returns a
``matplotlib.figure.Figure`` that pyplot knows nothing of: no window opens, no setting changes. The numbers are those of ``jlora.algebra``;
nothing is written to disk (``fig.savefig``). Works on values, so not under ``jax.jit``.

A heat map has a row for each kind of weight and a column for each layer, read off the paths: the layer is the number of a part that
names a layer or block (``layers/3``, ``blocks_3``); else the first batch axis of a scanned leaf; else the first number that differs
between leaves that are alike (``Dense_0``, ``Dense_1``). Experts (further batch axes, or ``experts/5``) are thin rows of their kind. A leaf
without a layer is in a column of its own. Which leaves the base has, and the adapter has not, is known from its fingerprint.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil, log2, prod
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _jax, _paths, _svd, algebra
from jlora._adapters import Adapter, LowRank
from jlora._wrap import check_base, check_lora

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lora = Mapping[str, Adapter]
Size = tuple[float, float]

SMALL, TEXT, TITLE = 7, 8, 9  # points
LONG = 26  # characters of a name
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # between the numbers of layers
GAP = 0.5  # columns between the one without a layer and the first with
INK, GREY, BLACK, BLUE, ORANGE = "#333333", "#d0d0d0", "#000000", "#0072b2", "#d55e00"
LINES = 48  # spectra in one panel; more are drawn as bands
PANELS = 12  # of spectra; with more kinds of weight, those with the same last name share one


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
        The figure. Grey and crossed out: the base has the leaf, the adapter does not. White: the base has no such leaf. Black: the
        value is not finite (or relative to a weight of zeros).

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
    plt = _matplotlib()
    _check_values("norms", lora)
    _check_ax(plt, ax, figsize)
    if relative is None:
        relative = params is not None
    if relative and params is None:
        raise ValueError(
            "Norms relative to those of the base need the base.\n  Pass it: norms(lora, params), or relative=False."
        )
    base = {} if params is None else _base(lora, params)
    values = {path: np.asarray(x) for path, x in algebra.norms(lora, params).items()}
    if relative:
        with np.errstate(all="ignore"):  # a base of zeros: drawn as not finite
            values = {path: x / _base_norm(lora[path], base[path]) for path, x in values.items()}
    grid = _grid(lora)
    if ax is None:
        width, height, beside = grid.size()
        fig = _figure(plt, figsize or (width + beside + 1.3, height + 1.0))
        ax = fig.subplots()
    update = r"$\Vert\Delta W\Vert_F$"
    label = rf"{update} / $\Vert W\Vert_F$" if relative else f"{update}  (units of the weights)"
    _heat(
        ax,
        grid,
        values,
        title="Relative norm of the update" if relative else "Norm of the update",
        label=label,
        percent=relative,
    )
    return _root(ax)


def spectra(lora: Lora, *, figsize: Size | None = None) -> "Figure":
    r"""Draws the singular values of each update, relative to its largest, and the effective rank by layer and kind of weight.

    A panel for each kind of weight: a line for each leaf or slice, coloured by layer; the median and bands of quantiles if there are more
    than 48. The dotted line is the median effective rank. Kinds that have the same last name share a panel if there are more than 12.
    Values within the rounding of the largest are left out. Below, the heat map of ``jlora.algebra.effective_rank``.

    Args:
        lora: Adapters by path. Leaves trained outright have no spectrum and are left out.
        figsize: Size of the figure in inches; by default, what panels and cells need.

    Returns:
        The figure. The update of a fresh adapter is zero: it has no line, and effective rank 0.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: ``lora`` is no adapter, or holds a kind of one's own or no values.
        ValueError: the adapter is empty, or has no low-rank leaf.

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
    plt = _matplotlib()
    _check_values("spectra", lora)
    found = {path: np.asarray(x) for path, x in algebra.spectrum(lora).items()}
    if not found:
        raise ValueError(
            f"The adapter has no low-rank leaf, and so no spectrum.\n  got: {_paths.listing(list(lora))}, trained outright\n"
            "  Draw the norms: jlora.plot.norms(lora, params)."
        )
    lora = {path: lora[path] for path in found}
    ranks = {path: np.asarray(algebra.effective_rank(jnp.asarray(x))) for path, x in found.items()}
    ranks = {path: np.where(np.isfinite(found[path]).all(-1), x, np.nan) for path, x in ranks.items()}
    grid = _grid(lora)
    panels = _panels(grid, list(found))
    columns = min((4, 3, 5), key=lambda n: -len(panels) % n) if len(panels) > 4 else len(panels)
    lines = ceil(len(panels) / columns)
    width, height, beside = grid.size()
    # With one value in each panel, the panels' titles say what the heat map would.
    above, below = 1.55 * lines + 0.75, height + 1.0 if max(map(len, panels.values())) > 1 else 0.0
    wide = max(2.0 * columns + 1.2, (width + beside + 1.3) * (below > 0), 4.2)
    fig = _figure(plt, figsize or (wide, above + below))
    top, bottom = fig.subfigures(2, 1, height_ratios=(above, below)) if below else (fig, None)
    _draw_spectra(
        plt, top, top.subplots(lines, columns, sharex=True, sharey=True, squeeze=False), grid, panels, found, ranks
    )
    if bottom is not None:
        most = max(x.rank for x in lora.values() if isinstance(x, LowRank))
        label = f"effective rank (rank {most})" if len({x.shape[-1] for x in found.values()}) == 1 else "effective rank"
        _heat(bottom.subplots(), grid, ranks, title="Effective rank of the update", label=label, limits=_extent(ranks))
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
        The figure. Colours end at the largest value, but not below 0.1. Grey and crossed out: not in both adapters.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: an argument is no adapter, or holds a kind of one's own or no values.
        ValueError: no leaf has a low rank in both; the adapters are empty, belong to different bases, or split a leaf differently; a leaf
            is trained outright and ``params`` is not given.

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
    plt = _matplotlib()
    for lora in (one, two):
        _check_values("angles", lora)
    both = algebra.compare(one, two, params)
    cosine = {path: np.asarray(x.cosine) for path, x in both.items() if x.cosine is not None}
    shared = {path: _shared(one[path], two[path]) for path, x in both.items() if x.input_angles is not None}
    sides = [
        {path: np.where(on, np.cos(np.asarray(getattr(both[path], name))), np.nan) for path, on in shared.items()}
        for name in ("input_angles", "output_angles")
    ]
    if not sides[0]:
        raise ValueError(
            "No leaf has a low rank in both adapters: there are no angles between them.\n"
            f"  got: {_paths.listing(list(one))}; and {_paths.listing(list(two))}"
        )
    grid = _grid(
        {**one, **two, **{path: x for lora in (one, two) for path, x in lora.items() if isinstance(x, LowRank)}}
    )
    width, height, beside = grid.size()
    fig = _figure(plt, figsize or (2 * min(max(0.75 * width, 2.2), 4.5) + beside + 2.2, 2 * (max(height, 1.4) + 0.9)))
    axes = fig.subplots(2, 2)
    overlaps = [{path: _overlap(x, shared[path]) for path, x in side.items()} for side in sides]
    limits = (0.0, max(0.1, *(_extent(x)[1] for x in overlaps)))
    for ax, name, values in zip(axes[0], ("input", "output"), overlaps, strict=True):
        title, label = f"Overlap of the {name} spaces", r"mean $\cos^2\theta_i$"
        _heat(ax, grid, values, title=title, label=label, limits=limits, absent="not low-rank in both")
    axes[0, 1].tick_params(labelleft=False)
    most = max(0.1, *np.abs(_extent(cosine)))
    _heat(
        axes[1, 0], grid, cosine, title="Cosine of the updates", label=r"$\cos(\Delta W_1, \Delta W_2)$",
        limits=(-most, most), absent="not in both", colours="RdBu_r",
    )  # fmt: skip
    _draw_angles(plt, axes[1, 1], sides)
    return fig


# --- what the arguments are ------------------------------------------------------------------------------------------


def _matplotlib() -> Any:
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


def _check_values(name: str, lora: Any) -> None:
    """Raises if this is no adapter, or a factor has no value: a picture needs one."""
    check_lora(lora)
    for path, x in lora.items():
        for leaf in jax.tree.leaves(x):
            if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
                raise TypeError(
                    f"jlora.plot.{name} draws values.\n  got: {type(leaf).__name__} in the adapter of '{path}'\n"
                    "  Call it outside of jit and vmap, with arrays."
                )


def _check_ax(plt: Any, ax: Any, figsize: Any) -> None:
    if ax is not None and not isinstance(ax, plt.axes.Axes):
        raise TypeError(f"ax must be the axes of a Matplotlib figure: fig.subplots().\n  got: {type(ax).__name__}")
    if ax is not None and figsize is not None:
        raise ValueError(
            "figsize is the size of a new figure, and ax part of one that exists.\n  Leave one of them out."
        )


def _base(lora: Lora, params: Any) -> dict[str, Any]:
    """The leaves of the base that are adapted, by path."""
    paths, leaves, _ = _paths.flatten(params)
    check_base(lora, paths, leaves)
    base = {path: w for path, w in zip(paths, leaves, strict=True) if path in lora}
    for path, w in base.items():
        if isinstance(w, jax.core.Tracer | jax.ShapeDtypeStruct):
            raise TypeError(f"jlora.plot.norms needs the values of the base.\n  got: {type(w).__name__} at '{path}'")
    return base


def _base_norm(x: Adapter, w: Any) -> np.ndarray:
    """The norm of each batch slice of a leaf of the base, as ``algebra.norms`` has them of its update."""
    batch = x.batch if isinstance(x, LowRank) else ()
    return np.asarray(_slice_norms(jnp.asarray(w), tuple(d for d in range(np.ndim(w)) if d not in batch)))


@partial(jax.jit, static_argnums=1)
def _slice_norms(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    size = jnp.abs(w.astype(_jax.promote(w.dtype, jnp.float32)))
    return jnp.sqrt(jnp.sum(size * size, axis=axes))


# --- where a leaf is drawn -------------------------------------------------------------------------------------------

# A part of a path that is a number or ends with one: 3, blocks_3, block3; not w3, which is a name.
NUMBER = re.compile(r"(?:(.+)[_-]|(.*(?:layer|block)s?))?(\d+)", re.IGNORECASE)
LAYER = re.compile(r"(?!.*norm).*(layer|block).*|h", re.IGNORECASE)
EXPERT = re.compile(r".*expert.*", re.IGNORECASE)


class _Path(NamedTuple):
    """A path, and the numbers in it."""

    parts: list[str]
    at: list[int]  # the parts that have a number
    values: list[int]
    names: list[str]  # what each of them counts

    def kind(self, *but: int | None) -> str:
        """The path without the numbers that are named, by their place among numbers."""
        stars = {self.at[i]: self.parts[self.at[i]].rstrip("0123456789") + "*" for i in but if i is not None}
        return "/".join(stars.get(i, part) for i, part in enumerate(self.parts))

    def first(self, pattern: re.Pattern[str], but: int | None = None) -> int | None:
        """The first number that counts what the pattern names."""
        return next((i for i, name in enumerate(self.names) if i != but and pattern.fullmatch(name)), None)


def _read(path: str) -> _Path:
    parts = re.split(r"[/.]", path)
    found = [(i, m) for i, part in enumerate(parts) if (m := NUMBER.fullmatch(part))]
    names = [m[1] or m[2] or (parts[i - 1] if i else "") for i, m in found]
    return _Path(parts, [i for i, _ in found], [int(m[3]) for _, m in found], names)


class _Grid(NamedTuple):
    """The cells of a heat map: columns are layers, rows are the parts of kinds (one, or one for each expert)."""

    kinds: dict[str, int]  # name -> parts
    columns: list[int | None]
    where: dict[
        str, tuple[np.ndarray, np.ndarray]
    ]  # path -> rows and columns of its slices; of leaves not adapted, too
    by_batch: bool  # layers are slices of leaves

    def fill(self, values: Mapping[str, np.ndarray]) -> tuple[Any, np.ndarray]:
        """The cells' values, masked where there are none, and where there is a leaf without one."""
        shape = (sum(self.kinds.values()), len(self.columns))
        out: Any = np.ma.masked_all(shape, np.float64)
        leaf = np.zeros(shape, bool)
        for path, (rows, columns) in self.where.items():
            leaf[rows, columns] = True
            if path in values:
                out[rows, columns] = values[path].reshape(-1)
        return out, leaf & np.ma.getmaskarray(out)

    def names(self, path: str) -> list[str]:
        """The kind of each slice."""
        by_row = [name for name, n in self.kinds.items() for _ in range(n)]
        return [by_row[row] for row in self.where[path][0]]

    def layers(self, path: str) -> list[int | None]:
        """The layer of each slice."""
        return [self.columns[i] for i in self.where[path][1]]

    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Where columns and rows begin and end: the column without a layer stands apart, and experts are thin rows."""
        x = np.arange(len(self.columns) + 1.0)
        if self.apart:
            x = np.concatenate([[0.0, 1.0], x[1:] + GAP])
        heights = [min(n, 1 + log2(n)) / n for n in self.kinds.values() for _ in range(n)]
        return x, np.concatenate([[0.0], np.cumsum(heights)])

    @property
    def apart(self) -> bool:
        """Whether there is a column without a layer beside columns with."""
        return self.columns[0] is None and len(self.columns) > 1

    @property
    def roomy(self) -> bool:
        """Whether values can be written into cells."""
        return len(self.columns) <= 8 and set(self.kinds.values()) == {1} and len(self.kinds) <= 16

    def size(self) -> tuple[float, float, float]:
        """Inches that the cells need, and the names of kinds beside them."""
        x, y = self.edges()
        cell = 0.55 if self.roomy else min(0.2, 8.0 / x[-1])
        return max(1.5, cell * x[-1]), max(1.3, min(0.22 * y[-1], 12.0)), 0.068 * max(map(len, self.kinds)) + 0.25


class _Leaf(NamedTuple):
    """A leaf to draw, adapted or not."""

    path: _Path
    template: str  # the path without any number
    sizes: list[int]  # of its batch axes


class _Cells(NamedTuple):
    """Where the slices of a leaf are drawn."""

    kind: str
    layers: list[int | None]
    parts: list[int]


def _grid(lora: Lora) -> _Grid:
    """Finds layer, kind and part of each leaf of ``lora``, and of the leaves of its base that are of the same kinds."""
    cells, by_batch = _cells(_leaves(lora))
    adapted = dict.fromkeys(cells[path].kind for path in lora)
    cells = {path: cell for path, cell in cells.items() if cell.kind in adapted}
    single = {cell.kind: set(cell.layers) == {None} for cell in cells.values()}
    kinds = sorted(adapted, key=lambda kind: single[kind])
    parts = [max(1 + max(cell.parts, default=0) for cell in cells.values() if cell.kind == kind) for kind in kinds]
    starts = dict(zip(kinds, np.cumsum([0, *parts]).tolist(), strict=False))
    columns = sorted({i for cell in cells.values() for i in cell.layers}, key=lambda i: -1 if i is None else i)
    place = {layer: i for i, layer in enumerate(columns)}
    where = {
        path: (np.array(cell.parts, int) + starts[cell.kind], np.array([place[i] for i in cell.layers], int))
        for path, cell in cells.items()
    }
    return _Grid(dict(zip(_short(kinds, single), parts, strict=True)), columns, where, by_batch)


def _leaves(lora: Lora) -> dict[str, _Leaf]:
    """The leaves of ``lora``, then those of its base that differ from one of them by numbers only."""
    leaves: dict[str, _Leaf] = {}
    axes: dict[str, tuple[int, ...]] = {}
    for path, x in lora.items():
        p = _read(path)
        batch = x.batch if isinstance(x, LowRank) else ()
        leaves[path] = _Leaf(p, p.kind(*range(len(p.at))), [x.shape[d] for d in batch])
        axes[leaves[path].template] = batch or axes.get(leaves[path].template, ())
    for path, shape, _ in next(iter(lora.values())).base.leaves:
        p = _read(path)
        template = p.kind(*range(len(p.at)))
        if path not in lora and template in axes and len(shape) > max(axes[template], default=-1):
            leaves[path] = _Leaf(p, template, [shape[d] for d in axes[template]])
    return leaves


def _cells(leaves: Mapping[str, _Leaf]) -> tuple[dict[str, _Cells], bool]:
    """Where each leaf is drawn, and whether layers are slices of leaves."""
    alike: dict[str, list[_Leaf]] = defaultdict(list)
    for leaf in leaves.values():
        alike[leaf.template].append(leaf)
    at = {template: same[0].path.first(LAYER) for template, same in alike.items()}
    # The one batch axis of experts is no stack of layers.
    stacked = {
        template
        for template, same in alike.items()
        if at[template] is None and len(same[0].sizes) > bool(EXPERT.search(template))
    }
    if not stacked:  # beside a stack of layers, a number that differs tells weights of one layer apart
        at = {template: _differs(alike[template]) if i is None else i for template, i in at.items()}
    cells = {}
    for name, (path, template, sizes) in leaves.items():
        i = at[template]
        expert = path.first(EXPERT, but=i)
        layers: list[int | None] = [None if i is None else path.values[i]]
        if template in stacked and sizes:
            layers, sizes = list(range(sizes[0])), sizes[1:]
        n = prod(sizes)
        first = 0 if expert is None else n * path.values[expert]
        cells[name] = _Cells(
            path.kind(i, expert),
            [layer for layer in layers for _ in range(n)],
            [*range(first, first + n)] * len(layers),
        )
    return cells, bool(stacked)


def _differs(leaves: Sequence[_Leaf]) -> int | None:
    """The first number in which leaves differ that differ by numbers only."""
    columns = zip(*(leaf.path.values for leaf in leaves), strict=True)
    return next((i for i, values in enumerate(columns) if len(set(values)) > 1), None)


def _short(kinds: Sequence[str], single: Mapping[str, bool]) -> list[str]:
    """Names for the kinds: without what all of those with layers (or without) have in common, and without the layer itself."""
    names: dict[str, str] = {}
    for group in ([k for k in kinds if not single[k]], [k for k in kinds if single[k]]):
        split = [k.split("/") for k in group]
        bare = [_uncounted(parts) or parts for parts in split]
        if len({tuple(parts) for parts in bare}) == len(split):
            split = bare
        common = set.intersection(*map(set, split)) if len(split) > 1 else set(split[0][:-2]) if split else set()
        bare = [[part for part in parts if part not in common] or parts[-1:] for parts in split]
        if len({tuple(parts) for parts in bare}) == len(split):
            split = bare
        names |= {kind: "/".join(parts) for kind, parts in zip(group, split, strict=True)}
    times = Counter(names.values())
    names = {kind: name if times[name] == 1 else kind for kind, name in names.items()}
    return _all_cut([names[kind] for kind in kinds], LONG)


def _uncounted(parts: Sequence[str]) -> list[str]:
    """The parts of a kind without those that only hold a number, ``layers`` and ``*`` or ``blocks_*``; experts keep their name."""
    out = []
    for part, after in zip(parts, [*parts[1:], ""], strict=True):
        name = part.rstrip("*").rstrip("_-")
        if name and (("*" not in part and after != "*") or EXPERT.fullmatch(name)):
            out.append(name)
    return out


def _all_cut(names: Sequence[str], length: int) -> list[str]:
    """The names without their first parts, where they are too long, since the last ones say more; whole if that is not unique."""
    cut = []
    for name in names:
        parts = name.split("/")
        while len(parts) > 1 and len(name) > length:
            parts = parts[1:]
            name = "/".join(["…", *parts])
        cut.append(name if len(name) <= length else f"…{name[1 - length :]}")
    return cut if len(set(cut)) == len(cut) else list(names)


# --- drawing ---------------------------------------------------------------------------------------------------------


def _figure(plt: Any, size: Size) -> Any:
    return plt.figure.Figure(figsize=size, layout="constrained")


def _root(ax: Any) -> Any:
    """The figure that the axes are on, in whatever part of it."""
    fig = ax.figure
    while fig is not fig.figure:
        fig = fig.figure
    return fig


def _extent(values: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """The lowest and the highest of all finite values."""
    every = np.concatenate([x.reshape(-1) for x in values.values()])
    every = every[np.isfinite(every)]
    return (float(every.min()), float(every.max())) if every.size else (0.0, 0.0)


def _heat(
    ax: Any,
    grid: _Grid,
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
    plt = _matplotlib()
    data, crossed = grid.fill(values)
    broken = ~np.ma.getmaskarray(data) & ~np.isfinite(data.filled(0.0))
    x, y = grid.edges()
    if grid.apart:  # a gap after the column without a layer
        data, crossed, broken = (_gap(cells) for cells in (data, crossed, broken))
    low, high = limits or (0.0, _extent(values)[1])
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


def _rule(ax: Any, grid: _Grid, x: np.ndarray, y: np.ndarray) -> None:
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


def _ticks(ax: Any, grid: _Grid, x: np.ndarray, y: np.ndarray) -> None:
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


# --- spectra and angles ----------------------------------------------------------------------------------------------


def _panels(grid: _Grid, paths: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
    """The slices of each panel, as path and index: by kind, or by the last part of its name, or all in one."""
    for name in (lambda kind: kind, lambda kind: kind.split("/")[-1], lambda kind: "all"):
        panels: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for path in paths:
            for i, kind in enumerate(grid.names(path)):
                panels[name(kind)].append((path, i))
        if len(panels) <= PANELS:
            break
    return panels


def _draw_spectra(plt: Any, fig: Any, axes: Any, grid: _Grid, panels: Any, found: Any, ranks: Any) -> None:
    """A panel for each group of slices: lines coloured by layer, or bands."""
    layers = [i for i in grid.columns if i is not None]
    colours = plt.cm.ScalarMappable(plt.colors.Normalize(min(layers, default=0), max(layers, default=1)), _dark(plt))
    most, lowest = max(x.shape[-1] for x in found.values()), 0.1
    bands = max(map(len, panels.values())) > LINES
    names = [name if len(name) <= 20 else f"…{name[-19:]}" for name in _all_cut(list(panels), 20)]
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


def _shared(one: Any, two: Any) -> np.ndarray:
    """Which of the principal angles of two updates are between directions that both have; shape of the angles."""
    live = [
        np.asarray(_svd.live(s) | ~jnp.isfinite(s)).sum(axis=-1, keepdims=True) for s in (_values(one), _values(two))
    ]
    return np.arange(min(one.rank, two.rank, _svd.smaller_side(one))) < np.minimum(*live)


def _values(x: LowRank) -> jax.Array:
    return algebra.spectrum({"": x})[""]


def _overlap(cosines: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """The mean square of the cosines of shared directions; 0 if there are none."""
    squares = np.where(shared, cosines, 0.0) ** 2
    return np.asarray(squares.sum(axis=-1) / np.maximum(1, shared.sum(axis=-1)))


def _draw_angles(plt: Any, ax: Any, sides: Sequence[Mapping[str, np.ndarray]]) -> None:
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
