"""The table: every way a function can use a weight. Each law runs on each row; a new way is one more row."""

from collections.abc import Callable
from functools import partial
from typing import Any

import cases_constant  # noqa: F401  adds its rows
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from case import CASES, MATRIX, ONE, B, Case, D, E, H, K, L, M, Roles, T, V, W, X, array, case
from cases_joined import Routed
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jlora

# --- products --------------------------------------------------------------------------------------------------------
case("dense", W, (X,), ONE)(lambda p, x: jnp.tanh(x @ p["w"]))
case("vector", W, (X[0, 0],), ONE)(lambda p, x: x @ p["w"])
case("bias", {"w": W["w"], "b": array(M)}, (X,), ONE)(lambda p, x: jnp.tanh(x @ p["w"] + p["b"][None, None]))
case("kernel_left", W, (array(M, K),), {"w": ((1,), (0,), ())})(lambda p, x: jnp.tanh(p["w"] @ x))
case("kernel_left_batched", W, (array(B, M, K),), {"w": ((1,), (0,), ())})(lambda p, x: jnp.tanh(p["w"] @ x))
case("transposed", W, (array(B, T, M),), {"w": ((1,), (0,), ())})(lambda p, x: jnp.tanh(x @ p["w"].T))
case("both_ways", W, (X,), ONE)(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T)
case("precision", W, (X,), ONE)(lambda p, x: lax.dot_general(x, p["w"], (((2,), (0,)), ((), ())), precision="highest"))
case("preferred_type", W, (X,), ONE)(
    lambda p, x: lax.dot_general(x, p["w"], (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32)
)
case("heads_out", {"w": array(D, H, K)}, (X,), {"w": ((0,), (1, 2), ())})(
    lambda p, x: jnp.einsum("btd,dhk->bthk", x, p["w"])
)
case("heads_in", {"w": array(H, K, D)}, (array(B, T, H, K),), {"w": ((0, 1), (2,), ())})(
    lambda p, x: jnp.einsum("bthk,hkd->btd", x, p["w"])
)
case("contracted_apart", {"w": array(H, D, K)}, (array(B, K, T, H),), {"w": ((0, 2), (1,), ())})(
    lambda p, x: jnp.einsum("bkth,hdk->bdt", x, p["w"])
)
case("experts", {"w": array(E, D, M)}, (array(B, E, D),), {"w": ((1,), (2,), (0,))})(
    lambda p, x: jnp.einsum("bed,edm->bem", x, p["w"])
)
case("experts_left", {"w": array(E, D, M)}, (array(B, E, M),), {"w": ((2,), (1,), (0,))})(
    lambda p, x: jnp.einsum("edm,bem->edb", p["w"], x)
)
case("experts_free", {"w": array(E, D, M)}, (X,), {"w": ((1,), (0, 2), ())})(
    lambda p, x: jnp.einsum("btd,edm->ebtm", x, p["w"])
)
case(
    "experts_up_down",
    {"u": array(E, D, M), "v": array(E, M, D)},
    (X,),
    {"u": ((1,), (0, 2), ()), "v": ((1,), (2,), (0,))},
)(lambda p, x: jnp.einsum("btem,emd->bted", jnp.tanh(jnp.einsum("btd,edm->btem", x, p["u"])), p["v"]))
case("summed_experts", {"w": array(E, D, M)}, (array(B, E, D),), {"w": ((0, 1), (2,), ())})(
    lambda p, x: jnp.einsum("bed,edm->bm", x, p["w"])
)
case("vmapped_experts", {"w": array(E, D, M)}, (array(E, B, D),), {"w": ((1,), (2,), (0,))})(
    lambda p, x: jax.vmap(jnp.matmul)(x, p["w"])
)
case("unit_axes", {"w": array(1, D, 1, M)}, (X,), {"w": ((1,), (0, 2, 3), ())})(
    lambda p, x: jnp.einsum("btd,adcm->btacm", x, p["w"])
)
case("one_output", {"w": array(D, 1)}, (X,), ONE, rank=1)(lambda p, x: jnp.tanh(x @ p["w"]))
case("twice", W, (X,), ONE)(lambda p, x: jnp.tanh(x @ p["w"]) + jnp.sin(x[:, ::-1] @ p["w"]))
case("residual", {"w": array(D, D)}, (X,), ONE)(lambda p, x: x + jnp.tanh(x @ p["w"]))
case("list_params", [W["w"], array(M, K)], (X,), {"0": MATRIX, "1": MATRIX})(lambda p, x: jnp.tanh(x @ p[0]) @ p[1])
case("attention", {n: array(D, D, seed=i) for i, n in enumerate("qkvo")}, (X,), dict.fromkeys("qkvo", MATRIX))(
    lambda p, x: jax.nn.softmax((x @ p["q"]) @ jnp.swapaxes(x @ p["k"], 1, 2)) @ (x @ p["v"]) @ p["o"]
)

# --- views -----------------------------------------------------------------------------------------------------------
case("cast_bf16", {"w": array(D, M, dtype=jnp.bfloat16)}, (X,), ONE, tol=1e-2)(
    lambda p, x: x @ p["w"].astype(jnp.float32)
)
case("compute_bf16", W, (X,), ONE, tol=3e-2)(
    lambda p, x: (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32)
)
case("split_heads", {"w": array(D, H * K)}, (X,), ONE)(
    lambda p, x: jnp.einsum("btd,dhk->bhtk", x, p["w"].reshape(D, H, K))
)
case("merge_heads", {"w": array(D, H, K)}, (X,), {"w": ((0,), (1, 2), ())})(lambda p, x: x @ p["w"].reshape(D, H * K))
case("merge_moved", {"w": array(H, D, K)}, (X,), {"w": ((1,), (0, 2), ())})(
    lambda p, x: x @ p["w"].transpose(1, 2, 0).reshape(D, K * H)
)
case("split_contracted", {"w": array(D, H * K)}, (array(B, T, H, K),), {"w": ((1,), (0,), ())})(
    lambda p, x: jnp.einsum("bthk,dhk->bthd", x, p["w"].reshape(D, H, K))
)
case("squeezed", {"w": array(1, D, M)}, (X,), {"w": ((1,), (0, 2), ())})(lambda p, x: x @ jnp.squeeze(p["w"], 0))
case("expanded", W, (X,), ONE)(lambda p, x: x @ p["w"][None])
case("broadcast", W, (array(B, T, D),), ONE)(lambda p, x: jnp.matmul(x, jnp.broadcast_to(p["w"], (B, D, M))))
case("scaled", W, (X, jnp.float32(0.3)), ONE)(lambda p, x, s: x @ (-p["w"] * s / 2.0))
case("gain_out", {"w": W["w"], "g": array(M)}, (X,), ONE)(lambda p, x: x @ (p["w"] * p["g"][None]))
case("gain_in", {"w": W["w"], "g": array(D)}, (X,), ONE)(lambda p, x: x @ (p["g"][:, None] * p["w"]))
case("fused_split", {"w": array(D, 3 * K)}, (X,), ONE)(
    lambda p, x: sum(jnp.sin(x @ w) for w in jnp.split(p["w"], [K, 2 * K], axis=1))
)
case("fused_slice", {"w": array(D, 2 * K)}, (X,), ONE)(lambda p, x: jnp.tanh(x @ p["w"][:, :K]) * (x @ p["w"][:, K:]))
case("input_slice", {"w": array(2 * D, M)}, (X,), ONE)(lambda p, x: x @ p["w"][:D] + jnp.flip(x, 1) @ p["w"][D:][::-1])
case("stacked_gates", {"w": array(2, D, M)}, (X,), {"w": ((1,), (2,), (0,))})(
    lambda p, x: jax.nn.silu(x @ p["w"][0]) * (x @ p["w"][1])
)
case("chosen_layer", {"w": array(L, D, D)}, (X, jnp.int32(2)), {"w": ((1,), (2,), (0,))})(lambda p, x, i: x @ p["w"][i])
case("chosen_vectors_of_heads", {"w": array(D, H, E)}, (array(B, H, D), jnp.array(1)), {"w": ((0,), (1,), (2,))})(
    lambda p, x, i: jnp.tanh(jnp.einsum("bhd,dh->bh", x, jnp.take(p["w"], i, axis=2, mode="clip")))
)
case("chosen_experts", {"w": array(E, D, M)}, (array(B, D), jnp.array([3, 11])), {"w": ((1,), (2,), (0,))})(
    lambda p, x, i: jnp.einsum("bd,bdm->bm", x, p["w"][i])
)
case("repeated", W, (X,), ONE)(lambda p, x: x @ jnp.repeat(p["w"], 3, axis=1))
case("tiled_heads", {"w": array(D, H, K)}, (X,), {"w": ((0,), (1, 2), ())})(
    lambda p, x: jnp.einsum("btd,dhk->bthk", x, jnp.repeat(p["w"], 2, axis=1))
)
case("gain_of_examples", W, (X, array(B)), ONE)(
    lambda p, x, s: jnp.matmul(x, jnp.broadcast_to(p["w"], (B, D, M)) * s[:, None, None])
)
case("gain_of_experts", {"w": array(E, D, M), "g": array(E, M)}, (array(B, E, D),), {"w": ((1,), (2,), (0,))})(
    lambda p, x: jnp.einsum("bed,edm->bem", x, p["w"] * p["g"][:, None])
)
case("gain_complex", W, (X,), ONE)(
    lambda p, x: jnp.abs(x.astype(jnp.complex64) @ (p["w"].astype(jnp.complex64) * 1j) + 1.0)
)
case("divided", W, (X, jnp.float32(0.3)), ONE, exact_in_jit=False)(lambda p, x, s: x @ (p["w"] / s))
case("fused_index", {"w": array(D, 3 * K)}, (X, jnp.int32(1)), ONE)(
    lambda p, x, i: jnp.tanh(x @ p["w"].reshape(D, 3, K)[:, i]) + x @ p["w"].reshape(D, 3, K)[:, 0]
)
case("single_columns", W, (X,), ONE)(lambda p, x: jnp.stack([jnp.sin(x @ p["w"][:, i]) for i in range(M)], -1))
case("transposed_reshape", {"w": array(H, D, K)}, (X,), {"w": ((1,), (0, 2), ())})(
    lambda p, x: x @ lax.reshape(p["w"], (D, H * K), dimensions=(1, 0, 2))
)
case("named", W, (X,), ONE)(lambda p, x: x @ checkpoint_name(p["w"], "kernel"))
case("barrier", W, (X,), ONE)(lambda p, x: jnp.matmul(*lax.optimization_barrier((x, p["w"]))))

# --- lookups ---------------------------------------------------------------------------------------------------------
IDS = jnp.array([[3, 0, 18], [7, 7, 1]])
TABLE = {"e": array(V, D)}
case("lookup", TABLE, (IDS,), {"e": MATRIX})(lambda p, i: jnp.tanh(p["e"][i]))
case("take", TABLE, (IDS,), {"e": MATRIX})(lambda p, i: jnp.take(p["e"], i, axis=0, mode="clip"))
case("take_columns", {"e": array(D, V)}, (IDS,), {"e": ((1,), (0,), ())})(
    lambda p, i: jnp.take(p["e"], i, axis=1, mode="clip")
)
case("lookup_scaled", TABLE, (IDS,), {"e": MATRIX}, exact_in_jit=False)(lambda p, i: (p["e"] * 3.0)[i] + 1.0)
case("lookup_blocks", {"e": array(V, H, K)}, (IDS,), {"e": ((0,), (1, 2), ())})(lambda p, i: jnp.tanh(p["e"][i]))
case("tied", TABLE, (IDS,), {"e": MATRIX})(lambda p, i: jnp.tanh(p["e"][i]) @ p["e"].T)
case("vmapped_lookup", TABLE, (IDS,), {"e": MATRIX})(lambda p, i: jax.vmap(lambda j: p["e"][j])(i))
case("scalar_lookup", TABLE, (jnp.int32(5),), {"e": MATRIX})(lambda p, i: jnp.tanh(p["e"][i]))
case("vmapped_scalar_lookup", TABLE, (IDS,), {"e": MATRIX})(
    lambda p, i: jnp.tanh(jax.vmap(jax.vmap(lambda j: lax.dynamic_index_in_dim(p["e"], j, keepdims=False)))(i))
)
case("static_row", TABLE, (), {"e": MATRIX})(lambda p: jnp.tanh(p["e"][2]) * 2.0)
case("lookup_in_layers", {"e": array(L, V, D)}, (IDS,), {"e": ((1,), (2,), (0,))})(
    lambda p, i: lax.scan(lambda c, e: (c + jnp.tanh(e[i]), None), jnp.zeros((B, T, D)), p["e"])[0]
)
case("row_in_layers", {"e": array(L, V, D)}, (jnp.int32(5),), {"e": ((1,), (2,), (0,))})(
    lambda p, i: lax.scan(lambda c, e: (c + jnp.tanh(e[i]), None), jnp.zeros(D), p["e"])[0]
)
case("lookup_per_example", {"e": array(E, V, D)}, (jnp.array([3, 5]), jnp.array([1, 2])), {"e": ((1,), (2,), (0,))})(
    lambda p, k, i: jnp.tanh(jax.vmap(lambda k, i: p["e"][k][i])(k, i))
)
case("one_hot", TABLE, (IDS,), {"e": MATRIX})(lambda p, i: jax.nn.one_hot(i, V) @ p["e"])

# --- convolutions ----------------------------------------------------------------------------------------------------
IMAGE = array(B, 9, 8, D)
HWIO = ("NHWC", "HWIO", "NHWC")
CONV: dict[str, Roles] = {"w": ((0, 1, 2), (3,), ())}
KERNEL = {"w": array(3, 2, D, M)}


def conv(p: Any, x: Any, **how: Any) -> Any:
    how = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": HWIO} | how
    return jnp.tanh(lax.conv_general_dilated(x, p["w"], **how))


case("conv", KERNEL, (IMAGE,), CONV)(conv)
case("conv_strided", KERNEL, (IMAGE,), CONV)(partial(conv, window_strides=(2, 3), padding="VALID"))
case("conv_dilated", KERNEL, (IMAGE,), CONV)(partial(conv, rhs_dilation=(2, 1)))
case("conv_input_dilated", KERNEL, (IMAGE,), CONV)(partial(conv, lhs_dilation=(2, 3), padding=((1, 2), (0, 1))))
case("conv_grouped", {"w": array(3, 2, D, 3 * M)}, (array(B, 9, 8, 3 * D),), CONV)(partial(conv, feature_group_count=3))
case("conv_depthwise", {"w": array(3, 2, 1, 3 * D)}, (IMAGE,), CONV)(partial(conv, feature_group_count=D))
case("conv_1x1_strided", {"w": array(1, 1, D, M)}, (IMAGE,), CONV)(partial(conv, window_strides=(2, 2)))
case("conv_nchw", {"w": array(M, D, 3, 2)}, (jnp.moveaxis(IMAGE, 3, 1),), {"w": ((1, 2, 3), (0,), ())})(
    lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 1), "SAME")
)
case("conv_transpose", KERNEL, (IMAGE,), CONV)(
    lambda p, x: lax.conv_transpose(x, p["w"], (2, 2), "SAME", dimension_numbers=HWIO)
)
case("conv_transpose_kernel", {"w": array(3, 2, M, D)}, (IMAGE,), {"w": ((0, 1, 3), (2,), ())})(
    lambda p, x: lax.conv_transpose(x, p["w"], (2, 2), "SAME", dimension_numbers=HWIO, transpose_kernel=True)
)
case("conv_tied", KERNEL, (IMAGE,), CONV)(
    lambda p, x: lax.conv_transpose(conv(p, x), p["w"], (1, 1), "SAME", dimension_numbers=HWIO, transpose_kernel=True)
)
case("conv_1d", {"w": array(3, D, M)}, (array(B, 8, D),), {"w": ((0, 1), (2,), ())})(
    lambda p, x: lax.conv_general_dilated(x, p["w"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
)
case("conv_3d", {"w": array(2, 3, 2, H, K)}, (array(B, 4, 5, 4, H),), {"w": ((0, 1, 2, 3), (4,), ())})(
    lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 2, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))
)
for _lhs, _rhs, _out in (("NHWC", "HWIO", "NCHW"), ("CNWH", "WOHI", "WHNC")):
    case(
        f"conv_{_lhs}_{_rhs}_{_out}".lower(),
        {"w": KERNEL["w"].transpose(["HWIO".index(c) for c in _rhs])},
        (IMAGE.transpose(["NHWC".index(c) for c in _lhs]),),
        {"w": (tuple(d for d, c in enumerate(_rhs) if c != "O"), (_rhs.index("O"),), ())},
    )(partial(conv, dimension_numbers=(_lhs, _rhs, _out), window_strides=(2, 1)))
case("conv_grouped_layouts", {"w": array(3 * M, 3, 2, D)}, (array(3 * D, 9, B, 8),), {"w": ((1, 2, 3), (0,), ())})(
    partial(conv, dimension_numbers=("CHNW", "OHWI", "WNCH"), feature_group_count=3)
)
case("conv_tied_layouts", KERNEL, (IMAGE, array(M, B, 5, 4)), CONV)(
    lambda p, x, y: (
        conv(p, x, dimension_numbers=("NHWC", "HWIO", "CHNW")),
        conv(p, y, dimension_numbers=("CNHW", "HWOI", "NWHC"), lhs_dilation=(2, 1), padding=((2, 1), (0, 1))),
    )
)
case(
    "conv_tied_in_groups",
    {"w": array(3, H, 3 * K)},
    (array(B, 8, 3 * H), array(B, 3 * K, 9)),
    {"w": ((0, 2), (1,), ())},
)(
    lambda p, x, y: (
        lax.conv_general_dilated(y, p["w"], (1,), "SAME", dimension_numbers=("NCW", "WOI", "CNW")),
        lax.conv_general_dilated(
            x, p["w"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "CWN"), feature_group_count=3
        ),
    )
)
case("conv_1d_layouts", {"w": array(3, D, M)}, (array(D, 8, B),), {"w": ((0, 1), (2,), ())})(
    lambda p, x: lax.conv_general_dilated(x, p["w"], (2,), "SAME", dimension_numbers=("CWN", "WIO", "WNC"))
)
case("conv_3d_layouts", {"w": array(2, H, 3, K, 2)}, (array(4, B, 5, H, 4),), {"w": ((0, 1, 2, 4), (3,), ())})(
    lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 2, 1), "SAME", dimension_numbers=("DNHCW", "DIHOW", "NWCHD"))
)

# --- programs with bodies --------------------------------------------------------------------------------------------
STACK = {"w": array(L, D, D)}
STACKED: dict[str, Roles] = {"w": ((1,), (2,), (0,))}
SQUARE = {"w": array(D, D)}


def layer(w: Any, x: Any) -> Any:
    return x + jnp.tanh(x @ w)


def scanned(p: Any, x: Any, step: Callable[..., Any] = layer, **how: Any) -> Any:
    return lax.scan(lambda c, w: (step(w, c), c.sum()), x, p["w"], **how)


case("jit", W, (X,), ONE)(lambda p, x: jax.jit(lambda w, x: jnp.tanh(x @ w))(p["w"], x))
case("jit_returns_view", W, (X,), ONE)(lambda p, x: jax.jit(lambda w: w.T)(p["w"]) @ jnp.swapaxes(x, 1, 2))
case("remat", SQUARE, (X,), ONE)(lambda p, x: jax.checkpoint(layer)(p["w"], x))
case("remat_policy", SQUARE, (X,), ONE)(
    lambda p, x: jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)(p["w"], x)
)
case("scan", STACK, (X,), STACKED)(scanned)
case("scan_reverse", STACK, (X,), STACKED)(partial(scanned, reverse=True, unroll=2))
case("scan_remat", STACK, (X,), STACKED)(partial(scanned, step=jax.checkpoint(layer, prevent_cse=False)))
case(
    "scan_of_two",
    {"u": array(L, D, M), "v": array(L, M, D), "b": array(L, M)},
    (X,),
    {"u": STACKED["w"], "v": STACKED["w"]},
)(lambda p, x: lax.scan(lambda c, w: (c + jnp.tanh(c @ w["u"] + w["b"][None, None]) @ w["v"], None), x, p)[0])
case("scan_of_scan", {"w": array(2, L, D, D)}, (X,), {"w": ((2,), (3,), (0, 1))})(
    lambda p, x: lax.scan(lambda c, w: (lax.scan(lambda c, w: (layer(w, c), None), c, w)[0], None), x, p["w"])[0]
)
case("scan_constant", SQUARE, (X,), ONE)(
    lambda p, x: lax.scan(lambda c, _: (layer(p["w"], c), None), x, None, length=3)[0]
)
case("scan_carried", SQUARE, (X,), ONE)(
    lambda p, x: lax.scan(lambda c, _: ((c[0], layer(c[0], c[1])), None), (p["w"], x), None, length=3)[0][1]
)
case("map", STACK, (X,), STACKED)(lambda p, x: lax.map(lambda w: jnp.tanh(x @ w), p["w"]))
case("cond", {"u": array(D, M), "v": array(D, M, seed=3)}, (X, jnp.array([True, False])), {"u": MATRIX, "v": MATRIX})(
    lambda p, x, go: sum(
        lax.cond(g, lambda x: jnp.tanh(x @ p["u"]), lambda x: x @ p["v"] + jnp.sin(x @ p["u"]), x) for g in go
    )
)
case("switch", STACK, (X, jnp.int32(1)), STACKED)(
    lambda p, x, i: lax.switch(i, [lambda x: x @ p["w"][0], lambda x: x @ p["w"][1] @ p["w"][3], lambda x: x], x)
)
case("scan_carried_through_calls", SQUARE, (X,), ONE)(
    lambda p, x: lax.scan(
        jax.jit(jax.checkpoint(lambda c, _: ((c[0], layer(c[0], c[1])), None))), (p["w"], x), None, length=3
    )[0][1]
)
case("vmapped_conv", KERNEL, (IMAGE[None],), CONV)(lambda p, x: jax.vmap(lambda x: conv(p, x))(x))
case("fori", SQUARE, (X,), ONE)(lambda p, x: lax.fori_loop(0, 3, lambda i, c: layer(p["w"], c), x))
case("fori_indexed", STACK, (X,), STACKED)(lambda p, x: lax.fori_loop(0, L, lambda i, c: layer(p["w"][i], c), x))
case("grad_inside", {"u": array(D, M), "v": array(M, K)}, (X,), {"u": MATRIX, "v": MATRIX})(
    lambda p, x: jax.grad(lambda x: jnp.sin(jnp.tanh(x @ p["u"]) @ p["v"]).sum())(x)
)
case("custom_jvp", W, (X,), ONE)(lambda p, x: jax.nn.relu(jax.nn.gelu(x) @ p["w"]))
case("random_keys", W, (X, jax.random.key(7)), ONE)(
    lambda p, x, key: jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0.0) @ p["w"]
)
case("static_arguments", W, (X, "tanh"), ONE, kwargs={"twice": True})(
    lambda p, x, name, *, twice=False: getattr(jnp, name)(x @ p["w"]) * (2 if twice else 1)
)

# --- Flax, Equinox ---------------------------------------------------------------------------------------------------


def linen(name: str, module: nn.Module, x: Any, expect: dict[str, Roles], **options: Any) -> None:
    shapes = jax.eval_shape(module.init, jax.random.key(1), x)
    params = jax.tree.map(lambda s: array(*s.shape, dtype=s.dtype), shapes)
    CASES.append(Case(name, module.apply, params, (x,), expect, **options))


class ScannedNet(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.remat(Block) if self.remat else Block
        return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=L)(name="blocks")(
            x, None
        )[0]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return x + nn.Dense(D)(nn.gelu(nn.Dense(M)(nn.LayerNorm()(x)))), None


class TiedLM(nn.Module):
    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(V, D, name="embed")
        return embed.attend(nn.Dense(D, name="mix")(embed(ids)))


linen("linen_dense", nn.Dense(M), X, {"params/kernel": MATRIX})
linen("linen_bf16", nn.Dense(M, dtype=jnp.bfloat16), X, {"params/kernel": MATRIX}, tol=3e-2)
linen(
    "linen_attention",
    nn.MultiHeadDotProductAttention(H, qkv_features=H * K),
    X,
    {
        **{f"params/{n}/kernel": ((0,), (1, 2), ()) for n in ("query", "key", "value")},
        "params/out/kernel": ((0, 1), (2,), ()),
    },
)
linen("linen_conv", nn.Conv(M, (3, 2), padding="CIRCULAR", strides=2), IMAGE, {"params/kernel": CONV["w"]})
linen("linen_causal_conv", nn.Conv(M, (3,), padding="CAUSAL"), X, {"params/kernel": ((0, 1), (2,), ())})
linen("linen_conv_transpose", nn.ConvTranspose(M, (3, 2), strides=(2, 2)), IMAGE, {"params/kernel": CONV["w"]})
linen("linen_tied", TiedLM(), IDS, {"params/embed/embedding": MATRIX, "params/mix/kernel": MATRIX})
linen("linen_scan", ScannedNet(), X, {f"params/blocks/Dense_{i}/kernel": STACKED["w"] for i in (0, 1)})
linen("linen_scan_remat", ScannedNet(remat=True), X, {f"params/blocks/Dense_{i}/kernel": STACKED["w"] for i in (0, 1)})
linen(
    "linen_lstm",
    nn.RNN(nn.LSTMCell(M)),
    X,
    {f"params/cell/{g}/kernel": MATRIX for g in ("ii", "if", "ig", "io", "hi", "hf", "hg", "ho")},
)
ROUTED = {"params/up": STACKED["w"], "params/down": STACKED["w"], "params/router/kernel": MATRIX}
linen("linen_routed", Routed(), X, ROUTED, vmap=False)
linen("linen_einsum", nn.Einsum((D, H, K), "btd,dhk->bthk", use_bias=False), X, {"params/kernel": ((0,), (1, 2), ())})


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.norm = nnx.Linear(D, M, rngs=rngs), nnx.LayerNorm(M, rngs=rngs)
        self.down = nnx.LinearGeneral(M, (H, K), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.norm(nnx.relu(self.up(x))))


_NET = NnxNet(nnx.Rngs(0))
_FN, _PARAMS = jlora.nnx.split(_NET)
CASES.append(Case("nnx", _FN, _PARAMS, (X,), {"up/kernel": MATRIX, "down/kernel": ((0,), (1, 2), ())}))

_GRAPH, _STATE = nnx.split(_NET)
CASES.append(
    Case(
        "nnx_state",
        lambda s, x: nnx.merge(_GRAPH, s)(x),
        _STATE,
        (X,),
        {"up/kernel/value": MATRIX, "down/kernel/value": ((0,), (1, 2), ())},
    )
)

_ARRAYS, _STATIC = eqx.partition(
    eqx.filter_eval_shape(eqx.nn.MLP, D, K, M, 2, key=jax.random.key(2)), lambda x: hasattr(x, "shape")
)
_ARRAYS = jax.tree.map(lambda s: array(*s.shape), _ARRAYS)
CASES.append(
    Case(
        "equinox",
        lambda p, x: jax.vmap(jax.vmap(eqx.combine(p, _STATIC)))(x),
        _ARRAYS,
        (X,),
        {f"layers/{i}/weight": ((1,), (0,), ()) for i in range(3)},
    )
)

BY_NAME = {c.name: c for c in CASES}
if len(BY_NAME) < len(CASES):
    raise ValueError("Two rows of the table have the same name.")
