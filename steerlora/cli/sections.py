"""The sections of a configuration: their types, their keys, and the YAML files that fill them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from steerlora.config import SECTIONS
from steerlora.errors import UserError
from steerlora.methods.config import METHODS, MethodConfig
from steerlora.registry import Registry
from steerlora.saes.config import SAES, SAEConfig

KINDS: dict[str, tuple[str, Registry, type]] = {
    "method": ("kind", METHODS, MethodConfig),
    "sae": ("architecture", SAES, SAEConfig),
}
"""{section whose type depends on its kind: (the key that names it, the kinds, what all have)}.

A YAML file of such a section builds on ``_<kind>``, or on ``_schema`` and lists the kind's keys.
"""
GROUPS = (*SECTIONS, *KINDS)
OTHER_KEYS = ("seed", "plugins", "runs")


def config_directory() -> Path:
    """``conf/``: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package.parent / "conf", package / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise UserError(f"no conf/config.yaml beside {package}: install the package again")


def groups() -> dict[str, list[str]]:
    """{group: its options}, of every group that has a choice."""
    folders = sorted(path for path in config_directory().iterdir() if path.is_dir())
    return {folder.name: options_of(folder.name) for folder in folders}


def options_of(group: str, folders: Iterable[str] = ()) -> list[str]:
    """The options of a group: the package's, and those in further folders (``file://<folder>``)."""
    places = [config_directory(), *(Path(folder.removeprefix("file://")) for folder in folders)]
    return sorted({path.stem for place in places for path in (place / group).glob("*.yaml")})


def has_launchers() -> bool:
    """Whether the extra ``launchers`` is installed."""
    return find_spec("hydra_plugins.hydra_submitit_launcher") is not None


def schema_of(section: str, values: dict[str, Any]) -> type:
    """The type of a section, which in some depends on what it says of itself.

    Raises:
        UserError: it names a kind that is not registered.
    """
    if section in SECTIONS:
        return SECTIONS[section]
    key, kinds, _ = KINDS[section]
    kinds.check(f"{section}.{key}", values.get(key, ""))
    return kinds[values[key]]


def schemas_of(section: str) -> tuple[type, ...]:
    """The types that a section may have, as far as they are imported."""
    if section in SECTIONS:
        return (SECTIONS[section],)
    return tuple(schema for _, schema in KINDS[section][1].known())


def keys_of(prefix: str, schemas: type | tuple[type, ...]) -> list[str]:
    """Every dotted key of a section, those of nested sections too."""
    found = {}
    for schema in schemas if isinstance(schemas, tuple) else (schemas,):
        hints = get_type_hints(schema)
        for field in dataclasses.fields(schema):
            key, nested = f"{prefix}.{field.name}", hints[field.name]
            found |= dict.fromkeys(
                keys_of(key, nested) if dataclasses.is_dataclass(nested) else [key]
            )
    return list(found)
