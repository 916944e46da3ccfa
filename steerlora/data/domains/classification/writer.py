"""Classification tasks as domains: a folder of JSON lines becomes a domains artifact.

The source folder has ``<task>_train.jsonl`` for every task and, where there is one,
``<task>_test.jsonl``: rows with ``prompt``, ``response`` and ``choices``, the task's labels.

Held-out rows come from the test file, or are split from the training rows: where there is no test
file, and for development, which never scores what is reported. No training row asks what a held-out
or test row of any task asks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from steerlora.data.conversations import to_row
from steerlora.data.domains.classification.rows import (
    ClassificationRow,
    check_labels,
    classification_rows,
    labels_of,
)
from steerlora.data.domains.text.rows import TRAIN, check_domains, is_listed, source_rows
from steerlora.data.domains.text.splits import DomainCounts, prompt_key, training_rows, uniform
from steerlora.data.domains.text.writer import HELDOUT_SHARE, without_middle
from steerlora.data.jsonl import file_of, write_objects
from steerlora.errors import UserError

KIND, VERSION = "classification", 1
TEST = "_test"
"""How the names of the files to score on end."""
WRITTEN = "_written"
"""How the names of tasks end whose answers are written out."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _TaskRows:
    """What is read of one task."""

    train: list[ClassificationRow]
    """Rows to train on, held-out ones among them where they are split from these."""
    heldout: list[ClassificationRow]
    """Rows to score."""
    origin: str
    """The file that those come from."""
    reserved: set[bytes]
    """Keys of the prompts that no task trains on."""
    labels: tuple[str, ...]


def write(
    directory: Path,
    *,
    source: Path,
    seed: int,
    names: Sequence[str],
    general: Path | None = None,
    pretrain_items: int | None = None,
    train_items: int | None = None,
    evaluation_items: int = 250,
    prompt_characters: int | None = None,
    development: bool = False,
) -> None:
    """Write the domains artifact of ``source`` into ``directory``: same arguments, same bytes.

    Each task has two of lm-eval's: ``classification_<task>`` ranks the labels by their likelihood,
    and is the domain's target; ``classification_<task>_written`` has the answer written out, and
    counts it where it is the label to the letter.

    Args:
        directory: where the artifact goes; created.
        source: the folder of JSON lines.
        seed: of the choice of held-out rows.
        names: tasks to use, in order.
        general: a jsonl file of general text, prompt and response or messages; None: there is none.
        pretrain_items: most rows of that; None: all.
        train_items: most rows of a task to adapt to, the first ones; None: all.
        evaluation_items: most held-out rows of a task.
        prompt_characters: of a longer prompt what follows its first paragraph, which says what is
            asked, loses its middle; None: none does.
        development: held-out rows are training rows, and test rows are not scored.

    Raises:
        UserError: a file or key missing, a line that cannot be read (with its number), labels that
            do not fit, or a task left without rows.
    """
    check_domains(source, tuple(names))
    for folder in ("train", "heldout", "evaluation"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    shorten = _shortener(prompt_characters)
    tasks = {name: _read(source, name, seed, evaluation_items, development) for name in names}
    reserved = {key for task in tasks.values() for key in task.reserved}
    reserved |= {prompt_key(shorten(r.prompt)) for task in tasks.values() for r in task.heldout}
    counts = {}
    for name, task in tasks.items():
        counts[name] = count = DomainCounts(task.origin, len(task.heldout))
        asked = (row.as_source for row in task.train)
        fresh = islice(training_rows(asked, reserved, count, shorten), train_items)
        train = [_chat(row.prompt, row.response, shorten, count) for row in fresh]
        count.adaptation = len(train)
        if not train:
            raise UserError(
                f"{file_of(source, name + TRAIN)} leaves no rows to adapt to "
                f"({count.held_out_prompt} with a held-out prompt, {count.repeated} repeated, "
                f"{count.blank} blank); add rows"
            )
        heldout = [_chat(row.prompt, row.label, shorten, count) for row in task.heldout]
        items = [
            {**chat, "choices": list(task.labels), "answer": task.labels.index(row.label)}
            for chat, row in zip(heldout, task.heldout, strict=True)
        ]
        write_objects(directory / "train" / f"{name}.jsonl", train)
        write_objects(directory / "heldout" / f"{name}.jsonl", heldout)
        write_objects(directory / "evaluation" / f"{KIND}_{name}.jsonl", items)
    _warn_of_shortened(counts, prompt_characters)
    rows = (row for row in (source_rows(general) if general else ()) if row.turns)
    general_rows = (to_row(row.turns) for row in islice(rows, pretrain_items))
    write_objects(directory / "pretrain.jsonl", general_rows)
    description = describe(names)
    description["counts"] = {name: asdict(count) for name, count in counts.items()}
    (directory / "domains.json").write_text(json.dumps(description, indent=2) + "\n")


def describe(names: Sequence[str]) -> dict[str, Any]:
    """``domains.json``: the tasks and how each is scored."""
    ranked = {name: f"{KIND}_{name}" for name in names}
    written = {name: f"{KIND}_{name}{WRITTEN}" for name in names}
    return {
        "kind": KIND,
        "version": VERSION,
        "names": list(names),
        "target_tasks": ranked,
        "written_tasks": written,
        "extra_tasks": list(written.values()),
        "groups": {},
        "metrics": dict.fromkeys(ranked.values(), "acc,none")
        | dict.fromkeys(written.values(), "exact_match,none"),
    }


def files_of(source: Path, names: Sequence[str]) -> list[Path]:
    """The files of a folder that `write` reads, by name; others that lie there do not matter."""
    found = {file_of(source, f"{name}{part}") for name in names for part in (TRAIN, TEST)}
    return sorted(filter(is_listed, found))


def _read(source: Path, name: str, seed: int, most: int, development: bool) -> _TaskRows:
    path, test_path = file_of(source, name + TRAIN), file_of(source, name + TEST)
    train = list(classification_rows(path))
    test = list(classification_rows(test_path)) if is_listed(test_path) else []
    labels = labels_of(train, path)
    check_labels(test, labels)
    scored = train if development or not test else test
    if scored is train:
        most = min(most, int(HELDOUT_SHARE * len(train)))
    ranked = sorted(range(len(scored)), key=lambda at: uniform(scored[at].prompt, seed, "heldout"))
    heldout = [scored[at] for at in sorted(ranked[:most]) if scored[at].prompt.strip()]
    if not heldout:
        raise UserError(f"{path} has too few rows to hold out any for domain '{name}'")
    reserved = {prompt_key(row.prompt) for row in (*test, *heldout)}
    origin = path.name if scored is train else test_path.name
    return _TaskRows(train=train, heldout=heldout, origin=origin, reserved=reserved, labels=labels)


def _shortener(most: int | None) -> Callable[[str], str]:
    """What shortens a prompt to so many characters, its first paragraph last of all."""

    def shorten(prompt: str) -> str:
        prompt = prompt.strip()
        task, gap, text = prompt.partition("\n\n")
        room = None if most is None else most - len(task) - len(gap)
        if room is None or len(text) <= room:
            return prompt
        if room < most // 4:
            return without_middle(prompt, most)
        return task + gap + without_middle(text, room)

    return shorten


def _chat(
    prompt: str, response: str, shorten: Callable[[str], str], count: DomainCounts
) -> dict[str, Any]:
    """A row of the artifact."""
    shown = shorten(prompt)
    count.shortened += shown != prompt.strip()
    return {"prompt": shown, "response": response}


def _warn_of_shortened(counts: dict[str, DomainCounts], most: int | None) -> None:
    shortened = {name: count.shortened for name, count in counts.items() if count.shortened}
    if shortened:
        _log.warning(
            "prompts of more than domains.prompt_characters=%d lost their middle: %s rows",
            most,
            ", ".join(f"{number} {name}" for name, number in shortened.items()),
        )
