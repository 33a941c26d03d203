"""The ways to train a model of ``models.py`` in JAX: all of it, LoRA by hand, by jlora, by other libraries, and the floor below them.

All share one base, one batch and, where they have factors, the same values of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import jlora
from benchmarks.models import NNX, Layer, Linen, Model, linen_layer

RANK, ALPHA = 8, 16.0
SCALE = ALPHA / RANK
FULL, HAND, BEST, FLOOR = "full fine-tuning", "by hand", "by hand, 2-D", "floor"
FLOORS = {"PEFT eager": "floor, torch eager", "PEFT torch.compile": "floor, torch.compile"}
"""Of the ways in torch, the floors."""


class Way(NamedTuple):
    """How a model is trained.

    Attributes:
        logits: ``logits(trained, rest, x)``.
        trained: What is trained.
        rest: What is not.
        x: Inputs; of the floor, the first activations.
        factors: From the gradient of ``trained``, the gradients of the factors by layer, ``{layer: (a, b)}``; ``None`` if it has none.
    """

    logits: Callable[[Any, Any, jax.Array], jax.Array]
    trained: Any
    rest: Any
    x: Any
    factors: Callable[[Any], dict[str, tuple[jax.Array, jax.Array]]] | None = None


class LoRADense(nn.Module):
    """LoRA as one writes it: the kernel stays in ``params``, the factors are in a collection of their own.

    Attributes:
        features: Columns of the kernel.
        bias: Whether there is one.
        flat: Take the products of the factors on matrices, ``(tokens, width)``, which XLA:CPU runs faster, most of all backward; else on
            the activations as they come.
    """

    features: int
    bias: bool
    flat: bool

    @nn.compact
    def __call__(self, x):
        *outer, width = x.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (width, self.features))
        a = self.variable("lora", "a", jnp.zeros, (width, RANK)).value
        b = self.variable("lora", "b", jnp.zeros, (RANK, self.features)).value
        if self.flat:
            update = ((x.reshape(-1, width) @ a) @ (SCALE * b)).reshape(*outer, self.features)
        else:
            update = SCALE * ((x @ a) @ b)
        y = x @ kernel + update
        return y + self.param("bias", nn.initializers.zeros, (self.features,)) if self.bias else y


class LoRAConv(nn.Module):
    """The same of a convolution: one with ``a``, whose window is the kernel's, then 1x1 with ``b``."""

    window: int
    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        shape = (self.window, self.window, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (*shape, self.features))
        a = self.variable("lora", "a", jnp.zeros, (*shape, RANK)).value
        b = self.variable("lora", "b", jnp.zeros, (RANK, self.features)).value
        run = partial(jax.lax.conv_general_dilated, padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        strides = (self.stride, self.stride)
        thin = run(x, a, strides)
        return run(x, kernel, strides) + run(thin, SCALE * b[None, None], (1, 1))


def lora_layer(layer: Layer, name: str, flat: bool) -> Any:
    if not layer.adapted:
        return linen_layer(layer, name)
    if layer.kind == "conv":
        window, _, outputs, stride = layer.sizes
        return LoRAConv(window, outputs, stride, name=name)
    return LoRADense(layer.sizes[1], layer.sizes[2], flat, name=name)


@dataclass
class Setup:
    """A model, its base, its batch, and factors ``{layer: (a, b)}`` with a ``b`` that is not zero, so that every gradient is not."""

    model: Model
    params: Any
    x: jax.Array
    labels: jax.Array
    lora: dict[str, Any]

    @property
    def factors(self) -> dict[str, tuple[jax.Array, jax.Array]]:
        return {path.removesuffix("/kernel"): (f.a, f.b) for path, f in self.lora.items()}

    @property
    def kernels(self) -> set[tuple[int, ...]]:
        """Shapes of the adapted kernels."""
        return {f.shape for f in self.lora.values()}


def setup(model: Model) -> Setup:
    """The base is random, as its cost does not depend on its values."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, labels = model.batch(keys[0])
    plain = Linen(model)
    params = jax.jit(plain.init)(keys[1], x)["params"]
    sites = jlora.sites(lambda params, x: plain.apply({"params": params}, x), params, x)
    targets = [f"{name}/kernel" for name, layer in model.layers.items() if layer.adapted]
    lora = jlora.init(keys[2], params, sites, jlora.LoRA(rank=RANK, alpha=ALPHA, targets=targets))
    move = jax.tree.map(lambda z: z + 0.01 * jax.random.normal(keys[3], z.shape), lora)
    return Setup(model, params, x, labels, move)


def ways(s: Setup, peers: bool = True) -> tuple[dict[str, Way], dict[str, str]]:
    """Every way by its name, other libraries' only if asked, and those that are missing with the reason."""
    plain = Linen(s.model)

    def base(params, x):
        return plain.apply({"params": params}, x)

    def formed(factors, params, x):
        weights = flatten_dict(params)
        for name, (a, b) in factors.items():
            weights[name, "kernel"] += SCALE * a @ b
        return base(unflatten_dict(weights), x)

    apply = jlora.wrap(base)
    first = jax.jit(lambda params, x: s.model.inputs(*_caller(plain, params), x))(s.params, s.x)
    hand = {name: {"a": a, "b": b} for name, (a, b) in s.factors.items()}
    by_layer = lambda grads: {name: (f["a"], f["b"]) for name, f in grads.items()}  # noqa: E731
    found = {
        FULL: Way(lambda trained, rest, x: base(trained, x), s.params, None, s.x),
        "W + s·A·B formed": Way(formed, s.factors, s.params, s.x, lambda grads: grads),
        HAND: Way(_by_hand(s.model, flat=False), hand, s.params, s.x, by_layer),
    }
    if any(layer.adapted and layer.kind == "dense" for layer in s.model.layers.values()):
        found[BEST] = Way(_by_hand(s.model, flat=True), hand, s.params, s.x, by_layer)
    missing = {}
    for name, make in (("qwix", _qwix), ("nnx.LoRA", _nnx)) if peers else ():
        try:
            found[name] = make(s)
        except (ImportError, NotImplementedError) as error:
            missing[name] = str(error)
    found["jlora"] = Way(
        lambda lora, params, x: apply(params, lora, x),
        s.lora,
        s.params,
        s.x,
        lambda grads: {path.removesuffix("/kernel"): (f.a, f.b) for path, f in grads.items()},
    )
    found[FLOOR] = Way(
        lambda first, params, x: plain.apply({"params": params}, first, start="body"), first, s.params, s.x
    )
    return found, missing


def _caller(plain: Linen, params: Any) -> tuple[Any]:
    """The ``call`` of ``plain`` on ``params``, to run a part of the model."""

    def call(name, x=None):
        layer = plain.model.layers[name]
        return params[name] if layer.kind == "table" else linen_layer(layer, None).apply({"params": params[name]}, x)

    return (call,)


def _by_hand(model: Model, flat: bool) -> Any:
    adapted = Linen(model, partial(lora_layer, flat=flat))
    return lambda factors, params, x: adapted.apply({"params": params, "lora": factors}, x)


def _qwix(s: Setup) -> Way:
    """Qwix finds layers by the names of modules, and keeps the factors beside the kernels in one tree."""
    import qwix

    names = [name for name, layer in s.model.layers.items() if layer.adapted]
    provider = qwix.LoraProvider(module_path="|".join(names), rank=RANK, alpha=ALPHA)
    model = qwix.apply_lora_to_model(Linen(s.model), provider)
    trained = {
        (name, f"kernel_lora_{part}"): value
        for name, factors in s.factors.items()
        for part, value in zip("ab", factors, strict=True)
    }
    wanted = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), s.x)["params"])
    if {k for k in wanted if "lora" in k[-1]} != set(trained):
        raise NotImplementedError("it adapts other layers")

    def logits(trained, params, x):
        return model.apply({"params": unflatten_dict(flatten_dict(params) | trained)}, x)

    return Way(
        logits, trained, s.params, s.x, lambda g: {n: (g[n, "kernel_lora_a"], g[n, "kernel_lora_b"]) for n in s.factors}
    )


def _nnx(s: Setup) -> Way:
    """``nnx.LoRALinear`` in the place of each layer; it has no scale, which goes into ``b``."""
    if any(layer.adapted and layer.kind == "conv" for layer in s.model.layers.values()):
        raise NotImplementedError("it knows no convolutions")
    module = NNX(s.model, RANK, nnx.Rngs(0))
    for name, layer in s.model.layers.items():
        place, leaves = getattr(module, name), s.params[name]
        if isinstance(place, nnx.Variable):
            place[...] = leaves
            continue
        for leaf, value in leaves.items():
            getattr(place, leaf)[...] = value
        if layer.adapted:
            place.lora.lora_a[...], b = s.factors[name]
            place.lora.lora_b[...] = SCALE * b
    graph, trained, rest = nnx.split(module, nnx.LoRAParam, ...)

    def logits(trained, rest, x):
        return nnx.merge(graph, trained, rest)(x)

    def factors(grads):
        pure = grads.to_pure_dict()
        return {name: (pure[name]["lora"]["lora_a"], SCALE * pure[name]["lora"]["lora_b"]) for name in s.factors}

    return Way(logits, trained, rest, s.x, factors)


OPTIMIZER = optax.adam(1e-4)


def loss(way: Way) -> Callable[..., jax.Array]:
    """``loss(trained, rest, x, labels)``: the mean cross entropy."""

    def value(trained, rest, x, labels):
        return optax.softmax_cross_entropy_with_integer_labels(way.logits(trained, rest, x), labels).mean()

    return value


def step(way: Way, name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One training step, forward, backward and Adam, and its arguments before ``labels``. The floor is the gradient alone."""
    grad = jax.grad(loss(way))
    if name == FLOOR:
        return grad, (way.trained, way.rest, way.x)

    def run(trained, state, rest, x, labels):
        updates, state = OPTIMIZER.update(grad(trained, rest, x, labels), state, trained)
        return optax.apply_updates(trained, updates), state

    return run, (way.trained, jax.jit(OPTIMIZER.init)(way.trained), way.rest, way.x)
