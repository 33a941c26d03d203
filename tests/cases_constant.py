"""Rows of the table: weights that are multiplied by constants, or by each other, before data meets them."""

import jax
import jax.numpy as jnp
from case import MATRIX, ONE, D, H, K, L, M, T, V, W, X, array, case
from cases_joined import LONG, convolve
from jax import lax

LEFT, RIGHT = array(D, D, seed=7), array(M, M, seed=8)  # as a rotation or a whitening of either side
UP, DOWN = array(V, D, seed=7), array(D, 3, seed=8)
AWAY = array(D, 1, seed=9)
ABSORBED = {"q": array(D, H), "k": array(D, H, seed=3)}

case("rotated_inputs", W, (X,), ONE)(lambda p, x: jnp.tanh(x @ (LEFT @ p["w"])))
case("rotated_outputs", W, (X,), ONE)(lambda p, x: jnp.tanh(x @ (p["w"] @ RIGHT)))
case("rotated_on_both_sides", W, (X,), ONE)(lambda p, x: jnp.tanh(x @ (LEFT @ p["w"] @ RIGHT).astype(jnp.float32)))
case("rotated_transposed", W, (X,), ONE)(lambda p, x: jnp.tanh(x @ (RIGHT @ (p["w"] * 0.5).T @ LEFT).T))
case("rotated_and_used_plain", W, (X,), ONE)(lambda p, x: jnp.tanh(x @ (LEFT @ p["w"])) + jnp.sin(x @ p["w"]))
case("multiplied_by_a_wider_constant", W, (array(2, T, V),), ONE)(lambda p, x: jnp.tanh(x @ (UP @ p["w"])))
case("projected", W, (X,), ONE)(lambda p, x: jnp.tanh(x @ (DOWN @ (DOWN.T @ p["w"]))))
case("direction_removed", W, (X,), ONE)(lambda p, x: jnp.tanh(x @ (p["w"] - AWAY @ (AWAY.T @ p["w"]))))
case("rotated_sum", {"u": array(D, M), "v": array(D, M, seed=3)}, (X,), {"u": MATRIX, "v": MATRIX})(
    lambda p, x: jnp.tanh(x @ (LEFT @ (p["u"] - 0.5 * p["v"])))
)
case("rotated_heads", {"w": array(D, H, K)}, (X,), {"w": ((0,), (1, 2), ())})(
    lambda p, x: jnp.tanh(jnp.einsum("btd,dhk->bthk", x, jnp.einsum("dhk,hkj->dhj", p["w"], array(H, K, K, seed=2))))
)
case("rotated_experts", {"w": array(H, D, M)}, (array(3, H, D),), {"w": ((1,), (2,), (0,))})(
    lambda p, x: jnp.tanh(jnp.einsum("beg,egm->bem", x, jnp.einsum("egd,edm->egm", array(H, D, D, seed=2), p["w"])))
)
case("mixed_layers", {"w": array(L, D, M)}, (array(3, D),), {"w": ((1,), (2,), (0,))})(
    lambda p, x: sum(jnp.tanh(x @ w) for w in jnp.unstack(jnp.tensordot(array(L, L, seed=2), p["w"], 1)))
)
case("averaged_layers", {"w": array(L, D, M)}, (array(3, D),), {"w": ((0,), (1, 2), ())})(
    lambda p, x: jnp.tanh(x @ jnp.tensordot(array(L, seed=2), p["w"], 1))
)
case("rotated_scanned", {"w": array(L, D, D)}, (X,), {"w": ((1,), (2,), (0,))})(
    lambda p, x: lax.scan(lambda c, w: (c + jnp.tanh(c @ (LEFT @ w)), None), x, p["w"])[0]
)
case("rotated_stack", {"w": array(L, D, D)}, (X,), {"w": ((1,), (2,), (0,))})(
    lambda p, x: lax.scan(lambda c, w: (c + jnp.tanh(c @ w), None), x, jnp.einsum("gd,ldm->lgm", LEFT, p["w"]))[0]
)
case(
    "rotated_table",
    {"table": array(V, D), "w": array(D, M)},
    (jnp.array([3, 1, 4]),),
    dict.fromkeys(["table", "w"], MATRIX),
)(lambda p, i: jnp.tanh((p["table"] @ LEFT)[i] @ p["w"]))
case("rotated_conv", {"w": array(3, D, M)}, (LONG,), {"w": ((0, 1), (2,), ())})(
    lambda p, x: jnp.tanh(convolve(x, jnp.einsum("wdm,mn->wdn", p["w"], RIGHT)))
)
case("absorbed", ABSORBED, (X,), {"q": MATRIX, "k": ((1,), (0,), ())})(lambda p, x: jnp.tanh(x @ (p["q"] @ p["k"].T)))
case(
    "absorbed_per_head",
    {"q": array(D, K, H), "k": array(M, K, H)},
    (X,),
    {"q": ((0,), (1, 2), ()), "k": ((2,), (0, 1), ())},
)(lambda p, x: jnp.tanh(jnp.einsum("btd,dme->btme", x, jnp.einsum("dkh,mkh->dmk", p["q"], p["k"]))))
case(
    "multiplied_with_heads_of_both",
    {"q": array(D, H, K), "k": array(M, L, K)},
    (array(T, D, L),),
    {"q": ((0, 2), (1,), ()), "k": ((1, 2), (0,), ())},
)(lambda p, x: jnp.tanh(jnp.einsum("tdl,dhml->thm", x, jnp.einsum("dhk,mlk->dhml", p["q"], p["k"]))))
case("rotated_behind_a_barrier", W, (X,), ONE)(
    lambda p, x: jnp.tanh((lambda r, x: x @ (r @ p["w"]))(*lax.optimization_barrier((LEFT, x))))
)
case("squared", {"w": array(D, D)}, (X,), ONE)(lambda p, x: jnp.tanh(x @ (p["w"] @ p["w"])))
case("learned_queries", {"queries": array(3, D), "w": array(D, M)}, (array(T, M),), ONE)(
    lambda p, x: jax.nn.softmax(jnp.sin(p["queries"] @ p["w"]) @ x.T) @ x
)
case("positions_projected", {"w": array(D, M)}, (array(T, M),), ONE)(
    lambda p, x: jnp.tanh(x + jnp.sin(array(T, D, seed=5)) @ p["w"])
)
case("attention_vector", {"w": array(D, M), "a": array(M)}, (X,), ONE)(
    lambda p, x: jnp.tanh(x @ p["w"]) * jnp.sin(x @ (p["w"] @ p["a"]))[..., None]
)
case("summed_with_constants", W, (X,), ONE)(
    lambda p, x: jnp.tanh(x @ p["w"]) * jnp.einsum("dm,dm->", array(D, M, seed=4), p["w"])
)
