r"""The algebra of one factored weight: what a view does to it, and its product with activations.

A weight that carries a low-rank update is kept as

$$W_{d_1 \dots d_n} + \sum_{\rho} a_{\{d\},\rho}\, b_{\{d\},\rho}$$

where each factor runs along *some* of the value's axes and along the rank axis $\rho$, and is constant along the others. Which axes a
factor runs along are its *labels*: for each axis of the array, the axis of the value it follows, or ``RANK``. So a transpose of the
weight relabels and moves nothing; an axis that both factors have is a batch axis (a layer of a scan, an expert); an axis that neither
has is one the update is constant along. Axes of size one are in no factor.

Products go through the rank: $x W + (x a) b$, never through $a b$. Nothing here knows about primitives or rules of adaptation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _jax
from jlora._labelled import RANK, Labels, apart_in_rank, arrange, contract, extend, in_rank, mesh_axes, transpose


class Branch(NamedTuple):
    """What the whole program knows of one adapted leaf.

    Attributes:
        path: Of the leaf.
        dropout: The rate of dropout on its adapter branch.
        only: The kind of use that the update is for, as ``LowRank.only``; empty for all.
    """

    path: str
    dropout: float = 0.0
    only: str = ""

    def takes(self, kind: str) -> bool:
        """Whether a use of this kind has the update; any other has the plain base."""
        return self.only in ("", kind)


_THIN = 4  # of weights that are hardly larger than their rank, factors may be larger than they are


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Factored:
    """A value ``w + Σ_rank a·b``, as a pytree, so that it passes through ``scan``, ``checkpoint`` and ``cond`` like any other.

    Attributes:
        w: The base at this point of the program (cast, transposed, sliced as the program did).
        parts: ``(a, b)``, and after them the dropout keys of the batch axes, if any: an array whose labels have no ``RANK``.
        labels: For each part, the label of each of its axes.
        branch: Static facts of the adapted leaf.
        picked: Which factor, 0 or 1, rows were picked of by an index, or a constant multiplied: if nothing multiplies the value, it is
            activations, such as rows of a table. ``None`` for what is nothing but a weight.
        scale: Of the update; it goes into a factor where a product needs it, so that of stacked layers only one slice is scaled at a time.
        looked_up: Whether it is rows that an argument picked, in floats of 8 bits, kept factored until the model casts them.
    """

    w: jax.Array
    parts: tuple[jax.Array, ...]
    labels: tuple[Labels, ...]
    branch: Branch
    picked: int | None = None
    scale: float = 1.0
    looked_up: bool = False

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.w, self.parts), (self.labels, self.branch, self.picked, self.scale, self.looked_up)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> "Factored":
        return cls(*children, *aux)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def map_parts(self, w: jax.Array, fn: Callable[[jax.Array, Labels], tuple[jax.Array, Labels]]) -> "Factored":
        """The value whose base is ``w`` and whose parts are ``fn(part, labels)``; axes that became of size one are dropped."""
        parts, labels = zip(
            *(_drop_units(*fn(p, ls)) for p, ls in zip(self.parts, self.labels, strict=True)), strict=True
        )
        return replace(self, w=w, parts=parts, labels=labels)

    def relabel(self, w: jax.Array, flow: Sequence[Labels]) -> "Factored":
        """The view whose axis ``j`` is the old axis ``flow[j][0]``, or new where ``flow[j]`` is empty."""
        new = {old: j for j, source in enumerate(flow) for old in source} | {RANK: RANK}
        return self.map_parts(w, lambda part, labels: (part, tuple(new[d] for d in labels)))

    def reshape(self, w: jax.Array, groups: Sequence[tuple[Labels, Labels]]) -> "Factored | None":
        """The reshaped value, or ``None`` where an axis of one factor would have to be merged with one of the other."""
        value = self
        for old, _ in groups:
            value = value._in_one(old)
            if value._split(old):
                return None

        def reshape_part(part: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
            wanted = [d for old, _ in groups if set(old) & set(labels) for d in old]
            return _reshape_part(*extend(part, labels, wanted, self.shape), groups, w)

        return value.map_parts(w, reshape_part)

    def _split(self, axes: Labels) -> list[int]:
        """The parts that have some of ``axes``, but not all along which the value varies."""
        constant = set(range(len(self.shape))).difference(*self.labels)
        return [i for i, ls in enumerate(self.labels) if set(axes) & set(ls) and not set(axes) <= {*ls, *constant}]

    def _in_one(self, axes: Labels) -> "Factored":
        """The same value with ``axes`` in one factor only, if that is still thin: what the other has of them goes into its rank.

        So layers that both have can be merged with the inputs, and an axis that a gain or a stack made. An output axis never can: the
        factor would be larger than the weight.
        """
        split = self._split(axes)
        if any(i > 1 for i in split):  # dropout keys
            return self
        thin = [x for i in split if (x := self._without(i, axes)) is not None]
        return min(thin, key=lambda x: sum(part.size for part in x.parts), default=self)

    def _without(self, i: int, axes: Labels) -> "Factored | None":
        """The same value with those of ``axes`` that factor ``i`` has in its rank, and in the other factor."""
        parts, labels = list(self.parts), list(self.labels)
        mine = [d for d in axes if d in labels[i]]
        size = (
            parts[1 - i].size
            * prod(self.shape[d] for d in mine)
            * prod(self.shape[d] for d in mine if d not in labels[1 - i])
        )
        if not set(mine) <= set(labels[1 - i]) and size > _THIN * self.w.size:
            return None
        parts[1 - i], labels[1 - i] = extend(parts[1 - i], labels[1 - i], mine, self.shape)
        parts[i], labels[i] = in_rank(parts[i], labels[i], mine)
        parts[1 - i], labels[1 - i] = apart_in_rank(parts[1 - i], labels[1 - i], mine)
        return replace(self, parts=tuple(parts), labels=tuple(labels))

    def gain(
        self, w: jax.Array, axes: Sequence[int], fn: Callable[[jax.Array, Labels], jax.Array]
    ) -> "Factored | None":
        """Applies ``fn``, a multiplication by something that varies along ``axes`` only, to one factor, if that stays thin."""
        constant = set(range(len(self.shape))).difference(*self.labels[:2])
        fits = [i for i in (1, 0) if set(axes) <= {*self.labels[i], *constant}]
        for i in fits or [i for i in (1, 0) if self._stays_thin(i, axes)]:
            parts, labels = list(self.parts), list(self.labels)
            part, labels[i] = extend(parts[i], labels[i], axes, self.shape)
            parts[i] = fn(part, labels[i])
            return replace(self, w=w, parts=tuple(parts), labels=tuple(labels))
        return None

    def _stays_thin(self, i: int, axes: Sequence[int]) -> bool:
        """Whether factor ``i`` is one still where it has ``axes`` too, as one that another gain made: one of the other it lacks."""
        new = [d for d in axes if d not in self.labels[i]]
        lacking = {d for d, n in enumerate(self.shape) if n > 1}.difference(self.labels[i], new)
        return bool(lacking) and self.parts[i].size * prod(self.shape[d] for d in new) <= _THIN * self.w.size

    @property
    def row(self) -> int | None:
        """The factor that makes the value activations, if any: ``picked``, or one that has no axis that the other has not."""
        return next((i for i in (0, 1) if {*self.labels[i]} <= {RANK, *self.labels[1 - i]}), self.picked)

    def rows(self, picked: int, use: int) -> jax.Array:
        """The value as activations, such as rows of a table that were picked along the axes of factor ``picked``.

        Made in the dtype the model computes in; dropout of the adapter branch acts on the factor that was picked.
        """
        parts, dtype = self.scaled().parts, _jax.thin_dtype(self.w.dtype)
        (p, pl), (q, ql) = ((parts[i].astype(dtype), self.labels[i]) for i in (picked, 1 - picked))
        out = tuple(range(len(self.shape)))
        t, labels = contract((self.dropout(p, use), pl), (q, ql), set(out), out, None, dtype, None)
        update = arrange(t, labels, out, self.shape)
        return (self.w.astype(dtype) + update).astype(self.w.dtype)

    def scaled(self) -> "Factored":
        """The same value with its scale in the second factor."""
        parts = (self.parts[0], self._times_scale(self.parts[1]), *self.parts[2:])
        return replace(self, parts=parts, scale=1.0)

    def _times_scale(self, part: jax.Array) -> jax.Array:
        return part if self.scale == 1.0 else part * jnp.asarray(self.scale, part.dtype)

    def unstack(self) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], "Factored"]]:
        """The arrays to scan over for a scan along axis 0, and the function that makes the value inside from one slice of each."""
        along = [0 in labels for labels in self.labels]
        moved = [
            jnp.moveaxis(p, ls.index(0), 0) if has else p
            for p, ls, has in zip(self.parts, self.labels, along, strict=True)
        ]
        labels = tuple(tuple(d - 1 if d > 0 else d for d in ls if d != 0) for ls in self.labels)

        def inside(slices: Sequence[jax.Array]) -> "Factored":
            w, *rest = slices
            sliced = iter(rest)
            parts = tuple(next(sliced) if has else part for part, has in zip(moved, along, strict=True))
            return replace(self, w=w, parts=parts, labels=labels)

        return [self.w, *(p for p, has in zip(moved, along, strict=True) if has)], inside

    def refold(self, step: jax.Array | int) -> "Factored":
        """The same value with dropout keys of its own for iteration ``step`` of a loop it does not change in."""
        if len(self.parts) < 3:
            return self
        keys = self.parts[2]
        fold = jax.random.fold_in
        for _ in range(keys.ndim):
            fold = jax.vmap(fold, in_axes=(0, None))
        return replace(self, parts=(*self.parts[:2], fold(keys, step)))

    def product(
        self, x: jax.Array, x_labels: Labels, out: Labels, shape: Sequence[int], use: int, **how: Any
    ) -> jax.Array:
        r"""The adapter's share of a contraction: $\sum x\, a\, b$ over all labels not in ``out``.

        Args:
            x: Activations; an axis contracted with axis ``d`` of the value, or matched to it as a batch axis, has label ``d``.
            x_labels: Labels of ``x``; its free axes have labels below ``RANK``.
            out: Labels of the result.
            shape: Shape of the result.
            use: Number of this use of the leaf in the program, for the dropout key.
            **how: ``dtype`` of the result and ``precision``; ``specs``, from ``mesh_axes``.

        Returns:
            Array of shape ``shape``.
        """
        dtype, precision, specs = how["dtype"], how["precision"], how["specs"]
        compute = _jax.thin_dtype(x.dtype, self.w.dtype)
        t, labels = self.dropout(x.astype(compute), use), x_labels
        todo = list(zip(self.parts[:2], self.labels[:2], strict=True))
        while todo:
            keep = [set(out).union(*(ls for _, ls in todo[:i] + todo[i + 1 :])) for i in range(len(todo))]
            # The factor that sums away most of the activations goes first: that is what makes the product thin.
            size = [
                prod(n for n, d in zip(p.shape, ls, strict=True) if d in labels and d not in wanted)
                for (p, ls), wanted in zip(todo, keep, strict=True)
            ]
            i = size.index(max(size))
            part, part_labels = todo.pop(i)
            if todo:
                part, part_labels = self._first(part, part_labels, keep[i])
            order = out if not todo else None
            # What the model sums in a wider dtype, the thin product in between is kept in too.
            between = _jax.promote(compute, dtype) if todo else dtype
            t, labels = contract(
                (t, labels), (part.astype(t.dtype), part_labels), keep[i], order, precision, between, specs
            )
        return arrange(t, labels, out, shape)

    def _first(self, part: jax.Array, labels: Labels, keep: set[int]) -> tuple[jax.Array, Labels]:
        """The factor that meets the activations, with the scale, and the rank before the axes that are summed over.

        So its gradient is a thin product whose result lies as its operand does. XLA:CPU takes several times as long for the transpose of
        it, and the scale in between keeps it from turning the product round again.
        """
        first = [d for d in labels if d in keep and d != RANK]
        order = (*first, RANK, *(d for d in labels if d not in keep))
        return self._times_scale(transpose(part, [labels.index(d) for d in order])), order

    def dropout(self, x: jax.Array, use: int) -> jax.Array:
        """``x`` with dropout of the adapter branch, if it has a key; a new mask for each ``use``."""
        if len(self.parts) < 3:
            return x
        keys = self.parts[2]
        key = jax.random.fold_in(keys[(0,) * keys.ndim], use)
        for axis in sorted(_jax.varies(x), key=str):  # each shard of shard_map has activations of its own, and a mask
            key = jax.random.fold_in(key, lax.axis_index(axis))
        rate = self.branch.dropout
        keep = _jax.placed_like(jax.random.bernoulli(key, 1.0 - rate, x.shape), x)
        return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))

    def update(self, dtype: Any = None) -> jax.Array:
        """The update ``Σ_rank a·b`` as one dense array of the value's shape."""
        (a, b), (la, lb) = self.scaled().parts[:2], self.labels[:2]
        dense = tuple(range(len(self.shape)))
        specs = mesh_axes((a, la), (b, lb))
        dtype = dtype or _jax.promote(a.dtype, b.dtype)
        t, labels = contract((a, la), (b, lb), set(dense), dense, lax.Precision.HIGHEST, dtype, specs)
        return arrange(t, labels, dense, self.shape)

    def dense(self) -> jax.Array:
        """The value as one array, in the base's dtype; the sum is made in the wider dtype of the two."""
        update = self.update()
        return (self.w.astype(_jax.promote(self.w.dtype, update.dtype)) + update).astype(self.w.dtype)


def _drop_units(part: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
    units = [i for i, d in enumerate(labels) if d != RANK and part.shape[i] == 1]
    if not units:
        return part, labels
    return lax.squeeze(part, units), tuple(d for i, d in enumerate(labels) if i not in units)


def _reshape_part(
    part: jax.Array, labels: Labels, groups: Sequence[tuple[Labels, Labels]], w: jax.Array
) -> tuple[jax.Array, Labels]:
    of = {d: group for group in groups for d in group[0]}
    order: list[int] = []
    new: list[int] = []
    for d in labels:
        if d == RANK:
            order.append(d)
            new.append(d)
        elif d not in order:
            order.extend(of[d][0])
            new.extend(of[d][1])
    rank = dict(zip(labels, part.shape, strict=True)).get(RANK)
    sizes = [rank if d == RANK else w.shape[d] for d in new]
    spec = dict(enumerate(_jax.mesh_spec(w) or ()))
    sharding = _jax.explicit_sharding([spec.get(d) for d in new], part)
    return lax.reshape(transpose(part, [labels.index(d) for d in order]), sizes, out_sharding=sharding), tuple(new)
