"""Adapts an encoder-decoder that captions pictures to things it has never seen, with LoRA in Flax Linen: clothes, then digits.

    python examples/captioning.py            # pretrained the first time, and kept in the cache
    python examples/captioning.py --quick

A captioner (encoder, causal decoder, cross-attention between them) is pretrained once on pictures of two garments from Fashion-MNIST:
"a bag to the left of an ankle boot". Then it gets pictures of two of 3,000 handwritten digits: "a seven above a three". Look at
where the factors are: in cross-attention alone, which reads out of an encoder that knows clothes, or in every layer. ``captions.png``
shows pictures that neither has seen, with the caption before and after.
"""

import argparse
import dataclasses
import functools
import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import fetch
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import training
from matplotlib.figure import Figure

import jlora

BATCH, EVAL_BATCH = 64, 100
PRETRAINING = 1  # raise it when the model, the pictures or the captions change


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the model, and how long it is pretrained."""

    width: int = 96
    heads: int = 4
    layers: int = 2  # of the encoder, and as many of the decoder
    steps: int = 1500


# Language: a noun phrase for each class, three ways to say where two things are

CLOTHES = "a t-shirt", "trousers", "a jumper", "a dress", "a coat", "a sandal", "a shirt", "a shoe", "a bag", "a boot"
DIGITS = "a zero", "a one", "a two", "a three", "a four", "a five", "a six", "a seven", "an eight", "a nine"
PHRASES = (
    ("{0} above {1}", "{1} below {0}", "{0} at the top and {1} at the bottom"),
    ("{0} to the left of {1}", "{1} to the right of {0}", "{0} on the left and {1} on the right"),
)
PAD, START, END = 0, 1, 2
# Digits have words from the beginning, as in any real vocabulary; only nobody has ever used them.
WORDS = " ".join([*CLOTHES, *DIGITS, *PHRASES[0], *PHRASES[1]]).split()
VOCABULARY = ["<pad>", "<start>", "<end>", *sorted({word for word in WORDS if "{" not in word})]
LENGTH = 13  # the longest caption has 11 words, and a start and an end


def to_tokens(caption: str) -> np.ndarray:
    """Maps a caption to tokens, padded to ``LENGTH``."""
    tokens = [START, *(VOCABULARY.index(word) for word in caption.split()), END]
    return np.asarray(tokens + [PAD] * (LENGTH - len(tokens)), np.int32)


def to_text(tokens: np.ndarray) -> str:
    """Maps tokens to a caption, up to its end."""
    words = [VOCABULARY[token] for token in tokens[1:]]
    return " ".join(words[: words.index("<end>")] if "<end>" in words else words)


# The model


class Block(nn.Module):
    """Self-attention, attention to ``memory`` where there is one, feed-forward, each on a normalised copy of the stream."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, memory: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="self")(nn.LayerNorm()(x), mask=mask)
        if memory is not None:
            x = x + nn.MultiHeadDotProductAttention(self.heads, name="cross")(nn.LayerNorm()(x), memory)
        return x + nn.Dense(width, name="down")(nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm()(x))))


class Encoder(nn.Module):
    """Three convolutions that leave 7 x 7 patches, and blocks over them."""

    config: Config

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for i, channels in enumerate((16, 32, self.config.width)):
            x = nn.Conv(channels, (3, 3), strides=2, name=f"conv_{i}")(nn.gelu(x) if i else x)
        x = x.reshape(len(x), -1, x.shape[-1])
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        for i in range(self.config.layers):
            x = Block(self.config.heads, name=f"block_{i}")(x)
        return nn.LayerNorm()(x)


class Decoder(nn.Module):
    """A causal language model that attends to the patches; its head is its embedding, transposed."""

    config: Config

    @nn.compact
    def __call__(self, memory: jax.Array, tokens: jax.Array) -> jax.Array:
        words = nn.Embed(len(VOCABULARY), self.config.width, name="words")
        position = self.param("position", nn.initializers.normal(0.02), (LENGTH, self.config.width))
        x = words(tokens) + position[: tokens.shape[1]]
        for i in range(self.config.layers):
            x = Block(self.config.heads, name=f"block_{i}")(x, nn.make_causal_mask(tokens), memory)
        return words.attend(nn.LayerNorm()(x))


class Captioner(nn.Module):
    """Maps images ``(batch, 56, 56, 1)`` and tokens ``(batch, length)`` to logits of each next token."""

    config: Config

    def setup(self):
        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)

    def __call__(self, images: jax.Array, tokens: jax.Array) -> jax.Array:
        return self.decoder(self.encoder(images), tokens)

    def encode(self, images: jax.Array) -> jax.Array:
        return self.encoder(images)

    def decode(self, memory: jax.Array, tokens: jax.Array) -> jax.Array:
        return self.decoder(memory, tokens)


# Pictures


class Things(NamedTuple):
    """Single things to compose pictures of."""

    images: np.ndarray  # (count, 28, 28), in 0 to 1
    labels: np.ndarray
    names: Sequence[str]  # of the labels


class Pictures(NamedTuple):
    """Pictures of two things, with captions."""

    images: np.ndarray  # (count, 56, 56, 1)
    tokens: np.ndarray  # (count, LENGTH): one caption of each
    captions: list[tuple[str, ...]]  # all that are right


def clothes() -> Things:
    """Reads the 60,000 training images of Fashion-MNIST."""
    folder = fetch.fetch("fashion-mnist")
    images, labels = (
        np.frombuffer(gzip.decompress((folder / f"train-{name}-ubyte.gz").read_bytes()), np.uint8)
        for name in ("images-idx3", "labels-idx1")
    )
    # An IDX file is a header, 4 bytes and 4 more for each axis, and then bytes.
    return Things(images[16:].reshape(-1, 28, 28) / np.float32(255), labels[8:], CLOTHES)


def digits() -> Things:
    """Reads 5,000 images of MNIST, 500 of each digit, in a random order."""
    rows = np.loadtxt(fetch.fetch("mnist") / "mnist_5k.csv.gz", np.float32, delimiter=",")
    rows = np.random.default_rng(0).permutation(rows)
    return Things(rows[:, :-1].reshape(-1, 28, 28) / 255, rows[:, -1].astype(np.uint8), DIGITS)


def part(things: Things, rows) -> Things:
    """Some of the things."""
    return Things(things.images[rows], things.labels[rows], things.names)


def compose(things: Things, pairs: np.ndarray, rng: np.random.Generator) -> Pictures:
    """Puts each pair ``(count, 2)`` of things side by side or one above the other, and captions it in one of three ways."""
    images, tokens, captions = np.zeros((len(pairs), 56, 56, 1), np.float32), [], []
    for image, pair in zip(images, pairs, strict=True):
        beside = int(rng.integers(2))
        for place, thing in enumerate(pair):
            along, across = 28 * place, rng.integers(8, 21)  # the second is off by less than half its size
            y, x = (across, along) if beside else (along, across)
            image[y : y + 28, x : x + 28, 0] = things.images[thing]
        first, second = (things.names[things.labels[thing]] for thing in pair)
        captions.append(tuple(phrase.format(first, second) for phrase in PHRASES[beside]))
        tokens.append(to_tokens(captions[-1][rng.integers(3)]))
    return Pictures(images, np.stack(tokens), captions)


def endless(things: Things, batch: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """New pictures for ever."""
    rng = np.random.default_rng(seed)
    while True:
        pictures = compose(things, rng.integers(len(things.labels), size=(batch, 2)), rng)
        yield pictures.images, pictures.tokens


# Training and testing, the same for every method


def losses(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Cross-entropy of each token after the first, ``(batch, LENGTH - 1)``; 0 where there is padding."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]) * (tokens[:, 1:] != PAD)


def train(label: str, apply, tree, base, batches, steps: int, rate: float, seed: int) -> training.Fit:
    """Trains ``tree`` by AdamW, with a warm-up and a cosine; ``apply(base, tree, images, tokens)`` gives logits."""

    def loss(tree, base, batch, key):
        images, tokens = batch
        return losses(apply(base, tree, images, tokens[:, :-1]), tokens).sum() / (tokens[:, 1:] != PAD).sum()

    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    return training.fit(label, loss, tree, base, batches, steps, optax.adamw(schedule), seed)


@functools.partial(jax.jit, static_argnums=0)
def greedy(model: Captioner, params, images: jax.Array) -> jax.Array:
    """Captions images, always with the likeliest next token; returns tokens ``(batch, LENGTH)``."""
    memory = model.apply(params, images, method="encode")

    def step(i, tokens):
        logits = model.apply(params, memory, tokens, method="decode")  # the causal mask hides what is yet to come
        return tokens.at[:, i + 1].set(jnp.argmax(logits[:, i], axis=-1).astype(tokens.dtype))

    return jax.lax.fori_loop(0, LENGTH - 1, step, jnp.full((len(images), LENGTH), START, jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def measure(model: Captioner, params, images: jax.Array, tokens: jax.Array) -> jax.Array:
    """The loss of each token."""
    return losses(model.apply(params, images, tokens[:, :-1]), tokens)


def test(model: Captioner, params, pictures: Pictures) -> tuple[dict[str, float], list[str]]:
    """Captions pictures; returns the metrics and the captions. One is right if it is any of the right ones, word for word."""
    images, tokens, right = pictures
    written = training.in_batches(functools.partial(greedy, model, params), EVAL_BATCH, images)
    nats = training.in_batches(functools.partial(measure, model, params), EVAL_BATCH, images, tokens)
    captions = [to_text(row) for row in written]
    accuracy = np.mean([caption in among for caption, among in zip(captions, right, strict=True)])
    return {"right captions": accuracy, "perplexity": np.exp(nats.sum() / (tokens[:, 1:] != PAD).sum())}, captions


def load(shown: int, count: int, quick: bool, rng) -> tuple[Things, Pictures, Things, Pictures]:
    """Things to pretrain on, held-out pictures of them, and the same of what to adapt to; nothing is in two of these."""
    new = digits()
    old = part(new, new.labels < 5) if quick else clothes()
    if quick:  # without Debian's package: from five of the digits to the others
        new = part(new, new.labels >= 5)

    def held_out(things: Things) -> Pictures:
        return compose(things, rng.permutation(2 * count).reshape(-1, 2), rng)  # each thing is in one picture

    rest = slice(2 * count, None)
    return part(old, rest), held_out(old), part(part(new, rest), slice(shown)), held_out(new)


def run(args: argparse.Namespace) -> None:
    """Pretrains or loads the base, adapts it in several ways, tests each, and shows the results."""
    config = Config(width=32, layers=1, steps=80) if args.quick else Config()
    shown, count, steps = (400, 100, 40) if args.quick else (3000, 1000, 300)
    model, rng = Captioner(config), np.random.default_rng(args.seed)
    old, known, new, held_out = load(shown, count, args.quick, rng)

    def full(base, params, images, tokens):  # everything is trained, so there is no base
        return model.apply(params, images, tokens)

    def pretrain():
        fresh = jax.jit(model.init)(jax.random.key(args.seed), known.images[:1], known.tokens[:1])
        batches = endless(old, BATCH, args.seed)
        return train("pretraining", full, fresh, None, batches, config.steps, 2e-3, args.seed).tree

    params = fetch.cached("captioner", (PRETRAINING, config, args.seed), pretrain)
    values, _ = test(model, params, known)
    print(
        f"The base, on things it was made for: {values['right captions']:.1%} of {len(known.captions)} captions are right."
    )

    adapted = jlora.wrap(model.apply)
    sites = jlora.sites(model.apply, params, held_out.images[:1], held_out.tokens[:1])
    words = jlora.Full(targets="params/decoder/words/embedding")  # those of the digits have never been used
    cross = jlora.LoRA(rank=8, alpha=16, targets="params/decoder/.*/cross/.*/kernel")
    every = jlora.LoRA(rank=8, alpha=16, targets="all-linear")
    make = functools.partial(jlora.init, jax.random.key(args.seed), params, sites)
    best = "LoRA, every layer"
    methods = {
        best: (adapted, make([words, every]), params, 5e-3),
        "LoRA, cross-attention": (adapted, make([words, cross]), params, 5e-3),
        "words alone": (adapted, make([words]), params, 5e-3),
        "full fine-tuning": (full, params, None, 2e-3),
    }
    if args.quick:  # compiling the others would take longer than all the rest
        methods = {best: methods[best]}
    values, before = test(model, params, held_out)
    rows, trees, after = [training.row("base", values)], {}, {}
    for name, (apply, tree, base, rate) in methods.items():
        fit = train(name, apply, tree, base, endless(new, BATCH, args.seed), steps, rate, args.seed)
        values, after[name] = test(model, fit.tree if base is None else jlora.merge(base, fit.tree), held_out)
        trees[name] = fit.tree
        rows.append(training.row(name, values, fit))

    jlora.save(args.out / "adapter", trees[best], overwrite=True)
    check_merged(model, params, jlora.load(args.out / "adapter", params), held_out)
    draw(args.out / "captions.png", held_out, before, after[best])
    about = f"{training.count(params):,} parameters, pictures of {shown} digits, {len(held_out.captions)} held out"
    training.report(args, "Captions of things never seen", about, rows)
    if not rows[1].values["perplexity"] < 0.5 * rows[0].values["perplexity"]:
        raise RuntimeError("The adapter learnt next to nothing.")


def check_merged(model: Captioner, params, lora, pictures: Pictures) -> None:
    """Raises unless the losses of the model with the updates folded in are those of the adapter beside it."""
    inputs = pictures.images[:EVAL_BATCH], pictures.tokens[:EVAL_BATCH]
    factored = jax.jit(jlora.wrap(functools.partial(measure, model)))(params, lora, *inputs)
    training.check_merged(measure(model, jlora.merge(params, lora), *inputs), factored, "losses")


def draw(path: Path, pictures: Pictures, before: list[str], after: list[str]) -> None:
    """Draws held-out pictures with the captions of the base and of the adapted model."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    for i, axes in enumerate(figure.subplots(2, 4).flat):
        axes.imshow(pictures.images[i, ..., 0], cmap="gray_r")
        axes.set(xticks=[], yticks=[])
        right = after[i] in pictures.captions[i]
        axes.set_title(f"before: {before[i]}", fontsize=7, color="#7f8c8d", loc="left")
        axes.set_xlabel(f"after: {after[i]}", fontsize=7, color="#1e8449" if right else "#c0392b", loc="left")
    figure.suptitle("Held-out pictures, captioned before and after (green: right)", x=0.01, ha="left", weight="bold")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    training.main(run, __doc__, __file__)
