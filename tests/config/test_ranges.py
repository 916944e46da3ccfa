"""Every field says beside it what it may be: what is outside is refused in one line, what is inside
is taken. Both are drawn from the declarations themselves."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import Annotated, Any, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Interval, Le, Lt, MinLen, MultipleOf
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from steerlora.cli.sections import KINDS
from steerlora.cli.typed import made
from steerlora.config import SECTIONS, SourceConfig
from steerlora.config.checks import Section, fitted, hints_of
from steerlora.config.ranges import (
    Distinct,
    Matches,
    OneOf,
    Place,
    may_be,
    taken_apart,
    without_null,
)
from steerlora.errors import UserError


def with_inner(schema: type) -> list[type]:
    """A section and those inside it."""
    inner = [hint for hint in hints_of(schema).values() if dataclasses.is_dataclass(hint)]
    return [schema, *(one for part in inner for one in with_inner(part))]


OURS = [
    kind
    for _, kinds, _ in KINDS.values()
    for _, kind in kinds.known()
    if kind.__module__.startswith("steerlora.")
]
SCHEMAS = list(
    dict.fromkeys(
        one for schema in (*SECTIONS.values(), *OURS, SourceConfig) for one in with_inner(schema)
    )
)
NAMING = {key for key, _, _ in KINDS.values()}
"""Fields that a registry checks."""
LONG = "x" * 1200
TEXTS = ["", " ", "a\nb", "\x00", "\udc80", LONG, "a/b c#d", "no such choice", "~no_such_user_/x"]
ANYTHING = [None, True, -1, 1.5, float("nan"), float("inf"), 10**400, *TEXTS, [[1]], {"a": []}]


QUICK = settings(
    max_examples=15,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
"""A failure names field and value; making them smaller would take minutes."""


def bounds(rules: list, smallest: float) -> tuple[Any, Any]:
    """The least and the largest number that rules allow; for whole numbers, itself allowed."""
    low = high = None
    for rule in rules:
        match rule:
            case Ge(number):
                low = number
            case Gt(number):
                low = number + smallest
            case Le(number):
                high = number
            case Lt(number):
                high = number - smallest
    return low, high


def right(hint: Any) -> SearchStrategy:
    """Values that a field of this type may have."""
    hint, optional = without_null(hint)
    if optional:
        return st.none() | right(hint)
    kind, rules = taken_apart(hint)
    outer = get_origin(kind) or kind
    single = {type(rule): rule for rule in rules}
    if outer is bool:
        return st.booleans()
    if outer is int:
        step = single[MultipleOf].multiple_of if MultipleOf in single else 1
        low, high = bounds(rules, 1)
        return st.integers(-(-low // step), None if high is None else high // step).map(
            lambda number: number * step
        )
    if outer is float:
        low, high = bounds(rules, 0.0)
        return st.floats(
            low, high, exclude_min=Gt in single, exclude_max=Lt in single, allow_infinity=False
        )
    if outer is str:
        if OneOf in single:
            return st.sampled_from(single[OneOf].choices)
        if Matches in single:
            return st.from_regex(single[Matches].pattern, fullmatch=True).filter(
                lambda text: "\0" not in text
            )
        return st.from_regex(r"[a-z][a-z0-9_./ -]{0,40}", fullmatch=True)
    if outer in (list, tuple):
        unique = Distinct in single
        return st.lists(
            right(get_args(kind)[0]), min_size=int(MinLen in single), max_size=3, unique=unique
        )
    if outer is dict:
        return st.dictionaries(
            st.from_regex(r"[a-z_]{1,9}", fullmatch=True), right(get_args(kind)[1]), max_size=2
        )
    return st.just({})


def wrong(hint: Any) -> SearchStrategy:
    """Values of another type, and of the right type beyond the range."""
    kind, rules = taken_apart(without_null(hint)[0])
    outer, inner = get_origin(kind) or kind, get_args(kind)
    beyond: list[SearchStrategy] = [st.sampled_from(ANYTHING)]
    if outer in (int, float):
        low, high = bounds(rules, 1 if outer is int else 0.0)
        if low is not None:
            beyond.append(st.integers(max_value=int(low) - 1))
        if high is not None:
            beyond.append(st.integers(min_value=int(high) + 1))
        beyond.append(st.floats(allow_nan=True))
    if outer in (list, tuple):
        beyond += [wrong(inner[0]).map(lambda item: [item]), right(inner[0]).map(lambda x: [x, x])]
        beyond.append(st.just([]))
    if outer is dict and inner[1] is not Any:
        beyond += [wrong(inner[1]).map(lambda item: {"a": item}), st.just({1: 2, "": 3})]
    return st.one_of(beyond).filter(lambda value: not allowed(value, hint))


def allowed(value: Any, hint: Any) -> bool:
    """Whether a field of this type may have the value: the rules once more, in other words."""
    hint, optional = without_null(hint)
    if value is None or dataclasses.is_dataclass(hint):
        return optional
    kind, rules = taken_apart(hint)
    outer = get_origin(kind) or kind
    if outer is bool:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if outer in (int, float):
        return (
            isinstance(value, int if outer is int else (int, float))
            and (outer is int or abs(value) <= sys.float_info.max)
            and all(keeps(value, rule) for rule in rules)
        )
    if outer is str:
        value = str(value) if isinstance(value, int) else value
        return (
            isinstance(value, str)
            and not {"\0", "\udc80"} & set(value)
            and all(keeps(value, rule) for rule in rules)
        )
    if outer in (list, tuple):
        return isinstance(value, list) and all(
            [allowed(item, get_args(kind)[0]) for item in value]
            + [keeps(value, rule) for rule in rules]
        )
    if outer is dict:
        return isinstance(value, dict) and all(
            isinstance(name, str) and name.strip() and allowed(item, get_args(kind)[1])
            for name, item in value.items()
        )
    return True


def keeps(value: Any, rule: Any) -> bool:
    match rule:
        case Ge(low):
            return value >= low
        case Gt(low):
            return value > low
        case Le(high):
            return value <= high
        case Lt(high):
            return value < high
        case MultipleOf(step):
            return value % step == 0
        case MinLen(least):
            return len(value) >= least
        case Distinct():
            return all(value.count(item) == 1 for item in value)
        case OneOf(choices):
            return value in choices
        case Matches(pattern):
            return re.fullmatch(pattern, value) is not None
        case Place():
            return bool(value.strip()) and len(value) < 255 and not value.startswith("~")
    raise AssertionError(rule)


def checked_by_type(schema: type) -> dict[str, Any]:
    """{field: its type}, of fields that are not left to a registry or a stage."""
    return {
        name: hint
        for name, hint in hints_of(schema).items()
        if name not in NAMING and get_args(hint) != (str, Any)
    }


def build(schema: type, name: str, value: Any) -> Any:
    key = getattr(schema, "key", "domains.sources.law")
    if not issubclass(schema, Section):
        return fitted(f"{key}.{name}", value, hints_of(schema)[name])
    required = {
        field.name: "x"
        for field in dataclasses.fields(schema)
        if field.default is dataclasses.MISSING is field.default_factory
    }
    return made(schema, key, required | {name: value})


def assert_refused(schema: type, name: str, value: Any) -> None:
    try:
        build(schema, name, value)
    except UserError as error:
        line = str(error)
        assert f".{name}" in line
        assert line.isprintable()  # and so has no line end
        assert len(line) < 600
    else:
        pytest.fail(f"{schema.__name__}.{name} takes {value!r}", pytrace=False)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_a_value_beyond_what_its_field_says_is_refused_in_one_line(schema):
    hints = checked_by_type(schema)

    @QUICK
    @given(st.fixed_dictionaries({name: wrong(hint) for name, hint in hints.items()}))
    def refused(values):
        for name, value in values.items():
            assert_refused(schema, name, value)

    refused()


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_a_value_inside_what_its_field_says_is_taken(schema):
    hints = {
        name: hint
        for name, hint in checked_by_type(schema).items()
        if not dataclasses.is_dataclass(hint)
    }

    @QUICK
    @given(st.fixed_dictionaries({name: right(hint) for name, hint in hints.items()}))
    def taken(values):
        for name, value in values.items():
            found = fitted(name, value, hints[name])
            assert found == value
            assert fitted(name, found, hints[name]) == found

    taken()


def bare(hint: Any) -> list[Any]:
    """Numbers and texts in a type, of which nothing says what they may be."""
    hint, _ = without_null(hint)
    kind, rules = taken_apart(hint)
    inner = get_args(kind)
    if get_origin(kind) is dict:
        return bare(inner[1])
    if get_origin(kind) in (list, tuple):
        return bare(inner[0])
    return [kind] if kind in (int, float, str) and not rules else []


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_field_says_what_it_may_be(schema):
    without = {name: bare(hint) for name, hint in checked_by_type(schema).items() if bare(hint)}
    assert without == {}


def test_the_sections_are_found():
    names = {schema.__name__ for schema in SCHEMAS}
    assert {"ModelConfig", "StudyConfig", "SourceConfig", "LossWeights", "TopKConfig"} <= names
    assert sum(len(hints_of(schema)) for schema in SCHEMAS) > 150


@pytest.mark.parametrize(
    ("hint", "says"),
    [
        (Annotated[int, Interval(ge=1, le=64)], "a whole number from 1 to 64"),
        (Annotated[float, Interval(gt=0, lt=1)], "a number above 0 and below 1"),
        (Annotated[float, Interval(gt=0, le=1)], "a number above 0 and up to 1"),
        (Annotated[int, Interval(le=9), MultipleOf(3)], "a whole number up to 9, a multiple of 3"),
        (list[Annotated[int, Interval(ge=0)]] | None, "a list of whole numbers from 0"),
        (Annotated[list[bool], MinLen(1)], "a list of true or false, with at least one item"),
        (list, "a list of values"),
    ],
)
def test_a_range_in_words(hint, says):
    assert may_be(hint) == says


@pytest.mark.parametrize(
    ("hint", "given", "becomes"),
    [
        (Annotated[float, Interval(ge=0)], 1, 1.0),
        (str, 12345678, "12345678"),
        (Annotated[str, Place()], "~", str),
        (dict[str, float], {"a": 1}, {"a": 1.0}),
        (list[float], [1, 2.5], [1.0, 2.5]),
    ],
)
def test_a_value_becomes_what_the_field_asks_for(hint, given, becomes, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = fitted("key", given, hint)
    assert found == (str(tmp_path) if becomes is str else becomes)
    assert type(found) is (str if becomes is str else type(becomes))


@pytest.mark.parametrize("value", [1e5, True])
def test_a_text_that_was_read_as_something_else_asks_for_quotes(value):
    with pytest.raises(UserError, match="must be text: put quotes round it"):
        fitted("model.revision", value, str)
