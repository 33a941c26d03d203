"""Teaches an image generator a kind of thing it has never seen, from 64 pictures, with LoRA on its convolutions, in Equinox.

    python examples/diffusion.py            # pretrained the first time, and kept in the cache
    python examples/diffusion.py --quick

A U-Net is pretrained once by flow matching on Fashion-MNIST without its bags, and kept in the cache. Then it is shown 64 bags. Look at
``samples.png``: every column is one noise, carried by the base, by the adapter at half and at full strength, and by full fine-tuning. The
table says how far samples are from real bags (a Fréchet distance, in the features of a classifier that knows them), how many of them it
takes for bags, and the loss on bags held out, which would rise if the 64 were only learnt by heart.
"""

import argparse
import dataclasses
import functools
import gzip
import operator
from pathlib import Path

import equinox as eqx
import fetch
import jax
import jax.numpy as jnp
import numpy as np
import optax
import training
from matplotlib.figure import Figure

import jlora

PRETRAINING = 1  # raise it when the models or their pretraining change
CLASSES = 10
COLUMNS = 12
EVAL_BATCH = 100
BY_LORA, HALF, FULL = "LoRA rank 8", "half of LoRA", "full fine-tuning"
Data = tuple[np.ndarray, np.ndarray]  # images (count, 1, 28, 28) in -1 to 1, labels (count,)


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the model, and how long it is trained."""

    new: int = 8  # the class held out: bags
    shots: int = 64
    width: int = 32
    pretraining_steps: int = 800
    pretraining_batch: int = 128
    judge_steps: int = 600
    steps: int = 250
    rate: float = 3e-3
    batch: int = 64
    samples: int = 500
    sampler_steps: int = 16


QUICK = Config(
    new=0,
    width=16,
    pretraining_steps=200,
    pretraining_batch=32,
    judge_steps=100,
    steps=80,
    batch=32,
    samples=200,
    sampler_steps=10,
)


# The model: one image and one time in, the velocity out


class ResBlock(eqx.Module):
    """Two convolutions on a residual branch; time scales and shifts between them."""

    norm1: eqx.nn.GroupNorm
    norm2: eqx.nn.GroupNorm
    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    time: eqx.nn.Linear
    skip: eqx.nn.Conv2d | eqx.nn.Identity

    def __init__(self, inputs: int, outputs: int, time: int, key: jax.Array):
        keys = jax.random.split(key, 4)
        self.norm1, self.norm2 = eqx.nn.GroupNorm(8, inputs), eqx.nn.GroupNorm(8, outputs)
        self.conv1 = eqx.nn.Conv2d(inputs, outputs, 3, padding=1, key=keys[0])
        self.conv2 = eqx.nn.Conv2d(outputs, outputs, 3, padding=1, key=keys[1])
        self.time = eqx.nn.Linear(time, 2 * outputs, key=keys[2])
        self.skip = eqx.nn.Identity() if inputs == outputs else eqx.nn.Conv2d(inputs, outputs, 1, key=keys[3])

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        scale, shift = jnp.split(self.time(time)[:, None, None], 2)
        h = self.conv2(jax.nn.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class Attention(eqx.Module):
    """Self-attention over the pixels of a feature map."""

    norm: eqx.nn.GroupNorm
    mix: eqx.nn.MultiheadAttention

    def __init__(self, width: int, key: jax.Array):
        self.norm, self.mix = eqx.nn.GroupNorm(8, width), eqx.nn.MultiheadAttention(4, width, key=key)

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = self.norm(x).reshape(len(x), -1).T  # (pixels, channels)
        return x + self.mix(tokens, tokens, tokens).T.reshape(x.shape)


class UNet(eqx.Module):
    """From 28 pixels a side to 14 and 7, where it attends, and back with a skip connection."""

    stem: eqx.nn.Conv2d
    time: eqx.nn.MLP
    before: ResBlock
    down: eqx.nn.Conv2d
    middle1: ResBlock
    attention: Attention
    middle2: ResBlock
    up: eqx.nn.ConvTranspose2d
    after: ResBlock
    norm: eqx.nn.GroupNorm
    head: eqx.nn.ConvTranspose2d

    def __init__(self, width: int, key: jax.Array):
        keys, time = jax.random.split(key, 9), 2 * width
        self.stem = eqx.nn.Conv2d(1, width, 4, stride=2, padding=1, key=keys[0])
        self.time = eqx.nn.MLP(32, time, time, 1, jax.nn.silu, jax.nn.silu, key=keys[1])
        self.before = ResBlock(width, width, time, keys[2])
        self.down = eqx.nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, key=keys[3])
        self.middle1 = ResBlock(2 * width, 2 * width, time, keys[4])
        self.attention = Attention(2 * width, keys[5])
        self.middle2 = ResBlock(2 * width, 2 * width, time, keys[6])
        self.up = eqx.nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, key=keys[7])
        self.after = ResBlock(2 * width, width, time, keys[8])
        self.norm = eqx.nn.GroupNorm(8, width)
        self.head = eqx.nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1, key=keys[0])

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """Maps an image ``(1, 28, 28)`` at time ``t`` in 0 to 1 to its velocity."""
        angles = t * jnp.geomspace(1.0, 1000.0, 16)
        time = self.time(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)]))
        high = self.before(self.stem(x), time)  # (width, 14, 14)
        low = self.middle1(self.down(high), time)  # (2 * width, 7, 7)
        low = self.middle2(self.attention(low), time)
        x = self.after(jnp.concatenate([high, self.up(low)]), time)
        return self.head(jax.nn.silu(self.norm(x)))


class Classifier(eqx.Module):
    """A judge of samples: knows all classes, and describes an image by 32 features."""

    convs: list[eqx.nn.Conv2d]
    hidden: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys, widths = jax.random.split(key, 4), (1, 16, 32)
        self.convs = [eqx.nn.Conv2d(*widths[i : i + 2], 4, stride=2, padding=1, key=keys[i]) for i in range(2)]
        self.hidden = eqx.nn.Linear(32 * 7 * 7, 32, key=keys[2])
        self.head = eqx.nn.Linear(32, CLASSES, key=keys[3])

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps an image ``(1, 28, 28)`` to logits of the classes and its features."""
        for conv in self.convs:
            x = jax.nn.silu(conv(x))
        features = self.hidden(x.reshape(-1))
        return self.head(jax.nn.silu(features)), features


def split(model: eqx.Module):
    """An Equinox module as a function of its arrays, ``fn(params, *batch)``, and these arrays."""
    params, static = eqx.partition(model, eqx.is_array)
    return lambda params, *batch: jax.vmap(eqx.combine(params, static))(*batch), params


# Data


def fashion(part: str) -> Data:
    """Reads Fashion-MNIST, ``"train"`` or ``"t10k"``."""
    folder = fetch.fetch("fashion-mnist")
    images, labels = (
        np.frombuffer(gzip.decompress((folder / f"{part}-{name}-ubyte.gz").read_bytes()), np.uint8)
        for name in ("images-idx3", "labels-idx1")
    )
    # An IDX file is a header, 4 bytes and 4 more for each axis, and then bytes.
    return images[16:].reshape(-1, 1, 28, 28) / np.float32(127.5) - 1, labels[8:].astype(np.int32)


def digits() -> Data:
    """Reads 5,000 images of MNIST, 500 of each digit, in a random order."""
    rows = np.loadtxt(fetch.fetch("mnist") / "mnist_5k.csv.gz", np.float32, delimiter=",")
    rows = np.random.default_rng(0).permutation(rows)
    return rows[:, :-1].reshape(-1, 1, 28, 28) / np.float32(127.5) - 1, rows[:, -1].astype(np.int32)


def load(quick: bool) -> tuple[Data, Data]:
    """Loads what to train on and what to test on."""
    if not quick:
        return fashion("train"), fashion("t10k")
    images, labels = digits()  # without Debian's package
    return (images[:4000], labels[:4000]), (images[4000:], labels[4000:])


# Training


def classification(classifier):
    """The loss of the judge."""

    def loss(tree, base, batch, key):
        logits, _ = classifier(tree, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return loss


def flow_matching(velocity):
    """The loss of ``velocity(base, tree, x, t)``: on the straight path from noise to an image, it is image minus noise."""

    def loss(tree, base, images, key):
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, images.shape)
        t = jax.nn.sigmoid(jax.random.normal(time_key, len(images)))  # more often in the middle, where it is hardest
        at = t[:, None, None, None]
        return jnp.mean((velocity(base, tree, (1 - at) * noise + at * images, t) - (images - noise)) ** 2)

    return loss


def train(label: str, loss, tree, base, data, steps: int, rate: float, batch: int, seed: int) -> training.Fit:
    """Trains ``tree`` by Adam, with a warm-up and a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    chosen = training.shuffled(len(jax.tree.leaves(data)[0]), batch, seed)
    batches = (jax.tree.map(operator.itemgetter(rows), data) for rows in chosen)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    return training.fit(label, loss, tree, base, batches, steps, optimizer, seed)


def pretrained(name: str, settings, fresh, make):
    """``make()``, a tree like ``fresh``, from the cache if it is there: an Equinox module is kept as a dict of its leaves."""
    stored = fetch.cached(
        f"diffusion-{name}", (PRETRAINING, settings), lambda: dict(enumerate(jax.tree.leaves(make().tree)))
    )
    return jax.tree.unflatten(jax.tree.structure(fresh), [jnp.asarray(stored[i]) for i in range(len(stored))])


# Sampling and judging


def sampler(velocity, steps: int):
    """Follows the velocity from noise at time 0 to an image at time 1, by Heun's method."""

    @jax.jit
    def step(params, x, t):
        here = velocity(params, x, jnp.full(len(x), t))
        there = velocity(params, x + here / steps, jnp.full(len(x), t + 1 / steps))
        return x + (here + there) / (2 * steps)

    def sample(params, noise):
        for i in range(steps):  # not lax.scan: XLA:CPU is slow at convolutions inside of a loop
            noise = step(params, noise, i / steps)
        return noise

    return sample


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Distance of two clouds of features, each taken for a Gaussian (what FID is, in other features)."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, b = np.cov(x.T), np.cov(y.T)
    cross = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()  # the trace of the root of the product
    return float(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a) + np.trace(b) - 2 * cross)


def run(args: argparse.Namespace) -> None:
    """Pretrains or loads the base, teaches it the new class in two ways, and judges samples."""
    config = QUICK if args.quick else Config()
    (images, labels), (test, test_labels) = load(args.quick)
    is_new = labels == config.new
    few, others = np.split(images[is_new], [config.shots])
    held_out = test[test_labels == config.new]
    unet_key, judge_key, lora_key, noise_key = jax.random.split(jax.random.key(args.seed), 4)
    velocity, fresh = split(UNet(config.width, unet_key))
    judge, fresh_judge = split(Classifier(judge_key))

    def full(base, params, x, t):  # everything is trained, so there is no base
        return velocity(params, x, t)

    def pretrain():
        data, steps, batch = images[~is_new], config.pretraining_steps, config.pretraining_batch
        return train("pretraining", flow_matching(full), fresh, None, data, steps, 2e-3, batch, args.seed)

    def train_judge():
        data, steps = (images, labels), config.judge_steps
        return train("judge", classification(judge), fresh_judge, None, data, steps, 2e-3, 128, args.seed)

    shape = (config.width, config.pretraining_steps, config.pretraining_batch, config.new)
    params = pretrained("unet", (*shape, args.quick, args.seed), fresh, pretrain)
    judge_params = pretrained("judge", (config.judge_steps, args.quick, args.seed), fresh_judge, train_judge)

    sites = jlora.sites(velocity, params, few[:1], np.ones(1, np.float32))
    lora = jlora.init(lora_key, params, sites, jlora.LoRA(rank=8, alpha=16, targets="all-linear"))
    adapted = jlora.wrap(velocity)
    print(jlora.summary(params, lora))

    def adapt(name, apply, tree, base, rate):
        return train(name, flow_matching(apply), tree, base, few, config.steps, rate, config.batch, args.seed)

    fits = {BY_LORA: adapt(BY_LORA, adapted, lora, params, config.rate)}
    trained = fits[BY_LORA].tree
    # A sample takes many calls of the model. With the adapter folded in, they cost what the base's cost.
    models = {
        "base": jlora.merge(params, scaled(trained, 0.0)),
        HALF: jlora.merge(params, scaled(trained, 0.5)),
        BY_LORA: jlora.merge(params, trained),
    }
    if not args.quick:
        fits[FULL] = adapt(FULL, full, params, None, config.rate / 10)
        models[FULL] = fits[FULL].tree
    if not all(map(np.array_equal, jax.tree.leaves(models["base"]), jax.tree.leaves(params))):
        raise RuntimeError("At scale 0 the adapter changes the base.")
    at = held_out[:1], np.full(1, 0.5, np.float32)
    training.check_merged(jax.jit(velocity)(models[BY_LORA], *at), jax.jit(adapted)(params, trained, *at), "velocities")

    noise = np.asarray(jax.random.normal(noise_key, (config.samples, *few.shape[1:])))
    sample, loss = sampler(velocity, config.sampler_steps), jax.jit(flow_matching(full))
    judged = jax.jit(functools.partial(judge, judge_params))

    def score(samples):
        logits, features = judged(samples)
        distance = frechet_distance(np.asarray(features), np.asarray(judged(held_out)[1]))
        return {"Fréchet distance": distance, "recognised": float(jnp.mean(logits.argmax(axis=1) == config.new))}

    rows, shown = [], {}
    for name, model in models.items():
        samples = training.in_batches(functools.partial(sample, model), EVAL_BATCH, noise)
        losses = [loss(model, None, held_out, key) for key in jax.random.split(noise_key, 4)]
        rows.append(training.row(name, score(samples) | {"held-out loss": np.mean(losses)}, fits.get(name)))
        shown[name] = samples[:COLUMNS]
    draw(args.out / "samples.png", shown | {"real, held out": held_out[:COLUMNS]})
    data = "Fashion-MNIST" if not args.quick else "digits"
    about = f"U-Net ({training.count(params):,} parameters) on {data}, {len(few)} images of a class it has not seen"
    training.report(args, "Teaching a generator", about, rows, lower_is_better=True)
    floor = score(others[: config.samples])
    print(f"Other real images of it: distance {floor['Fréchet distance']:.2f}, recognised {floor['recognised']:.1%}")
    distances = {row.method: row.values["Fréchet distance"] for row in rows}
    if not distances[BY_LORA] < distances["base"]:
        raise RuntimeError("The adapter learnt nothing.")


def scaled(lora, by: float):
    """The adapter at ``by`` times its strength."""
    return {path: dataclasses.replace(adapter, scale=by * adapter.scale) for path, adapter in lora.items()}


def draw(path: Path, shown: dict[str, np.ndarray]) -> None:
    """Draws a row of images for each name."""
    figure = Figure(figsize=(COLUMNS + 1.5, len(shown)), layout="constrained")
    for cells, (name, images) in zip(figure.subplots(len(shown), COLUMNS), shown.items(), strict=True):
        cells[0].text(-0.1, 0.5, name, transform=cells[0].transAxes, ha="right", va="center", fontsize=14)
        for axes, image in zip(cells, images, strict=True):
            axes.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
            axes.set_axis_off()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    training.main(run, __doc__, __file__)
