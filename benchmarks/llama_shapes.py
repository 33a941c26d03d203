"""A Llama in plain JAX with its layers scanned, as shapes on a mesh: for benchmarks that compile and never run.

Weights are split as the layouts in ``LAYOUTS`` say, over a mesh with axes ``data`` and ``model``. The model itself knows of no adapter and
names no mesh axis but for the stream between blocks, which it keeps split as the layout's ``stream``.
"""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class Shape(NamedTuple):
    """Of the model and its batch."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SHAPES = {
    "tiny": Shape(layers=2, width=256, hidden=512, heads=8, kv_heads=4, head_dim=32, vocab=512),
    "1B": Shape(layers=16, width=2048, hidden=8192, heads=32, kv_heads=8, head_dim=64, vocab=128256),
    "8B": Shape(layers=32, width=4096, hidden=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256),
    "70B": Shape(layers=80, width=8192, hidden=28672, heads=64, kv_heads=8, head_dim=128, vocab=128256),
}


class Layout(NamedTuple):
    """Mesh axes of the input and of the inner axis of every weight, of the layers, of the batch and of the stream between blocks."""

    inner: Any = None
    outer: Any = None
    layers: Any = None
    batch: Any = ("data", "model")
    stream: Any = None


LAYOUTS = {
    "data parallel": Layout(),
    "FSDP": Layout(outer=("data", "model")),
    "tensor parallel": Layout(inner="model", batch="data"),
    "tensor parallel + FSDP": Layout(inner="model", outer="data", batch="data"),
    "tensor parallel, sequence split": Layout(inner="model", batch="data", stream="model"),
    "layers split": Layout(layers="data", inner="model", batch="data"),
}
"""Usual ways to split: ``inner`` axes are heads and hidden units, ``outer`` ones the width of the stream."""


def specs(layout: Layout) -> dict[str, Any]:
    """The ``PartitionSpec`` of each parameter."""
    inner, outer, layers = layout.inner, layout.outer, layout.layers
    into, out = P(layers, outer, inner, None), P(layers, inner, None, outer)
    return {
        "embed": P(inner, outer),
        "layers": {
            "q": into,
            "k": into,
            "v": into,
            "o": out,
            "gate": P(layers, outer, inner),
            "up": P(layers, outer, inner),
            "down": P(layers, inner, outer),
            "norm1": P(layers, None),
            "norm2": P(layers, None),
        },
        "norm": P(None),
        "head": P(outer, inner),
    }


def parameters(shape: Shape, layout: Layout, mesh: Mesh, dtype: Any) -> dict[str, Any]:
    """Shapes of the parameters, each with its sharding."""
    n, d, f, h, kv, k, v = shape
    sizes = {
        "embed": (v, d),
        "layers": {
            "q": (n, d, h, k),
            "k": (n, d, kv, k),
            "v": (n, d, kv, k),
            "o": (n, h, k, d),
            "gate": (n, d, f),
            "up": (n, d, f),
            "down": (n, f, d),
            "norm1": (n, d),
            "norm2": (n, d),
        },
        "norm": (d,),
        "head": (d, v),
    }
    return jax.tree.map(
        lambda size, spec: jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, spec)),
        sizes,
        specs(layout),
        is_leaf=lambda x: isinstance(x, tuple),
    )


PRODUCTS = {
    **dict.fromkeys("qkv", "btd,dhk->bthk"),
    "o": "bthk,hkd->btd",
    "gate": "btd,df->btf",
    "up": "btd,df->btf",
    "down": "btf,fd->btd",
}
"""What each kernel of a layer does to activations."""


def dense(x: jax.Array, layer: Any, name: str) -> jax.Array:
    """The product with one kernel of a layer."""
    return jnp.einsum(PRODUCTS[name], x, layer[name])


def model(
    shape: Shape, layout: Layout, mesh: Mesh, *, unroll: bool = False, remat: bool = True, product: Any = dense
) -> Any:
    """``fn(params, stream)``: from embedded tokens ``(batch, length, width)`` to logits.

    With ``remat``, blocks are rematerialised. ``product(x, layer, name)`` is every product with a kernel of a layer.
    """
    stream = NamedSharding(mesh, P(layout.batch, layout.stream, None))

    def norm(x: jax.Array, gain: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        return (y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype) * gain

    def rope(x: jax.Array) -> jax.Array:
        half = x.shape[-1] // 2
        angles = jnp.arange(x.shape[1])[:, None] * 5e5 ** (-jnp.arange(half) / half)
        cos, sin = (f(angles)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)

    def block(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        y = norm(x, w["norm1"])
        q, k, v = (product(y, w, name) for name in "qkv")
        mixed = jax.nn.dot_product_attention(rope(q), rope(k), v, is_causal=True)
        x = lax.with_sharding_constraint(x + product(mixed, w, "o"), stream)
        y = norm(x, w["norm2"])
        x = x + product(jax.nn.silu(product(y, w, "gate")) * product(y, w, "up"), w, "down")
        return lax.with_sharding_constraint(x, stream), None

    layer = jax.checkpoint(block) if remat else block

    def fn(params: Any, x: jax.Array) -> jax.Array:
        x, _ = lax.scan(layer, x, params["layers"], unroll=shape.layers if unroll else 1)
        return norm(x, params["norm"]) @ params["head"]

    return fn


def simulate(count: int) -> None:
    """Makes the CPU ``count`` devices; before anything asks for devices."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # the TPU's compiler looks for a TPU to ask: there is none
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"


def devices(target: str, count: int) -> list[Any]:
    """``count`` devices to compile for: of a TPU pod that nobody needs to have (v5e, v5p...), or of a CPU.

    Raises:
        SystemExit: ``libtpu`` is not installed, or the CPU was not started with so many devices.
    """
    if target == "cpu":
        found = jax.devices("cpu")
        if len(found) < count:
            raise SystemExit(
                f"{count} CPU devices are needed: XLA_FLAGS=--xla_force_host_platform_device_count={count}"
            )
        return found[:count]
    from jax.experimental import topologies

    side = (
        {8: "2x4", 16: "4x4", 64: "8x8", 256: "16x16"}
        if target in ("v5e", "v6e")
        else {8: "2x2x2", 64: "4x4x4", 256: "4x8x8"}
    )
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{target}:{side[count]}").devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise SystemExit(f"No compiler for TPU {target}: pip install libtpu, or --target cpu.\n  {error}") from None
