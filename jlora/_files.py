"""Folders of safetensors: read with suspicion, written beside and moved into place when complete.

A file that comes from somewhere may be anything. Its header is read and checked, under a cap, before anything of its size is
allocated; nothing in it is used as a path, a pattern or code. What is written is the same byte for byte each time.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora._text import check_text
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


def check_regular(file: Path, limit: float = math.inf) -> int:
    """The size of ``file``; raises unless it is a regular file of at most ``limit`` bytes: reading a pipe or a device never ends."""
    try:
        about = file.stat()
    except OSError as error:
        raise FileNotFoundError(f"{file} cannot be read: {error.strerror}.") from None
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{file} is not a regular file.")
    if about.st_size > limit:
        raise ValueError(f"{file} has {about.st_size:,} bytes, more than the {limit:,} it may have.")
    return about.st_size


def read_json(file: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """The object in a JSON file."""
    check_regular(file, limit)
    raw = file.read_bytes()
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
    """A safetensors file whose header was checked; tensors are read one by one.

    Args:
        file: The file.
        dtypes: Those it may hold: of an adapter floats; of a model whatever the format has.

    Attributes:
        file: The file.
        header: What it says of each tensor by name, in the order of names.
    """

    def __init__(self, file: Path, dtypes: Collection[str] = FLOATS):
        self.file = file
        self.header = _header(file, dtypes)

    def read(self, name: str) -> np.ndarray:
        """One tensor of floats or integers, in the dtype of the file."""
        found = self.header[name]
        dtype = FLOATS.get(found.dtype) or INTEGERS.get(found.dtype)
        if dtype is None:
            raise ValueError(f"'{shown(name)}' in {self.file} holds {found.dtype}, which is not read here.")
        x = np.fromfile(self.file, dtype, found.size // dtype.itemsize, offset=found.start)
        if x.nbytes != found.size:
            raise self._cut()
        return x.reshape(found.shape)

    def copy(self, name: str, to: BinaryIO) -> None:
        """Copies the contents of a tensor, whatever it holds."""
        found = self.header[name]
        left = found.size
        with open(self.file, "rb") as f:
            f.seek(found.start)
            while left:
                piece = f.read(min(CHUNK, left))
                if not piece:
                    raise self._cut()
                to.write(piece)
                left -= len(piece)

    def _cut(self) -> ValueError:
        return ValueError(f"{self.file} is damaged: it was cut while it was read.")


def _header(file: Path, dtypes: Collection[str]) -> dict[str, Tensor]:
    size = check_regular(file)
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{file} is no safetensors file, or was cut: {size} bytes cannot hold a header of {length:,}."
            )
        if length > MAX_HEADER:
            raise ValueError(f"The header of {file} has {length:,} bytes; at most {MAX_HEADER:,} are read.")
        raw = f.read(length)
    _check_values(raw, f"The header of {file}")
    try:
        found = json.loads(raw, object_pairs_hook=_once)
        found.pop("__metadata__", None)
        entries = {
            str(name): (str(x["dtype"]), tuple(x["shape"]), tuple(x["data_offsets"])) for name, x in found.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"The header of {file} is damaged: {type(error).__name__} {str(error)[:200]}.") from None
    if not 0 < len(entries) <= MAX_TENSORS:
        raise ValueError(f"{file} holds {len(entries):,} tensors; 1 to {MAX_TENSORS:,} are read.")
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
        raise ValueError(f"{file} was cut or added to: its tensors take {end:,} bytes, there are {size - begin:,}.")
    return {
        name: Tensor(dtype, shape, begin + start, stop - start)
        for name, (dtype, shape, (start, stop)) in sorted(entries.items())
    }


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


def write_safetensors(file: Path, tensors: Mapping[str, Any]) -> None:
    """Writes tensors; the same ones give the same bytes."""
    for name in tensors:
        check_text(name)
    ready = {name: np.asarray(x, order="C") for name, x in sorted(tensors.items())}  # scalars stay scalars
    safetensors().numpy.save_file(ready, file, {"format": "pt"})
    _sync(file)


class Entry(NamedTuple):
    """A tensor that is to be written: its name, its dtype as the format has it, its shape and its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


def write_header(f: BinaryIO, entries: Iterable[Entry]) -> None:
    """What stands before the contents of a file: the library writes one only from tensors that are all in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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

    What is overwritten is what was written there of the same kind; other files and folders are in the new one too.

    Args:
        path: The final name.
        overwrite: Replace what is there, if it is of the same kind.
        marks: Names of files, one of which such a folder has: anything else is left alone.
        what: Such a folder in words, for messages.
    """
    check_free(path, overwrite=overwrite, marks=marks, what=what)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    old = part.with_name(f"{part.name}.old")
    try:
        part.mkdir()
        yield part
        check_free(path, overwrite=overwrite, marks=marks, what=what)
        _take_along(path, part, marks)
        _exchange(part, path, old)
    finally:  # wherever it was interrupted
        if old.exists() and not path.exists():
            os.rename(old, path)
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)


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


def _exchange(new: Path, path: Path, old: Path) -> None:
    if path.exists():
        os.rename(path, old)
    os.rename(new, path)


_MODEL = r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
_CHECKPOINT = (
    r"_(CHECKPOINT_)?METADATA|_sharding|_strings\.json|array_metadatas|commit_success\.txt|d|descriptor|"
    r"manifest\.ocdbt|ocdbt\.process_\d+"
)
_WITH: Mapping[str, str] = {
    "adapter_config.json": r"adapter_config\.json|adapter_model\.(safetensors|bin)",
    "model.safetensors": _MODEL,
    "model.safetensors.index.json": _MODEL,
    "adapter.json": r"adapter\.json|arrays-[0-9a-f]{12}",
    "_METADATA": _CHECKPOINT,
    "_CHECKPOINT_METADATA": _CHECKPOINT,
}
"""By the mark of a folder, what belongs to it: if it stayed when the mark is overwritten, it would be read along, or be of no use."""


def _take_along(path: Path, new: Path, marks: Sequence[str]) -> None:
    """Puts into ``new`` what is in ``path`` and is neither written again nor of what is overwritten; ``path`` stays as it is."""
    own = re.compile("|".join(_WITH[mark] for mark in marks))
    shards = _shards(path / "model.safetensors.index.json") if "model.safetensors.index.json" in marks else set()
    for other in path.iterdir() if path.exists() else ():
        to = new / other.name
        if own.fullmatch(other.name) or other.name in shards or to.exists():
            continue
        if other.is_dir() and not other.is_symlink():
            shutil.copytree(other, to, symlinks=True, copy_function=_link)
        else:
            _link(other, to)


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


def floats(x: np.ndarray, dtype: Any = None) -> np.ndarray:
    """``x`` in ``dtype``, by default at least fp32, which JAX has; fp64 only where JAX has it."""
    return x.astype(jax.dtypes.canonicalize_dtype(jnp.promote_types(jnp.float32, x.dtype)) if dtype is None else dtype)
