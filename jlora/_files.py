"""Files of safetensors and JSON: read with suspicion, each opened once.

A file that comes from somewhere may be anything. Its header is read and checked, under a cap, before anything of its size is
allocated; nothing in it is used as a path, a pattern or code. What is written is the same byte for byte each time.
"""

import hashlib
import io
import json
import math
import os
import stat
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora._text import check_text, counted
from jlora._text import shown as shown

MAX_HEADER = 32 * 2**20
MAX_JSON = 16 * 2**20
MAX_DEPTH = 64
MAX_TENSORS = 100_000
MAX_VALUES = 12 * MAX_TENSORS  # in JSON: what a header needs of 100,000 tensors with four axes
FLOATS: Mapping[str, np.dtype] = {
    name: jnp.dtype(dtype)
    for name, dtype in {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}.items()
}
"""Dtypes of weights, by the name the format has for them."""
SPELLED: Mapping[np.dtype, str] = {dtype: name for name, dtype in FLOATS.items()}
INTEGERS: Mapping[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": "bool", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
        "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    }.items()
}  # fmt: skip
_OTHERS = {"C64": 64, "F4": 4, **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6)}
_OTHERS |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
BITS: Mapping[str, int] = {n: 8 * d.itemsize for n, d in {**FLOATS, **INTEGERS}.items()} | _OTHERS
"""All dtypes of the format, and the bits of one number."""
CHUNK = 16 * 2**20


class Tensor(NamedTuple):
    """What a header says of one tensor: where in the file it starts, and how many bytes it has."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def folder(path: Any) -> Path:
    """``path`` as an absolute path, ``~`` expanded."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"A folder is given by its path, which comes first.\n  got: {type(path).__name__}")
    return Path(os.path.abspath(os.path.expanduser(path)))


def safetensors() -> Any:
    """The library that writes the format."""
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError('safetensors is missing.\n  pip install "jlora[peft]"') from None
    return safetensors


def open_regular(file: Path, limit: float = math.inf) -> io.BufferedReader:
    """``file``, open; raises unless it is a regular file of at most ``limit`` bytes: reading a pipe or a device never ends."""
    try:
        held = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # nor does waiting for who writes to a pipe
    except OSError as error:
        raise FileNotFoundError(f"{file} cannot be read: {error.strerror}.") from None
    f = open(held, "rb")  # noqa: SIM115 (the caller closes it)
    try:
        about = os.fstat(held)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError(f"{file} is not a regular file.")
        if about.st_size > limit:
            raise ValueError(f"{file} has {about.st_size:,} bytes, more than the {limit:,} it may have.")
    except BaseException:
        f.close()
        raise
    return f


def read_json(file: Path, limit: int = MAX_JSON, *, digest: str = "") -> dict[str, Any]:
    """The object in a JSON file; ``digest`` is the SHA-256 that it has to have, if that is known."""
    with open_regular(file, limit) as f:
        raw = f.read(limit + 1)
    check_digest(file, hashlib.sha256(raw).hexdigest(), digest)
    _check_values(raw, str(file))
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds {type(found).__name__}, not an object.")
    if not is_shallow(found):
        raise ValueError(f"{file} is nested more than {MAX_DEPTH} levels deep.")
    return found


def check_digest(file: Path, found: str, wanted: str) -> None:
    """Raises if a file has another SHA-256 than was written down when it was saved."""
    if wanted and found != wanted:
        raise ValueError(
            f"{file} is not what was saved: its sha256 is {found[:12]}…, and {wanted[:12]}… in checksums.json beside it.\n"
            "  It was damaged: copy it again. If it was changed on purpose, remove checksums.json, and nothing is compared."
        )


def is_shallow(x: Any) -> bool:
    """Whether what was JSON has at most ``MAX_DEPTH`` levels: what is deeper, Python's own functions cannot go through."""
    level = [x]
    for _ in range(MAX_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [v for values in inner for v in values]
        if not level:
            return True
    return False


class Safetensors:
    """A safetensors file whose header was checked; tensors are read one by one, all of them of the file that was opened.

    The file stays open as long as this object lives: what then has its name does not matter.

    Args:
        file: The file.
        dtypes: Those it may hold: of an adapter floats; of a model whatever the format has.
        digest: The SHA-256 that it has to have, if that is known; compared before the first tensor is read.

    Attributes:
        file: The file.
        header: What it says of each tensor by name, in the order of names.
        metadata: What it says beside.
    """

    def __init__(self, file: Path, dtypes: Collection[str] = FLOATS, digest: str = ""):
        self.file = file
        self._f = open_regular(file)
        weakref.finalize(self, self._f.close)
        self._opened = self._state()
        self._digest = digest
        self._lock = threading.RLock()
        self.header, self.metadata = _header(file, self._f, self._opened[0], dtypes)

    def read(self, name: str) -> np.ndarray:
        """One tensor of floats or integers, in the dtype of the file."""
        found = self.header[name]
        dtype = FLOATS.get(found.dtype) or INTEGERS.get(found.dtype)
        if dtype is None:
            raise ValueError(f"'{shown(name)}' in {self.file} holds {found.dtype}, which is not read here.")
        x = np.empty(found.shape, dtype)
        to = x.reshape(-1).view(np.uint8).data
        done = 0
        for piece in self._pieces(found):
            to[done : done + len(piece)] = piece
            done += len(piece)
        return x

    def is_standing(self) -> bool:
        """Whether the file that is open still has its name."""
        try:
            return os.path.samestat(os.fstat(self._f.fileno()), os.stat(self.file))
        except OSError:
            return False

    def copy(self, name: str, to: BinaryIO) -> None:
        """Copies the contents of a tensor, whatever it holds."""
        for piece in self._pieces(self.header[name]):
            to.write(piece)

    def _pieces(self, found: Tensor) -> Iterator[bytes]:
        """The contents of a tensor, a few megabytes at a time; raises if the file is not what it was when it was opened."""
        with self._lock:
            self.check_digest()
            self._f.seek(found.start)
            left = found.size
            while left:
                piece = self._f.read(min(CHUNK, left))
                if not piece:
                    raise self._changed()
                yield piece
                left -= len(piece)
            self._check_unchanged()

    def check_digest(self) -> None:
        """Raises if the file is not what was saved, as far as that is known; reads all of it, once."""
        with self._lock:
            if self._digest:
                self._f.seek(0)
                found = hashlib.file_digest(self._f, "sha256").hexdigest()
                self._check_unchanged()
                check_digest(self.file, found, self._digest)
                self._digest = ""

    def _check_unchanged(self) -> None:
        if self._state() != self._opened:
            raise self._changed()

    def _changed(self) -> ValueError:
        return ValueError(f"{self.file} was changed while it was read.\n  Load it again when nothing writes to it.")

    def _state(self) -> tuple[int, int]:
        about = os.fstat(self._f.fileno())
        return about.st_size, about.st_mtime_ns


def _header(file: Path, f: BinaryIO, size: int, dtypes: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    length = int.from_bytes(f.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(
            f"{file} is no safetensors file, or was cut: {counted(size, 'byte')} cannot hold a header of {length:,}."
        )
    if length > MAX_HEADER:
        raise ValueError(f"The header of {file} has {length:,} bytes; at most {MAX_HEADER:,} are read.")
    raw = f.read(length)
    _check_values(raw, f"The header of {file}")
    try:
        found = json.loads(raw, object_pairs_hook=_once)
        metadata = dict(found.pop("__metadata__", None) or {})
        entries = {
            str(name): (str(x["dtype"]), tuple(x["shape"]), tuple(x["data_offsets"])) for name, x in found.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"The header of {file} is damaged: {type(error).__name__} {str(error)[:200]}.") from None
    if not 0 < len(entries) <= MAX_TENSORS:
        raise ValueError(f"{file} holds {counted(len(entries), 'tensor')}; 1 to {MAX_TENSORS:,} are read.")
    for name, entry in entries.items():
        check_text(name)
        _check_entry(file, name, dtypes, *entry)
    end, begin = 0, 8 + length
    for name, (dtype, shape, (start, stop)) in sorted(entries.items(), key=lambda item: item[1][2]):
        bits = math.prod(shape) * BITS[dtype]
        if start != end or 8 * (stop - start) != bits:
            raise ValueError(
                f"The header of {file} is damaged: '{shown(name)}' of {bits / 8:,.0f} bytes lies at {start:,} to {stop:,}, after {end:,}."
            )
        end = stop
    if end != size - begin:
        raise ValueError(
            f"{file} was cut or added to: its tensors take {counted(end, 'byte')}, there are {size - begin:,}."
        )
    tensors = {
        name: Tensor(dtype, shape, begin + start, stop - start)
        for name, (dtype, shape, (start, stop)) in sorted(entries.items())
    }
    return tensors, metadata


def _check_values(raw: bytes, what: str) -> None:
    """Raises if JSON may have too many values, of which each takes far more memory than its letters."""
    values = sum(map(raw.count, (b",", b"[", b"{")))
    if values > MAX_VALUES:
        raise ValueError(f"{what} has {values:,} values; at most {MAX_VALUES:,} are read.")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def _check_entry(
    file: Path, name: str, dtypes: Collection[str], dtype: str, shape: tuple[Any, ...], offsets: tuple[Any, ...]
) -> None:
    if dtype not in dtypes:
        raise ValueError(f"'{shown(name)}' in {file} holds {shown(dtype)}; here it may be {', '.join(sorted(dtypes))}.")
    numbers = (*shape, *offsets)
    if not all(type(x) is int and 0 <= x < 2**62 for x in numbers) or len(offsets) != 2 or len(shape) > 32:
        raise ValueError(f"The header of {file} is damaged: '{shown(name)}' has shape and offsets {shown(numbers)}.")


def check_finite(name: str, x: np.ndarray) -> np.ndarray:
    """``x``, if all of it is finite."""
    wide = x.astype(np.float32) if x.dtype.itemsize < 4 else x
    if not bool(np.isfinite(wide).all()):
        raise ValueError(f"'{shown(name)}' is not finite.")
    return x


def write_safetensors(file: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors; the same ones give the same bytes."""
    for name in tensors:
        check_text(name)
    ready = {name: np.asarray(x, order="C") for name, x in sorted(tensors.items())}  # scalars stay scalars
    if metadata is None:
        library = safetensors()
        try:
            library.numpy.save_file(ready, file, {"format": "pt"})
        except library.SafetensorError as error:  # so the library reports a full disk
            raise OSError(f"{file} could not be written: {error}") from error
    else:  # the library writes several entries in any order
        spelled = [Entry(name, SPELLED[x.dtype], x.shape, x.nbytes) for name, x in ready.items()]
        entries = sorted(spelled, key=lambda e: (-ready[e.name].itemsize, e.name))
        with open(file, "wb") as f:
            write_header(f, entries, metadata)
            for e in entries:
                f.write(ready[e.name].tobytes())
    _sync(file)


class Entry(NamedTuple):
    """A tensor that is to be written: its name, its dtype as the format has it, its shape and its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


def write_header(f: BinaryIO, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> None:
    """What stands before the contents of a file: the library writes one only from tensors that are all in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for e in entries:
        check_text(e.name)
        header[e.name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [start, start + e.size]}
        start += e.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    f.write(len(text).to_bytes(8, "little") + text)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes an object with its keys in order."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    _sync(file)


def _sync(file: Path) -> None:
    with open(file, "rb") as f:
        os.fsync(f.fileno())


def floats(x: np.ndarray, dtype: Any = None) -> np.ndarray:
    """``x`` in ``dtype``, by default at least fp32, which JAX has; fp64 only where JAX has it."""
    return x.astype(jax.dtypes.canonicalize_dtype(jnp.promote_types(jnp.float32, x.dtype)) if dtype is None else dtype)
