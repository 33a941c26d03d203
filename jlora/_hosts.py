"""What the processes of one job have to agree on before one of them writes for all. With one process nothing here does anything.

Every function is called by all processes, and raises on all of them or on none, so that nobody waits for one that has given up.
"""

import builtins
import json
from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import Any

import jax
import numpy as np

_SIZE = 4096  # bytes of one message: all processes have to send equally many


def count() -> int:
    """The number of processes."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def is_local(x: Any) -> bool:
    """Whether ``x`` is this process's own, one of several: not an array on a mesh of all processes."""
    return count() > 1 and getattr(x, "is_fully_addressable", True)


def spans(x: Any) -> bool:
    """Whether ``x`` is split over several processes, or held by all of them as one array."""
    if isinstance(x, jax.core.Tracer):
        return False
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding is not None and not x.sharding.is_fully_addressable
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def pieces(x: Any) -> list[np.ndarray]:
    """The parts of ``x`` that this process holds."""
    return [np.asarray(s.data) for s in x.addressable_shards] if isinstance(x, jax.Array) else [np.asarray(x)]


def together(check: Callable[[], None]) -> None:
    """Runs ``check`` on each process, and raises on all what the first of them raised that did."""
    mine, error = "", None
    try:
        check()
    except Exception as e:  # whatever it is, the others must not wait for this process
        mine, error = json.dumps([_builtin(e), str(e)]), e
    if count() == 1:
        if error is not None:
            raise error
        return
    said = _gather(mine)
    if error is not None:
        raise error
    for process, message in enumerate(said):
        if message:
            kind, text = json.loads(message)
            raise _kind(kind)(f"Process {process}: {text}")


def first(fn: Callable[[], Any]) -> Any:
    """``fn()`` of the first process, on every process; it must be JSON."""
    found: list[Any] = [None]

    def run() -> None:
        if is_first():
            found[0] = fn()

    together(run)
    return json.loads(_gather(json.dumps(found[0]))[0]) if count() > 1 else found[0]


def agree(what: str, parts: Iterable[Any]) -> None:
    """Raises on every process unless ``parts`` (strings, arrays) are the same on all of them."""
    if count() == 1:
        return
    digest = sha256()
    for part in parts:
        digest.update(
            part.encode("utf-8", "surrogatepass") if isinstance(part, str) else np.ascontiguousarray(part).tobytes()
        )
    said = _gather(digest.hexdigest())
    others = [process for process, d in enumerate(said) if d != said[0]]
    if others:
        raise ValueError(
            f"The processes disagree on {what}: process {others[0]} has another than process 0.\n"
            "  Every process must make it from the same key, rules and parameters, and call with the same arguments."
        )


def _builtin(error: Exception) -> str:
    """The name of the built-in exception that ``error`` is or comes from: what other processes, who may not know it, can raise."""
    name = next(c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins")
    return "RuntimeError" if name == "Exception" else name


def _kind(name: str) -> type[Exception]:
    """The built-in exception of a name."""
    found: type[Exception] = getattr(builtins, name)
    return ValueError if issubclass(found, UnicodeError) else found  # those are not made of a message alone


def _gather(message: str) -> list[str]:
    """What each process says."""
    from jax.experimental import multihost_utils  # here: one process needs none of it

    data = message.encode()
    if len(data) > _SIZE:  # an error of that length is cut, in text and not in the middle of its JSON
        kind, text = json.loads(message)
        data = json.dumps([kind, text[: _SIZE // 16]]).encode()  # a letter may take twelve bytes
    buffer = np.zeros(_SIZE, np.uint8)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    return [
        bytes(row).rstrip(b"\0").decode()
        for row in np.asarray(multihost_utils.process_allgather(buffer)).reshape(count(), _SIZE)
    ]
