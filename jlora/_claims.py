"""Which saves are alive: each holds a lock on a small file of its own, which the system lets go when its process ends, however it ends.

Where a file system has no locks, the host and the process that are written in the file tell it; of another host's nothing is known then,
and it counts as alive.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def claim(file: Path) -> Iterator[None]:
    """Makes ``file`` and holds it for the time of the block; what is then still at its name is removed."""
    held = _made(file)
    try:
        yield
        file.unlink(missing_ok=True)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong before matters more, and the next save removes it
            file.unlink(missing_ok=True)
        raise
    finally:
        os.close(held)


def _made(file: Path) -> int:
    """A descriptor of the new file, locked."""
    while True:
        held = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with contextlib.suppress(OSError):  # where there are no locks
                _lock(held, wait=True)
            os.write(held, f"{socket.gethostname()} {os.getpid()}\n".encode())
            if _is_at(file, held):
                return held
        except BaseException:  # the disk may be full
            file.unlink(missing_ok=True)
            os.close(held)
            raise
        os.close(held)  # a save that sweeps was faster than the lock, and took it for a dead one's


def _is_at(file: Path, held: int) -> bool:
    try:
        return os.path.samestat(os.fstat(held), os.stat(file))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def unclaimed(file: Path) -> Iterator[bool]:
    """Whether nobody who lives holds ``file``, or it is not there; for the time of the block it stays so."""
    try:
        held = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    except OSError:  # another user's: not ours to judge
        yield False
        return
    try:
        yield _is_free(held)
    finally:
        os.close(held)


def _is_free(held: int) -> bool:
    try:
        _lock(held, wait=False)
    except BlockingIOError:
        return False
    except OSError:  # there are no locks
        host, _, process = os.pread(held, 1000, 0).decode(errors="replace").partition(" ")
        return host == socket.gethostname() and process.strip().isdigit() and not _is_alive(int(process))
    return True


def _lock(held: int, *, wait: bool) -> None:
    """Locks a file that is open."""
    try:
        import fcntl  # here: Windows has none
    except ImportError:
        raise OSError(errno.ENOSYS, "there are no locks") from None
    fcntl.flock(held, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
