"""The arrays of a saved adapter, read from a folder that may be anyone's: what they take is bounded by what the description says.

Orbax writes them. They are not read with it: it follows links, waits for pipes, and unpacks whatever is there. Here every file is a
regular one that the description lists, and each chunk is unpacked only if it fits the array that it is a part of.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _files
from jlora._ocdbt import Damaged, Store
from jlora._text import counted
from jlora._zarr import MAX_SAID, Form, form_of, said_at

MAX_BYTES = 2**42
"""Of all arrays of an adapter together."""
_PER_ARRAY, _BESIDE = (
    32 * 1024,
    4 * 2**20,
)  # what the nodes of a store may take: for 500 chunks of an array, and for all of them


def sha256(file: Path) -> str:
    """The digest of a file, which is not in memory as a whole."""
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Arrays:
    """The arrays in a folder that orbax wrote. All but their contents is checked when this is made.

    Args:
        folder: The folder.
        files: Size and digest of each file in it.
        expected: Shape and dtype of each array by its name there, such as ``00000.a``.

    Raises:
        ValueError: a file is missing, damaged, not listed, a link or a pipe; or the arrays are not those that are expected.
    """

    def __init__(self, folder: Path, files: Mapping[str, Any], expected: Mapping[str, jax.ShapeDtypeStruct]):
        self._folder, self._expected = folder, expected
        total = sum(prod(x.shape) * x.dtype.itemsize for x in expected.values())
        if total > MAX_BYTES:
            raise ValueError(
                f"The adapter at {folder.parent} is to have {total:,} bytes; at most {MAX_BYTES:,} are read."
            )
        budget = min(_BESIDE + _PER_ARRAY * len(expected) + 2 * total, 2**31)
        check_files(folder, files, 16 * (_BESIDE + _PER_ARRAY * len(expected)) + 2 * total)
        try:
            self._store = Store(folder, {name: size for name, (size, _) in files.items()}, budget)
        except Damaged as error:
            raise self._damaged(error) from None
        self._forms = {name: self._form(name, x) for name, x in expected.items()}
        self._check_keys()

    def read(self, name: str, sharding: Any, what: str) -> jax.Array:
        """An array, placed as ``sharding`` says: each process reads what it holds. With ``None``, it is not bound to a device.

        Args:
            name: Of the array.
            sharding: Where it goes.
            what: The array in words, for messages.
        """
        like = self._expected[name]

        def part(index: Any) -> np.ndarray:
            return _files.check_finite(f"{what} at {self._folder.parent}", self._part(name, index))

        if sharding is None:
            return jnp.asarray(part((slice(None),) * len(like.shape)))
        return jax.make_array_from_callback(like.shape, sharding, part)

    def _part(self, name: str, index: Sequence[slice]) -> np.ndarray:
        form = self._forms[name]
        ranges = [s.indices(n)[:2] for s, n in zip(index, form.shape, strict=True)]
        try:
            return form.read(lambda key: self._store[f"{name}/{key}"], name, ranges)
        except Damaged as error:
            raise self._damaged(error) from None

    def _form(self, name: str, like: jax.ShapeDtypeStruct) -> Form:
        """How an array is stored; raises unless all else that is said of it is what was expected."""
        key = f"{name}/{said_at(2)}"
        if key not in self._store.values:
            raise self._unfit(f"{name} is missing")
        if self._store.size(key) > MAX_SAID:
            raise self._unfit(f"{name} is described by {self._store.size(key):,} bytes")
        form = form_of(self._store[key], 2)
        if form is None or form != Form(like.shape, np.dtype(like.dtype), form.chunk):
            said = _files.shown(self._store[key].decode("latin-1"), 300)
            raise self._unfit(f"{name} should be {like.shape} {like.dtype}, in a way that orbax writes\n  got: {said}")
        return form

    def _check_keys(self) -> None:
        """Raises unless the store has all chunks of what is expected, and nothing else."""
        count = sum(1 + prod(form.grid) for form in self._forms.values())
        if count > len(self._store.values):
            raise self._unfit(f"they have {counted(len(self._store.values), 'part')}, not {count:,}")
        keys = {f"{name}/{key}" for name, form in self._forms.items() for key in (said_at(2), *form.chunks())}
        other = sorted(keys ^ set(self._store.values))
        if other:
            what = "is missing" if other[0] in keys else "is not described"
            raise self._unfit(f"{_files.shown(other[0])} {what}")

    def _unfit(self, what: Any) -> ValueError:
        return ValueError(f"The arrays in {self._folder} do not fit their description: {what}.")

    def _damaged(self, what: Any) -> ValueError:
        return ValueError(f"The arrays in {self._folder} are damaged: {what}.\n  Copy or download the adapter again.")


def check_files(folder: Path, files: Mapping[str, Any], limit: int) -> None:
    """Raises unless a folder has the files that are listed, unchanged, and no others; what could take long comes last.

    Args:
        folder: The folder.
        files: By path in it, ``[size, sha256]``.
        limit: How many bytes all of them may have.
    """
    where = f"The adapter at {folder.parent} is damaged: the file {folder.name}/"
    for name, record in files.items():
        ok = isinstance(record, list) and len(record) == 2 and type(record[0]) is int and isinstance(record[1], str)
        if not ok or record[0] < 0:
            raise ValueError(f"{where}{_files.shown(name)} has the record {_files.shown(record)}.")
    sizes = _sizes(folder, files)
    for name, (size, _) in files.items():
        if name not in sizes:
            raise ValueError(f"{where}{_files.shown(name)} is missing.")
        if sizes[name] != size:
            raise ValueError(f"{where}{_files.shown(name)} has {counted(sizes[name], 'byte')}, not {size:,}.")
    if sum(sizes.values()) > limit:
        raise ValueError(
            f"The files in {folder} have {sum(sizes.values()):,} bytes; for the arrays that are described at most {limit:,} are read."
        )
    for name, (_, digest) in files.items():
        found = sha256(folder / name)
        if found != digest:
            raise ValueError(f"{where}{_files.shown(name)} has sha256 {found[:12]}…, not {_files.shown(digest)[:12]}….")


def _sizes(folder: Path, files: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of the files in a folder and below; raises at the first thing that is not a listed file or a folder of some."""
    folders = {str(parent) for name in files for parent in Path(name).parents}
    found: dict[str, int] = {}
    for name, about in entries_in(folder, lambda name: name in folders):
        check_plain(folder / name, about)
        if name not in files:
            raise ValueError(
                f"{folder / _files.shown(name)} is not one of the files that jlora.save wrote.\n"
                "  Remove it, or keep it outside of that folder."
            )
        found[name] = about.st_size
    return found


def entries_in(folder: Path, enter: Callable[[str], bool]) -> Iterator[tuple[str, os.stat_result]]:
    """What is in a folder and below, links not followed; folders of which ``enter`` says so are entered, and not among it."""
    left = [""]
    while left:
        at = left.pop()
        with os.scandir(folder / at) as entries:
            for entry in entries:
                name = f"{at}/{entry.name}" if at else entry.name
                about = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(about.st_mode) and enter(name):
                    left.append(name)
                else:
                    yield name, about


def check_plain(file: Path, about: os.stat_result) -> None:
    """Raises at a link, which may lead anywhere, and at what is neither a file nor a folder: reading a pipe never ends."""
    if stat.S_ISLNK(about.st_mode):
        raise ValueError(
            f"{_files.shown(file, 500)} is a symbolic link: what lies elsewhere is not read.\n"
            "  If the folder is your own, copy it with what its links lead to: cp -rL FOLDER COPY."
        )
    if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
        raise ValueError(f"{_files.shown(file, 500)} is not a regular file.")
