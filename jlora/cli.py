"""The command line ``jlora``: adapters and models as folders, without a line of Python. Needs ``pip install "jlora[cli]"``.

This file only gets ready: the commands are in ``_cli_app.py``.
"""

import importlib.util
import logging
import os
import signal
import sys
import threading
import warnings
from typing import Any, NoReturn

NEEDED = ("typer", "rich")
REFUSED, INTERRUPTED, TERMINATED = 2, 128 + signal.SIGINT, 128 + signal.SIGTERM


def main() -> NoReturn:
    """Runs ``jlora`` with the arguments of the process, and exits with the code that docs/cli.md tells."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f'{" and ".join(missing)} missing.\n  pip install "jlora[cli]"', file=sys.stderr)
        sys.exit(REFUSED)
    _quiet()
    _on_cpu()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        from jlora._cli_app import app

        app(prog_name="jlora")
    except KeyboardInterrupt:  # before a command has begun
        print("interrupted: nothing is left half-written", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(0)


def _quiet() -> None:
    """What libraries say about themselves is not what was asked for."""
    if "--debug" not in sys.argv:
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)  # what went wrong is raised, and told once
        sys.excepthook = _of_the_command


def _of_the_command(*error: Any) -> None:
    """Prints an error, unless it is of a thread of the storage that still ran when another ended the command."""
    if threading.current_thread() is threading.main_thread():
        sys.__excepthook__(*error)


def _on_cpu() -> None:
    """A tool that reads and writes files takes no accelerator from who trains on it, unless it is told to."""
    if "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"
        if "jax" in sys.modules:  # it read the environment when it was imported
            import jax

            jax.config.update("jax_platforms", "cpu")


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(TERMINATED)  # unlike the signal's default, so that half-written folders are removed


if __name__ == "__main__":
    main()
