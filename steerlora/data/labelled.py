"""Text with a label a row, from a folder of jsonl files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from steerlora.data.jsonl import file_of, in_folder, read_objects, stem_of
from steerlora.errors import UserError

COLUMNS = (("text", "label"), ("prompt", "response"))
"""Pairs of keys under which a row may have its text and its label."""
TRAIN, TEST = "_train", "_test"
"""How names of files end that say which part of a data set they are."""
TEST_EVERY = 4
"""One row in so many is for the test where no file is."""
FEWEST = 8
"""Rows of a label in training and in the test, without which it is left out."""


class LabelledRow(NamedTuple):
    """A text and what it is an example of."""

    text: str
    label: str


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """A data set of two classes or more."""

    name: str
    train: tuple[LabelledRow, ...]
    test: tuple[LabelledRow, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, in alphabetical order."""
        return tuple(sorted({row.label for row in self.train}))


def labelled_files(folder: Path) -> dict[str, Path]:
    """{name: file} of the jsonl files of a folder.

    Raises:
        UserError: there is none.
    """
    files = {stem_of(path): path for path in in_folder(folder)} if folder.is_dir() else {}
    if not files:
        raise UserError(f"{folder}: no folder with jsonl files, whose rows have text and label")
    return files


def read_labelled(folder: Path, rows: int) -> list[LabelledText]:
    """The data sets of a folder: ``<name>_train`` and ``<name>_test``, or ``<name>`` for both.

    A row has its text and its label under ``text`` and ``label``, or under ``prompt`` and
    ``response``; a label is text, a number or a truth value. Labels with too few rows are left out,
    and data sets of fewer than two labels with them.

    Args:
        folder: of jsonl files.
        rows: of a label at most, in training and in the test, evenly spaced over the file.

    Raises:
        UserError: a row without text and label, or no data set is left.
    """
    files = labelled_files(folder)
    found = []
    for name in dict.fromkeys(stem.removesuffix(TEST).removesuffix(TRAIN) for stem in files):
        whole = [
            _rows(file_of(folder, stem))
            for stem in (f"{name}{TRAIN}", f"{name}{TEST}", name)
            if stem in files
        ]
        if len(whole) == 1:
            train = [row for index, row in enumerate(whole[0]) if (index + 1) % TEST_EVERY]
            whole = [train, whole[0][TEST_EVERY - 1 :: TEST_EVERY]]
        counts = [Counter(row.label for row in part) for part in whole[:2]]
        labels = [label for label in counts[0] if min(c[label] for c in counts) >= FEWEST]
        if len(labels) > 1:
            train, test = (_spaced(part, labels, rows) for part in whole[:2])
            found.append(LabelledText(name=name, train=train, test=test))
    if not found:
        raise UserError(
            f"{folder}: no data set with two labels that {FEWEST} rows each have, in training and "
            "in the test: rows need text and label"
        )
    return found


def _rows(path: Path) -> list[LabelledRow]:
    return [_row(place, row) for place, row in read_objects(path)]


def _row(place: str, row: dict) -> LabelledRow:
    for text, label in COLUMNS:
        if isinstance(row.get(text), str) and isinstance(row.get(label), str | int | float):
            return LabelledRow(row[text], str(row[label]))
    raise UserError(f"{place}: a row has text and label, or prompt and response")


def _spaced(
    rows: Sequence[LabelledRow], labels: Sequence[str], most: int
) -> tuple[LabelledRow, ...]:
    """So many rows of each label at most, evenly spaced."""
    found: list[LabelledRow] = []
    for label in labels:
        own = [row for row in rows if row.label == label]
        count = min(most, len(own))
        found += [own[index * len(own) // count] for index in range(count)]
    return tuple(found)
