"""One base, several voices: adapters exchanged between two tokens, with nothing compiled again.

SmolLM2-135M-Instruct (a Llama) learns two tones, each an adapter of its own: Hamlet, and critics of films (Rotten Tomatoes, split by film).
The adapters are saved, loaded, swapped under one compiled program, then served together, stacked, by ``vmap``.

    python examples/swapping.py [--quick]    # --quick: a Llama of 0.9M parameters
    python examples/swapping.py --chat       # talk to them: /hamlet, /critic, /base

Look at the same questions answered in three voices, the table (each adapter is best on its own text) and ``voices.png``.
"""

import argparse
import bz2
import contextlib
import csv
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import assets
import jax
import jax.numpy as jnp
import llama
import numpy as np
import optax
import training
from fetch import fetch
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table
from tokenizers import Tokenizer
from training import console

import jlora

VOICES = {"hamlet": "Hamlet", "critic": "film reviews"}  # what each has read
LENGTH, HELD_OUT = 64, 40  # tokens of a window; windows of each text that are scored
QUESTIONS = ("What is love?", "Who was your father?", "How was your evening?")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What ``--quick`` changes."""

    about: str
    load: Callable
    prompt: Callable[[str], str]
    steps: int
    batch: int
    learning_rate: float
    room: int  # tokens of a question and its answer


FULL = Settings("SmolLM2-135M-Instruct", assets.load_smollm2, assets.chat, 40, 4, 2e-3, 80)
QUICK = Settings("a Llama of 0.9M", assets.load_glassllm, "{}\n".format, 30, 8, 1e-2, 40)


# Texts


def texts() -> dict[str, tuple[str, str]]:
    """For each voice, the text to learn and the text held out: the last tenth of the play, the reviews of a tenth of the films."""
    play = assets.hamlet()
    cut = play.index("\n", len(play) * 9 // 10)
    with bz2.open(fetch("reviews") / "rotten_tomatoes_corpus_full.csv.bz2", "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] in ("fresh", "rotten")]
    film_of = {" ".join(row["text"].split()): row["movie_name"] for row in rows}  # a text filed under two films once
    films = np.random.default_rng(0).permutation(sorted(set(film_of.values())))
    held_out = set(films[: len(films) // 10])
    train, test = ("\n".join(x for x, film in film_of.items() if (film in held_out) is side) for side in (False, True))
    return {"hamlet": (play[:cut], play[cut:]), "critic": (train, test)}


def windows(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Rows of ``LENGTH`` tokens and the one after them."""
    tokens = np.asarray(tokenizer.encode(text).ids, np.int32)
    return np.lib.stride_tricks.sliding_window_view(tokens, LENGTH + 1)[::LENGTH]


# Computation. An adapter is an argument like any other: another one is another value, and not another program.


def losses(logits: jax.Array, rows: jax.Array) -> jax.Array:
    """Mean loss of each window, in nats per token."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean(axis=1)


def next_token(apply: Callable, params, lora, token: jax.Array, position: jax.Array, caches: list):
    """The likeliest token after ``token``, shape ``(batch,)``, and the caches that follow."""
    logits, caches = apply(params, lora, token, position, caches, method="decode")
    return logits.argmax(axis=-1).astype(token.dtype), caches


def no_caches(config: llama.Config, shape: tuple[int, ...]) -> list:
    """Caches for tokens of shape ``(..., length)``, with nothing in them."""
    empty = np.zeros((*shape, config.kv_heads, config.head_dim), np.float32)
    return [(empty, empty)] * config.layers


def speak(base: "Base", step: Callable, lora, prompts: np.ndarray, given: np.ndarray) -> Iterator[np.ndarray]:
    """Greedy decoding, one call of ``step`` a token; yields the tokens at position 1, at position 2 and so on.

    ``prompts`` are tokens, shape ``(..., length)``, of which ``given``, shape ``(...)``, are the prompt: what stands after it is replaced.
    Rows with adapters of their own are one more axis: then ``step`` is vmapped, and ``lora`` a stack.
    """
    token, caches = prompts[..., 0], no_caches(base.model.config, prompts.shape)
    for position in range(prompts.shape[-1] - 1):
        likeliest, caches = step(base.params, lora, token, np.int32(position), caches)
        token = np.where(position + 1 < given, prompts[..., position + 1], likeliest)
        yield token


@contextlib.contextmanager
def compiled_once(what: str) -> Iterator[None]:
    """Raises unless XLA compiles exactly one program in the block, for whatever reason."""
    seconds = []

    def listen(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    if len(seconds) != 1:
        raise RuntimeError(f"{what}: {len(seconds)} programs were compiled, not one.")
    console.print(f"{what}: [bold]1 compilation[/]")


# The run


@dataclasses.dataclass(frozen=True)
class Base:
    """The model, and the adapters' way in."""

    settings: Settings
    model: llama.Llama
    params: dict
    tokenizer: Tokenizer
    apply: Callable  # apply(params, lora, ...)
    fresh: dict  # an adapter that changes nothing yet

    @classmethod
    def load(cls, settings: Settings, seed: int) -> "Base":
        """Loads the model and finds what can be adapted."""
        with console.status("Loading the model"):
            model, params, tokenizer = settings.load()
            sites = jlora.sites(model.apply, params, jnp.zeros((1, LENGTH), jnp.int32))
            fresh = jlora.init(jax.random.key(seed), params, sites, jlora.LoRA(rank=8, alpha=16, targets="all-linear"))
        return cls(settings, model, params, tokenizer, jlora.wrap(model.apply), fresh)

    def prompts(self, questions: Sequence[str], room: int) -> tuple[np.ndarray, np.ndarray]:
        """Questions as ``speak`` takes them: ``room`` tokens a row, the answer's too, and how many of them are given."""
        rows = [self.tokenizer.encode(self.settings.prompt(question)).ids for question in questions]
        return np.asarray([(row + [0] * room)[:room] for row in rows], np.int32), np.asarray([len(row) for row in rows])

    def text(self, tokens) -> str:
        """Tokens as text, up to the end of the turn."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False).split("<|im_end|>")[0]


def train(base: Base, text: str, label: str, seed: int) -> training.Fit:
    """Trains an adapter on a text."""
    rows, s = windows(base.tokenizer, text), base.settings
    return training.fit(
        label,
        lambda lora, params, rows, key: losses(base.apply(params, lora, rows[:, :-1]), rows).mean(),
        base.fresh,
        base.params,
        (rows[i] for i in training.shuffled(len(rows), s.batch, seed)),
        s.steps,
        optax.adam(optax.cosine_decay_schedule(s.learning_rate, s.steps)),
        seed,
    )


def score(base: Base, voices: dict[str, dict], held_out: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The loss of every held-out window, by voice and text."""
    scorer = jax.jit(lambda params, lora, rows: losses(base.apply(params, lora, rows[:, :-1]), rows))

    with compiled_once(f"{len(held_out)} texts scored, swapping {len(voices)} adapters"):
        return {
            name: {
                text: training.in_batches(functools.partial(scorer, base.params, lora), 8, rows)
                for text, rows in held_out.items()
            }
            for name, lora in voices.items()
        }


def check_merged(base: Base, voices: dict[str, dict], held_out: dict[str, np.ndarray], found: dict) -> None:
    """Raises unless the model alone, with an adapter folded in, scores as the base with the adapter beside it."""
    plain = jax.jit(lambda params, rows: losses(base.model.apply(params, rows[:, :-1]), rows))
    for name, lora in voices.items():
        merged, factored = plain(jlora.merge(base.params, lora), held_out["hamlet"][:8]), found[name]["hamlet"][:8]
        training.check_merged(merged, factored, f"losses of {name}")
    console.print("Each adapter, merged into the base, scores the same to 1e-4.")


def ask(base: Base, voices: dict[str, dict]) -> None:
    """Asks all voices the same questions: one adapter after another, then all of them in one batch."""
    prompts, given = base.prompts(QUESTIONS, base.settings.room)
    step = functools.partial(next_token, base.apply)
    alone, together = jax.jit(step), jax.jit(jax.vmap(step, (None, 0, 0, None, 0)))

    with compiled_once(f"{len(QUESTIONS)} questions answered, swapping {len(voices)} adapters"):
        answers = [np.stack([*speak(base, alone, lora, prompts, given)], axis=-1) for lora in voices.values()]
        switched, stayed = time_tokens(base, alone, voices, prompts)
    console.print(f"A token takes {1e3 * stayed:.1f} ms, and {1e3 * switched:.1f} ms right after a switch.")

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *voices.values())
    many = (np.broadcast_to(x, (len(voices), *x.shape)) for x in (prompts, given))
    with compiled_once(f"The same {len(voices) * len(QUESTIONS)} answers in one batch, an adapter for each row"):
        batch = np.stack([*speak(base, together, stacked, *many)], axis=-1)
    same = (batch == np.stack(answers)).mean()
    console.print(f"{same:.0%} of its tokens are those that each adapter says alone.")
    # Rounding may tip a near tie, and the two part from there. With an adapter at the wrong row, next to nothing would agree.
    if same < 0.5:
        raise RuntimeError("In one batch, the adapters do not say what each says alone.")

    table = Table(expand=True, show_lines=True)
    for name in ("", *voices):
        table.add_column(name, ratio=1 + bool(name))
    for i, question in enumerate(QUESTIONS):
        table.add_row(question, *(escape(base.text(tokens[i, given[i] - 1 :]).strip()) for tokens in answers))
    console.print(table)


def time_tokens(base: Base, step: Callable, voices: dict[str, dict], prompts: np.ndarray) -> tuple[float, float]:
    """Median seconds of a token right after a switch, and of one more with the same adapter."""
    caches, seconds = no_caches(base.model.config, prompts.shape), []
    for lora in [*voices.values()] * 6:
        for _ in range(2):
            start = time.perf_counter()
            jax.block_until_ready(step(base.params, lora, prompts[:, 0], np.int32(0), caches))
            seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[0::2])), float(np.median(seconds[1::2]))


def chat(base: Base, voices: dict[str, dict]) -> None:
    """Answers questions, each for itself, in the voice that is on; ``/name`` switches."""
    step, name, known = jax.jit(functools.partial(next_token, base.apply)), "hamlet", [f"/{voice}" for voice in voices]
    room, end = min(256, base.model.config.max_length), base.tokenizer.token_to_id("<|im_end|>")
    console.print(f"Ask away. {', '.join(known)} switch the voice, Ctrl-D ends.")
    with contextlib.suppress(EOFError):
        while True:
            line = console.input(f"[bold]{name}>[/] ").strip()
            if line in known:
                name = line[1:]
            elif line:
                prompts, given = base.prompts([line], room)
                said, shown = [], ""
                for (token,) in itertools.islice(speak(base, step, voices[name], prompts, given), given[0] - 1, None):
                    if token == end:
                        break
                    said.append(token)
                    text = base.text(said)
                    if not text.endswith("\ufffd"):  # the first bytes of a character
                        print(text[len(shown) :], end="", flush=True)
                        shown = text
                print()


def draw(path: Path, found: dict[str, dict[str, np.ndarray]]) -> None:
    """Draws each held-out window as a point: what the one adapter gains there, and what the other does."""
    figure = Figure(figsize=(6.4, 6), layout="constrained")
    axes = figure.add_subplot()
    for voice, color in zip(VOICES, ("#1f4e79", "#c0392b"), strict=True):
        gains = (found["base"][voice] - found[other][voice] for other in VOICES)
        axes.scatter(*gains, s=28, color=color, alpha=0.7, linewidth=0, label=f"{VOICES[voice]}, held out")
    axes.axline((0, 0), slope=1, color="#7f8c8d", linewidth=1, linestyle="--", zorder=0)
    axes.set_aspect("equal", adjustable="datalim")
    x, y = (f"gained over the base by the adapter {voice} (nats per token)" for voice in VOICES)
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(f"Windows of {LENGTH} tokens: each adapter knows its own text", loc="left", weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def run(args: argparse.Namespace) -> None:
    """Trains and keeps two adapters, swaps them, serves them together, and shows what each is worth."""
    settings, sides = QUICK if args.quick else FULL, texts()
    base, fits = Base.load(settings, args.seed), {}
    if not (args.chat and all((args.out / name).exists() for name in VOICES)):
        for name in VOICES:
            fits[name] = train(base, sides[name][0], f"The voice of {name}", args.seed)
            jlora.save(args.out / name, fits[name].tree, overwrite=True, base=settings.about, voice=name)
    # The base is one more voice: a fresh adapter changes nothing.
    voices = {"base": base.fresh} | {name: jlora.load(args.out / name, base.params) for name in VOICES}
    if args.chat:
        return chat(base, voices)

    rows = {name: windows(base.tokenizer, held_out) for name, (_, held_out) in sides.items()}
    rows = {name: x[np.linspace(0, len(x) - 1, HELD_OUT).astype(int)] for name, x in rows.items()}
    found = score(base, voices, rows)
    check_merged(base, voices, rows, found)
    ask(base, voices)
    draw(args.out / "voices.png", found)
    perplexity = {v: {f"perplexity, {VOICES[t]}": np.exp(found[v][t].mean()) for t in VOICES} for v in voices}
    table = [training.row("base", perplexity["base"])]
    table += [training.row(f"LoRA, {name}", perplexity[name], fits[name]) for name in VOICES]
    training.report(args, "Two voices of one base", f"{settings.about} on {' and '.join(VOICES.values())}", table, True)
    for text in VOICES:
        best = min(found, key=lambda voice: found[voice][text].mean())
        if best != text:
            raise RuntimeError(f"The text of {text} is likelier in the voice of {best}: nothing was learnt.")


if __name__ == "__main__":
    training.main(run, __doc__, __file__, flags={"chat": "talk to the adapters of an earlier run, or of a new one"})
