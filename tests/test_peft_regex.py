"""The engine for the regular expressions in PEFT's configurations: it answers as ``re`` does, or says what it does not read."""

import os
import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora import _peft_match, _peft_regex

MANY = settings(
    max_examples=int(os.environ.get("JLORA_FUZZ", 500)),
    deadline=None,
    derandomize="JLORA_FUZZ" not in os.environ,
    database=None,
)


def compiled(pattern):
    """What ``re`` makes of a pattern, ``None`` if it is none; its advice on sets of sets is not asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            return None


def read(pattern):
    return _peft_regex.Regex(pattern, _peft_regex.Budget())


def assert_same(found, wanted, names):
    for name in names:
        assert found.full(name) == bool(wanted.fullmatch(name)), name
        assert found.start(name) == bool(wanted.match(name)), name


ATOM = st.sampled_from(
    ["a", "b", r"\.", ".", "[ab]", "[^a.]", r"\w", r"\d", "^", "$", r"\b", "(?=a)", "(?!b)", r"(?<=\.)", "(?<!a)"]
)
REGEX = st.recursive(
    st.lists(ATOM, max_size=3).map("".join),
    lambda inner: st.one_of(
        st.builds("({}){}".format, inner, st.sampled_from(["", "*", "+?", "?", "{2}", "{1,3}", "{,2}"])),
        st.builds("{}|{}".format, inner, inner),
        st.builds("{}{}".format, inner, inner),
        st.builds("(?!{}){}".format, inner, inner),
    ),
    max_leaves=5,
)


@MANY
@given(pattern=REGEX, name=st.text("ab.0", min_size=1, max_size=5))
def test_patterns_match_what_pythons_do(pattern, name):
    assert_same(read(pattern), re.compile(pattern), [name])


PIECES = [
    *"ab.0_-^$|()[]{}*+?\\,:<>=!\n", "(?:", "(?P<n>", "(?P<m>", "(?=", "(?!", "(?<=", "(?<!", "(?#", "(?i)", "(?>", "(?P=n)", "(?(1)",
    "[^", "[a-b]", "[^a]", "[]a]", "[a-", "{2}", "{,1}", "{1,}", "{0}", "{,}", "{2,1}", "*?", "+?", "??", "{1}?", "++", r"\d", r"\D",
    r"\w", r"\W", r"\s", r"\S", r"\A", r"\Z", r"\b", r"\B", r"\n", r"\t", r"\0", r"\1", r"\x61", r"\u0061", r"\.", r"\\", r"\]", r"\-",
    r"\q",
]  # fmt: skip


@MANY
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=8),
    names=st.lists(
        st.text("ab.0_- \n\\é²", min_size=1, max_size=5), min_size=1, max_size=4
    ),  # of "" Python 3.14 has changed \B
)
def test_whatever_is_written(pieces, names):
    """Sensible or not: what ``re`` refuses is refused, and the rest is read as ``re`` does, or said not to be read."""
    pattern = "".join(pieces)
    wanted = compiled(pattern)
    try:
        found = read(pattern)
    except _peft_regex.Unsupported:
        return
    except ValueError:
        assert wanted is None
        return
    assert wanted is not None
    assert_same(found, wanted, names)


UNREAD = {
    r"(a)\1": r"has the back-reference '\\1'",
    "(?P<n>a)(?P=n)": r"has the group '\(\?P=', which is not read",
    "(a)(?(1)b)": r"has the group '\(\?\(1', which is not read",
    "(?>a)": r"has the group '\(\?>a', which is not read",
    "(?i)a": r"has the group '\(\?i\)', which is not read",
    "(?\x1b[2J": r"has the group '\(\?\\x1b\[', which is not read",
    "a++": "has a possessive count",
    "a{10000}": "has a count above 9999",
    r"\x61": r"has the escape '\\x', which is not read",
    r"[\q]": r"has the escape '\\q', which is not read",
    r"\07": r"has the escape '\\0', which is not read",
    "(" * 41: "has more than 40 groups in groups",
    "(a{99}){99}": "is longer than 4,000 letters once its counts are written out",
    "(?#" + "a" * 64_000 + ")": "has 64,004 letters; at most 64,000 are read",
}


@pytest.mark.parametrize("pattern", UNREAD, ids=lambda p: p[:16])
def test_what_is_not_read(pattern):
    with pytest.raises(_peft_regex.Unsupported, match=f"^it {UNREAD[pattern]}$"):
        read(pattern)


WRONG = {
    "a)": r"has a '\)' too many",
    "(a": r"has a '\(' without its '\)'",
    "[a": "ends too early",
    "\\": "ends too early",
    "(?#a": "ends too early",
    "(?P<a": "ends too early",
    "*a": r"has nothing to repeat before '\*'",
    "(|{2})": r"has nothing to repeat before '\{'",
    "^*": "repeats a place between letters",
    "a**": "repeats what is repeated",
    "a{2}(?#b){3}": "repeats what is repeated",
    "a{2,1}": "has a count whose most is below its least",
    "[b-a]": "has a range that is none",
    r"[\w-a]": "has a range that is none",
    "(?<=a*)b": "looks behind for what has no fixed length",
    "(?<!a|bc)b": "looks behind for what has no fixed length",
    "(?P<1>a)": "has a group whose name '1' is none, or another's",
    "(?P<n>a)(?P<n>a)": "has a group whose name 'n' is none, or another's",
}


@pytest.mark.parametrize("pattern", WRONG)
def test_what_is_no_pattern(pattern):
    assert compiled(pattern) is None
    with pytest.raises(ValueError, match=f"^it {WRONG[pattern]}$") as raised:
        read(pattern)
    assert not isinstance(raised.value, _peft_regex.Unsupported)


def test_patterns_that_take_too_much():
    with pytest.raises(ValueError, match="take more than 20,000,000 steps to match with its modules"):
        _peft_regex.Regex("(.*.*){900}x", _peft_regex.Budget(2000)).full("up")
    with pytest.raises(ValueError, match="alpha_pattern has 2,000 regular expressions; at most 1,024 are read"):
        _peft_match.Patterns("alpha_pattern", {f"(.*)x{i}": 3.0 for i in range(2000)})


def test_work_grows_with_the_name_and_not_faster():
    """What makes ``re`` try all ways to part a name."""

    def work(n):
        budget = _peft_regex.Budget()
        before = budget.left
        assert not _peft_regex.Regex("(a|aa|a*)*(?=.*c)b", budget).full("a" * n)
        return before - budget.left

    assert work(4000) - work(2000) < 1.1 * (work(2000) - work(1000)) * 2
