"""Reads what orbax stores arrays in, from a folder that may be anyone's: no more of it than a budget, and nothing outside the folder.

Orbax keeps arrays in OCDBT, a B+tree of keys and values whose nodes are compressed by zstd. TensorStore reads it as fast as it can and
trusts it: a few kilobytes may stand for gigabytes, a node may share its children with others, or point to any file. Here each node is
unpacked under a budget, each is met once, and each piece lies in a file that was checked. Values are left as they are.

The formats: https://google.github.io/tensorstore/kvstore/ocdbt and RFC 8878.
"""

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jlora._text import counted

MANIFEST = "manifest.ocdbt"
_MANIFEST, _NODE = 0x0CDB3A2A, 0x0CDB20DE  # how each begins
_BLOCK, _WINDOW = 2**17, 2**23  # zstd's largest block, and the largest window that a reader has to have
LONGEST_KEY = 512
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class Damaged(ValueError):
    """What was read is not what orbax writes; the message completes "the arrays are damaged: ..."."""


class Piece(NamedTuple):
    """Some bytes of a file of the folder."""

    file: str
    start: int
    length: int


class Frame(NamedTuple):
    """What the headers of a zstd frame say, without unpacking it.

    Attributes:
        content: The size of its content, ``None`` if it does not say.
        most: What its content cannot exceed.
        last: Where its last block begins.
    """

    content: int | None
    most: int
    last: int


def frame_of(raw: bytes, limit: int) -> Frame:
    """Reads the headers of the one frame that ``raw`` is; raises if it may unpack to more than ``limit``."""
    if len(raw) < 6 or raw[:4] != b"\x28\xb5\x2f\xfd":
        raise Damaged("something is not compressed by zstd")
    flags, at, content = raw[4], 5, None
    single, digits = flags >> 5 & 1, (flags >> 5 & 1, 2, 4, 8)[flags >> 6]
    if flags & 0b1011:  # a dictionary, or a reserved bit
        raise Damaged("something is compressed in a way that orbax does not use")
    window = (8 + (raw[5] & 7)) << (raw[5] >> 3) + 7
    at += not single
    if digits:
        content = int.from_bytes(raw[at : at + digits], "little") + (256 if digits == 2 else 0)
        at += digits
    if single:
        window = content or 0
    elif window > _WINDOW:
        raise Damaged(f"something needs a window of {window:,} bytes to be unpacked")
    most = content if single and content is not None and content > limit else 0
    for _ in range(16 + limit // 4096):
        header = int.from_bytes(raw[at : at + 3], "little")
        kind, size = header >> 1 & 3, header >> 3
        most += min(window, _BLOCK) if kind == 2 else size
        end = at + 3 + (1 if kind == 1 else size)
        if most > limit:
            raise Damaged(f"something of {len(raw):,} bytes may unpack to more than the {limit:,} it may have")
        if kind == 3 or size > _BLOCK or end > len(raw):
            raise Damaged("something compressed was cut or changed")
        if header & 1:
            if end + 4 * (flags >> 2 & 1) != len(raw):
                raise Damaged("something compressed was added to")
            if content is not None and content > most:
                raise Damaged("something compressed is shorter than it says")
            return Frame(content, most, at)
        at = end
    raise Damaged(f"something of {len(raw):,} bytes is compressed in too many blocks")


def unpack(raw: bytes, limit: int) -> bytes:
    """The content of a zstd frame, of at most ``limit`` bytes; after content of a size that is not known, zeros."""
    frame = frame_of(raw, limit)
    size = frame.content
    if size is None:  # as much as it can have: another block makes up for what it has not
        header = int.from_bytes(raw[frame.last : frame.last + 3], "little") & ~1
        kind, length = header >> 1 & 3, header >> 3
        end = frame.last + 3 + (1 if kind == 1 else length)
        zeros = (_BLOCK << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"
        raw, size = raw[: frame.last] + header.to_bytes(3, "little") + raw[frame.last + 3 : end] + zeros, frame.most
        if (flags := raw[4]) & 4:  # its checksum is not of what it is now
            raw = raw[:4] + bytes([flags & ~4]) + raw[5:]
    return _unzipped(raw, size)


def _unzipped(raw: bytes, size: int) -> bytes:
    """The first ``size`` bytes of what a frame unpacks to.

    Python before 3.14 has no zstd. TensorStore has it, and stops at a size where it reads an archive: this is one with a single entry.
    """
    import tensorstore as ts  # here, so that `import jlora` stays quick

    if not size:
        return b""
    about = struct.pack("<HHHHIIIHH", 0, 93, 0, 33, 0, len(raw), size, 1, 0)  # 93: zstd
    entry = struct.pack("<IH", 0x04034B50, 63) + about + b"x" + raw
    listed = struct.pack("<IHH", 0x02014B50, 63, 63) + about + struct.pack("<HHHII", 0, 0, 0, 0, 0) + b"x"
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, len(listed), len(entry), 0)
    context = ts.Context()
    ts.KvStore.open({"driver": "memory"}, context=context).result()["zip"] = entry + listed + end
    try:
        archive = ts.KvStore.open({"driver": "zip", "base": "memory://zip"}, context=context).result()
        found: bytes = archive.read("x").result().value
    except (ValueError, OverflowError) as error:
        raise Damaged(f"something cannot be unpacked ({error})") from None
    if len(found) != size:
        raise Damaged("something compressed is shorter than it says")
    return found


class Store:
    """The keys of a store, and where their values are.

    Args:
        folder: The folder of the checkpoint.
        sizes: Its files that were checked, and their sizes: no others are read.
        budget: How many bytes all nodes may have, unpacked.
        longest: How many letters a key may have.

    Attributes:
        values: By key its value, or where it lies.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int], budget: int, longest: int = LONGEST_KEY):
        self._folder, self._sizes, self._left, self._longest = folder, sizes, budget, longest
        self._keys_left, self._letters_left = budget // 64, LONGEST_KEY * budget // 64
        self.values: dict[str, bytes | Piece] = {}
        if MANIFEST not in sizes:
            raise Damaged(f"there is no {MANIFEST}, which jlora.save writes")
        nodes, met = [self._root()], set()
        while nodes:
            piece, height, prefix, base = nodes.pop()
            if piece in met:
                raise Damaged("a node is in two places of the tree")
            met.add(piece)
            nodes += self._node(piece, height, prefix, base)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, key: str) -> bytes:
        value = self.values[key]
        return value if isinstance(value, bytes) else self._read(value)

    def size(self, key: str) -> int:
        """The size of a value as it is stored."""
        value = self.values[key]
        return len(value) if isinstance(value, bytes) else value.length

    def _read(self, piece: Piece) -> bytes:
        return read(self._folder, self._sizes, piece)

    def _body(self, piece: Piece, magic: int) -> "_Bytes":
        """What a node holds, unpacked; its size is taken from what is left of the budget."""
        if not 18 <= piece.length <= self._left:
            raise Damaged(f"a node of {piece.file} has {counted(piece.length, 'byte')}")
        raw = self._read(piece)
        if struct.unpack(">I", raw[:4])[0] != magic or struct.unpack("<Q", raw[4:12])[0] != len(raw):
            raise Damaged(f"{piece.file} holds no node where there should be one")
        if raw[12] != 0 or raw[13] > 1:
            raise Damaged(f"{piece.file} has version {raw[12]} of OCDBT, compressed by method {raw[13]}")
        body = unpack(raw[14:-4], self._left) if raw[13] else raw[14:-4]
        self._left -= len(body)
        return _Bytes(body)

    def _root(self) -> tuple[Piece, int, bytes, str]:
        """The root of the latest version that the manifest names."""
        r = self._body(Piece(MANIFEST, 0, self._sizes[MANIFEST]), _MANIFEST)
        r.take(16)  # the database's identifier
        if r.number() != 0:
            raise Damaged("the manifest is in several files")
        r.numbers(2)
        r.byte()
        if r.number():
            r.take(4)  # the level of compression
        files = self._files(r, "")
        count = r.number()
        generations = r.numbers(count)
        if not generations or generations != sorted(set(generations)):
            raise Damaged("the manifest names no version")
        heights = [r.byte() for _ in range(count)]
        pieces = [r.numbers(count) for _ in range(3)]
        file, base = _one_of(files, pieces[0][-1])
        return Piece(file, pieces[1][-1], pieces[2][-1]), heights[-1], b"", base

    def _files(self, r: "_Bytes", base: str) -> list[tuple[str, str]]:
        """The files that a node names, each with what the files named further down are relative to."""
        count = r.number()
        if count > len(self._sizes):
            raise Damaged(f"a node names {count:,} files")
        shared = [0, *r.numbers(max(count - 1, 0))]
        lengths, bases = r.numbers(count), r.numbers(count)
        found, path = [], b""
        for prefix, length, of_base in zip(shared[:count], lengths, bases, strict=True):
            path = path[:prefix] + r.take(length)
            name = base + path.decode("ascii", "backslashreplace")
            if name not in self._sizes:
                raise Damaged(f"a node names the file {name[:100]!a}, which is not one that was saved")
            found.append((name, base + path[:of_base].decode("ascii", "backslashreplace")))
        return found

    def _node(self, piece: Piece, height: int, prefix: bytes, base: str) -> list[tuple[Piece, int, bytes, str]]:
        """Takes up the values of a leaf; of a node above gives the nodes below it, and of each height, prefix of its keys and base."""
        r = self._body(piece, _NODE)
        if r.byte() != height:
            raise Damaged("a node is not as high in the tree as it should be")
        files = self._files(r, base)
        count = r.number()
        self._keys_left -= count
        if not count or self._keys_left < 0:
            raise Damaged(f"a node has {count:,} keys")
        shared, lengths = [0, *r.numbers(count - 1)], r.numbers(count)
        common = r.numbers(count) if height else []
        keys, key = [], b""
        for start, length in zip(shared, lengths, strict=True):
            key = key[:start] + r.take(length)
            letters = len(prefix) + len(key)
            self._letters_left -= letters
            if letters > self._longest:
                raise Damaged(f"a key has {letters:,} letters")
            if self._letters_left < 0:
                raise Damaged("its keys have more letters than fit a store of its size")
            keys.append(key)
        if not height:
            self._take_up([prefix + key for key in keys], files, r)
            return []
        ids, starts, sizes = (r.numbers(count) for _ in range(3))
        named = [_one_of(files, i) for i in ids]
        return [
            (Piece(file, start, size), height - 1, prefix + key[:own], below)
            for (file, below), start, size, key, own in zip(named, starts, sizes, keys, common, strict=True)
        ]

    def _take_up(self, keys: list[bytes], files: list[tuple[str, str]], r: "_Bytes") -> None:
        sizes = r.numbers(len(keys))
        apart = [r.byte() != 0 for _ in keys]
        ids, starts = r.numbers(sum(apart)), r.numbers(sum(apart))
        where = iter(zip(ids, starts, strict=True))
        for key, size, is_apart in zip(keys, sizes, apart, strict=True):
            name = key.decode("ascii", "backslashreplace")
            if name in self.values:
                raise Damaged(f"the key {name!a} is there twice")
            if is_apart:
                i, start = next(where)
                self.values[name] = Piece(_one_of(files, i)[0], start, size)
            else:
                self.values[name] = r.take(size)


def read(folder: Path, sizes: Mapping[str, int], piece: Piece) -> bytes:
    """Some bytes of a file of a folder, whose files have these sizes."""
    if piece.start + piece.length > sizes.get(piece.file, 0):
        raise Damaged(f"a part of {piece.file} is not there")
    with open(os.open(folder / piece.file, _READ), "rb") as f:
        f.seek(piece.start)
        found = f.read(piece.length)
    if len(found) != piece.length:
        raise Damaged(f"{piece.file} was cut while it was read")
    return found


def _one_of(files: list[tuple[str, str]], i: int) -> tuple[str, str]:
    if i >= len(files):
        raise Damaged("a node names a file that is not in its table")
    return files[i]


class _Bytes:
    """Bytes that are read one part after another."""

    def __init__(self, raw: bytes):
        self._raw, self._at = raw, 0

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if count > len(self._raw) - self._at:
            raise Damaged("a node was cut")
        self._at += count
        return self._raw[self._at - count : self._at]

    def byte(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def number(self) -> int:
        """The next number, seven bits in a byte, those of least weight first."""
        found = shift = 0
        while True:
            byte = self.byte()
            found |= (byte & 127) << shift
            if byte < 128:
                return found
            shift += 7
            if shift > 63:
                raise Damaged("a number has too many digits")

    def numbers(self, count: int) -> list[int]:
        """The next ``count`` numbers."""
        if count > len(self._raw) - self._at:
            raise Damaged("a node was cut")
        return [self.number() for _ in range(count)]
