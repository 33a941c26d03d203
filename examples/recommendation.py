"""Brings a film recommender of 1997 up to 1998, with LoRA on its embedding table, in plain JAX: a dict of arrays and a function.

    python examples/recommendation.py
    python examples/recommendation.py --quick

The base learnt what users of MovieLens-100K liked until the end of 1997, and is kept in the cache; adapters learn from January and
February, and are tested on March and April. Three users in four are new by then; all are known by age, gender, occupation and their
last 50 ratings, each strictly earlier than the one to be foretold. Look at NDCG@10 in the table, among all films the user has not rated
yet: what the base has lost with age, and how much of it an adapter wins back. ``weeks.png`` follows both from week to week.
"""

import argparse
import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import fetch
import jax
import jax.numpy as jnp
import numpy as np
import optax
import training
from matplotlib.dates import DateFormatter
from matplotlib.figure import Figure

import jlora

PRETRAINING = 1  # raise it when the model or its pretraining changes
EVAL_BATCH = 1000
LIKED = 4  # stars, of 5
ADAPT, TEST = datetime(1998, 1, 1, tzinfo=UTC), datetime(1998, 3, 1, tzinfo=UTC)  # what begins when


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the model, and how long it is trained."""

    width: int = 64
    history: int = 50
    pretraining_steps: int = 2000
    steps: int = 200
    batch: int = 256


QUICK = Config(width=32, history=20, pretraining_steps=300, steps=100)


# The model


def init(key: jax.Array, rows: dict[str, int], config: Config) -> dict[str, jax.Array]:
    """Fresh parameters: a table for each name of ``rows``, an MLP, and what is added."""
    *keys, up, down = jax.random.split(key, len(rows) + 2)
    width, dense = config.width, jax.nn.initializers.lecun_normal()
    tables = {name: 0.1 * jax.random.normal(k, (rows[name], width)) for name, k in zip(rows, keys, strict=True)}
    mlp = {
        "up": dense(up, (2 * width, 2 * width)),
        "bias": jnp.zeros(2 * width),
        "down": dense(down, (2 * width, width)),
    }
    return tables | mlp | {"recency": jnp.zeros(config.history), "popularity": jnp.zeros(rows["film"])}


def score(params: dict[str, jax.Array], who: jax.Array, films: jax.Array, stars: jax.Array) -> jax.Array:
    """Scores all films for a batch of users: two towers, the film's a row of the table that also describes what the user saw.

    Args:
        params: Of ``init``.
        who: Age group, gender and occupation, ``(batch, 3)``.
        films: What they rated, newest first and then 0, ``(batch, history)``.
        stars: How they rated it, ``(batch, history)``.

    Returns:
        Logits, ``(batch, films)``.
    """
    weights = jnp.where(films > 0, jnp.exp(params["recency"]), 0.0)
    weights /= jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-6)  # of a user with no history, all are 0
    taste = jnp.einsum("bh,bhd->bd", weights, params["film"][films] + params["stars"][stars])
    person = sum(params[name][who[:, i]] for i, name in enumerate(("age", "gender", "occupation")))
    hidden = jax.nn.gelu(jnp.concatenate([taste, person], axis=1) @ params["up"] + params["bias"])
    return (taste + hidden @ params["down"]) @ params["film"].T + params["popularity"]


# Data


class Ratings(NamedTuple):
    """All ratings, oldest first: of each what came of it, and what was known before."""

    user: np.ndarray
    film: np.ndarray
    stars: np.ndarray
    when: np.ndarray  # seconds since 1970
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray]  # of the model: who, films, stars


def read(name: str) -> list[list[str]]:
    """Reads a table of MovieLens-100K."""
    lines = (fetch.fetch("movielens") / f"ml-100k.{name}").read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines[1:]]


def load(history: int) -> tuple[Ratings, dict[str, int]]:
    """Loads all ratings, and how many rows each of the model's tables needs."""
    people = {int(user): (int(age) // 10, int(gender == "F"), job) for user, age, gender, job, _ in read("user")}
    jobs = sorted({job for *_, job in people.values()})
    ratings = sorted(([int(x) for x in row] for row in read("inter")), key=lambda row: row[3])
    user, film, stars, when = np.array(ratings).T
    who = np.array([(*people[u][:2], jobs.index(people[u][2])) for u in user])
    films, scores = np.zeros((2, len(user), history), np.int32)
    for rows in (np.flatnonzero(user == u) for u in people):
        # Films rated on one page have one time. Only what is strictly earlier is known: a page would tell of itself.
        known = np.searchsorted(when[rows], when[rows])
        newest_first = known[:, None] - 1 - np.arange(history)
        last, given = rows[newest_first.clip(0)], newest_first >= 0
        films[rows], scores[rows] = film[last] * given, stars[last] * given
    sizes = {"film": film.max() + 1, "stars": 6, "age": 8, "gender": 2, "occupation": len(jobs)}
    return Ratings(user, film, stars, when, (who, films, scores)), sizes


# Training


def cross_entropy(apply):
    """The loss of ``apply(base, tree, *inputs)``: one film of all that the user has not just rated was liked."""

    def loss(tree, base, batch, key):
        inputs, liked = batch
        logits = jnp.put_along_axis(apply(base, tree, *inputs), inputs[1], -jnp.inf, axis=1, inplace=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, liked).mean()

    return loss


def train(
    label: str,
    apply,
    tree,
    base,
    ratings: Ratings,
    rows,
    steps: int,
    rate: float,
    batch: int,
    seed: int,
    decay: float = 0.0,
):
    """Trains ``tree`` on some ``rows`` by AdamW, with a cosine."""
    chosen = (rows[i] for i in training.shuffled(len(rows), batch, seed))
    batches = ((tuple(x[i] for x in ratings.inputs), ratings.film[i]) for i in chosen)
    optimizer = optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=decay)
    return training.fit(label, cross_entropy(apply), tree, base, batches, steps, optimizer, seed)


# Judging


def unrated(ratings: Ratings, rows: np.ndarray, films: int) -> np.ndarray:
    """Which films the user of each row has not rated before, ``(rows, films)``."""
    allowed = np.ones((len(rows), films), bool)
    allowed[:, 0] = False  # there is no film 0
    for user in np.unique(ratings.user[rows]):
        mine, his = np.flatnonzero(ratings.user[rows] == user), np.flatnonzero(ratings.user == user)
        allowed[np.ix_(mine, ratings.film[his])] = ratings.when[his] >= ratings.when[rows[mine], None]
    return allowed


def ranks(logits: np.ndarray, films: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """At which place, from 0, the one film that was liked stands among those allowed."""
    return np.sum((logits > np.take_along_axis(logits, films[:, None], axis=1)) & allowed, axis=1)


def gains(ranks: np.ndarray) -> np.ndarray:
    """NDCG@10 of each row, where one film is relevant."""
    return np.where(ranks < 10, 1 / np.log2(ranks + 2), 0.0)


def standard_error(values: np.ndarray, users: np.ndarray) -> float:
    """Of the mean of ``values``, of which a user has several: users are independent, what one of them does is not."""
    return float(np.linalg.norm(np.bincount(users, values - values.mean())) / len(values))


def run(args: argparse.Namespace) -> None:
    """Trains or loads the base, adapts it in two ways, tests all on what came later, and shows the results."""
    config = QUICK if args.quick else Config()
    ratings, sizes = load(config.history)
    liked, begun, over = ratings.stars >= LIKED, *(ratings.when >= day.timestamp() for day in (ADAPT, TEST))
    old, new, test = (np.flatnonzero(liked & part) for part in (~begun, begun & ~over, over))
    keys = jax.random.split(jax.random.key(args.seed))

    def full(base, params, *inputs):  # everything is trained, so there is no base
        return score(params, *inputs)

    def fit(label, apply, tree, base, rows, steps, rate, **options):
        return train(label, apply, tree, base, ratings, rows, steps, rate, config.batch, args.seed, **options)

    def pretrain():
        fresh = init(keys[0], sizes, config)
        return fit("base", full, fresh, None, old, config.pretraining_steps, 2e-3, decay=0.3).tree

    params = fetch.cached("recommender", (PRETRAINING, config, args.seed), pretrain)
    sites = jlora.sites(score, params, *(x[:1] for x in ratings.inputs))
    # "all-linear" leaves lookups and heads out, and the table of films is both: it has to be named. It has few ratings for a row, and
    # learns more slowly than the MLP.
    rules = [jlora.LoRA(rank=16, alpha=4, targets="film"), jlora.LoRA(rank=16, alpha=64, targets="all-linear")]
    lora = jlora.init(keys[1], params, sites, rules)
    adapted = jlora.wrap(score)
    print(jlora.summary(params, lora))

    fits = {
        "base": None,
        "LoRA rank 16": fit("LoRA rank 16", adapted, lora, params, new, config.steps, 2e-3),
        "full fine-tuning": fit("full fine-tuning", full, params, None, new, config.steps, 1e-3),
    }
    lora = fits["LoRA rank 16"].tree
    jlora.save(args.out / "adapter", lora, overwrite=True, learnt_until=str(TEST.date()))
    merged = jlora.merge(params, jlora.load(args.out / "adapter", params))

    recent = np.concatenate([new, test])
    allowed = unrated(ratings, recent, sizes["film"])

    def logits(apply, base, tree):
        compiled, inputs = jax.jit(apply), (x[recent] for x in ratings.inputs)
        return training.in_batches(lambda *inputs: compiled(base, tree, *inputs), EVAL_BATCH, *inputs)

    found = {
        "base": logits(full, None, params),
        "LoRA rank 16": logits(adapted, params, lora),
        "full fine-tuning": logits(full, None, fits["full fine-tuning"].tree),
        "what is popular": np.broadcast_to(np.bincount(ratings.film[new], minlength=sizes["film"]), allowed.shape),
    }
    training.check_merged(logits(full, None, merged), found["LoRA rank 16"])
    places = {name: ranks(x, ratings.film[recent], allowed) for name, x in found.items()}
    tested = np.isin(recent, test)
    rows = []
    for name, place in places.items():
        place = place[tested]
        values = {"NDCG@10": gains(place).mean(), "recall@10": (place < 10).mean()}
        rows.append(training.row(name, values, fits.get(name)))
    won = gains(places["LoRA rank 16"][tested]) - gains(places["base"][tested])
    error = standard_error(won, ratings.user[test])
    draw(args.out / "weeks.png", places, ratings.when[recent])
    about = f"two towers ({training.count(params):,} parameters) on MovieLens-100K"
    training.report(args, "Films liked in March and April 1998", about, rows)
    users = len(np.unique(ratings.user[test]))
    print(f"NDCG@10 that the adapter adds: {won.mean():.4f} ± {error:.4f} (standard error over {users} users)")
    if rows[1].values["NDCG@10"] < rows[0].values["NDCG@10"]:
        raise RuntimeError("The adapter learnt nothing.")


def draw(path: Path, places: dict[str, np.ndarray], when: np.ndarray) -> None:
    """Draws NDCG@10 by week; what learnt from January and February, only after."""
    week = timedelta(days=7)
    number = np.floor((when - TEST.timestamp()) / week.total_seconds()).astype(int)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    colours = {"base": "0.35", "LoRA rank 16": "tab:red", "full fine-tuning": "tab:blue", "what is popular": "0.7"}
    for name, place in places.items():
        weeks = np.unique(number[number >= 0] if name != "base" else number)
        days = [TEST + (int(n) + 0.5) * week for n in weeks]
        axes.plot(days, [gains(place[number == n]).mean() for n in weeks], "o-", color=colours[name], label=name)
    axes.axvspan(ADAPT, TEST, color="tab:red", alpha=0.07, linewidth=0)
    middle, inside = ADAPT + (TEST - ADAPT) / 2, axes.get_xaxis_transform()
    axes.text(middle, 0.04, "what adapters learn from", transform=inside, ha="center", color="tab:red")
    axes.set(ylim=(0, None), ylabel="NDCG@10")
    axes.set_title("The base ages, week by week; two months of ratings bring it up to date", loc="left", weight="bold")
    axes.xaxis.set_major_formatter(DateFormatter("%-d %b"))
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    training.main(run, __doc__, __file__)
