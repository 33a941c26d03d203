"""Rows of the table: weights that are joined, put in another order, grouped, split over devices, or shared by several calls."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from case import MATRIX, ONE, B, D, E, H, K, L, M, T, V, W, X, array, case
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

TWO = {"u": MATRIX, "v": MATRIX}
PAIR = {"u": array(D, M), "v": array(D, M, seed=3)}
BATCHED = {"w": ((1,), (2,), (0,))}
ORDER = np.random.default_rng(1).permutation(M)

# --- joined ----------------------------------------------------------------------------------------------------------
case("concatenated_outputs", {"u": array(D, M), "v": array(D, K)}, (X,), TWO)(
    lambda p, x: jnp.tanh(x @ jnp.concatenate([p["u"], p["v"]], axis=1))
)
case("concatenated_inputs", {"u": array(3, M), "v": array(D - 3, M)}, (X,), TWO)(
    lambda p, x: jnp.tanh(x @ jnp.concatenate([p["u"], p["v"]]))
)
case("concatenated_with_constant", W, (X,), ONE)(
    lambda p, x: jnp.tanh(x @ jnp.concatenate([jnp.ones((D, 2)), p["w"], jnp.ones((D, 1))], axis=1))
)
case(
    "concatenated_experts",
    {"u": array(2, D, M), "v": array(3, D, M)},
    (array(B, 5, D),),
    dict.fromkeys("uv", BATCHED["w"]),
)(lambda p, x: jnp.tanh(jnp.einsum("bed,edm->bem", x, jnp.concatenate([p["u"], p["v"]]))))
case("fused_then_split", {"u": array(D, M), "v": array(D, M, seed=3)}, (X,), TWO)(
    lambda p, x: (
        sum(jnp.sin(x @ w) for w in jnp.split(jnp.concatenate([p["u"], p["v"]], axis=1), [K], axis=1)[:1])
        + jnp.tanh(x @ p["v"])[..., :K]
    )
)
case("stacked", PAIR, (X,), TWO)(lambda p, x: jnp.tanh(jnp.einsum("btd,sdm->sbtm", x, jnp.stack([p["u"], p["v"]]))))
case("stacked_layers", {"u": array(D, D), "v": array(D, D, seed=3)}, (X,), TWO)(
    lambda p, x: lax.scan(lambda c, w: (c + jnp.tanh(c @ w), None), x, jnp.stack([p["u"], p["v"]]))[0]
)
case("stacked_with_constant", W, (X,), ONE)(
    lambda p, x: jnp.tanh(jnp.einsum("btd,dsm->sbtm", x, jnp.stack([jnp.ones((D, M)), p["w"]], axis=1)))
)
case("stacked_transposed", {"u": array(D, D), "v": array(D, D, seed=3)}, (X,), {"u": MATRIX, "v": ((1,), (0,), ())})(
    lambda p, x: jnp.tanh(jnp.einsum("btd,sdm->sbtm", x, jnp.stack([p["u"], p["v"].T])))
)
case("stacked_into_inputs", PAIR, (array(B, T, 3 * D),), TWO)(
    lambda p, x: jnp.tanh(x @ jnp.stack([p["u"], p["v"], p["u"]]).reshape(3 * D, M))
)
case("stacked_into_outputs", PAIR, (X,), TWO)(
    lambda p, x: jnp.tanh(x @ jnp.stack([p["u"], p["v"], p["u"]]).transpose(1, 2, 0).reshape(D, 3 * M))
)
case("stacked_with_constant_into_inputs", PAIR, (array(B, T, 3 * D),), TWO)(
    lambda p, x: jnp.tanh(x @ jnp.stack([p["u"], array(D, M, seed=4), p["v"]]).reshape(3 * D, M))
)
case("stacked_with_constant_into_outputs", PAIR, (X,), TWO)(
    lambda p, x: jnp.tanh(x @ jnp.stack([p["u"], array(D, M, seed=4), p["v"]], 1).reshape(D, 3 * M))
)
GAINS = array(3, D, 1, seed=6), array(3, 1, M, seed=7)
case("repeated_by_gains", W, (array(T, D),), ONE)(
    lambda p, x: jnp.tanh(jnp.einsum("td,hdm->thm", x, p["w"][None] * GAINS[0] * GAINS[1]))
)
case("scaled_copies_into_inputs", W, (array(B, T, 3 * D),), ONE)(
    lambda p, x: jnp.tanh(x @ (p["w"][None] * array(3, 1, M, seed=6)).reshape(3 * D, M))
)
case("scaled_copies_into_outputs", W, (X,), ONE)(
    lambda p, x: jnp.tanh(x @ (p["w"][:, None] * array(D, 3, 1, seed=6)).reshape(D, 3 * M))
)
case("block_diagonal_copies", W, (array(T, 3 * D),), ONE)(lambda p, x: jnp.tanh(x @ jnp.kron(jnp.eye(3), p["w"])))
case("kronecker_with_constant", W, (array(T, 3 * D),), ONE)(
    lambda p, x: jnp.tanh(x @ jnp.einsum("ab,dm->dbma", array(3, 3), p["w"]).reshape(3 * D, 3 * M))
)
case("unstacked", {"w": array(3, D, M)}, (X,), BATCHED)(lambda p, x: sum(jnp.tanh(x @ w) for w in jnp.unstack(p["w"])))
case("padded_outputs", W, (X,), ONE)(lambda p, x: jnp.tanh(x @ jnp.pad(p["w"], ((0, 0), (2, 3)))))
case("padded_inputs", {"w": array(H, M)}, (array(B, T, H + 3),), ONE)(
    lambda p, x: jnp.tanh(x @ jnp.pad(p["w"], ((1, 2), (0, 0))))
)
case("padded_with_a_new_axis", W, (X,), ONE)(
    lambda p, x: jnp.tanh(jnp.einsum("btd,sdm->sbtm", x, lax.pad(p["w"][None], 0.0, [(1, 0, 0), (0, 0, 0), (0, 2, 1)])))
)


def block_diagonal(blocks):
    rows = [jnp.pad(w, ((0, 0), (i * H, (len(blocks) - 1 - i) * H))) for i, w in enumerate(blocks)]
    return jnp.concatenate(rows)


case("block_diagonal", {"w": array(3, K, H)}, (array(B, 3 * K),), BATCHED)(
    lambda p, x: jnp.tanh(x @ block_diagonal(p["w"]))
)
case("tiled", W, (X,), ONE)(lambda p, x: jnp.tanh(x @ jnp.tile(p["w"], (1, 2))))
case("tiled_inputs", W, (array(B, T, 2 * D),), ONE)(lambda p, x: jnp.tanh(x @ jnp.tile(p["w"], (2, 1))))
case("rolled", W, (X,), ONE)(lambda p, x: jnp.tanh(x @ jnp.roll(p["w"], 2, axis=1)))
case("summed_weights", PAIR, (X,), TWO)(lambda p, x: jnp.tanh(x @ (p["u"] + p["v"])))
case("subtracted", PAIR, (X,), TWO)(lambda p, x: jnp.tanh(x @ (0.5 - (p["u"] - 2.0 * p["v"]))))
case("shifted", W, (X,), ONE)(lambda p, x: jnp.tanh(x @ (p["w"] + jnp.eye(D, M))))
case("summed_transposed", {"w": array(D, D)}, (X,), ONE)(lambda p, x: jnp.tanh(x @ (p["w"] + p["w"].T)))

case("gain_under_vmap", W, (X[:, 0], array(B)), ONE)(
    lambda p, x, s: jax.vmap(lambda x, s: jnp.tanh((p["w"] * s).T @ x))(x, s)
)

# --- in another order ------------------------------------------------------------------------------------------------
case("permuted_outputs", W, (X,), ONE)(lambda p, x: jnp.tanh(x @ p["w"][:, ORDER]))
case("permuted_inputs", W, (X,), ONE)(lambda p, x: jnp.tanh(x @ p["w"][np.arange(D)[::-1]]))
case("permuted_by_a_parameter", {"w": W["w"], "order": jnp.asarray(ORDER)}, (X,), ONE)(
    lambda p, x: jnp.tanh(x @ jnp.take(p["w"], p["order"], axis=1, mode="clip"))
)
case("permuted_heads", {"w": array(D, H, K)}, (X,), {"w": ((0,), (1, 2), ())})(
    lambda p, x: jnp.tanh(jnp.einsum("btd,dhk->bthk", x, p["w"][:, np.array([2, 0, 1, 4, 3])]))
)
case("permuted_and_joined", PAIR, (X,), TWO)(
    lambda p, x: (
        jnp.tanh(x @ jnp.concatenate([p["u"][:, ORDER], p["v"]], axis=1)) + (x @ (p["u"][:, ORDER] + 1.0)).sum()
    )
)
case("kept_rows", {"w": array(D, M)}, (array(B, T, H),), ONE)(
    lambda p, x: jnp.tanh(x @ p["w"][np.array([1, 5, 2, 9, 0])])
)
case("positions", {"e": array(V, D), "w": array(D, M)}, (X,), {"e": MATRIX, "w": MATRIX})(
    lambda p, x: jnp.tanh((x + p["e"][jnp.arange(T)][None]) @ p["w"])
)

# --- groups of tokens ------------------------------------------------------------------------------------------------
TOKENS, SIZES = array(7, D, seed=2), jnp.array([2, 0, 4, 1, *[0] * (E - 4)], jnp.int32)
EXPERTS = {"w": array(E, D, M)}


def ragged(x, w, sizes, summed: int = 1):
    numbers = lax.RaggedDotDimensionNumbers((((1,), (summed,)), ((), ())), [0], [0])
    return lax.ragged_dot_general(x, w, sizes, numbers)


case("ragged_dot", EXPERTS, (TOKENS, SIZES), BATCHED, vmap=False)(
    lambda p, x, n: jnp.tanh(lax.ragged_dot(x, p["w"], n))
)
case("ragged_dot_transposed", {"w": array(E, M, D)}, (TOKENS, SIZES), {"w": ((2,), (1,), (0,))}, vmap=False)(
    lambda p, x, n: jnp.tanh(ragged(x, p["w"], n, summed=2))
)
case("ragged_dot_gain", {"w": EXPERTS["w"], "g": array(M)}, (TOKENS, SIZES), BATCHED, vmap=False)(
    lambda p, x, n: jnp.tanh(lax.ragged_dot(x, p["w"] * p["g"][None, None], n))
)
case(
    "ragged_up_down",
    {"u": EXPERTS["w"], "v": array(E, M, D)},
    (TOKENS, SIZES),
    dict.fromkeys("uv", BATCHED["w"]),
    vmap=False,
)(lambda p, x, n: lax.ragged_dot(jax.nn.silu(lax.ragged_dot(x, p["u"], n)), p["v"], n))
case("ragged_sorted", EXPERTS, (TOKENS, jnp.array([3, 1, 3, 0, 2, 1, 16])), BATCHED, vmap=False)(
    lambda p, x, i: jnp.tanh(
        jnp.zeros((7, M))
        .at[jnp.argsort(i)]
        .set(lax.ragged_dot(x[jnp.argsort(i)], p["w"], jnp.bincount(i, length=E).astype(jnp.int32)))
    )
)
case("ragged_in_layers", {"w": array(L, E, D, D)}, (TOKENS, SIZES), {"w": ((2,), (3,), (0, 1))}, vmap=False)(
    lambda p, x, n: lax.scan(lambda c, w: (c + jnp.tanh(lax.ragged_dot(c, w, n)), None), x, p["w"])[0]
)
case("experts_shared", W, (TOKENS, SIZES), ONE, vmap=False)(
    lambda p, x, n: jnp.tanh(lax.ragged_dot(x, jnp.broadcast_to(p["w"], (E, D, M)), n))
)
case("chosen_two_experts", EXPERTS, (TOKENS, jnp.arange(14).reshape(7, 2)), BATCHED)(
    lambda p, x, i: jnp.tanh(jnp.einsum("td,tkdm->tkm", x, p["w"][i]))
)

# --- over devices ----------------------------------------------------------------------------------------------------
MESH = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))


def sharded(in_specs, out_specs, body, **how):
    return lambda p, x: jax.shard_map(body, mesh=MESH, in_specs=in_specs, out_specs=out_specs, **how)(p["w"], x)


case("shard_map_outputs", W, (X,), ONE)(sharded((P(None, "i"), P()), P(None, None, "i"), lambda w, x: jnp.tanh(x @ w)))
case("shard_map_inputs", W, (X,), ONE)(
    sharded((P("i"), P(None, None, "i")), P(), lambda w, x: jnp.tanh(lax.psum(x @ w, "i")))
)
case("shard_map_gathered", W, (X,), ONE)(
    sharded((P("i"), P("i")), P("i"), lambda w, x: jnp.tanh(x @ lax.all_gather(w, "i", axis=0, tiled=True)))
)
case("shard_map_unchecked", W, (X,), ONE)(
    sharded((P(None, "i"), P()), P(None, None, "i"), lambda w, x: jnp.tanh(x @ w), check_vma=False)
)

# --- shared bodies ---------------------------------------------------------------------------------------------------


def block(w, x):
    return x + jnp.tanh(x @ w)


def layers(step, p, x):
    for w in p:
        x = step(w, x)
    return x


LIST = [array(D, D, seed=i) for i in range(3)]
EACH = {str(i): MATRIX for i in range(3)}
case("jitted_layers", LIST, (X,), EACH)(partial(layers, jax.jit(block)))
case("remat_layers", LIST, (X,), EACH)(partial(layers, jax.checkpoint(block)))
case("jitted_views", LIST, (X,), EACH)(
    partial(layers, lambda w, x, turn=jax.jit(lambda w: jnp.flip(w, 0).T): x + jnp.tanh(x @ turn(w).T))
)
case("jitted_in_jitted", LIST, (X,), EACH)(
    partial(layers, jax.jit(lambda w, x, step=jax.jit(block): step(w, step(w, x))))
)


@jax.custom_vjp
def clipped(x):
    return jnp.tanh(x)


clipped.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))
case("custom_vjp_of_activations", W, (X,), ONE)(lambda p, x: clipped(x @ p["w"]))


class Routed(nn.Module):
    """Top-1 experts by sorting, as current mixture models do it."""

    @nn.compact
    def __call__(self, x):
        flat = x.reshape(-1, D)
        gates = jax.nn.softmax(nn.Dense(E, name="router")(flat))
        chosen = jnp.argmax(gates, axis=-1)
        order = jnp.argsort(chosen)
        up = self.param("up", nn.initializers.lecun_normal(), (E, D, M))
        down = self.param("down", nn.initializers.lecun_normal(), (E, M, D))
        sizes = jnp.bincount(chosen, length=E).astype(jnp.int32)
        out = lax.ragged_dot(nn.gelu(lax.ragged_dot(flat[order], up, sizes)), down, sizes)
        gate = jnp.take_along_axis(gates, chosen[:, None], axis=1)
        return x + (out[jnp.argsort(order)] * gate).reshape(x.shape)


# --- found by attacks ------------------------------------------------------------------------------------------------


def convolve(x, w, stride=1, padding="VALID", **how):
    return lax.conv_general_dilated(x, w, (stride,), padding, dimension_numbers=("NWC", "WIO", "NWC"), **how)


LONG = array(B, 2 * T, D)
case("conv_constant_along_its_window", W, (LONG,), ONE)(
    lambda p, x: jnp.tanh(convolve(x, jnp.broadcast_to(p["w"][None], (2, D, M)), 2))
)
case("conv_repeated_along_its_window", {"w": array(1, D, M)}, (LONG,), {"w": ((0, 1), (2,), ())})(
    lambda p, x: jnp.tanh(convolve(x, jnp.tile(p["w"], (3, 1, 1)), 1, "SAME"))
)
case("conv_constant_along_its_inputs", {"w": array(3, 1, M)}, (LONG,), {"w": ((0,), (1, 2), ())})(
    lambda p, x: jnp.tanh(convolve(x, jnp.broadcast_to(p["w"], (3, D, M))))
)
case("picked_out_of_bounds_along_a_constant_axis", W, (array(3, D), jnp.array([0, 5, 1])), ONE)(
    lambda p, x, i: jnp.tanh(
        jnp.einsum("bd,bdm->bm", x, jnp.broadcast_to(p["w"], (2, D, M)).at[i].get(mode="fill", fill_value=0))
    )
)
case("one_expert_out_of_bounds", {"w": array(1, D, M)}, (array(3, D), jnp.array([0, 1, 0])), BATCHED)(
    lambda p, x, i: jnp.tanh(jnp.einsum("bd,bdm->bm", x, p["w"].at[i].get(mode="fill", fill_value=0)))
)
case("scaled_by_a_parameter", {"w": array(D, D), "alpha": jnp.float32(0.1)}, (X,), ONE)(
    lambda p, x: x + p["alpha"] * jnp.tanh(x @ p["w"])
)
case(
    "weight_scaled_by_a_parameter",
    {"w": array(D, M), "v": array(D, M, seed=3), "alpha": jnp.float32(0.3)},
    (X,),
    {"w": MATRIX, "v": MATRIX},
)(lambda p, x: jnp.tanh(x @ (p["w"] + p["alpha"] * p["v"])))
case(
    "row_of_a_table_times_a_weight",
    {"table": array(V, D), "w": array(D, M)},
    (jnp.int32(2),),
    {"table": MATRIX, "w": MATRIX},
)(lambda p, i: jnp.tanh(p["table"][i] @ p["w"]))
case("empty_view", W, (X,), ONE)(lambda p, x: jnp.tanh(x @ p["w"]) + p["w"][:, :0].reshape(D, 0, 2).reshape(D, 0).sum())
case("platform_dependent", W, (X,), ONE)(
    lambda p, x: lax.platform_dependent(x, tpu=lambda x: jnp.sin(x @ p["w"]), default=lambda x: jnp.tanh(x @ p["w"]))
)
case(
    "row_of_a_stack_of_tables",
    {"u": array(V, D), "v": array(V, D, seed=3)},
    (array(2, D), jnp.int32(4)),
    {"u": MATRIX, "v": MATRIX},
)(lambda p, x, i: jnp.tanh(jnp.stack([p["u"], p["v"]], 1)[i] + x))
