"""Writes OCDBT stores, good and bad, as https://google.github.io/tensorstore/kvstore/ocdbt describes them."""

import struct

MANIFEST, NODE = 0x0CDB3A2A, 0x0CDB20DE


def number(x):
    out = b""
    while x > 127:
        out, x = out + bytes([x & 127 | 128]), x >> 7
    return out + bytes([x])


def numbers(xs):
    return b"".join(map(number, xs))


def _turned(byte):
    for _ in range(8):
        byte = byte >> 1 ^ 0x82F63B78 * (byte & 1)
    return byte


TABLE = [_turned(byte) for byte in range(256)]


def crc32c(raw):
    crc = 0xFFFFFFFF
    for byte in raw:
        crc = TABLE[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def sealed(magic, body, zstd=False, version=0):
    """A node or manifest: header, body, checksum."""
    raw = struct.pack(">I", magic) + struct.pack("<Q", 18 + len(body)) + bytes([version, zstd]) + body
    return raw + struct.pack("<I", crc32c(raw))


def files(names):
    return numbers([len(names), *[0] * (len(names) - 1), *map(len, names), *[0] * len(names)]) + "".join(names).encode()


def leaf(values, named=(), height=0):
    """A leaf: by key its value, or (index of the file, start, length). Keys are sorted and share nothing."""
    keys = sorted(values)
    body = bytes([height]) + files(list(named)) + number(len(keys))
    body += numbers([0] * (len(keys) - 1)) + numbers(len(k) for k in keys) + "".join(keys).encode()
    apart = [isinstance(values[k], tuple) for k in keys]
    body += numbers(values[k][2] if a else len(values[k]) for k, a in zip(keys, apart, strict=True)) + bytes(apart)
    far = [values[k] for k, a in zip(keys, apart, strict=True) if a]
    body += numbers(v[0] for v in far) + numbers(v[1] for v in far)
    return body + b"".join(values[k] for k, a in zip(keys, apart, strict=True) if not a)


def interior(height, children, named):
    """A node above others: of each the first key, its prefix length, and (index of the file, start, length)."""
    keys = [key for key, _, _ in children]
    body = bytes([height]) + files(list(named)) + number(len(keys))
    body += numbers([0] * (len(keys) - 1)) + numbers(map(len, keys)) + numbers(c[1] for c in children)
    body += "".join(keys).encode()
    for i in range(3):
        body += numbers(c[2][i] for c in children)
    return body + numbers([1] * 3 * len(children))


def manifest(file, start, length, height=0, base=0, kind=0):
    body = bytes(16) + numbers([kind, 1024, 100_000_000]) + b"\4" + b"\0"
    body += number(1) + number(len(file)) + number(base) + file.encode()
    body += numbers([1, 1]) + bytes([height]) + numbers([0, start, length, 1, 1, 0]) + bytes(8)
    return body + number(0)


def frame(blocks, content=None, window=19, flags=0):
    """A zstd frame of (kind, size, bytes) blocks; kind 0 is raw, 1 one byte repeated, 2 compressed."""
    head = b"\x28\xb5\x2f\xfd" + bytes([flags | (0 if content is None else 0xC0)]) + bytes([(window - 10) << 3])
    head += b"" if content is None else struct.pack("<Q", content)
    ends = [False] * (len(blocks) - 1) + [True]
    return head + b"".join(
        (size << 3 | kind << 1 | end).to_bytes(3, "little") + raw
        for (kind, size, raw), end in zip(blocks, ends, strict=True)
    )


def raw_frame(content):
    """A frame of what is not compressed."""
    return frame([(0, len(content), content)], len(content))


def bomb(size, content=None):
    """A frame of a few bytes for each 128 KB of ``size``."""
    return frame([(1, 2**17, b"\0")] * (size // 2**17), content)
