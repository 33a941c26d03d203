"""``checksums.json``: what each file of an export or of a PEFT adapter holds, as safetensors have no checksum of their own.

It is written with the files that it lists, and moved into place with them. A reader refuses a file that differs from it. Where it is
missing, as beside everything that others write, nothing is compared.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlora import _files

FILE = "checksums.json"
_KIND = "sha256"


class Sums(NamedTuple):
    """The checksums of a folder.

    Attributes:
        file: Where they were read.
        digests: By the name of a file; ``None`` if the folder has none.
    """

    file: Path
    digests: Mapping[str, str] | None = None

    def of(self, name: str, *, needed: bool = True) -> str:
        """The digest of a file, empty if there is none to compare with; one that is ``needed`` is missing only with all others."""
        if self.digests is None:
            return ""
        if needed and name not in self.digests:
            raise ValueError(
                f"{self.file} does not list {_files.shown(name)}, which lies beside it.\n"
                "  The folder was changed after it was saved: save it again, or remove checksums.json, and nothing is compared."
            )
        return self.digests.get(name, "")


def read(folder: Path) -> Sums:
    """The checksums of a folder, if it has them.

    Raises:
        ValueError: they are damaged, or another tool's.
    """
    file = folder / FILE
    if not file.exists():
        return Sums(file)
    content = _files.read_json(file)
    found = content.get(_KIND)
    if (
        not isinstance(found, dict)
        or not 0 < len(found) <= _files.MAX_TENSORS
        or not all(map(_is_digest, found.values()))
    ):
        raise ValueError(
            f"{file} is damaged, or not jlora's: it must hold {{'sha256': {{name of a file: 64 hexadecimal digits}}}}.\n"
            f"  got: {_files.shown(content)}\n  Remove it, and nothing is compared."
        )
    return Sums(file, found)


def _is_digest(x: Any) -> bool:
    return isinstance(x, str) and re.fullmatch(r"[0-9a-f]{64}", x) is not None


def write(folder: Path) -> None:
    """Writes the checksums of all files in a folder."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != FILE)
    _files.write_json(folder / FILE, {_KIND: {name: _digest(folder / name) for name in names}})


def _digest(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, _KIND).hexdigest()
