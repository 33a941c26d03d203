"""What PEFT's lists and patterns match, found by look-ups: a file may have a hundred thousand of them, and as many modules.

Patterns without choices are compared letter by letter. The others are regular expressions, which take time that grows with the length of
a name (``_peft_regex``), and of which there may be few.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from jlora import _files
from jlora._peft_keys import ends
from jlora._peft_regex import Budget, Regex

MAX_FORMS = 256
MAX_REGEXES = 1024
Table = dict[tuple[str, bool], set[float]]
Make = Callable[[str, str], Regex]


class Ends:
    """Names that PEFT compares with the ends of others."""

    def __init__(self, names: Iterable[str]):
        self.names = frozenset(names)
        self.sizes = {len(name) for name in self.names}

    def match(self, name: str) -> bool:
        """Whether one of them is ``name``, or what follows one of its dots."""
        return any(end in self.names for end in ends(name))

    def match_letters(self, name: str) -> bool:
        """Whether ``name`` ends in one of them, wherever that begins."""
        return any(name[len(name) - size :] in self.names for size in self.sizes if size <= len(name))


class Patterns:
    """The numbers that ``rank_pattern`` or ``alpha_pattern`` has for modules, by their patterns.

    Patterns that ``literal`` reads, of one length, with free letters at the same places, are one form: these places are left out of a
    name, and what remains is looked up. There are few forms, since the names of a model's modules differ in little more than numbers.

    Raises:
        ValueError: there are more forms than ``MAX_FORMS``, or more regular expressions than ``MAX_REGEXES``.
    """

    def __init__(self, name: str, found: Mapping[str, float], make: Make | None = None):
        self.name = name
        rest = [pattern for pattern in found if literal(pattern) is None]
        if len(rest) > MAX_REGEXES:
            raise ValueError(
                f"{name} has {len(rest):,} regular expressions; at most {MAX_REGEXES:,} are read.\n"
                "  Write the ends of names of modules: 'q_proj'."
            )
        # As PEFT puts a pattern together, whatever parentheses it has itself.
        self.regexes = [((make or _plain)(rf"(.*\.)?({pattern})$", pattern), found[pattern]) for pattern in rest]
        self.forms: dict[int, dict[tuple[int, ...], Table]] = defaultdict(dict)
        for pattern, value in found.items():
            read = literal(pattern)
            if read is None:
                continue
            anchored, letters = read
            free = tuple(i for i, letter in enumerate(letters) if not letter)
            table = self.forms[len(letters)].setdefault(free, defaultdict(set))
            table["".join(letters), anchored].add(value)
        count = sum(map(len, self.forms.values()))
        if count > MAX_FORMS:
            raise ValueError(
                f"{name} has {len(found):,} patterns with dots at {count:,} different places; at most {MAX_FORMS} are read.\n"
                "  Write the ends of names of modules: 'q_proj'."
            )

    def all(self, key: str) -> set[float]:
        """What the patterns that match a module have: they match all of its name, or an end that follows a dot."""
        found = {value for regex, value in self.regexes if regex.start(key)}
        for end in ends(key):
            for free, table in self.forms.get(len(end), {}).items():
                rest = _without(end, free)
                for anchored in (False, True) if end == key else (False,):
                    found |= table.get((rest, anchored), set())
        return found

    def find(self, key: str, default: float) -> float:
        """What PEFT finds for a module.

        Raises:
            ValueError: several patterns match it, with different values.
        """
        found = self.all(key)
        if len(found) > 1:
            raise ValueError(
                f"Several patterns of {self.name} match '{_files.shown(key)}', with values {sorted(found)}: PEFT takes the first, but the "
                "order was lost when the file was written.\n  Leave one of them."
            )
        return found.pop() if found else default


def _plain(pattern: str, shown: str) -> Regex:
    return Regex(pattern, Budget())


def literal(pattern: str) -> tuple[bool, list[str]] | None:
    """Whether a pattern without choices is anchored, and its letters; ``""`` stands for any."""
    body = pattern.removeprefix("^").removesuffix("$")
    letters = re.findall(r"\\[.\-_]|[\w.\-]", body)
    if "".join(letters) != body or not body:
        return None
    return pattern.startswith("^"), ["" if x == "." else x[-1] for x in letters]


def _without(name: str, places: tuple[int, ...]) -> str:
    starts = [0, *(i + 1 for i in places)]
    return "".join(name[i:j] for i, j in zip(starts, [*places, len(name)], strict=True))
