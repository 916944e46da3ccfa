"""What is wrong with a configuration, in one line, and what would be right."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.core.global_hydra import GlobalHydra
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from steerlora.cli.sections import (
    GROUPS,
    KINDS,
    OTHER_KEYS,
    has_launchers,
    keys_of,
    options_of,
    schemas_of,
)
from steerlora.errors import UserError, nearest


def explain(error: Exception, folders: Sequence[str] = ()) -> str:
    """One line for a composition error: what is wrong and what would be right.

    Args:
        error: Hydra's, OmegaConf's or the YAML parser's.
        folders: of YAML files, besides the package's.
    """
    message, cause = str(error), error
    while cause is not None:
        if isinstance(cause, UserError):  # of one of our resolvers
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    if match := re.search(r"Could not find '([^']+)'", message):
        group, _, option = match[1].rpartition("/")
        if group == "hydra/launcher" and not has_launchers():
            return f"{group}={option}: it may need pip install 'steerlora[launchers]'"
        if match[1] == "hydra/sweeper/optuna":
            return "hydra/sweeper=optuna: it needs pip install 'steerlora[sweeps]'"
        loader = GlobalHydra.instance().config_loader()
        options = options_of(group, folders) or loader.get_group_options(group)
        return f"{group}={option}: {nearest(option, options)}" if options else message
    if match := re.search(r"Could not override '([^']+)'", message):
        return f"no such key: {match[1]}; {nearest_key(match[1])}"
    if message.startswith("Config group override must be"):
        return "a config group is one of its options: it cannot be null, a number or true"
    cause = error.__cause__
    if isinstance(cause, ConfigKeyError):
        key = str(getattr(cause, "full_key", ""))
        return f"no such key: {key}; {nearest_key(key)}"
    if isinstance(cause, OmegaConfBaseException):
        return f"{getattr(cause, 'full_key', '')}: {str(cause).splitlines()[0]}"
    return " ".join(message.split())


def nearest_key(key: str, schema: type | None = None) -> str:
    """Suggestions for a dotted key: its own section's keys if that exists, else the sections.

    Args:
        key: what was given.
        schema: the type of its section, where that is known.
    """
    if key.split(".")[0] == "hydra":
        return "steerlora --cfg hydra lists Hydra's own"
    section, _, name = key.partition(".")
    of_section = {s: schema if schema and s == section else schemas_of(s) for s in GROUPS}
    keys = {s: keys_of(s, types) for s, types in of_section.items()}
    if section == "adapter":  # what the group was called before
        now = nearest(f"method.{name}", keys["method"]) if name else "method=<option>"
        return f"the group is method now: {now}"
    if section in KINDS and key in keys[section]:
        naming, kinds, _ = KINDS[section]
        having = [kind for kind, known in kinds.known() if key in keys_of(section, known)]
        return f"it is a key of {section}.{naming}={' or '.join(having)}"
    if section in keys and name:
        if key in keys[section]:
            return f"it is a key of a section that is not there: give {section}=<option> with it"
        if _close(key, keys[section]):
            return nearest(key, keys[section])
        return nearest("", [k.removeprefix(f"{section}.") for k in keys[section]])
    everywhere = [found for names in keys.values() for found in names]
    if "." in key and _close(key, everywhere):
        return nearest(key, everywhere)
    return nearest(section, [*GROUPS, *OTHER_KEYS, "experiment"])


def _close(name: str, choices: Sequence[str]) -> bool:
    return nearest(name, choices).startswith("did you mean")
