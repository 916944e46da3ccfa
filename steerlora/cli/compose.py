"""Hydra's part: it composes the YAML groups into one typed configuration.

Every mistake in the configuration becomes a `UserError` of one line.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from steerlora.cli.sections import (
    GROUPS,
    KINDS,
    OTHER_KEYS,
    config_directory,
    has_launchers,
    options_of,
    schema_of,
)
from steerlora.cli.suggestions import explain, nearest_key
from steerlora.config import SECTIONS, Config
from steerlora.errors import UserError
from steerlora.registry import import_plugins

SCHEMA = "_schema"
"""Option of every group that holds its typed defaults; the YAML files build on it."""

SEARCH_PATH = "hydra.searchpath="

# YAML may write ${every_layer:${model.layers}} for a site at every layer, and
# ${times:4,${model.width}} for four times the width. Registered on import, so that the processes of
# a sweep have them too.
OmegaConf.register_new_resolver("every_layer", lambda count: [*range(count)], replace=True)
OmegaConf.register_new_resolver("times", lambda factor, number: factor * number, replace=True)

Compose = Callable[..., Config]
"""``compose("model=micro_s", ...)``: this run's configuration with some options changed."""


def register_schemas() -> None:
    """Give every group its typed defaults, so that each key exists and has a type."""
    for group, schema in SECTIONS.items():
        _register(group, SCHEMA, schema)
    for group, (_, kinds, common) in KINDS.items():
        _register(group, SCHEMA, common)
        for kind, schema in kinds.known():
            _register(group, f"_{kind}", schema)
    _register_launchers()


@cache
def _register(group: str, name: str, schema: type) -> None:
    ConfigStore.instance().store(group=group, name=name, node=_node(group, schema))


def _node(group: str, schema: type) -> DictConfig:
    """The defaults of a section; fields may follow other keys of the configuration.

    A section that has kinds is typed later: a kind's YAML may add keys of its own, and a launcher
    sends what is stored here to processes that have not imported a plugin's classes.
    """
    node = _writable(OmegaConf.structured(schema))
    if group in KINDS:
        node = OmegaConf.create(OmegaConf.to_container(node))
    for field in dataclasses.fields(schema):
        if "interpolation" in field.metadata:
            OmegaConf.update(node, field.name, field.metadata["interpolation"])
        elif get_origin(get_type_hints(schema)[field.name]) is dict:
            # Its keys are the user's: evaluation.files.gsm8k=<file>, without Hydra's "+".
            OmegaConf.set_struct(node[field.name], False)
    return node


def _writable(node: DictConfig) -> DictConfig:
    """A frozen dataclass makes a read-only node, which YAML could not fill in."""
    OmegaConf.set_readonly(node, None)
    for key in node:
        if isinstance(node._get_node(key), DictConfig):
            _writable(node[key])
    return node


@cache
def _register_launchers() -> None:
    Plugins.instance()  # which have stored their options by then
    if has_launchers():
        from steerlora.cli.launchers import register_options

        register_options()


@contextmanager
def hydra_ready() -> Iterator[None]:
    """Hydra initialised with ``conf/``: the running job's own, or one for this context."""
    if GlobalHydra.instance().is_initialized():
        yield
        return
    register_schemas()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        yield


def load(overrides: Sequence[str]) -> Config:
    """Compose and check one configuration.

    Raises:
        UserError: an unknown key or option (with the nearest right ones), or a wrong value.
    """
    return _load(tuple(overrides))


@lru_cache(maxsize=1024)
def _load(overrides: tuple[str, ...]) -> Config:
    """Composing takes a fifth of a second, and an experiment's variants recur."""
    return typed(tree(overrides))


def tree(overrides: Sequence[str]) -> DictConfig:
    """Hydra's composition, its values not checked yet.

    Raises:
        UserError: an unknown key or option, with the nearest right ones.
    """
    overrides = with_plugins(overrides)
    with hydra_ready():
        try:
            return _composed(overrides)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UserError(explain(error)) from error


def _composed(overrides: Sequence[str]) -> DictConfig:
    try:
        return compose("config", overrides)
    except HydraException as error:
        if not re.search(r"Could not load '\w+/_", str(error)):
            raise
    # The typed defaults of a kind whose module needs torch: only now is that imported.
    for _, kinds, _ in KINDS.values():
        kinds.items()
    register_schemas()
    return compose("config", overrides)


def with_plugins(overrides: Sequence[str]) -> list[str]:
    """Import the plugins that overrides name, and have Hydra find the YAML files beside them.

    Raises:
        UserError: a plugin cannot be imported.
    """
    folders = import_plugins(_plugins_named(overrides))
    path = ",".join(f"file://{folder}" for folder in dict.fromkeys(folders))
    found = [text for text in overrides if not text.startswith(SEARCH_PATH)]
    return [*found, f"{SEARCH_PATH}[{path}]"] if path else list(overrides)


def _plugins_named(overrides: Sequence[str]) -> list[str]:
    """Modules that overrides name: they register before anything is composed."""
    given = [text for text in overrides if text.startswith("plugins=")]
    try:
        found = OverridesParser.create().parse_overrides(given)
    except HydraException as error:
        raise UserError(f"cannot read {given[-1]}") from error
    for text, override in zip(given, found, strict=True):
        if not isinstance(override.value(), list):
            raise UserError(f"{text}: give a list of modules, plugins=[my_package.mine]")
    return [str(name) for override in found for name in override.value()]


def typed(tree: DictConfig) -> Config:
    """The dataclasses of a composed tree, its interpolations resolved.

    Raises:
        UserError: a wrong value.
    """
    seed = tree.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UserError(f"seed={seed}: must be a whole number")
    for key in tree:
        if key not in (*GROUPS, *OTHER_KEYS):
            raise UserError(f"no such key: {key}; {nearest_key(key)}")
    try:
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    plugins = tuple(values.get("plugins") or ())
    import_plugins(plugins)  # a launcher's job has not composed the tree that it is given
    sections = {}
    for name in GROUPS:
        if values.get(name) is not None:
            sections[name] = _section(name, schema_of(name, values[name]), values[name])
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


def _section(name: str, schema: type, values: dict[str, Any]) -> Any:
    node = _writable(OmegaConf.structured(schema))
    try:
        merged = OmegaConf.merge(node, values)
    except OmegaConfBaseException as error:
        key = f"{name}.{getattr(error, 'full_key', None)}"
        if isinstance(error, ConfigKeyError):
            raise UserError(f"no such key: {key}; {nearest_key(key, schema)}") from error
        raise UserError(f"{key}: {str(error).splitlines()[0]}") from error
    return OmegaConf.to_object(merged)


def check_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Every job of a sweep, composed and checked before the first one starts."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    jobs = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    batches = [list(job) for batch in jobs for job in batch]
    for job in batches:
        load(job)
    return batches
