"""The flat settings of an artifact: one set of keys for every stage, each with one type.

A stage's own settings hold what it depends on, and no more: an evaluation does not know the rank of
the adapter that it scores. Together with those of all that it was built from they say everything.
Here they become one flat mapping with the keys of the configuration (``method.rank``), so that runs
of different stages can be filtered, grouped and compared by the same names. What has no bearing on
an artifact is absent from it, or "none" where it is one of `NAMES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from steerlora.engine.artifacts import Artifact

Setting = bool | int | float | str
"""A list is text in the command line's own spelling, ``[1,3]``."""

NAMES = (
    *("model.name", "domains.name", "sae.architecture"),
    *("method.name", "intervention.name", "order.name"),
)
"""Keys that every artifact has, besides its stage; "none" where there is no such thing."""

SEEDS = ("seed", "model.seed", "sae.seed", "domains.seed", "intervention.seed")
"""Keys that tell replicates of one condition apart."""

SECTIONS = (
    "model",
    "domains",
    "sae",
    "features",
    "method",
    "intervention",
    "trainer",
    "evaluation",
)
"""Sections of the configuration that stages' settings hold as they are."""

RENAMED = {
    "model": "model.name",
    "method": "method.name",
    "options": "method",
    "order": "order.name",
    "sequence": "order.sequence",
    "steps_per_domain": "order.steps_per_domain",
    "domains": "domains.names",
    "broad": "domains.broad",
    "interventions": "study.interventions",
    "doses": "study.doses",
    "accelerator": "trainer.accelerator",
    "seed": "seed",
}
"""{what a stage's settings call something that is no section there: its key}."""

HARDWARE = ("precision", "accelerator", "strategy")
"""All that the section ``trainer`` says of a training that is not a method's."""

HARVEST = "activations"
"""The stage whose settings all come from sections that its readers have, too."""


def settings_of(ancestry: Iterable[Artifact]) -> dict[str, Setting]:
    """The flat settings of the last of some artifacts.

    Args:
        ancestry: the artifact after all that it was built from, inputs first. Where two of them
            have a key, the later one's holds.
    """
    found: dict[str, Setting] = dict.fromkeys(NAMES, "none")
    upstream: dict[str, list[str]] = {}
    *ancestors, artifact = ancestry
    for one in ancestors:
        upstream.setdefault(one.stage, []).append(one.fingerprint)
        found |= _said(one, private=False)
    found |= _said(artifact, private=True)
    found |= {f"upstream.{stage}": ",".join(names) for stage, names in upstream.items()}
    return found | {"stage": artifact.stage, "fingerprint": artifact.fingerprint}


def _said(artifact: Artifact, *, private: bool) -> dict[str, Setting]:
    """What the settings of one artifact's stage say, under the configuration's keys.

    Args:
        private: with what the configuration has no key for, under the stage's name.
    """
    config = artifact.manifest["config"]
    if artifact.stage == HARVEST:
        return {}
    found: dict[str, Setting] = {}
    trains_method = isinstance(config.get("method"), Mapping)
    for key, value in config.items():
        if key == "logger":
            continue
        if key == "trainer" and not trains_method:
            value = {name: value[name] for name in HARDWARE if name in value}
        if isinstance(value, Mapping) and key in SECTIONS:
            found |= flat({key: value})
        elif private or key in RENAMED:
            found |= flat({RENAMED.get(key, f"{artifact.stage}.{key}"): value})
    return found


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Setting]:
    """``{"method.rank": 8}`` of nested settings, without what is null."""
    found: dict[str, Setting] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")
        elif value is not None:
            found[f"{above}{key}"] = spelt(value)
    return found


def spelt(value: Any) -> Setting:
    """A scalar as it is; a list as the command line spells it."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else value


def matches(settings: Mapping[str, Setting], wanted: Mapping[str, Any]) -> bool:
    """Whether all wanted keys have the wanted values; null is a key that is absent."""
    return all(
        settings.get(key) == (None if value is None else spelt(value))
        for key, value in wanted.items()
    )


def differing(
    several: list[Mapping[str, Setting]], *, ignored: Iterable[str] = ()
) -> dict[str, list[Setting | None]]:
    """{key that is not the same in all: its values}, less names of artifacts; None: absent."""
    left_out = {*ignored, "fingerprint"}
    keys = dict.fromkeys(key for one in several for key in one)
    found = {key: [one.get(key) for one in several] for key in keys}
    return {
        key: values
        for key, values in found.items()
        if any(value != values[0] for value in values)
        and key not in left_out
        and not key.startswith("upstream.")
    }
