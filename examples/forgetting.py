"""What adapting a language model to Hamlet costs it elsewhere: SmolLM2-135M, LoRA beside full fine-tuning, on a CPU.

    python examples/forgetting.py            # SmolLM2-135M-Instruct
    python examples/forgetting.py --quick    # a tiny Llama

Both are trained on the same windows of Hamlet. On the way, perplexity is measured on text held out from Hamlet (new) and on text the
base could predict before (old): summaries of films, in modern English. Look at the curves: where both have learnt as much of Hamlet,
the higher one has forgotten more. The tiny model knows nothing but Lewis Carroll and there is no text of his it was not trained on, so
its old text is what it writes itself: perplexity on that grows by the exponential of the divergence of the adapted model from the base.
The question is that of Biderman et al., 2024, "LoRA Learns Less and Forgets Less", arXiv:2405.09673. The learning rate matters as much
as the method: with the tiny model either forgets more, at the same perplexity on Hamlet, the larger its rate.
"""

import argparse
import bz2
import csv
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import assets
import jax
import jax.numpy as jnp
import llama
import numpy as np
import optax
import training
from fetch import fetch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from tokenizers import Tokenizer

import jlora

LENGTH = 64  # tokens a window
RANK = 8
EVAL_BATCH = 8
NEW, OLD = "perplexity, Hamlet", "perplexity, old text"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is trained, how long, and at what learning rates."""

    steps: int
    batch: int
    lora_rate: float
    full_rate: float
    evaluated: tuple[int, ...]  # after so many steps
    windows: int  # of each text, to evaluate on


FULL = Plan(steps=50, batch=4, lora_rate=1e-3, full_rate=1e-4, evaluated=(5, 10, 20, 35, 50), windows=24)
QUICK = Plan(steps=40, batch=8, lora_rate=1e-2, full_rate=1e-3, evaluated=(5, 10, 20, 40), windows=32)


# Texts


def hamlet(tokenizer: Tokenizer, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows to train on, and ``held_out`` of them evenly spaced over the last tenth of the play."""
    windows = cut(tokenizer.encode(assets.hamlet()).ids)
    train, rest = np.split(windows, [len(windows) - len(windows) // 10])
    return train, rest[np.linspace(0, len(rest) - 1, held_out).astype(int)]


def cut(tokens: list[int]) -> np.ndarray:
    """Rows of ``LENGTH`` inputs and the token after them."""
    count = (len(tokens) - 1) // LENGTH
    return np.asarray([tokens[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(count)], np.int32)


def summaries(tokenizer: Tokenizer, count: int, seed: int) -> np.ndarray:
    """How ``count`` summaries of films begin."""
    with bz2.open(fetch("reviews") / "rotten_tomatoes_corpus_full.csv.bz2", "rt", encoding="utf-8", newline="") as file:
        texts = [row["text"].strip() for row in csv.DictReader(file) if row["category"] == "plot"]
    order = np.random.default_rng(seed).permutation(len(texts))
    rows = (cut(tokenizer.encode(texts[i]).ids)[:1] for i in order)
    return np.concatenate([row for row, _ in zip((r for r in rows if len(r)), range(count), strict=False)])


@functools.partial(jax.jit, static_argnums=(0, 3))
def samples(model: llama.Llama, params: Any, start: jax.Array, count: int, key: jax.Array) -> jax.Array:
    """What the model writes after the token ``start``: rows of a window each, drawn at temperature 1."""

    def step(i, tokens):
        logits = model.apply(params, tokens[:, :-1])[:, i]
        return tokens.at[:, i + 1].set(jax.random.categorical(jax.random.fold_in(key, i), logits))

    first = jnp.zeros((count, LENGTH + 1), jnp.int32).at[:, 0].set(start)
    return jax.lax.fori_loop(0, LENGTH, step, first)


# Training and measuring


def cross_entropy(logits: jax.Array, windows: jax.Array) -> jax.Array:
    """Of each next token."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])


def meter(model: llama.Llama, texts: dict[str, np.ndarray]) -> Callable[[Any], dict[str, float]]:
    """Returns what measures the perplexity of each text under parameters."""
    losses = jax.jit(lambda params, rows: cross_entropy(model.apply(params, rows[:, :-1]), rows).mean(axis=1))

    def measure(params: Any) -> dict[str, float]:
        found = {name: training.in_batches(lambda r: losses(params, r), EVAL_BATCH, x) for name, x in texts.items()}
        return {name: float(np.exp(x.mean())) for name, x in found.items()}

    return measure


@dataclasses.dataclass(frozen=True)
class Task:
    """What both methods share: the model, the windows in their order, when to measure what."""

    model: llama.Llama
    plan: Plan
    windows: np.ndarray
    measure: Callable[[Any], dict[str, float]]
    seed: int

    def fit(self, label: str, rate: float, predict: Callable, tree: Any, base: Any, folded: Callable):
        """Trains ``tree``, where ``predict(tree, base, tokens)`` gives logits and ``folded(tree)`` parameters.

        Returns:
            The fit, and perplexities on the way.
        """
        plan, curve = self.plan, []

        def loss(tree, base, rows, key):
            return cross_entropy(predict(tree, base, rows[:, :-1]), rows).mean()

        def watch(step, tree):
            if step in plan.evaluated:
                curve.append(self.measure(folded(tree)))

        batches = (self.windows[i] for i in training.shuffled(len(self.windows), plan.batch, self.seed))
        # Without a warm-up Adam's first steps, which are as large as any, would forget by themselves.
        optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, plan.steps // 10, plan.steps))
        return training.fit(label, loss, tree, base, batches, plan.steps, optimizer, self.seed, watch), curve


def fit_lora(task: Task, params: Any) -> tuple[training.Fit, list]:
    """Trains an adapter of all linear layers, and checks it merged."""
    sites = jlora.sites(task.model.apply, params, task.windows[:1, :-1])
    rule = jlora.LoRA(rank=RANK, alpha=2 * RANK, targets="all-linear")
    lora = jlora.init(jax.random.key(task.seed), params, sites, rule)
    apply, merge = jlora.wrap(task.model.apply), functools.partial(jlora.merge, params)

    def predict(lora, params, tokens):
        return apply(params, lora, tokens)

    fit, curve = task.fit("LoRA", task.plan.lora_rate, predict, lora, params, merge)
    rows = task.windows[: task.plan.batch, :-1]
    factored, merged = jax.jit(apply)(params, fit.tree, rows), jax.jit(task.model.apply)(merge(fit.tree), rows)
    training.check_merged(merged, factored)
    return fit, curve


def fit_full(task: Task, params: Any) -> tuple[training.Fit, list]:
    """Trains all parameters."""

    def predict(params, _, tokens):
        return task.model.apply(params, tokens)

    return task.fit("full fine-tuning", task.plan.full_rate, predict, params, None, lambda params: params)


def old_at(curve: list[dict[str, float]], new: float) -> float:
    """Perplexity on old text where a curve first comes down to ``new`` on Hamlet, between points in logarithms."""
    points = np.log([[point[NEW], point[OLD]] for point in curve])
    after = max(1, int(np.argmax(points[:, 0] <= np.log(new) + 1e-9)))
    (x0, y0), (x1, y1) = points[after - 1 : after + 1]
    return float(np.exp(y0 + (y1 - y0) * (np.log(new) - x0) / (x1 - x0)))


# The run


def plot(path, curves: dict[str, list[dict[str, float]]], steps: tuple[int, ...], equal: float) -> None:
    """Draws perplexity on the old text against that on the new, a curve for each method."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    # The numbers of one curve stand before its points and those of the other after them, for the two run close.
    styles = (("#1f4e79", (-6, 5), "right"), ("#c0392b", (6, -12), "left"))
    for (name, curve), (color, offset, side) in zip(curves.items(), styles, strict=True):
        new, old = ([point[text] for point in curve] for text in (NEW, OLD))
        axes.plot(new, old, "o-", color=color, linewidth=2, markersize=5, label=name)
        for i, step in enumerate(steps, 1):
            axes.annotate(f"{step}", (new[i], old[i]), xytext=offset, textcoords="offset points", color=color, ha=side)
        axes.plot(equal, old_at(curve, equal), "D", color=color, markersize=9, markerfacecolor="white", zorder=3)
    base = next(iter(curves.values()))[0]
    axes.plot(base[NEW], base[OLD], "o", color="black", markersize=8, zorder=4)
    axes.annotate("base", (base[NEW], base[OLD]), xytext=(0, 9), textcoords="offset points", ha="center", weight="bold")
    axes.axvline(equal, color="#7f8c8d", linestyle="--", linewidth=1, zorder=0)
    axes.set(xscale="log", yscale="log")
    axes.margins(0.08)
    axes.invert_xaxis()
    axes.set_xlabel("perplexity on Hamlet, held out (log): the further right, the more is learnt")
    axes.set_ylabel("perplexity on old text (log)")
    axes.set_title("The higher, the more is forgotten; numbers are steps", loc="left", weight="bold")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)


def run(args: argparse.Namespace) -> None:
    plan = QUICK if args.quick else FULL
    with training.console.status("Loading the model and the texts"):
        model, params, tokenizer = assets.load_glassllm() if args.quick else assets.load_smollm2()
        windows, new = hamlet(tokenizer, plan.windows)
        if args.quick:
            old = np.asarray(samples(model, params, windows[0, 0], plan.windows, jax.random.key(args.seed)))
        else:
            old = summaries(tokenizer, plan.windows, args.seed)
        measure = meter(model, {NEW: new, OLD: old})
        before = measure(params)
    task = Task(model, plan, windows, measure, args.seed)
    fits, curves = {}, {}
    for name, train in ((f"LoRA rank {RANK}", fit_lora), ("full fine-tuning", fit_full)):
        fits[name], curve = train(task, params)
        curves[name] = [before, *curve]
        if not curve[-1][NEW] < 0.9 * before[NEW]:
            raise RuntimeError(
                f"{name}: perplexity on Hamlet went from {before[NEW]:.1f} to {curve[-1][NEW]:.1f} only."
            )
    equal = max(min(point[NEW] for point in curve) for curve in curves.values())  # what both have reached
    column = f"{OLD}, at {equal:.1f}"  # on Hamlet
    rows = [training.row("base", before | {column: before[OLD]})]
    rows += [training.row(name, c[-1] | {column: old_at(c, equal)}, fits[name]) for name, c in curves.items()]
    plot(args.out / "forgetting.png", curves, plan.evaluated, equal)
    about = (
        "a tiny Llama, its own text as the old one" if args.quick else "SmolLM2-135M, film summaries as the old text"
    )
    training.report(args, "Perplexity after adapting to Hamlet", about, rows, lower_is_better=True)


if __name__ == "__main__":
    training.main(run, __doc__, __file__)
