"""Hydra's part: it composes the YAML groups into one typed configuration.

Every mistake in the configuration becomes a `UserError` of one line.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from steerlora.config import SECTIONS, Config
from steerlora.errors import UserError, nearest
from steerlora.methods.config import METHODS, MethodConfig
from steerlora.registry import Registry, import_plugins
from steerlora.saes.config import SAES, SAEConfig

SCHEMA = "_schema"
"""Option of every group that holds its typed defaults; the YAML files build on it."""

KINDS: dict[str, tuple[str, Registry, type]] = {
    "method": ("kind", METHODS, MethodConfig),
    "sae": ("architecture", SAES, SAEConfig),
}
"""{section whose type depends on its kind: (the key that names it, the kinds, what all have)}.

A YAML file of such a section builds on ``_<kind>``, or on ``_schema`` and lists the kind's keys.
"""
GROUPS = (*SECTIONS, *KINDS)
OTHER_KEYS = ("seed", "plugins")

SEARCH_PATH = "hydra.searchpath="

RENAMED = {
    "adapter.routing": "method.signal",
    "adapter": "method",
    "continual.specialists": "method.isolation",
    "continual.replay_ratio": "method.replay.ratio",
    "continual.replay_batches": "method.replay.batches",
    "continual.memory": "method.memory.enabled",
    "continual.memory_every": "method.memory.every",
    "continual": "method",
    "control": "method",
    "routing": "method.health",
    "study.adapters": "study.methods",
    "study.scale_adapters": "study.scale_methods",
    "study.ablation_adapter": "study.ablation_method",
    "study.sequential_adapters": "study.sequential_methods",
}
"""What keys of earlier versions are called now; of a section, its keys wherever they are in it."""

# YAML may write ${every_layer:${model.layers}} for a site at every layer, and
# ${times:4,${model.width}} for four times the width. Registered on import, so that the processes of
# a sweep have them too.
OmegaConf.register_new_resolver("every_layer", lambda count: [*range(count)], replace=True)
OmegaConf.register_new_resolver("times", lambda factor, number: factor * number, replace=True)

Compose = Callable[..., Config]
"""``compose("model=micro_s", ...)``: this run's configuration with some options changed."""


def config_directory() -> Path:
    """``conf/``: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package.parent / "conf", package / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise UserError(f"no conf/config.yaml beside {package}: install the package again")


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
    """The typed defaults of a section; fields may follow other keys of the configuration."""
    node = _writable(OmegaConf.structured(schema))
    if schema in (common for _, _, common in KINDS.values()):
        node = OmegaConf.create(OmegaConf.to_container(node))  # a kind's YAML adds keys of its own
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
    if _has_launchers():
        from steerlora.cli.launchers import register_options

        register_options()


def _has_launchers() -> bool:
    """Whether the extra ``launchers`` is installed."""
    return find_spec("hydra_plugins.hydra_submitit_launcher") is not None


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
            return compose("config", overrides)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UserError(explain(error)) from error


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
            raise UserError(f"no such key: {key}; {_nearest_key(key)}")
    try:
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    plugins = tuple(values.get("plugins") or ())
    import_plugins(plugins)  # a launcher's job has not composed the tree that it is given
    sections = {}
    for name in GROUPS:
        if values.get(name) is not None:
            sections[name] = _section(name, _schema_of(name, values[name]), values[name])
        elif name != "stage":
            options = ", ".join(_options(name))
            raise UserError(
                f"{name} is empty: it needs its section"
                + (f", {name}=<option> of {options}" if options else "")
            )
    return Config(**sections, seed=seed, plugins=plugins)


def _schema_of(section: str, values: dict[str, Any]) -> type:
    """The type of a section, which in some depends on what it says of itself.

    Raises:
        UserError: it names a kind that is not registered.
    """
    if section in SECTIONS:
        return SECTIONS[section]
    key, kinds, _ = KINDS[section]
    kinds.check(f"{section}.{key}", values.get(key, ""))
    return kinds[values[key]]


def _section(name: str, schema: type, values: dict[str, Any]) -> Any:
    node = _writable(OmegaConf.structured(schema))
    try:
        merged = OmegaConf.merge(node, values)
    except OmegaConfBaseException as error:
        key = f"{name}.{getattr(error, 'full_key', None)}"
        if isinstance(error, ConfigKeyError):
            raise UserError(f"no such key: {key}; {_nearest_key(key, schema)}") from error
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


def explain(error: Exception) -> str:
    """One line for a composition error: what is wrong and what would be right."""
    message = str(error)
    if isinstance(error, OverrideParseException):
        return f"cannot read {message.splitlines()[0]}"
    if match := re.search(r"Could not find '([^']+)'", message):
        group, _, option = match[1].rpartition("/")
        if group == "hydra/launcher" and not _has_launchers():
            return f"{group}={option}: it may need pip install 'steerlora[launchers]'"
        options = _options(group) or GlobalHydra.instance().config_loader().get_group_options(group)
        return f"{group}={option}: {nearest(option, options)}" if options else message
    if match := re.search(r"Could not override '([^']+)'", message):
        return f"no such key: {match[1]}; {_nearest_key(match[1])}"
    if message.startswith("Config group override must be"):
        return "a config group cannot be null: give one of its options, or leave it out"
    cause = error.__cause__
    if isinstance(cause, ConfigKeyError):
        key = str(getattr(cause, "full_key", ""))
        return f"no such key: {key}; {_nearest_key(key)}"
    if isinstance(cause, OmegaConfBaseException):
        return f"{getattr(cause, 'full_key', '')}: {str(cause).splitlines()[0]}"
    return " ".join(message.split())


def groups() -> dict[str, list[str]]:
    """{group: its options}, of every group that has a choice."""
    folders = sorted(path for path in config_directory().iterdir() if path.is_dir())
    return {folder.name: _options(folder.name) for folder in folders}


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (config_directory() / group).glob("*.yaml"))


def _nearest_key(key: str, schema: type | None = None) -> str:
    """Suggestions for a dotted key: its own section's keys if that exists, else the sections.

    Args:
        key: what was given.
        schema: the type of its section, where that is known.
    """
    if key.split(".")[0] == "hydra":
        return "steerlora --cfg hydra lists Hydra's own"
    section, _, name = key.partition(".")
    of_section = {s: schema if schema and s == section else _schemas(s) for s in GROUPS}
    keys = {s: _keys(s, types) for s, types in of_section.items()}
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return _renamed(key, new, key.removeprefix(old), keys[new.partition(".")[0]])
    if section in KINDS and key in keys[section]:
        naming, kinds, _ = KINDS[section]
        having = [kind for kind, known in kinds.known() if key in _keys(section, known)]
        return f"it is a key of {section}.{naming}={' or '.join(having)}"
    if section in keys and name:
        return (
            nearest(key, keys[section])
            if _close(key, keys[section])
            else ("choose from " + ", ".join(k.removeprefix(f"{section}.") for k in keys[section]))
        )
    everywhere = [found for names in keys.values() for found in names]
    if "." in key and _close(key, everywhere):
        return nearest(key, everywhere)
    return nearest(section, [*GROUPS, *OTHER_KEYS, "experiment"])


def _renamed(key: str, new: str, rest: str, keys: Sequence[str]) -> str:
    """What a key of an earlier version is called now.

    Args:
        key: what was given.
        new: what its beginning is called now.
        rest: what follows that, "" or ".<name>".
        keys: of the section.
    """
    if "." not in key:
        return f"it is {new}=<option> now"
    candidates = [f"{new}{rest}", *(name for name in keys if name.endswith(rest))]
    found = next((name for name in candidates if name in keys), None)
    return f"it is {found} now" if found else nearest(candidates[0], keys)


def _close(name: str, choices: Sequence[str]) -> bool:
    return nearest(name, choices).startswith("did you mean")


def _schemas(section: str) -> tuple[type, ...]:
    """The types that a section may have, as far as they are imported."""
    if section in SECTIONS:
        return (SECTIONS[section],)
    return tuple(schema for _, schema in KINDS[section][1].known())


def _keys(prefix: str, schemas: type | tuple[type, ...]) -> list[str]:
    """Every dotted key of a section, those of nested sections too."""
    found = {}
    for schema in schemas if isinstance(schemas, tuple) else (schemas,):
        hints = get_type_hints(schema)
        for field in dataclasses.fields(schema):
            key, nested = f"{prefix}.{field.name}", hints[field.name]
            found |= dict.fromkeys(
                _keys(key, nested) if dataclasses.is_dataclass(nested) else [key]
            )
    return list(found)
