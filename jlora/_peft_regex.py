"""Regular expressions of a stranger's file, matched in time that grows with the name and the pattern, and never more than a budget.

Python's ``re`` backtracks, and a pattern can make it take for ever. Here a pattern becomes an automaton, whose set of states moves along
the name letter by letter. Syntax and meaning are those of ``re``; only whether a name matches is asked, never which part of it.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jlora import _files

MAX_STATES = 4000  # of one pattern: counts such as {9999} are written out
MAX_LETTERS = 16 * MAX_STATES
MAX_DEPTH = 40  # of groups in groups
MAX_WORK = 20_000_000  # states visited, for all patterns of one file; what only reads letters counts less
MAX_TABLE = 10_000  # moves that are remembered

Test = Callable[[str], bool]
Context = tuple[bool, ...]
_CLASSES: dict[str, Test] = {"d": str.isdecimal, "s": str.isspace, "w": lambda c: c.isalnum() or c == "_"}
_LETTERS = {"a": "\a", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "0": "\0"}
_PLACES = "^$AZbB"
_COUNT = re.compile(r"\{(?=[0-9,])([0-9]*)(,?)([0-9]*)\}")


class Unsupported(ValueError):
    """A pattern has something that cannot be matched in linear time, or not here."""


class Budget:
    """The work that may be done for one file."""

    def __init__(self, work: int = MAX_WORK):
        self.left = work

    def spend(self, work: int) -> None:
        """Counts work.

        Raises:
            ValueError: it is more than is left.
        """
        self.left -= work
        if self.left < 0:
            raise ValueError(
                f"The patterns of the adapter's configuration take more than {MAX_WORK:,} steps to match with its modules.\n"
                "  Write the ends of names of modules instead: 'q_proj'."
            )


class Regex:
    """A pattern as ``re`` would compile it.

    Raises:
        Unsupported: it has back-references, conditions, atomic groups, possessive counts, flags or letters by number, or is too large.
        ValueError: it is no regular expression.
    """

    def __init__(self, pattern: str, budget: Budget):
        if len(pattern) > MAX_LETTERS:
            raise Unsupported(f"it has {len(pattern):,} letters; at most {MAX_LETTERS:,} are read")
        budget.spend(len(pattern))
        self._automaton = _Automaton(_Parser(pattern).all(), False, budget)

    def full(self, text: str) -> bool:
        """Whether all of ``text`` matches, as with ``re.fullmatch``."""
        return self._automaton.ends(text, everywhere=False)[-1]

    def start(self, text: str) -> bool:
        """Whether ``text`` or a beginning of it matches, as with ``re.match``."""
        return any(self._automaton.ends(text, everywhere=False))


# --- Reading -----------------------------------------------------------------------------------------------------------


class _Letter(NamedTuple):
    test: Test


class _Place(NamedTuple):
    kind: str


class _Then(NamedTuple):
    parts: Sequence["_Node"]


class _Either(NamedTuple):
    parts: Sequence["_Node"]


class _Repeat(NamedTuple):
    part: "_Node"
    least: int
    most: int | None


class _Look(NamedTuple):
    part: "_Node"
    ahead: bool
    wanted: bool


_Node = _Letter | _Place | _Then | _Either | _Repeat | _Look
_LOOKS = {"?=": (True, True), "?!": (True, False), "?<=": (False, True), "?<!": (False, False)}


class _Parser:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str):
        self.pattern, self.i, self.depth = pattern, 0, 0
        self.names: set[str] = set()

    def all(self) -> _Node:
        found = self.either()
        if self.i < len(self.pattern):
            raise self.wrong("has a ')' too many")
        return found

    def wrong(self, what: str) -> ValueError:
        return ValueError(f"it {what}")

    def lacking(self, what: str) -> Unsupported:
        return Unsupported(f"it has {what}")

    def take(self, *options: str) -> str:
        """The first of ``options`` that comes next, which is passed over; else ``""``."""
        found = next((x for x in options if self.pattern.startswith(x, self.i)), "")
        self.i += len(found)
        return found

    def letter(self) -> str:
        if self.i >= len(self.pattern):
            raise self.wrong("ends too early")
        self.i += 1
        return self.pattern[self.i - 1]

    def either(self) -> _Node:
        options = [self.then()]
        while self.take("|"):
            options.append(self.then())
        return options[0] if len(options) == 1 else _Either(options)

    def ahead(self) -> str:
        """The letter that comes next, after remarks; ``""`` at the end."""
        while self.take("(?#"):
            while (letter := self.letter()) != ")":
                self.i += letter == "\\"
        return self.pattern[self.i : self.i + 1]

    def then(self) -> _Node:
        parts: list[_Node] = []
        while self.ahead() and self.ahead() not in "|)":
            parts.append(self.repeated(self.atom()))
        return parts[0] if len(parts) == 1 else _Then(parts)

    def atom(self) -> _Node:
        c = self.letter()
        if c == "(":
            return self.group()
        if c == "[":
            return _Letter(self.set())
        if c == ".":
            return _Letter(lambda x: x != "\n")
        if c in "^$":
            return _Place(c)
        if c in "*+?" or (c == "{" and self.is_count()):
            raise self.wrong(f"has nothing to repeat before '{c}'")
        return self.escape() if c == "\\" else _Letter(c.__eq__)

    def group(self) -> _Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.lacking(f"more than {MAX_DEPTH} groups in groups")
        look = self.take(*_LOOKS)
        if not look and self.take("?P<"):
            self.name()
        elif not look and self.take("?") and not self.take(":"):
            raise self.lacking(f"the group '(?{_files.shown(self.pattern[self.i : self.i + 2])}', which is not read")
        inside = self.either()
        if not self.take(")"):
            raise self.wrong("has a '(' without its ')'")
        self.depth -= 1
        if look.startswith("?<") and _width(inside) is None:
            raise self.wrong("looks behind for what has no fixed length")
        return _Look(inside, *_LOOKS[look]) if look else _Then([inside])

    def name(self) -> None:
        """The name of a group, which nothing here asks for."""
        begin = self.i
        while self.letter() != ">":
            pass
        name = self.pattern[begin : self.i - 1]
        if not name.isidentifier() or name in self.names:
            raise self.wrong(f"has a group whose name '{_files.shown(name)}' is none, or another's")
        self.names.add(name)

    def repeated(self, part: _Node) -> _Node:
        self.ahead()
        counts = self.counts()
        if counts is None:
            return part
        if isinstance(part, _Place):
            raise self.wrong("repeats a place between letters")
        if self.take("+"):
            raise self.lacking("a possessive count")
        self.take("?")  # whether the shortest or the longest is tried first changes no answer
        self.ahead()
        if self.counts() is not None:
            raise self.wrong("repeats what is repeated")
        return _Repeat(part, *counts)

    def is_count(self) -> bool:
        """Whether a count began with the letter before."""
        at, self.i = self.i, self.i - 1
        found = self.counts() is not None
        self.i = at
        return found

    def counts(self) -> tuple[int, int | None] | None:
        found = self.take("*", "+", "?")
        if found:
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[found]
        match = _COUNT.match(self.pattern, self.i)
        if match is None:
            return None
        least, comma, most = match.groups()
        if max(len(least), len(most)) > 4:
            raise self.lacking("a count above 9999")
        low, high = int(least or 0), (int(most) if most else None) if comma else int(least)
        if high is not None and high < low:
            raise self.wrong("has a count whose most is below its least")
        self.i = match.end()
        return low, high

    def escape(self) -> _Node:
        c = self.letter()
        if c in "AZbB":
            return _Place(c)
        if c in "123456789":
            raise self.lacking(f"the back-reference '\\{c}'")
        return _Letter(self.escaped(c))

    def escaped(self, c: str) -> Test:
        """What the letter after a backslash stands for."""
        if c.lower() in _CLASSES:
            test = _CLASSES[c.lower()]
            return test if c.islower() else lambda x: not test(x)
        if c in _LETTERS and not (c == "0" and self.pattern[self.i : self.i + 1].isdecimal()):
            return _LETTERS[c].__eq__
        if c.isascii() and c.isalnum():
            raise self.lacking(f"the escape '\\{c}', which is not read")
        return c.__eq__

    def set(self) -> Test:
        """A set in brackets."""
        inverse = bool(self.take("^"))
        tests: list[Test] = []
        begin = self.i
        while not (self.i > begin and self.take("]")):
            low, test = self.member()
            if self.pattern.startswith("-", self.i) and not self.pattern.startswith("-]", self.i):
                self.i += 1
                high, _ = self.member()
                if not low or not high or high < low:
                    raise self.wrong("has a range that is none")
                tests.append(lambda x, low=low, high=high: low <= x <= high)  # type: ignore[misc]
            else:
                tests.append(test)
        return lambda x: any(test(x) for test in tests) != inverse

    def member(self) -> tuple[str, Test]:
        """One letter of a set, and its test; a class of letters has only the test."""
        c = self.letter()
        if c != "\\":
            return c, c.__eq__
        c = self.letter()
        if c == "b":
            return "\b", "\b".__eq__
        test = self.escaped(c)
        return "" if c.lower() in _CLASSES else _LETTERS.get(c, c), test


def _width(node: _Node) -> int | None:
    """How many letters a node reads, ``None`` if that differs."""
    match node:
        case _Letter():
            return 1
        case _Then(parts):
            widths = [_width(part) for part in parts]
            return None if None in widths else sum(x for x in widths if x is not None)
        case _Either(parts):
            first, *others = {_width(part) for part in parts}
            return None if others else first
        case _Repeat(part, least, most):
            width = _width(part)
            return 0 if width == 0 or most == 0 else width * least if width is not None and least == most else None
    return 0


# --- Matching ----------------------------------------------------------------------------------------------------------


class _State(NamedTuple):
    """A state is left by a letter that passes ``test``; at once if a ``place`` or a look (by number) holds; or freely."""

    to: list[int]
    test: Test | None = None
    place: str = ""
    look: int | None = None


class _Automaton:
    """Runs along a text, forwards or backwards."""

    def __init__(self, tree: _Node, backwards: bool, budget: Budget):
        self.backwards, self.budget = backwards, budget
        self.states: list[_State] = [_State([])]  # the first is where a match ends
        self.looks: list[tuple[_Automaton, bool]] = []
        self.begin = self.add(tree, 0)
        self.here = any(state.place or state.look is not None for state in self.states)
        self.table: dict[tuple[frozenset[int], Context, str], tuple[bool, frozenset[int]]] = {}

    def new(self, state: _State) -> int:
        self.states.append(state)
        self.budget.spend(1)
        if len(self.states) > MAX_STATES:
            raise Unsupported(f"it is longer than {MAX_STATES:,} letters once its counts are written out")
        return len(self.states) - 1

    def add(self, node: _Node, then: int) -> int:
        """The state from which ``node`` and what follows it is read."""
        match node:
            case _Letter(test):
                return self.new(_State([then], test=test))
            case _Place(kind):
                return self.new(_State([then], place=kind))
            case _Then(parts):
                for part in parts if self.backwards else reversed(parts):
                    then = self.add(part, then)
                return then
            case _Either(parts):
                return self.new(_State([self.add(part, then) for part in parts]))
            case _Repeat(part, least, most):
                return self.repeat(part, least, most, then)
            case _Look(part, ahead, wanted):
                self.looks.append((_Automaton(part, ahead, self.budget), wanted))
                return self.new(_State([then], look=len(self.looks) - 1))
        raise AssertionError(node)

    def repeat(self, part: _Node, least: int, most: int | None, then: int) -> int:
        if most is None:
            then = self.new(_State([then]))
            self.states[then].to.append(self.add(part, then))
        else:
            for _ in range(most - least):
                then = self.new(_State([then, self.add(part, then)]))
        for _ in range(least):
            before, then = then, self.add(part, then)
            if before == then:  # what reads nothing, however often
                break
        return then

    def ends(self, text: str, *, everywhere: bool) -> list[bool]:
        """For each place between letters, whether a match ends there that began at the first place (or anywhere before)."""
        n = len(text)
        self.budget.spend(n // 16 + 1)
        contexts = list(self.contexts(text)) if self.here else [()] * (n + 1)
        found = [False] * (n + 1)
        now: frozenset[int] = frozenset([self.begin])
        for i in range(n, -1, -1) if self.backwards else range(n + 1):
            letter = text[i - 1 : i] if self.backwards else text[i : i + 1]
            key = now, contexts[i], letter
            if key not in self.table:
                self.table = self.table if len(self.table) < MAX_TABLE else {}
                self.table[key] = self.move(*key)
            found[i], now = self.table[key]
            now = now | {self.begin} if everywhere else now
        return found

    def contexts(self, text: str) -> Iterator[Context]:
        """What holds at each place: those of ``_PLACES``, and the looks."""
        n, word = len(text), [False, *map(_CLASSES["w"], text), False]
        looks = [[x == wanted for x in look.ends(text, everywhere=True)] for look, wanted in self.looks]
        for i in range(n + 1):
            border, last = word[i] != word[i + 1], i == n or (i == n - 1 and text[i] == "\n")
            yield (i == 0, last, i == 0, i == n, border, not border, *(look[i] for look in looks))

    def move(self, now: frozenset[int], context: Context, letter: str) -> tuple[bool, frozenset[int]]:
        """Whether a match ends in ``now``, and the states after a letter."""
        reached, todo = set(now), list(now)
        while todo:
            state = self.states[todo.pop()]
            if state.test is not None or (state.place and not context[_PLACES.index(state.place)]):
                continue
            if state.look is not None and not context[len(_PLACES) + state.look]:
                continue
            more = [i for i in state.to if i not in reached]
            reached.update(more)
            todo += more
        self.budget.spend(40 + len(reached))  # what is remembered counts more: it takes memory
        states = [self.states[i] for i in reached]
        after = [i for s in states if letter and s.test is not None and s.test(letter) for i in s.to]
        return 0 in reached, frozenset(after)
