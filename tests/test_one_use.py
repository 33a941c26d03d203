"""Adapters for one kind of use of a leaf: a table whose lookups are adapted and whose products are not, and the other way.

The truth is the model untied, with a leaf for each kind of use, of which one has the merged update. Every row is a function of the table
that lookups read, of the one that products read, and of what else there is.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import MATRIX, B, D, L, M, Roles, T, V, array
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from measure import computed_values

import jlora
import jlora.algebra
import jlora.export

IDS = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)))
TABLE = {"e": array(V, D)}


@dataclass(frozen=True)
class Row:
    fn: Any
    params: Any
    args: tuple[Any, ...]
    roles: Roles
    tol: float
    path: str

    def tied(self, params, *args):
        leaf = get(params, self.path)
        return self.fn(leaf, leaf, params, *args)

    def apart(self, only, update, params, *args):
        """The model untied, with the update in one of its two tables."""
        leaf = get(params, self.path)
        new = (leaf + update).astype(leaf.dtype)
        return self.fn(new if only == "lookup" else leaf, new if only != "lookup" else leaf, params, *args)

    def lora(self, only, seed=None):
        sites = jlora.sites(self.tied, self.params, *self.args)
        rule = jlora.LoRA(rank=2, alpha=3.0, targets=self.path, only=only)
        lora = jlora.init(jax.random.key(3), self.params, sites, rule)
        leaves, tree = jax.tree.flatten(lora)
        filled = [array(*x.shape, seed=(seed or 0) + i, dtype=x.dtype) for i, x in enumerate(leaves)]
        return lora if seed is None else jax.tree.unflatten(tree, filled)


def get(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree


ROWS: dict[str, Row] = {}


def row(name, fn, params=TABLE, args=(IDS,), roles=MATRIX, tol=1e-5, path="e"):
    ROWS[name] = Row(fn, params, args, roles, tol, path)


row("plain", lambda e, h, p, i: jnp.tanh(e[i]) @ h.T)
row("take", lambda e, h, p, i: jnp.einsum("btd,vd->btv", jnp.tanh(jnp.take(e, i, axis=0)), h))
row(
    "transposed",
    lambda e, h, p, i: jnp.tanh(e[:, i]).transpose(1, 2, 0) @ h,
    {"e": array(D, V)},
    roles=((1,), (0,), ()),
)
row("cast", lambda e, h, p, i: jnp.tanh(e.astype(jnp.bfloat16)[i]) @ h.astype(jnp.bfloat16).T, tol=3e-2)
row("scaled", lambda e, h, p, i: jnp.tanh(e[i] * 3.0) @ (h * 0.5).T)
row("vmapped", lambda e, h, p, i: jax.vmap(lambda i: jnp.tanh(e[i]) @ h.T)(i))
row("soft", lambda e, h, p, i: jax.nn.softmax(e[i] @ p["w"]) @ h, {"e": array(V, D), "w": array(D, V)})
row("norm", lambda e, h, p, i: (e[i] * lax.rsqrt(jnp.mean(e[i] * e[i], -1, keepdims=True) + 1e-6)) @ h.T)
row("permuted", lambda e, h, p, i: jnp.tanh(e[i]) @ h[jnp.arange(V)[::-1]].T)
row("fixed_row", lambda e, h, p, i: jnp.tanh(e[i] + e[jnp.array([0])][None]) @ h.T)
row(
    "longer",
    lambda e, h, p, i: jnp.tanh(jnp.concatenate([e, p["more"]])[i]) @ jnp.concatenate([h, p["more"]]).T,
    {"e": array(V, D), "more": array(2, D)},
)
row("remat", lambda e, h, p, i: jax.checkpoint(lambda e, h: jnp.tanh(e[i]) @ h.T)(e, h))
row("jit", lambda e, h, p, i: head(jnp.tanh(lookup(e, i) + lookup(e, i[::-1])), h) + head(lookup(e, i), h))
row("cond", lambda e, h, p, i: lax.cond(i[0, 0] >= 0, lambda e, h: jnp.tanh(e[i]) @ h.T, lambda e, h: e[i] @ h.T, e, h))
row("steps", lambda e, h, p, i: lax.scan(lambda c, i: (jnp.tanh(c + e[i]), c @ h.T), jnp.zeros((B, D)), i.T)[1])
row("loop", lambda e, h, p, i: lax.fori_loop(0, 2, lambda _, c: jnp.tanh(c + e[i]) @ h.T @ p["w"], jnp.zeros((B, T, D))), {
    "e": array(V, D), "w": array(V, D)
})  # fmt: skip
row(
    "stacked",
    lambda e, h, p, i: lax.scan(lambda x, t: (jnp.tanh(x + t[0][i]) @ t[1].T @ p["w"], None), jnp.zeros((B, T, D)), (e, h))[0],
    {"e": array(L, V, D), "w": array(V, D)},
    roles=((1,), (2,), (0,)),
)  # fmt: skip
row(
    "shards",
    lambda e, h, p, i: jax.shard_map(
        lambda e, h, i: jnp.tanh(e[i]) @ h.T,
        mesh=jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]),
        in_specs=(P(), P(), P("x")),
        out_specs=P("x"),
    )(e, h, i),
)


@jax.jit
def lookup(e, i):
    return e[i]


@jax.jit
def head(x, h):
    return x @ h.T


class Untied(nn.Module):
    """Flax's embedding, of which a head may be another."""

    @nn.compact
    def __call__(self, ids, head):
        embed = nn.Embed(V, D, name="embed")
        x = nn.Dense(D, name="mix")(embed(ids))
        return nn.Embed(V, D).clone(parent=None).apply({"params": {"embedding": head}}, x, method="attend")


LINEN = jax.tree.map(
    lambda s: array(*s.shape), jax.eval_shape(Untied().init, jax.random.key(0), IDS, TABLE["e"])["params"]
)
row(
    "linen",
    lambda e, h, p, i: Untied().apply({"params": {**p, "embed": {"embedding": e}}}, i, h),
    LINEN,
    path="embed/embedding",
)

every = pytest.mark.parametrize("name", ROWS)
both = pytest.mark.parametrize("only", ["lookup", "linear"])


def total(out):
    return sum(jnp.sin(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(out))


def close(got, expected, tol):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, atol=tol * max(1.0, float(np.abs(y).max())), rtol=0)


@both
@every
def test_a_fresh_one_is_the_identity_and_can_be_trained(name, only):
    row = ROWS[name]
    lora, apply = row.lora(only), jlora.wrap(row.tied)
    assert (lora[row.path].inputs, lora[row.path].outputs, lora[row.path].batch) == row.roles
    assert lora[row.path].only == only
    got, base = jax.jit(apply)(row.params, lora, *row.args), jax.jit(row.tied)(row.params, *row.args)
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(base, np.float32))
    slopes = jax.grad(lambda l: total(apply(row.params, l, *row.args)))(lora)[row.path]
    assert float(jnp.abs(slopes.a).max() + jnp.abs(slopes.b).max()) > 0


@both
@every
def test_it_is_the_untied_model_with_one_table_merged(name, only):
    row = ROWS[name]
    lora = row.lora(only, seed=5)
    update = lora[row.path].delta()
    got = jax.jit(lambda l: jlora.wrap(row.tied)(row.params, l, *row.args))(lora)
    expected = jax.jit(partial(row.apart, only))(update, row.params, *row.args)
    close(got, expected, row.tol)
    for other in (
        row.tied(row.params, *row.args),
        row.apart("linear" if only == "lookup" else "lookup", update, row.params, *row.args),
    ):
        assert float(jnp.abs(got.astype(jnp.float32) - other.astype(jnp.float32)).max()) > 10 * row.tol


@both
@every
def test_gradients_are_those_of_the_untied_model(name, only):
    row = ROWS[name]
    lora = row.lora(only, seed=5)
    got = jax.jit(jax.grad(lambda l: total(jlora.wrap(row.tied)(row.params, l, *row.args))))(lora)
    expected = jax.jit(jax.grad(lambda l: total(row.apart(only, l[row.path].delta(), row.params, *row.args))))(lora)
    close(got, expected, 5 * row.tol)
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(got))


@both
@every
def test_the_gradient_program_computes_nothing_of_the_tables_shape(name, only):
    row = ROWS[name]
    shape = get(row.params, row.path).shape
    shapes = {shape, tuple(n for d, n in enumerate(shape) if d not in row.roles[2])}
    lora = row.lora(only, seed=5)
    apply = jlora.wrap(row.tied)
    got = computed_values(
        jax.make_jaxpr(jax.grad(lambda l, p, *a: total(apply(p, l, *a))))(lora, row.params, *row.args), shapes
    )
    allowed = computed_values(jax.make_jaxpr(lambda p, *a: total(row.tied(p, *a)))(row.params, *row.args), shapes)
    assert got <= allowed
    dense = jax.make_jaxpr(jax.grad(lambda l, p, *a: total(row.apart(only, l[row.path].delta(), p, *a))))(
        lora, row.params, *row.args
    )
    assert computed_values(dense, shapes) > allowed


@both
@every
def test_it_commutes_with_jit_vmap_scan_and_remat(name, only):
    row = ROWS[name]
    apply = jlora.wrap(row.tied)
    loras = [row.lora(only, seed) for seed in (1, 2)]
    run = lambda l: apply(row.params, l, *row.args)  # noqa: E731
    expected = [run(l) for l in loras]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *loras)
    close(jax.jit(run)(loras[0]), expected[0], row.tol)
    close(jax.checkpoint(run)(loras[0]), expected[0], row.tol)
    for got in (jax.vmap(run)(stacked), lax.scan(lambda c, l: (c, run(l)), 0, stacked)[1]):
        for i in (0, 1):
            close(got[i], expected[i], row.tol)


@both
def test_it_is_saved_and_loaded(only, tmp_path):
    row = ROWS["plain"]
    lora = row.lora(only, seed=5)
    jlora.save(tmp_path / "a", lora)
    again = jlora.load(tmp_path / "a", row.params)
    assert jax.tree.structure(again) == jax.tree.structure(lora)
    jax.tree.map(np.testing.assert_array_equal, again, lora)
    # A version that does not know of it must not read it as an adapter for all uses.
    assert jlora.metadata(tmp_path / "a")["format"] == 2
    assert jlora.metadata(tmp_path / "a")["adapters"]["e"]["only"] == only
    described = jlora.describe(lora)
    described["adapters"]["e"]["only"] = "conv"
    with pytest.raises(ValueError, match=r"damaged: only is 'conv', use is 'linear\+lookup'"):
        jlora.restore_target(described)


def test_an_adapter_for_all_uses_is_described_as_before():
    described = jlora.describe(ROWS["plain"].lora(None))
    assert described["format"] == 1
    assert "only" not in described["adapters"]["e"]
    assert jlora.restore_target(json.loads(json.dumps(described)))["e"].only == ""


@both
def test_it_is_shown(only):
    row = ROWS["plain"]
    assert f"2 ({only} only)" in jlora.summary(row.params, row.lora(only))
    assert "only" not in jlora.summary(row.params, row.lora(None))


@both
def test_it_cannot_be_merged(only, tmp_path):
    row = ROWS["plain"]
    lora, sites = row.lora(only, seed=5), jlora.sites(row.tied, row.params, *row.args)
    calls = {
        "merge": lambda: jlora.merge(row.params, lora),
        "delta": lambda: jlora.delta(lora),
        "save": lambda: jlora.export.save(tmp_path / "m", row.params, lora, sites=sites, names={"e": "e.weight"}),
        "save_orbax": lambda: jlora.export.save_orbax(tmp_path / "o", row.params, lora),
    }
    for call in calls.values():
        with pytest.raises(
            ValueError, match=rf"'e' cannot be merged: its adapter is for one kind of use, {only}, .*\n.*untie"
        ):
            call()
    assert not list(tmp_path.iterdir())


def test_the_algebra_keeps_uses_apart():
    row = ROWS["plain"]
    one, two, every = (row.lora(only, seed) for seed, only in enumerate(("lookup", "linear", None), 1))
    for pair in ((one, two), (one, every)):
        with pytest.raises(ValueError, match=r"for different uses of 'e': lookup only, and (linear only|all)\."):
            jlora.algebra.combine(pair)
        with pytest.raises(ValueError, match=r"for different uses of 'e'"):
            jlora.algebra.compare(*pair)
    again = row.lora("lookup", 9)
    for method in ({"method": "concat"}, {"method": "svd"}, {"method": "ties", "density": 1.0}):
        assert jlora.algebra.combine([one, again], **method)["e"].only == "lookup"
    both = jlora.algebra.combine([one, again])
    np.testing.assert_allclose(both["e"].delta(), one["e"].delta() + again["e"].delta(), atol=1e-5)
    assert float(jlora.algebra.compare(one, one)["e"].cosine) == pytest.approx(1)
    for rank in (1, 4):
        assert jlora.algebra.resize(one, rank)["e"].only == "lookup"
    sites = jlora.sites(row.tied, row.params, *row.args)
    tuned = {"e": row.params["e"] + one["e"].delta()}
    with pytest.raises(
        ValueError, match=r"differ in all uses of 'e' \(linear\+lookup\), and the rule is for lookup only"
    ):
        jlora.algebra.extract(row.params, tuned, sites, jlora.LoRA(rank=2, targets="e", only="lookup"))


@both
def test_an_artifact_has_the_use(only):
    row = ROWS["plain"]
    lora = row.lora(only, seed=5)
    exported = jlora.export.function(row.tied, row.params, lora, *row.args)
    got = exported.call(row.params, jlora.export.arrays(lora), *row.args)
    close(got, jlora.wrap(row.tied)(row.params, lora, *row.args), row.tol)
    for other in {None, "lookup", "linear"} - {only}:
        with pytest.raises(ValueError, match=r"_only"):
            exported.call(row.params, jlora.export.arrays(row.lora(other, seed=5)), *row.args)


@both
def test_dropout_acts_on_the_one_use(only):
    row = ROWS["plain"]
    lora = {"e": replace(row.lora(only, seed=5)["e"], dropout=0.5)}
    x = array(B, T, D)

    def both_uses(params, ids, x):
        return params["e"][ids], x @ params["e"].T

    found = [jlora.wrap(both_uses)(row.params, lora, IDS, x, dropout_key=jax.random.key(k)) for k in range(2)]
    base = both_uses(row.params, IDS, x)
    differ = [bool((x != y).any()) for x, y in zip(*found, strict=True)]
    moved = [bool((x != y).any()) for x, y in zip(found[0], base, strict=True)]
    assert differ == moved == [only == "lookup", only == "linear"]


def test_a_rule_needs_such_a_use():
    def fn(p, i):
        return jnp.tanh(p["e"][i]) @ p["e"].T @ p["w"]

    params = {"e": array(V, D), "w": array(V, M)}
    sites = jlora.sites(fn, params, IDS)
    with pytest.raises(
        ValueError, match=r"'w' \(19, 13\) has no use of the kind 'lookup': it is used as linear.\n(.*\n)*.*can take e"
    ):
        jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets=".*", only="lookup"))
    with pytest.raises(
        ValueError, match=r"LoRA\(only=...\) must be 'lookup', 'linear', 'conv' or None.\n  got: 'head'"
    ):
        jlora.LoRA(only="head")
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets=".*", only="linear"))
    assert (lora["e"].only, lora["w"].only) == ("linear", "")  # of a leaf with one kind of use, that is all
    jlora.merge(params, {"w": lora["w"]})


def test_products_start_with_what_meets_the_activations():
    """As in PEFT: of a head A is random along the features and B is zero, of a table one factor is zero too."""
    heads, soft = ROWS["plain"].lora("linear")["e"], ROWS["soft"].lora("linear")["e"]
    assert not heads.a.any()
    assert 0 < float(jnp.abs(heads.b).max()) <= D**-0.5
    assert not soft.b.any()
    assert 0 < float(jnp.abs(soft.a).max()) <= V**-0.5
    table = ROWS["plain"].lora("lookup")["e"]
    assert not table.b.any()
    assert float(jnp.abs(table.a).max()) > 0.5


@both
@pytest.mark.parametrize("dense", ["error", "allow"])
@pytest.mark.parametrize(
    ("fn", "operation"),
    [
        (lambda p, i: jnp.tanh(p["e"][i]) @ p["e"].T + (p["e"] ** 2).sum(), "integer_pow|square|mul"),
        (lambda p, i: (i[:, :1] + p["e"][:B]) @ p["e"].T + p["e"][i[:, 0]] @ p["e"].T, "add"),
        (lambda p, i: p["e"][jnp.array([1, 2])] @ p["w"] + (p["e"][i] @ p["e"].T).sum(), "dot_general"),
        (lambda p, i: (p["e"][i] @ p["e"].T).sum() + jnp.ones((1, V)) @ p["e"], "dot_general"),
    ],
)
def test_what_kind_of_use_it_is_must_be_told(fn, operation, dense, only):
    params, ids = {"e": array(V, D), "w": array(D, M)}, jnp.zeros((B, T), jnp.float32)
    call = lambda p, x: fn(p, x.astype(jnp.int32))  # noqa: E731
    lora = {"e": ROWS["plain"].lora(only, seed=5)["e"]}
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        pytest.raises(
            jlora.DenseWeightError,
            match=rf"adapter of 'e' is for one kind of use, {only}, and what kind this is cannot be told.\n  operation: ({operation})",
        ),
    ):
        jlora.wrap(call, dense=dense)(params, lora, ids)


@both
def test_leaves_with_adapters_for_different_uses_are_not_joined(only):
    def fn(p, i):
        return jnp.tanh(jnp.concatenate([p["e"], p["f"]])[i]) @ jnp.concatenate([p["e"], p["f"]]).T

    params = {"e": array(V, D), "f": array(2, D)}
    sites = jlora.sites(fn, params, IDS)
    rules = [jlora.LoRA(rank=1, targets="e", only=only), jlora.LoRA(rank=1, targets="f")]
    lora = jlora.init(jax.random.key(0), params, sites, rules)
    with pytest.raises(jlora.DenseWeightError, match=rf"reason: their adapters act on different uses, all and {only}"):
        jlora.wrap(fn)(params, lora, IDS)
    rules = [jlora.LoRA(rank=1, targets=["e", "f"], only=only)]
    lora = jax.tree.map(lambda x: x + 0.1, jlora.init(jax.random.key(0), params, sites, rules))
    whole = jnp.concatenate([params["e"] + lora["e"].delta(), params["f"] + lora["f"].delta()])
    plain = jnp.concatenate([params["e"], params["f"]])
    expected = jnp.tanh((whole if only == "lookup" else plain)[IDS]) @ (plain if only == "lookup" else whole).T
    close(jlora.wrap(fn)(params, lora, IDS), expected, 1e-5)


@both
def test_labels_and_optimisers_take_it_as_any_other(only):
    row = ROWS["plain"]
    assert jlora.labels(row.lora(only)) is not None
    assert jax.tree.structure(jlora.labels(row.lora(only))) == jax.tree.structure(row.lora(only))


@both
def test_a_module_of_nnx(only):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(V, D, rngs=rngs)

        def __call__(self, i):
            return self.embed.attend(jnp.tanh(self.embed(i)))

    fn, params = jlora.nnx.split(Net(nnx.Rngs(0)))
    sites = jlora.sites(fn, params, IDS)
    rule = jlora.LoRA(rank=2, targets="embed/embedding", only=only)
    lora = jax.tree.map(lambda x: x + 0.1, jlora.init(jax.random.key(0), params, sites, rule))
    e = params["embed"]["embedding"]
    new = e + lora["embed/embedding"].delta()
    expected = jnp.tanh((new if only == "lookup" else e)[IDS]) @ (e if only == "lookup" else new).T
    close(jlora.wrap(fn)(params, lora, IDS), expected, 1e-5)


@both
@pytest.mark.parametrize("how", [lambda f: f, jax.jit, jax.checkpoint])
def test_a_call_that_has_only_the_other_use_raises(only, how):
    """Also where a helper that the model calls twice is evaluated once."""
    params, ids = {"e": array(V, D), "f": array(V, D, seed=3)}, jnp.array([3, 1])
    helper = how(lambda e, i: jnp.tanh(e[i]))
    uses = {
        "lookup": lambda p, ids: helper(p["f"], ids) + helper(p["e"], ids),
        "linear": lambda p, ids: jnp.ones((2, D)) * jnp.sin(ids[:, None]) @ p["e"].T,
    }
    sites = jlora.sites(lambda p, ids: uses["lookup"](p, ids) @ p["e"].T, params, ids)
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="e", only=only))
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    other = "linear" if only == "lookup" else "lookup"
    for run in (lambda f: f, jax.jit):
        assert run(jlora.wrap(uses[only]))(params, lora, ids).shape[0] == 2
        with pytest.raises(
            ValueError, match=f"no effect: that of 'e' is for one kind of use, {only}, and this call has"
        ):
            run(jlora.wrap(uses[other]))(params, lora, ids)
