"""What the compiled program costs: flops, memory, compilations, values; counted, never timed."""

import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from measure import computed_values, flops, temporaries

import jlora
from jlora import _merge

DIM, FF, HEADS, VOCAB, RANK, LAYERS = 128, 512, 4, 211, 4, 2


class Linear(nn.Module):
    """A dense layer, with a hand-written low-rank branch if asked: what a careful person writes into the model."""

    features: int
    low_rank: bool

    @nn.compact
    def __call__(self, x):
        y = x @ self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        if not self.low_rank:
            return y
        a = self.variable("lora", "a", jnp.zeros, (x.shape[-1], RANK)).value
        b = self.variable("lora", "b", jnp.zeros, (RANK, self.features)).value
        flat = x.reshape(-1, x.shape[-1])
        return y + ((flat @ a) @ (b * 2.0)).reshape(y.shape)


class Transformer(nn.Module):
    low_rank: bool = False

    @nn.compact
    def __call__(self, ids):
        def linear(features, name):
            return Linear(features, self.low_rank, name=name)

        x = nn.Embed(VOCAB, DIM, name="embed")(ids)
        for i in range(LAYERS):
            h = nn.RMSNorm(name=f"norm_a{i}")(x)
            q, k, v = (linear(DIM, f"{n}{i}")(h).reshape(*h.shape[:2], HEADS, -1) for n in ("q", "k", "v"))
            x = x + linear(DIM, f"o{i}")(nn.dot_product_attention(q, k, v).reshape(x.shape))
            h = nn.RMSNorm(name=f"norm_m{i}")(x)
            x = x + linear(DIM, f"down{i}")(nn.gelu(linear(FF, f"up{i}")(h)))
        return Linear(VOCAB, False, name="head")(nn.RMSNorm(name="norm")(x))


IDS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (4, 64)))
BASE, HAND = Transformer(), Transformer(low_rank=True)


def loss_of(logits, ids):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()


@pytest.fixture(scope="module")
def programs():
    """Gradient functions of the small tree, and of everything, with their arguments."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(BASE.init, jax.random.key(0), IDS)
    params = jax.tree.map(lambda s: jnp.asarray(0.1 * rng.standard_normal(s.shape), s.dtype), shapes)
    factors = jax.eval_shape(HAND.init, jax.random.key(0), IDS)["lora"]
    factors = jax.tree.map(lambda s: jnp.asarray(0.1 * rng.standard_normal(s.shape), s.dtype), factors)
    sites = jlora.sites(BASE.apply, params, IDS)
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=RANK, alpha=2.0 * RANK))
    lora = {path: type(x)(**{**vars(x), **factors[path.split("/")[1]]}) for path, x in lora.items()}
    apply = jlora.wrap(BASE.apply)
    return {
        "full": (jax.grad(lambda p, ids: loss_of(BASE.apply(p, ids), ids)), (params, IDS)),
        "formed": (jax.grad(lambda l, p, ids: loss_of(BASE.apply(jlora.merge(p, l), ids), ids)), (lora, params, IDS)),
        "hand": (jax.grad(lambda f, p, ids: loss_of(HAND.apply(p | {"lora": f}, ids), ids)), (factors, params, IDS)),
        "jlora": (jax.grad(lambda l, p, ids: loss_of(apply(p, l, ids), ids)), (lora, params, IDS)),
        "whole tree": (
            jax.grad(lambda tree, ids: loss_of(apply(tree["base"], tree["lora"], ids), ids)),
            ({"base": params, "lora": lora}, IDS),
        ),
        "forward": (lambda p, ids: loss_of(BASE.apply(p, ids), ids), (params, IDS)),
    }


def test_gradients_are_those_of_the_hand_written_model(programs):
    (hand, hand_args), (ours, our_args) = programs["hand"], programs["jlora"]
    expected, got = hand(*hand_args), ours(*our_args)
    assert len(got) == 6 * LAYERS
    for path, adapter in got.items():
        for name in ("a", "b"):
            reference = np.asarray(expected[path.split("/")[1]][name])
            np.testing.assert_allclose(
                getattr(adapter, name), reference, atol=2e-5 * np.abs(reference).max(), rtol=1e-4
            )


def test_flops_of_a_gradient_step(programs):
    count = {name: flops(fn, *args) for name, (fn, args) in programs.items()}
    assert count["jlora"] <= 0.70 * count["full"]
    assert count["jlora"] <= 1.01 * count["hand"]
    # The trap this avoids, so that the count is known to see it:
    assert count["formed"] > 0.90 * count["full"]
    # Asking for gradients of the whole tree costs nothing, since the base's are stopped.
    assert count["whole tree"] <= 1.01 * count["jlora"]


def test_temporary_memory_of_a_gradient_step(programs):
    used = {name: temporaries(*[fn, *args]) for name, (fn, args) in programs.items() if name in ("hand", "jlora")}
    assert used["jlora"] <= 1.08 * used["hand"]


def test_gradient_program_computes_no_value_of_a_kernels_shape(programs):
    shapes = {(DIM, DIM), (DIM, FF), (FF, DIM)}
    count = {name: computed_values(jax.make_jaxpr(fn)(*args), shapes) for name, (fn, args) in programs.items()}
    assert count["jlora"] == count["forward"] == 0
    assert count["formed"] >= 3 * 6 * LAYERS
    # Whoever asks for gradients of the whole tree gets zeros for the base: one stopped leaf each, and nothing computed.
    fn, args = programs["whole tree"]
    assert count["whole tree"] == 6 * LAYERS
    assert computed_values(jax.make_jaxpr(fn)(*args), shapes, ignore=("stop_gradient",)) == 0


@pytest.mark.usefixtures("standard_promotion")
def test_nothing_recompiles_in_training_or_on_exchange(programs):
    _, (lora, params, ids) = programs["jlora"]
    apply, tx = jlora.wrap(BASE.apply), optax.adam(1e-3)
    traces = 0

    @jax.jit
    def step(lora, state, params, ids):
        nonlocal traces
        traces += 1
        loss, grads = jax.value_and_grad(lambda l: loss_of(apply(params, l, ids), ids))(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    before = jax.tree.map(np.array, params)
    state, first = tx.init(lora), lora
    for _ in range(100):
        lora, state, loss = step(lora, state, params, ids)
    assert bool(jnp.isfinite(loss))
    sites = jlora.sites(BASE.apply, params, IDS)
    other = jlora.init(jax.random.key(9), params, sites, jlora.LoRA(rank=RANK, alpha=2.0 * RANK))
    step(other, tx.init(other), params, ids)
    assert traces == 1
    assert step._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, before, params)  # the base's bits
    assert all(bool((x != y).any()) for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(lora), strict=True))


def test_program_grows_linearly_with_depth():
    """Unrolled layers cost the same each, however many there are."""

    def net(params, x):
        for w in params:
            x = x + jnp.tanh(x @ w)
        return x

    def size(depth):
        params, x = [jnp.ones((7, 7))] * depth, jnp.ones((2, 7))
        lora = jlora.init(jax.random.key(0), params, jlora.sites(net, params, x), jlora.LoRA(rank=2, targets=".*"))
        return len(jax.make_jaxpr(jlora.wrap(net))(params, lora, x).eqns)

    assert size(8) - size(4) == 2 * (size(4) - size(2)) > 0


def test_scan_keeps_the_program_small():
    """A scanned stack is interpreted once, whatever its depth."""

    def net(params, x):
        return jax.lax.scan(lambda c, w: (c + jnp.tanh(c @ w), None), x, params["w"])[0]

    def size(depth):
        params = {"w": jnp.ones((depth, 7, 7))}
        lora = jlora.init(
            jax.random.key(0), params, jlora.sites(net, params, jnp.ones((2, 7))), jlora.LoRA(rank=2, targets="w")
        )
        return len(str(jax.make_jaxpr(jlora.wrap(net))(params, lora, jnp.ones((2, 7)))).splitlines())

    assert size(3) == size(30)


def test_products_of_the_adapter_branch_are_two_dimensional(programs):
    """XLA:CPU has its fast path for these only."""
    fn, args = programs["jlora"]
    from measure import equations

    thin = [
        e
        for e in equations(jax.make_jaxpr(fn)(*args))
        if e.primitive.name == "dot_general"
        and any(RANK in v.aval.shape for v in (*e.invars, *e.outvars) if v.aval.ndim == 2)
    ]
    assert len(thin) >= 6 * 6 * LAYERS - 6
    assert all(v.aval.ndim == 2 for e in thin for v in (*e.invars, *e.outvars))


def test_no_gradient_of_a_factor_comes_out_transposed(programs):
    """XLA:CPU takes several times as long for a product of tall matrices whose result is tall than for its transpose."""
    fn, args = programs["jlora"]
    text = jax.jit(fn).lower(*args).compile().as_text()
    tall = rf"= f32\[(?:{DIM}|{FF}),{RANK}\]\{{1,0\}} dot\("
    assert re.search(rf"f32\[{RANK},{DIM}\]|f32\[{DIM},{RANK}\]\{{0,1\}}", text)
    assert not re.findall(tall, text)


def test_only_one_layer_of_a_rematerialised_stack_is_scaled_at_a_time():
    """Scaled or turned as a whole before the scan, the factors would be there twice."""
    layers, dim, rank, scale = 16, 64, 16, 3.0 / 16
    stack = jax.ShapeDtypeStruct((layers, dim, dim), jnp.float32)
    params, x = {"up": stack, "down": stack}, jax.ShapeDtypeStruct((8, dim), jnp.float32)

    def net(layer):
        @jax.checkpoint
        def block(x, w):
            return x + layer(jnp.tanh(layer(x, w, "up")), w, "down"), None

        return lambda stacked, x: jax.lax.scan(block, x, stacked)[0]

    fn = net(lambda x, w, name: x @ w[name])
    by_hand = net(lambda x, w, name: x @ w[name] + (x @ w[f"a {name}"]) @ (scale * w[f"b {name}"]))
    sites = jlora.sites(fn, params, x)
    rule = jlora.LoRA(rank=rank, alpha=scale * rank)
    lora = jax.eval_shape(lambda: jlora.init(jax.random.key(0), params, sites, rule))
    factors = {f"a {name}": f.a for name, f in lora.items()} | {f"b {name}": f.b for name, f in lora.items()}

    def bytes_of(trained, apply):
        return temporaries(jax.grad(lambda t, p, x: (apply(p, t, x) ** 2).sum()), trained, params, x)

    ours = bytes_of(lora, jlora.wrap(fn))
    assert ours <= 1.01 * bytes_of(factors, lambda p, t, x: by_hand(p | t, x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merge_adds_in_the_memory_of_the_update(dtype):
    w, update = jnp.ones((256, 64), dtype), jnp.full((256, 64), 2.0)
    program = _merge._added_in_place.lower(w, update, dtype=jnp.float32, ends=True).compile().memory_analysis()
    assert program.temp_size_in_bytes < 128  # the largest and the smallest value
    assert program.alias_size_in_bytes == update.nbytes
    stored, _ = _merge._sum(w, update, jnp.float32, ours=True, doubtful=True)
    assert update.is_deleted()
    assert not w.is_deleted()
    assert (stored == 3.0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_merge_looks_for_an_overflow_only_where_factors_leave_it_open(dtype):
    params = {"w": jnp.ones((64, 32), dtype), "v": jnp.ones((32, 8), dtype)}
    sites = jlora.sites(lambda p, x: x @ p["w"] @ p["v"], params, jnp.ones((3, 64), dtype))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=4, alpha=8))
    trained = jax.tree.map(lambda x: x + 0.1, lora)
    assert _merge._doubtful(params, trained, None) == set()
    assert _merge._doubtful(params, trained, jnp.float32) == set()
    assert _merge._doubtful(params, trained | {"w": jax.tree.map(lambda x: x * 1e19, trained["w"])}, None) == {"w"}
    assert _merge._doubtful({"w": jnp.ones((64, 32))}, {"w": trained["w"]}, jnp.float16) == {
        "w"
    }  # the base itself may be too large


def test_merge_leaves_its_arguments_as_they_were():
    params = {"w": jnp.ones((6, 4)), "v": jnp.ones((4, 1), jnp.bfloat16)}
    sites = jlora.sites(lambda p, x: x @ p["w"] @ p["v"].astype(jnp.float32), params, jnp.ones((3, 6)))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=1, alpha=1))
    before = jax.tree.map(np.array, (params, lora))
    for report in (False, True):
        jlora.merge(params, lora, report=report, dtype=jnp.float32)
    assert all((x == y).all() for x, y in zip(*map(jax.tree.leaves, ((params, lora), before)), strict=True))


def test_init_of_a_7b_shaped_tree_needs_no_base():
    """Shapes are enough for discovery; the factors are all that is allocated."""
    dim, ff, layers = 4096, 11008, 32

    def llama(params, x):
        def block(x, w):
            q, k, v = x @ w["q"], x @ w["k"], x @ w["v"]
            x = x + (q * k * v) @ w["o"]
            return x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]

        for w in params["layers"]:
            x = block(x, w)
        return x @ params["head"]

    sizes = dict.fromkeys("qkvo", (dim, dim)) | {"gate": (dim, ff), "up": (dim, ff), "down": (ff, dim)}
    layer = {n: jax.ShapeDtypeStruct(s, jnp.bfloat16) for n, s in sizes.items()}
    params = {"layers": [layer] * layers, "head": jax.ShapeDtypeStruct((dim, 32000), jnp.bfloat16)}
    sites = jlora.sites(llama, params, jax.ShapeDtypeStruct((1, 8, dim), jnp.bfloat16))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=8))
    assert len(lora) == 7 * layers
    assert sum(x.size for x in jax.tree.leaves(lora)) == layers * 8 * (4 * 2 * dim + 3 * (dim + ff)) == 19_988_480
    assert {x.dtype for x in jax.tree.leaves(lora)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("shapes", "rank", "count"),
    [
        (
            {f"{i}{n}": (3072, m) for i in range(28) for n, m in (("q", 3072), ("v", 1024))},
            32,
            9_175_040,
        ),  # Llama-3.2-3B
        ({f"{i}{n}": (1024, 1024) for i in range(24) for n in "qv"}, 4, 393_216),  # GPT-2 medium
        ({f"{i}{n}": (768, 768) for i in range(12) for n in "qv"}, 8, 294_912),  # RoBERTa-base
        ({"w": (1024, 1024)}, 8, 16_384),
        ({"w": (4096, 4096)}, 8, 65_536),
    ],
)
def test_counts_of_trained_parameters(shapes, rank, count):
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    sites = jlora.sites(
        lambda p, x: [x[: w.shape[0]] @ w for w in p.values()], params, jax.ShapeDtypeStruct((4096,), jnp.float32)
    )
    lora = jax.eval_shape(
        lambda key: jlora.init(key, params, sites, jlora.LoRA(rank=rank, targets=".*")), jax.random.key(0)
    )
    assert sum(x.size for x in jax.tree.leaves(lora)) == count


# --- convolutional nets ----------------------------------------------------------------------------------------------


def conv_net(params, factors, x):
    """Strided, normalised convolutions with a low-rank branch written by hand where there are factors."""

    def conv(x, w, stride):
        return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    for name, stride in (("0", 1), ("1", 2), ("2", 1), ("3", 2)):
        y = conv(x, params[name], stride)
        if factors is not None:
            y = y + conv(conv(x, factors[name]["a"], stride), 2.0 * factors[name]["b"], 1)
        x = jax.nn.silu((y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + 1e-5))
    return x.mean((1, 2)) @ params["head"]


def stored(fn, *args):
    """Bytes that the forward pass keeps for the backward pass, without what it was given."""
    given = {id(x) for x in jax.tree.leaves(args)}
    kept = jax.tree.leaves(jax.vjp(fn, *args)[1])
    return sum(x.nbytes for x in kept if hasattr(x, "nbytes") and id(x) not in given)


@pytest.mark.parametrize("product", [jnp.matmul, lambda h, w: jnp.einsum("btd,df->btf", h, w)])
def test_products_that_share_activations_share_the_view_of_them(product):
    """A scan stacks what its steps keep for the backward pass: of the activations that q, k and v see, one matrix and not three."""
    layers, dim, rank = 3, 24, 2
    stack = jax.random.normal(jax.random.key(0), (layers, dim, dim)) / dim**0.5
    params, x = dict.fromkeys("qkv", stack), jnp.ones((5, 7, dim))

    def net(layer):
        def block(x, w):
            h = jnp.sin(x)
            return x + layer(h, w, "q") * layer(h, w, "k") + layer(h, w, "v"), None

        return lambda stacked, x: jax.lax.scan(block, x, stacked)[0]

    fn = net(lambda h, w, name: product(h, w[name]))
    by_hand = net(lambda h, w, name: h @ w[name] + (h @ w[f"a {name}"]) @ w[f"b {name}"])
    lora = jlora.init(jax.random.key(0), params, jlora.sites(fn, params, x), jlora.LoRA(rank=rank, alpha=rank))
    lora = jax.tree.map(lambda f: f + 0.1, lora)
    factors = {f"a {name}": f.a for name, f in lora.items()} | {f"b {name}": f.b for name, f in lora.items()}
    ours, hand = lambda lora: jlora.wrap(fn)(params, lora, x), lambda factors: by_hand(params | factors, x)
    np.testing.assert_allclose(ours(lora), hand(factors), rtol=1e-4)
    assert stored(ours, lora) <= 1.05 * stored(hand, factors)


@pytest.mark.usefixtures("standard_promotion")
def test_convolutional_net_stores_no_more_activations_than_by_hand():
    rng, widths = np.random.default_rng(0), [8, 16, 32, 32, 64]
    params = {str(i): jnp.asarray(0.2 * rng.standard_normal((3, 3, *widths[i : i + 2])), jnp.float32) for i in range(4)}
    params["head"] = jnp.ones((64, 10))
    x = jnp.asarray(rng.standard_normal((4, 32, 32, 8)), jnp.float32)

    def base(params, x):
        return conv_net(params, None, x)

    sites = jlora.sites(base, params, x)
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=RANK, alpha=2.0 * RANK))
    assert set(lora) == set("0123")
    lora = jax.tree.map(lambda f: jnp.asarray(0.1 * rng.standard_normal(f.shape), f.dtype), lora)
    factors = {path: {"a": f.a, "b": f.b.reshape(1, 1, *f.b.shape)} for path, f in lora.items()}
    apply = jlora.wrap(base)

    def ours(lora):
        return apply(params, lora, x).sum()

    def hand(factors):
        return conv_net(params, factors, x).sum()

    np.testing.assert_allclose(ours(lora), hand(factors), rtol=1e-4)
    assert temporaries(jax.grad(ours), lora) <= 1.02 * temporaries(jax.grad(hand), factors)
    assert flops(jax.grad(ours), lora) <= 1.01 * flops(jax.grad(hand), factors)
    assert stored(ours, lora) <= 1.01 * stored(hand, factors)
    # The count sees activations: almost none are kept where they are computed again.
    assert stored(jax.checkpoint(ours), lora) < 0.2 * stored(ours, lora)


# --- repeated bodies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
def test_identical_bodies_are_interpreted_once(transform, monkeypatch):
    """A block that is jitted and called for every layer is evaluated for one of them, and what has no adapter is left alone."""
    from jlora import _interpret

    @transform
    def block(w, x):
        return x + jnp.tanh(x @ w["u"]) @ w["v"]

    @jax.jit
    def untouched(x):
        return jnp.sin(x) * 2

    def net(params, x):
        for w in params:
            x = untouched(block(w, x))
        return x

    def steps(depth):
        params = [{"u": jnp.ones((5, 7)), "v": jnp.ones((7, 5))}] * depth
        x, seen = jnp.ones((3, 5)), []
        lora = jlora.init(jax.random.key(0), params, jlora.sites(net, params, x), jlora.LoRA(rank=2))
        step = _interpret.Interpreter.step
        with monkeypatch.context() as patch:
            patch.setattr(
                _interpret.Interpreter,
                "step",
                lambda self, eqn, values: seen.append(eqn.primitive.name) or step(self, eqn, values),
            )
            jax.make_jaxpr(jlora.wrap(net))(params, lora, x)
        return {name: seen.count(name) for name in ("dot_general", "sin")}

    assert steps(9) == steps(3) == {"dot_general": 2, "sin": 0}


# --- handling of the tree ---------------------------------------------------------------------------------------------


def bytecodes(fn):
    """Instructions of Python's that ``fn()`` runs."""
    seen = []

    def trace(frame, event, arg):
        frame.f_trace_opcodes = True
        seen.append(event == "opcode")
        return trace

    sys.settrace(trace)
    try:
        fn()
    finally:
        sys.settrace(None)
    return sum(seen)


def test_a_step_runs_little_python_for_a_node():
    """Each call of a jitted step takes every adapter apart, which is JAX's own code alone, and makes it again, and its moments."""
    n = 50
    params = {f"{i}": jnp.ones((3, 5)) for i in range(n)}
    sites = jlora.sites(lambda p, x: [x @ w for w in p.values()], params, jnp.ones((2, 3)))
    for rule in (jlora.LoRA(rank=2, targets=".*"), jlora.Full(targets=".*")):
        lora = jlora.init(jax.random.key(0), params, sites, rule)
        leaves, structure = jax.tree.flatten(lora)
        again = structure.unflatten(leaves)
        assert all(vars(again[path])[name] is value for path, x in lora.items() for name, value in vars(x).items())
        assert bytecodes(lambda structure=structure, lora=lora: structure.flatten_up_to(lora)) <= n
        assert bytecodes(lambda structure=structure, leaves=leaves: structure.unflatten(leaves)) <= 120 * n
