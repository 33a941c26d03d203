"""Paths of the leaves of a parameter tree, and the nearest ones to a misspelt one.

A path is what ``jax.tree_util.keystr(keys, simple=True, separator="/")`` gives, for any pytree. Nothing here knows what a leaf is for.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from jlora._text import shown


def flatten(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Returns the paths of ``tree``'s leaves, the leaves, and the tree's structure.

    Raises:
        ValueError: two leaves have the same path (a key that itself contains ``/`` can do that).
    """
    keyed, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in keyed]
    if len(set(paths)) != len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"Two leaves of the tree have the same path '{shown(twice)}'.\n  Rename one of the keys.")
    return paths, [leaf for _, leaf in keyed], treedef


def match(pattern: str, path: str) -> re.Match[str] | None:
    """The match of a pattern with a whole path. A dot stands for any character, a newline too: a key may hold one."""
    return re.fullmatch(pattern, path, re.DOTALL)


def nearest(path: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` candidates most like ``path``, best first, as they are shown; never empty unless ``candidates`` is."""
    return [shown(found) for found in _nearest(path, list(candidates), count)]


def _nearest(path: str, candidates: list[str], count: int) -> list[str]:
    close = difflib.get_close_matches(path, candidates, n=count, cutoff=0.5)
    if close:
        return close
    # A pattern such as ".*/dwon/kernel" is unlike every whole path: compare the named parts instead.
    words = [word for word in path.replace("\\", "").split("/") if word.strip(".*?+()|[]^$")]
    return sorted(candidates, key=lambda c: -_overlap(words, c.split("/")))[:count]


def _overlap(words: Sequence[str], parts: Sequence[str]) -> float:
    return sum(max((difflib.SequenceMatcher(None, w, p).ratio() for p in parts), default=0.0) for w in words)


def listing(paths: Sequence[str], limit: int = 8) -> str:
    """``"a, b, c and 5 more"``: a list short enough for an error message."""
    paths = list(paths)
    some = ", ".join(map(shown, paths[:limit]))
    return some if len(paths) <= limit else f"{some} and {len(paths) - limit} more"
