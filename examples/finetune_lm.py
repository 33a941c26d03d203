"""Adapts a language model to a text with jlora: SmolLM2-135M to Hamlet, in minutes, on a CPU.

    pip install -e ".[demo]"
    python examples/finetune_lm.py            # SmolLM2-135M-Instruct
    python examples/finetune_lm.py --quick    # a tiny model, in seconds

Ctrl-C saves; the same command goes on from there. Everything it makes is in ``--out``.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import assets
import jax
import jax.numpy as jnp
import llama
import numpy as np
import optax
import orbax.checkpoint as ocp
from command import Stop, positive
from fetch import FetchError
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import jlora

SAVE_EVERY = 10  # steps
EVAL_BATCH = 8
NEW_TOKENS = 64
console = Console(highlight=False, soft_wrap=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; what depends on ``--quick`` is filled in here."""
    parser = argparse.ArgumentParser(description="Adapts a language model to a text with jlora.")
    count, number = positive(int), positive(float)
    option = parser.add_argument
    option("--quick", action="store_true", help="adapt a model of 0.9M parameters instead of SmolLM2-135M")
    option("--steps", type=count, metavar="N", help="optimiser steps (default: 60; --quick: 100)")
    option("--rank", type=count, metavar="R", default=8, help="rank of each update (default: 8)")
    option("--alpha", type=number, metavar="A", default=16.0, help="updates are scaled by alpha/rank (default: 16)")
    option("--lr", type=number, metavar="X", help="first learning rate of a cosine (default: 2e-3; --quick: 1e-2)")
    option("--batch", type=count, metavar="N", help="windows of text a step (default: 4; --quick: 16)")
    option("--length", type=count, metavar="N", default=64, help="tokens a window (default: 64)")
    option("--seed", type=int, metavar="N", default=0, help="for the adapter and the order of the text (default: 0)")
    option("--text", type=Path, metavar="FILE", help="text to adapt to; its last tenth is held out (default: Hamlet)")
    option("--prompt", help="what to ask before and after (default: What is thy name?; --quick: HAMLET)")
    option("--out", type=Path, metavar="DIR", help="for results (default: runs/finetune_lm, or runs/finetune_lm_quick)")
    option("--fresh", action="store_true", help="discard the earlier run in --out and start again")
    option("--check", action="store_true", help="only load the adapter in --out, merge it and compare logits")
    args = parser.parse_args(argv)
    full = {"steps": 60, "lr": 2e-3, "batch": 4, "prompt": "What is thy name?", "out": Path("runs/finetune_lm")}
    quick = {"steps": 100, "lr": 1e-2, "batch": 16, "prompt": "HAMLET", "out": Path("runs/finetune_lm_quick")}
    for name, default in (quick if args.quick else full).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


# The text


def read_text(path: Path | None) -> str:
    """Returns the text to adapt to."""
    try:
        return path.read_text(encoding="utf-8") if path else assets.hamlet()
    except UnicodeDecodeError as error:
        raise Stop(f"{path} is not UTF-8 text: {error}.", 2) from None


def windows_of(tokens: list[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts tokens into rows of ``length`` inputs and the token after them; the last tenth of the rows is held out."""
    count = (len(tokens) - 1) // length
    if count < 10:
        raise Stop(f"The text is too short: {len(tokens)} tokens, at least {10 * length + 1} are needed.", 2)
    rows = np.asarray([tokens[i * length : (i + 1) * length + 1] for i in range(count)], np.int32)
    train, held_out = np.split(rows, [count - count // 10])
    return train, held_out


def batch_at(windows: np.ndarray, position: int, size: int, seed: int) -> np.ndarray:
    """Returns windows ``position`` to ``position + size`` of an endless stream, shuffled anew each time round."""
    picks = []
    for place in range(position, position + size):
        epoch, index = divmod(place, len(windows))
        picks.append(np.random.default_rng((seed, epoch)).permutation(len(windows))[index])
    return windows[picks]


# Computation: everything is jitted, with the base as an argument, so that it is never copied into a program


def token_losses(logits: jax.Array, windows: jax.Array) -> jax.Array:
    """Cross-entropy of each next token."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])


def perplexity(model: llama.Llama, params, windows: np.ndarray, label: str) -> float:
    """Returns the perplexity of ``windows``."""
    losses = jax.jit(lambda params, rows: token_losses(model.apply(params, rows[:, :-1]), rows).mean(axis=1))
    found = []
    with progress("{task.description}") as bar:
        for start in bar.track(range(0, len(windows), EVAL_BATCH), description=label):
            rows = windows[start : start + EVAL_BATCH]
            padded = np.resize(rows, (EVAL_BATCH, rows.shape[1]))  # repeats rows, so that one shape is compiled
            found.append(np.asarray(losses(params, padded))[: len(rows)])
    return float(np.exp(np.concatenate(found).mean()))


def train_step(apply, optimizer: optax.GradientTransformation):
    """Returns ``step(params, state, windows) -> (state, loss, whether all of it is finite)``."""

    @jax.jit
    def step(params, state, windows):
        def loss(lora):
            return token_losses(apply(params, lora, windows[:, :-1]), windows).mean()

        value, grads = jax.value_and_grad(loss)(state["lora"])
        updates, opt = optimizer.update(grads, state["opt"], state["lora"])
        lora = optax.apply_updates(state["lora"], updates)
        finite = jnp.isfinite(value) & jnp.isfinite(optax.global_norm(lora))
        return {"lora": lora, "opt": opt}, value, finite

    return step


# Training


@dataclasses.dataclass
class History:
    """What a checkpoint holds beside arrays."""

    before: float
    position: int = 0  # windows of the stream used so far
    losses: list[float] = dataclasses.field(default_factory=list)


def train(args, model, params, train_windows, held_out) -> tuple[dict, History]:
    """Trains an adapter, from the last checkpoint if there is one; returns it and the history."""
    sites = jlora.sites(model.apply, params, train_windows[:1, :-1])
    rule = jlora.LoRA(rank=args.rank, alpha=args.alpha, targets="all-linear")
    lora = jlora.init(jax.random.key(args.seed), params, sites, rule)
    optimizer = optax.adam(optax.cosine_decay_schedule(args.lr, args.steps))
    state = {"lora": lora, "opt": optimizer.init(lora)}
    console.print(jlora.summary(params, lora).splitlines()[-1])

    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager((args.out / "checkpoints").resolve(), options=options) as manager:
        if manager.latest_step() is None:
            history = History(before=perplexity(model, params, held_out, "Held-out perplexity of the base"))
        else:
            state, history = restore(manager, optimizer, params)
            console.print(f"[green]Resumed[/] {args.out} after step {len(history.losses)} of {args.steps}.")
        if len(history.losses) < args.steps:
            step = train_step(jlora.wrap(model.apply), optimizer)
            state = train_on(args, manager, step, params, state, history, train_windows)
    return state["lora"], history


def train_on(args, manager, step, params, state, history, windows):
    """Takes the remaining steps, saving as it goes, and when interrupted."""
    with console.status("Compiling the training step"):
        started = time.perf_counter()
        step = step.lower(params, state, batch_at(windows, 0, args.batch, args.seed)).compile()
        console.print(f"Compiled the training step in {time.perf_counter() - started:.1f} s.")
    first, started = len(history.losses), time.perf_counter()
    columns = "step", MofNCompleteColumn(), "loss {task.fields[loss]}", "{task.fields[rate]} tokens/s"
    with catch_interrupt() as interrupted, progress(*columns) as bar:
        task = bar.add_task("", total=args.steps, completed=first, loss="-", rate="-")
        for number in range(first + 1, args.steps + 1):
            batch = batch_at(windows, history.position, args.batch, args.seed)
            new_state, loss, finite = step(params, state, batch)
            if not finite:
                raise Stop(diverged(args, manager, number, float(loss)), 1)
            state = new_state
            history.losses.append(float(loss))
            history.position += args.batch
            rate = (number - first) * args.batch * args.length / (time.perf_counter() - started)
            shown = {"loss": f"{history.losses[-1]:.3f}", "rate": f"{rate:,.0f}"}
            bar.update(task, advance=1, **shown)
            if number % SAVE_EVERY == 0 or number == args.steps or interrupted.is_set():
                save(manager, state, history)
                if not console.is_terminal:
                    console.print(f"step {number}/{args.steps}  loss {shown['loss']}  {shown['rate']} tokens/s")
            if interrupted.is_set():
                manager.wait_until_finished()
                raise Stop(f"Interrupted: saved after step {number} of {args.steps}.\nTo go on: {same_command()}", 130)
    return state


def save(manager: ocp.CheckpointManager, state: dict, history: History) -> None:
    """Writes a checkpoint, in the background: the arrays, and what they mean."""
    about = ocp.args.JsonSave({"adapter": jlora.describe(state["lora"]), "history": dataclasses.asdict(history)})
    manager.save(len(history.losses), args=ocp.args.Composite(state=ocp.args.StandardSave(state), about=about))


def restore(manager: ocp.CheckpointManager, optimizer: optax.GradientTransformation, params) -> tuple[dict, History]:
    """Reads the last checkpoint; refuses one that was made for another base."""
    step = manager.latest_step()
    about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
    lora = jlora.restore_target(about["adapter"], params)
    abstract = ocp.args.StandardRestore({"lora": lora, "opt": jax.eval_shape(optimizer.init, lora)})
    state = manager.restore(step, args=ocp.args.Composite(state=abstract)).state
    return state, History(**about["history"])


def diverged(args, manager: ocp.CheckpointManager, number: int, loss: float) -> str:
    """Says where training broke, and what is left."""
    manager.wait_until_finished()
    what = "the update is not finite" if np.isfinite(loss) else f"the loss is {loss}"
    last = manager.latest_step()
    kept = f"The checkpoint after step {last} is kept in {args.out}." if last else "There was no checkpoint yet."
    return f"Stopped at step {number}: {what}. {kept}\nTry a smaller --lr than {args.lr:g}, with --fresh."


@contextlib.contextmanager
def catch_interrupt():
    """Turns the first Ctrl-C into an event, so that a step can end before the program; the second stops at once."""
    event = threading.Event()

    def handle(signum, frame):
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def same_command() -> str:
    """Returns the command that was typed, less ``--fresh``."""
    return shlex.join(["python", *(word for word in sys.argv if word != "--fresh")])


def progress(*columns) -> Progress:
    """Returns a progress bar with some columns of text and the time left."""
    columns = [TextColumn(column) if isinstance(column, str) else column for column in columns]
    # In a log, which is no terminal, a bar would leave nothing but empty lines.
    hidden = not console.is_terminal
    return Progress(*columns, BarColumn(), TimeRemainingColumn(), console=console, transient=True, disable=hidden)


# The run and its folder


def load(quick: bool):
    """Loads the model, checks it against an independent implementation, and says so."""
    with console.status("Loading the model"):
        name = "glassllm" if quick else "smollm2"
        model, params, tokenizer = assets.load_glassllm() if quick else assets.load_smollm2()
        source = "glassllm" if quick else assets.smollm2_file().name
        if source != "model.safetensors":
            error = assets.reference_error(name, model, params, tokenizer)
            if not error <= 1e-3:  # so that NaN fails too
                raise Stop(f"The logits of {source} differ from the reference by {error:.1e}.", 1)
            console.print(f"Loaded {source}: logits within {error:.0e} of an independent implementation.")
        else:
            console.print(f"Loaded {assets.SMOLLM2_HUB}.")
    return model, params, tokenizer, source


def open_run(args, source: str, text: str) -> dict | None:
    """Makes ``--out`` ready for these settings; returns the results if the run in it is finished.

    Raises:
        Stop: The folder holds a run with other settings.
    """
    settings = {name: getattr(args, name) for name in ("steps", "rank", "alpha", "lr", "batch", "length", "seed")}
    settings |= {"model": source, "text": hashlib.sha256(text.encode()).hexdigest()[:12]}
    file = args.out / "settings.json"
    if args.fresh and file.exists():  # so nothing goes that is not a run of ours
        for name in ("checkpoints", "adapter"):
            shutil.rmtree(args.out / name, ignore_errors=True)
        for name in ("settings.json", "results.json", "loss.png"):
            (args.out / name).unlink(missing_ok=True)
    if file.exists():
        earlier = json.loads(file.read_text())
        differences = [f"{k} {earlier.get(k)} (now {v})" for k, v in settings.items() if earlier.get(k) != v]
        if differences:
            raise Stop(
                f"{args.out} holds a run with other settings: {', '.join(differences)}.\n"
                "Use another --out, or --fresh to discard that run.",
                2,
            )
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)
    results = args.out / "results.json"
    return json.loads(results.read_text()) if results.exists() else None


def write_json(path: Path, value: dict) -> None:
    """Writes ``path`` so that it is as before or complete."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1), encoding="utf-8")
    part.replace(path)


def run(args) -> None:
    """Trains unless that is done, measures unless that is done, and shows the results."""
    text = read_text(args.text)
    model, params, tokenizer, source = load(args.quick)
    if args.length > model.config.max_length:
        raise Stop(f"--length {args.length} is more than the {model.config.max_length} tokens the model can see.", 2)
    train_windows, held_out = windows_of(tokenizer.encode(text).ids, args.length)
    results = open_run(args, source, text)
    if results is None:
        lora, history = train(args, model, params, train_windows, held_out)
        results = finish(args, model, params, lora, history, held_out)
    else:
        console.print(f"[green]{args.out} holds this run, finished.[/] Here are its results; --fresh trains again.")
    if args.prompt not in results["answers"]:
        lora = jlora.load(args.out / "adapter", params)
        with console.status("Generating"):
            prompt = args.prompt + "\n" if args.quick else assets.chat(args.prompt)
            pair = [answer(model, weights, tokenizer, prompt) for weights in (params, jlora.merge(params, lora))]
        results["answers"][args.prompt] = pair
        write_json(args.out / "results.json", results)
    show(args, results)


def finish(args, model, params, lora, history: History, held_out: np.ndarray) -> dict:
    """Saves the adapter, checks it from a new process, measures it and draws the losses."""
    jlora.save(args.out / "adapter", lora, overwrite=True, text=args.text.name if args.text else "Hamlet")
    with console.status("Loading the adapter in a new process and merging it"):
        command = [sys.executable, __file__, "--check", "--out", str(args.out), *(["--quick"] if args.quick else [])]
        # On the CPU: this process may hold all the memory of an accelerator.
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        checked = subprocess.run(command, capture_output=True, text=True, env=env)
    if checked.returncode != 0:
        raise Stop(f"The saved adapter failed its check.\n{checked.stdout}{checked.stderr}", 1)
    results = {
        "before": history.before,
        "after": perplexity(model, jlora.merge(params, lora), held_out, "Held-out perplexity, adapted"),
        "check": checked.stdout.strip().splitlines()[-1],
        "adapter_bytes": sum(file.stat().st_size for file in (args.out / "adapter").rglob("*") if file.is_file()),
        "base_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "answers": {},
    }
    plot(args.out / "loss.png", history.losses, results["before"], results["after"])
    return results


def check(args) -> None:
    """Loads the adapter from disk, merges it, and compares merged to factored logits."""
    model, params, tokenizer = assets.load_glassllm() if args.quick else assets.load_smollm2()
    lora = jlora.load(args.out / "adapter", params)
    tokens = jnp.asarray([tokenizer.encode("To be, or not to be: that is the question").ids])
    # In numpy, whose max of NaNs is NaN: compiled for a CPU it can be -inf, which would pass.
    factored = np.asarray(jax.jit(jlora.wrap(model.apply))(params, lora, tokens))
    merged = np.asarray(jax.jit(model.apply)(jlora.merge(params, lora), tokens))
    difference, largest = np.abs(merged - factored).max(), np.abs(factored).max()
    if not difference <= 1e-4 * largest:
        raise Stop(f"Merged and factored logits differ by {difference:.1e} (logits up to {largest:.0f}).", 1)
    print(f"merged and factored logits agree to {difference:.1e} (logits up to {largest:.0f})")


def answer(model: llama.Llama, params, tokenizer, prompt: str) -> str:
    """Returns the likeliest continuation of ``prompt``, up to the end of the turn."""
    tokens = tokenizer.encode(prompt).ids
    room = model.config.max_length - len(tokens)
    if room < 1:
        raise Stop(f"The prompt is too long: {len(tokens)} tokens, the model can see {model.config.max_length}.", 2)
    new = llama.greedy(model, params, jnp.asarray([tokens]), min(NEW_TOKENS, room))
    return tokenizer.decode(new[0].tolist(), skip_special_tokens=False).split("<|im_end|>")[0].strip()


def show(args, results: dict) -> None:
    """Prints the results."""
    table = Table(title=escape(args.prompt), title_justify="left", expand=True)
    table.add_column("base", ratio=1)
    table.add_column("adapted", ratio=1, style="cyan")
    table.add_row(*(escape(text) for text in results["answers"][args.prompt]))
    console.print(table)
    before, after = results["before"], results["after"]
    console.print(f"Held-out perplexity  {before:.1f} -> [bold]{after:.1f}[/]")
    adapter, base = results["adapter_bytes"], results["base_bytes"]
    console.print(f"Adapter              {adapter / 1e6:.1f} MB; the base is {base / 1e6:,.1f} MB (fp32)")
    console.print(f"In a new process     {results['check']}")
    console.print(f"Written to           {args.out}: adapter/, loss.png, results.json")


def plot(path: Path, losses: list[float], before: float, after: float) -> None:
    """Draws the loss of each step, smoothed too, and the held-out perplexities."""
    steps = np.arange(1, len(losses) + 1)
    weights = np.tril(0.9 ** np.subtract.outer(steps, steps).clip(0))  # an average of the steps so far, the latest most
    smooth = weights @ losses / weights.sum(axis=1)
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#b8cde0", linewidth=1, label="training, each step")
    axes.plot(steps, smooth, color="#1f4e79", linewidth=2.5, label="training, smoothed")
    for value, name, color in ((before, "base", "#7f8c8d"), (after, "adapted", "#c0392b")):
        axes.axhline(np.log(value), color=color, linewidth=1.5, linestyle="--", zorder=1)
        text = f"held out, {name}:\nperplexity {value:.1f}"
        axes.annotate(text, (1.01, np.log(value)), xycoords=axes.get_yaxis_transform(), va="center", color=color)
    axes.set(xlabel="step", ylabel="loss (nats per token)", xlim=(0, len(losses) + 1))
    axes.set_title(f"Perplexity on held-out text: {before:.1f} → {after:.1f}", loc="left", weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    args = parse(argv)
    try:
        check(args) if args.check else run(args)
    except Stop as stop:
        console.print(escape(str(stop)), style="yellow" if stop.code == 130 else "red")
        return stop.code
    except (FetchError, OSError) as error:
        console.print(escape(str(error)), style="red")
        return 1
    except KeyboardInterrupt:
        console.print(f"\nInterrupted. To go on: {escape(same_command())}", style="yellow")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
