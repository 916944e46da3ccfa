"""The overrides of a command line: reading them, the folders they name, the jobs they ask for."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    Override,
    Quote,
    QuotedString,
    RangeSweep,
    ValueType,
)
from hydra.errors import HydraException

from steerlora.cli.sections import groups, options_of
from steerlora.errors import UserError, nearest, shown
from steerlora.registry import import_plugins

SEARCH_PATH = "hydra.searchpath"
OWN_MODEL = "model=own"
"""The option for a model of which nothing is known but its files."""
MOST_JOBS = 10_000
"""Jobs of a sweep at most: each is composed and checked before the first one starts."""


def read(overrides: Iterable[str]) -> list[Override]:
    """What Hydra's grammar makes of each override.

    Raises:
        UserError: it cannot read one; with the quoted form that it can.
    """
    parser, found = OverridesParser.create(), []
    for text in overrides:
        try:
            found += parser.parse_overrides([text])
        except (HydraException, ValueError) as error:
            raise UserError(_unreadable(text, error)) from error
    return found


def _unreadable(text: str, error: Exception) -> str:
    key, assigned, value = text.partition("=")
    if not assigned and not text.startswith("~"):
        return f"cannot read {shown(text)}: give <key>=<value>"
    quoted = f"{key}={_quoted(value)}"
    try:
        (override,) = OverridesParser.create().parse_overrides([quoted])
        good = override.value() == value
    except (HydraException, ValueError, AttributeError):
        good = False
    if good and isinstance(error, HydraException):
        return f"cannot read {shown(text)}: such a value needs quotes, {shlex.quote(quoted)}"
    return f"cannot read {shown(text)}: {' '.join(str(error).split())[:200]}"


def _quoted(value: str) -> str:
    return QuotedString(text=value, quote=Quote.double).with_quotes()


def search_path(overrides: Iterable[Override]) -> list[str]:
    """The folders of further YAML files that overrides name, as ``hydra.searchpath`` has them.

    Raises:
        UserError: no list of folders, or a folder is not there.
    """
    found = []
    for override in overrides:
        if override.key_or_group == SEARCH_PATH:
            value = override.value()
            if not isinstance(value, list):
                raise UserError(f"{override.input_line}: give a list, {SEARCH_PATH}=[<folder>]")
            found += [folder_of(SEARCH_PATH, str(getattr(v, "text", v))) for v in value]
    return found


def folder_of(key: str, place: str) -> str:
    """A folder of YAML files for ``hydra.searchpath``, wherever the command is continued.

    Raises:
        UserError: it is not there.
    """
    if place.startswith("pkg://"):
        return place
    try:
        folder = Path(place.removeprefix("file://")).expanduser().absolute()
        there = folder.is_dir()
    except (RuntimeError, OSError, ValueError):
        there = False
    if not there:
        raise UserError(f"{key}={shown(place)}: there is no such folder")
    return f"file://{folder}"


def with_folders(overrides: Sequence[str], folders: Iterable[str] = ()) -> list[str]:
    """Overrides with one ``hydra.searchpath``: the folders that they name themselves, the folders
    of configuration beside the plugins that they name, which are imported, and more.

    Raises:
        UserError: an override cannot be read, a plugin cannot be imported.
    """
    read_ones = read(overrides)
    beside = [f"file://{folder}" for folder in import_plugins(_plugins_named(read_ones))]
    path = list(dict.fromkeys([*search_path(read_ones), *beside, *folders]))
    others = [
        text
        for text, override in zip(overrides, read_ones, strict=True)
        if override.key_or_group != SEARCH_PATH
    ]
    return [*others, f"{SEARCH_PATH}=[{','.join(map(_quoted, path))}]"] if path else others


def with_own_model(overrides: Sequence[str]) -> list[str]:
    """Overrides with `OWN_MODEL` where they give ``model.path`` and choose no option of ``model``:
    the sizes of the default option are another model's.

    Raises:
        UserError: an override cannot be read.
    """
    given = {override.key_or_group: override for override in read(overrides)}
    path = given.get("model.path")
    alone = path is not None and "model" not in given and path.value() not in (None, "")
    return [OWN_MODEL, *overrides] if alone else [*overrides]


def _plugins_named(overrides: Iterable[Override]) -> list[str]:
    """Modules that overrides name: they register before anything is composed."""
    names = []
    for override in overrides:
        if override.key_or_group == "plugins":
            value = override.value()
            if not isinstance(value, list):
                raise UserError(
                    f"{override.input_line}: give a list of modules, plugins=[my_package.mine]"
                )
            names += [str(getattr(name, "text", name)) for name in value]
    return names


def refuse_lists_of_options(overrides: Iterable[Override]) -> None:
    """Hydra would lay the options of ``model=[micro_s,micro_m]`` one over the other.

    Raises:
        UserError: names how to run both.
    """
    chosen: dict[str, str] = {}
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if key not in groups() or override.is_delete():
            continue
        if isinstance(value, list) and not override.is_sweep_override():
            every = ",".join(str(option) for option in value)
            raise UserError(
                f"{override.input_line}: give one option; a sweep runs all: -m {key}={every}"
            )
        if key == "stage" and chosen.setdefault(key, override.input_line) != override.input_line:
            raise UserError(
                f"{chosen[key]} and {override.input_line}: give one stage; a sweep runs several: "
                f"-m {key}=<option>,<option>"
            )


def spelt_out(overrides: Sequence[str]) -> list[str]:
    """A sweep's overrides, each with the values that it takes one by one: ``glob(*)`` and
    ``range(3)`` too, in the order in which they will run.

    Raises:
        UserError: no values, or too many.
    """
    read_ones = read(overrides)
    folders = search_path(read_ones)
    found, jobs = [], 1
    for text, override in zip(overrides, read_ones, strict=True):
        if override.is_sweep_override():
            values = _values_of(override, folders)
            if not values:
                raise UserError(f"{shown(text)}: is no value at all, and so the sweep has no job")
            jobs *= len(values)
            text = f"{override.get_key_element()}={','.join(values)}"
        found.append(text)
        if jobs > MOST_JOBS:
            raise UserError(f"{shown(text)}: a sweep has {MOST_JOBS} jobs at most")
    return found


def _values_of(override: Override, folders: Sequence[str]) -> list[str]:
    value, text = override.value(), shown(override.input_line)
    if override.value_type is ValueType.INTERVAL_SWEEP:
        raise UserError(
            f"{text}: an interval has no single values for Hydra's basic sweeper: give them, "
            f"{override.key_or_group}=1,2, or range(<start>,<stop>,<step>)"
        )
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        options = options_of(override.key_or_group, folders)
        if not (chosen := value.filter(options)):
            raise UserError(f"{text}: no option matches; {nearest('', options)}")
        return chosen
    if isinstance(value, RangeSweep):
        step = value.step or math.nan
        if not (float(value.stop) - float(value.start)) / step <= MOST_JOBS:
            raise UserError(f"{text}: a sweep has {MOST_JOBS} jobs at most")
    return list(override.sweep_string_iterator())


def jobs_of(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every job of a sweep whose overrides are `spelt_out`; the last one of a key
    holds, as in Hydra's basic sweeper."""
    choices = {}
    for override in read(overrides):
        key = override.get_key_element()
        if override.is_sweep_override():
            choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            choices[key] = [f"{key}={override.get_value_element_as_str()}"]
    return [list(job) for job in product(*choices.values())]


def samples_of(overrides: Sequence[str]) -> list[list[str]]:
    """Jobs that a sweep may come to whose sweeper searches. Each differs from the first in one key
    at most; every choice, and both ends of every interval, is in one of them.

    Raises:
        UserError: a key has no value at all.
    """
    read_ones = read(overrides)
    folders = search_path(read_ones)
    values: dict[str, list[str]] = {}
    for override in read_ones:
        if override.value_type is ValueType.INTERVAL_SWEEP:
            interval = override.value()
            found = [str(interval.start), str(interval.end)]
        elif override.is_sweep_override():
            found = _values_of(override, folders)
        else:
            found = [override.get_value_element_as_str()]
        if not found:
            raise UserError(f"{shown(override.input_line)}: is no value at all")
        values[override.get_key_element()] = found
    first = {key: found[0] for key, found in values.items()}
    others = [{**first, key: value} for key, found in values.items() for value in found[1:]]
    return [[f"{key}={value}" for key, value in job.items()] for job in (first, *others)]
