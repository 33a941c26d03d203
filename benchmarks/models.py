"""The models whose training steps are measured, each as a table of layers and a function that calls them by name.

What a layer is made of is left open, so that one function is the plain model, LoRA written into it by hand, and the module of another
library: ``Linen`` takes any maker of layers, ``nnx_model`` makes modules of Flax's NNX. Shapes are those of models people adapt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

Call = Callable[..., jax.Array]
"""``call(name, x)`` applies a layer."""


class Layer(NamedTuple):
    """A layer: what it is, and its sizes.

    Kinds: ``dense`` (inputs, outputs, bias or not), ``conv`` (window, inputs, outputs, stride), ``embed`` (rows, width), ``layer_norm`` and
    ``rms_norm`` (width), ``group_norm`` (width, groups), ``table`` (shape: learned positions and the like).
    """

    kind: str
    sizes: tuple[Any, ...]
    adapted: bool = False


@dataclass(frozen=True, eq=False)
class Model:
    """A model and a batch of its data.

    Attributes:
        name: As in the tables.
        layers: By name.
        inputs: ``inputs(call, x)``: the first activations, up to where the first adapted layer can be.
        body: ``body(call, h)``: logits from there on.
        batch: ``batch(key)``: inputs and labels.
        about: Its size, in words.
        heads: Of its attention.
    """

    name: str
    layers: dict[str, Layer]
    inputs: Callable[[Call, jax.Array], jax.Array]
    body: Callable[[Call, jax.Array], jax.Array]
    batch: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    about: str
    heads: int = 0


# --- Layers as modules ------------------------------------------------------------------------------------------------


def linen_layer(layer: Layer, name: str) -> Any:
    """A layer as Flax writes it."""
    match layer.kind, layer.sizes:
        case "dense", (_, outputs, bias):
            return nn.Dense(outputs, use_bias=bias, name=name)
        case "conv", (window, _, outputs, stride):
            return nn.Conv(outputs, (window, window), stride, use_bias=False, name=name)
        case "embed", (rows, width):
            return nn.Embed(rows, width, name=name)
        case "layer_norm", _:
            return nn.LayerNorm(name=name)
        case "rms_norm", _:
            return nn.RMSNorm(name=name)
        case "group_norm", (_, groups):
            return nn.GroupNorm(groups, name=name)
    raise ValueError(layer.kind)


class Linen(nn.Module):
    """The model in Linen. ``make(layer, name)`` gives the module of each layer.

    ``start`` says what ``x`` is: ``"inputs"``, or ``"body"`` for the first activations.
    """

    model: Model
    make: Callable[[Layer, str], Any] = linen_layer

    @nn.compact
    def __call__(self, x, start="inputs"):
        made = {}

        def call(name, x=None, attend=False):
            layer = self.model.layers[name]
            if layer.kind == "table":
                return self.param(name, nn.initializers.normal(0.02), layer.sizes)
            if name not in made:
                made[name] = self.make(layer, name)
            return made[name].attend(x) if attend else made[name](x)

        if start == "inputs":
            x = self.model.inputs(call, x)
        return self.model.body(call, x)


class NNX(nnx.Module):
    """The model in NNX; adapted dense layers are ``nnx.LoRALinear``, for ``nnx.LoRA`` knows no others."""

    def __init__(self, model: Model, rank: int, rngs: nnx.Rngs):
        self.model = model
        for name, layer in model.layers.items():
            setattr(self, name, self._make(layer, rank, rngs))

    def _make(self, layer, rank, rngs):
        match layer.kind, layer.sizes:
            case "dense", (inputs, outputs, bias) if layer.adapted:
                return nnx.LoRALinear(inputs, outputs, lora_rank=rank, use_bias=bias, rngs=rngs)
            case "dense", (inputs, outputs, bias):
                return nnx.Linear(inputs, outputs, use_bias=bias, rngs=rngs)
            case "embed", (rows, width):
                return nnx.Embed(rows, width, rngs=rngs)
            case "layer_norm", (width,):
                return nnx.LayerNorm(width, rngs=rngs)
            case "rms_norm", (width,):
                return nnx.RMSNorm(width, rngs=rngs)
            case "table", shape:
                return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
        raise ValueError(layer.kind)

    def __call__(self, x):
        def call(name, x=None, attend=False):
            layer = getattr(self, name)
            if isinstance(layer, nnx.Variable):
                return layer[...]
            return layer.attend(x) if attend else layer(x)

        return self.model.body(call, self.model.inputs(call, x))


# --- The models -------------------------------------------------------------------------------------------------------


def heads(x: jax.Array, count: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], count, -1)


def attention(call: Call, block: int, x: jax.Array, count: int) -> jax.Array:
    """Of all positions to all, out of ``count`` heads."""
    q, k, v = (heads(call(f"{name}_{block}", x), count) for name in "qkv")
    return call(f"o_{block}", nn.dot_product_attention(q, k, v).reshape(x.shape))


def tokens(key: jax.Array, vocab: int, batch: int, length: int, labels: Any = None) -> tuple[jax.Array, jax.Array]:
    """Tokens, and as labels other tokens, or one of ``labels`` classes for each row."""
    one, two = jax.random.split(key)
    shape, classes = ((batch, length), vocab) if labels is None else ((batch,), labels)
    return jax.random.randint(one, (batch, length), 0, vocab), jax.random.randint(two, shape, 0, classes)


def images(key: jax.Array, batch: int, side: int, labels: int) -> tuple[jax.Array, jax.Array]:
    one, two = jax.random.split(key)
    return jax.random.normal(one, (batch, side, side, 3)), jax.random.randint(two, (batch,), 0, labels)


def dense(inputs: int, outputs: int, bias: bool = False) -> Layer:
    return Layer("dense", (inputs, outputs, bias), adapted=True)


def transformer(
    blocks: int = 4, width: int = 512, count: int = 8, vocab: int = 1000, batch: int = 8, length: int = 128
) -> Model:
    """Blocks of attention and MLP with layer norms before them; no positions, no biases."""
    layers = {
        "embed": Layer("embed", (vocab, width)),
        "norm": Layer("layer_norm", (width,)),
        "head": dense(width, vocab),
    }
    for i in range(blocks):
        layers |= {f"{name}_{i}": dense(width, width) for name in "qkvo"}
        layers |= {f"up_{i}": dense(width, 4 * width), f"down_{i}": dense(4 * width, width)}
        layers |= {f"norm{j}_{i}": Layer("layer_norm", (width,)) for j in (1, 2)}

    def body(call, x):
        for i in range(blocks):
            x = x + attention(call, i, call(f"norm1_{i}", x), count)
            x = x + call(f"down_{i}", nn.gelu(call(f"up_{i}", call(f"norm2_{i}", x))))
        return call("head", call("norm", x))

    about = f"{blocks} blocks, width {width}, {batch} x {length} tokens"
    return Model(
        "transformer",
        layers,
        lambda call, x: call("embed", x),
        body,
        partial(tokens, vocab=vocab, batch=batch, length=length),
        about,
        count,
    )


def rope(x: jax.Array, theta: float) -> jax.Array:
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def llama(
    blocks: int = 30,
    width: int = 576,
    hidden: int = 1536,
    count: int = 9,
    kv: int = 3,
    vocab: int = 49152,
    batch: int = 4,
    length: int = 64,
) -> Model:
    """SmolLM2-135M: RMS norms, rotary positions, grouped queries, gated MLP, a head tied to the embedding."""
    dim = width // count
    layers = {"embed": Layer("embed", (vocab, width)), "norm": Layer("rms_norm", (width,))}
    for i in range(blocks):
        layers |= {f"q_{i}": dense(width, width), f"o_{i}": dense(width, width)}
        layers |= {f"{name}_{i}": dense(width, kv * dim) for name in "kv"}
        layers |= {f"{name}_{i}": dense(width, hidden) for name in ("gate", "up")} | {f"down_{i}": dense(hidden, width)}
        layers |= {f"norm{j}_{i}": Layer("rms_norm", (width,)) for j in (1, 2)}

    def body(call, x):
        for i in range(blocks):
            h = call(f"norm1_{i}", x)
            q, k, v = (heads(call(f"{name}_{i}", h), n) for name, n in (("q", count), ("k", kv), ("v", kv)))
            mixed = jax.nn.dot_product_attention(rope(q, 1e5), rope(k, 1e5), v, is_causal=True)
            x = x + call(f"o_{i}", mixed.reshape(x.shape))
            h = call(f"norm2_{i}", x)
            x = x + call(f"down_{i}", nn.silu(call(f"gate_{i}", h)) * call(f"up_{i}", h))
        return call("embed", call("norm", x), attend=True)

    about = (
        f"SmolLM2-135M's shape, {batch} x {length} tokens"
        if blocks == 30
        else f"{blocks} blocks, width {width}, {batch} x {length} tokens"
    )
    return Model(
        "Llama",
        layers,
        lambda call, x: call("embed", x),
        body,
        partial(tokens, vocab=vocab, batch=batch, length=length),
        about,
        count,
    )


def bert(
    blocks: int = 6,
    width: int = 384,
    hidden: int = 1536,
    count: int = 12,
    vocab: int = 30522,
    batch: int = 16,
    length: int = 128,
) -> Model:
    """MiniLM-L6: layer norms after the blocks, biases, learned positions, a pooler and a classifier that are not adapted."""
    plain = lambda *sizes: Layer("dense", (*sizes, True))  # noqa: E731
    layers = {
        "words": Layer("embed", (vocab, width)),
        "positions": Layer("table", (512, width)),
        "types": Layer("table", (2, width)),
        "norm": Layer("layer_norm", (width,)),
        "pooler": plain(width, width),
        "classifier": plain(width, 2),
    }
    for i in range(blocks):
        layers |= {f"{name}_{i}": dense(width, width, True) for name in "qkvo"}
        layers |= {f"up_{i}": dense(width, hidden, True), f"down_{i}": dense(hidden, width, True)}
        layers |= {f"norm{j}_{i}": Layer("layer_norm", (width,)) for j in (1, 2)}

    def inputs(call, x):
        return call("norm", call("words", x) + call("positions")[: x.shape[1]] + call("types")[0])

    def body(call, x):
        for i in range(blocks):
            x = call(f"norm1_{i}", x + attention(call, i, x, count))
            x = call(f"norm2_{i}", x + call(f"down_{i}", nn.gelu(call(f"up_{i}", x), approximate=False)))
        return call("classifier", jnp.tanh(call("pooler", x[:, 0])))

    about = (
        f"MiniLM-L6's shape, {batch} x {length} tokens"
        if blocks == 6
        else f"{blocks} blocks, width {width}, {batch} x {length} tokens"
    )
    return Model(
        "BERT", layers, inputs, body, partial(tokens, vocab=vocab, batch=batch, length=length, labels=2), about, count
    )


def vit(
    blocks: int = 12, width: int = 192, count: int = 3, side: int = 224, batch: int = 8, classes: int = 100
) -> Model:
    """ViT-Tiny/16: patches by a convolution, a token of class, layer norms before the blocks; the classifier is not adapted."""
    patches = (side // 16) ** 2
    layers = {
        "patches": Layer("dense", (16 * 16 * 3, width, True)),
        "class": Layer("table", (1, 1, width)),
        "positions": Layer("table", (1, patches + 1, width)),
        "norm": Layer("layer_norm", (width,)),
        "head": Layer("dense", (width, classes, True)),
    }
    for i in range(blocks):
        layers |= {f"{name}_{i}": dense(width, width, True) for name in "qkvo"}
        layers |= {f"up_{i}": dense(width, 4 * width, True), f"down_{i}": dense(4 * width, width, True)}
        layers |= {f"norm{j}_{i}": Layer("layer_norm", (width,)) for j in (1, 2)}

    def inputs(call, x):
        n = side // 16
        cut = x.reshape(batch, n, 16, n, 16, 3).swapaxes(2, 3).reshape(batch, n * n, -1)
        first = jnp.broadcast_to(call("class"), (batch, 1, width))
        return jnp.concatenate([first, call("patches", cut)], axis=1) + call("positions")

    def body(call, x):
        for i in range(blocks):
            x = x + attention(call, i, call(f"norm1_{i}", x), count)
            x = x + call(f"down_{i}", nn.gelu(call(f"up_{i}", call(f"norm2_{i}", x)), approximate=False))
        return call("head", call("norm", x[:, :1])[:, 0])

    about = f"{blocks} blocks, width {width}, {batch} images of {side} x {side}"
    return Model("ViT", layers, inputs, body, partial(images, batch=batch, side=side, labels=classes), about, count)


def conv(
    widths: tuple[int, ...] = (64, 128, 256), depth: int = 2, side: int = 32, batch: int = 32, classes: int = 10
) -> Model:
    """A residual net of 3x3 convolutions with group norms; the classifier is not adapted."""
    layers = {
        "stem": Layer("conv", (3, 3, widths[0], 1)),
        "norm": Layer("group_norm", (widths[-1], 8)),
        "head": Layer("dense", (widths[-1], classes, True)),
    }
    inside = widths[0]
    for i, width in enumerate(widths):
        for j in range(depth):
            stride = 2 if i and not j else 1
            layers |= {
                f"norm1_{i}_{j}": Layer("group_norm", (inside, 8)),
                f"conv1_{i}_{j}": Layer("conv", (3, inside, width, stride), adapted=True),
                f"norm2_{i}_{j}": Layer("group_norm", (width, 8)),
                f"conv2_{i}_{j}": Layer("conv", (3, width, width, 1), adapted=True),
            }
            if inside != width:
                layers[f"skip_{i}_{j}"] = Layer("conv", (1, inside, width, stride), adapted=True)
            inside = width

    def body(call, x):
        for i in range(len(widths)):
            for j in range(depth):
                h = nn.relu(call(f"norm1_{i}_{j}", x))
                y = call(f"conv1_{i}_{j}", h)
                y = call(f"conv2_{i}_{j}", nn.relu(call(f"norm2_{i}_{j}", y)))
                skip = f"skip_{i}_{j}"
                x = y + (call(skip, h) if skip in layers else x)
        return call("head", nn.relu(call("norm", x)).mean(axis=(1, 2)))

    about = f"residual, widths {', '.join(map(str, widths))}, {batch} images of {side} x {side}"
    return Model(
        "conv net",
        layers,
        lambda call, x: call("stem", x),
        body,
        partial(images, batch=batch, side=side, labels=classes),
        about,
    )


def models(quick: bool) -> list[Model]:
    """All of them, or small ones with dense layers and with convolutions; ``scale`` has a small Llama."""
    if not quick:
        return [transformer(), llama(), bert(), vit(), conv()]
    return [
        transformer(blocks=2, width=128, count=4, length=32),
        conv(widths=(16, 32), depth=1, side=16, batch=4),
    ]
