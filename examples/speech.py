"""Teaches an English speech recogniser Italian: Whisper tiny.en (37M) on eight minutes of telephone prompts, on a CPU.

    python examples/speech.py            # LoRA on all linear weights and convolutions, and full fine-tuning
    python examples/speech.py --quick    # LoRA on eight English clips, to see that it works

Look at the word error rate on sentences that were held out together with all that resemble them, and at the sentences themselves:
the base writes what an English ear hears. The English column shows what learning Italian costs; an adapter can be taken off.
"""

import argparse
import dataclasses
import gzip
import itertools
import re
import textwrap
import unicodedata
import wave
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import training
import whisper
from fetch import fetch
from matplotlib.figure import Figure
from rich.table import Table
from training import console
from whisper import Vocabulary, Whisper

import jlora

WINDOW = 4.0  # seconds, in training; Whisper's own 30 would cost eight times as much
PATIENCE = 12.0  # seconds, of the base: where less silence follows, it says things twice
LENGTH = 30  # tokens of a window
DIGITS = {
    "en": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "it": ["zero", "uno", "due", "tre", "quattro", "cinque", "sei", "sette", "otto", "nove"],
}


@dataclasses.dataclass(frozen=True)
class Clip:
    """A recording at 16 kHz and what is said: lower case, no punctuation, digits read out."""

    name: str
    audio: np.ndarray
    text: str


# Data


def plain(text: str, language: str) -> str:
    """Text as a voice has it."""
    text = re.sub(r"\d", lambda digit: f" {DIGITS[language][int(digit[0])]} ", text.lower().replace("’", "'"))
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", text))


def read_clips(language: str) -> list[Clip]:
    """The clips that fit into a window and have a transcript."""
    (voice,) = fetch(f"sounds-{language}").iterdir()
    listing = fetch(f"sounds-{language}-text") / f"core-sounds-{language}.txt.gz"
    with gzip.open(listing, "rt", encoding="utf-8-sig", errors="replace") as lines:
        texts = dict(re.findall(r"^([\w/-]+): *(.+)$", lines.read(), re.MULTILINE))
    clips = []
    for path in sorted(voice.rglob("*.wav")):
        name = path.relative_to(voice).with_suffix("").as_posix()
        # Not remarks in brackets, sounds described, or text whose accented letters were lost: "pu? essere".
        if name not in texts or re.search(r"[\[(]|\bbeep\b|\?\s*\w", texts[name]):
            continue
        with wave.open(str(path)) as file:
            audio = np.frombuffer(file.readframes(file.getnframes()), np.int16) / 32768
        if len(audio) <= WINDOW * 8_000:
            audio = 2 * np.fft.irfft(np.fft.rfft(audio), 2 * len(audio))  # 8 kHz to 16 kHz
            clips.append(Clip(name, audio, plain(texts[name], language)))
    return clips


def is_sentence(clip: Clip) -> bool:
    """Whether a clip is fit to be tested on: three words or more, and not from the folders of digits and letters."""
    return "/" not in clip.name and len(clip.text.split()) >= 3


def split(clips: Sequence[Clip], language: str) -> tuple[list[Clip], list[Clip]]:
    """Clips to train on, and sentences held out that share half their words, digits aside, with none of those.

    Clips that share half are a family, and so are their families in turn. A third of the families with a sentence is held out.
    """
    bags = [{*clip.text.replace("'", " ").split()} - {*DIGITS[language]} for clip in clips]
    family = list(range(len(clips)))
    for i, j in itertools.combinations(range(len(clips)), 2):
        if family[i] != family[j] and 2 * len(bags[i] & bags[j]) >= len(bags[i] | bags[j]):
            family = [family[j] if f == family[i] else f for f in family]
    testable = sorted({f for f, clip in zip(family, clips, strict=True) if is_sentence(clip)})
    held_out = {*np.random.default_rng(0).permutation(testable)[: len(testable) // 3]}
    train = [clip for f, clip in zip(family, clips, strict=True) if f not in held_out]
    return train, [clip for f, clip in zip(family, clips, strict=True) if f in held_out and is_sentence(clip)]


def batches(
    clips: Sequence[Clip], vocabulary: Vocabulary, size: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches of features and tokens.

    A window holds a clip, and those that follow it in random order while they fit into a length drawn anew. So little of the
    compute is spent on silence, and yet the model meets any amount of it.
    """
    rng, order = np.random.default_rng(seed), (clips[i] for (i,) in training.shuffled(len(clips), 1, seed))
    following = next(order)

    def window() -> tuple[np.ndarray, list[int]]:
        nonlocal following
        room, audio, text = rng.uniform(0, WINDOW), np.zeros(0), ""
        while not len(audio) or len(audio) + len(following.audio) <= room * whisper.RATE:
            audio, text, following = np.append(audio, following.audio), f"{text} {following.text}".strip(), next(order)
        tokens = vocabulary.encode(text)[:LENGTH]
        return whisper.log_mel(audio, WINDOW), tokens + [vocabulary.end] * (LENGTH - len(tokens))

    while True:
        mel, tokens = zip(*(window() for _ in range(size)), strict=True)
        yield np.stack(mel), np.asarray(tokens)


# Scores


def bare(text: str, language: str) -> str:
    """What counts when texts are compared: as ``plain``, no accents, and what is elided is a word: ``l ultima``."""
    letters = unicodedata.normalize("NFKD", plain(text, language))
    return "".join(c for c in letters if not unicodedata.combining(c)).replace("'", " ")


def edits(found: Sequence, true: Sequence) -> int:
    """The fewest insertions, deletions and replacements that make one sequence the other."""
    row = list(range(len(true) + 1))
    for i, x in enumerate(found, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(true, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def error_rate(texts: Sequence[str], clips: Sequence[Clip], language: str, units: Callable = str.split) -> float:
    """Edits per word of the transcripts, in per cent; per character if ``units`` is ``list``."""
    pairs = [(units(bare(a, language)), units(bare(clip.text, language))) for a, clip in zip(texts, clips, strict=True)]
    return 100 * sum(edits(*pair) for pair in pairs) / sum(len(true) for _, true in pairs)


def transcribe(
    model: Whisper, params: dict, vocabulary: Vocabulary, clips: Sequence[Clip], window: float = WINDOW
) -> list[str]:
    """What the model writes for each clip."""
    mel = np.stack([whisper.log_mel(clip.audio, window) for clip in clips])

    def write(mel: np.ndarray) -> jax.Array:
        return whisper.greedy(model, params, vocabulary, mel, LENGTH)

    return [vocabulary.decode(tokens) for tokens in training.in_batches(write, min(16, len(clips)), mel)]


# The task


def loss_of(logits: jax.Array, tokens: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    """Mean cross-entropy of a text and its end; ``logits`` are those that follow ``tokens[:, :-1]``."""
    given = len(vocabulary.prompt)
    logits, target = logits[:, given - 1 :], tokens[:, given:]
    is_end = target == vocabulary.end
    wanted = jnp.cumsum(is_end, axis=1) <= is_end  # up to the first end, and not the padding after it
    return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean(where=wanted)


def fit(
    args: argparse.Namespace, label: str, loss: Callable, tree, base, clips, vocabulary, rate: float
) -> training.Fit:
    """Trains ``tree`` by ``loss(tree, base, mel, tokens)``, with Adam, a warm-up, and a cosine to zero."""
    size, steps = (2, 10) if args.quick else (8, 100)
    schedule = optax.warmup_cosine_decay_schedule(0, rate, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    data = batches(clips, vocabulary, size, args.seed)
    return training.fit(
        label, lambda tree, base, batch, key: loss(tree, base, *batch), tree, base, data, steps, optimizer, args.seed
    )


def check_merged(model: Whisper, params: dict, lora: dict, merged: dict, mel: np.ndarray, tokens: np.ndarray) -> None:
    """Raises unless the merged weights do what weights and adapter do."""
    factored, folded = (
        jax.jit(jlora.wrap(model.apply))(params, lora, mel, tokens),
        jax.jit(model.apply)(merged, mel, tokens),
    )
    training.check_merged(folded, factored)


def show(args: argparse.Namespace, clips: Sequence[Clip], before: Sequence[str], after: Sequence[str]) -> None:
    """Prints what was heard, and draws the longest clips with it."""
    table = Table(title="Held out" if not args.quick else "Trained on", title_justify="left")
    for column in ("said", "base", "LoRA"):
        table.add_column(column)
    for i in np.linspace(0, len(clips) - 1, min(10, len(clips))).astype(int):
        table.add_row(clips[i].text, before[i], after[i])
    console.print(table)
    longest = sorted(range(len(clips)), key=lambda i: len(clips[i].audio))[:-4:-1]
    figure = Figure(figsize=(8, 7), layout="constrained")
    for axes, i in zip(figure.subplots(len(longest), sharex=True), longest, strict=True):
        axes.imshow(whisper.log_mel(clips[i].audio, WINDOW).T, origin="lower", aspect="auto", extent=(0, WINDOW, 0, 80))
        base = textwrap.shorten(before[i], 90)
        axes.set_title(f"said: {clips[i].text}\nbase: {base}\nLoRA: {after[i]}", loc="left", fontsize=9)
        axes.set_ylabel("mel band")
    axes.set_xlabel("seconds")
    figure.savefig(args.out / "speech.png", dpi=150)


def run(args: argparse.Namespace) -> None:
    model, params, vocabulary = whisper.load()
    english = [clip for clip in read_clips("en") if is_sentence(clip)][::4]
    language = "en" if args.quick else "it"
    clips, held_out = (english[:8], english[:8]) if args.quick else split(read_clips("it"), "it")
    minutes = sum(len(clip.audio) for clip in clips) / whisper.RATE / 60
    console.print(f"{minutes:.0f} minutes to train on in {len(clips)} clips; {len(held_out)} sentences to test on.")

    def measure(params: dict, window: float = WINDOW) -> tuple[list[str], dict[str, float]]:
        texts = transcribe(model, params, vocabulary, held_out, window)
        values = {"WER %": error_rate(texts, held_out, language), "CER %": error_rate(texts, held_out, language, list)}
        if not args.quick:
            again = transcribe(model, params, vocabulary, english, window)
            values["English WER %"] = error_rate(again, english, "en")
        return texts, values

    with console.status("Transcribing with the base"):
        before, values = measure(params, WINDOW if args.quick else PATIENCE)
    rows = [training.row("base", values)]

    apply = jlora.wrap(model.apply)
    mel, tokens = next(batches(clips, vocabulary, 2, args.seed))
    sites = jlora.sites(model.apply, params, mel, tokens)
    lora = jlora.init(jax.random.key(args.seed), params, sites, jlora.LoRA(rank=8, alpha=16, targets="all-linear"))

    def lora_loss(lora, params, mel, tokens):
        return loss_of(apply(params, lora, mel, tokens[:, :-1]), tokens, vocabulary)

    def full_loss(params, _, mel, tokens):
        return loss_of(model.apply(params, mel, tokens[:, :-1]), tokens, vocabulary)

    adapted = fit(args, "LoRA", lora_loss, lora, params, clips, vocabulary, 2e-3)
    jlora.save(args.out / "adapter", adapted.tree, overwrite=True)
    merged = jlora.merge(params, jlora.load(args.out / "adapter", params))
    check_merged(model, params, adapted.tree, merged, mel, tokens)
    after, values = measure(merged)
    rows.append(training.row("LoRA rank 8", values, adapted))
    if not args.quick:
        full = fit(args, "full fine-tuning", full_loss, params, None, clips, vocabulary, 1e-4)
        rows.append(training.row("full fine-tuning", measure(full.tree)[1], full))

    show(args, held_out, before, after)
    about = f"Whisper tiny.en (37M) on telephone prompts, {'English' if args.quick else 'Italian'}"
    training.report(args, "Speech recognition", about, rows, lower_is_better=True)
    if not np.mean(adapted.losses[-3:]) < np.mean(adapted.losses[:3]) / 2:
        raise RuntimeError(f"The adapter learned nothing: losses {adapted.losses[0]:.2f} to {adapted.losses[-1]:.2f}.")


if __name__ == "__main__":
    training.main(run, __doc__, __file__)
