r"""How a leaf's axes lie in a PyTorch weight, and its factors in PEFT's ``lora_A`` and ``lora_B``: both ways, by the leaf's own axes.

A leaf is flattened to a matrix, inputs times outputs, each in the order of its axes, and a PyTorch weight is that matrix transposed:
$W_{torch} = W^T$, so that $s\,B_{torch} A_{torch} = (s\,A B)^T$ with $A_{torch} = A^T$ and $B_{torch} = B^T$. What kinds of layers
differ in stands here; arrays are NumPy's.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np

from jlora._adapters import FullWeight, LowRank
from jlora._advice import Advised
from jlora._names import Place, Weight
from jlora._sites import Site
from jlora._text import counted, shown

Layer = Literal["linear", "embedding", "conv", "parameter"]


class Axes(NamedTuple):
    """What the axes of a leaf, or of a slice of it, are."""

    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...]
    use: str
    window: tuple[int, ...]
    groups: int
    dilated: bool = False

    @property
    def sizes(self) -> tuple[int, int]:
        """Inputs and outputs of the leaf as a matrix."""
        return prod(self.shape[d] for d in self.inputs), prod(self.shape[d] for d in self.outputs)

    @property
    def experts(self) -> int:
        """The number of slices."""
        return prod(self.shape[d] for d in self.batch)

    @property
    def channels(self) -> tuple[int, ...]:
        """The inputs that no window runs along."""
        return tuple(d for d in self.inputs if d not in self.window)

    def at(self, index: tuple[int, ...]) -> "Axes":
        """Of the slice at ``index`` along the first batch axes."""
        gone = self.batch[: len(index)] if self.batch else tuple(range(len(index)))
        new = {d: i for i, d in enumerate(d for d in range(len(self.shape)) if d not in gone)}

        def kept(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(new[d] for d in axes if d in new)

        shape = tuple(n for d, n in enumerate(self.shape) if d not in gone)
        roles = kept(self.inputs), kept(self.outputs), kept(self.batch)
        return self._replace(shape=shape, inputs=roles[0], outputs=roles[1], batch=roles[2], window=kept(self.window))


def axes_of(leaf: Site | LowRank | FullWeight) -> Axes:
    """The axes of a site or of an adapted leaf; a leaf that nothing multiplies has none."""
    use = leaf.kind if isinstance(leaf, Site) else leaf.use
    plain = isinstance(leaf, Site) and leaf.is_plain
    roles = ((), (), ()) if plain else (leaf.inputs, leaf.outputs, leaf.batch)
    dilated = not isinstance(leaf, FullWeight) and leaf.dilated  # which nothing asks of a whole weight
    return Axes(tuple(leaf.shape), *roles, use, leaf.window, leaf.groups, dilated)


def unknown(shape: tuple[int, ...]) -> Axes:
    """The axes of a leaf of which nobody told how it is used."""
    return Axes(tuple(shape), (), (), (), "", (), 1)


def slice_of(axes: Axes, index: tuple[int, ...]) -> tuple[Any, ...]:
    """What picks the slice of a leaf at ``index`` along its first batch axes (of a leaf without roles: along its first axes)."""
    along = dict(zip(axes.batch or range(len(index)), index, strict=False))
    return tuple(along.get(d, slice(None)) for d in range(len(axes.shape)))


def at(x: Any, axes: Axes, index: tuple[int, ...]) -> np.ndarray:
    """The slice of a leaf at ``index``."""
    return np.asarray(x[slice_of(axes, index)])


def layer_of(axes: Axes, place: Place) -> Layer:
    """As what PEFT wraps the weight at ``place``."""
    if len(axes.batch) > 1:
        raise ValueError(
            f"'{shown(place.path)}' has {len(axes.batch)} batch axes left beside '{shown(place.weight.name)}'; one can be experts.\n"
            "  Give the name an index {} for each of the others."
        )
    weight = place.weight
    if weight.nesting is not None and (axes.window or "lookup" in axes.use):
        raise ValueError(
            f"Weight('{shown(weight.name)}', nesting={weight.nesting}) says that PEFT adapts this parameter itself, which it does for "
            f"matrices and experts; '{shown(place.path)}' is used as {axes.use}.\n  Leave nesting out."
        )
    if axes.batch or weight.nesting is not None or not weight.name.endswith(".weight"):
        of_module = not axes.batch and not weight.name.endswith("weight")
        if of_module and place.path.split("/")[-1] in ("kernel", "embedding"):
            raise ValueError(
                f"The name '{shown(place.weight.name)}' of '{shown(place.path)}' does not end in '.weight': it is that of a "
                f"module, not of its parameter."
            )
        return "parameter"
    if axes.window:
        if place.weight.transposed:
            raise ValueError(
                f"PEFT has no factors for '{shown(place.path)}', a transposed convolution.\n  Merge it instead."
            )
        return "conv"
    return "embedding" if "lookup" in axes.use and (place.first or "linear" not in axes.use) else "linear"


# --- Factors: A (rank, inputs) and B (outputs, rank), of experts stacked in front -------------------------------------


def factor_shapes(axes: Axes, layer: Layer, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of PEFT's two tensors for a slice."""
    (i, o), n = axes.sizes, axes.experts
    if layer == "conv":
        kernel = tuple(axes.shape[d] for d in axes.window)
        return (rank, prod(axes.shape[d] for d in axes.channels), *kernel), (o, rank, *(1 for _ in kernel))
    if layer == "linear" and "lookup" in axes.use:  # the head that is tied to the table
        return (rank, o), (i, rank)
    return (rank * n, i), (o, rank * n)


def factors_to_peft(a: np.ndarray, b: np.ndarray, axes: Axes, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """``a: (*batch, *inputs, rank)`` and ``b: (*batch, rank, *outputs)`` of a slice as PEFT's two tensors."""
    rank = a.shape[-1]
    (i, o), n = axes.sizes, axes.experts
    if layer == "conv":
        order = [axes.inputs.index(d) for d in (*axes.channels, *axes.window)]
        a = a.transpose([len(axes.inputs), *order])
    elif layer == "parameter":
        a = a.reshape(n, i, rank).transpose(0, 2, 1)  # (experts, rank, inputs)
        b = b.reshape(n, rank, o).transpose(2, 1, 0)  # (outputs, rank, experts)
    else:
        a, b = a.reshape(i, rank).T, b.reshape(rank, o).T
        if layer == "linear" and "lookup" in axes.use:
            a, b = b.T, a.T
    if layer == "conv":
        b = b.reshape(rank, o).T
    shapes = factor_shapes(axes, layer, rank)
    return a.reshape(shapes[0]), b.reshape(shapes[1])


def factors_from_peft(x: np.ndarray, y: np.ndarray, axes: Axes, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of ``factors_to_peft``."""
    (i, o), n = axes.sizes, axes.experts
    inputs, outputs, batch = (tuple(axes.shape[d] for d in g) for g in (axes.inputs, axes.outputs, axes.batch))
    if layer == "conv":
        order = [axes.inputs.index(d) for d in (*axes.channels, *axes.window)]
        a = x.reshape(x.shape[0], *(inputs[d] for d in order)).transpose(
            [1 + order.index(d) for d in range(len(order))] + [0]
        )
        return a, y.reshape(o, -1).T.reshape(-1, *outputs)
    if layer == "parameter":
        a = x.reshape(n, -1, i).transpose(0, 2, 1)
        b = y.reshape(o, -1, n).transpose(2, 1, 0)
        return a.reshape(*batch, *inputs, -1), b.reshape(*batch, -1, *outputs)
    if layer == "linear" and "lookup" in axes.use:
        x, y = y.T, x.T
    return x.T.reshape(*inputs, -1), y.T.reshape(-1, *outputs)


def is_across(axes: Axes, weight: Weight, *, old: bool = False) -> bool:
    """Whether A of a parameter runs along its outputs: PEFT takes the last axis for the inputs, and up to 0.18 (``old``) that before."""
    if old and axes.batch:
        return weight.layout != "in_out"
    return weight.layout == "in_out" and not (weight.is_transposed and bool(axes.batch))


def turned(axes: Axes) -> Axes:
    """``axes`` with inputs and outputs exchanged."""
    return axes._replace(inputs=axes.outputs, outputs=axes.inputs)


def turned_factors(a: np.ndarray, b: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the transposed matrices."""
    return np.moveaxis(b, batch, -1), np.moveaxis(a, -1, batch)


def rotated(x: np.ndarray, axes: Sequence[int], heads: int | None, *, back: bool) -> np.ndarray:
    """Rotary pairs that lie side by side in each head, reordered to halves; ``back`` is the inverse.

    ``axes`` of ``x`` are, taken together, what PyTorch has as the weight's outputs, wherever these lie in its layout.
    """
    if heads is None:
        return x
    y = np.moveaxis(x, axes, range(len(axes)))
    sizes, rest = y.shape[: len(axes)], y.shape[len(axes) :]
    if prod(sizes) % (2 * heads):
        raise Advised(
            f"{counted(prod(sizes), 'row')} cannot be {counted(heads, 'head')} of rotary pairs.",
            "Correct Weight(rotary_heads=...).",
            "names",
            {"...": {"name": "...", "rotary_heads": "..."}},
        )
    split = (heads, 2, -1) if back else (heads, -1, 2)
    y = y.reshape(*split, prod(rest)).swapaxes(1, 2).reshape(*sizes, *rest)
    return np.moveaxis(y, range(len(axes)), axes)


def rotated_outputs(b: np.ndarray, heads: int | None, batch: int, *, back: bool) -> np.ndarray:
    """The same of a factor ``b: (*batch, rank, *outputs)``."""
    return rotated(b, range(batch + 1, b.ndim), heads, back=back)


# --- Whole weights ------------------------------------------------------------------------------------------------------


def _order(axes: Axes, weight: Weight) -> tuple[list[int], tuple[int, ...]]:
    """The order of a leaf's axes in the PyTorch weight, and that weight's shape."""
    (i, o), n = axes.sizes, axes.experts
    front = (n,) if axes.batch else ()
    if weight.transposed and not axes.window:
        raise ValueError(
            f"Weight('{shown(weight.name)}', transposed=...) is for a convolution, which the model here does not use it as."
        )
    if not axes.inputs:
        if not axes.use and len(axes.shape) > 1 and not weight.name.endswith((".bias", ".in_proj_bias")):
            raise Advised(
                f"How the axes of '{shown(weight.name)}' lie here, where it is {axes.shape}, is not known.",
                "Pass what tells: sites=jlora.sites(fn, params, x).",
                "sites",
            )
        flat = (prod(axes.shape),) if weight.name.endswith((".bias", ".in_proj_bias")) else axes.shape
        return list(range(len(axes.shape))), flat
    if axes.window:
        kernel = tuple(axes.shape[d] for d in axes.window)
        channels = prod(axes.shape[d] for d in axes.channels)
        if _is_transposed(axes, weight):
            return [*axes.channels, *axes.outputs, *axes.window], (channels, o, *kernel)
        return [*axes.outputs, *axes.channels, *axes.window], (o, channels, *kernel)
    if "lookup" in axes.use or weight.layout == "in_out":
        return [*axes.batch, *axes.inputs, *axes.outputs], (*front, i, o)
    return [*axes.batch, *axes.outputs, *axes.inputs], (*front, o, i)


def _is_transposed(axes: Axes, weight: Weight) -> bool:
    """Whether a kernel is that of a transposed convolution in PyTorch: what was said, since with stride 1 nothing else tells."""
    if axes.groups < 0 or (weight.transposed and axes.groups > 1):
        raise ValueError(
            f"'{shown(weight.name)}' is a transposed convolution in groups, whose kernel is made up otherwise in PyTorch.\n"
            "  Leave it out: names={path: ()}."
        )
    if axes.groups == 0 and not weight.transposed:
        raise ValueError(
            f"'{shown(weight.name)}' is a transposed convolution, whose kernel lies differently in PyTorch.\n"
            f"  Say how: names={{path: Weight('{shown(weight.name)}', transposed='reversed')}} as in Flax, 'as_is' with "
            f"transpose_kernel=True."
        )
    return weight.transposed is not None


def _reversed(x: np.ndarray, axes: Axes, weight: Weight) -> np.ndarray:
    """A PyTorch weight with its window the other way round, where it is."""
    return np.flip(x, tuple(range(-len(axes.window), 0))) if weight.transposed == "reversed" else x


def to_torch(x: np.ndarray, axes: Axes, weight: Weight) -> np.ndarray:
    """A whole leaf, or a slice of it, as the PyTorch weight."""
    order, shape = _order(axes, weight)
    x = rotated(x, _rows(axes, shape), weight.rotary_heads, back=False)
    return _reversed(np.ascontiguousarray(x.transpose(order)).reshape(shape), axes, weight)


def from_torch(x: np.ndarray, axes: Axes, weight: Weight) -> np.ndarray:
    """The inverse of ``to_torch``."""
    order, shape = _order(axes, weight)
    x = _reversed(x, axes, weight).reshape([axes.shape[d] for d in order])
    x = x.transpose([order.index(d) for d in range(len(order))])
    return rotated(x, _rows(axes, shape), weight.rotary_heads, back=True)


def _rows(axes: Axes, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a leaf that are the outputs of its weight; where no product tells, all of a vector (a bias), the first of others."""
    every = tuple(range(len(axes.shape)))
    return axes.outputs if axes.inputs else every if len(shape) == 1 else every[:1]


def torch_shape(axes: Axes, weight: Weight) -> tuple[int, ...]:
    """The shape of the PyTorch weight."""
    return _order(axes, weight)[1]
