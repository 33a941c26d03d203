"""Text from elsewhere, made harmless to show: names in a file, or keys of a tree, may hold what a terminal obeys.

What is data keeps its own spelling. Only what is shown, in a message or a table, goes through here.
"""

from typing import Any

_PLURALS = {"leaf": "leaves", "axis": "axes", "index": "indices"}


def shown(x: Any, limit: int = 200) -> str:
    """``x`` for a message or a table: on one line, short, and with nothing in it that a terminal obeys or hides."""
    text = str(x)
    return _escaped(text) if len(text) <= limit else _escaped(text[:limit]) + "…"


def counted(count: int, one: str) -> str:
    """``1 weight``, ``2 weights``, ``2 axes``, ``0 leaves``."""
    if count == 1:
        return f"1 {one}"
    many = next((one.removesuffix(end) + ends for end, ends in _PLURALS.items() if one.endswith(end)), f"{one}s")
    return f"{count:,} {many}"


def printable(text: str) -> str:
    """A message of several lines, each of them as ``shown`` has it."""
    return "\n".join(map(_escaped, text.split("\n")))


def check_text(name: str) -> None:
    """Raises if ``name`` cannot be written as UTF-8, which formats of files ask for."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        half = name[error.start].encode("unicode_escape").decode()
        raise ValueError(
            f"'{shown(name)}' cannot be written as a name: {half} is half of a character, which no file of text holds.\n"
            "  Rename it."
        ) from None


def _escaped(text: str) -> str:
    """Escapes what is not printable: control characters, marks of direction, widthless spaces, separators of lines, lone surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
