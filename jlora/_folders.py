"""Folders written beside their name and moved to it when complete, and read whole while others do that.

``.name.<id>/`` is what is being written, ``.name.<id>.lock`` is held by who writes it, and ``.name.<id>.old/`` is the one before, for a
moment, where two names cannot be exchanged at once. What a killed save leaves of these, the next save of that name removes.
"""

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from jlora import _checksums, _claims
from jlora._files import read_json
from jlora._rename import exchange

_T = TypeVar("_T")
TRIES = 10  # of what another process may undo meanwhile


def sync_folder(path: Path) -> None:
    """Makes the names in a folder outlive a loss of power, where the file system can: some have no such thing, and say ``EINVAL``."""
    at = os.open(path, os.O_RDONLY)
    try:
        os.fsync(at)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(at)


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool, marks: Sequence[str], what: str) -> Iterator[Path]:
    """A folder to write into that becomes ``path`` once the block ends well; otherwise nothing at ``path`` changes.

    What is overwritten is what was written there of the same kind; other files and folders are in the new one too. Files of a kind that
    has checksums get them.

    Args:
        path: The final name.
        overwrite: Replace what is there, if it is of the same kind.
        marks: Names of files, one of which such a folder has: anything else is left alone.
        what: Such a folder in words, for messages.
    """

    def check() -> None:
        check_free(path, overwrite=overwrite, marks=marks, what=what)

    check()
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    check()  # again: the one before may be back
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    old = part.with_name(f"{part.name}.old")
    with _claims.claim(part.with_name(f"{part.name}.lock")):
        try:
            part.mkdir()
            yield part
            if re.fullmatch(_own(marks), _checksums.FILE):
                _checksums.write(part)
            check()
            _take_along(path, part, marks)
            sync_folder(part)
            _put(part, path, old, check, overwrite)
        except BaseException:
            _undo(path, part, old)
            raise
        try:
            sync_folder(path.parent)
        except OSError as error:
            raise OSError(
                f"{what[0].upper() + what[1:]} at {path} is the new one, but may not outlive a loss of power: {error}.\n"
                "  The one before is kept beside it until the next save."
            ) from error
        _undo(path, part, old)


def _undo(path: Path, part: Path, old: Path) -> None:
    """Removes what is beside ``path``; what was there before is there again if nothing else is."""
    if old.exists() and not path.exists():
        os.rename(old, path)
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)


def _put(new: Path, path: Path, old: Path, check: Callable[[], None], overwrite: bool) -> None:
    """Gives ``new`` the name ``path``; what was there has then that of ``new``, or ``old``. Others may do the same at the same time."""
    for left in reversed(range(TRIES)):
        try:
            if overwrite and path.exists() and any(path.iterdir()):
                if exchange(new, path):
                    return
                shutil.rmtree(old, ignore_errors=True)
                os.rename(path, old)
            os.rename(new, path)
            return
        except OSError as error:  # another save put its own there, or took away what was
            if not left or error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST) or not new.exists():
                raise
            check()


def _left_by_saves(path: Path) -> dict[str, list[Path]]:
    """What unfinished saves of ``path`` have beside it, by the names of what they were writing."""
    pattern = re.compile(rf"(\.{re.escape(path.name)}\.[0-9a-f]{{12}})(\.lock|\.old)?")
    found: dict[str, list[Path]] = {}
    for other in path.parent.iterdir() if path.parent.is_dir() else ():
        match = pattern.fullmatch(other.name)
        if match:
            found.setdefault(match[1], []).append(other)
    return found


def _sweep(path: Path) -> None:
    """Removes what killed saves of ``path`` left; if one was killed while nothing was there, the one before comes back."""
    for name in _left_by_saves(path):
        part, lock, old = path.with_name(name), path.with_name(f"{name}.lock"), path.with_name(f"{name}.old")
        with _claims.unclaimed(lock) as dead:
            if not dead:
                continue
            _undo(path, part, old)
            lock.unlink(missing_ok=True)


def standing(path: Path) -> Path:
    """Where the folder ``path`` is: there, or if a save was killed between two renames, where the one before is."""
    if os.path.lexists(path):
        return path
    return next((old for found in _left_by_saves(path).values() for old in found if old.suffix == ".old"), path)


def steady(path: Path, read: Callable[[Path], _T]) -> _T:
    """``read(path)`` of one folder, or file: if it was replaced meanwhile, it is read again.

    ``read`` opens all that it needs; what is open stays what it was, whatever then has its name.
    """
    for left in reversed(range(TRIES)):
        where = standing(path)
        with _holding(where) as same:
            try:
                found = read(where)
            except (OSError, ValueError):
                if same() or not left:
                    raise
            else:
                if same():
                    return found
    raise ValueError(
        f"{path} was replaced each of {TRIES} times while it was read.\n  Load it when nothing saves there, or a copy of it."
    )


@contextlib.contextmanager
def _holding(path: Path) -> Iterator[Callable[[], bool]]:
    """Tells whether ``path`` is still what it was, which is held open so that nothing else can be taken for it."""
    try:
        held = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # of a pipe nobody may ever open the other end
    except OSError:
        yield lambda: not os.path.lexists(path) and standing(path) == path
        return
    try:
        yield lambda: _is_same(held, path)
    finally:
        os.close(held)


def _is_same(held: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(held), os.stat(path))
    except OSError:
        return False


def check_free(path: Path, *, overwrite: bool, marks: Sequence[str], what: str) -> None:
    """Raises unless ``path`` is free, an empty folder, or may be overwritten, and there is, or can be, a folder to put it in."""
    file = next((p for p in path.parents if p.exists() and not p.is_dir()), None)
    if file is not None:
        raise NotADirectoryError(f"{path} cannot be written: {file} is a file, not a folder.\n  Choose another name.")
    if not path.exists() and not path.is_symlink():
        return
    if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        return
    if not path.is_dir() or path.is_symlink() or not any((path / mark).exists() for mark in marks):
        raise FileExistsError(f"{path} is not {what}: it is left alone.\n  Choose another name.")
    if not overwrite:
        raise FileExistsError(f"There is already {what} at {path}.\n  Choose another name, or say overwrite=True.")


_SUMS = re.escape(_checksums.FILE)
_MODEL = rf"{_SUMS}|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
CHECKPOINT = re.compile(
    r"_(CHECKPOINT_)?METADATA|_sharding|_strings\.json|array_metadatas|commit_success\.txt|d|descriptor|"
    r"manifest\.ocdbt|ocdbt\.process_\d+"
)
"""What orbax calls the files and folders of a checkpoint."""
_WITH: Mapping[str, str] = {
    "adapter_config.json": rf"{_SUMS}|adapter_config\.json|adapter_model\.(safetensors|bin)",
    "model.safetensors": _MODEL,
    "model.safetensors.index.json": _MODEL,
    "adapter.json": r"adapter\.json|arrays-[0-9a-f]{12}",
    "_METADATA": CHECKPOINT.pattern,
    "_CHECKPOINT_METADATA": CHECKPOINT.pattern,
}
"""By the mark of a folder, what belongs to it: if it stayed when the mark is overwritten, it would be read along, or be of no use."""


def _take_along(path: Path, new: Path, marks: Sequence[str]) -> None:
    """Puts into ``new`` what is in ``path`` and is neither written again nor of what is overwritten; ``path`` stays as it is."""
    own = re.compile(_own(marks))
    shards = _shards(path / "model.safetensors.index.json") if "model.safetensors.index.json" in marks else set()
    for other in path.iterdir() if path.exists() else ():
        to = new / other.name
        if own.fullmatch(other.name) or other.name in shards or to.exists():
            continue
        if other.is_dir() and not other.is_symlink():
            shutil.copytree(other, to, symlinks=True, copy_function=_link)
        else:
            _link(other, to)


def _own(marks: Sequence[str]) -> str:
    """A pattern of the names of what belongs to folders with these marks."""
    return "|".join(_WITH[mark] for mark in marks)


def _shards(index: Path) -> set[str]:
    """The files that the index of a model names, if it can be read."""
    try:
        return {x for x in map(str, read_json(index)["weight_map"].values()) if x.endswith(".safetensors")}
    except (FileNotFoundError, ValueError, KeyError, AttributeError):
        return set()


def _link(file: str | os.PathLike[str], to: str | os.PathLike[str]) -> None:
    """The same file under another name, or where there are no links a copy of it."""
    try:
        os.link(file, to, follow_symlinks=False)
    except OSError:
        shutil.copy2(file, to, follow_symlinks=False)
