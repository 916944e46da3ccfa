"""Hydra's part: it composes the YAML groups into one typed configuration.

Every mistake in the configuration becomes a `UserError` of one line.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NamedTuple, NoReturn, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from steerlora.cli.overrides import read, search_path, with_folders, with_own_model
from steerlora.cli.sections import (
    KINDS,
    config_directory,
    has_launchers,
)
from steerlora.cli.suggestions import explain
from steerlora.cli.typed import NOT_SET, typed
from steerlora.config import SECTIONS, Config
from steerlora.config.checks import fitted
from steerlora.config.ranges import Layer
from steerlora.errors import UserError

SCHEMA = "_schema"
"""Option of every group that holds its typed defaults; the YAML files build on it."""

# YAML may write ${every_layer:${model.layers}} for a site at every layer, and
# ${times:4,${model.width}} for four times the width. Registered on import, so that the processes of
# a sweep have them too.
OmegaConf.register_new_resolver(
    "every_layer", lambda count: [*range(fitted("every_layer", count, Layer))], replace=True
)
OmegaConf.register_new_resolver(
    "times",
    lambda factor, number: fitted("times", factor, int) * fitted("times", number, int),
    replace=True,
)

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
    ConfigStore.instance().store(group=group, name=name, node=_node(schema))


def _node(schema: type) -> DictConfig:
    """The defaults of a section; fields may follow other keys of the configuration.

    Hydra is not told their types: `typed` checks all values, those of sections inside sections and
    of kinds that a plugin brings as well, and says in one line what is wrong.
    """
    node = OmegaConf.create(_defaults(schema))
    for name, hint in get_type_hints(schema).items():
        if get_origin(hint) is dict and name in node:
            # Its keys are the user's: evaluation.files.gsm8k=<file>, without Hydra's "+".
            OmegaConf.set_struct(node[name], False)
    return node


def _defaults(schema: type) -> dict[str, Any]:
    values = {}
    for field in dataclasses.fields(schema):
        if "interpolation" in field.metadata:
            value = field.metadata["interpolation"]
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = NOT_SET
        values[field.name] = _defaults(type(value)) if dataclasses.is_dataclass(value) else value
    return values


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
    """An experiment's variants recur."""
    return typed(tree(overrides))


COMPARED = ("method", "intervention")
"""Groups whose options an experiment tells apart by their names."""


def variant_of(overrides: Sequence[str]) -> Compose:
    """The same run's configuration with some options changed.

    ``method=lora`` is refused where what it gives has another name: a report would look for the
    option's in vain.
    """

    def variant(*changes: str) -> Config:
        config = load([*overrides, *changes])
        for change in changes:
            group, _, option = change.partition("=")
            if group in COMPARED and (name := getattr(config, group).name) != option:
                refuse_name(group, option, name)
        return config

    return variant


def tree(overrides: Sequence[str]) -> DictConfig:
    """Hydra's composition, its values not checked yet.

    Raises:
        UserError: an unknown key or option, with the nearest right ones.
    """
    overrides = with_own_model(with_folders(overrides))
    with hydra_ready():
        try:
            return _composed(overrides)
        except (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
            raise UserError(explain(error, search_path(read(overrides)))) from error


def _composed(overrides: Sequence[str]) -> DictConfig:
    """What a composition reads is a matter of the options of groups: trees of the same options are
    composed once, and the overrides that set keys are applied to a copy."""
    given = read(overrides)
    plain = all(override.type == OverrideType.CHANGE for override in given)
    if not plain or search_path(given):  # keys come and go, or the files are the user's
        return _compose(overrides)
    setting = [override for override in given if _sets_a_key(override)]
    options = tuple(override.input_line for override in given if override not in setting)
    place = str(GlobalHydra.instance().config_loader().get_search_path())
    tree = copy.deepcopy(_tree_of(options, place))
    ConfigLoaderImpl._apply_overrides_to_config(setting, tree)
    return tree


def _sets_a_key(override: Override) -> bool:
    """Rather than choose an option of a group, or Hydra's own."""
    key = override.key_or_group
    if override.is_hydra_override() or override.is_sweep_override():
        return False
    return ("." in key or key == "seed") and "/" not in key


APART = ("method", "order")
"""Groups whose options set keys of their own group alone."""


@lru_cache(maxsize=256)
def _tree_of(options: tuple[str, ...], place: str) -> DictConfig:
    """Many methods in many orders are put together from compositions of one of either."""
    apart = {group: o for o in options if (group := o.partition("=")[0]) in APART}
    rest = tuple(option for option in options if option not in apart.values())
    if set(apart) != set(APART) or len(rest) + len(APART) != len(options):
        return _compose(options)
    tree = copy.deepcopy(_tree_of(rest, place))
    for group, option in apart.items():
        tree[group] = _tree_of((*rest, option), place)[group]
    return tree


def _compose(overrides: Sequence[str]) -> DictConfig:
    try:
        return compose("config", list(overrides))
    except HydraException as error:
        if not re.search(r"Could not load '\w+/_", str(error)):
            raise
    # The typed defaults of a kind whose module needs torch: only now is that imported.
    for _, kinds, _ in KINDS.values():
        kinds.items()
    register_schemas()
    return compose("config", list(overrides))


def refuse_name(group: str, option: str, name: str) -> NoReturn:
    """UserError: an option that an experiment compares has another name than its own."""
    raise UserError(
        f"{group}={option} would be called {name}, and experiments tell options apart by their "
        f"names: leave {group}.name as the options have it, each like its file"
    )


class Sweeper(NamedTuple):
    """What a command line says of Hydra's sweeper."""

    searches: bool
    """Whether it chooses jobs by what earlier ones gave, as Optuna's does, in place of a grid."""
    params: list[str]
    """``hydra.sweeper.params``, which one that searches puts before the command line's own."""


def sweeper_of(overrides: Sequence[str]) -> Sweeper:
    """The sweeper that Hydra's own overrides name.

    Raises:
        UserError: there is no such sweeper, or no such key of Hydra's.
    """
    with hydra_ready():
        try:
            tree = compose("config", list(overrides), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
            raise UserError(explain(error)) from error
    chosen = tree.hydra.sweeper
    grid = f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"
    params = (chosen.get("params") or {}).items()
    return Sweeper(chosen._target_ != grid, [f"{key}={value}" for key, value in params])
