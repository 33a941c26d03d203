"""Discovery, initial values, merging and shardings, beyond what the laws say."""

import dataclasses
import inspect
import subprocess
import sys
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME, D, M
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jlora


class Net(nn.Module):
    """A tied language model with a position table, a norm, a scanned block and an unused leaf."""

    @nn.compact
    def __call__(self, ids, train: bool = False):
        embed = nn.Embed(19, D, name="embed")
        x = embed(ids) + self.param("positions", nn.initializers.normal(), (8, D))[None, : ids.shape[1]]
        x = x + nn.Dense(D, name="mix")(nn.gelu(nn.Dense(M, name="up")(nn.LayerNorm(name="norm")(x))))
        self.param("unused", nn.initializers.zeros, (3, 4))
        return embed.attend(nn.Dropout(0.5, deterministic=not train)(x))


IDS = jnp.array([[1, 2, 3]])
PARAMS = Net().init(jax.random.key(0), IDS)


# --- discovery -------------------------------------------------------------------------------------------------------


def test_table_names_every_leaf():
    sites = jlora.sites(Net().apply, PARAMS, IDS)
    assert list(sites) == ["params/embed/embedding", "params/mix/kernel", "params/up/kernel"]
    assert sites["params/embed/embedding"].kind == "linear+lookup"
    assert sites["params/embed/embedding"].head
    assert not sites["params/mix/kernel"].head
    text = str(sites)
    for path, _ in jax.tree.leaves_with_path(PARAMS):
        assert jax.tree_util.keystr(path, simple=True, separator="/") in text
    assert "linear+lookup (head)" in text
    assert "the function does not use it" in text
    assert "all of it is needed by add at" in text
    assert "test_parts.py" in text
    assert repr(sites) == "Sites(3 that can be adapted, 6 that cannot)"


def test_shapes_are_enough():
    shapes = jax.eval_shape(lambda: PARAMS)
    found = jlora.sites(Net().apply, shapes, jax.ShapeDtypeStruct((1, 3), jnp.int32), train=False)
    assert {p: s.inputs for p, s in found.items()} == {
        p: s.inputs for p, s in jlora.sites(Net().apply, PARAMS, IDS).items()
    }


def test_all_linear_takes_everything_but_heads_and_tables():
    sites = jlora.sites(Net().apply, PARAMS, IDS)
    lora = jlora.init(jax.random.key(0), PARAMS, sites, jlora.LoRA(rank=2))
    assert list(lora) == ["params/mix/kernel", "params/up/kernel"]


@pytest.mark.parametrize(
    ("fn", "heads"),
    [
        (lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"b"}),
        (lambda p, x: jax.nn.log_softmax(jnp.tanh(x @ p["a"]) @ p["b"]), {"b"}),
        (lambda p, x: (jnp.tanh(x @ p["a"]) @ p["b"], jnp.tanh(x @ p["a"]) @ p["c"]), {"b", "c"}),
        (lambda p, x: x @ p["a"] + jnp.tanh(x @ p["b"]), set()),  # a residual stream, no head
        (
            lambda p, x: jax.lax.scan(lambda c, _: (jnp.tanh(c @ p["a"]), None), x, None, length=2)[0],
            set(),
        ),  # feeds itself
        (lambda p, x: -jnp.log(jax.nn.sigmoid(jnp.tanh(x @ p["a"]) @ p["b"])).mean(), {"b"}),  # a loss
    ],
)
def test_output_heads(fn, heads):
    params = {n: jnp.ones((4, 4)) for n in "abc"}
    sites = jlora.sites(fn, params, jnp.ones((2, 4)))
    assert {path for path, site in sites.items() if site.head} == heads


# --- initial values --------------------------------------------------------------------------------------------------


def init(rules, params=PARAMS, key=0):
    return jlora.init(jax.random.key(key), params, jlora.sites(Net().apply, params, IDS), rules)


def test_first_rule_wins_and_full_copies_the_leaf():
    lora = init(
        [
            jlora.LoRA(rank=1, targets=".*up/kernel"),
            jlora.Full(targets=".*bias"),
            jlora.LoRA(rank=3, targets=".*/kernel"),
        ]
    )
    assert {p: getattr(a, "rank", "full") for p, a in lora.items()} == {
        "params/up/kernel": 1, "params/mix/bias": "full", "params/norm/bias": "full", "params/up/bias": "full", "params/mix/kernel": 3,
    }  # fmt: skip
    np.testing.assert_array_equal(lora["params/up/bias"].value, PARAMS["params"]["up"]["bias"])


def test_adding_a_target_changes_no_other_start():
    some = init(jlora.LoRA(rank=2, targets=".*up/kernel"))
    more = init(jlora.LoRA(rank=2, targets=".*(up|mix)/kernel"))
    np.testing.assert_array_equal(some["params/up/kernel"].a, more["params/up/kernel"].a)
    assert (more["params/up/kernel"].a[:2] != more["params/mix/kernel"].a[:2]).all()
    assert (some["params/up/kernel"].a != init(jlora.LoRA(rank=2), key=1)["params/up/kernel"].a).any()


def test_layers_of_a_stack_start_apart():
    a = BY_NAME["scan"].fresh()["w"].a
    assert (a[0] != a[1]).all()


def test_bounds_and_dtypes():
    params = {"w": jnp.ones((4096, 8), jnp.bfloat16), "e": jnp.ones((64, 512))}
    sites = jlora.sites(lambda p, x, i: (x @ p["w"], p["e"][i]), params, jnp.ones((2, 4096), jnp.bfloat16), IDS)
    uniform = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=8, targets=".*"))
    a = np.asarray(uniform["w"].a)
    assert a.dtype == np.float32
    assert 0.95 / 64 < np.abs(a).max() <= 1 / 64
    assert np.std(a) == pytest.approx(1 / 64 / np.sqrt(3), rel=0.02)
    assert 0.9 < np.abs(np.asarray(uniform["e"].a)).max() <= 1.0  # a lookup sums over one row
    assert not np.asarray(uniform["w"].b).any()
    normal = jlora.init(
        jax.random.key(0), params, sites, jlora.LoRA(rank=8, targets="w", init_a="normal", dtype=jnp.bfloat16)
    )
    assert normal["w"].a.dtype == jnp.bfloat16
    assert np.std(np.asarray(normal["w"].a, np.float32)) == pytest.approx(1 / 64, rel=0.03)
    ones = jlora.init(
        jax.random.key(0),
        params,
        sites,
        jlora.LoRA(rank=8, targets="w", init_a=lambda key, shape, dtype: jnp.ones(shape, dtype)),
    )
    assert (ones["w"].a == 1).all()


def test_scales():
    assert jlora.LoRA(rank=8, alpha=16).scale == 2.0
    assert jlora.LoRA(rank=16, alpha=16, rslora=True).scale == 4.0
    assert (jlora.LoRA().rank, jlora.LoRA().alpha, jlora.LoRA().dropout) == (16, 32.0, 0.0)


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("standard_promotion")
def test_merge_is_pure_and_keeps_dtypes():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    lora = jax.tree.map(lambda x: x + 0.01, init(jlora.LoRA(rank=2), params))
    merged = jlora.merge(params, lora)
    assert jax.tree.map(lambda x: x.dtype, merged) == jax.tree.map(lambda x: x.dtype, params)
    assert merged["params"]["norm"]["scale"] is params["params"]["norm"]["scale"]
    jitted = jax.jit(jlora.merge)(params, lora)
    jax.tree.map(np.testing.assert_array_equal, jitted, merged)


@pytest.mark.parametrize(("base", "value"), [(1e8, 1.0), (1e4, 1e-3), (-np.inf, 0.25), (0.0, 3.0)])
def test_what_was_trained_outright_is_merged_bit_for_bit(base, value):
    """Not ``w + (value - w)``, which is 0 for a base of 1e8 and a value of 1."""
    params = {"w": jnp.ones((3, 4)), "b": jnp.full(4, base, jnp.float32)}
    found = jlora.sites(lambda p, x: x @ p["w"] + p["b"][None], params, jnp.ones((2, 3)))
    lora = jlora.init(jax.random.key(0), params, found, jlora.Full(targets="b"))
    lora = jax.tree.map(lambda x: jnp.full_like(x, value), lora)
    merged, lost = jlora.merge(params, lora, report=True)
    for got in (merged, jlora.merge(params, lora), jax.jit(jlora.merge)(params, lora)):
        np.testing.assert_array_equal(got["b"], lora["b"].value)
    assert lost["b"] == 0
    assert jlora.merge(params, lora, dtype=jnp.bfloat16)["b"].dtype == jnp.bfloat16


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merge_reports_what_rounding_lost(dtype):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    lora = jax.tree.map(lambda x: (x + 0.003).astype(dtype), init(jlora.LoRA(rank=2), params))
    merged, lost = jlora.merge(params, lora, report=True)
    wide, none = jlora.merge(params, lora, dtype=jnp.float32, report=True)
    for path, update in jlora.delta(lora).items():
        node = path.split("/")[1]
        base, update = np.asarray(params["params"][node]["kernel"], np.float64), np.asarray(update, np.float64)
        stored = np.asarray(merged["params"][node]["kernel"], np.float64)
        assert float(lost[path]) == pytest.approx(
            np.linalg.norm(stored - base - update) / np.linalg.norm(update), rel=1e-3
        )
        assert 0.01 < float(lost[path]) < 1
        assert float(none[path]) < 1e-5
        kept = wide["params"][node]["kernel"]
        assert kept.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(kept, np.float64), base + update, rtol=1e-6)


def test_merging_what_was_trained_outright_in_numpy():
    params = {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}
    found = jlora.sites(lambda p, x: x @ p["w"] + p["b"][None], params, jnp.ones((2, 3)))
    lora = jlora.init(jax.random.key(0), params, found, jlora.Full(targets="b"))
    lora = jax.tree.map(lambda x: np.asarray(x) + 2, lora)
    assert (jlora.merge(params, lora)["b"] == 2).all()


def test_delta_is_the_difference_of_merging():
    case = BY_NAME["scan_of_scan"]
    lora = case.trained()
    np.testing.assert_allclose(
        jlora.delta(lora)["w"], jlora.merge(case.params, lora)["w"] - case.params["w"], atol=1e-5
    )


def test_summary_counts():
    lora = init([jlora.LoRA(rank=2), jlora.Full(targets=".*norm/scale")])
    text = jlora.summary(PARAMS, lora)
    assert "params/up/kernel   11×13     2       48" in text
    total = sum(x.size for x in jax.tree.leaves(PARAMS))
    assert f"3 leaves, {48 + 48 + 11} trained of {total} parameters" in text
    assert text == jlora.summary(jax.eval_shape(lambda: PARAMS), lora)


# --- a kind of one's own ---------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows(jlora.Adapter):
    """An update that adds one trained vector to every row of a matrix."""

    kind: ClassVar[str] = "rows"
    labels: ClassVar[dict[str, str]] = {"row": "row"}
    row: jax.Array
    rows: int = dataclasses.field(metadata={"static": True})

    def delta(self, w):
        return jnp.broadcast_to(self.row[None], self.shape)

    @property
    def shape(self):
        return (self.rows, *self.row.shape)


def test_a_kind_of_ones_own():
    """It need only know its update and its shape; the program, merging, labels and masks follow."""

    def net(params, x):
        return jnp.tanh(x @ params["w"])

    params, x = {"w": jnp.ones((3, 5))}, jnp.ones((2, 3))
    lora = {"w": Rows(jnp.arange(5.0), 3)}
    expected = net({"w": jnp.ones((3, 5)) + jnp.arange(5.0)[None]}, x)
    np.testing.assert_allclose(jlora.wrap(net)(params, lora, x), expected, rtol=1e-6)
    np.testing.assert_allclose(net(jlora.merge(params, lora), x), expected, rtol=1e-6)
    assert jlora.labels({"base": params, "lora": lora})["lora"]["w"].row == "row"
    with pytest.raises(TypeError, match="Adapter does not define shape"):
        jlora.wrap(net)(params, {"w": jlora.Adapter()}, x)
    with pytest.raises(TypeError, match="Adapter does not define delta"):
        jlora.Adapter().delta(None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shift(Rows):
    """Its update is the very array that is trained, here of a bias."""

    def delta(self, w):
        return self.row

    @property
    def shape(self):
        return self.row.shape


def test_merging_keeps_the_arrays_of_a_kind_of_ones_own():
    params, lora = {"b": jnp.ones(5)}, {"b": Shift(jnp.arange(5.0), 1)}
    for _ in range(2):
        np.testing.assert_array_equal(jlora.merge(params, lora)["b"], 1 + np.arange(5.0))


@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
def test_a_complex_weight_made_real_is_no_weight():
    """The real part of A·B is not the product of the real parts."""
    params, x = {"w": jax.ShapeDtypeStruct((3, 4), jnp.complex64)}, jnp.ones((2, 3))
    sites = jlora.sites(lambda p, x: x @ jax.lax.convert_element_type(p["w"], jnp.float32), params, x)
    assert "convert_element_type" in sites.skipped["w"].reason


def test_the_thin_product_is_summed_as_wide_as_the_model_asks():
    """With operands of fp8 and a result in fp32, what lies between the factors overflows fp8."""
    tiny = jnp.float8_e4m3fn

    def fn(p, x):
        return jax.lax.dot_general(
            x.astype(tiny), p["w"].astype(tiny), (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    params, x = {"w": jnp.full((64, 8), 0.01)}, jnp.full((2, 64), 8.0)
    lora = jlora.init(jax.random.key(0), params, jlora.sites(fn, params, x), jlora.LoRA(rank=1, alpha=1, targets="w"))
    lora = {"w": dataclasses.replace(lora["w"], a=jnp.ones((64, 1)), b=jnp.full((1, 8), 1 / 64))}
    np.testing.assert_allclose(jlora.wrap(fn)(params, lora, x) - fn(params, x), 8.0)


# --- shardings -------------------------------------------------------------------------------------------------------


def test_shardings_follow_the_base():
    case = BY_NAME["linen_attention"]
    lora = case.fresh()
    specs = jax.tree.map(lambda x: P(), case.params)
    specs["params"]["query"]["kernel"] = P("data", "model")
    specs["params"]["out"]["kernel"] = P(("model", "data"), None, "data")
    got = jlora.shardings(lora, specs)
    assert got["params/query/kernel"].a == P("data", None)
    assert got["params/query/kernel"].b == P(None, "model", None)
    assert got["params/out/kernel"].a == P(("model", "data"), None, None)
    assert got["params/out/kernel"].b == P(None, "data")
    assert jax.tree.structure(got, is_leaf=lambda x: isinstance(x, P)) == jax.tree.structure(lora)
    specs["params"]["query"]["kernel"] = P("data", "model", None, None)
    with pytest.raises(ValueError, match="of 'params/query/kernel' is longer than its 3 axes"):
        jlora.shardings(lora, specs)
    with pytest.raises(ValueError, match=r"no leaf 'params/key/kernel'.*\n.*nearest"):
        jlora.shardings(lora, {"params": {"qeury": {"kernel": P()}}})
    with pytest.raises(ValueError, match="has no sharding"):
        jlora.shardings(lora, jax.tree.map(lambda x: 3, case.params))
    one = jlora.shardings(lora, case.params)
    assert set(jax.tree.leaves(one)) == {jax.tree.leaves(case.params)[0].sharding}


def test_shardings_of_an_inner_jit_are_kept():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, P("d"))

    def fn(params, x):
        return jax.jit(lambda w, x: x @ w, in_shardings=(None, sharding), out_shardings=sharding)(params["w"], x)

    params, x = {"w": jnp.ones((D, M))}, jnp.ones((2, D))
    lora = jlora.init(jax.random.key(0), params, jlora.sites(fn, params, x), jlora.LoRA(rank=2, targets="w"))
    program = str(jax.make_jaxpr(jlora.wrap(fn))(params, lora, x))
    assert program.count("sharding_constraint") == 2
    np.testing.assert_array_equal(jax.jit(jlora.wrap(fn))(params, lora, x), fn(params, x))


# --- loops that end at different times -----------------------------------------------------------------------------


def test_while_loop_under_vmap():
    """Without a reverse derivative, so it is no row of the table: each example turns as often as it needs."""

    def fn(params, x):
        return jax.vmap(
            lambda x: jax.lax.while_loop(lambda s: (s**2).sum() < 1e3, lambda s: 2.0 * s + jnp.tanh(s @ params["w"]), x)
        )(x)

    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((D, D)), jnp.float32)}
    x = jnp.arange(1.0, 5.0)[:, None] * jnp.ones((4, D))
    lora = jlora.init(jax.random.key(0), params, jlora.sites(fn, params, x), jlora.LoRA(rank=2, targets="w"))
    lora = jax.tree.map(lambda f: f + 0.3, lora)
    got, expected = jlora.wrap(fn)(params, lora, x), fn(jlora.merge(params, lora), x)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert len({float(v) for v in (got**2).sum(axis=1).round()}) > 1


# --- properties ------------------------------------------------------------------------------------------------------


@st.composite
def contractions(draw):
    """A random einsum of activations and a weight of two to four axes, each of which is summed, matched or free."""
    roles = draw(st.lists(st.sampled_from("sbf"), min_size=2, max_size=4).filter(lambda r: "s" in r and "f" in r))
    sizes = draw(st.lists(st.integers(1, 5), min_size=len(roles), max_size=len(roles)))
    w = "".join(chr(ord("a") + i) for i in range(len(roles)))
    shared = [c for c, r in zip(w, roles, strict=True) if r in "sb"]
    free = "xyz"[: draw(st.integers(0, 2))]
    x = "".join(draw(st.permutations([*shared, *free])))
    out = "".join(draw(st.permutations([c for c, r in zip(w, roles, strict=True) if r in "bf"] + list(free))))
    size = dict(zip(w, sizes, strict=True)) | dict.fromkeys(free, 3)
    perm = draw(st.permutations(range(len(w))))
    return w, x, out, size, perm, draw(st.booleans()), draw(st.integers(0, 2**31))


@settings(max_examples=60, deadline=None)
@given(contractions(), st.integers(1, 3))
def test_any_einsum_of_any_transposed_weight(spec, rank):
    w, x, out, size, perm, left, seed = spec
    rng = np.random.default_rng(seed)
    stored = [w[i] for i in perm]
    inverse = np.argsort(perm)

    def fn(params, xs):
        weight = jnp.transpose(params["w"], inverse)
        return jnp.einsum(f"{w},{x}->{out}", weight, xs) if left else jnp.einsum(f"{x},{w}->{out}", xs, weight)

    params = {"w": jnp.asarray(rng.standard_normal([size[c] for c in stored]), jnp.float32)}
    xs = jnp.asarray(rng.standard_normal([size[c] for c in x]), jnp.float32)
    sites = jlora.sites(fn, params, xs)
    rank = min(rank, sites["w"].max_rank)
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=rank, targets="w"))
    lora = jax.tree.map(lambda f: jnp.asarray(rng.standard_normal(f.shape), f.dtype), lora)
    got = jlora.wrap(fn)(params, lora, xs)
    expected = fn(jlora.merge(params, lora), xs)
    np.testing.assert_allclose(got, expected, atol=2e-4 * max(1, float(jnp.abs(expected).max())))


NAMES = [*jlora.sites(Net().apply, PARAMS, IDS)]


@settings(max_examples=40, deadline=None)
@given(st.sets(st.sampled_from(NAMES), min_size=1), st.integers(1, 11), st.booleans())
def test_targets_choose_exactly_what_they_name(paths, rank, by_predicate):
    sites = jlora.sites(Net().apply, PARAMS, IDS)
    targets = (lambda site: site.path in paths) if by_predicate else "|".join(sorted(paths))
    lora = jax.eval_shape(
        lambda key: jlora.init(key, PARAMS, sites, jlora.LoRA(rank=rank, targets=targets)), jax.random.key(0)
    )
    assert set(lora) == paths
    for path, adapter in lora.items():
        assert adapter.rank == rank
        assert adapter.shape == sites[path].shape


def test_every_public_module_is_there_after_import_jlora():
    """Without an import of its own, and only then: each is loaded when it is asked for."""
    names = ("algebra", "export", "nnx", "peft", "plot")
    code = f"import jlora; print([getattr(jlora, n).__name__ for n in {names} if 'jlora.' + n not in __import__('sys').modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == str([f"jlora.{n}" for n in names])


def test_import_is_light():
    """``import jlora`` brings neither Flax, optax nor orbax with it; asking for a name that is not there says so."""
    names = ("flax", "optax", "orbax", "matplotlib", "rich", "typer", "safetensors")
    code = f"import sys, jlora; print([m for m in {names} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        jlora.nope
    public = [
        name
        for name, x in vars(jlora).items()
        if not name.startswith("_")
        and name != "TYPE_CHECKING"
        and not inspect.ismodule(x)  # submodules others imported
    ]
    assert len(public) <= 24
