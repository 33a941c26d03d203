"""Errors that say what to pass in Python, and that the command line, where the same is an option, says in its own words."""

from collections.abc import Mapping
from typing import Any, Literal

Need = Literal["sites", "params", "names", "base", "rank", "factors", "dropout", "dtype", "overflow"]


class Advised(ValueError):
    """An error with advice.

    Args:
        problem: What is wrong.
        python: What to do about it in Python.
        need: The argument that this is about, for who has another way to give it.
        names: Of the argument ``names``, what would do: by path a name, several, or the fields of a ``Weight``.
    """

    def __init__(self, problem: str, python: str, need: Need, names: Mapping[str, Any] | None = None):
        super().__init__(f"{problem}\n  {python}")
        self.problem, self.need, self.names = problem, need, names
