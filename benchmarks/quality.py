"""Accuracy of LoRA against full fine-tuning on real data, over the rank and three seeds.

    python -m benchmarks.quality [--quick] [--out quality.json]

Model, data, training and measure are those of examples/text_classification.py: MiniLM (a BERT of 22.6M) on film reviews, tested on films
never seen. All of it takes half an hour on two CPU cores, for which there is half of the example: half as many steps (a run sees 2,048 of
some 10,000 reviews), and every second review held out (the same for all). A seed draws reviews, their order and the adapter.

Learning rates are the example's, chosen there on films apart from those tested on: 1e-2 for the linear probe, 2e-3 for LoRA, 2e-4 for
full fine-tuning. One rate serves all ranks, since alpha stays that of rank 8: the update is scaled by alpha / rank, so that its first
steps are as large at every rank (Schulman et al., LoRA Without Regret, 2025). All but the probe go on from the probe's head.

``--quick`` takes random weights and random tokens, for which nothing is fetched: parameters are counted, accuracies mean nothing.
"""

import hashlib
import re
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import jlora
from benchmarks import suite

suite.require("quality")  # the example's
sys.path.append(str(suite.ROOT / "examples"))
import text_classification as example  # noqa: E402
import training  # noqa: E402

TITLE = "Quality over the rank: accuracy on film reviews, parameters trained, time"

RANKS = (1, 2, 4, 8, 16, 32, 64)
PLAN = example.Plan(seeds=3, steps=64, batch=32, length=40, every=2)
QUICK_RANKS = (1, 8)
QUICK = example.Plan(seeds=1, steps=10, batch=2, length=8, every=1)


def adapter(rank: int) -> str:
    """The method's name, as the example has it."""
    return f"LoRA rank {rank}"


def methods(ranks: tuple[int, ...]) -> dict[str, tuple[Any, float]]:
    """What the example's ``METHODS`` is, with a line for each rank: rules and learning rate."""
    rules, rate = example.METHODS[example.ADAPTER]
    lora = {r: jlora.LoRA(rank=r, alpha=example.LORA.alpha, targets=example.LORA.targets) for r in ranks}
    adapters = {adapter(r): ((*rules[:-1], lora[r]), rate) for r in ranks}
    return {
        example.PROBE: example.METHODS[example.PROBE],
        **adapters,
        example.FINE_TUNED: example.METHODS[example.FINE_TUNED],
    }


def real(plan: example.Plan) -> tuple[dict, example.Reviews, example.Reviews]:
    """MiniLM, reviews to train on and reviews held out."""
    folder = example.fetch("minilm")
    params = example.load(folder / "model.safetensors")
    tokenizer = example.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(plan.length)
    tokenizer.enable_padding(length=plan.length, pad_id=example.PAD)
    example.check_port(params, tokenizer)
    reviews, held_out = example.read_reviews(tokenizer)
    return params, reviews, held_out.take(slice(None, None, plan.every))


def made_up(plan: example.Plan) -> tuple[dict, example.Reviews, example.Reviews]:
    """The same shapes, of nothing but chance."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, example.Encoder.vocab, (4 * plan.batch, plan.length), np.int32)
    reviews = example.Reviews(tokens, rng.integers(0, len(example.LABELS), len(tokens), np.int32))
    shapes = jax.eval_shape(example.MODEL.init, jax.random.key(0), reviews.tokens[:1])
    params = jax.tree.map(lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, x.dtype)), shapes)
    return params, reviews, reviews.take(slice(plan.batch))


def digest(tree: Any) -> str:
    """Of every bit of a tree of arrays."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(np.asarray(leaf))
    return found.hexdigest()


def counts(params: dict) -> dict[str, int]:
    """Parameters of the base; those an adapter trains outright; and ``k + m``, summed over the kernels it adapts, layer by layer."""
    shapes = {path: x.shape for path, x in flatten_dict(params, sep="/").items()}
    adapted = [shape for path, shape in shapes.items() if path.endswith("/kernel") and "/head/" not in path]
    outright = [path for path in shapes if re.fullmatch(".*/head/.*|.*/(bias|scale)", path)]
    return {
        "all": training.count(params),
        "outright": sum(int(np.prod(shapes[path])) for path in outright),
        "k + m": sum(layers * (k + m) for layers, k, m in adapted),
    }


def run(quick: bool) -> dict[str, Any]:
    """One entry of ``runs`` for each method and seed: raw accuracy, seconds, parameters trained and more."""
    plan, ranks = (QUICK, QUICK_RANKS) if quick else (PLAN, RANKS)
    suite.progress("loading the model and the reviews")
    params, reviews, held_out = (made_up if quick else real)(plan)
    table = methods(ranks)
    example.METHODS.update(table)  # the example trains what stands there
    probe, *others = table
    runs = []
    for seed in range(plan.seeds):
        start, before = params, digest(params)
        # Each seed begins with another method, so that a slow hour of the machine does not fall on the same one thrice.
        turn = seed * len(others) // plan.seeds
        for method in (probe, *others[turn:], *others[:turn]):
            suite.progress(f"seed {seed + 1} of {plan.seeds}: {method}")
            fit, tuned = example.train(method, plan, start, reviews, seed)
            runs.append(
                {
                    "method": method,
                    "seed": seed,
                    "accuracy": example.accuracy(tuned, held_out),
                    "seconds": fit.seconds,
                    "step bytes": fit.peak_bytes,
                    "trained": fit.trained,
                    "losses": [round(float(x), 4) for x in fit.losses],
                    "base unchanged": digest(start) == before,
                }
            )
            if method == probe:
                start, before = tuned, digest(tuned)
    return {
        "plan": {**vars(plan), "reviews": len(reviews.labels), "held out": len(held_out.labels)},
        "ranks": list(ranks),
        "rates": {method: rate for method, (_, rate) in table.items()},
        "parameters": counts(params),
        "majority": float(np.mean(held_out.labels == np.bincount(reviews.labels).argmax())),
        "runs": runs,
    }


def series(results: dict[str, Any], method: str, key: str) -> list[Any]:
    """One figure of a method, seed by seed."""
    runs = [run for run in results["runs"] if run["method"] == method]
    return [run[key] for run in sorted(runs, key=lambda run: run["seed"])]


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def tables(results: dict[str, Any]) -> list[suite.Table]:
    rows = [["more frequent label", "-", "-", "-", f"{results['majority']:.4f}", "-", "-"]]
    for method, rate in results["rates"].items():
        (trained,) = set(series(results, method, "trained"))
        (size,) = set(series(results, method, "step bytes"))
        share = f"{100 * trained / results['parameters']['all']:.3g} %"
        accuracy = spread(series(results, method, "accuracy"), 4)
        seconds = spread(series(results, method, "seconds"), 1)
        rows.append([method, f"{rate:g}", f"{trained:,}", share, accuracy, seconds, f"{size / 1e6:,.0f}"])
    plan = results["plan"]
    note = (
        f"{plan['seeds']} seeds (mean and standard deviation), {plan['steps']} steps of {plan['batch']} reviews, {plan['held out']:,} "
        "reviews of films held out. LoRA also trains head, biases and norms. Seconds: all steps, compiling apart."
    )
    header = ["method", "learning rate", "trained", "share", "accuracy", "seconds", "MB a step"]
    return [suite.Table(TITLE, header, rows, note)]


def claims(results: dict[str, Any]) -> list[suite.Claim]:
    found = results["parameters"]
    trained = {rank: set(series(results, adapter(rank), "trained")) for rank in results["ranks"]}
    wanted = {rank: {rank * found["k + m"] + found["outright"]} for rank in results["ranks"]}
    share = max(trained[8]) / found["all"]
    kept = [run["base unchanged"] for run in results["runs"] if run["method"] != example.FINE_TUNED]
    return [
        suite.Claim(
            "An adapter trains rank x (k + m) parameters of each k x m kernel, beside head, biases and norms.",
            trained == wanted,
            f"k + m: {found['k + m']:,} in all; beside them {found['outright']:,}; "
            + ", ".join(f"rank {rank}: {'/'.join(f'{n:,}' for n in sorted(of))}" for rank, of in trained.items()),
        ),
        suite.Claim("Rank 8 trains 1.6 % of the parameters of MiniLM.", round(100 * share, 1) == 1.6, f"{share:.4%}"),
        suite.Claim(
            "The base is bit for bit what it was before training.", all(kept), f"{sum(kept)} of {len(kept)} fits"
        ),
    ]


if __name__ == "__main__":
    suite.main(sys.modules[__name__])
