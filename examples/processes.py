"""The processes of a job on several hosts: starting them on this machine, joining them, not waiting for ever for one that is gone."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time


def launch(args, argv: list[str]) -> int:
    """Starts ``--local`` processes of this script; returns the first exit code that is not 0."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={args.devices}",
    }
    args.out.mkdir(parents=True, exist_ok=True)
    children, logs = [], []
    for i in range(args.local):
        own = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(args.local), "--process", str(i)]
        log = (args.out / f"process-{i}.log").open("w") if i else None  # the first one talks to the user
        command = [sys.executable, "-u", sys.argv[0], *argv, *own]
        # In a session of their own: Ctrl-C reaches this process only, which passes it on to all alike.
        children.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))
        logs.append(log)
    (args.out / "processes.json").write_text(json.dumps([c.pid for c in children]))

    def stop(*_):
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    codes = [wait_all(children, args.timeout), *(c.returncode for c in children)]
    for log in logs[1:]:
        log.close()
    failed = [i for i, c in enumerate(children) if c.returncode not in (0, 143)]
    if failed:
        words = ", ".join(f"process {i} ended with {children[i].returncode}" for i in failed)
        print(
            f"{words}; see {args.out}/process-*.log."
            + ("" if 2 in codes else " The same command goes on from the last checkpoint."),
            file=sys.stderr,
        )
    return next((1 if code < 0 else code for code in codes if code), 0)


def wait_all(children: list[subprocess.Popen], timeout: float) -> int:
    """Waits for all; once one has failed, the others get ``timeout`` seconds and some more to find out by themselves."""
    deadline = None
    while any(child.poll() is None for child in children):
        if deadline is None and any(child.returncode not in (None, 0) for child in children):
            deadline = time.monotonic() + 2 * timeout + 10
        if deadline is not None and time.monotonic() > deadline:
            for child in children:
                child.kill()
            return 1
        time.sleep(0.1)
    return 0


def join(args) -> None:
    """Makes this process one of the job: as told, else as the cluster says, else alone."""
    import jax

    times = {"heartbeat_timeout_seconds": max(10, args.timeout), "initialization_timeout": max(60, args.timeout)}
    times["shutdown_timeout_seconds"] = args.timeout
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        keep_stdout_to_python()
    if args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.process, **times)
        return
    try:
        jax.distributed.initialize(**times)  # a TPU pod, SLURM, Open MPI, Kubernetes
    except ValueError:  # nothing of that kind is found: a job of one process, so that signals work as in one of many
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        jax.distributed.initialize(f"127.0.0.1:{port}", 1, 0, **times)


def keep_stdout_to_python() -> None:
    """Sends what libraries print on file descriptor 1 (gloo tells of every connection) to nowhere, and leaves ``print`` as it is."""
    sys.stdout.flush()
    mine = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout = os.fdopen(mine, "w", buffering=1)


class Watchdog:
    """Ends this process if nothing has been heard for some time: a collective waits for ever for a process that is gone."""

    def __init__(self, seconds: float):
        self.seconds, self.heard, self.doing = seconds, time.monotonic(), ""
        threading.Thread(target=self._watch, daemon=True).start()

    def hear(self, doing: str) -> None:
        """Says that what went before has ended, and what is done now; nothing at all: ``""``."""
        self.heard, self.doing = time.monotonic(), doing

    def _watch(self) -> None:
        while True:
            time.sleep(0.2)
            if self.doing and time.monotonic() - self.heard > self.seconds:
                print(
                    f"{self.doing} has not ended in {self.seconds:.0f} s: another process is gone, or --timeout is too short.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(3)
