"""Ways to train a Llama on one GPU, each measured in a process of its own: what ``benchmarks.gpu`` starts.

    python -m benchmarks.gpu_ways jobs.json

The model is plain JAX with its blocks scanned and rematerialised; ``project`` makes every linear map but the head, so that LoRA written
into it by hand and the model that jlora adapts are one piece of code. A job is a dict: ``kind``, ``case``, ``way``, ``steps``, ``dtype``,
``name`` (of the files it leaves) and ``profile``. The program is compiled before any weight is made: that is where it is known whether it
fits, and buffers that the compiler tries kernels on are then not part of the peak.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.extend import core

import jlora
from benchmarks import llama_shapes, measure

RANK, ALPHA = 16, 32.0
SCALE = ALPHA / RANK
WARM_UP = 3


class Case(NamedTuple):
    """A model, and the tokens of one step of it."""

    shape: llama_shapes.Shape
    batch: int
    length: int


CASES = {
    "tiny": Case(llama_shapes.SHAPES["tiny"], batch=4, length=64),
    "1B": Case(llama_shapes.SHAPES["1B"], batch=4, length=2048),
    "7B": Case(llama_shapes.Shape(32, 4096, 11008, 32, 32, 128, 32000), batch=4, length=2048),
}
# For the arrays a step creates, counted in its jaxpr: no product of these sizes is a side of any kernel.
COUNTED = {"batch": 3, "length": 37}


def kernels(shape: llama_shapes.Shape) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear map of a block."""
    d, f, h, kv = shape.width, shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {"q": (d, h), "k": (d, kv), "v": (d, kv), "o": (h, d), "gate": (d, f), "up": (d, f), "down": (f, d)}


def base(shape: llama_shapes.Shape, dtype: Any) -> dict[str, Any]:
    """Random weights, each made on the device layer by layer, so that making them takes less memory than a step."""
    keys = iter(jax.random.split(jax.random.key(0), 16))

    @partial(jax.jit, static_argnums=1)
    def fill(key: jax.Array, size: tuple[int, ...]) -> jax.Array:
        if len(size) == 3:
            return lax.map(lambda key: fill(key, size[1:]), jax.random.split(key, size[0]))
        return jax.random.normal(key, size, dtype) * jnp.asarray(size[0] ** -0.5, dtype)

    layers = {name: fill(next(keys), (shape.layers, *size)) for name, size in kernels(shape).items()}
    gains = {name: jnp.ones((shape.layers, shape.width), dtype) for name in ("norm1", "norm2")}
    return {
        "embed": fill(next(keys), (shape.vocab, shape.width)) * jnp.asarray(shape.vocab**0.5, dtype),
        "layers": layers | gains,
        "norm": jnp.ones(shape.width, dtype),
        "head": fill(next(keys), (shape.width, shape.vocab)),
    }


# --- Linear maps: (activations, weights of the block, its factors, names) -> one result for each name -------------------


def plain(x: jax.Array, w: Any, lora: Any, *names: str) -> list[jax.Array]:
    del lora
    return [x @ w[name] for name in names]


def naive(x: jax.Array, w: Any, lora: Any, *names: str) -> list[jax.Array]:
    """As one writes it: the thin products on activations as they come, and the scale on their result."""
    factors = [(lora[name]["a"].astype(x.dtype), lora[name]["b"].astype(x.dtype)) for name in names]
    return [x @ w[name] + SCALE * ((x @ a) @ b) for name, (a, b) in zip(names, factors, strict=True)]


def flat(x: jax.Array, w: Any, lora: Any, *names: str, on_a: bool = False, shared: bool = False) -> list[jax.Array]:
    """The thin products on matrices ``(tokens, width)``, and the scale on the smaller factor.

    Args:
        x: Activations.
        w: The block's weights.
        lora: Their factors.
        *names: Of the weights.
        on_a: The scale is on A, not on B.
        shared: One product of the activations with all A that they meet.
    """
    scales = (SCALE, 1.0) if on_a else (1.0, SCALE)
    a, b = ([(s * lora[name][key]).astype(x.dtype) for name in names] for s, key in zip(scales, "ab", strict=True))
    rows = x.reshape(-1, x.shape[-1])
    if shared:
        thin = jnp.split(rows @ jnp.concatenate(a, axis=1), len(names), axis=1)
    else:
        thin = [rows @ one for one in a]
    updates = [t @ one for t, one in zip(thin, b, strict=True)]
    return [x @ w[name] + y.reshape(*x.shape[:-1], -1) for name, y in zip(names, updates, strict=True)]


def _sum(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    update = jnp.matmul(a.astype(w.dtype), b.astype(w.dtype), preferred_element_type=jnp.float32)
    return (w.astype(jnp.float32) + SCALE * update).astype(w.dtype)


@jax.custom_vjp
def formed(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """``x (W + s A B)`` with the sum formed, forward and again backward; the gradient of ``W`` never is."""
    return x @ _sum(w, a, b)


def _formed_forward(*args: jax.Array) -> tuple[jax.Array, Any]:
    return formed(*args), args


def _formed_backward(kept: Any, g: jax.Array) -> tuple[Any, ...]:
    x, w, a, b = kept
    rows, g_rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    scaled = (SCALE * b).astype(x.dtype)
    da = rows.T @ (g_rows @ scaled.T)
    db = (rows @ a.astype(x.dtype)).T @ g_rows
    return g @ _sum(w, a, b).T, None, da.astype(a.dtype), SCALE * db.astype(b.dtype)


formed.defvjp(_formed_forward, _formed_backward)


def summed_wide(x: jax.Array, w: Any, lora: Any, *names: str) -> list[jax.Array]:
    """As ``flat``, but both products reach the sum in fp32, and only that is rounded: for what rounding takes, not for time."""
    rows, wide = x.reshape(-1, x.shape[-1]), partial(jnp.matmul, preferred_element_type=jnp.float32)
    found = []
    for name in names:
        thin = rows @ lora[name]["a"].astype(x.dtype)
        y = wide(rows, w[name]) + wide(thin, (SCALE * lora[name]["b"]).astype(x.dtype))
        found.append(y.astype(x.dtype).reshape(*x.shape[:-1], -1))
    return found


def merged(x: jax.Array, w: Any, lora: Any, *names: str) -> list[jax.Array]:
    return [formed(x, w[name], lora[name]["a"], lora[name]["b"]) for name in names]


# --- The model --------------------------------------------------------------------------------------------------------


def norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    return (y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype) * gain


def rope(x: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 1e4 ** (-jnp.arange(half) / half)
    cos, sin = (f(angles)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def model(shape: llama_shapes.Shape, project: Callable[..., Any], attend: Callable[..., jax.Array]) -> Any:
    """``fn(params, lora, stream)``: from embedded tokens ``(batch, length, width)`` to logits."""

    # Inside a scan the recomputed values cannot be merged with the first ones, which is what prevent_cse is for.
    @partial(jax.checkpoint, prevent_cse=False)
    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        w, lora = layer
        y = norm(x, w["norm1"])
        q, k, v = (z.reshape(*z.shape[:2], -1, shape.head_dim) for z in project(y, w, lora, "q", "k", "v"))
        with jax.named_scope("attention"):
            mixed = attend(rope(q), rope(k), v)
        (o,) = project(mixed.reshape(*y.shape[:2], -1), w, lora, "o")
        x = x + o
        gate, up = project(norm(x, w["norm2"]), w, lora, "gate", "up")
        (down,) = project(jax.nn.silu(gate) * up, w, lora, "down")
        return x + down, None

    def fn(params: Any, lora: Any, x: jax.Array) -> jax.Array:
        x, _ = lax.scan(block, x, (params["layers"], lora))
        with jax.named_scope("head"):
            return norm(x, params["norm"]) @ params["head"]

    return fn


def attention(case: Case, dtype: Any) -> tuple[Callable[..., jax.Array], str]:
    """cuDNN's flash attention where it compiles, else XLA's; and which, and why."""
    xla, cudnn = (
        partial(jax.nn.dot_product_attention, is_causal=True, implementation=name) for name in ("xla", "cudnn")
    )
    if jax.default_backend() != "gpu":
        return xla, "xla"
    s = case.shape
    q, k = (jax.ShapeDtypeStruct((case.batch, case.length, n, s.head_dim), dtype) for n in (s.heads, s.kv_heads))
    try:
        jax.jit(jax.grad(lambda *x: cudnn(*x).astype(jnp.float32).sum(), (0, 1, 2))).lower(q, k, k).compile()
    except (RuntimeError, ValueError, NotImplementedError) as error:  # no cuDNN; shapes; dtype or device
        return xla, f"xla, for cudnn does not take it: {str(error).splitlines()[0]}"
    return cudnn, "cudnn"


# --- The ways ---------------------------------------------------------------------------------------------------------

JLORA, HAND, NAIVE, FULL, FLOOR = "jlora", "by hand, 2-D", "by hand, 3-D", "full fine-tuning", "floor"
SHARED, FORMED, ON_A = "by hand, A of q,k,v and gate,up in one", "by hand, W + s·A·B formed", "by hand, scale on A"
EAGER, COMPILED = "PEFT + torch, eager", "PEFT + torch, compiled"
PROJECTIONS = {
    HAND: flat,
    NAIVE: naive,
    SHARED: partial(flat, shared=True),
    ON_A: partial(flat, on_a=True),
    FORMED: merged,
}


class Way(NamedTuple):
    """``start(base, tokens)`` makes what is trained; ``logits(trained, base, tokens)`` is differentiated for it."""

    start: Callable[[Any, Any], Any]
    logits: Callable[[Any, Any, jax.Array], jax.Array]
    optimizer: optax.GradientTransformation = optax.adam(1e-4)


def by_layer(lora: Any) -> Any:
    """jlora's tree of adapters, or of their gradients, as the model by hand takes it."""
    return {path.removeprefix("layers/"): {"a": x.a, "b": x.b} for path, x in lora.items()}


def make_way(name: str, shape: llama_shapes.Shape, attend: Callable[..., jax.Array], dtype: Any) -> Way:
    """A way by its name in the tables."""
    fn = model(shape, plain, attend)

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        return fn(params, {}, params["embed"][tokens])

    def adapter(params: Any, tokens: Any) -> Any:
        sites = jlora.sites(forward, params, tokens)
        return jlora.init(jax.random.key(1), params, sites, jlora.LoRA(rank=RANK, alpha=ALPHA, targets="all-linear"))

    if name == JLORA:
        apply = jlora.wrap(forward)
        return Way(adapter, lambda trained, params, tokens: apply(params, trained, tokens))
    if name == FULL:  # fp32 weights and moments, products in bf16
        wide = partial(jax.tree.map, lambda x: x.astype(jnp.float32))
        narrow = partial(jax.tree.map, lambda x: x.astype(dtype))
        return Way(
            lambda params, tokens: wide(params), lambda trained, params, tokens: forward(narrow(trained), tokens)
        )
    if name == FLOOR:  # what is trained are the first activations
        return Way(
            lambda params, tokens: params["embed"][tokens],
            lambda trained, params, tokens: fn(params, {}, trained),
            optax.sgd(1e-6),
        )
    by_hand = model(shape, PROJECTIONS[name], attend)
    return Way(
        lambda params, tokens: by_layer(adapter(params, tokens)),
        lambda trained, params, tokens: by_hand(params, trained, params["embed"][tokens]),
    )


def objective(way: Way) -> Callable[..., jax.Array]:
    """The cross entropy of the next token, in fp32: ``(trained, base, tokens)``."""

    def loss(trained: Any, params: Any, tokens: jax.Array) -> jax.Array:
        logits = way.logits(trained, params, tokens[:, :-1])
        with jax.named_scope("head"):
            return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:]).mean()

    return loss


def step(way: Way) -> Callable[..., Any]:
    """One training step: ``(trained, state, base, tokens) -> (trained, state, loss)``."""

    def one(trained: Any, state: Any, params: Any, tokens: jax.Array) -> Any:
        value, grads = jax.value_and_grad(objective(way))(trained, params, tokens)
        with jax.named_scope("optimiser"):
            updates, state = way.optimizer.update(grads, state, trained)
            return optax.apply_updates(trained, updates), state, value

    return one


# --- Measuring --------------------------------------------------------------------------------------------------------


def arguments(name: str, way: Way, case: Case, dtype: Any) -> tuple[Any, ...]:
    """Shapes of what a step takes."""
    params = jax.eval_shape(lambda: base(case.shape, dtype))
    tokens = jax.ShapeDtypeStruct((case.batch, case.length + 1), jnp.int32)
    first = jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32)
    trained = jax.eval_shape(way.start, params, first)
    return trained, jax.eval_shape(way.optimizer.init, trained), None if name == FULL else params, tokens


def size(tree: Any) -> int:
    """Bytes of a tree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def dot_flops(jaxpr: Any) -> int:
    """Flops of all matrix products of a program, bodies of scans as often as they run; of a kernel of cuDNN nothing is known."""
    total = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "dot_general":
            ((left, _), _), x = eqn.params["dimension_numbers"], eqn.invars[0].aval
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(x.shape[d] for d in left)
        inner = sum(map(dot_flops, core.jaxprs_in_params(eqn.params)))
        total += inner * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return total


def counts(name: str, case: Case, dtype: Any, attend: Callable[..., jax.Array]) -> dict[str, int]:
    """What is known of a step without compiling it."""
    way = make_way(name, case.shape, attend, dtype)
    args = arguments(name, way, case, dtype)
    small = case._replace(**COUNTED)
    xla = partial(jax.nn.dot_product_attention, is_causal=True)  # takes any length; makes nothing of a kernel's shape
    counted = make_way(name, case.shape, xla, dtype)
    trained, _, params, tokens = arguments(name, counted, small, dtype)
    n, sizes = case.shape.layers, [*kernels(case.shape).values(), (case.shape.width, case.shape.vocab)]
    return {
        "trained": 0 if name == FLOOR else sum(math.prod(x.shape) for x in jax.tree.leaves(args[0])),
        "dots": dot_flops(jax.make_jaxpr(step(way))(*args)),
        "created": measure.created(
            jax.grad(objective(counted)), (trained, params, tokens), [*sizes, *((n, *one) for one in sizes)]
        ),
    }


def measure_jax(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Everything about one way in JAX. One that does not fit says so under ``"does not fit"``."""
    case, name, dtype, device = CASES[job["case"]], job["way"], jnp.dtype(job["dtype"]), jax.devices()[0]
    attend, which = attention(case, dtype)
    way = make_way(name, case.shape, attend, dtype)
    args = arguments(name, way, case, dtype)
    found = {"device": device.device_kind, "attention": which, **counts(name, case, dtype, attend)}
    limit = (device.memory_stats() or {}).get("bytes_limit", math.inf)
    if size(args) > limit:
        return found | {"does not fit": f"{size(args) / 2**30:.0f} GiB before any temporary, of {limit / 2**30:.0f}"}
    try:
        start = time.perf_counter()
        compiled = jax.jit(step(way), donate_argnums=(0, 1)).lower(*args).compile()
        found["seconds to compile"] = time.perf_counter() - start
        found |= of_program(compiled)
        needed = found["arguments"] + found["temporaries"] + found["results"] - found["aliases"]
        if needed > limit:
            return found | {"does not fit": f"{needed / 2**30:.0f} GiB, of {limit / 2**30:.0f}"}
        (folder / f"{job['name']}.hlo").write_text(compiled.as_text())
        return found | run_steps(compiled, name, way, case, job, folder)
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        return found | {"does not fit": f"ran out of memory: {str(error).splitlines()[0]}"}


def of_program(compiled: Any) -> dict[str, Any]:
    """XLA's own counts. Flops: the body of a loop counts once, and what is a kernel of a library may not count."""
    memory = compiled.memory_analysis()
    return {
        "flops": (compiled.cost_analysis() or {}).get("flops"),
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "aliases": memory.alias_size_in_bytes,
    }


def run_steps(compiled: Any, name: str, way: Way, case: Case, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Times of steps, each waited for, the peak of memory, and a trace if asked for."""

    def peak() -> int | None:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    tokens = jax.random.randint(jax.random.key(2), (case.batch, case.length + 1), 0, case.shape.vocab)
    params = base(case.shape, jnp.dtype(job["dtype"]))
    trained = way.start(params, tokens[:, :-1])
    state = way.optimizer.init(trained)
    params = None if name == FULL else params
    jax.block_until_ready((trained, state, params))
    before, samples, losses = peak(), [], []

    def advance() -> None:
        nonlocal trained, state
        trained, state, value = compiled(trained, state, params, tokens)
        losses.append(float(jax.block_until_ready((trained, state, value))[2]))

    for _ in range(WARM_UP):
        advance()
    for _ in range(job["steps"]):
        start = time.perf_counter()
        advance()
        samples.append(time.perf_counter() - start)
    found = {"step": samples, "losses": losses, "peak": peak(), "peak before the first step": before}
    if job["profile"]:
        with jax.profiler.trace(str(folder / f"{job['name']}.trace")):
            for _ in range(job["profile"]):
                advance()
    return found


def measure_torch(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same step in PEFT + torch: frozen base in bf16, factors in fp32, products in bf16 by autocast, as Trainer(bf16=True) does."""
    del folder
    import peft
    import torch
    import transformers

    case, device = CASES[job["case"]], job["device"]
    if device == "cuda" and not torch.cuda.is_available():
        return {"failed": "torch sees no GPU"}
    s, dtype = case.shape, getattr(torch, job["dtype"])
    config = transformers.LlamaConfig(
        vocab_size=s.vocab,
        hidden_size=s.width,
        intermediate_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        head_dim=s.head_dim,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    targets = [f"{name}_proj" for name in kernels(s)]
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            base_model = transformers.LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lora = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        net = peft.get_peft_model(base_model, lora).train()
        return _torch_steps(net, base_model, case, job)
    except torch.OutOfMemoryError as error:
        return {"does not fit": f"ran out of memory: {str(error).splitlines()[0]}"}


def _torch_steps(net: Any, base_model: Any, case: Case, job: dict[str, Any]) -> dict[str, Any]:
    import torch

    device = job["device"]
    cuda = device == "cuda"
    trained = [p for p in net.parameters() if p.requires_grad]
    tokens = torch.randint(case.shape.vocab, (case.batch, case.length + 1), device=device)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].reshape(-1)
    adam = torch.optim.Adam(trained, lr=1e-4, fused=cuda)

    def loss(logits: Any) -> Any:
        return torch.nn.functional.cross_entropy(logits.float().reshape(-1, case.shape.vocab), labels)

    if job["way"] == COMPILED:  # block by block, as torch advises for blocks that repeat: compiled once for all
        # Should torch compile one for each block all the same, it is not to fall back to eager after a few.
        torch._dynamo.config.recompile_limit = 4 * case.shape.layers
        for layer in base_model.model.layers:
            layer.compile(backend=job["backend"])
        loss = torch.compile(loss, backend=job["backend"])

    def advance() -> float:
        adam.zero_grad(set_to_none=True)
        with torch.autocast(device, getattr(torch, job["dtype"])):
            value = loss(net(input_ids=inputs).logits)
        value.backward()
        adam.step()
        if cuda:
            torch.cuda.synchronize()
        return float(value.detach())

    losses, samples = [advance() for _ in range(WARM_UP)], []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(job["steps"]):
        start = time.perf_counter()
        losses.append(advance())
        samples.append(time.perf_counter() - start)
    compiled = {}
    if job["way"] == COMPILED:
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        compiled = {"backend": job["backend"], "graphs": graphs}
    return compiled | {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {"torch": torch.__version__},
        "trained": sum(p.numel() for p in trained),
        "dtypes trained": sorted({str(p.dtype) for p in trained}),
        "step": samples,
        "losses": losses,
        "peak": torch.cuda.max_memory_allocated() if cuda else None,
    }


def check(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The largest relative difference of each way's gradients from those of LoRA by hand, in fp32 with a B that is not zero."""
    del folder
    case = CASES[job["case"]]
    attend = partial(jax.nn.dot_product_attention, is_causal=True)
    params = base(case.shape, jnp.float32)
    tokens = jax.random.randint(jax.random.key(2), (case.batch, case.length + 1), 0, case.shape.vocab)
    ways = {name: make_way(name, case.shape, attend, jnp.float32) for name in job["ways"]}
    lora = ways[JLORA].start(params, tokens[:, :-1])
    lora = {
        path: dataclasses.replace(x, b=0.01 * jax.random.normal(jax.random.key(3), x.b.shape))
        for path, x in lora.items()
    }
    found = {}
    for name, way in ways.items():
        grads = jax.jit(jax.grad(objective(way)))(lora if name == JLORA else by_layer(lora), params, tokens)
        found[name] = by_layer(grads) if name == JLORA else grads
    return {name: measure.relative_difference(grads, found[HAND]) for name, grads in found.items()}


def rounding(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What bf16 leaves of an update, factored and formed, for updates of several sizes relative to the weight.

    Against the same bf16 weights and activations multiplied in fp64: the error of the output, and the slope of what the update changed
    in it over what it should have changed: 1 if the update arrives whole, 0 if it is lost in the weight's rounding.
    """
    del folder
    width, tokens = job["width"], job["tokens"]
    keys = jax.random.split(jax.random.key(4), 4)
    w = (jax.random.normal(keys[0], (width, width)) / width**0.5).astype(jnp.bfloat16)
    x = jax.random.normal(keys[1], (tokens, width)).astype(jnp.bfloat16)
    a, b = jax.random.normal(keys[2], (width, RANK)), jax.random.normal(keys[3], (RANK, width))
    wide = [np.asarray(z.astype(jnp.float32), np.float64) for z in (x, w)]
    plain_output = wide[0] @ wide[1]
    found: dict[str, Any] = {}
    for share in (1e-4, 1e-3, 1e-2, 1e-1):
        update = SCALE * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        gain = share * np.linalg.norm(wide[1]) / np.linalg.norm(update)
        lora = {"w": {"a": a, "b": b * gain}}
        wanted = wide[0] @ (gain * update)
        for name, project in (("factored", flat), ("formed", merged), ("factored, summed in fp32", summed_wide)):
            (y,) = jax.jit(lambda x, lora, project=project: project(x, {"w": w}, lora, "w"))(x, lora)
            y = np.asarray(y.astype(jnp.float32), np.float64)
            error = np.linalg.norm(y - plain_output - wanted) / np.linalg.norm(plain_output + wanted)
            slope = np.sum((y - plain_output) * wanted) / np.sum(wanted * wanted)
            found.setdefault(str(share), {})[name] = {"error": float(error), "slope": float(slope)}
    return found


KINDS = {"jax": measure_jax, "torch": measure_torch, "check": check, "rounding": rounding}


def main(path: str) -> None:
    """Does the jobs in a file one after the other; what each found is in the results file as soon as it is known.

    Once the time that the jobs may take is over, those that can be missed are.
    """
    spec = json.loads(Path(path).read_text())
    found: dict[str, Any] = {}
    results = Path(spec["results"])
    begin = time.perf_counter()

    def write() -> None:
        whole = results.with_suffix(".part")
        whole.write_text(json.dumps(found))
        whole.replace(results)  # this process may be ended at any time

    for job in spec["jobs"]:
        start = time.perf_counter()
        if start - begin > spec["seconds"] and not job["required"]:
            found[job["name"]] = {"skipped": f"the {spec['seconds']:.0f} s were spent"}
            continue
        found[job["name"]] = KINDS[job["kind"]](job, Path(spec["folder"]))
        found[job["name"]]["seconds in all"] = time.perf_counter() - start
        if len(spec["jobs"]) > 1:
            found[job["name"]].pop("peak", None)  # it would be that of all jobs so far
        write()
    write()


if __name__ == "__main__":
    main(sys.argv[1])
