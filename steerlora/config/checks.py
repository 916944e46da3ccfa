"""What a value may be: one line for the user where it may not."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from steerlora.errors import UserError, nearest


def positive(owner: str, section: Any, names: str) -> None:
    """UserError unless each value that is set is greater than 0.

    Args:
        owner: what the configuration calls the section.
        section: the dataclass.
        names: its fields that are checked, with spaces between them.
    """
    for name in names.split():
        value = getattr(section, name)
        if value is not None and not value > 0:
            raise UserError(f"{owner}.{name}={value}: must be greater than 0")


def one_of(key: str, value: str, choices: Collection[str]) -> None:
    """UserError, with the nearest right ones, unless ``value`` is among the choices."""
    if value not in choices:
        raise UserError(f"{key}={value}: {nearest(value, choices)}")


def not_negative(owner: str, section: Any, names: str) -> None:
    """UserError for a value below 0; arguments as for `positive`."""
    for name in names.split():
        value = getattr(section, name)
        if value < 0:
            raise UserError(f"{owner}.{name}={value}: must not be negative")


def share(owner: str, section: Any, names: str) -> None:
    """UserError for a value outside [0, 1]; arguments as for `positive`."""
    for name in names.split():
        value = getattr(section, name)
        if not 0 <= value <= 1:
            raise UserError(f"{owner}.{name}={value}: must be from 0 to 1")


def given(key: str, folder: str) -> None:
    """UserError for an empty path: it is the current folder, which would fill with artifacts."""
    if not folder.strip():
        raise UserError(f"{key} is empty: give a folder, {key}=<folder>")
