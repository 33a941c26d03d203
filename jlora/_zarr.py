"""Arrays as zarr has them, in the forms that orbax writes: what is said of one is checked, and a chunk is unpacked only if it fits.

TensorStore unpacks. It is given what was checked, in memory, and never a path.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil, prod
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora._ocdbt import Damaged, frame_of
from jlora._text import counted

MAX_SAID = 2**14
"""Bytes of what is said of one array."""
_NAMES = "bool int2 int4 int8 int16 int32 int64 uint2 uint4 uint8 uint16 uint32 uint64 float16 bfloat16 float32 float64"
_NAMES += " complex64 complex128 float4_e2m1fn float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz"
_NAMES += " float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
DTYPES: Mapping[str, np.dtype] = {name: jnp.dtype(name) for name in _NAMES.split() if hasattr(jnp, name)}
"""What an array may hold, by the name that zarr 3 has for it."""
_SPELLED = {x.name if x.kind == "V" else x.str: x for x in DTYPES.values()}  # as zarr 2 has it
_ABSENT = 2**64 - 1
_INDEX = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


class Form(NamedTuple):
    """How an array is stored.

    Attributes:
        shape: Of the array.
        dtype: Of the array.
        chunk: The shape of what has a key of its own.
        inner: The shape of the parts of such a chunk that are packed one by one, ``None`` if it is packed as a whole.
        packed: Whether they are compressed, by zstd.
        version: Of zarr.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    inner: tuple[int, ...] | None = None
    packed: bool = True
    version: int = 2

    @property
    def nbytes(self) -> int:
        """The size of the array."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def grid(self) -> list[int]:
        """The number of chunks along each axis."""
        return [ceil(n / c) for n, c in zip(self.shape, self.chunk, strict=True)]

    def chunks(self, ranges: Sequence[tuple[int, int]] | None = None) -> Iterator[str]:
        """The keys of the chunks, or of those that have a part of a region."""
        ranges = [(0, n) for n in self.shape] if ranges is None else ranges
        spans = (range(start // n, ceil(stop / n)) for (start, stop), n in zip(ranges, self.chunk, strict=True))
        for place in (list(map(str, x)) for x in itertools.product(*spans)):
            yield "/".join(["c", *place]) if self.version == 3 else ".".join(place) or "0"

    def read(self, get: Callable[[str], bytes | None], name: str, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
        """A region of the array; ``get`` gives the chunk with a key, ``None`` if it is all zeros and was left out."""
        import tensorstore as ts  # here, so that `import jlora` stays quick

        context = ts.Context()
        memory = ts.KvStore.open({"driver": "memory"}, context=context).result()
        memory[said_at(self.version)] = json.dumps(self._said()).encode()
        for key in self.chunks(ranges):
            self._put(memory, key, get(key), name)
        spec = {"driver": {2: "zarr", 3: "zarr3"}[self.version], "kvstore": "memory://"}
        try:
            array = ts.open(spec, context=context, open=True).result()
            part = array[tuple(slice(*x) for x in ranges)] if ranges else array
            return np.asarray(part.read().result())
        except ValueError as error:
            raise Damaged(f"{name} cannot be unpacked ({error})") from None

    def _put(self, memory: Any, key: str, raw: bytes | None, name: str) -> None:
        if raw is not None:
            self._check(raw, name)
            memory[key] = raw

    def _check(self, raw: bytes, name: str) -> None:
        """Raises unless a chunk unpacks to what it should, or to little more."""
        if self.inner is None:
            self._check_packed(raw, self.chunk, name)
            return
        count = prod(c // i for c, i in zip(self.chunk, self.inner, strict=True))
        end = len(raw) - 16 * count - 4
        if end < 0:
            raise Damaged(f"a chunk of {name} was cut")
        index = np.frombuffer(raw, "<u8", 2 * count, end)
        for start, length in index.reshape(-1, 2).tolist():
            if start == length == _ABSENT:
                continue
            if start + length > end:
                raise Damaged(f"a part of a chunk of {name} is not there")
            self._check_packed(raw[start : start + length], self.inner, name)

    def _check_packed(self, raw: bytes, shape: Sequence[int], name: str) -> None:
        size = prod(shape) * self.dtype.itemsize
        found: int | None = len(raw)
        if self.packed:
            frame = frame_of(raw, 4 * size + 2**17)
            found = size if frame.content is None and frame.most >= size else frame.content
        if found != size:
            raise Damaged(
                f"a chunk of {name} has {'fewer bytes' if found is None else counted(found, 'byte')}, not {size:,}"
            )

    def _said(self) -> dict[str, Any]:
        """What zarr says of the array."""
        if self.version == 2:
            return {
                "zarr_format": 2,
                "shape": list(self.shape),
                "chunks": list(self.chunk),
                "dtype": self.dtype.name if self.dtype.kind == "V" else self.dtype.str,
                "compressor": {"id": "zstd", "level": 1} if self.packed else None,
                "fill_value": None,
                "filters": None,
                "order": "C",
                "dimension_separator": ".",
            }
        codecs: list[Any] = [{"name": "bytes", "configuration": {"endian": "little"}}]
        if self.packed:
            codecs.append({"name": "zstd", "configuration": {"level": 3}})
        if self.inner is not None:
            how = {"chunk_shape": list(self.inner), "codecs": codecs, "index_codecs": _INDEX}
            codecs = [{"name": "sharding_indexed", "configuration": how}]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
            "chunk_key_encoding": {"name": "default"},
            "codecs": codecs,
            "fill_value": False if self.dtype.kind == "b" else [0, 0] if self.dtype.kind == "c" else 0,
        }


def said_at(version: int) -> str:
    """The key of what is said of an array."""
    return {2: ".zarray", 3: "zarr.json"}[version]


def form_of(raw: bytes, version: int) -> Form | None:
    """What is said of an array, ``None`` if it is nothing that orbax says."""
    try:
        found = json.loads(raw)
        form = _form_of_2(found) if version == 2 else _form_of_3(found)
        sizes = [(n, 0) for n in form.shape] + [(n, 1) for n in (*form.chunk, *(form.inner or ()))]
        fits = all(type(n) is int and least <= n < 2**62 for n, least in sizes) and len(form.shape) <= 32
        fits = fits and all(c <= max(n, 1) for c, n in zip(form.chunk, form.shape, strict=True))
        fits = fits and (form.inner is None or not any(c % i for c, i in zip(form.chunk, form.inner, strict=True)))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None
    return form if fits else None


def _form_of_2(found: dict[str, Any]) -> Form:
    packed = found["compressor"] is not None
    form = Form(tuple(found["shape"]), _SPELLED[found["dtype"]], tuple(found["chunks"]), packed=packed)
    about = dict(found, fill_value=found["fill_value"] or None)
    about.setdefault("dimension_separator", ".")
    if packed:
        about["compressor"] = {**found["compressor"], "level": 1}
    if about != form._said():
        raise ValueError
    return form


def _form_of_3(found: dict[str, Any]) -> Form:
    codecs, inner = found["codecs"], None
    if codecs[0]["name"] == "sharding_indexed":
        how = codecs[0]["configuration"]
        if len(codecs) > 1 or how["index_codecs"] != _INDEX or how.get("index_location", "end") != "end":
            raise ValueError
        codecs, inner = how["codecs"], tuple(how["chunk_shape"])
    names = [codec["name"] for codec in codecs]
    grid = found["chunk_grid"]
    ok = names in (["bytes"], ["bytes", "zstd"]) and grid["name"] == "regular"
    ok = ok and codecs[0].get("configuration", {"endian": "little"}) == {"endian": "little"}
    ok = ok and found["chunk_key_encoding"] in (
        {"name": "default"},
        {"name": "default", "configuration": {"separator": "/"}},
    )
    ok = ok and not np.any(found["fill_value"]) and (found["zarr_format"], found["node_type"]) == (3, "array")
    ok = ok and not any(found.get(key) for key in ("attributes", "storage_transformers"))
    if not ok:
        raise ValueError
    chunk = tuple(grid["configuration"]["chunk_shape"])
    return Form(tuple(found["shape"]), DTYPES[found["data_type"]], chunk, inner, len(names) == 2, 3)
