"""Datasets of the Hugging Face hub become a domains artifact, of the same form as real text.

Of every source, rows are taken in a shuffled order. *Held-out* rows are the first of its held-out
split, or of its training split where it has none; no prompt of theirs, or of a held-out split, is
trained on in any domain. Of the broad domain, a seeded hash of the prompt keeps back half of the
rows as *general text*, which activations and prototypes need beside the domains' own.
"""

from __future__ import annotations

import json
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import datasets

from steerlora.config import DomainsConfig, SourceConfig
from steerlora.data.conversations import to_row
from steerlora.data.domains.hub.source import heldout_split_of, identity_of, open_split, rows_of
from steerlora.data.domains.text.rows import SourceRow
from steerlora.data.domains.text.splits import (
    DomainCounts,
    HeldOut,
    first_of_each,
    training_rows,
    uniform,
)
from steerlora.data.domains.text.tasks import describe
from steerlora.data.jsonl import write_objects
from steerlora.engine.progress import Progress
from steerlora.errors import UserError

GENERAL_SHARE = 0.5
"""Of the broad domain's rows."""
HELDOUT_SHARE = 0.2
"""Of a training split, at most, where there is no held-out split."""


@dataclass(frozen=True)
class _Opened:
    """A domain's source at hand; ``heldout``: None where it has no such split."""

    name: str
    source: SourceConfig
    train: datasets.Dataset
    heldout: datasets.Dataset | None


def identity(config: DomainsConfig) -> str:
    """What decides the artifact, beside the numbers and the seed of the configuration."""
    used = {name: identity_of(name, config.sources[name]) for name in config.names}
    return json.dumps({"sources": used, "broad": config.broad}, sort_keys=True)


def write(
    directory: Path,
    config: DomainsConfig,
    progress: Progress,
    description: str,
    *,
    pretraining: bool = True,
) -> None:
    """Write the domains artifact of ``config.sources`` into ``directory``.

    As many rows of general text are kept as of one domain. Rows stay on disk, but for the held-out
    ones; of the others, memory holds a digest of 16 bytes each.

    Args:
        directory: where the artifact goes; created.
        config: of kind "hub".
        progress, description: where and under which name to report.
        pretraining: whether half of the broad domain's rows are general text.

    Raises:
        UserError: a source that cannot be had or read, or that leaves a set without rows.
    """
    for folder in ("train", "heldout"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="steerlora-domains-") as scratch:
        opened = []
        for name in config.names:
            progress.message(f"{description}: opening {config.sources[name].path} for {name}")
            opened.append(_open(name, config, Path(scratch)))
        heldout = {one.name: _hold_out(one, config) for one in opened}
        reserved = set().union(*(held.keys for held in heldout.values()))
        counts = {name: DomainCounts(held.origin, len(held.rows)) for name, held in heldout.items()}
        for name, held in heldout.items():
            chats = (to_row(row.turns) for row in held.rows)
            write_objects(directory / f"heldout/{name}.jsonl", chats)
        with (directory / "pretrain.jsonl").open("w", encoding="ascii") as pretrain:
            for one in opened:
                broad = one.name == config.broad
                general = pretrain if broad and pretraining else None
                rows = rows_of(one.name, one.source, one.train, seed=config.seed)
                rows = training_rows(rows, reserved, counts[one.name])
                wanted = config.train_items + (config.pretrain_items if general else 0)
                total = min(wanted, len(one.train))
                with (
                    progress.task(f"{description}: {one.name}", total, unit="row") as task,
                    (directory / f"train/{one.name}.jsonl").open("w", encoding="ascii") as own,
                ):
                    for file, row in _dealt(rows, own, general, config, counts[one.name]):
                        file.write(json.dumps(to_row(row.turns)) + "\n")
                        task.advance()
                _check_filled(one, counts[one.name], general is not None)
    said = describe(tuple(config.names), [])
    said["counts"] = {name: asdict(count) for name, count in counts.items()}
    (directory / "domains.json").write_text(json.dumps(said, indent=2) + "\n")


def _open(name: str, config: DomainsConfig, scratch: Path) -> _Opened:
    source, fetch = config.sources[name], f"python scripts/download.py domains={config.name}"
    train, heldout = (
        split and open_split(name, source, split, cache=scratch / name, fetch=fetch)
        for split in (source.split, heldout_split_of(source))
    )
    return _Opened(name, source, train, heldout)


def _hold_out(one: _Opened, config: DomainsConfig) -> HeldOut:
    """The first rows of the held-out split, whose every prompt is reserved, or of the training."""
    split, origin, most = one.heldout, one.source.heldout_split, config.evaluation_items
    if split is None:
        split, origin = one.train, one.source.split
        most = min(most, int(HELDOUT_SHARE * len(split)))
    keys: set[bytes] = set()
    distinct = first_of_each(rows_of(one.name, one.source, split, seed=config.seed), keys)
    chosen = list(islice(distinct, most))
    if one.heldout is not None:
        deque(distinct, maxlen=0)  # the other keys
    if not chosen:
        raise UserError(f"{one.source.path} has too few rows to hold out any for '{one.name}'")
    return HeldOut(chosen, origin, keys)


def _dealt(
    rows: Iterator[SourceRow],
    own: IO[str],
    general: IO[str] | None,
    config: DomainsConfig,
    counts: DomainCounts,
) -> Iterator[tuple[IO[str], SourceRow]]:
    """Each row and the file that it goes to, until both have enough; they are counted."""
    most = config.pretrain_items if general else 0
    for row in rows:
        if counts.adaptation == config.train_items and counts.pretraining == most:
            return
        if general and uniform(row.prompt, config.seed, "pretraining") < GENERAL_SHARE:
            if counts.pretraining < most:
                counts.pretraining += 1
                yield general, row
        elif counts.adaptation < config.train_items:
            counts.adaptation += 1
            yield own, row


def _check_filled(one: _Opened, counts: DomainCounts, broad: bool) -> None:
    if not counts.adaptation or (broad and not counts.pretraining):
        raise UserError(
            f"{one.source.path} leaves too few rows for '{one.name}' ({counts.adaptation} to train "
            f"on, {counts.heldout} held out, {counts.held_out_prompt} with a held-out prompt, "
            f"{counts.repeated} repeated, {counts.blank} with a blank turn or no answer, "
            f"{counts.pretraining} of general text): give it more rows"
        )
