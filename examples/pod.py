"""Adapts a language model on any number of devices and hosts: one script for a laptop, a TPU pod, a SLURM job.

    pip install -e ".[pod]"
    python examples/pod.py --local 2               # see it work: two processes of four CPU devices each, on this machine
    python examples/pod.py                         # this process; under SLURM or on a TPU pod: all of them
    python examples/pod.py --coordinator HOST:PORT --processes N --process I     # elsewhere: once on each host

Parameters and adapters are split over a mesh (data, model); every process reads its own part of each batch. A job that was stopped, or
lost a process, goes on from its last complete checkpoint with the same command, on another mesh and with another number of processes
too. SIGTERM, which clusters send before they take a machine away, and Ctrl-C save first. Everything it makes is in ``--out``, which
all processes must see.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

from command import Stop, positive
from processes import Watchdog, join, launch

EVAL_ROWS = 32


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,  # the other arguments are handed to the processes as they are
        description="Adapts a language model to Hamlet on any number of devices and hosts.",
    )
    option = parser.add_argument
    option(
        "--model",
        choices=("glassllm", "smollm2"),
        default="glassllm",
        help="0.9M or 135M parameters (default: glassllm)",
    )
    option("--mesh", metavar="DxM", help="devices along data and model, such as 2x4 (default: all along data)")
    option("--steps", type=positive(int), default=60, metavar="N", help="optimiser steps (default: 60)")
    option(
        "--batch",
        type=positive(int),
        default=16,
        metavar="N",
        help="windows of text a step, of all hosts (default: 16)",
    )
    option("--length", type=positive(int), default=64, metavar="N", help="tokens a window (default: 64)")
    option("--rank", type=positive(int), default=8, metavar="R", help="rank of each update (default: 8)")
    option(
        "--lr", type=positive(float), default=1e-2, metavar="X", help="first learning rate of a cosine (default: 1e-2)"
    )
    option("--seed", type=int, default=0, metavar="N", help="for the adapter and the order of the text (default: 0)")
    option("--save-every", type=positive(int), default=10, metavar="N", help="steps between checkpoints (default: 10)")
    option(
        "--out",
        type=Path,
        default=Path("runs/pod"),
        metavar="DIR",
        help="for results, seen by all hosts (default: runs/pod)",
    )
    option(
        "--timeout",
        type=positive(int),
        default=60,
        metavar="S",
        help="seconds a step or a save may take before this process gives the others up (default: 60)",
    )
    option("--local", type=positive(int), metavar="N", help="start N processes on this machine")
    option(
        "--devices",
        type=positive(int),
        default=4,
        metavar="N",
        help="CPU devices of each process of --local (default: 4)",
    )
    option("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    option("--processes", type=positive(int), metavar="N", help="how many there are")
    option("--process", type=int, metavar="I", help="which this is, from 0")
    args = parser.parse_args(argv)
    if args.mesh and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", args.mesh):
        parser.error(f"--mesh must look like 2x4, got {args.mesh!r}")
    explicit = [x is not None for x in (args.coordinator, args.processes, args.process)]
    if any(explicit) and not all(explicit):
        parser.error("--coordinator, --processes and --process go together")
    if args.local and args.process is not None:
        parser.error("--local starts the processes, and gives each its --process: say one of them")
    if args.process is not None and not 0 <= args.process < args.processes:
        parser.error(f"--process is from 0 to {args.processes - 1}, got {args.process}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out} cannot be made: {error.strerror}")
    return args


# JAX is imported inside functions: a process joins the job first.


@dataclasses.dataclass
class Job:
    """What every part of the training needs."""

    args: Any
    mesh: Any
    model: Any
    params: Any
    watchdog: Watchdog

    @property
    def leads(self) -> bool:
        """Whether this process talks to the user."""
        import jax

        return jax.process_index() == 0

    def say(self, text: str) -> None:
        """Prints, on one process."""
        if self.leads:
            print(text, flush=True)


def make_mesh(text: str | None):
    """The mesh, with automatic axes: the compiler splits what the model leaves open."""
    import jax

    count = jax.device_count()
    shape = tuple(map(int, text.split("x"))) if text else (count, 1)
    if shape[0] * shape[1] != count:
        raise Stop(f"--mesh {text} needs {shape[0] * shape[1]} devices, there are {count}.", 2)
    return jax.make_mesh(shape, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def place(params, mesh):
    """Splits the base: products over both mesh axes, the embedding over its rows; each process keeps its own parts only."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    specs = {
        r".*/(query|key|value|gate|up)/kernel": ("data", "model"),
        r".*/(out|down)/kernel": ("model", "data"),
        r".*/embedding": ("model", "data"),
    }

    def put(keys, leaf):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        wanted = next((spec for pattern, spec in specs.items() if re.fullmatch(pattern, path)), ())
        # What the devices do not divide is whole on each of them.
        spec = [axis if n % mesh.shape[axis] == 0 else None for n, axis in zip(leaf.shape, wanted, strict=False)]
        host = np.asarray(leaf)
        return jax.make_array_from_callback(
            host.shape, NamedSharding(mesh, PartitionSpec(*spec)), lambda part: host[part]
        )

    return jax.tree_util.tree_map_with_path(put, params)


def batches(job: Job, windows):
    """This process's part of an endless stream of batches, and the function that makes one array of all parts.

    Batch k is the same for any number of processes: the stream is cut into blocks of as many windows as a process needs, and each takes its
    own. So its position is the number of steps, wherever the job goes on.
    """
    import grain
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    args = job.args
    shape = (args.batch, windows.shape[1])
    sharding = NamedSharding(job.mesh, PartitionSpec("data"))
    if args.batch % job.mesh.shape["data"]:
        raise Stop(f"--batch {args.batch} does not divide among the {job.mesh.shape['data']} devices along data.", 2)
    mine = [rows[0].indices(args.batch)[:2] for rows in sharding.addressable_devices_indices_map(shape).values()]
    first, last = min(start for start, _ in mine), max(stop for _, stop in mine)
    if first % (last - first) or args.batch % (last - first):
        raise Stop(
            f"The mesh {'x'.join(map(str, job.mesh.devices.shape))} cuts the batch where no process begins: rows {first} to {last} "
            "are here.\n  Choose one whose rows are whole processes, or several to each.",
            2,
        )
    stream = grain.MapDataset.source(windows).seed(args.seed).shuffle().repeat().batch(last - first)
    stream = stream[first // (last - first) :: args.batch // (last - first)].to_iter_dataset()
    return iter(stream), lambda local: jax.make_array_from_process_local_data(sharding, local, shape)


def token_losses(logits, windows):
    """Cross-entropy of each next token."""
    import optax

    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])


def perplexity(job: Job, params, windows) -> float:
    """Perplexity of ``windows``, over all devices."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    sharding = NamedSharding(job.mesh, PartitionSpec("data"))
    loss = jax.jit(
        lambda p, rows, real: (token_losses(job.model.apply(p, rows[:, :-1]), rows).mean(axis=1) * real).sum()
    )
    size = -(-EVAL_ROWS // job.mesh.shape["data"]) * job.mesh.shape["data"]
    total = 0.0
    for start in range(0, len(windows), size):
        rows = np.resize(
            windows[start : start + size], (size, windows.shape[1])
        )  # repeats rows, so that one shape is compiled
        real = (np.arange(size) < len(windows) - start).astype(np.float32)
        put = [jax.make_array_from_callback(x.shape, sharding, lambda part, x=x: x[part]) for x in (rows, real)]
        total += float(loss(params, *put))
    return float(np.exp(total / len(windows)))


def train_step(job: Job, optimizer, where):
    """Returns ``step(params, state, windows) -> (state, loss)``; the loss is the mean over all hosts."""
    import jax
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    import jlora

    apply = jlora.wrap(job.model.apply)

    def step(params, state, windows):
        def loss(lora):
            return token_losses(apply(params, lora, windows[:, :-1]), windows).mean()

        value, grads = jax.value_and_grad(loss)(state["lora"])
        updates, opt = optimizer.update(grads, state["opt"], state["lora"])
        return {"lora": optax.apply_updates(state["lora"], updates), "opt": opt}, value

    return jax.jit(step, out_shardings=(where, NamedSharding(job.mesh, PartitionSpec())), donate_argnums=1)


def fresh(job: Job, windows):
    """The state before the first step, its shardings and the optimiser: all of it made where it belongs."""
    import jax
    import optax

    import jlora

    sites = jlora.sites(job.model.apply, job.params, windows[:2, :-1])
    rule = jlora.LoRA(rank=job.args.rank, alpha=2 * job.args.rank)
    try:
        lora = jlora.init(jax.random.key(job.args.seed), job.params, sites, rule)
    except ValueError as error:  # a rank that is too high
        raise Stop(str(error), 2) from None
    optimizer = optax.adam(optax.cosine_decay_schedule(job.args.lr, job.args.steps))
    where = {"lora": jlora.shardings(lora, job.params)}
    where["opt"] = jlora.shardings(jax.eval_shape(optimizer.init, lora), job.params)
    return {"lora": lora, "opt": jax.jit(optimizer.init, out_shardings=where["opt"])(lora)}, where, optimizer


def open_manager(args):
    """The checkpoints: written in the background by all processes, complete or not there."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(
        max_to_keep=2,
        cleanup_tmp_directories=True,  # what a killed save left
        async_options=ocp.AsyncOptions(timeout_secs=args.timeout),
    )
    return ocp.CheckpointManager((args.out / "checkpoints").resolve(), options=options)


def save(manager, step: int, state, about: dict) -> None:
    """Starts to write a checkpoint: arrays, what they mean, and where the data stands."""
    import orbax.checkpoint as ocp

    import jlora

    about = about | {"adapter": jlora.describe(state["lora"])}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
    manager.save(step, args=args, force=True)


def restore(manager, optimizer, params):
    """Reads the last complete checkpoint onto this job's mesh, whatever mesh it was written on."""
    import jax
    import orbax.checkpoint as ocp

    import jlora

    step = manager.latest_step()
    about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
    lora = jlora.restore_target(about["adapter"], params)  # refuses another base
    target = {"lora": lora, "opt": jax.eval_shape(optimizer.init, lora)}
    where = {"lora": jlora.shardings(lora, params), "opt": jlora.shardings(target["opt"], params)}
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), target, where)
    return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))).state, about


def train(job: Job, windows, held_out) -> tuple[Any, dict]:
    """Trains from the last checkpoint if there is one; returns the state and what was written down on the way."""
    state, where, optimizer = fresh(job, windows)
    stream, gather = batches(job, windows)
    with contextlib.closing(open_manager(job.args)) as manager:
        done = manager.latest_step() or 0
        about = {"losses": [], "settings": settings(job.args)}
        if done:
            job.watchdog.hear("restoring the checkpoint")
            state, about = restore(manager, optimizer, job.params)
            check_settings(job.args, about["settings"])
            stream.set_state(about["data"])
            job.say(f"Resumed {job.args.out} after step {done} of {job.args.steps}.")
        else:
            about["before"] = perplexity(job, job.params, held_out)
        job.watchdog.hear("")
        local = next(stream)
        step = train_step(job, optimizer, where).lower(job.params, state, gather(local)).compile()
        return run_steps(job, manager, step, state, about, stream, gather, local, done)


def run_steps(job: Job, manager, step, state, about, stream, gather, local, done):
    """Takes the remaining steps, with a bar on one process, and saves as it goes."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    args = job.args
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not job.leads or not sys.stdout.isatty(), transient=True) as bar:
        task = bar.add_task("", total=args.steps, completed=done, loss="-")
        for number in range(done + 1, args.steps + 1):
            job.watchdog.hear(f"step {number}")
            state, loss = step(job.params, state, gather(local))
            about["losses"].append(float(loss))
            about["data"] = stream.get_state()
            bar.update(task, advance=1, loss=f"{about['losses'][-1]:.3f}")
            # Every process gets the same answer for the same step, however far apart their signals came.
            preempted = manager.reached_preemption(number)
            if number % args.save_every == 0 or number == args.steps or preempted:
                job.watchdog.hear(f"the save after step {number}")
                save(manager, number, state, about)
                if not sys.stdout.isatty():
                    job.say(f"step {number}/{args.steps}  loss {about['losses'][-1]:.3f}")
            if preempted:
                manager.wait_until_finished()
                job.watchdog.hear("")
                raise Stop(
                    f"Stopped by a signal: saved after step {number} of {args.steps}. The same command goes on.", 143
                )
            if number < args.steps:
                local = next(stream)
        job.watchdog.hear("the last save")
        manager.wait_until_finished()
        job.watchdog.hear("")
    return state, about


def settings(args) -> dict:
    """What must be the same for a run to go on; mesh and processes need not be."""
    return {name: getattr(args, name) for name in ("model", "steps", "batch", "length", "rank", "lr", "seed")}


def check_settings(args, earlier: dict) -> None:
    """Raises if the checkpoint in ``--out`` belongs to a run with other settings."""
    now = settings(args)
    changed = [f"{name} {earlier.get(name)} (now {value})" for name, value in now.items() if earlier.get(name) != value]
    if changed:
        raise Stop(f"{args.out} holds a run with other settings: {', '.join(changed)}.\nUse another --out.", 2)


def run(args) -> None:
    """The job of one process."""
    join(args)
    import assets
    import jax
    import numpy as np

    import jlora

    mesh = make_mesh(args.mesh)
    load = assets.load_glassllm if args.model == "glassllm" else assets.load_smollm2
    model, params, tokenizer = load()
    job = Job(args, mesh, model, place(params, mesh), Watchdog(args.timeout))
    shape = "x".join(str(n) for n in mesh.shape.values())
    job.say(
        f"Processes: {jax.process_count()}; devices: {jax.device_count()} ({jax.devices()[0].platform}); mesh {shape} (data x model)."
    )
    tokens = tokenizer.encode(assets.hamlet()).ids
    rows = np.asarray(
        [tokens[i : i + args.length + 1] for i in range(0, len(tokens) - args.length, args.length)], np.int32
    )
    if len(rows) < 20:
        raise Stop(f"--length {args.length} is too long: the text has {len(tokens)} tokens, 20 windows are needed.", 2)
    windows, held_out = np.split(rows, [len(rows) - len(rows) // 10])
    state, about = train(job, windows, held_out)
    after = perplexity(job, jlora.merge(job.params, state["lora"]), held_out)
    job.watchdog.hear("saving the adapter")
    jlora.save(args.out / "adapter", state["lora"], overwrite=True, text="Hamlet")
    job.watchdog.hear("")
    if job.leads:
        results = {"before": about["before"], "after": after, "losses": about["losses"], "mesh": shape}
        (args.out / "results.json").write_text(json.dumps(results | {"processes": jax.process_count()}, indent=1))
        print(jlora.summary(job.params, state["lora"]).splitlines()[-1])
        print(
            f"Held-out perplexity  {about['before']:.1f} -> {after:.1f}\nWritten to           {args.out}: adapter/, results.json"
        )
    jax.distributed.shutdown()


def main(argv: list[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.local:
        at = argv.index("--local") if "--local" in argv else None
        rest = argv[:at] + argv[at + 2 :] if at is not None else [a for a in argv if not a.startswith("--local=")]
        return launch(args, rest)
    signal.signal(
        signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    )  # Ctrl-C asks for the same as a cluster does
    try:
        run(args)
    except Stop as stop:
        print(stop, file=sys.stderr)
        return stop.code
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code)
