"""Adapts a mixture of experts from film reviews to Hamlet: a causal language model (1.4M) in plain JAX, no framework.

    python examples/moe.py            # pretrained once on film reviews (kept in the cache), then adapted
    python examples/moe.py --quick    # smaller and shorter

Each layer has 8 experts in one array; a router sends each token to 2 of them. Two rules give the attention rank 16 and each expert
rank 16 / 8, so that an expert layer is adapted with about as many numbers as a dense one would be. The router stays as it is.
Look at the perplexity of the last tenth of Hamlet with and without the experts, and at which experts the text goes to.
"""

import argparse
import bz2
import csv
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import llama
import numpy as np
import optax
import training
from fetch import cached, fetch
from matplotlib.figure import Figure
from tokenizers import ByteLevelBPETokenizer

import jlora

BATCH = 16  # windows
BALANCE = 0.01  # weight of the loss that keeps experts equally busy


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the model, and what it takes to pretrain it."""

    vocab: int = 1024
    width: int = 128
    hidden: int = 128  # of one expert
    heads: int = 4
    layers: int = 4
    experts: int = 8
    active: int = 2  # experts a token
    length: int = 64  # tokens seen
    reviews: int = 14_000  # at most
    pretraining: int = 1500  # steps
    version: int = 1  # to be raised when the code below changes


# The model


def init(config: Config, key: jax.Array) -> dict:
    """Parameters at random. Those of all layers are stacked, and so are those of all experts."""
    c, keys = config, iter(jax.random.split(key, 8))

    def normal(*shape: int, fan_in: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) / math.sqrt(fan_in)

    square, depth = (c.layers, c.width, c.width), math.sqrt(2 * c.layers)
    layers = {
        "attention_norm": jnp.ones((c.layers, c.width)),
        "attention": {
            **{name: normal(*square, fan_in=c.width) for name in ("query", "key", "value")},
            "out": normal(*square, fan_in=c.width) / depth,
        },
        "moe_norm": jnp.ones((c.layers, c.width)),
        "router": normal(c.layers, c.width, c.experts, fan_in=c.width),
        "experts": {
            "up": normal(c.layers, c.experts, c.width, c.hidden, fan_in=c.width),
            "down": normal(c.layers, c.experts, c.hidden, c.width, fan_in=c.hidden) / depth,
        },
    }
    return {
        "embed": 0.02 * jax.random.normal(next(keys), (c.vocab, c.width)),
        "layers": layers,
        "norm": jnp.ones(c.width),
    }


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def attention(w: dict, x: jax.Array, heads: int) -> jax.Array:
    """Causal, with rotary positions."""

    def split(name: str) -> jax.Array:
        return (x @ w[name]).reshape(*x.shape[:-1], heads, -1)  # (batch, length, heads, head_dim)

    turn = functools.partial(llama.rope, positions=jnp.arange(x.shape[1]), theta=10_000.0, pairs=False)
    mixed = jax.nn.dot_product_attention(turn(split("query")), turn(split("key")), split("value"), is_causal=True)
    return mixed.reshape(x.shape) @ w["out"]


def experts(w: dict, x: jax.Array, chosen: jax.Array, gates: jax.Array) -> jax.Array:
    """Sends each row of ``x`` to its experts and adds up what they answer, times the gates.

    Rows are sorted by expert, so that each expert's are a contiguous group, and one ``ragged_dot`` multiplies each group by its weight.

    Args:
        w: ``up`` of shape ``(experts, width, hidden)`` and ``down`` of shape ``(experts, hidden, width)``.
        x: Shape ``(tokens, width)``.
        chosen: Experts of each token, shape ``(tokens, active)``.
        gates: Their weights, of the same shape.
    """
    order = jnp.argsort(chosen.ravel())
    tokens, sizes = order // chosen.shape[1], jnp.bincount(chosen.ravel(), length=len(w["up"]))
    hidden = jax.nn.gelu(jax.lax.ragged_dot(x[tokens], w["up"], sizes))
    answers = jax.lax.ragged_dot(hidden, w["down"], sizes) * gates.ravel()[order][:, None]
    return jnp.zeros_like(x).at[tokens].add(answers)


def mixture(layer: dict, x: jax.Array, active: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The experts' answer, and of each expert the share of tokens sent to it and its mean probability."""
    rows = x.reshape(-1, x.shape[-1])
    probabilities = jax.nn.softmax(rows @ layer["router"])
    gates, chosen = jax.lax.top_k(probabilities, active)
    answer = experts(layer["experts"], rows, chosen, gates / gates.sum(axis=-1, keepdims=True))
    sent = jax.nn.one_hot(chosen, probabilities.shape[-1]).mean(axis=(0, 1))
    return answer.reshape(x.shape), (sent, probabilities.mean(axis=0))


def forward(params: dict, tokens: jax.Array, config: Config) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Logits ``(batch, length, vocab)``, and of each layer what ``mixture`` says of the experts, shapes ``(layers, experts)``."""

    def block(x: jax.Array, layer: dict):
        x = x + attention(layer["attention"], rms_norm(x, layer["attention_norm"]), config.heads)
        answer, routed = mixture(layer, rms_norm(x, layer["moe_norm"]), config.active)
        return x + answer, routed

    x, routed = jax.lax.scan(block, params["embed"][tokens], params["layers"])
    return rms_norm(x, params["norm"]) @ params["embed"].T, routed


def loss_of(logits: jax.Array, routed: tuple[jax.Array, jax.Array], windows: jax.Array) -> jax.Array:
    """Cross-entropy of the next token, and a little for experts that are busier than others (arXiv:2101.03961, section 2.2)."""
    sent, probability = routed
    balance = sent.shape[-1] * (sent * probability).sum(axis=-1).mean()
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean() + BALANCE * balance


# Its texts


def read_texts(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Film reviews and Hamlet as tokens of a vocabulary that was made for the reviews."""
    with bz2.open(fetch("reviews") / "rotten_tomatoes_corpus_full.csv.bz2", "rt", encoding="utf-8") as file:
        reviews = [row["text"] + "\n" for row in csv.DictReader(file)][: config.reviews]
    hamlet = (fetch("hamlet") / "hamlet.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(reviews, vocab_size=config.vocab, show_progress=False)
    return tuple(np.concatenate([e.ids for e in tokenizer.encode_batch(text)]) for text in (reviews, hamlet))


def windows_of(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows of ``length + 1`` tokens to train on, and those of the last tenth."""
    windows = tokens[: len(tokens) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    return np.split(windows, [len(windows) * 9 // 10])


# The task


def fit(args, label: str, loss: Callable, tree: dict, base: dict | None, windows: np.ndarray, steps: int, rate: float):
    """Trains ``tree`` by ``loss(tree, base, windows)``, with Adam, a warm-up, and a cosine to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0, rate, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    batches = (windows[i] for i in training.shuffled(len(windows), BATCH, args.seed))
    return training.fit(label, lambda tree, base, x, _: loss(tree, base, x), tree, base, batches, steps, optimizer)


def rules(experts: int) -> dict[str, list[jlora.LoRA]]:
    """Two adapters of the same size: rank 16 in the attention and 16 shared out among the experts, or 24 in the attention alone."""
    return {
        "LoRA on attention and experts": [
            jlora.LoRA(rank=16, alpha=32, targets="layers/attention/.*"),
            jlora.LoRA(rank=16 // experts, alpha=32 / experts, targets="layers/experts/.*"),
        ],
        "LoRA on attention": [jlora.LoRA(rank=24, alpha=48, targets="layers/attention/.*")],
    }


def evaluate(model: Callable, params: dict, windows: np.ndarray) -> tuple[float, np.ndarray]:
    """Perplexity after the first token of each window, and the share of choices that each expert has, ``(layers, experts)``."""
    logits, (sent, _) = jax.jit(model)(params, windows[:, :-1])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()
    return float(jnp.exp(loss)), np.asarray(sent)


def draw(path: Path, fits: dict[str, training.Fit], sent: dict[str, np.ndarray]) -> None:
    """Learning curves, and where tokens go."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, *maps = figure.subplots(1, 1 + len(sent), width_ratios=[2] + [1] * len(sent))
    for label, f in fits.items():
        width = max(1, len(f.losses) // 10)
        mean = np.convolve(f.losses, np.ones(width) / width, "valid")
        left.plot(np.arange(width, len(f.losses) + 1), mean, label=label)
    left.set(xlabel="step", ylabel="training loss, running mean")
    figure.legend(loc="outside lower left", ncols=len(fits), frameon=False)
    for axes, (label, share) in zip(maps, sent.items(), strict=True):
        image = axes.imshow(share.T, vmin=0, vmax=max(x.max() for x in sent.values()))
        axes.set(xlabel="layer", xticks=range(len(share)))
        axes.set_title(label, fontsize=9)
    maps[0].set_ylabel("expert")
    figure.colorbar(image, ax=maps, label="share of choices")
    figure.savefig(path, dpi=150)


def run(args: argparse.Namespace) -> None:
    small = Config(vocab=512, width=64, hidden=64, layers=2, reviews=1_000, pretraining=100)
    config, steps = (small, 60) if args.quick else (Config(), 200)
    model = functools.partial(forward, config=config)
    (read, read_held_out), (play, held_out) = (windows_of(tokens, config.length) for tokens in read_texts(config))
    read_held_out = read_held_out[: len(held_out)]

    def full_loss(params, _, windows):
        return loss_of(*model(params, windows[:, :-1]), windows)

    def lora_loss(lora, base, windows):
        return loss_of(*apply(base, lora, windows[:, :-1]), windows)

    def pretrain() -> dict:
        start = init(config, jax.random.key(0))
        return fit(args, "pretraining", full_loss, start, None, read, config.pretraining, 3e-3).tree

    base = jax.tree.map(jnp.asarray, pretrain() if args.quick else cached("moe", config, pretrain))
    apply, sites = jlora.wrap(model), jlora.sites(model, base, play[:1, :-1])
    fits, tuned = {}, {"base": base}
    for label, rule in rules(config.experts).items():
        lora = jlora.init(jax.random.key(args.seed), base, sites, rule)
        fits[label] = fit(args, label, lora_loss, lora, base, play, steps, 1e-2)
        tuned[label] = jlora.merge(base, fits[label].tree)
    fits["full fine-tuning"] = fit(args, "full fine-tuning", full_loss, base, None, play, steps, 1e-3)
    tuned["full fine-tuning"] = fits["full fine-tuning"].tree

    rows, sent = [], {"reviews\nbase": evaluate(model, base, read_held_out)[1]}
    for label, params in tuned.items():
        perplexity, sent[f"Hamlet\n{label.replace(' on ', chr(10))}"] = evaluate(model, params, held_out)
        values = {"Hamlet perplexity": perplexity, "reviews perplexity": evaluate(model, params, read_held_out)[0]}
        rows.append(training.row(label, values, fits.get(label)))
    # Not logit by logit: where two experts are as good, rounding may send a token to the other one.
    factored, _ = evaluate(functools.partial(apply, base), fits[rows[1].method].tree, held_out)
    if not np.isclose(factored, merged := rows[1].values["Hamlet perplexity"], rtol=1e-4):
        raise RuntimeError(f"The perplexity is {factored} with the adapter, and {merged} when it is merged.")
    draw(args.out / "moe.png", fits, sent)
    about = f"{config.layers} layers of {config.experts} experts, from film reviews to Hamlet"
    training.report(args, "Mixture of experts", about, rows, lower_is_better=True)
    if not rows[1].values["Hamlet perplexity"] < rows[0].values["Hamlet perplexity"]:
        raise RuntimeError("The adapter learned nothing of Hamlet.")


if __name__ == "__main__":
    training.main(run, __doc__, __file__)
