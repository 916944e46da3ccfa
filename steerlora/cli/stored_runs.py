"""What ``stage=runs`` and ``stage=compare`` print, from the artifacts alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from steerlora.cli.sections import GROUPS
from steerlora.cli.sweep_table import heading
from steerlora.config import Config
from steerlora.engine.lineage import Library
from steerlora.errors import UserError
from steerlora.evaluation.statistics import Interval
from steerlora.reporting.conditions import (
    LEVEL,
    Condition,
    Difference,
    compared,
    conditions,
    differences,
)
from steerlora.reporting.run_figures import Figure
from steerlora.reporting.run_rows import RunRow, figure_text, named, row_of
from steerlora.reporting.settings import SEEDS, Setting, differing, matches
from steerlora.reporting.tables import MISSING, interval_text, number
from steerlora.text import for_markup

NO_FILTERS = ("stage", "artifacts", "logger", "plugins", "results", "study", "experiment", "runs")
"""Keys of overrides that say how to list and not what."""

NAMED = {"sae": "architecture"}
"""{group: the key that its options are called by}; ``name`` in all others."""

SHOWN = 12  # digits of a fingerprint in a table

LISTED = (
    "average/target",
    "average/instruction_following",
    "average/general_knowledge",
    "forgetting/positive_mean",
    "forgetting/final_average",
    "general_kept",
)
"""Figures of the listing; a comparison and a sweep's table show more."""


def show(console: Console, config: Config, overrides: Sequence[str]) -> None:
    """List what was trained and scored; what the user overrides has to agree.

    Raises:
        UserError: an override says nothing about an artifact.
    """
    library = Library(Path(config.artifacts.root))
    wanted = filters(config, overrides)
    rows = []
    for artifact in library.all():
        row = row_of(artifact, library)
        if row.scored and matches(row.settings, wanted):
            rows.append(row)
    console.print(runs_table(rows, wanted))


def filters(config: Config, overrides: Sequence[str]) -> dict[str, Any]:
    """{key of the flat settings: the value that the overrides give it}.

    Args:
        config: that the overrides composed, so that values have their types.
        overrides: such as ``method=lora`` and ``method.rank=8``.

    Raises:
        UserError: a group whose options have no name, such as ``trainer=gpu``.
    """
    flat = dataclasses.asdict(config)
    wanted = {}
    for override in overrides:
        key = override.partition("=")[0].lstrip("+")
        section, *rest = key.split(".")
        if section in NO_FILTERS or section.startswith("hydra"):
            continue
        if section in GROUPS and not rest:
            rest = [NAMED.get(section, "name")]
            if rest[0] not in flat[section]:
                raise UserError(f"stage=runs {override}: filter by keys, such as {section}.<key>=")
        value = flat
        for part in (section, *rest):
            value = value[part]
        wanted[".".join([section, *rest])] = value
    return wanted


def runs_table(rows: Sequence[RunRow], wanted: dict[str, Any]) -> Table:
    """A row an artifact: what it is of, its scores, when it was made; no column is empty."""
    measured = {name for row in rows for name in row.figures}
    names = [name for name in LISTED if name in measured]
    about = "; ".join(f"{key}={value}" for key, value in wanted.items())
    ids = ("model.name", "method.name", "intervention.name", "order.name")
    said = [key for key in ids if any(row.settings[key] != "none" for row in rows)]
    caption = f"{len(rows)} artifacts{f' with {about}' if about else ''}; ± standard error of items"
    whole = {"no_wrap": True, "overflow": "fold"}
    table = Table(
        *(Column("fingerprint", **whole), "stage"),
        *(key.removesuffix(".name") for key in said),
        *("seed", *(for_markup(heading(name)) for name in names), Column("made, UTC", **whole)),
        caption=for_markup(caption),
    )
    for row in rows:
        table.add_row(
            row.artifact.fingerprint[:SHOWN],
            for_markup(row.artifact.stage),
            *(_setting(None if row.settings[key] == "none" else row.settings[key]) for key in said),
            _setting(row.settings.get("seed")),
            *(figure_text(row.figures.get(name)) for name in names),
            row.artifact.manifest.get("created", "")[:16].replace("T", " "),
        )
    return table


def compare(console: Console, config: Config) -> None:
    """Print how runs differ in configuration and scores, and which differences hold up.

    Raises:
        UserError: fewer than two are given, or one is not stored.
    """
    library = Library(Path(config.artifacts.root))
    rows = [row_of(artifact, library) for artifact in named(config.runs, library)]
    if len(rows) < 2:
        raise UserError(
            "stage=compare compares two or more: give runs=[<fingerprint>,<fingerprint>], folders "
            "of artifacts, or runs=[<sweep>]; steerlora stage=runs lists them"
        )
    several = conditions(rows)
    console.print(settings_table(several))
    console.print(scores_table(several))
    if len(several) > 1:
        console.print(differences_table(several, differences(several)))


def settings_table(several: Sequence[Condition]) -> Table:
    """What differs between conditions, and the artifacts of each."""
    table = Table("setting", *(one.name for one in several), title="what differs")
    found = differing([one.settings for one in several])
    for key, values in found.items():
        table.add_row(for_markup(key), *(_setting(value) for value in values))
    for seed in SEEDS:
        values = [[row.settings.get(seed) for row in one.rows] for one in several]
        follows = seed != "seed" and all(
            row.settings.get(seed) == row.settings.get("seed")
            for one in several
            for row in one.rows
        )
        if len({value for own in values for value in own}) > 1 and not follows:
            table.add_row(seed, *(", ".join(map(_setting, own)) for own in values))
    stored = [[row.artifact.fingerprint[:SHOWN] for row in one.rows] for one in several]
    table.add_row("fingerprint", *map("\n".join, stored))
    return table


def _setting(value: Setting | None) -> str:
    return MISSING if value is None else for_markup(str(value))


def scores_table(several: Sequence[Condition]) -> Table:
    """Every figure of every condition with its 95 % interval."""
    caption = (
        "95 % intervals: over replicates where a condition has several, else over evaluation items"
    )
    table = Table("figure", *(one.name for one in several), title="scores", caption=caption)
    for name in compared(several):
        table.add_row(
            for_markup(heading(name)), *(_with_interval(*one.figure(name)) for one in several)
        )
    return table


def _with_interval(figure: Figure | Interval | None, replicates: int) -> str:
    if figure is None:
        return MISSING
    if isinstance(figure, Interval):
        return f"{interval_text(figure, 3)} ({replicates})"
    ends = figure.interval
    return number(figure.value) if ends is None else interval_text((figure.value, *ends), 3)


def differences_table(several: Sequence[Condition], found: Sequence[Difference]) -> Table:
    """Differences to the first condition, and which of them hold up."""
    caption = (
        "paired by seed, over replicates where there are several pairs; else item by item, which "
        f"says nothing about other seeds. p: two-sided, Holm over all {len(found)}; holds up: "
        f"p < {LEVEL}"
    )
    right = {"justify": "right"}
    table = Table(
        *("figure", "conditions", Column("difference", **right), Column("pairs", **right)),
        *(Column("p", **right), "verdict"),
        title=f"differences to {several[0].name}",
        caption=caption,
    )
    for one in found:
        table.add_row(
            for_markup(heading(one.figure)),
            f"{one.condition} − {several[0].name}",
            interval_text((one.value, one.low, one.high), 3, sign=True),
            str(one.replicates),
            number(one.p_value),
            f"[bold]{one.verdict}[/bold]" if one.p_value < LEVEL else one.verdict,
        )
    return table
