"""Sentiment of film reviews: all-MiniLM-L6-v2 (a BERT of 22.6M) with a linear head, frozen, with LoRA and fully fine-tuned.

    python examples/text_classification.py            # three seeds
    python examples/text_classification.py --quick    # one seed and few steps

The reviews are single sentences from Rotten Tomatoes, fresh or rotten. They are split by film: reviews of one film share its names and
its plot and mostly agree, so that a classifier could recognise the film instead of reading the review. A fifth of the films is held
out, the same for every seed; a seed draws the reviews trained on, their order and the adapter, and the spread is over seeds. LoRA (with
biases and norms) and full fine-tuning go on from the head of the linear probe, on the same batches, each at the best of the learning rates
tried on a fifth of the other films. Look at the accuracy on films never seen, against the number of parameters that were trained for it.
"""

import argparse
import bz2
import csv
import dataclasses
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import training
from fetch import fetch
from matplotlib.figure import Figure
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import jlora

LABELS = ("rotten", "fresh")
PAD = 0  # [PAD] in the vocabulary
RANK = 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is trained, on what."""

    seeds: int
    steps: int
    batch: int
    length: int  # tokens a review, longer ones are cut: one in five at 40
    every: int  # review of those held out is evaluated on


FULL = Plan(seeds=3, steps=125, batch=32, length=40, every=1)
QUICK = Plan(seeds=1, steps=20, batch=8, length=24, every=16)


HEAD = jlora.Full(targets=".*/head/.*")
# Biases and norms, a tenth of what LoRA trains: too thin for factors, and cheap to train outright (arXiv:2106.10199).
SMALL = jlora.Full(targets=".*/(bias|scale)")
LORA = jlora.LoRA(rank=RANK, alpha=2 * RANK, targets="all-linear")
# What is trained by each method: what the rules say, or everything if there are none; and the learning rate.
PROBE, ADAPTER, FINE_TUNED = "linear probe", f"LoRA rank {RANK}", "full fine-tuning"
METHODS = {PROBE: ((HEAD,), 1e-2), ADAPTER: ((HEAD, SMALL, LORA), 2e-3), FINE_TUNED: ((), 2e-4)}


# The model


def norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-12, name=name)


class Block(nn.Module):
    """A Transformer block as in BERT: normalised after each sum, not before."""

    heads: int = 12

    @nn.compact
    def __call__(self, x, mask):
        width = x.shape[-1]

        def project(name):
            return nn.Dense(width, name=name)(x).reshape(*x.shape[:-1], self.heads, -1)

        mixed = jax.nn.dot_product_attention(project("query"), project("key"), project("value"), mask=mask)
        x = norm("attention_norm")(x + nn.Dense(width, name="out")(mixed.reshape(x.shape)))
        hidden = nn.gelu(nn.Dense(4 * width, name="up")(x), approximate=False)
        return norm("mlp_norm")(x + nn.Dense(width, name="down")(hidden)), None


class Encoder(nn.Module):
    """Maps tokens ``(batch, length)`` to the mean of their last states ``(batch, width)``, padding left out."""

    layers: int = 6
    width: int = 384
    vocab: int = 30522
    positions: int = 512

    @nn.compact
    def __call__(self, tokens):
        real = tokens != PAD
        x = nn.Embed(self.vocab, self.width, name="word")(tokens)
        x += nn.Embed(self.positions, self.width, name="position")(jnp.arange(tokens.shape[1]))
        x += nn.Embed(2, self.width, name="segment")(jnp.zeros_like(tokens))
        # Scanned, so that one block is compiled and not six: kernels are (layers, in, out), and each layer gets factors of its own.
        stack = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=self.layers
        )
        x, _ = stack(name="blocks")(norm("norm")(x), real[:, None, None])
        return x.mean(axis=1, where=real[..., None])


class Classifier(nn.Module):
    """An encoder and a linear head: logits of the labels."""

    def setup(self):
        self.encoder, self.head = Encoder(), nn.Dense(len(LABELS))

    def __call__(self, tokens):
        return self.head(self.encoder(tokens))


def load(path: Path) -> dict:
    """Lays the weights of MiniLM out as Linen names them, and adds a head of zeros."""
    stored = load_file(path)

    def dense(name):  # stored as (out, in); Dense has (in, out)
        return {"kernel": stored[f"{name}.weight"].T, "bias": stored[f"{name}.bias"]}

    def scale(name):
        return {"scale": stored[f"{name}.weight"], "bias": stored[f"{name}.bias"]}

    def block(name):
        return {
            **{part: dense(f"{name}.attention.self.{part}") for part in ("query", "key", "value")},
            "out": dense(f"{name}.attention.output.dense"),
            "attention_norm": scale(f"{name}.attention.output.LayerNorm"),
            "up": dense(f"{name}.intermediate.dense"),
            "down": dense(f"{name}.output.dense"),
            "mlp_norm": scale(f"{name}.output.LayerNorm"),
        }

    embeddings = {"word": "word", "position": "position", "segment": "token_type"}
    encoder = {ours: {"embedding": stored[f"embeddings.{its}_embeddings.weight"]} for ours, its in embeddings.items()}
    encoder["norm"] = scale("embeddings.LayerNorm")
    blocks = [block(f"encoder.layer.{i}") for i in range(Encoder.layers)]
    encoder["blocks"] = jax.tree.map(lambda *layers: np.stack(layers), *blocks)
    head = {"kernel": np.zeros((Encoder.width, len(LABELS)), np.float32), "bias": np.zeros(len(LABELS), np.float32)}
    return jax.tree.map(jnp.asarray, {"params": {"encoder": encoder, "head": head}})


def check_port(params: dict, tokenizer: Tokenizer) -> None:
    """Compares cosines to those that the documentation of sentence-transformers prints for this model."""
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    expected = np.asarray([0.6660, 0.1046, 0.1411])
    with jax.default_matmul_precision("highest"):  # some accelerators round fp32 operands otherwise
        embed = jax.jit(lambda params, tokens: Encoder().apply({"params": params["params"]["encoder"]}, tokens))
        vectors = np.asarray(embed(params, tokens_of(tokenizer, texts)))
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    error = np.abs((vectors @ vectors.T)[np.triu_indices(3, 1)] - expected).max()
    if not error <= 1e-4:  # so that NaN fails too
        raise RuntimeError(f"Cosines of MiniLM's embeddings differ from the published ones by {error:.1e}.")


# The reviews


class Reviews(NamedTuple):
    """Tokens ``(count, length)`` and labels ``(count,)``."""

    tokens: np.ndarray
    labels: np.ndarray

    def take(self, rows) -> "Reviews":
        return Reviews(self.tokens[rows], self.labels[rows])


def tokens_of(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    return np.asarray([encoding.ids for encoding in tokenizer.encode_batch(texts)], np.int32)


def read_reviews(tokenizer: Tokenizer) -> tuple[Reviews, Reviews]:
    """Reviews to train on and reviews held out, of different films."""
    by_text: dict[str, dict[str, str]] = {}
    with bz2.open(fetch("reviews") / "rotten_tomatoes_corpus_full.csv.bz2", "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["category"] in LABELS:
                by_text.setdefault(row["text"].strip(), row)  # some are there twice, also under two names of a film
    films = np.asarray([row["movie_name"] for row in by_text.values()])
    labels = np.asarray([LABELS.index(row["category"]) for row in by_text.values()], np.int32)
    reviews = Reviews(tokens_of(tokenizer, list(by_text)), labels)
    shuffled = np.random.default_rng(0).permutation(np.unique(films))  # the same films for every seed
    held_out = np.isin(films, shuffled[: len(shuffled) // 5])
    return reviews.take(~held_out), reviews.take(held_out)


# Training and measuring


MODEL = Classifier()
logits_of = jax.jit(MODEL.apply)


def train(method: str, plan: Plan, params: dict, reviews: Reviews, seed: int) -> tuple[training.Fit, dict]:
    """Trains by one method; returns the fit and the parameters it leads to."""
    rules, rate = METHODS[method]
    apply = jlora.wrap(MODEL.apply)
    if rules:
        sites = jlora.sites(MODEL.apply, params, reviews.tokens[:1])
        tree, base = jlora.init(jax.random.key(seed), params, sites, rules), params
    else:
        tree, base = params, None

    def loss(tree, base, batch, key):
        logits = apply(base, tree, batch.tokens) if rules else MODEL.apply(tree, batch.tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    batches = (reviews.take(rows) for rows in training.shuffled(len(reviews.labels), plan.batch, seed))
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, plan.steps // 10, plan.steps))
    fit = training.fit(method, loss, tree, base, batches, plan.steps, optimizer, seed)
    return fit, merge(apply, params, fit.tree, reviews.tokens[: plan.batch]) if rules else fit.tree


def merge(apply, params: dict, lora: dict, tokens: np.ndarray) -> dict:
    """Folds an adapter into the base, and checks that the logits are the same."""
    merged = jlora.merge(params, lora)
    training.check_merged(logits_of(merged, tokens), jax.jit(apply)(params, lora, tokens))
    return merged


def accuracy(params: dict, reviews: Reviews) -> float:
    """Share of the reviews that get their own label."""
    logits = training.in_batches(lambda tokens: logits_of(params, tokens), 32, reviews.tokens)
    return float((logits.argmax(axis=1) == reviews.labels).mean())


# The run


def plot(path: Path, trained: dict[str, int], scores: dict[str, list[float]], majority: float) -> None:
    """Draws accuracy against the number of parameters trained: each seed, and the mean with its standard error."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    grey = "#7f8c8d"
    for (name, values), color in zip(scores.items(), ("#2c3e50", "#1f4e79", "#c0392b"), strict=True):
        x, mean = trained[name], np.mean(values)
        axes.plot([x] * len(values), values, "o", color=color, alpha=0.35, markersize=6, markeredgewidth=0)
        axes.errorbar(x, mean, standard_error(values), fmt="_", color=color, markersize=26, capsize=7, linewidth=2)
        text = axes.annotate(f"{name}\n{mean:.3f}", (x, max(values)), xytext=(0, 10), textcoords="offset points")
        text.set(color=color, ha="center", weight="bold")
    axes.axhline(majority, color=grey, linestyle="--", linewidth=1.2)
    axes.annotate("always the more frequent label", (180, majority - 0.002), color=grey, va="top")
    axes.set(xscale="log", xlim=(150, 2e8), ylim=(majority - 0.02, max(map(max, scores.values())) + 0.05))
    axes.set(xlabel="parameters trained (log)", ylabel="accuracy on films held out")
    axes.set_title("Sentiment of film reviews", loc="left", weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    figure.savefig(path, dpi=150)


def standard_error(values: list[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def run(args: argparse.Namespace) -> None:
    plan = QUICK if args.quick else FULL
    with training.console.status("Loading the model and the reviews"):
        folder = fetch("minilm")
        params, tokenizer = load(folder / "model.safetensors"), Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.enable_truncation(plan.length)
        tokenizer.enable_padding(length=plan.length, pad_id=PAD)
        check_port(params, tokenizer)
        reviews, held_out = read_reviews(tokenizer)
        held_out = held_out.take(slice(None, None, plan.every))
    fits, scores = {method: [] for method in METHODS}, {method: [] for method in METHODS}
    for seed in range(args.seed, args.seed + plan.seeds):
        start = params
        for method in METHODS:
            fit, tuned = train(method, plan, start, reviews, seed)
            fits[method].append(dataclasses.replace(fit, tree=None))  # only its cost is asked for, and trees are large
            scores[method].append(accuracy(tuned, held_out))
            if method == PROBE:
                # The others go on from this head, since an untrained one would first spoil what the encoder knows
                # (Kumar et al., 2022, arXiv:2202.10054).
                start = tuned
    majority = float(np.mean(held_out.labels == np.bincount(reviews.labels).argmax()))
    last = np.mean([fit.losses[-10:].mean() for fit in fits[ADAPTER]])
    if not last < np.log(len(LABELS)):
        raise RuntimeError(f"LoRA learnt nothing: its last losses are {last:.3f} on average, no better than a coin.")
    rows = [training.row("more frequent label", {"accuracy": majority})]
    for method in METHODS:
        cost = dataclasses.replace(fits[method][0], seconds=float(np.mean([fit.seconds for fit in fits[method]])))
        spread = {"accuracy": standard_error(scores[method])} if plan.seeds > 1 else None
        rows.append(training.row(method, {"accuracy": np.mean(scores[method])}, cost, spread))
    plot(args.out / "accuracy.png", {method: fits[method][0].trained for method in METHODS}, scores, majority)
    about = f"MiniLM (BERT, 22.6M) on {len(held_out.labels):,} reviews of films held out"
    training.report(args, "Sentiment of film reviews", about, rows)


if __name__ == "__main__":
    training.main(run, __doc__, __file__)
