"""A composed tree as the typed configuration: known keys, set to what they may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from steerlora.cli.model_defaults import filled
from steerlora.cli.sections import GROUPS, OTHER_KEYS, options_of, schema_of
from steerlora.cli.suggestions import explain, nearest_key
from steerlora.config import Config
from steerlora.config.checks import fitted, hints_of
from steerlora.config.ranges import Name, Seed
from steerlora.errors import UserError, shown
from steerlora.registry import import_plugins

NOT_SET = "???"
"""What OmegaConf has in place of a value that has no default."""


def typed(tree: DictConfig) -> Config:
    """The dataclasses of a composed tree, its interpolations resolved.

    Raises:
        UserError: a wrong value.
    """
    for key in tree:
        if key not in (*GROUPS, *OTHER_KEYS):
            raise UserError(f"no such key: {key}; {nearest_key(str(key))}")
    try:
        tree = filled(tree, typed)
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    seed = fitted("seed", values.get("seed", 0), Seed)
    plugins = tuple(fitted("plugins", values.get("plugins", []), list[Name]))
    import_plugins(plugins)  # a launcher's job has not composed the tree that it is given
    sections = {}
    for name in GROUPS:
        if values.get(name) is not None:
            _refuse_others(name, values[name])
            sections[name] = made(schema_of(name, values[name]), name, values[name])
        elif name != "stage":
            options = ", ".join(options_of(name))
            raise UserError(
                f"{name} is empty: it needs its section"
                + (f", {name}=<option> of {options}" if options else "")
            )
    return Config(**sections, seed=seed, plugins=plugins, runs=_runs(values.get("runs") or ()))


def _runs(given: Any) -> tuple[str, ...]:
    """The names that ``runs`` gives; a list, or one alone."""
    names = given if isinstance(given, list | tuple) else [given]
    for name in names:
        if not isinstance(name, str):  # 12e34567890123456789 is a number to Hydra
            raise UserError(f"runs: {name} is read as a number: put quotes around the name")
    return tuple(names)


def made(schema: type, key: str, values: Any) -> Any:
    """A section of the values that are given for it, with the sections inside it.

    Args:
        schema: a dataclass.
        key: what the configuration calls the section.
        values: {field: value}; a field that is not there has its default.

    Raises:
        UserError: an unknown field, one that is not set, or a value that a field may not have.
    """
    _refuse_others(key, values)
    hints, given = hints_of(schema), {}
    for name in values:
        if name not in hints:
            raise UserError(f"no such key: {key}.{name}; {nearest_key(f'{key}.{name}', schema)}")
    for field in dataclasses.fields(schema):
        value = values.get(field.name, NOT_SET)
        if value != NOT_SET:
            inner = dataclasses.is_dataclass(hints[field.name])
            given[field.name] = (
                made(hints[field.name], f"{key}.{field.name}", value) if inner else value
            )
        elif field.default is dataclasses.MISSING is field.default_factory:
            raise UserError(f"{key}.{field.name} is not set: give {key}.{field.name}=<value>")
    return schema(**given)


def _refuse_others(key: str, values: Any) -> None:
    if not isinstance(values, Mapping):
        raise UserError(f"{key}={shown(values)}: has keys of its own, {key}.<key>=<value>")
