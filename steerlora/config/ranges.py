"""What a value of a configuration may be, in the type of its field.

    rank: Annotated[int, Interval(ge=1, le=1024)] = 16
    tasks: Annotated[list[str], MinLen(1), Distinct()] | None = None

The words are those of ``annotated-types`` and the four that are defined here. Whoever makes a
`Section` has its fields checked by them (``steerlora/config/checks.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Lt, MinLen, MultipleOf


@dataclass(frozen=True)
class OneOf:
    """A text is one of these."""

    choices: tuple[str, ...]
    """What it may be."""


@dataclass(frozen=True)
class Distinct:
    """No item of a list comes twice."""


@dataclass(frozen=True)
class Matches:
    """A text matches a pattern, all of it."""

    pattern: str
    """A regular expression."""

    says: str
    """What such a text is, for messages: "must be <says>"."""


@dataclass(frozen=True)
class Place:
    """A text is a file, a folder or a hub id, and not empty; ``~`` in front is a home folder."""


Count = Annotated[int, Interval(ge=1, le=10**9)]
"""How many of something there are, at least one."""
Layer = Annotated[int, Interval(ge=0, le=1000)]
"""Number of a decoder layer, from 0."""
Seed = Annotated[int, Interval(ge=0, le=2**32 - 1)]
"""What every library here takes as a seed."""
Share = Annotated[float, Interval(ge=0, le=1)]
"""A part of a whole."""
Positive = Annotated[float, Interval(gt=0)]
"""A number above 0. As every number of a configuration, it is finite."""
NotNegative = Annotated[float, Interval(ge=0)]
"""A number from 0."""
Name = Annotated[
    str,
    Matches(
        r"[^\s\x00-\x1f\x7f-\x9f](?:[^\x00-\x1f\x7f-\x9f\u2028\u2029]{0,98}"
        r"[^\s\x00-\x1f\x7f-\x9f])?",
        "a name: 1 to 100 characters on one line, no blanks around them",
    ),
]
"""What tables, labels and folders call something: printable, on one line."""
Label = Annotated[
    str, Matches(r"[^\x00-\x1f\x7f-\x9f]{0,100}", "one line of at most 100 characters")
]
"""As a name, but it may be empty."""
NotEmpty = Annotated[str, Matches(r"(?s)\s*\S.*", "text that is not empty")]
"""A text that says something."""
Location = Annotated[str, Place()]
"""Where something lies."""


def without_null(hint: Any) -> tuple[Any, bool]:
    """The type less None, and whether it may be None."""
    if get_origin(hint) not in (Union, UnionType):
        return hint, hint is NoneType
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 else Any, len(kinds) < len(get_args(hint))


def taken_apart(hint: Any) -> tuple[Any, list[Any]]:
    """The bare type and its rules, each single."""
    if get_origin(hint) is not Annotated:
        return hint, []
    kind, *rules = get_args(hint)
    return kind, list(chain.from_iterable(map(_single, rules)))


def _single(rule: Any) -> Iterator[Any]:
    yield from rule if isinstance(rule, GroupedMetadata) else (rule,)


_NOUNS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
}


def may_be(hint: Any, *, several: bool = False) -> str:
    """What a value of this type may be, in words: "a whole number from 1 to 64".

    Args:
        hint: the type, with what is declared of its range.
        several: whether the words are about many of them.
    """
    kind, rules = taken_apart(without_null(hint)[0])
    for rule in rules:
        if isinstance(rule, Matches):
            return rule.says
        if isinstance(rule, OneOf):
            return f"one of {', '.join(rule.choices)}"
    outer, inner = get_origin(kind) or kind, get_args(kind) or (Any, Any)
    if outer in (list, tuple):
        least = ", with at least one item" if any(isinstance(r, MinLen) for r in rules) else ""
        return f"a list of {may_be(inner[0], several=True)}{least}"
    if outer is dict:
        return f"names with {may_be(inner[1], several=True)}: {{name: ...}}"
    noun = _NOUNS.get(outer, ("a value", "values"))[several]
    return f"{noun}{_range_in_words(rules)}"


def _range_in_words(rules: Collection[Any]) -> str:
    below = above = multiple = ""
    for rule in rules:
        match rule:
            case Ge(number):
                below = f" from {number}"
            case Gt(number):
                below = f" above {number}"
            case Le(number):
                above = f" to {number}"
            case Lt(number):
                above = f" and below {number}"
            case MultipleOf(number):
                multiple = f", a multiple of {number}"
    if above.startswith(" to") and not below.startswith(" from"):
        above = f"{' and' if below else ''} up{above}"
    return f"{below}{above}{multiple}"
