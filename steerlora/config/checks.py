"""The one place where values of a configuration are checked against what their fields declare.

A `Section` checks its fields whenever one is made, from the command line or by a program. What
concerns several fields together stays in ``__post_init__`` of the section.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf

from steerlora.config.ranges import (
    Distinct,
    Matches,
    OneOf,
    Place,
    may_be,
    taken_apart,
    without_null,
)
from steerlora.errors import UserError, nearest, shown

LONGEST_PART, LONGEST_PATH = 255, 1000
"""Bytes of a file's name and of a path at most; what is written inside adds to the latter."""


class Section:
    """A part of a configuration: a frozen dataclass, each field of which is checked.

    ``class ModelConfig(Section, key="model")`` gives the name under which messages know it.
    """

    key: ClassVar[str] = ""
    """What the configuration calls the section."""

    def __init_subclass__(cls, *, key: str | None = None, **more: Any) -> None:
        super().__init_subclass__(**more)
        if key is not None:
            cls.key = key

    def __post_init__(self) -> None:
        for name, hint in hints_of(type(self)).items():
            value = getattr(self, name)
            fitting = fitted(f"{self.key}.{name}", value, hint)
            if fitting is not value:
                object.__setattr__(self, name, fitting)


@cache
def hints_of(schema: type) -> dict[str, Any]:
    """{field of a dataclass: its type, with what is declared of its range}."""
    hints = get_type_hints(schema, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def fitted(key: str, value: Any, hint: Any) -> Any:
    """A value that a field of this type may have, as the type asks for it.

    A whole number is also a number (then a float) and a text; the home folder takes the place of
    ``~`` in a path. Types that are not known here, such as a plugin's own, are not checked.

    Args:
        key: of the configuration, for messages.
        value: what it is given.
        hint: the type, with what is declared of its range.

    Raises:
        UserError: in one line, what the value may be.
    """
    bare, optional = without_null(hint)
    if value is None and optional:
        return None
    kind, rules = taken_apart(bare)
    convert = _CONVERSIONS.get(get_origin(kind) or kind)
    if convert is None:
        return value
    try:
        fitting = convert(value)
        fits = all(_obeys(fitting, rule) for rule in rules if rule != Distinct())
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        for rule in rules:
            if isinstance(rule, OneOf) and isinstance(value, str):
                one_of(key, value, rule.choices)
        or_null = ", or null" if optional else ""
        quotes = ": put quotes round it" if kind is str and isinstance(value, bool | float) else ""
        raise UserError(f"{key}={shown(value)}: must be {may_be(bare)}{or_null}{quotes}")
    if isinstance(fitting, list | tuple):
        (inner, *_) = get_args(kind) or (Any,)
        fitting = type(fitting)(
            fitted(f"{key}[{index}]", item, inner) for index, item in enumerate(fitting)
        )
        if Distinct() in rules and len(set(fitting)) < len(fitting):
            raise UserError(f"{key}={shown(value)}: give each once")
    if isinstance(fitting, dict):
        _, inner = get_args(kind) or (str, Any)
        fitting = {name: fitted(f"{key}.{name}", item, inner) for name, item in fitting.items()}
    return _expanded(key, fitting) if Place() in rules else fitting


def _number(value: Any) -> float:
    if isinstance(value, bool | str):
        raise TypeError
    value = float(value)
    if not math.isfinite(value):
        raise ValueError
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _text(value: Any) -> str:
    """A text as it is; a whole number is what was written, which 1e5 or true is not."""
    if not isinstance(value, str):
        return str(_whole(value))
    value.encode()  # half a surrogate pair is no text
    if "\0" in value:
        raise ValueError
    return value


def _sequence(value: Any) -> list | tuple:
    if not isinstance(value, list | tuple):
        raise TypeError
    return value


def _mapping(value: Any) -> dict:
    if not isinstance(value, Mapping):
        raise TypeError
    if not all(isinstance(name, str) and name.strip() for name in value):
        raise TypeError
    return dict(value)


_CONVERSIONS = {
    int: _whole,
    float: _number,
    bool: _truth,
    str: _text,
    list: _sequence,
    tuple: _sequence,
    dict: _mapping,
}
"""{type: gives a value of it, or fails}."""


def _obeys(value: Any, rule: Any) -> bool:
    match rule:
        case Ge(ge):
            return value >= ge
        case Gt(gt):
            return value > gt
        case Le(le):
            return value <= le
        case Lt(lt):
            return value < lt
        case MultipleOf(number):
            return value % number == 0
        case MinLen(least):
            return len(value) >= least
        case Matches(pattern):
            return re.fullmatch(pattern, value) is not None
        case OneOf(choices):
            return value in choices
    return True


def _expanded(key: str, value: str) -> str:
    """A path with the home folder in place of ``~``, and of a length that a disk takes."""
    if not value.strip():
        raise UserError(f"{key} is empty: give {key}=<path>")
    try:
        path = Path(value).expanduser()
    except RuntimeError:
        raise UserError(
            f"{key}={shown(value)}: there is no such home folder; ./~... is a file of that name"
        ) from None
    if len(bytes(path)) > LONGEST_PATH or any(
        len(part.encode()) > LONGEST_PART for part in path.parts
    ):
        raise UserError(
            f"{key}={shown(value)}: is too long: at most {LONGEST_PART} bytes a name and "
            f"{LONGEST_PATH} in all"
        )
    return str(path) if value.startswith("~") else value


def one_of(key: str, value: str, choices: Collection[str]) -> None:
    """UserError, with the nearest right ones, unless ``value`` is among the choices."""
    if value not in choices:
        raise UserError(f"{key}={shown(value)}: {nearest(value, choices)}")
