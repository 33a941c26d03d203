"""Renames that POSIX does not have: two names that are exchanged at once, and one that never replaces anything.

Linux and macOS have them, not on all file systems. Where they are missing the functions say so, and do nothing.
"""

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

_MISSING = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
"""What is answered where the system or the file system lacks it; some sandboxes refuse what they do not know with ``EPERM``."""


def exchange(one: Path, two: Path) -> bool:
    """Gives each the other's name in one step; ``False``, and nothing is done, where that cannot be."""
    return _renamed(one, two, {"linux": 2, "darwin": 2})  # RENAME_EXCHANGE, RENAME_SWAP


def rename_new(one: Path, two: Path) -> bool:
    """Renames ``one`` to ``two`` unless something is there, a ``FileExistsError``; ``False`` where that cannot be."""
    return _renamed(one, two, {"linux": 1, "darwin": 4})  # RENAME_NOREPLACE, RENAME_EXCL


def _renamed(one: Path, two: Path, flags: dict[str, int]) -> bool:
    call = _call()
    if call is None:
        return False
    if call(os.fsencode(one), os.fsencode(two), flags[sys.platform]) == 0:
        return True
    code = ctypes.get_errno()
    if code in _MISSING:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(two))


@functools.cache
def _call() -> Callable[[bytes, bytes, int], int] | None:
    """The system's function, if it has one."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        found = library.renameatx_np if sys.platform == "darwin" else library.renameat2
    except (OSError, AttributeError, TypeError):
        return None
    if sys.platform not in ("linux", "darwin"):
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    here = -2 if sys.platform == "darwin" else -100  # AT_FDCWD; the paths are absolute
    return lambda one, two, flags: found(here, one, here, two, flags)
