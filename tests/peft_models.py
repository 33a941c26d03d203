"""Ports of the models of make_peft_fixtures.py, each laid out another way: stacked layers with split heads, a list of blocks under
Hugging Face's names in Flax, convolutions with channels last, experts transposed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.peft import Weight

V, D, HIDDEN, LAYERS, HEADS, KV, DIM = 23, 24, 20, 2, 4, 2, 6


@dataclass(frozen=True)
class Port:
    """A function, the shapes of its parameters, and their names in PyTorch."""

    fn: Callable[..., Any]
    shapes: dict[str, Any]
    names: Any = None

    def struct(self) -> Any:
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s, jnp.float32), self.shapes, is_leaf=lambda x: isinstance(x, tuple)
        )


def rms(x, gain, eps=1e-6):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * gain


def layer_norm(x, p, eps):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def rope(x, pairs):
    """``x``: (batch, time, heads, dim)."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    one, two = (x[..., 0::2], x[..., 1::2]) if pairs else (x[..., :half], x[..., half:])
    turned = one * cos - two * sin, two * cos + one * sin
    return jnp.stack(turned, -1).reshape(x.shape) if pairs else jnp.concatenate(turned, -1)


def attend(q, k, v, causal=True):
    """``q``: (batch, time, heads, dim); ``k`` and ``v`` may have fewer heads."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e30)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def llama(tied: bool = False, pairs: bool = False) -> Port:
    """Layers stacked and scanned; heads are axes of their own. With ``pairs`` rotary neighbours lie side by side."""

    def fn(params, ids):
        def block(x, p):
            y = rms(x, p["norm_1"])
            q, k, v = (jnp.einsum("btd,dhk->bthk", y, p[name]) for name in "qkv")
            x = x + jnp.einsum("bthk,hkd->btd", attend(rope(q, pairs), rope(k, pairs), v), p["o"])
            y = rms(x, p["norm_2"])
            return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"], None

        x, _ = lax.scan(block, params["embed"][ids], params["layers"])
        x = rms(x, params["norm"])
        return x @ (params["embed"].T if tied else params["head"])

    L = LAYERS
    layers = {"q": (L, D, HEADS, DIM), "k": (L, D, KV, DIM), "v": (L, D, KV, DIM), "o": (L, HEADS, DIM, D)}
    layers |= {"gate": (L, D, HIDDEN), "up": (L, D, HIDDEN), "down": (L, HIDDEN, D), "norm_1": (L, D), "norm_2": (L, D)}
    shapes = {"embed": (V, D), "layers": layers, "norm": (D,)} | ({} if tied else {"head": (D, V)})
    names = {
        "layers/q": Weight("model.layers.{}.self_attn.q_proj.weight", rotary_heads=HEADS if pairs else None),
        "layers/k": Weight("model.layers.{}.self_attn.k_proj.weight", rotary_heads=KV if pairs else None),
        "layers/([vo])": r"model.layers.{}.self_attn.\1_proj.weight",
        "layers/(gate|up|down)": r"model.layers.{}.mlp.\1_proj.weight",
        "layers/norm_1": "model.layers.{}.input_layernorm.weight",
        "layers/norm_2": "model.layers.{}.post_attention_layernorm.weight",
        "norm": "model.norm.weight",
        "embed": ("model.embed_tokens.weight", "lm_head.weight") if tied else "model.embed_tokens.weight",
    }
    return Port(fn, shapes, names if tied else names | {"head": "lm_head.weight"})


def gpt2() -> Port:
    """As Hugging Face's Flax GPT-2, but with GPT-2's kernels (in, out) as they are; the names are the defaults."""

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    def fn(params, ids):
        p = params["params"]["transformer"]
        x = p["wte"]["embedding"][ids] + p["wpe"]["embedding"][: ids.shape[1]][None]
        for block in p["h"].values():
            q, k, v = jnp.split(dense(layer_norm(x, block["ln_1"], 1e-5), block["attn"]["c_attn"]), 3, axis=-1)
            q, k, v = (y.reshape(*y.shape[:2], 3, -1) for y in (q, k, v))
            x = x + dense(attend(q, k, v).reshape(x.shape), block["attn"]["c_proj"])
            y = jax.nn.gelu(dense(layer_norm(x, block["ln_2"], 1e-5), block["mlp"]["c_fc"]), approximate=True)
            x = x + dense(y, block["mlp"]["c_proj"])
        return layer_norm(x, p["ln_f"], 1e-5) @ p["wte"]["embedding"].T

    def linear(i, o):
        return {"kernel": (i, o), "bias": (o,)}

    norm = {"scale": (12,), "bias": (12,)}
    block = {
        "ln_1": norm,
        "ln_2": norm,
        "attn": {"c_attn": linear(12, 36), "c_proj": linear(12, 12)},
        "mlp": {"c_fc": linear(12, 48), "c_proj": linear(48, 12)},
    }
    tables = {"wte": {"embedding": (V, 12)}, "wpe": {"embedding": (16, 12)}}
    shapes = {"params": {"transformer": {**tables, "h": {str(i): block for i in range(2)}, "ln_f": norm}}}
    names = {
        r"params/transformer/h/(\d+)/(attn|mlp)/(c_\w+)/kernel": Weight(r"transformer.h.\1.\2.\3.weight", "in_out"),
        "params/transformer/wte/embedding": ("transformer.wte.weight", "lm_head.weight"),
    }
    return Port(fn, shapes, names)


def bert() -> Port:
    """As Hugging Face's Flax BERT; the names are the defaults."""

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    def fn(params, ids):
        p = params["params"]
        e = p["bert"]["embeddings"]
        x = e["word_embeddings"]["embedding"][ids] + e["token_type_embeddings"]["embedding"][jnp.zeros_like(ids)]
        x = layer_norm(x + e["position_embeddings"]["embedding"][: ids.shape[1]][None], e["LayerNorm"], 1e-12)
        for block in p["bert"]["encoder"]["layer"].values():
            a = block["attention"]
            q, k, v = (dense(x, a["self"][n]).reshape(*x.shape[:2], 3, -1) for n in ("query", "key", "value"))
            y = dense(attend(q, k, v, causal=False).reshape(x.shape), a["output"]["dense"])
            x = layer_norm(x + y, a["output"]["LayerNorm"], 1e-12)
            y = jax.nn.gelu(dense(x, block["intermediate"]["dense"]), approximate=False)
            x = layer_norm(x + dense(y, block["output"]["dense"]), block["output"]["LayerNorm"], 1e-12)
        return dense(jnp.tanh(dense(x[:, 0], p["bert"]["pooler"]["dense"])), p["classifier"])

    def linear(i, o):
        return {"kernel": (i, o), "bias": (o,)}

    norm, width = {"scale": (12,), "bias": (12,)}, 12
    block = {
        "attention": {
            "self": {n: linear(width, width) for n in ("query", "key", "value")},
            "output": {"dense": linear(width, width), "LayerNorm": norm},
        },
        "intermediate": {"dense": linear(width, 20)},
        "output": {"dense": linear(20, width), "LayerNorm": norm},
    }
    sizes = {"word_embeddings": V, "position_embeddings": 16, "token_type_embeddings": 2}
    embeddings = {name: {"embedding": (n, width)} for name, n in sizes.items()} | {"LayerNorm": norm}
    inner = {"embeddings": embeddings, "encoder": {"layer": {str(i): block for i in range(2)}}}
    inner |= {"pooler": {"dense": linear(width, width)}}
    return Port(fn, {"params": {"bert": inner, "classifier": linear(width, 3)}})


def vision() -> Port:
    """Channels last, kernels (*window, in, out)."""

    def conv(x, p, names, stride=1):
        x = lax.conv_general_dilated(x, p["kernel"], [stride] * (x.ndim - 2), "VALID", dimension_numbers=names)
        return x + p["bias"]

    def fn(params, x):
        x = jnp.tanh(conv(jnp.moveaxis(x, 1, -1), params["plane"], ("NHWC", "HWIO", "NHWC")))
        x = conv(x, params["point"], ("NHWC", "HWIO", "NHWC")).mean(1)
        x = jnp.tanh(conv(x, params["line"], ("NWC", "WIO", "NWC"), 2)).mean(1)
        return x @ params["head"]["kernel"] + params["head"]["bias"]

    shapes = {"plane": {"kernel": (2, 3, 3, 8), "bias": (8,)}, "point": {"kernel": (1, 1, 8, 5), "bias": (5,)}}
    shapes |= {"line": {"kernel": (3, 5, 7), "bias": (7,)}, "head": {"kernel": (7, 4), "bias": (4,)}}
    return Port(fn, shapes)


def experts() -> Port:
    """Experts (experts, in, out), where PyTorch has (experts, out, in)."""

    def fn(params, x):
        p = params["experts"]
        xs = jnp.broadcast_to(x, (3, *x.shape))
        y = jnp.einsum("eth,ehd->etd", jnp.tanh(jnp.einsum("etd,edh->eth", xs, p["up"])), p["down"]).sum(0)
        return y @ params["head"]["kernel"] + params["head"]["bias"]

    shapes = {"experts": {"up": (3, 4, 6), "down": (3, 6, 4)}, "head": {"kernel": (4, 5), "bias": (5,)}}
    nested = {"experts/up": Weight("experts.up", nesting=0), "experts/down": Weight("experts.down", nesting=1)}
    return Port(fn, shapes, nested)


def nested() -> Port:
    """Experts beside what else their module holds."""

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    def fn(params, x):
        p = params["moe"]
        xs = jnp.broadcast_to(x, (3, *x.shape))
        y = jnp.einsum("eth,ehd->etd", jnp.tanh(jnp.einsum("etd,edh->eth", xs, p["up"])), p["down"])
        y = jnp.einsum("etd,te->td", y, jax.nn.softmax(dense(x, p["gate"]))) + p["bias"]
        return dense(dense(y, p["tail"]["0"]), params["head"])

    def linear(i, o):
        return {"kernel": (i, o), "bias": (o,)}

    moe = {"up": (3, 4, 6), "down": (3, 6, 4), "bias": (4,), "gate": linear(4, 3), "tail": {"0": linear(4, 4)}}
    names = {"moe/up": Weight("moe.up", nesting=0), "moe/down": Weight("moe.down", nesting=1)}
    return Port(fn, {"moe": moe, "head": linear(4, 5)}, names)


def attention() -> Port:
    """Query, key and value in one kernel, as ``nn.MultiheadAttention`` has them; heads are axes of their own."""

    def fn(params, x):
        p = params["attn"]
        qkv = jnp.einsum("btd,dchk->cbthk", x, p["in_proj"]["kernel"]) + p["in_proj"]["bias"][:, None, None]
        y = jnp.einsum("bthk,hkd->btd", attend(*qkv, causal=False), p["out_proj"]["kernel"]) + p["out_proj"]["bias"]
        return y @ params["head"]["kernel"] + params["head"]["bias"]

    in_proj = {"kernel": (12, 3, 3, 4), "bias": (3, 3, 4)}
    attn = {"in_proj": in_proj, "out_proj": {"kernel": (3, 4, 12), "bias": (12,)}}
    names = {"attn/in_proj/kernel": "attn.in_proj_weight", "attn/in_proj/bias": "attn.in_proj_bias"}
    return Port(fn, {"attn": attn, "head": {"kernel": (12, 5), "bias": (5,)}}, names)


PORTS: dict[str, Callable[[], Port]] = {
    "llama": llama,
    "llama_rslora_patterns": llama,
    "llama_embedding": llama,
    "llama_tied": lambda: llama(tied=True),
    "llama_head": lambda: llama(tied=True),
    "llama_tokens": lambda: llama(tied=True),
    "gpt2": gpt2,
    "gpt2_table": gpt2,
    "gpt2_bias": gpt2,
    "bert": bert,
    "vision": vision,
    "experts": experts,
    "nested": nested,
    "attention": attention,
}
