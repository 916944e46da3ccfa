"""What lies under an artifact root: the listing behind ``stage=status``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.filesize import decimal
from rich.table import Column, Table

from steerlora.engine.machine import Machine, built_by, this_machine
from steerlora.engine.manifests import FINGERPRINT_DIGITS, read_attempt, read_manifest, stat_files
from steerlora.text import for_markup

STYLES = {"complete": "green", "partial": "yellow", "corrupt": "red"}


@dataclass(frozen=True)
class ArtifactInfo:
    """An artifact, complete or not, as ``stage=status`` lists it."""

    stage: str
    """Name of the stage that built it."""

    fingerprint: str
    """The artifact's fingerprint."""

    state: str
    """"complete", "partial" (in progress or interrupted) or "corrupt"."""

    bytes: int
    """Size of all its files."""

    created: datetime
    """When it was completed; otherwise when its folder last changed. UTC."""

    label: str
    """Label of the step that built it. Empty where that is not known."""

    machine: Machine | None
    """The machine that built it. None where that is not known."""

    @property
    def age(self) -> timedelta:
        return datetime.now(UTC) - self.created


def listing(root: Path) -> list[ArtifactInfo]:
    """The artifacts under ``root`` by stage and age. Sizes are compared, hashes are not."""
    found = [
        _describe(path)
        for path in root.glob("*/*")
        if re.fullmatch(rf"[0-9a-f]{{{FINGERPRINT_DIGITS}}}(\.partial|\.corrupt)?", path.name)
    ]
    return sorted(found, key=lambda info: (info.stage, info.created, info.fingerprint))


def status_table(infos: Sequence[ArtifactInfo]) -> Table:
    """The listing as a table for the terminal."""
    size, age = Column("size", justify="right"), Column("age", justify="right")
    here = this_machine()
    columns = "stage", "fingerprint", "what", size, age, "state", "machine"
    table = Table(*columns, caption=_caption(infos, here))
    for info in infos:
        table.add_row(
            *map(for_markup, (info.stage, info.fingerprint, info.label)),
            *(decimal(info.bytes), _age(info.age)),
            f"[{STYLES[info.state]}]{info.state}",
            _machine(info, here),
        )
    return table


def _machine(info: ArtifactInfo, here: Machine) -> str:
    """What the listing calls the machine that built an artifact."""
    if info.machine is None:
        return "unknown" if info.state == "complete" else ""
    return "this" if info.machine.computes_like(here) else for_markup(info.machine)


def _caption(infos: Sequence[ArtifactInfo], here: Machine) -> str:
    """How many artifacts there are, and how many of them another machine built."""
    found = [info.machine for info in infos]
    others = [machine for machine in found if machine and not machine.computes_like(here)]
    if not others:
        return f"{len(infos)} artifacts"
    named = for_markup("; ".join(dict.fromkeys(map(str, others))))
    verb, whose = ("was", "its") if len(others) == 1 else ("were", "their")
    return (
        f"{len(infos)} artifacts; {len(others)} {verb} built on another machine ({named}): "
        f"{whose} numbers may differ from what this one would give"
    )


def _describe(path: Path) -> ArtifactInfo:
    """One artifact, whole or not, for the listing."""
    name, _, state = path.name.partition(".")
    label, machine, created = "", None, datetime.fromtimestamp(path.stat().st_mtime, UTC)
    if state == "partial":
        label = read_attempt(path).get("label", "")
    elif state == "":
        manifest, problem = read_manifest(path)
        sizes = [file and file[1] for file in stat_files(path, manifest.get("files", {}))]
        intact = sizes == [file["bytes"] for file in manifest.get("files", {}).values()]
        state = "complete" if problem is None and intact else "corrupt"
        label, machine = manifest.get("label", ""), built_by(manifest)
        if "created" in manifest:
            created = datetime.fromisoformat(manifest["created"])
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return ArtifactInfo(path.parent.name, name, state, size, created, label, machine)


def _age(age: timedelta) -> str:
    seconds = max(0, int(age.total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
