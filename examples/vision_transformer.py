"""Adapts a vision transformer to a new domain from few labelled images, with LoRA: clothes to handwritten digits, in Flax NNX.

    python examples/vision_transformer.py            # pretrained the first time, and kept in the cache
    python examples/vision_transformer.py --quick

A ViT (0.8M parameters) is pretrained once on Fashion-MNIST and kept in the cache. Then it has 400 images of digits to learn from, and
is asked about 4,600 others. Look at the table first: how far a new head on frozen features gets, and how far factors of rank 8 in every
layer, the convolution that cuts the patches among them, with biases, norms and positions trained outright. ``digits.png`` shows what
they do to the features.
"""

import argparse
import dataclasses
import functools
import gzip
from pathlib import Path

import fetch
import jax
import jax.numpy as jnp
import numpy as np
import optax
import training
from flax import nnx
from matplotlib.figure import Figure

import jlora

Data = tuple[np.ndarray, np.ndarray]  # images (count, 28, 28, 1) in 0 to 1, labels (count,)

BATCH, EVAL_BATCH = 64, 500
PRETRAINING = 1  # raise it when the model or its pretraining changes


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the model, and how long it is pretrained."""

    patch: int = 7
    width: int = 128
    heads: int = 4
    layers: int = 4
    steps: int = 2500


# The model


class Attention(nnx.Module):
    """Self-attention over the patches."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.query, self.key, self.value, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = (
            project(x).reshape(*x.shape[:-1], self.heads, -1) for project in (self.query, self.key, self.value)
        )
        return self.out(jax.nn.dot_product_attention(query, key, value).reshape(x.shape))


class Block(nnx.Module):
    """Attention, then feed-forward, each on a normalised copy of the stream."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class ViT(nnx.Module):
    """Square patches, pre-norm blocks, the mean over the patches, a linear head."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width = config.width
        self.patch = nnx.Conv(1, width, (config.patch, config.patch), strides=config.patch, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), ((28 // config.patch) ** 2, width)))
        self.blocks = nnx.List([Block(width, config.heads, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def features(self, images: jax.Array) -> jax.Array:
        """Maps images ``(batch, 28, 28, 1)`` to what the head sees, ``(batch, width)``."""
        x = self.patch(images)
        x = x.reshape(len(x), -1, x.shape[-1]) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(axis=1)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images to logits of ten classes."""
        return self.head(self.features(images))


# Data


def fashion() -> Data:
    """Reads the 60,000 training images of Fashion-MNIST."""
    folder = fetch.fetch("fashion-mnist")
    images, labels = (
        np.frombuffer(gzip.decompress((folder / f"train-{name}-ubyte.gz").read_bytes()), np.uint8)
        for name in ("images-idx3", "labels-idx1")
    )
    # An IDX file is a header, 4 bytes and 4 more for each axis, and then bytes.
    return images[16:].reshape(-1, 28, 28, 1) / np.float32(255), labels[8:].astype(np.int32)


def digits() -> Data:
    """Reads 5,000 images of MNIST, 500 of each digit, in a random order."""
    rows = np.loadtxt(fetch.fetch("mnist") / "mnist_5k.csv.gz", np.float32, delimiter=",")
    rows = np.random.default_rng(0).permutation(rows)
    return rows[:, :-1].reshape(-1, 28, 28, 1) / 255, rows[:, -1].astype(np.int32)


def load(labelled: int, quick: bool) -> tuple[Data, Data, Data]:
    """Loads what to pretrain on, what to adapt to, and what to test on; no image is in two of them."""
    images, labels = digits()
    source = fashion() if not quick else (images[labels < 5], labels[labels < 5])
    if quick:  # without Debian's package: from five of the digits to the others
        images, labels = images[labels >= 5], labels[labels >= 5]
    return source, (images[:labelled], labels[:labelled]), (images[labelled:], labels[labelled:])


# Training, the same for every method


def cross_entropy(apply):
    """The loss of ``apply(base, tree, images)`` on images shifted by up to two pixels."""

    def loss(tree, base, batch, key):
        images, labels = batch
        padded = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
        images = jax.lax.dynamic_slice(padded, (0, *jax.random.randint(key, (2,), 0, 5), 0), images.shape)
        return optax.softmax_cross_entropy_with_integer_labels(apply(base, tree, images), labels).mean()

    return loss


def train(label: str, apply, tree, base, data: Data, steps: int, rate: float, seed: int) -> training.Fit:
    """Trains ``tree`` by AdamW, with a warm-up and a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    batches = (tuple(x[rows] for x in data) for rows in training.shuffled(len(data[0]), BATCH, seed))
    return training.fit(label, cross_entropy(apply), tree, base, batches, steps, optax.adamw(schedule), seed)


def run(args: argparse.Namespace) -> None:
    """Pretrains or loads the base, adapts it in several ways, tests each, and shows the results."""
    config = Config(width=48, layers=1, steps=400) if args.quick else Config()
    labelled, steps = (250, 150) if args.quick else (400, 400)
    source, few, (images, labels) = load(labelled, args.quick)
    fn, fresh = jlora.nnx.split(ViT(config, nnx.Rngs(args.seed)))

    def full(base, params, images):  # everything is trained, so there is no base
        return fn(params, images)

    def pretrain():
        return train("pretraining", full, fresh, None, source, config.steps, 1e-3, args.seed).tree

    params = fetch.cached("vit", (PRETRAINING, config, args.seed), pretrain)
    params = params | {"head": fresh["head"]}  # the pretrained head knows other classes

    adapted = jlora.wrap(fn)
    sites = jlora.sites(fn, params, images[:1])
    head, factors = jlora.Full(targets="head/.*"), jlora.LoRA(rank=8, alpha=16, targets="all-linear")
    small = jlora.Full(targets=".*(bias|scale|position)")  # too thin for factors, and cheap to train outright
    key = jax.random.key(args.seed)
    probe, lora = (jlora.init(key, params, sites, rules) for rules in ([head], [head, small, factors]))
    print(jlora.summary(params, lora).splitlines()[-1])

    methods = {
        "linear probe": (adapted, probe, params, 1e-2),
        "LoRA rank 8": (adapted, lora, params, 5e-3),
        "full fine-tuning": (full, params, None, 1e-3),
        "from scratch": (full, fresh, None, 1e-3),
    }
    if args.quick:
        del methods["from scratch"]
    rows, trees, answers, classify = [], {}, {}, jax.jit(fn)
    for name, (apply, tree, base, rate) in methods.items():
        fit = train(name, apply, tree, base, few, steps, rate, args.seed)
        weights = fit.tree if base is None else jlora.merge(base, fit.tree)
        trees[name], answers[name] = fit.tree, over(classify, weights, images).argmax(axis=-1)
        rows.append(training.row(name, {"accuracy": np.mean(answers[name] == labels)}, fit))

    lora = trees["LoRA rank 8"]
    merged = jlora.merge(params, lora)
    some = images[:EVAL_BATCH]
    training.check_merged(jlora.nnx.merge(fn, merged)(some), jax.jit(adapted)(params, lora, some))
    look = jax.jit(functools.partial(fn, method="features"))
    features = [over(look, weights, images) for weights in (params, merged)]
    draw(args.out / "digits.png", images, labels, features, answers["linear probe"], answers["LoRA rank 8"])
    about = f"ViT ({training.count(params):,} parameters), {labelled} labelled images, {len(labels):,} held out"
    training.report(args, "From some digits to others" if args.quick else "From clothes to digits", about, rows)
    if rows[1].values["accuracy"] < 0.5:
        raise RuntimeError("The adapter learnt next to nothing.")


def over(fn, params, images: np.ndarray) -> np.ndarray:
    """``fn(params, images)``, in batches."""
    return training.in_batches(lambda images: fn(params, images), EVAL_BATCH, images)


def draw(path: Path, images: np.ndarray, labels: np.ndarray, features, probe: np.ndarray, lora: np.ndarray) -> None:
    """Draws the features of the held-out images before and after, and some that only the adapted model reads."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[4, 1.2])
    for cell, x, title in zip((grid[0, 0], grid[0, 1]), features, ("pretrained", "adapted"), strict=True):
        axes = figure.add_subplot(cell)
        x = x - x.mean(axis=0)
        x = x @ np.linalg.svd(x, full_matrices=False)[2][:2].T  # principal components
        axes.scatter(*x.T, c=labels, cmap="tab10", vmin=0, vmax=9, s=4, alpha=0.5, linewidth=0)
        for digit in np.unique(labels):
            box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "boxstyle": "round,pad=0.15"}
            axes.annotate(
                str(digit), x[labels == digit].mean(axis=0), ha="center", va="center", bbox=box, weight="bold"
            )
        axes.set_title(f"Features of held-out digits, {title}", loc="left", weight="bold")
        axes.set(xticks=[], yticks=[])
    mended = np.flatnonzero((probe != labels) & (lora == labels))[:12]
    strip = figure.add_subfigure(grid[1, :])
    strip.suptitle("Read wrongly by the linear probe, rightly with LoRA", x=0.01, ha="left", weight="bold")
    for axes, i in zip(strip.subplots(1, 12), mended, strict=False):
        axes.imshow(images[i, ..., 0], cmap="gray_r")
        axes.set_title(f"{probe[i]} → {lora[i]}")
    for axes in strip.axes:
        axes.set_axis_off()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    training.main(run, __doc__, __file__)
