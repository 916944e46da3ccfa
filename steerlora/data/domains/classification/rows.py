"""Files of a classification task: a question, its answer, and the labels that an answer may be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from steerlora.data.conversations import exchange
from steerlora.data.domains.text.rows import SourceRow, text_of
from steerlora.data.jsonl import read_objects
from steerlora.errors import UserError, shown

CHOICES = "choices"
"""The column of a row that has the task's labels."""


class ClassificationRow(NamedTuple):
    """One line of a task's file."""

    place: str
    """File and line, for messages."""
    prompt: str
    """What is asked."""
    label: str
    """The right answer, one of ``labels``."""
    labels: tuple[str, ...]
    """What an answer may be, as the row lists it."""

    @property
    def as_source(self) -> SourceRow:
        """The same as a question and its answer; without turns where the question is blank."""
        turns = exchange(self.prompt, self.label) if self.prompt.strip() else ()
        return SourceRow(turns)


def classification_rows(path: Path) -> Iterator[ClassificationRow]:
    """The rows of a file, as they come.

    Raises:
        UserError: naming file and line, for a key that is missing, a value of another type, fewer
            than two labels, a label that comes twice, or an answer that is none of them.
    """
    for place, row in read_objects(path):
        prompt, label = text_of(row, "prompt", place), text_of(row, "response", place).strip()
        labels = _labels(row.get(CHOICES), place)
        if label not in labels:
            raise UserError(
                f"{place}: the response {shown(label)} is none of the row's choices: "
                f"{', '.join(labels)}"
            )
        yield ClassificationRow(place, prompt, label, labels)


def labels_of(rows: list[ClassificationRow], path: Path) -> tuple[str, ...]:
    """The labels of a task, in alphabetical order, each the answer of some training row.

    Args:
        rows: all of its training rows.
        path: their file, for messages.

    Raises:
        UserError: there is no row, rows have different labels, or a label is no row's answer.
    """
    if not rows:
        raise UserError(f"{path} has no rows")
    labels = tuple(sorted(rows[0].labels))
    check_labels(rows, labels)
    unused = sorted(set(labels) - {row.label for row in rows})
    if unused:
        raise UserError(
            f"{path}: no row's response is {shown(unused[0])}, which is among the choices: add "
            "rows of that label, or take it out of the choices"
        )
    return labels


def check_labels(rows: list[ClassificationRow], labels: tuple[str, ...]) -> None:
    """UserError unless every row has the task's labels, in whatever order."""
    for row in rows:
        if tuple(sorted(row.labels)) != labels:
            raise UserError(
                f"{row.place}: the row's choices are {', '.join(sorted(row.labels))}; the rows "
                f"before have {', '.join(labels)}"
            )


def _labels(value: Any, place: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        raise UserError(f"{place}: '{CHOICES}' must be a list of labels, texts that are not empty")
    labels = tuple(label.strip() for label in value)
    if len(labels) < 2:
        raise UserError(
            f"{place}: '{CHOICES}' has {len(labels)} label: there is nothing to tell apart; give "
            "two or more"
        )
    if len(set(labels)) < len(labels):
        raise UserError(f"{place}: '{CHOICES}' has a label twice: give each once")
    return labels
