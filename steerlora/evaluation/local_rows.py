"""A registered task's data from files of the user's in place of the hub's, column for column."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from steerlora.data.jsonl import in_folder, read_objects, stem_of
from steerlora.engine.content import sha256
from steerlora.errors import UserError

SUBJECT = "subject"
"""The column that tells the tasks of a group apart whose data sets the hub has under names."""
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def digest(files: Mapping[str, str], include_path: str | None = None) -> str:
    """SHA-256 of what ``evaluation.files`` and ``evaluation.include_path`` hold, wherever it lies;
    empty where neither is given.

    Raises:
        UserError: a file or folder is not there.
    """
    if not files and include_path is None:
        return ""
    sha = hashlib.sha256()
    if include_path is not None:
        folder = Path(include_path)
        if not folder.is_dir():
            raise UserError(f"evaluation.include_path={include_path}: there is no such folder")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            if "__pycache__" not in path.parts:
                sha.update(f"{path.relative_to(folder)}\n".encode())
                sha.update(bytes.fromhex(sha256(path)))
    for task in sorted(files):
        for path in _paths(task, files[task]):
            sha.update(f"{task} {path.name if Path(files[task]).is_dir() else ''}\n".encode())
            sha.update(bytes.fromhex(sha256(path)))
    return sha.hexdigest()[:20]


def _paths(task: str, place: str) -> list[Path]:
    path = Path(place)
    found = in_folder(path) if path.is_dir() else [path]
    if not all(file.is_file() for file in found) or not found:
        raise UserError(
            f"evaluation.files.{task}={place}: no such file; give a .jsonl file, or a folder "
            "with one of each split"
        )
    return found


@dataclass(frozen=True)
class LocalRows:
    """Rows for one name of ``evaluation.files``, a single task's or a group's."""

    key: str
    """How error messages begin."""
    splits: dict[str | None, list[dict[str, Any]]]
    """{split: its rows}; a single file is the split that is scored, under None."""

    @classmethod
    def read(cls, task: str, place: str) -> LocalRows:
        """A .jsonl file, or a folder of one file a split, such as train.jsonl and test.jsonl."""
        folder = Path(place).is_dir()
        paths = {stem_of(path) if folder else None: path for path in _paths(task, place)}
        return cls(
            key=f"evaluation.files.{task}={place}",
            splits={split: _checked(path) for split, path in paths.items()},
        )

    def changes(self, config: Mapping[str, Any], shots: int, *, grouped: bool) -> dict[str, Any]:
        """What to change in a task's configuration, so that it reads these rows.

        Args:
            config: the task's own.
            shots: solved examples before each item.
            grouped: whether the rows are those of a group, each task of which takes its own.

        Raises:
            UserError: the split that is scored, or the one that examples come from, is not there.
            NoRows: none of the rows is this task's.
        """
        scored = config.get("test_split") or config["validation_split"]
        splits = {split or scored: rows for split, rows in self.splits.items()}
        if scored not in splits:
            raise UserError(f"{self.key}: {config['task']} is scored on {scored}.jsonl, not there")
        examples = config.get("fewshot_split") or config.get("training_split")
        if shots and examples not in splits:
            raise UserError(
                f"{self.key}: the {shots} examples of {config['task']} come from its split "
                f"{examples}: give a folder with {scored}.jsonl and {examples}.jsonl, or no "
                f"examples, evaluation.shots.{config['task']}=0"
            )
        if grouped and config.get("dataset_name"):
            splits = {s: self._of_subject(rows, config) for s, rows in splits.items()}
            if not splits[scored]:
                raise NoRows
        data = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        return {
            "custom_dataset": lambda **_: data,
            # lm-eval opens every split that is named, wanted or not.
            **{key: None for key in _SPLITS if config.get(key) and config[key] not in splits},
        }

    def _of_subject(self, rows: list[dict], config: Mapping[str, Any]) -> list[dict]:
        if rows and SUBJECT not in rows[0]:
            raise UserError(
                f"{self.key}: needs a column {SUBJECT}, such as {config['dataset_name']!r}, that "
                "says whose each row is"
            )
        return [row for row in rows if row[SUBJECT] == config["dataset_name"]]


class NoRows(Exception):
    """A task of a group has no rows."""


def _checked(path: Path) -> list[dict[str, Any]]:
    """The rows of a file. All have the first one's columns: lm-eval would read None as text."""
    rows, columns = [], None
    for place, row in read_objects(path):
        columns = columns or sorted(row)
        if sorted(row) != columns:
            raise UserError(
                f"{place}: has columns {', '.join(sorted(row))}; the rows before have "
                f"{', '.join(columns)}"
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows
