"""Laws of adapters on a mesh of eight devices: the same numbers, factors that live where they belong, no traffic of the base's size."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from benchmarks import measure
from jlora import _init

B, T, D, M, H, K, E, L, V = 8, 4, 16, 32, 4, 8, 4, 2, 24
CASES = {}


def case(name, shapes, specs, x=(B, T, D), x_spec=P("data"), kinds=(AxisType.Auto, AxisType.Explicit)):
    """Adds a model ``fn(p, x, at)`` and how its parameters are split; ``at(spec)`` is what an explicit mesh has to be told."""

    def add(fn):
        CASES.update({f"{name}-{kind.name.lower()}": (fn, shapes, specs, x, x_spec, kind) for kind in kinds})
        return fn

    return add


def mlp(p, x, at):
    h = jnp.tanh(jnp.einsum("btd,dm->btm", x, p["up"], **at(P("data", None, "model"))))
    return x + jnp.einsum("btm,md->btd", h, p["down"], **at(P("data", None, None)))


UP_DOWN = {"up": (D, M), "down": (M, D)}
case("tensor_parallel", UP_DOWN, {"up": P(None, "model"), "down": P("model")})(mlp)
case("both", UP_DOWN, {"up": P("data", "model"), "down": P("model", "data")})(mlp)
case("fused_axes", UP_DOWN, {"up": P(None, ("model", "data")), "down": P(("model", "data"))}, kinds=[AxisType.Auto])(
    mlp
)


@case("fsdp", UP_DOWN, {"up": P("data"), "down": P(None, "data")}, x_spec=P(("data", "model")), kinds=[AxisType.Auto])
@case(
    "sequence", UP_DOWN, {"up": P(None, "model"), "down": P("model")}, x_spec=P("data", "model"), kinds=[AxisType.Auto]
)
def plain(p, x, at):
    return x + jnp.tanh(x @ p["up"]) @ p["down"]


@case("heads", {"q": (D, H, K), "o": (H, K, D)}, {"q": P("data", "model"), "o": P("model", None, "data")})
def heads(p, x, at):
    y = jnp.einsum("btd,dhk->bthk", x, p["q"], **at(P("data", None, "model", None)))
    return jnp.einsum("bthk,hkd->btd", jnp.sin(y), p["o"], **at(P("data", None, None)))


@case("scanned", {"w": (L, D, D)}, {"w": P(None, "data", "model")})
@case("pipelined", {"w": (L, D, D)}, {"w": P("data", None, "model")}, kinds=[AxisType.Auto])
def scanned(p, x, at):
    step = jax.checkpoint(
        lambda c, w: (c + jnp.tanh(jnp.einsum("btd,de->bte", c, w, **at(P("data", None, None)))), None)
    )
    return lax.scan(step, x, p["w"])[0]


@case("experts", {"w": (E, D, M)}, {"w": P("model", "data")})
def experts(p, x, at):
    y = jnp.einsum("btd,edm->ebtm", x, p["w"], **at(P("model", "data", None, None)))
    return jnp.einsum("ebtm,ebtm->btm", y, jnp.cos(y), **at(P("data", None, None)))


@case("ragged", {"w": (E, D, M)}, {"w": P("model")}, x=(B, D), kinds=[AxisType.Auto])
def ragged(p, x, at):
    return lax.ragged_dot(x, p["w"], jnp.array([2, 1, 0, 5], jnp.int32))


@case("tied", {"table": (V, D)}, {"table": P("model", "data")}, x=(B, T))
def tied(p, x, at):
    ids = jnp.abs(x * 10).astype(jnp.int32) % V
    rows = p["table"].at[ids].get(mode="promise_in_bounds", **at(P("data", None, None)))
    return jnp.einsum("btd,vd->btv", rows, p["table"], **at(P("data", None, "model")))


@case("conv", {"w": (3, D, M)}, {"w": P(None, None, "model")}, kinds=[AxisType.Auto])
def conv(p, x, at):
    return lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


@case("grouped_conv", {"w": (3, D // 4, M)}, {"w": P(None, None, "model")}, kinds=[AxisType.Auto])
def grouped_conv(p, x, at):
    names = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=names, feature_group_count=4)


@case("explicit_conv", {"w": (3, D, M)}, {"w": P(None, None, "model")}, kinds=[AxisType.Explicit])
def explicit_conv(p, x, at):
    names, to = ("NWC", "WIO", "NWC"), at(P("data", None, "model"))
    return lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=names, **to)


@case("conv_layouts", {"w": (3, D, D)}, {"w": P(None, None, "model")})
def conv_layouts(p, x, at):
    """The second use sums over the outputs of the first, so that its 1x1 kernel comes first."""
    to, back = at(P("model", "data", None)), at(P("data", "model", None))
    y = lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "CNW"), **to)
    return lax.conv_general_dilated(jnp.tanh(y), p["w"], (1,), "SAME", dimension_numbers=("CNW", "WOI", "NCW"), **back)


@case("reshaped", {"w": (D, H, K)}, {"w": P(None, "model")}, kinds=[AxisType.Explicit])
@case("reshaped_inner", {"w": (D, H, K)}, {"w": P(None, None, "model")}, kinds=[AxisType.Explicit])
def reshaped(p, x, at):
    return jnp.einsum("btd,dm->btm", x, jnp.reshape(p["w"], (D, H * K), **at(P(None, "model"))))


@case("shard_map", {"up": (D, M), "down": (M, D)}, {"up": P(None, "model"), "down": P("model")})
def mapped(p, x, at):
    def local(up, down, x):
        return lax.psum(jnp.tanh(x @ up) @ down, "model")

    specs = (P(None, "model"), P("model"), P("data"))
    return jax.shard_map(local, in_specs=specs, out_specs=P("data"))(p["up"], p["down"], x)


@case(
    "expert_per_device", {"w": (8, D, M)}, {"w": P(("data", "model"))}, x=(B, D), x_spec=P(None), kinds=[AxisType.Auto]
)
def one_each(p, x, at):
    def local(w, x):
        return jnp.tanh(x @ w[0])[None]

    axes = ("data", "model")
    return jax.shard_map(local, in_specs=(P(axes), P()), out_specs=P(axes))(p["w"], x)


def made(name):
    """A case on its mesh and on one device: function, parameters and input of each."""
    fn, shapes, specs, x_shape, x_spec, kind = CASES[name]
    rng = np.random.default_rng(0)
    host = {n: np.asarray(rng.standard_normal(s) / 4, np.float32) for n, s in shapes.items()}
    x = np.asarray(rng.standard_normal(x_shape), np.float32)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    params = {n: jax.device_put(w, NamedSharding(mesh, specs[n])) for n, w in host.items()}
    explicit = kind == AxisType.Explicit

    def on_mesh(p, x):
        return fn(p, x, lambda spec: {"out_sharding": spec} if explicit else {})

    return mesh, on_mesh, params, jax.device_put(x, NamedSharding(mesh, x_spec)), (host, x)


def adapted(fn, params, x, rank=4):
    sites = jlora.sites(fn, params, x)
    assert not sites.skipped, str(sites)
    return jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=rank, alpha=rank, targets=".*"))


def nudged(lora):
    """Factors far from where they start, made on one device so that they are the same everywhere."""
    host = {
        path: [np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape) / 4 for x in jax.tree.leaves(adapter)]
        for path, adapter in lora.items()
    }
    return {
        path: jax.tree.unflatten(
            jax.tree.structure(a),
            [jax.device_put(h, x.sharding) for h, x in zip(host[path], jax.tree.leaves(a), strict=True)],
        )
        for path, a in lora.items()
    }


def same_place(x, want):
    return x.sharding.is_equivalent_to(want, x.ndim)


@pytest.mark.parametrize("name", CASES)
def test_a_mesh_changes_no_number(name, standard_promotion):
    mesh, fn, params, x, (host, host_x) = made(name)
    with jax.set_mesh(mesh):
        lora = nudged(adapted(fn, params, x))
        apply = jlora.wrap(fn)

        def loss(lora, params, x):
            y = apply(params, lora, x)
            return (y.astype(jnp.float32) ** 2).mean(), y

        (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(lora, params, x)
        merged = jlora.merge(params, lora)
        y_merged = jax.jit(fn)(merged, x)

    def alone(lora):  # the dense reference: the same model with merged weights, on one device
        raw, specs = CASES[name][0], CASES[name][2]
        if name.startswith("expert_per"):
            raw = lambda p, x, at: jnp.tanh(jnp.einsum("bd,edm->ebm", x, p["w"]))  # noqa: E731
        if name.startswith("shard_map"):
            raw = lambda p, x, at: jnp.tanh(x @ p["up"]) @ p["down"]  # noqa: E731
        y = raw(
            jlora.merge({n: jnp.asarray(w) for n, w in host.items() if n in specs}, lora),
            jnp.asarray(host_x),
            lambda spec: {},
        )
        return (y**2).mean(), y

    (_, wanted), wanted_grads = jax.jit(jax.value_and_grad(alone, has_aux=True))(jax.tree.map(np.asarray, lora))
    np.testing.assert_allclose(np.asarray(y), wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(np.asarray(y_merged), wanted, rtol=2e-5, atol=2e-5)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(np.asarray(got), want, rtol=2e-5, atol=2e-5)
    for n, w in merged.items():
        assert same_place(w, params[n].sharding)


@pytest.mark.parametrize("name", CASES)
def test_factors_are_born_where_they_belong(name):
    mesh, fn, params, x, (host, _) = made(name)
    with jax.set_mesh(mesh):
        sites = jlora.sites(fn, params, x)
        rule = jlora.LoRA(rank=4, targets=".*")
        lora = jlora.init(jax.random.key(0), params, sites, rule)
    alone = jlora.init(jax.random.key(0), {n: jnp.asarray(w) for n, w in host.items()}, sites, rule)
    where = jlora.shardings(lora, params)
    for path, adapter in lora.items():
        base = (*params[path].sharding.spec, *(None,) * params[path].ndim)
        for field, axes in adapter.axes().items():
            array, want = getattr(adapter, field), getattr(where[path], field)
            assert same_place(array, want)
            # An axis is split exactly if the base's is, over the same mesh axes; the rank never is.
            assert tuple(want.spec) == tuple(None if d is None else base[d] for d in axes)
            np.testing.assert_array_equal(array, getattr(alone[path], field))


@pytest.mark.parametrize("name", ["both-auto", "both-explicit", "scanned-auto"])
def test_a_saved_adapter_is_loaded_onto_any_mesh(name, tmp_path):
    """Bit for bit: onto the mesh it was saved on, onto others, and onto one device."""
    mesh, fn, params, x, (host, _) = made(name)
    with jax.set_mesh(mesh):
        lora = nudged(adapted(fn, params, x))
    jlora.save(tmp_path / "adapter", lora)
    meshes = [
        jax.make_mesh(shape, ("data", "model"), axis_types=(CASES[name][5],) * 2) for shape in ((2, 4), (4, 2), (8, 1))
    ]
    bases = [{n: jax.device_put(w, NamedSharding(m, CASES[name][2][n])) for n, w in host.items()} for m in meshes]
    for base in [*bases, {n: jnp.asarray(w) for n, w in host.items()}]:
        again = jlora.load(tmp_path / "adapter", base)
        where = jlora.shardings(lora, base)
        for got, saved, want in zip(*map(jax.tree.leaves, (again, lora, where)), strict=True):
            assert same_place(got, want)
            np.testing.assert_array_equal(got, saved)


# --- Communication ---------------------------------------------------------------------------------------------------

TOKENS, RANK = B * T, 4


def traffic(fn, *args, **how):
    """Elements of the result of each collective in the compiled ``fn(*args)``."""
    return [c.bytes // 4 for c in measure.collectives(jax.jit(fn, **how).lower(*args).compile().as_text())]


def step_and_floor(name):
    """Collectives of the adapter's gradient step, and of the base's own: frozen, differentiated to its first activation."""
    mesh, fn, params, x, _ = made(name)
    with jax.set_mesh(mesh):
        lora = adapted(fn, params, x, RANK)
        where = jax.tree.map(lambda f: f.sharding, lora)
        apply = jlora.wrap(fn)
        step = traffic(
            lambda lora, p, x: jax.grad(lambda lora: (apply(p, lora, x) ** 2).sum())(lora),
            lora,
            params,
            x,
            out_shardings=where,
        )
        floor = traffic(lambda p, x: jax.grad(lambda x: (fn(p, x) ** 2).sum())(x), params, x)
    return step, floor, sum(f.size for f in jax.tree.leaves(lora))


@pytest.mark.parametrize(
    "name",
    ["tensor_parallel-auto", "tensor_parallel-explicit", "both-auto", "sequence-auto", "fsdp-auto", "heads-auto"],
)
def test_an_adapter_adds_no_traffic_of_the_size_of_weights_or_activations(name):
    step, floor, trained = step_and_floor(name)
    # What is rank-wide: the factors themselves, their gradients, and activations in the rank.
    thin = trained + 8 * TOKENS * RANK
    assert sum(step) <= sum(floor) + thin
    # Arrays of whole activations or of kernels, or what they are split into, are moved no more often than by the base.
    wide = D * M // 8
    assert sum(n >= wide and n > trained for n in step) <= sum(n >= wide and n > trained for n in floor)


def test_tensor_parallel_adapters_add_one_reduction():
    step, floor, _ = step_and_floor("tensor_parallel-auto")
    assert len(step) <= len(floor) + 1


@pytest.mark.parametrize("name", [n for n in CASES if "auto" in n])
def test_merge_gathers_nothing(name):
    mesh, fn, params, x, _ = made(name)
    with jax.set_mesh(mesh):
        lora = adapted(fn, params, x, RANK)
        compiled = jax.jit(jlora.merge, donate_argnums=0).lower(params, lora).compile()
    # Where the axes of A and B are split over other devices, every device has the rows and columns that it needs.
    assert not measure.collectives(compiled.as_text())
    for path, w in params.items():
        assert compiled.output_shardings[path].is_equivalent_to(w.sharding, w.ndim)


@pytest.mark.parametrize("inside", [True, False], ids=["set_mesh", "no mesh set"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_init_makes_no_whole_copy(kind, inside):
    """Each device makes its own part of A: no temporary of the size of the whole."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    where = NamedSharding(mesh, P("data", None))
    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
        made = _init._maker("uniform", (4096, 8), jnp.dtype("float32"), 4096, where)
        compiled = made.lower(jax.random.key(0)).compile()
        assert same_place(made(jax.random.key(0)), where)
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 8 * 4 // 2
    assert not measure.collectives(compiled.as_text())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_no_mesh_has_to_be_set(kind):
    """What plain JAX computes with placed arrays alone, an adapter does too."""
    mesh, _, params, x, _ = made(f"tensor_parallel-{kind.name.lower()}")
    plain = lambda p, x: jnp.tanh(x @ p["up"])  # noqa: E731
    params = {"up": params["up"]}
    lora = nudged(adapted(plain, params, x))
    apply, merged = jlora.wrap(plain), jlora.merge(params, lora)
    wanted = plain(merged, x)
    for found in (
        apply(params, lora, x),
        jax.jit(apply)(params, lora, x),
        plain(jax.jit(jlora.merge)(params, lora), x),
    ):
        np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=2e-5, atol=2e-5)
    grads = jax.jit(jax.grad(lambda lora: apply(params, lora, x).sum()))(lora)
    assert same_place(grads["up"].b, NamedSharding(mesh, P(None, "model")))
    assert same_place(jlora.delta(lora)["up"], params["up"].sharding)


def test_init_inside_jit_follows_the_type():
    mesh, fn, params, x, _ = made("both-explicit")
    rule = jlora.LoRA(rank=4, targets=".*")
    with jax.set_mesh(mesh):
        sites = jlora.sites(fn, params, x)
        lora = jax.jit(lambda key, p: jlora.init(key, p, sites, rule))(jax.random.key(0), params)
    for got, want in zip(*map(jax.tree.leaves, (lora, jlora.shardings(lora, params))), strict=True):
        assert same_place(got, want)


def test_shards_drop_out_for_themselves():
    """Inside shard_map each shard of the activations has a mask of its own; shards that have the same have the same mask."""

    def fn(p, x):
        return jax.shard_map(lambda w, x: x @ w, mesh=MESH, in_specs=(P(), P("data")), out_specs=P("data"))(p["w"], x)

    params = {"w": jnp.zeros((D, 4))}
    sites = jlora.sites(fn, params, jnp.ones((4, D)))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, dropout=0.5, targets="w"))
    y = np.asarray(
        jlora.wrap(fn)(params, jax.tree.map(lambda f: f + 1, lora), jnp.ones((4, D)), dropout_key=jax.random.key(1))
    )
    assert (y[:2] != y[2:]).any()


# --- Names -----------------------------------------------------------------------------------------------------------


class Partitioned(nn.Module):
    @nn.compact
    def __call__(self, x):
        def init(*names):
            return nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)

        x = nn.Dense(32, kernel_init=init("embed", "mlp"), name="up")(x)
        return nn.Dense(6, kernel_init=init("mlp", "embed"), name="down")(x)


MESH = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
RULES = [("embed", "data"), ("mlp", "model")]


@pytest.mark.parametrize("boxed", [True, False])
def test_logical_axis_names_of_linen(boxed):
    variables = Partitioned().init(jax.random.key(0), jnp.ones((2, 16)))
    params = variables if boxed else nn.meta.unbox(variables)
    sites = jlora.sites(Partitioned().apply, params, jnp.ones((2, 16)))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets=".*kernel.*"))
    up = next(path for path in lora if "/up/" in path)
    for base in (variables, nn.get_partition_spec(variables)):
        got = jlora.shardings(lora, base, rules=RULES)
        assert (got[up].a, got[up].b) == (P("data", None), P(None, "model"))
    got = jlora.shardings(lora, variables, mesh=MESH, rules=RULES)
    assert got[up].b == NamedSharding(MESH, P(None, "model"))
    with pytest.raises(ValueError, match=r"names 'mlp', which the mesh does not have.*\n.*'data', 'model'.*rules="):
        jlora.shardings(lora, variables, mesh=MESH)
    with pytest.raises(ValueError, match=r"names 'modle', which the mesh does not have"):
        jlora.shardings(lora, variables, mesh=MESH, rules=[("embed", "data"), ("mlp", "modle")])


def test_sharding_metadata_of_nnx():
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
    with jax.set_mesh(MESH):
        module = nnx.Linear(8, 16, kernel_init=init, rngs=nnx.Rngs(0))
        fn, params = jlora.nnx.split(module)
        lora = jlora.init(
            jax.random.key(0), params, jlora.sites(fn, params, jnp.ones((2, 8))), jlora.LoRA(rank=2, targets="kernel")
        )
    state = nnx.state(module, nnx.Param)
    assert jlora.shardings(lora, nnx.get_partition_spec(state))["kernel"].b == P(None, "model")
    assert jlora.shardings(lora, nnx.get_named_sharding(state, MESH))["kernel"].b == NamedSharding(
        MESH, P(None, "model")
    )
    assert same_place(lora["kernel"].b, NamedSharding(MESH, P(None, "model")))


def test_an_optimiser_is_split_as_its_adapter(standard_promotion):
    params = {"w": jax.device_put(jnp.ones((16, 8)), NamedSharding(MESH, P("data", "model")))}
    lora = adapted(lambda p, x: x @ p["w"], params, jnp.ones((2, 16)))
    tx = jlora.freeze(optax.adamw(optax.cosine_decay_schedule(1e-3, 10)))
    tree = {"base": params, "lora": lora}
    state = jax.eval_shape(tx.init, tree)
    where = jlora.shardings(state, params)
    placed = jax.jit(tx.init, out_shardings=where)(tree)
    moments = [
        x
        for x in jax.tree.leaves(placed, is_leaf=lambda x: isinstance(x, jlora.Adapter))
        if isinstance(x, jlora.Adapter)
    ]
    assert len(moments) == 2
    for moment in moments:
        assert same_place(moment.a, lora["w"].a.sharding)
        assert same_place(moment.b, lora["w"].b.sharding)
    others = [x for x in jax.tree.leaves(placed) if x.ndim == 0]
    assert others
    assert all(x.sharding.is_fully_replicated for x in others)
    with pytest.raises(ValueError, match="There is no adapter in this tree"):
        jlora.shardings({"w": jnp.ones(3)}, params)


def test_specs_of_the_mesh_stay_what_they_are_beside_rules():
    params = {"w": jnp.ones((16, 8))}
    lora = adapted(lambda p, x: x @ p["w"], params, jnp.ones((2, 16)))
    where = jlora.shardings(lora, {"w": P("data", "mlp")}, mesh=MESH, rules=RULES)["w"]
    assert (where.a.spec, where.b.spec) == (P("data", None), P(None, "model"))


def test_a_boxed_base_on_one_device_takes_what_a_mesh_saved(tmp_path):
    variables = Partitioned().init(jax.random.key(0), jnp.ones((2, 16)))
    sites = jlora.sites(Partitioned().apply, variables, jnp.ones((2, 16)))
    lora = jlora.init(jax.random.key(0), variables, sites, jlora.LoRA(rank=2, targets=".*kernel.*"))
    jlora.save(tmp_path / "a", lora)
    for base in (variables, jax.device_put(variables, jax.devices()[0])):
        again = jlora.load(tmp_path / "a", base)
        jax.tree.map(np.testing.assert_array_equal, again, lora)
        assert all(len(x.devices()) == 1 for x in jax.tree.leaves(again))


OPTIMIZERS = {
    "a rate for each factor": optax.partition({"a": optax.adam(1.0), "b": optax.sgd(1.0)}, jlora.labels),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=1),
    "novograd": optax.novograd(1.0),
    "lbfgs": optax.lbfgs(),
    "sm3": optax.sm3(1.0),
    "muon": optax.contrib.muon(1.0),
    "sgd": optax.sgd(1.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimiser_can_be_placed(name):
    """Moments follow their factors; what has another shape, or is not there, is whole."""
    params = {"w": jax.device_put(jnp.ones((16, 8)), NamedSharding(MESH, P("data", "model")))}
    lora = adapted(lambda p, x: x @ p["w"], params, jnp.ones((2, 16)))
    state = OPTIMIZERS[name].init(lora)
    where = jlora.shardings(jax.eval_shape(lambda: state), params)
    placed = jax.device_put(state, where) if jax.tree.leaves(where) else state
    for x, s in zip(jax.tree.leaves(placed), jax.tree.leaves(where), strict=True):
        assert same_place(x, s)
        shapes = {lora["w"].a.shape: P("data", None), lora["w"].b.shape: P(None, "model")}
        assert s.spec == shapes.get(x.shape, s.spec)
        assert all(n % 4 == 0 for n, axis in zip(x.shape, s.spec, strict=False) if axis)


def test_stacks_of_adapters_are_whole_along_the_stack():
    params = {"w": jax.device_put(jnp.ones((16, 8)), NamedSharding(MESH, P("data", "model")))}
    lora = adapted(lambda p, x: x @ p["w"], params, jnp.ones((2, 16)))
    where = jlora.shardings(jax.tree.map(lambda *x: jnp.stack(x), lora, lora), params)["w"]
    assert (where.a.spec, where.b.spec) == (P(None, "data", None), P(None, None, "model"))


def test_a_leaf_that_nobody_placed_is_whole_on_the_mesh_of_the_others():
    params = {"a": jnp.ones((8, 16)), "w": jax.device_put(jnp.ones((16, 8)), NamedSharding(MESH, P("data", "model")))}
    lora = adapted(lambda p, x: x @ p["a"] @ p["w"], params, jnp.ones((2, 8)))
    where = jlora.shardings(lora, params)
    assert where["a"].a == NamedSharding(MESH, P(None, None))
    jax.device_put(lora, where)


def test_specs_that_leave_an_axis_open():
    params = {"w": jnp.ones((16, 8))}
    lora = adapted(lambda p, x: x @ p["w"], params, jnp.ones((2, 16)))
    spec = P(P.UNCONSTRAINED, "model")
    for where in (
        jlora.shardings(lora, {"w": NamedSharding(MESH, spec)}),
        jlora.shardings(lora, {"w": spec}, mesh=MESH),
    ):
        assert (where["w"].a.spec, where["w"].b.spec) == (P(None, None), P(None, "model"))


class Rows(jax.sharding.Sharding):
    """A sharding that says of devices what they hold, and of axes nothing."""

    device_set = frozenset(jax.devices())
    is_fully_replicated = False


def test_shardings_that_do_not_speak_of_axes_are_refused():
    params = {"w": jnp.ones((16, 8))}
    lora = adapted(lambda p, x: x @ p["w"], params, jnp.ones((2, 16)))
    with pytest.raises(ValueError, match="got: one adapter alone"):
        jlora.shardings(lora["w"], params)
    with pytest.raises(ValueError, match=r"does not say which axes are split.\n  got: Rows"):
        jlora.shardings(lora, {"w": Rows()})


def test_an_axis_that_devices_do_not_divide_is_kept_whole_and_the_summary_says_so():
    params = {"w": jnp.ones((16, 6))}
    sites = jlora.sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 16)))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="w"))
    where = jlora.shardings(lora, {"w": P("data", "model")}, mesh=MESH)
    assert (where["w"].a.spec, where["w"].b.spec) == (P("data", None), P(None, None))
    jax.device_put(lora, where)  # it can be placed
    uneven = {"w": jax.ShapeDtypeStruct((16, 6), jnp.float32, sharding=NamedSharding(MESH, P("data", "model")))}
    text = jlora.summary(uneven, lora)
    assert "a (data, -)  b (-, -)" in text
    assert "'w': the axis of size 6 of b is kept whole, since the devices along model do not divide it." in text
    even = {"w": jax.device_put(params["w"], NamedSharding(MESH, P(("data", "model"))))}
    assert "a (data+model, -)  b (-, -)" in jlora.summary(even, lora)
    assert "kept whole" not in jlora.summary(even, lora)
    assert "split over" not in jlora.summary(params, lora)
