"""Ways to train a Llama on one GPU, for ``benchmarks.gpu``.

The model is plain JAX with its blocks scanned and rematerialised; ``project`` makes every linear map but the head, so that LoRA written
into it by hand and the model that jlora adapts are one piece of code.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import jlora
from benchmarks import llama_shapes

RANK, ALPHA = 16, 32.0
SCALE = ALPHA / RANK
WARM_UP = 3


class Case(NamedTuple):
    """A model, and the tokens of one step of it."""

    shape: llama_shapes.Shape
    batch: int
    length: int


CASES = {
    "tiny": Case(llama_shapes.SHAPES["tiny"], batch=4, length=64),
    "1B": Case(llama_shapes.SHAPES["1B"], batch=4, length=2048),
    "7B": Case(llama_shapes.Shape(32, 4096, 11008, 32, 32, 128, 32000), batch=4, length=2048),
}


def kernels(shape: llama_shapes.Shape) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear map of a block."""
    d, f, h, kv = shape.width, shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {"q": (d, h), "k": (d, kv), "v": (d, kv), "o": (h, d), "gate": (d, f), "up": (d, f), "down": (f, d)}


def base(shape: llama_shapes.Shape, dtype: Any) -> dict[str, Any]:
    """Random weights, each made on the device layer by layer, so that making them takes less memory than a step."""
    keys = iter(jax.random.split(jax.random.key(0), 16))

    @partial(jax.jit, static_argnums=1)
    def fill(key: jax.Array, size: tuple[int, ...]) -> jax.Array:
        if len(size) == 3:
            return lax.map(lambda key: fill(key, size[1:]), jax.random.split(key, size[0]))
        return jax.random.normal(key, size, dtype) * jnp.asarray(size[0] ** -0.5, dtype)

    layers = {name: fill(next(keys), (shape.layers, *size)) for name, size in kernels(shape).items()}
    gains = {name: jnp.ones((shape.layers, shape.width), dtype) for name in ("norm1", "norm2")}
    return {
        "embed": fill(next(keys), (shape.vocab, shape.width)) * jnp.asarray(shape.vocab**0.5, dtype),
        "layers": layers | gains,
        "norm": jnp.ones(shape.width, dtype),
        "head": fill(next(keys), (shape.width, shape.vocab)),
    }


# --- Linear maps: (activations, weights of the block, its factors, names) -> one result for each name -------------------


def plain(x: jax.Array, w: Any, lora: Any, *names: str) -> list[jax.Array]:
    del lora
    return [x @ w[name] for name in names]


def naive(x: jax.Array, w: Any, lora: Any, *names: str) -> list[jax.Array]:
    """As one writes it: the thin products on activations as they come, and the scale on their result."""
    factors = [(lora[name]["a"].astype(x.dtype), lora[name]["b"].astype(x.dtype)) for name in names]
    return [x @ w[name] + SCALE * ((x @ a) @ b) for name, (a, b) in zip(names, factors, strict=True)]


def flat(x: jax.Array, w: Any, lora: Any, *names: str, on_a: bool = False, shared: bool = False) -> list[jax.Array]:
    """The thin products on matrices ``(tokens, width)``, and the scale on the smaller factor.

    Args:
        x: Activations.
        w: The block's weights.
        lora: Their factors.
        *names: Of the weights.
        on_a: The scale is on A, not on B.
        shared: One product of the activations with all A that they meet.
    """
    scales = (SCALE, 1.0) if on_a else (1.0, SCALE)
    a, b = ([(s * lora[name][key]).astype(x.dtype) for name in names] for s, key in zip(scales, "ab", strict=True))
    rows = x.reshape(-1, x.shape[-1])
    if shared:
        thin = jnp.split(rows @ jnp.concatenate(a, axis=1), len(names), axis=1)
    else:
        thin = [rows @ one for one in a]
    updates = [t @ one for t, one in zip(thin, b, strict=True)]
    return [x @ w[name] + y.reshape(*x.shape[:-1], -1) for name, y in zip(names, updates, strict=True)]


def _sum(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    update = jnp.matmul(a.astype(w.dtype), b.astype(w.dtype), preferred_element_type=jnp.float32)
    return (w.astype(jnp.float32) + SCALE * update).astype(w.dtype)


@jax.custom_vjp
def formed(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """``x (W + s A B)`` with the sum formed, forward and again backward; the gradient of ``W`` never is."""
    return x @ _sum(w, a, b)


def _formed_forward(*args: jax.Array) -> tuple[jax.Array, Any]:
    return formed(*args), args


def _formed_backward(kept: Any, g: jax.Array) -> tuple[Any, ...]:
    x, w, a, b = kept
    rows, g_rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    scaled = (SCALE * b).astype(x.dtype)
    da = rows.T @ (g_rows @ scaled.T)
    db = (rows @ a.astype(x.dtype)).T @ g_rows
    return g @ _sum(w, a, b).T, None, da.astype(a.dtype), SCALE * db.astype(b.dtype)


formed.defvjp(_formed_forward, _formed_backward)


def summed_wide(x: jax.Array, w: Any, lora: Any, *names: str) -> list[jax.Array]:
    """As ``flat``, but both products reach the sum in fp32, and only that is rounded: for what rounding takes, not for time."""
    rows, wide = x.reshape(-1, x.shape[-1]), partial(jnp.matmul, preferred_element_type=jnp.float32)
    found = []
    for name in names:
        thin = rows @ lora[name]["a"].astype(x.dtype)
        y = wide(rows, w[name]) + wide(thin, (SCALE * lora[name]["b"]).astype(x.dtype))
        found.append(y.astype(x.dtype).reshape(*x.shape[:-1], -1))
    return found


def merged(x: jax.Array, w: Any, lora: Any, *names: str) -> list[jax.Array]:
    return [formed(x, w[name], lora[name]["a"], lora[name]["b"]) for name in names]


# --- The model --------------------------------------------------------------------------------------------------------


def norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    return (y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype) * gain


def rope(x: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 1e4 ** (-jnp.arange(half) / half)
    cos, sin = (f(angles)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def model(shape: llama_shapes.Shape, project: Callable[..., Any], attend: Callable[..., jax.Array]) -> Any:
    """``fn(params, lora, stream)``: from embedded tokens ``(batch, length, width)`` to logits."""

    # Inside a scan the recomputed values cannot be merged with the first ones, which is what prevent_cse is for.
    @partial(jax.checkpoint, prevent_cse=False)
    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        w, lora = layer
        y = norm(x, w["norm1"])
        q, k, v = (z.reshape(*z.shape[:2], -1, shape.head_dim) for z in project(y, w, lora, "q", "k", "v"))
        with jax.named_scope("attention"):
            mixed = attend(rope(q), rope(k), v)
        (o,) = project(mixed.reshape(*y.shape[:2], -1), w, lora, "o")
        x = x + o
        gate, up = project(norm(x, w["norm2"]), w, lora, "gate", "up")
        (down,) = project(jax.nn.silu(gate) * up, w, lora, "down")
        return x + down, None

    def fn(params: Any, lora: Any, x: jax.Array) -> jax.Array:
        x, _ = lax.scan(block, x, (params["layers"], lora))
        with jax.named_scope("head"):
            return norm(x, params["norm"]) @ params["head"]

    return fn


def attention(case: Case, dtype: Any) -> tuple[Callable[..., jax.Array], str]:
    """cuDNN's flash attention where it compiles, else XLA's; and which, and why."""
    xla, cudnn = (
        partial(jax.nn.dot_product_attention, is_causal=True, implementation=name) for name in ("xla", "cudnn")
    )
    if jax.default_backend() != "gpu":
        return xla, "xla"
    s = case.shape
    q, k = (jax.ShapeDtypeStruct((case.batch, case.length, n, s.head_dim), dtype) for n in (s.heads, s.kv_heads))
    try:
        jax.jit(jax.grad(lambda *x: cudnn(*x).astype(jnp.float32).sum(), (0, 1, 2))).lower(q, k, k).compile()
    except (RuntimeError, ValueError, NotImplementedError) as error:  # no cuDNN; shapes; dtype or device
        return xla, f"xla, for cudnn does not take it: {str(error).splitlines()[0]}"
    return cudnn, "cudnn"


# --- The ways ---------------------------------------------------------------------------------------------------------

JLORA, HAND, NAIVE, FULL, FLOOR = "jlora", "by hand, 2-D", "by hand, 3-D", "full fine-tuning", "floor"
SHARED, FORMED, ON_A = "by hand, A of q,k,v and gate,up in one", "by hand, W + s·A·B formed", "by hand, scale on A"
EAGER, COMPILED = "PEFT + torch, eager", "PEFT + torch, compiled"
PROJECTIONS = {
    HAND: flat,
    NAIVE: naive,
    SHARED: partial(flat, shared=True),
    ON_A: partial(flat, on_a=True),
    FORMED: merged,
}


class Way(NamedTuple):
    """``start(base, tokens)`` makes what is trained; ``logits(trained, base, tokens)`` is differentiated for it."""

    start: Callable[[Any, Any], Any]
    logits: Callable[[Any, Any, jax.Array], jax.Array]
    optimizer: optax.GradientTransformation = optax.adam(1e-4)


def by_layer(lora: Any) -> Any:
    """jlora's tree of adapters, or of their gradients, as the model by hand takes it."""
    return {path.removeprefix("layers/"): {"a": x.a, "b": x.b} for path, x in lora.items()}


def make_way(name: str, shape: llama_shapes.Shape, attend: Callable[..., jax.Array], dtype: Any) -> Way:
    """A way by its name in the tables."""
    fn = model(shape, plain, attend)

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        return fn(params, {}, params["embed"][tokens])

    def adapter(params: Any, tokens: Any) -> Any:
        sites = jlora.sites(forward, params, tokens)
        return jlora.init(jax.random.key(1), params, sites, jlora.LoRA(rank=RANK, alpha=ALPHA, targets="all-linear"))

    if name == JLORA:
        apply = jlora.wrap(forward)
        return Way(adapter, lambda trained, params, tokens: apply(params, trained, tokens))
    if name == FULL:  # fp32 weights and moments, products in bf16
        wide = partial(jax.tree.map, lambda x: x.astype(jnp.float32))
        narrow = partial(jax.tree.map, lambda x: x.astype(dtype))
        return Way(
            lambda params, tokens: wide(params), lambda trained, params, tokens: forward(narrow(trained), tokens)
        )
    if name == FLOOR:  # what is trained are the first activations
        return Way(
            lambda params, tokens: params["embed"][tokens],
            lambda trained, params, tokens: fn(params, {}, trained),
            optax.sgd(1e-6),
        )
    by_hand = model(shape, PROJECTIONS[name], attend)
    return Way(
        lambda params, tokens: by_layer(adapter(params, tokens)),
        lambda trained, params, tokens: by_hand(params, trained, params["embed"][tokens]),
    )


def objective(way: Way) -> Callable[..., jax.Array]:
    """The cross entropy of the next token, in fp32: ``(trained, base, tokens)``."""

    def loss(trained: Any, params: Any, tokens: jax.Array) -> jax.Array:
        logits = way.logits(trained, params, tokens[:, :-1])
        with jax.named_scope("head"):
            return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:]).mean()

    return loss


def step(way: Way) -> Callable[..., Any]:
    """One training step: ``(trained, state, base, tokens) -> (trained, state, loss)``."""

    def one(trained: Any, state: Any, params: Any, tokens: jax.Array) -> Any:
        value, grads = jax.value_and_grad(objective(way))(trained, params, tokens)
        with jax.named_scope("optimiser"):
            updates, state = way.optimizer.update(grads, state, trained)
            return optax.apply_updates(trained, updates), state, value

    return one
