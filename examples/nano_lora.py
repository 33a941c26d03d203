r"""Low-rank adaptation from first principles: the whole idea of jlora in one file, in JAX and nothing else.

    python examples/nano_lora.py        (some seconds on a CPU; nothing is downloaded)

The problem. A trained model has a weight W of shape (k, m), and is to learn something new. LoRA freezes W and learns a
thin update:

    W' = W + s·A·B        A: (k, r), random        B: (r, m), zero        r much smaller than k and m

B starts at zero, so at first W' is W and the model is what it was. Trained are r·(k + m) numbers in place of k·m.

Forming W' in the training step is correct, and a waste. The chain rule then reaches A and B through the gradient of W',
which is as large as W and costs as much to compute as ever. Multiply in another order, and it never exists:

    x·W' = x·W + s·(x·A)·B

Full training does three products of W's size for each weight: forward, gradient to x, gradient to W. Here the third is
gone: what is left costs 2/3 + r·(k + m)/(k·m) of the whole.

The method. Nobody should have to rewrite a model for that. JAX can show any function as a list of equations, its jaxpr,
and an interpreter of a few lines can run that list. Ours lets a value of the program be `Factored`: a weight and its
update side by side, never added up. However the weight reaches the place where it is used, cast or transposed, a rule
for each primitive does the right thing with the two factors; where there is no rule, the interpreter refuses.

Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

# --- The interpreter --------------------------------------------------------------------------------------------------


class Factored(NamedTuple):
    """The weight w + a·b of a running program. The scale s is already in b."""

    w: jax.Array  # (k, m)
    a: jax.Array  # (k, r)
    b: jax.Array  # (r, m)


def dot_general(eqn, x, f):
    """x·(w + a·b) = x·w + (x·a)·b, where one axis of x meets one axis of the weight."""
    (x_axes, w_axes), batch_axes = eqn.params["dimension_numbers"]
    if isinstance(x, Factored) or len(w_axes) != 1 or batch_axes != ((), ()):
        raise NotImplementedError("dot_general with a factored weight on the left, or not over exactly one axis of it")
    y = eqn.primitive.bind(x, f.w, **eqn.params)
    # Over axis 0 of w this is x·w: first a, which has that axis, then b. Over axis 1 it is x·wᵀ: first b, then a.
    # Either way the rank comes out as the last axis of the first product, and is axis `w_axes` of the second factor.
    first, second = (f.a, f.b) if w_axes == (0,) else (f.b, f.a)
    thin = lax.dot_general(x, first, ((x_axes, w_axes), ((), ())))  # (..., r)
    return y + lax.dot_general(thin, second, (((thin.ndim - 1,), w_axes), ((), ())))


RULES = {
    "dot_general": dot_general,
    # (w + a·b)ᵀ = wᵀ + bᵀ·aᵀ: the factors change places.
    "transpose": lambda eqn, f: Factored(f.w.T, f.b.T, f.a.T),
    # A cast of the sum is the sum of the casts, up to rounding.
    "convert_element_type": lambda eqn, f: Factored(*(v.astype(eqn.params["new_dtype"]) for v in f)),
    "jit": lambda eqn, *values: evaluate(eqn.params["jaxpr"], values),  # run in place; jit the whole instead
}


def evaluate(program, args):
    """Runs a traced function: every variable of the program gets a value in `env`, an array or a `Factored`."""
    jaxpr = program.jaxpr
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *args], strict=True))

    def read(v):
        return v.val if isinstance(v, Literal) else env[v]

    for eqn in jaxpr.eqns:
        name, values = eqn.primitive.name, [read(v) for v in eqn.invars]
        if not any(isinstance(v, Factored) for v in values):
            out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
        elif name in RULES:
            out = RULES[name](eqn, *values)
        else:  # To go on would be to form the weight, at full cost and in silence.
            raise NotImplementedError(f"{name} has no rule for a factored weight")
        env.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))
    return [read(v) for v in jaxpr.outvars]


def wrap(fn, scale):
    """Makes fn(params, *args) into apply(params, lora, *args), where lora = {name: (a, b)} for some names of params."""

    def apply(params, lora, *args):
        program, out = jax.make_jaxpr(fn, return_shape=True)(params, *args)
        entered = {k: Factored(w, lora[k][0], scale * lora[k][1]) if k in lora else w for k, w in params.items()}
        values = jax.tree.leaves((entered, *args), is_leaf=lambda v: isinstance(v, Factored))
        results = evaluate(program, values)
        if any(isinstance(v, Factored) for v in results):
            raise NotImplementedError("the function returns a factored weight")
        return jax.tree.unflatten(jax.tree.structure(out), results)

    return apply


def merge(params, lora, scale):
    """W + s·A·B for every adapted weight: what to ship when training is over."""
    return params | {k: params[k].astype(a.dtype) + scale * a @ b for k, (a, b) in lora.items()}


# --- A model that knows nothing of all this: a small transformer that sorts lists of digits ---------------------------

DIGITS, LENGTH, WIDTH, HEADS, BATCH, RANK, SCALE = 10, 8, 128, 4, 64, 4, 2.0
BLOCK = {**dict.fromkeys("qkvo", (WIDTH, WIDTH)), "up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
SHAPES = {"embed": (DIGITS, WIDTH), "place": (LENGTH, WIDTH)} | {f"{i}/{k}": BLOCK[k] for i in range(2) for k in BLOCK}


def random(key, shapes):
    keys = jax.random.split(key, len(shapes))
    return {n: jax.random.normal(k, shapes[n]) / shapes[n][0] ** 0.5 for k, n in zip(keys, shapes, strict=True)}


def norm(x):
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


@jax.jit
def model(params, digits):
    """Digits (n, LENGTH) to logits (n, LENGTH, DIGITS): for each place, the digit that belongs there."""
    p = {name: w.astype(jnp.float32) for name, w in params.items()}
    x = jax.nn.one_hot(digits, DIGITS) @ p["embed"] + p["place"]
    for i in range(2):
        q, k, v = ((norm(x) @ p[f"{i}/{name}"]).reshape(*x.shape[:2], HEADS, -1) for name in "qkv")
        attention = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", q, k) / q.shape[-1] ** 0.5)
        x = x + jnp.einsum("nhqk,nkhd->nqhd", attention, v).reshape(x.shape) @ p[f"{i}/o"]
        x = x + jax.nn.relu(norm(x) @ p[f"{i}/up"]) @ p[f"{i}/down"]
    return norm(x) @ p["embed"].T  # the embedding once more, transposed


def cross_entropy(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1))


def gradient(predict):
    return jax.grad(lambda weights, digits, labels: cross_entropy(predict(weights, digits), labels))


def train(predict, weights, rate, descending, steps=200):
    """Adam, with a rate that falls to zero, on a fresh batch of random lists at each step."""

    @jax.jit
    def step(i, weights, mean, square):
        digits = jax.random.randint(jax.random.key(i), (BATCH, LENGTH), 0, DIGITS)
        grads = gradient(predict)(weights, digits, jnp.sort(digits, descending=descending))
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
        square = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, square, grads)
        size = rate * (1 - i / steps) * jnp.sqrt(1 - 0.99 ** (i + 1)) / (1 - 0.9 ** (i + 1))
        return jax.tree.map(lambda w, m, v: w - size * m / (jnp.sqrt(v) + 1e-8), weights, mean, square), mean, square

    mean = square = jax.tree.map(jnp.zeros_like, weights)
    for i in range(steps):
        weights, mean, square = step(i, weights, mean, square)
    return weights


# --- The demonstration: it learned to sort upwards; teach it downwards ------------------------------------------------

if __name__ == "__main__":
    digits = jax.random.randint(jax.random.key(2**31), (BATCH, LENGTH), 0, DIGITS)
    digits = digits.at[0].set(jnp.array([3, 1, 4, 1, 5, 9, 2, 6]))
    labels = jnp.sort(digits, descending=True)

    trained = train(model, random(jax.random.key(0), SHAPES), rate=2e-3, descending=False)
    base = {name: w.astype(jnp.bfloat16) for name, w in trained.items()}  # as released models are; A and B stay float32
    before = {name: np.array(w) for name, w in base.items()}

    targets = [name for name in SHAPES if name != "place"]  # that one is added, and multiplied with nothing
    a = random(jax.random.key(1), {name: (SHAPES[name][0], RANK) for name in targets})
    fresh = {name: (a[name], jnp.zeros((RANK, SHAPES[name][1]))) for name in targets}
    factored = jax.jit(lambda lora, digits: wrap(model, SCALE)(base, lora, digits))
    formed = jax.jit(lambda lora, digits: model(merge(base, lora, SCALE), digits))
    lora = train(factored, fresh, rate=1e-2, descending=True)

    print("Sorting downwards, by a model that learned to sort upwards")
    start, adapted, merged = model(base, digits), factored(lora, digits), formed(lora, digits)
    for title, logits in (("base", start), ("adapted", adapted), ("merged", merged)):
        answer, loss = jnp.argmax(logits, axis=-1), cross_entropy(logits, labels)
        print(f"  {title:8} loss {loss:7.4f}   accuracy {jnp.mean(answer == labels):6.1%}   {digits[0]} -> {answer[0]}")
    print("a fresh adapter changes nothing, bit for bit:", np.array_equal(start, factored(fresh, digits)))
    print("the base is what it was, bit for bit:", all(np.array_equal(before[name], base[name]) for name in base))
    print(f"logits, merged and factored, differ by {jnp.max(abs(adapted - merged)):.0e} of {jnp.max(abs(merged)):.0f}")
    few, many = (sum(w.size for w in jax.tree.leaves(tree)) for tree in (lora, base))
    print(f"trained: {few:,} numbers, beside {many:,} frozen ones: {few / many:.1%}")

    print("flops of a gradient step, relative to full fine-tuning")
    ways = {"x·W": (model, trained), "x·(W + s·A·B)": (formed, lora), "x·W + s·(x·A)·B": (factored, lora)}
    programs = {way: jax.jit(gradient(fn)).lower(weights, digits, labels) for way, (fn, weights) in ways.items()}
    flops = {way: program.compile().cost_analysis()["flops"] for way, program in programs.items()}
    for way in ways:
        print(f"  {way:16} {flops[way] / flops['x·W']:.2f}")
