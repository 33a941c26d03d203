"""What training a Llama needs on one device: full fine-tuning, LoRA, and both with blocks rematerialised.

    python -m benchmarks.memory [--quick] [--out memory.json]

Three parts. Training steps of 1B, 8B and 70B parameters with Adam, as shapes: compiled and never run, split into what the compiler says
they need. A small Llama that is trained, each way in a process of its own: what the system says of it against what the compiler said. And
what the adapter keeps for its backward pass that a frozen base does not, array by array, with jlora and with LoRA written by hand.

The floor is a frozen base and the gradient to its first activations: what is left if adapters and their optimiser cost nothing.
"""

import collections
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

import jlora
from benchmarks import llama_shapes, suite

TITLE = "Memory of a training step on one device: Llama shapes, Adam"

RANK, ALPHA = 16, 32.0
FULL, LORA, FLOOR, HAND = "full fine-tuning", "LoRA", "floor", "LoRA by hand"
REMAT = {False: "", True: ", rematerialised"}
WAYS = [(kind, remat) for kind in (FULL, LORA, FLOOR) for remat in (False, True)]
PARTS = ("base", "trained", "optimiser", "temporaries")
INPUTS = "inputs of adapted kernels"


class Setting(NamedTuple):
    """A model's shape, the dtype of its base, and the tokens of a step."""

    shape: llama_shapes.Shape
    dtype: Any
    batch: int
    length: int


SETTINGS = {name: Setting(llama_shapes.SHAPES[name], jnp.bfloat16, 1, 2048) for name in ("1B", "8B", "70B")}
# 153M parameters: trained here. No two sizes are the same, so that the shape of an array tells what it is.
TRAINED = Setting(llama_shapes.Shape(12, 768, 3072, 12, 4, 64, 32000), jnp.float32, 2, 256)
QUICK_TRAINED = Setting(llama_shapes.Shape(2, 768, 3072, 12, 4, 64, 8000), jnp.float32, 1, 64)
LOOKED_INTO = Setting(llama_shapes.Shape(4, 384, 1536, 6, 2, 64, 512), jnp.float32, 4, 80)

# How many times less LoRA needs than full fine-tuning, blocks rematerialised in both, at least: on jax 0.10.2, whose copies of weights
# are most of what LoRA needs there. Later ones have no such copies, and the factors are larger.
LESS = {"1B": 2.6, "8B": 2.8, "70B": 2.9}


# The training step, in each of the ways


Logits = Callable[[Any, Any, jax.Array], jax.Array]


def base_of(setting: Setting) -> Any:
    """Shapes of the parameters."""
    shapes = llama_shapes.parameters(setting.shape, llama_shapes.Layout(batch=None), mesh(), setting.dtype)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)


def mesh() -> Mesh:
    """Of one device."""
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))


def by_hand(x: jax.Array, layer: Any, name: str) -> jax.Array:
    """The product with a kernel and its factors, as one writes it who knows that thin products are fastest on matrices."""
    y, (a, b) = llama_shapes.dense(x, layer, name), layer["lora"][name]
    update = x.reshape(-1, a.shape[0]) @ a.astype(x.dtype) @ (ALPHA / RANK * b).astype(x.dtype)
    return y + update.reshape(y.shape)


def sides(base: Any) -> dict[str, tuple[int, int, int]]:
    """Layers, inputs and outputs of each kernel that is adapted."""
    found = {}
    for name, equation in llama_shapes.PRODUCTS.items():
        activations, kernel = equation.split("->")[0].split(",")
        layers, *sizes = base["layers"][name].shape
        inputs = [n for axis, n in zip(kernel, sizes, strict=True) if axis in activations]
        found[name] = (layers, math.prod(inputs), math.prod(sizes) // math.prod(inputs))
    return found


def way(kind: str, setting: Setting, remat: bool) -> tuple[Logits, Any, Any]:
    """``logits(trained, base, tokens)``, and shapes of what is trained and of the base beside it."""
    product = by_hand if kind == HAND else llama_shapes.dense
    fn = llama_shapes.model(setting.shape, llama_shapes.Layout(batch=None), mesh(), remat=remat, product=product)
    base = base_of(setting)
    tokens = jax.ShapeDtypeStruct((setting.batch, setting.length), jnp.int32)

    def plain(params: Any, tokens: jax.Array) -> jax.Array:
        return fn(params, params["embed"][tokens])

    if kind == FULL:
        # Weights are kept in fp32 and cast for the step: in bf16 the small steps of Adam would vanish.
        trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), base)
        return lambda t, _, x: plain(jax.tree.map(lambda w: w.astype(setting.dtype), t), x), trained, None
    if kind == LORA:
        sites = jlora.sites(plain, base, tokens)
        rule = jlora.LoRA(rank=RANK, alpha=ALPHA)
        trained = jax.eval_shape(lambda: jlora.init(jax.random.key(0), base, sites, rule))
        apply = jlora.wrap(plain)
        return lambda t, base, x: apply(base, t, x), trained, base
    if kind == HAND:
        trained = {
            name: tuple(jax.ShapeDtypeStruct((n, *shape), jnp.float32) for shape in ((k, RANK), (RANK, m)))
            for name, (n, k, m) in sides(base).items()
        }
        return lambda t, base, x: plain({**base, "layers": {**base["layers"], "lora": t}}, x), trained, base
    first = jax.eval_shape(lambda params, x: params["embed"][x], base, tokens)
    return lambda t, base, x: fn(base, t), first, base


def loss_of(logits: Logits) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """Cross entropy of the next token."""

    def loss(trained: Any, base: Any, tokens: jax.Array) -> jax.Array:
        y = logits(trained, base, tokens[:, :-1]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(y, tokens[:, 1:]).mean()

    return loss


def nbytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compiled(kind: str, setting: Setting, remat: bool) -> tuple[Any, tuple[Any, ...], dict[str, int]]:
    """The step (for the floor, the gradient), shapes of its arguments, and bytes of each part."""
    logits, trained, base = way(kind, setting, remat)
    tokens = jax.ShapeDtypeStruct((setting.batch, setting.length + 1), jnp.int32)
    gradient = jax.value_and_grad(loss_of(logits))
    optimizer = optax.adam(1e-4)
    state = None if kind == FLOOR else jax.eval_shape(optimizer.init, trained)

    def step(trained: Any, state: Any, base: Any, tokens: jax.Array) -> Any:
        value, grads = gradient(trained, base, tokens)
        if kind == FLOOR:
            return grads, state, value
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    args = (trained, state, base, tokens)
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()
    found = program.memory_analysis()
    # The results take the place of the arguments given away, else they come on top.
    temporaries = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    sizes = (nbytes(base), nbytes(trained) * (kind != FLOOR), nbytes(state), temporaries)
    return program, args, dict(zip(PARTS, sizes, strict=True))


# What the system says


CODE = """
import json, sys
from benchmarks import memory
print(json.dumps(memory.trained_here(sys.argv[1] == "True", sys.argv[2], sys.argv[3] == "True")))
"""


def trained_here(quick: bool, kind: str, remat: bool) -> dict[str, int]:
    """Takes two steps in this process; bytes of each part, and by how much resident memory grew from before there were arrays."""
    program, args, parts = compiled(kind, QUICK_TRAINED if quick else TRAINED, remat)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is the compiler's: forget it
    before = resident("VmRSS")
    trained, state, base, tokens = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), args)
    for _ in range(2):
        trained, state, _ = jax.block_until_ready(program(trained, state, base, tokens))
    return parts | {"grown": resident("VmHWM") - before}


def resident(field: str) -> int:
    """Bytes of this process that are in memory: now, ``VmRSS``, or at most so far, ``VmHWM``."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def measured(quick: bool, kind: str, remat: bool) -> dict[str, int]:
    """``trained_here`` in a process of its own."""
    command = [sys.executable, "-c", CODE, str(quick), kind, str(remat)]
    out = subprocess.run(command, cwd=suite.ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out)


# What the backward pass needs


def kept(kind: str, setting: Setting, remat: bool) -> collections.Counter:
    """Shapes of the arrays that the forward pass makes and the backward pass needs, arguments not counted."""
    logits, trained, base = way(kind, setting, remat)
    loss = loss_of(logits)
    tokens = jax.ShapeDtypeStruct((setting.batch, setting.length + 1), jnp.int32)

    def residuals(trained: Any, base: Any, tokens: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(jax.vjp(lambda t: loss(t, base, tokens), trained)[1])

    program = jax.make_jaxpr(residuals)(trained, base, tokens).jaxpr
    given = {id(v) for v in program.invars}
    return collections.Counter((str(v.aval.dtype), v.aval.shape) for v in program.outvars if id(v) not in given)


def what(shape: tuple[int, ...], setting: Setting) -> str:
    """What an array is that an adapter keeps, as its shape tells."""
    tokens = setting.batch * setting.length
    along = tokens in shape or (setting.batch, setting.length) in itertools.pairwise(shape)
    if RANK in shape:
        return "activations of the rank's width" if along else "factors, as they enter products"
    return INPUTS if along else "other"


def more(kind: str, setting: Setting, remat: bool) -> list[dict[str, Any]]:
    """The arrays that a way keeps and the floor does not."""
    extra = kept(kind, setting, remat) - kept(FLOOR, setting, remat)
    return [
        {
            "what": what(shape, setting),
            "shape": list(shape),
            "dtype": dtype,
            "count": count,
            "bytes": count * math.prod(shape) * jnp.dtype(dtype).itemsize,
        }
        for (dtype, shape), count in extra.items()
    ]


# The benchmark


def run(quick: bool) -> dict[str, Any]:
    """Bytes of each part of each way."""
    steps: dict[str, Any] = {}
    for name in ("1B",) if quick else tuple(SETTINGS):
        for kind, remat in [w for w in WAYS if (w[1] and w[0] != FLOOR) or not quick]:
            suite.progress(f"compiling {name}: {kind}{REMAT[remat]}")
            steps.setdefault(name, {})[kind + REMAT[remat]] = compiled(kind, SETTINGS[name], remat)[2]
    inside: dict[str, Any] = {}
    for kind, remat in [(kind, remat) for kind in (FLOOR, HAND, LORA) for remat in (False, True)]:
        suite.progress(f"looking into {kind}{REMAT[remat]}")
        inside[kind + REMAT[remat]] = {
            **compiled(kind, LOOKED_INTO, remat)[2],
            "kept more than the floor": more(kind, LOOKED_INTO, remat),
        }
    trained, missing = {}, {}
    if jax.default_backend() == "cpu" and Path("/proc/self/clear_refs").exists():
        for kind, remat in [(LORA, True)] if quick else [w for w in WAYS if w[0] != FLOOR]:
            suite.progress(f"training: {kind}{REMAT[remat]}")
            trained[kind + REMAT[remat]] = measured(quick, kind, remat)
    else:
        missing["a process's own peak"] = "only Linux tells it from a moment on, and only of arrays on a CPU"
    return {
        "target": jax.default_backend(),
        "rank": RANK,
        "tokens": {name: [SETTINGS[name].batch, SETTINGS[name].length] for name in steps},
        "sides": {name: sides(base_of(SETTINGS[name])) for name in steps},
        "steps": steps,
        "trained here": {"parameters": size_of(QUICK_TRAINED if quick else TRAINED), "ways": trained},
        "looked into": {
            "shape": LOOKED_INTO.shape._asdict(),
            "tokens": [LOOKED_INTO.batch, LOOKED_INTO.length],
            "sides": sides(base_of(LOOKED_INTO)),
            "ways": inside,
        },
        "missing": missing,
    }


def size_of(setting: Setting) -> int:
    """Number of parameters."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(base_of(setting)))


def total(parts: dict[str, int]) -> int:
    return sum(parts[part] for part in PARTS)


def tables(results: dict[str, Any]) -> list[suite.Table]:
    return [steps_table(results), trained_table(results), inside_table(results)]


def steps_table(results: dict[str, Any]) -> suite.Table:
    rows = []
    for name, ways in results["steps"].items():
        for label, parts in ways.items():
            reference = total(ways[FULL + REMAT["remat" in label]])
            cells = [f"{x / 2**30:.2f}" for x in (*(parts[part] for part in PARTS), total(parts))]
            rows.append([f"{name}: {label}", *cells, f"{total(parts) / reference:.2f}"])
    batch, length = next(iter(results["tokens"].values()))
    note = (
        f"GiB, {batch} x {length:,} tokens, bf16 base, rank {results['rank']}; compiled for {results['target']}, never run. Full "
        "fine-tuning keeps weights and moments in fp32, LoRA factors and moments in fp32. Attention is not fused."
    )
    if results["target"] == "cpu":
        note += (
            " The CPU's compiler computes products of bf16 in fp32, for which it copies weights (jax 0.10.2 those of all layers before the "
            "first, jax 0.12 not) and activations: temporaries are larger than a TPU's (benchmarks/pod_memory.py)."
        )
    return suite.Table(TITLE, ["GiB", *PARTS, "sum", "over full"], rows, note)


def trained_table(results: dict[str, Any]) -> suite.Table:
    found = results["trained here"]
    rows = [
        [
            label,
            *(f"{x / 1e6:,.0f}" for x in (*map(parts.get, PARTS), total(parts), parts["grown"])),
            f"{parts['grown'] / total(parts):.2f}",
        ]
        for label, parts in found["ways"].items()
    ]
    title = f"Trained here, each in a process of its own: {found['parameters'] / 1e6:.0f}M parameters, fp32"
    note = "MB. Measured: growth of the process's resident memory at its peak, from before the arrays were made."
    return suite.Table(title, ["MB", *PARTS, "compiler: sum", "measured", "measured / sum"], rows, note)


def inside_table(results: dict[str, Any]) -> suite.Table:
    ways, rows = results["looked into"]["ways"], []
    for label, found in ways.items():
        base = ways[FLOOR + REMAT["remat" in label]]["temporaries"]
        by: collections.Counter = collections.Counter()
        count: collections.Counter = collections.Counter()
        for array in found["kept more than the floor"]:
            by[array["what"]] += array["bytes"]
            count[array["what"]] += array["count"]
        kinds = (INPUTS, "activations of the rank's width", "factors, as they enter products")
        cells = [f"{by[kind] / 2**20:.2f} ({count[kind]})" for kind in kinds]
        rows.append(
            [label, f"{found['temporaries'] / 2**20:.2f}", f"{(found['temporaries'] - base) / 2**20:+.2f}", *cells]
        )
    header = ["MiB (arrays)", "temporaries", "over the floor", "inputs kept", "thin activations", "factors cast"]
    note = (
        "What is kept for the backward pass beyond what the floor keeps. The inputs of adapted kernels are needed for the gradient of A. "
        "The seven kernels of a block have four: q, k and v share one, gate and up share one; kept once each they are "
        f"{once(results['looked into']) / 2**20:.2f} MiB. Rematerialised, a block keeps none of them, only where it began."
    )
    return suite.Table("What an adapter keeps: a small Llama, scanned, fp32", header, rows, note)


def once(found: dict[str, Any]) -> int:
    """Bytes of the inputs of adapted kernels if each is kept once, however many kernels share it."""
    inputs = sum(n * k for n, k, _ in (found["sides"][name] for name in ("q", "o", "gate", "down")))
    return 4 * math.prod(found["tokens"]) * inputs


def claims(results: dict[str, Any]) -> list[suite.Claim]:
    found = []
    for name, ways in results["steps"].items():
        factors = 4 * RANK * sum(n * (k + m) for n, k, m in results["sides"][name].values())
        parts = ways[LORA + REMAT[True]]
        state = parts["trained"] + parts["optimiser"]
        counter = 4  # bytes of Adam's count of steps
        found.append(
            suite.Claim(
                f"{name}: what LoRA trains and its optimiser's state are three times the factors, and nothing else.",
                state == 3 * factors + counter,
                f"{state:,} bytes; factors {factors:,}",
            )
        )
        full, lora = total(ways[FULL + REMAT[True]]), total(parts)
        found.append(
            suite.Claim(
                f"{name}: LoRA needs {LESS[name]:g} times less than full fine-tuning, or better.",
                LESS[name] * lora <= full,
                f"{full / lora:.2f} times less",
            )
        )
    inside = results["looked into"]
    for label in REMAT.values():
        hand, ours = (inside["ways"][kind + label]["temporaries"] for kind in (HAND, LORA))
        found.append(
            suite.Claim(
                f"LoRA{label}: a step has no more temporaries than that of LoRA by hand.",
                ours <= 1.001 * hand,
                f"{ours / hand:.4f} times; {ours - hand:+,} bytes",
            )
        )
    kept = [x for x in inside["ways"][LORA]["kept more than the floor"] if x["what"] == INPUTS]
    found.append(
        suite.Claim(
            "An input that several adapted kernels share is kept once for the backward pass.",
            sum(x["bytes"] for x in kept) == once(inside),
            f"{sum(x['bytes'] for x in kept):,} bytes in {sum(x['count'] for x in kept)} stacks",
        )
    )
    return found


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
