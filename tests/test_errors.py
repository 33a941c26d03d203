"""Bad input: each error names where, what was got, the nearest thing that would work, and what to do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME
from flax import nnx
from jax import lax

import jlora
from jlora._text import counted


def net(params, x):
    hidden = jnp.tanh(x @ params["mlp"]["up"]["kernel"] + params["mlp"]["up"]["bias"][None])
    return hidden @ params["mlp"]["down"]["kernel"] @ params["head"]["kernel"]


PARAMS = {
    "mlp": {"up": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}, "down": {"kernel": jnp.ones((5, 7))}},
    "head": {"kernel": jnp.ones((7, 2))},
    "spare": {"kernel": jnp.ones((3, 3))},
    "step": jnp.zeros((), jnp.int32),
}
X = jnp.ones((4, 3))
SITES = jlora.sites(net, PARAMS, X)
KEY = jax.random.key(0)


def init(*rules):
    return jlora.init(KEY, PARAMS, SITES, list(rules))


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, -1, 2.0, "8", True, None])
def test_rank_must_be_a_whole_number(rank):
    with pytest.raises(ValueError, match=r"LoRA\(rank=\.\.\.\) must be a whole number from 1 up"):
        jlora.LoRA(rank=rank)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), "16", None])
def test_alpha_must_be_finite_and_positive(alpha):
    with pytest.raises(ValueError, match=r"LoRA\(alpha=\.\.\.\) must be a finite number above 0"):
        jlora.LoRA(alpha=alpha)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 2, "0.1"])
def test_dropout_must_be_a_rate(dropout):
    with pytest.raises(ValueError, match=r"LoRA\(dropout=\.\.\.\) must be a rate"):
        jlora.LoRA(dropout=dropout)


def test_rules_take_keywords_only_and_cannot_be_changed():
    with pytest.raises(TypeError, match="positional"):
        jlora.LoRA(8)  # ty: ignore
    with pytest.raises(AttributeError, match="cannot assign"):
        jlora.LoRA().rank = 4
    assert hash(jlora.LoRA(targets=["a", "b"])) == hash(jlora.LoRA(targets=("a", "b")))


def test_other_fields_of_rules_are_checked():
    with pytest.raises(ValueError, match=r"LoRA\(init_a=\.\.\.\)"):
        jlora.LoRA(init_a="kaiming")
    with pytest.raises(ValueError, match=r"LoRA\(dtype=\.\.\.\) must be a floating dtype"):
        jlora.LoRA(dtype=jnp.int8)
    with pytest.raises(ValueError, match=r"Full\(dtype=\.\.\.\) must be a floating dtype"):
        jlora.Full(targets=".*", dtype=jnp.int8)
    with pytest.raises(ValueError, match="targets of LoRA are empty"):
        jlora.LoRA(targets=[])
    with pytest.raises(TypeError, match="must be 'all-linear', a regular expression or a predicate"):
        jlora.LoRA(targets=3)


def test_invalid_regular_expression():
    with pytest.raises(ValueError, match=r"'\*kernel' of LoRA is not a regular expression"):
        jlora.LoRA(targets="*kernel")


@pytest.mark.parametrize("targets", ["mlp/dwon/kernel", ["mlp/up/kernel", "mlp/dwon/kernel"]])
def test_target_that_matches_nothing_names_the_nearest(targets):
    with pytest.raises(
        ValueError, match=r"(?s)No parameter matches target 'mlp/dwon/kernel'.*nearest: mlp/down/kernel.*whole path"
    ):
        init(jlora.LoRA(rank=1, targets=targets))


def test_pattern_with_a_typo_names_the_nearest():
    with pytest.raises(ValueError, match="nearest: mlp/down/kernel"):
        init(jlora.LoRA(rank=1, targets=".*/dwon/.*"))


@pytest.mark.parametrize(
    ("target", "advice"),
    [
        (
            "kernel",
            r"'\.\*kernel\.\*' would match head/kernel, mlp/down/kernel, mlp/up/kernel, and spare/kernel, which the rule can",
        ),
        ("up", r"'\.\*up\.\*' would match mlp/up/kernel, and mlp/up/bias, which the rule cannot train"),
        ("bias", r"'\.\*bias\.\*' would match mlp/up/bias, which the rule cannot train"),
        (".*upp.*", r"nearest: mlp/up/kernel, mlp/down/kernel, head/kernel\n"),  # and no bias
        ("all_linear", "Did you mean 'all-linear'"),
    ],
)
def test_advice_on_targets(target, advice):
    with pytest.raises(ValueError, match=advice):
        init(jlora.LoRA(rank=1, targets=target))


def test_paths_with_characters_of_regular_expressions():
    params = {"w(1)": jnp.ones((3, 5)), "v+": jnp.ones((5, 7))}
    sites = jlora.sites(lambda p, x: jnp.tanh(x @ p["w(1)"]) @ p["v+"], params, X)
    assert list(jlora.init(KEY, params, sites, jlora.LoRA(rank=1, targets=["w(1)", "v+"]))) == ["w(1)", "v+"]


def test_argument_of_the_name_that_apply_keeps():
    with pytest.raises(ValueError, match=r"(?s)an argument 'dropout_key' of its own.*wrap\(lambda"):
        jlora.wrap(lambda p, x, dropout_key=None: x)


def test_merge_into_integers():
    with pytest.raises(ValueError, match=r"merge\(dtype=\.\.\.\) must be one of float64, float32"):
        jlora.merge(PARAMS, init(jlora.LoRA(rank=1)), dtype=jnp.int8)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.float8_e4m3fn, bool, "floating"])
def test_merge_into_what_destroys_values(dtype):
    with pytest.raises(ValueError, match=r"merge\(dtype=\.\.\.\) must be one of .*bfloat16.\n  got: "):
        jlora.merge(PARAMS, init(jlora.LoRA(rank=1)), dtype=dtype)


def test_merge_keeps_complex_leaves():
    params = {"w": jnp.ones((3, 5), jnp.complex64) * 1j}
    lora = jlora.init(
        KEY,
        params,
        jlora.sites(lambda p, x: x @ p["w"], params, X.astype(jnp.complex64)),
        jlora.LoRA(rank=1, targets="w"),
    )
    merged = jlora.merge(params, lora, dtype=jnp.float32)
    np.testing.assert_array_equal(merged["w"], params["w"])


def test_empty_leaf():
    sites = jlora.sites(
        lambda p, x: x @ p["w"] + p["z"].reshape(5, 0).sum(), {"w": jnp.ones((3, 5)), "z": jnp.ones((0, 5))}, X
    )
    assert sites.skipped["z"].reason == "it is empty"


def test_predicate_that_accepts_nothing():
    with pytest.raises(ValueError, match="accepts none of 3 leaves"):
        init(jlora.LoRA(rank=1, targets=lambda site: site.kind == "conv"))


def test_all_linear_that_finds_only_the_head():
    sites = jlora.sites(lambda p, x: x @ p["kernel"], {"kernel": jnp.ones((3, 5))}, X)
    with pytest.raises(ValueError, match=r"(?s)No weight matches target 'all-linear'.*targets='kernel'"):
        jlora.init(KEY, {"kernel": jnp.ones((3, 5))}, sites, jlora.LoRA(rank=1))


def test_all_linear_without_any_weight():
    sites = jlora.sites(lambda p, x: x + p["b"][None], {"b": jnp.ones(3)}, X)
    with pytest.raises(ValueError, match=r"(?s)all-linear.*print\(sites\)"):
        jlora.init(KEY, {"b": jnp.ones(3)}, sites, jlora.LoRA(rank=1))


def test_rule_that_earlier_rules_shadow():
    with pytest.raises(
        ValueError, match=r"(?s)Earlier rules took every match of LoRA\(targets='head/kernel'\).*head/kernel"
    ):
        init(jlora.LoRA(rank=1, targets=".*(up|down|head)/kernel"), jlora.LoRA(rank=2, targets="head/kernel"))


def test_rank_above_the_smaller_side():
    with pytest.raises(
        ValueError,
        match=r"(?s)Rank 4 is above 3, the smaller side of 'mlp/up/kernel' \(3, 5\).*LoRA\(rank=3, targets='mlp/up/kernel'\)",
    ):
        init(jlora.LoRA(rank=4, targets="mlp/.*/kernel"))


def test_rank_above_the_smaller_side_of_a_leaf_without_product():
    params = {"w": jnp.ones((6, 8))}
    sites = jlora.sites(lambda p, x: (jnp.sin(p["w"]) * x).sum(), params, jnp.ones(()))
    with pytest.raises(ValueError, match="Rank 7 is above 6"):
        jlora.init(KEY, params, sites, jlora.LoRA(rank=7, targets="w", allow_dense=True))


def test_targets_without_effect():
    with pytest.raises(ValueError, match="Training 'spare/kernel' would have no effect: the function does not use it"):
        init(jlora.LoRA(rank=1, targets="spare/kernel"))
    with pytest.raises(ValueError, match="Training 'step' would have no effect: it holds int32"):
        init(jlora.Full(targets="step"))


def test_lora_on_a_bias_names_the_operation_and_line():
    with pytest.raises(
        ValueError,
        match=r"(?s)'mlp/up/bias' \(5,\) cannot be adapted: all of it is needed by add at .*test_errors.py:\d+ \(net\)"
        r".*Full rule.*\n  Of its other matches it can take mlp/up/kernel\.",
    ):
        init(jlora.LoRA(rank=1, targets="mlp/up/.*"))


def test_starred_pattern_and_mixed_targets():
    with pytest.raises(ValueError, match=r"Did you mean '\.\*/kernel'"):
        jlora.LoRA(targets="*/kernel")
    assert len(jlora.LoRA(targets={"a", len}).targets) == 2


def test_rules_of_another_type():
    with pytest.raises(TypeError, match="rules must be a LoRA or Full rule, or a list of them"):
        jlora.init(KEY, PARAMS, SITES, "all-linear")
    with pytest.raises(ValueError, match="There is no rule"):
        init()


def test_init_a_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"init_a must return floats of shape \(3, 1\)"):
        init(jlora.LoRA(rank=1, targets="mlp/up/kernel", init_a=lambda key, shape, dtype: jnp.ones(3)))


def test_all_linear_that_finds_nothing_names_what_it_leaves_out():
    def normed(p, x):
        return jnp.tanh(x @ (p["v"] / jnp.linalg.norm(p["v"]))) @ p["o"]

    p = {"v": jnp.ones((3, 5)), "o": jnp.ones((5, 2))}
    found = jlora.sites(normed, p, jnp.ones((2, 3)))
    with pytest.raises(
        ValueError, match=r"head is left out.*'o'.*\n.*'v' \(3, 5\) is left out: all of it is needed by"
    ):
        jlora.init(KEY, p, found, jlora.LoRA(rank=1))


def test_what_looks_like_a_weight_comes_first_among_what_cannot_be_adapted():
    p = {"a": jnp.ones(3), "b": jnp.ones((3, 3)), "c": jnp.ones((3, 2))}
    text = str(jlora.sites(lambda p, x: (x + p["a"][None]) @ (p["b"] * p["b"]) @ p["c"], p, jnp.ones((2, 3))))
    rest = text.split("cannot be adapted because")[1]
    assert rest.index("\nb ") < rest.index("\na ")


# --- arguments -------------------------------------------------------------------------------------------------------


def test_modules_in_place_of_functions():
    with pytest.raises(TypeError, match=r"(?s)Linear as fn.*jlora.nnx.split"):
        jlora.wrap(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"(?s)Dense as fn.*module.apply"):
        jlora.sites(nn.Dense(2), PARAMS, X)
    with pytest.raises(TypeError, match=r"(?s)int as fn.*first argument is a tree"):
        jlora.wrap(3)


def test_arguments_in_another_order():
    lora = init(jlora.LoRA(rank=1, targets="mlp/.*/kernel"))
    with pytest.raises(TypeError, match=r"The function comes first: sites\(fn, params, \*args\).*\n.*dict as fn"):
        jlora.sites(PARAMS, net, X)
    with pytest.raises(TypeError, match=r"init takes \(key, params, sites, rules\).*\n.*dict as sites"):
        jlora.init(KEY, SITES, PARAMS, jlora.LoRA())
    with pytest.raises(TypeError, match=r"init takes \(key, params, sites, rules\).*\n.*dict.* as the key"):
        jlora.init(PARAMS, KEY, SITES, jlora.LoRA())
    with pytest.raises(TypeError, match="The parameters come first, then the adapter"):
        jlora.wrap(net)(lora, PARAMS, X)
    with pytest.raises(TypeError, match="The parameters come first"):
        jlora.merge(lora, PARAMS)
    with pytest.raises(TypeError, match=r"lora must be a dict from path to adapter.*\n  got: \w*Array"):
        jlora.wrap(net)(PARAMS, X)
    with pytest.raises(
        TypeError, match=r"lora must be .*\n  got: parameters, dict with the array 'head/kernel' \(\d+, \d+\)"
    ):
        jlora.wrap(net)(PARAMS, PARAMS, X)
    with pytest.raises(TypeError, match=r"lora must be .*\n  got: dict"):
        jlora.wrap(net)(PARAMS, {"adapter": lora, "step": X}, X)
    with pytest.raises(TypeError, match=r"The function comes first: wrap\(fn\)"):
        jlora.wrap(PARAMS)
    with pytest.raises(ValueError, match="dense must be 'error' or 'allow'"):
        jlora.wrap(net, dense="yes")


def test_parameters_that_are_none():
    with pytest.raises(ValueError, match="The parameter tree has no leaves"):
        jlora.sites(net, {}, X)
    with pytest.raises(TypeError, match="The leaf 'name' of the parameters is not an array but str"):
        jlora.sites(net, {"name": "x"}, X)


def test_paths_that_are_not_unique():
    with pytest.raises(ValueError, match="same path 'a/b'"):
        jlora.sites(lambda p, x: x, {"a": {"b": X}, "a/b": X}, X)


def test_bad_keys():
    lora = init(jlora.LoRA(rank=1, targets="mlp/.*/kernel", dropout=0.5))
    with pytest.raises(TypeError, match=r"(?s)dropout_key must be one PRNG key.*got: int"):
        jlora.wrap(net)(PARAMS, lora, X, dropout_key=3)
    legacy = jlora.init(jax.random.PRNGKey(0), PARAMS, SITES, jlora.LoRA(rank=1))
    np.testing.assert_array_equal(legacy["mlp/up/kernel"].a, init(jlora.LoRA(rank=1))["mlp/up/kernel"].a)


def test_unknown_arguments_reach_the_function():
    lora = init(jlora.LoRA(rank=1, targets="mlp/.*/kernel"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'trian'"):
        jlora.wrap(net)(PARAMS, lora, X, trian=True)


def test_unknown_path_of_sites():
    with pytest.raises(KeyError, match=r"nearest: mlp/up/kernel"):
        SITES["mlp/up/kernle"]
    with pytest.raises(KeyError, match=r"'mlp/up/bias' cannot be adapted"):
        SITES["mlp/up/bias"]


# --- another base ----------------------------------------------------------------------------------------------------


def test_adapter_on_another_base():
    lora = init(jlora.LoRA(rank=1, targets="mlp/.*/kernel"))
    renamed = {"mlp": {"up": PARAMS["mlp"]["up"], "dwon": PARAMS["mlp"]["down"]}, "head": PARAMS["head"]}
    wider = jax.tree.map(lambda x: jnp.ones(tuple(2 * n for n in x.shape)), PARAMS)
    for call in (
        lambda p: jlora.wrap(net)(p, lora, X),
        lambda p: jlora.merge(p, lora),
        lambda p: jlora.summary(p, lora),
        lambda p: jlora.delta(lora, p),
    ):
        with pytest.raises(ValueError, match=r"(?s)there is no leaf 'mlp/down/kernel'.*nearest: mlp/dwon/kernel"):
            call(renamed)
    for call in (lambda p: jlora.merge(p, lora), lambda p: jlora.summary(p, lora)):
        with pytest.raises(ValueError, match=r"'mlp/down/kernel' has shape \(10, 14\), the adapter is for \(5, 7\)"):
            call(wider)


def test_sites_of_other_parameters():
    with pytest.raises(
        ValueError, match=r"found for other parameters: 'spare/kernel' is \(3, 4\) float32, not \(3, 3\) float32"
    ):
        jlora.init(KEY, PARAMS | {"spare": {"kernel": jnp.ones((3, 4))}}, SITES, jlora.LoRA(rank=1))
    with pytest.raises(ValueError, match=r"found for other parameters: 'spare/kernel' .* is missing"):
        jlora.init(KEY, {k: v for k, v in PARAMS.items() if k != "spare"}, SITES, jlora.LoRA(rank=1))
    with pytest.raises(ValueError, match=r"found for other parameters: 'more' .* is not part of the adapter's base"):
        jlora.init(KEY, PARAMS | {"more": X}, SITES, jlora.LoRA(rank=1))


def test_adapter_that_this_call_does_not_use():
    lora = init(jlora.LoRA(rank=1, targets="mlp/.*/kernel"))
    with pytest.raises(
        ValueError, match=r"would have no effect: this call uses none of mlp/down/kernel, mlp/up/kernel"
    ):
        jlora.wrap(lambda p, x: x @ p["spare"]["kernel"])(PARAMS, lora, X)
    with pytest.raises(ValueError, match="The adapter is empty: it would have no effect"):
        jlora.wrap(net)(PARAMS, {}, X)


def test_full_needs_values():
    shapes = jax.eval_shape(lambda: PARAMS)
    with pytest.raises(ValueError, match="Full needs the values of 'mlp/up/bias'"):
        jlora.init(KEY, shapes, SITES, jlora.Full(targets="mlp/up/bias"))


def test_delta_of_a_full_leaf_needs_the_base():
    lora = init(jlora.Full(targets="mlp/up/bias"))
    with pytest.raises(
        ValueError, match=r"'mlp/up/bias' is trained outright.*\n  Pass the base: delta\(lora, params\)"
    ):
        jlora.delta(lora)
    with pytest.raises(ValueError, match=r"update of a fully trained leaf.*\n  Pass the base"):
        lora["mlp/up/bias"].delta(None)
    np.testing.assert_array_equal(jlora.delta(lora, PARAMS)["mlp/up/bias"], np.zeros(5))


# --- weights that go dense -------------------------------------------------------------------------------------------


@jax.custom_vjp
def opaque(x, w):
    return x @ w


opaque.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


def windows(w):
    """Two of five columns, from an index that is data: a window, not whole rows."""
    numbers = lax.GatherDimensionNumbers(offset_dims=(0, 1), collapsed_slice_dims=(), start_index_map=(1,))
    return lax.gather(w, jnp.array([2]), numbers, slice_sizes=(3, 2))


GOES_DENSE = {
    "square of the weight": (lambda p, x: x @ p["w"] + (p["w"] ** 2).sum(), "(integer_pow|square)"),
    "full-size mask": (lambda p, x: x @ (p["w"] * jnp.tri(3, 5)), "mul"),
    "changed after a rotation": (lambda p, x: x @ jnp.sin(jnp.eye(3) @ p["w"]), "sin"),
    "changed after a product of weights": (lambda p, x: x @ jnp.sin(0.01 * (p["w"] @ p["w"].T) @ p["w"]), "sin"),
    "mixed at once": (lambda p, x: (x @ p["w"]) @ jnp.einsum("ndm,dm->n", jnp.ones((15, 3, 5)), p["w"])[:5], "at once"),
    "custom_vjp": (lambda p, x: opaque(x, p["w"]), "custom_vjp_call"),
    "returned": (lambda p, x: (x @ p["w"], p["w"]), "the function returns it"),
    "carried and changed": (lambda p, x: x @ lax.fori_loop(0, 2, lambda i, w: 2.0 * w, p["w"]), "carried and changed"),
    "returned from a branch": (lambda p, x: x @ lax.cond(x[0, 0] > 0, lambda w: w, lambda w: -w, p["w"]), "returned from a branch"),
    "returned from a scan": (lambda p, x: x @ lax.scan(lambda c, _: (c, p["w"]), 0.0, None, length=2)[1][0], "returned from its body"),
    "rounded": (lambda p, x: x @ jnp.round(p["w"]), "round"),
    "divisor": (lambda p, x: x @ (1.0 / p["w"]), "div"),
    "integers": (lambda p, x: x @ p["w"].astype(jnp.int8).astype(jnp.float32), "convert_element_type"),
    "merging roles": (lambda p, x: x.reshape(12) * p["w"].reshape(15)[:12], "reshape"),
    "sorted": (lambda p, x: x @ jnp.sort(p["w"]), "sort"),
    "partial window": (lambda p, x: x @ windows(p["w"]), "gather"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOES_DENSE)
def test_dense_weight_is_refused_or_right(name):
    fn, operation = GOES_DENSE[name]
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)), jnp.float32)}
    sites = jlora.sites(fn, params, X)
    assert "w" not in sites
    with pytest.raises(
        ValueError, match=r"(?s)'w' \(3, 5\) cannot be adapted: .*(test_errors.py:\d+|the function returns it)"
    ):
        jlora.init(KEY, params, sites, jlora.LoRA(rank=2, targets="w"))
    lora = jlora.init(KEY, params, sites, jlora.LoRA(rank=2, targets="w", allow_dense=True))
    lora = jax.tree.map(lambda x: x + 0.5, lora)
    with pytest.raises(
        jlora.DenseWeightError, match=rf"(?s)'w' would have to be made dense.*operation: .*{operation}.*dense=\"allow\""
    ):
        jlora.wrap(fn)(params, lora, X)
    got = jlora.wrap(fn, dense="allow")(params, lora, X)
    expected = fn(jlora.merge(params, lora), X)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-4), got, expected)


def test_dense_error_names_the_line_of_the_model():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.ones, (3, 5))
            return x @ jnp.sin(w)  # the culprit

    params = Odd().init(KEY, X)
    line = Odd.__call__.__wrapped__.__code__.co_firstlineno + 3 if hasattr(Odd.__call__, "__wrapped__") else None
    sites = jlora.sites(Odd().apply, params, X)
    reason = sites.skipped["params/w"].reason
    assert "sin at" in reason
    assert "test_errors.py" in reason
    assert line is None or f":{line} " in reason


def test_case_functions_are_not_mutated():
    case = BY_NAME["scan"]
    before = jax.tree.map(np.array, case.params)
    lora = case.trained()
    held = jax.tree.map(np.array, lora)
    jax.grad(lambda l: jlora.wrap(case.fn)(case.params, l, *case.args)[0].sum())(lora)
    jlora.merge(case.params, lora)
    jax.tree.map(np.testing.assert_array_equal, before, case.params)
    jax.tree.map(np.testing.assert_array_equal, held, lora)


def test_a_pattern_matches_paths_with_newlines():
    """A dot stands for any character of a key."""
    params = {"a\nb": jnp.ones((3, 5)), "c": jnp.ones((5, 4))}
    sites = jlora.sites(lambda p, x: x @ p["a\nb"] @ p["c"], params, X)
    assert set(jlora.init(KEY, params, sites, jlora.LoRA(rank=2, targets=".*"))) == {"a\nb", "c"}
    assert set(jlora.init(KEY, params, sites, jlora.LoRA(rank=2, targets="a.b"))) == {"a\nb"}


@pytest.mark.parametrize(
    ("count", "one", "wanted"),
    [
        (1, "weight", "1 weight"),
        (0, "module", "0 modules"),
        (2000, "tensor", "2,000 tensors"),
        (1, "leaf", "1 leaf"),
        (3, "leaf", "3 leaves"),
        (1, "batch axis", "1 batch axis"),
        (2, "batch axis", "2 batch axes"),
        (2, "index", "2 indices"),
    ],
)
def test_counts_in_messages(count, one, wanted):
    assert counted(count, one) == wanted


def test_messages_about_one_thing():
    params = {"w": jnp.ones((3, 5))}
    found = jlora.sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 3)))
    assert str(found).endswith("1 weight can be adapted, 15 parameters.")
    lora = jlora.init(jax.random.key(0), params, found, jlora.LoRA(rank=1, targets="w"))
    assert "1 leaf, 8 trained of 15 parameters" in jlora.summary(params, lora)
    assert repr(lora["w"].base).endswith(", 1 leaf)")
    with pytest.raises(ValueError, match="accepts none of 1 leaf"):
        jlora.init(jax.random.key(0), params, found, jlora.LoRA(rank=1, targets=lambda site: False))
    with pytest.raises(ValueError, match="got: 1 weight, 2 adapters"):
        jlora.algebra.combine([lora, lora], [1.0])


def test_names_in_errors_of_merging_and_calling_are_escaped():
    name = "a\x1b[31mEVIL\u202e\nb"
    params, x = {name: jnp.ones((5, 4), jnp.float16)}, jnp.ones((2, 5), jnp.float16)

    def fn(p, x):
        return x @ p[name]

    sites = jlora.sites(fn, params, x)
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, alpha=2, dropout=0.5, targets=".*EVIL.*"))
    large = jax.tree.map(lambda v: jnp.full_like(v, 300.0), lora)
    calls = [
        lambda: jlora.merge(params, large),
        lambda: jlora.merge(params, jax.tree.map(lambda v: v * jnp.nan, lora)),
        lambda: jax.grad(lambda lora: jlora.wrap(fn)(params, lora, x).sum().astype(jnp.float32))(lora),
        lambda: jlora.merge(params, {"a": params}),
        lambda: jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets=".*EVIL.*", only="lookup")),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError)) as error:
            call()
        assert not {"\x1b", "\u202e"} & set(str(error.value))
        assert "EVIL" in str(error.value)
