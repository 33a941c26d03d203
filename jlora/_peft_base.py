"""Whether the files of a base have the weights that an adapter is for: names and shapes, of which headers are enough."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from jlora import _files, _paths
from jlora._text import counted
from jlora.export import open_weights

Shape = tuple[int, ...]


class Wanted(NamedTuple):
    """A weight that an adapter is for.

    Attributes:
        shapes: Those that it may have.
        shared: Whether it is another's second name, under which files need not have it.
    """

    shapes: tuple[Shape, ...]
    shared: bool


class _Prefix(NamedTuple):
    """How names of the adapter become those of the files: ``old`` at their beginning gives way to ``new``."""

    old: str = ""
    new: str = ""

    def __call__(self, name: str) -> str:
        return self.new + name.removeprefix(self.old) if name.startswith(self.old) else name

    def back(self, name: str) -> str:
        """The adapter's name for one of the files."""
        return self.old + name.removeprefix(self.new)

    def __str__(self) -> str:
        return f"with '{self.new}' before them" if self.new else f"without '{self.old}'"


def check(folder: Path, wanted: Mapping[str, Wanted]) -> list[str]:
    """Raises unless the base at ``folder`` has all of ``wanted``; returns the adapter's names for all that it has.

    PyTorch's files may name the weights of a model from inside it or from around it: one prefix may be missing from the names of the
    files, or stand before all of them. It has to be the same for all names, and the only one with which all are there.

    Raises:
        FileNotFoundError: there are no safetensors.
        ValueError: a weight is missing, or has another shape; several prefixes fit.
    """
    have = {name: source.header[name].shape for name, source in open_weights(folder).items()}
    prefix = _prefix(folder, [name for name in wanted if not wanted[name].shared], have)
    wrong = []
    for name, want in wanted.items():
        there = prefix(name)
        if there not in have and not want.shared:
            near = ", ".join(_files.shown(n) for n in _paths.nearest(there, have, 2))
            wrong.append(f"{name} is not there; nearest: {near}")
        elif there in have and have[there] not in want.shapes:
            wrong.append(f"{name} is {have[there]} there; the adapter is for {' or '.join(map(str, want.shapes))}")
    if wrong:
        read = f" (names were looked up {prefix})" if prefix != _Prefix() else ""
        more = [f"and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise ValueError(
            f"{len(wrong)} of the adapter's {counted(len(wanted), 'weight')} {'does' if len(wrong) == 1 else 'do'} "
            f"not fit the base at {folder}{read}:\n  " + "\n  ".join([*wrong[:8], *more])
        )
    return [prefix.back(name) for name in have]


def _prefix(folder: Path, names: Collection[str], have: Collection[str]) -> _Prefix:
    """The prefix with which all names are there, or else the most of them."""
    lost = next((name for name in names if name not in have), None)
    if lost is None:
        return _Prefix()
    cuts = [lost[: i + 1] for i, letter in enumerate(lost) if letter == "."]
    options = [_Prefix(cut, "") for cut in cuts if lost.removeprefix(cut) in have]
    options += [_Prefix("", name.removesuffix(lost)) for name in have if name.endswith(f".{lost}")]
    fit = [p for p in options if all(p(name) in have for name in names)]
    if len(fit) > 1:
        raise ValueError(
            f"The names of the adapter fit the base at {folder} in {len(fit)} ways: {_paths.listing([str(p) for p in fit], 3)}.\n"
            "  Give the weights their whole names with names=..."
        )
    return max([_Prefix(), *fit, *options], key=lambda p: sum(p(name) in have for name in names))
