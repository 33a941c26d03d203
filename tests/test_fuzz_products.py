"""Random products: one primitive that uses a weight, with every parameter drawn, against the dense merge, in values and gradients.

Each primitive that carries numbers of axes is here: convolutions in any layout, ``dot_general``, ``ragged_dot_general``, ``gather``, and
views before a product. ``JLORA_FUZZ=5000`` runs that many programs instead of the fixed sample.
"""

import os
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax
from measure import computed_values

import jlora

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options of the compiler: most of the time goes into compiling."""
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


class Program(NamedTuple):
    """A function of ``{"w": weight}`` and arguments, the weight's shape and dtype, and what makes the arguments."""

    fn: Any
    shape: tuple[int, ...]
    dtype: Any
    args: Any
    seed: int
    text: str


def sizes(draw):
    """Draws sizes of axes: distinct primes, so that a shape names its axes, or small ones that coincide."""
    if draw(st.booleans()):
        left = list(draw(st.permutations(PRIMES[:6])))
        return lambda: left.pop() if left else draw(st.sampled_from(PRIMES))
    return lambda: draw(st.sampled_from([1, 2, 3, 4]))


def dtypes(draw):
    """Draws the dtypes of a weight and of activations, and one that the product is asked for."""
    return draw(
        st.sampled_from(
            [
                (jnp.float64, jnp.float64, None),
                (jnp.float64, jnp.float64, jnp.float64),
                (jnp.float32, jnp.float32, None),
                (jnp.float32, jnp.float32, jnp.float64),
                (jnp.float64, jnp.float64, jnp.float32),
            ]
        )
    )


PRECISION = (None, lax.Precision.HIGHEST, (lax.Precision.DEFAULT, lax.Precision.HIGHEST))


def view(draw, shape):
    """Draws a view of a value of ``shape``: what makes it, the new shape and its name."""
    axis = draw(st.integers(0, len(shape) - 1))
    order = tuple(draw(st.permutations(range(len(shape)))))
    low, high, inner = (draw(st.integers(low, 2)) for low in (-1, -1, 0))
    kind = draw(st.sampled_from(["none", "transpose", "reshape", "pad", "rev", "slice", "dynamic_slice", "broadcast"]))
    if kind == "transpose":
        return lambda w: lax.transpose(w, order), [shape[d] for d in order], f"transpose {order}"
    if kind == "reshape":  # merges two neighbours of an order of its own
        new = [shape[d] for d in order]
        at = draw(st.integers(0, len(shape) - 1))
        new[at : at + 2] = [int(np.prod(new[at : at + 2]))]
        return lambda w: lax.reshape(w, new, dimensions=order), new, f"reshape {new} of {order}"
    if kind == "pad":
        config = [(low, high, inner) if d == axis else (0, 0, 0) for d in range(len(shape))]
        new = [max(0, n + a + b + c * max(0, n - 1)) for n, (a, b, c) in zip(shape, config, strict=True)]
        return lambda w: lax.pad(w, jnp.zeros((), w.dtype), config), new, f"pad {config}"
    if kind == "rev":
        axes = sorted({axis, order[0]})
        return lambda w: lax.rev(w, axes), shape, f"rev {axes}"
    if kind == "slice":
        step = draw(st.integers(1, 2))
        return (
            lambda w: lax.slice_in_dim(w, 1 - (w.shape[axis] == 1), None, step, axis),
            [len(range(n > 1, n, step)) if d == axis else n for d, n in enumerate(shape)],
            f"slice by {step} of {axis}",
        )
    if kind == "dynamic_slice":
        size = draw(st.integers(1, shape[axis]))
        return (
            lambda w: lax.dynamic_slice_in_dim(w, 1, size, axis),
            [size if d == axis else n for d, n in enumerate(shape)],
            f"dynamic_slice {size} of {axis}",
        )
    if kind == "broadcast" and len(shape) < 4:
        new = [*shape[:axis], 2, *shape[axis:]]
        into = [d for d in range(len(new)) if d != axis]
        return lambda w: lax.broadcast_in_dim(w, new, into), new, f"broadcast {new}"
    return lambda w: w, shape, "no view"


@st.composite
def convolutions(draw):
    nd = draw(st.integers(1, 3))
    size, (dtype, _, wanted) = sizes(draw), dtypes(draw)
    specs = [tuple(draw(st.permutations(range(nd + 2)))) for _ in range(3)]
    if draw(st.booleans()):
        specs[2] = specs[0]
    grouped = draw(st.sampled_from(["", "", "feature", "batch"]))
    groups = draw(st.integers(2, 3)) if grouped else 1
    batch, inputs, outputs = size() * (groups if grouped == "batch" else 1), size(), size() * groups
    kernel = [draw(st.integers(1, 3)) for _ in range(nd)]
    image = [draw(st.integers(1, 7)) for _ in range(nd)]

    def each(low, high):
        return [draw(st.integers(low, high)) for _ in range(nd)]

    window = {
        "window_strides": each(1, 3),
        "padding": draw(
            st.one_of(
                st.sampled_from(["SAME", "VALID"]),
                st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 3)), min_size=nd, max_size=nd),
            )
        ),
        "lhs_dilation": each(1, 2) if draw(st.booleans()) else None,
        "rhs_dilation": each(1, 2) if draw(st.booleans()) else None,
    }
    how = {
        **window,
        "feature_group_count": groups if grouped == "feature" else 1,
        "batch_group_count": groups if grouped == "batch" else 1,
        "precision": draw(st.sampled_from(PRECISION)),
        "preferred_element_type": wanted,
    }

    def laid(spec, first, second, spatial):
        shape = [0] * (nd + 2)
        for d, n in zip(spec, (first, second, *spatial), strict=True):
            shape[d] = n
        return tuple(shape)

    x_shape = laid(specs[0], batch, inputs * (groups if grouped == "feature" else 1), image)
    w_shape = laid(specs[1], outputs, inputs, kernel)
    order = tuple(draw(st.permutations(range(nd + 2))))
    stored = tuple(np.take(w_shape, order))
    left, tied = (
        draw(st.sampled_from([False] * 7 + [True])),
        draw(st.sampled_from(["no", "no", "no", "after", "before"])),
    )
    tied = "no" if left else tied
    numbers = lax.ConvDimensionNumbers(*specs)
    turned = lax.ConvDimensionNumbers(specs[0], (specs[1][1], specs[1][0], *specs[1][2:]), specs[2])

    def fn(params, x, x2):
        w = lax.transpose(params["w"], np.argsort(order))
        if left:
            return lax.conv_general_dilated(w, x, dimension_numbers=numbers, **how)
        uses = [lambda: lax.conv_general_dilated(x, w, dimension_numbers=numbers, **how)]
        plain = how | {"feature_group_count": 1, "batch_group_count": 1}
        if tied != "no":  # a second use that sums over the outputs
            uses.append(lambda: lax.conv_general_dilated(x2, w, dimension_numbers=turned, **plain))
        return [use() for use in (uses[::-1] if tied == "before" else uses)]

    def args(normal):
        return normal(x_shape if not left else w_shape, dtype), normal(laid(specs[0], batch, outputs, image), dtype)

    shape = stored if not left else tuple(np.take(x_shape, order))
    return Program(
        fn,
        shape,
        dtype,
        args,
        draw(st.integers(0, 2**31)),
        f"conv x {x_shape} w {w_shape} stored as {shape} {numbers} {how} weight on the left: {left}, tied: {tied}",
    )


@st.composite
def products(draw):
    size, (dtype, x_dtype, wanted) = sizes(draw), dtypes(draw)
    stored = [size() for _ in range(draw(st.integers(1, 4)))]
    seen, shape, name = view(draw, stored)
    roles = [draw(st.sampled_from("cccbf")) if d else draw(st.sampled_from("cf")) for d in range(len(shape))]
    roles = draw(st.permutations(roles))
    wc, wb = ([d for d, r in enumerate(roles) if r == kind] for kind in "cb")
    wc, wb = draw(st.permutations(wc)), draw(st.permutations(wb))
    free = [("f", size()) for _ in range(draw(st.integers(0, 2)))]
    axes = draw(st.permutations([*(("c", d) for d in wc), *(("b", d) for d in wb), *free]))
    x_shape = [n if kind == "f" else shape[n] for kind, n in axes]
    xc, xb = ([axes.index((kind, d)) for d in dims] for kind, dims in (("c", wc), ("b", wb)))
    left = draw(st.booleans())
    numbers = ((wc, xc), (wb, xb)) if left else ((xc, wc), (xb, wb))
    how = {"precision": draw(st.sampled_from(PRECISION)), "preferred_element_type": wanted}

    def fn(params, x):
        w = seen(params["w"])
        return lax.dot_general(*((w, x) if left else (x, w)), numbers, **how)

    text = f"dot x {x_shape} w {stored} {name} {shape} {numbers} {how} weight on the left: {left}"
    return Program(
        fn, tuple(stored), dtype, lambda normal: (normal(x_shape, x_dtype),), draw(st.integers(0, 2**31)), text
    )


@st.composite
def ragged_products(draw):
    size, (dtype, x_dtype, wanted) = sizes(draw), dtypes(draw)
    groups, tokens = size(), draw(st.integers(1, 6))
    mode = draw(st.sampled_from(["tokens"] * 4 + ["contracted", "batch"]))
    n_batch, n_sum = (1 if mode == "batch" else draw(st.integers(0, 1))), draw(st.integers(1, 2))
    b, k = [size() for _ in range(n_batch)], [size() for _ in range(n_sum)]
    outs = [size() for _ in range(draw(st.integers(0, 2)))]
    if mode == "batch":
        b[0] = tokens
    if mode == "contracted":
        k[0] = tokens
    x_axes = [*(("b", i) for i in range(n_batch)), *(("k", i) for i in range(n_sum)), ("m", 0)]
    w_axes = [*x_axes[:-1], *(("n", i) for i in range(len(outs))), *([("g", 0)] if mode == "tokens" else [])]
    x_axes, w_axes = draw(st.permutations(x_axes)), draw(st.permutations(w_axes))
    letters = {"b": b, "k": k, "n": outs, "g": [groups], "m": [tokens if mode == "tokens" else size()]}
    x_shape, w_shape = ([letters[c][i] for c, i in axes] for axes in (x_axes, w_axes))
    order_b, order_k = draw(st.permutations(range(n_batch))), draw(st.permutations(range(n_sum)))

    def at(axes):
        return [axes.index(("k", i)) for i in order_k], [axes.index(("b", i)) for i in order_b]

    (xk, xb), (wk, wb) = at(x_axes), at(w_axes)
    along = {"tokens": ("m", 0), "contracted": ("k", 0), "batch": ("b", 0)}[mode]
    numbers = lax.RaggedDotDimensionNumbers(
        ((xk, wk), (xb, wb)), [x_axes.index(along)], [w_axes.index(("g", 0))] if mode == "tokens" else []
    )
    cuts = sorted(draw(st.integers(0, tokens)) for _ in range(groups))  # tokens after the last group are in none
    counts = np.diff([0, *cuts])
    left = mode != "tokens" and draw(st.booleans())
    how = {"precision": draw(st.sampled_from(PRECISION)), "preferred_element_type": wanted}

    def fn(params, x, counts):
        pair = (params["w"], x) if left else (x, params["w"])
        return lax.ragged_dot_general(*pair, counts, numbers, **how)

    def args(normal):
        return normal(w_shape if left else x_shape, x_dtype), jnp.asarray(counts, jnp.int32)

    text = f"ragged x {x_shape} w {w_shape} {counts} {numbers} {how} weight on the left: {left}"
    return Program(fn, tuple(x_shape if left else w_shape), dtype, args, draw(st.integers(0, 2**31)), text)


@st.composite
def lookups(draw):
    """Slices of a weight that indices pick, along any axes in any order; multiplied by activations or not."""
    size = sizes(draw)
    shape = [size() for _ in range(draw(st.integers(2, 4)))]
    ndim = len(shape)
    batched = draw(st.lists(st.integers(0, ndim - 1), unique=True, max_size=1))
    indexed = draw(
        st.lists(st.sampled_from([d for d in range(ndim) if d not in batched]), unique=True, min_size=1, max_size=2)
    )
    collapsed = sorted(d for d in indexed if draw(st.integers(0, 3)))
    lengths = [
        1 if d in collapsed or d in batched else draw(st.sampled_from([1, n])) if d in indexed else n
        for d, n in enumerate(shape)
    ]
    free = [size() for _ in range(draw(st.integers(0, 2)))]
    slots = draw(st.permutations([*(("b", d) for d in batched), *(("f", n) for n in free)]))
    index_shape = [shape[n] if kind == "b" else n for kind, n in slots]
    kept = [d for d in range(ndim) if d not in (*collapsed, *batched)]
    out = len(kept) + len(index_shape)
    offset = sorted(draw(st.permutations(range(out)))[: len(kept)])
    numbers = lax.GatherDimensionNumbers(
        tuple(offset),
        tuple(collapsed),
        tuple(indexed),
        tuple(batched),
        tuple(slots.index(("b", d)) for d in batched),
    )
    mode = draw(st.sampled_from(["clip", "fill", "promise_in_bounds"]))
    margin = 0 if mode == "promise_in_bounds" else 1
    highs = [shape[d] - lengths[d] for d in indexed]
    constant, multiplied = draw(st.booleans()), draw(st.booleans())
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    index = np.stack([rng.integers(-margin, h + 1 + margin, index_shape) for h in highs], axis=-1).astype(np.int32)
    letters = "abcdefgh"[:out]
    summed = [c for c in letters if draw(st.booleans())]

    def fn(params, x, i):
        how = {"mode": mode} | ({"fill_value": 0} if mode == "fill" else {})
        rows = lax.gather(params["w"], jnp.asarray(index) if constant else i, numbers, lengths, **how)
        if not multiplied:
            return rows
        return jnp.einsum(f"{letters},{''.join(summed)}z->{''.join(c for c in letters if c not in summed)}z", rows, x)

    made = jax.eval_shape(
        lambda w, i: lax.gather(w, i, numbers, lengths, mode=mode), jax.ShapeDtypeStruct(shape, jnp.float32), index
    )
    x_shape = [n for c, n in zip(letters, made.shape, strict=True) if c in summed] + [3]

    def args(normal):
        return normal(x_shape, jnp.float64), jnp.asarray(index)

    text = f"gather {shape} {numbers} {lengths} {mode} constant: {constant} summed: {summed if multiplied else None}"
    return Program(fn, tuple(shape), jnp.float64, args, seed, text)


def check(program: Program) -> bool:
    """Compares values and gradients with those of the dense merge, and counts; returns whether the weight stayed factored."""
    rng = np.random.default_rng(program.seed)

    def normal(shape, dtype=jnp.float64):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    params, args = {"w": normal(program.shape, program.dtype)}, program.args(normal)
    try:
        shapes = jax.eval_shape(program.fn, params, *args)
        jax.eval_shape(lambda p: jax.vjp(lambda p: program.fn(p, *args), p)[1](shapes), params)
    except (TypeError, ValueError, NotImplementedError):
        assume(False)  # JAX itself refuses it, or has no gradient of it
    assume(all(x.size for x in jax.tree.leaves((shapes, params, args))))
    sites = jlora.sites(program.fn, params, *args)
    kept = not sites.skipped
    assume(kept or len(program.shape) > 1)  # a vector takes no factors, dense or not
    rank = min(2, sites["w"].max_rank) if kept else 1
    rule = jlora.LoRA(rank=rank, targets="w", allow_dense=not kept)
    # Random numbers of each new shape would be compiled, which takes longer than the products.
    lora = jax.eval_shape(lambda key: jlora.init(key, params, sites, rule), jax.random.key(0))
    lora = jax.tree.map(lambda f: normal(f.shape, f.dtype), lora)
    weights = jax.tree.map(lambda x: normal(x.shape, x.dtype), shapes)
    apply = jlora.wrap(program.fn, dense="error" if kept else "allow")

    def total(run):
        def loss(lora, *args):
            terms = jax.tree.map(lambda y, w: (y * w).sum().astype(jnp.float64), run(lora, *args), weights)
            return sum(jax.tree.leaves(terms), jnp.zeros((), jnp.float64))

        return jax.value_and_grad(loss)

    ours = total(lambda lora, *args: apply(params, lora, *args))
    dense = total(lambda lora, *args: program.fn(jlora.merge(params, lora), *args))
    got, expected = jax.jit(lambda *args: (ours(*args), dense(*args)), compiler_options=QUICK)(lora, *args)
    compare(got, expected, 1e-8 if all_wide(program, shapes) else 1e-4)
    if kept:
        count(program, ours, dense, (lora, *args), (params, args, shapes))
    return kept


def all_wide(program, shapes):
    """Whether nothing is rounded to fp32."""
    return program.dtype == jnp.float64 and all(x.dtype == jnp.float64 for x in jax.tree.leaves(shapes))


def compare(got, expected, tol):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=0, atol=tol * max(1.0, float(np.abs(y).max())))


def count(program, ours, dense, args, values):
    """Where neither activations nor factors have a part of the kernel's shape, nothing of that shape is computed."""
    lora, *others = args
    kernel = Counter(n for n in program.shape if n > 1)
    thin = lora["w"].a.shape[-1] not in (1, *kernel)
    if kernel.total() < 2 or not thin or any(kernel <= Counter(x.shape) for x in jax.tree.leaves((others, values[2]))):
        return
    shapes = {program.shape}
    base = computed_values(jax.make_jaxpr(program.fn)(values[0], *others), shapes)
    got = computed_values(jax.make_jaxpr(ours)(*args), shapes)
    assert got <= base, f"{got} values of the kernel's shape, and {base} in the model"
    assert computed_values(jax.make_jaxpr(dense)(*args), shapes) > base  # the count can fail


KINDS = {
    "conv": (convolutions(), 20),
    "dot": (products(), 10),
    "ragged": (ragged_products(), 6),
    "gather": (lookups(), 6),
}
"""With how many programs of each make the sample."""
COUNT = int(os.environ.get("JLORA_FUZZ", "0"))


@pytest.mark.parametrize("kind", KINDS)
def test_any_product(kind):
    programs, sample = KINDS[kind]
    wanted = COUNT * sample // sum(n for _, n in KINDS.values())

    @settings(max_examples=wanted or sample, deadline=None, derandomize=not COUNT)
    @given(programs)
    def run(program):
        with jax.enable_x64(True):
            try:
                check(program)
            except Exception as error:
                error.add_note(program.text)
                raise

    run()
