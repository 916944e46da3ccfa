"""A registered task's data from files of the user's in place of the hub's, column for column."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from steerlora.config import EvaluationConfig
from steerlora.data.jsonl import file_of, in_folder, read_objects, stem_of
from steerlora.engine.content import sha256
from steerlora.errors import UserError, nearest

SUBJECT = "subject"
"""The column that tells the tasks of a group apart whose data sets the hub has under names."""
TEST, EXAMPLES = "_test", ("_train", "_dev")
"""How names of files in ``evaluation.folder`` end: of items, and of solved examples."""
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def digest(config: EvaluationConfig, tasks: Collection[str]) -> str:
    """SHA-256 of what the user's files for these tasks hold, wherever they lie, and of what limits
    their items; empty where nothing of it is given.

    Args:
        config: with ``files``, ``folder``, ``include_path`` and ``limits``.
        tasks: of lm-eval's own, that run.

    Raises:
        UserError: a file or folder is not there, or the folder has no file for a task.
    """
    files, include_path = config.files, config.include_path
    in_that_folder = {
        path
        for task in tasks
        if config.folder is not None and task not in files
        for path in in_folder_for(task, config.folder)
    }
    if not files and include_path is None and not in_that_folder and not config.limits:
        return ""
    sha = hashlib.sha256()
    for path in sorted(in_that_folder):
        sha.update(f"folder {path.name}\n".encode())
        sha.update(bytes.fromhex(sha256(path)))
    if config.limits:
        sha.update(f"limits {sorted(config.limits.items())}\n".encode())
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


def in_folder_for(task: str, folder: str) -> list[Path]:
    """The files of ``evaluation.folder`` for a task: of its items, then of its examples, if any.

    Raises:
        UserError: no such folder, or it has no items for this task.
    """
    key, place = f"evaluation.folder={folder}", Path(folder)
    if not place.is_dir():
        raise UserError(f"{key}: there is no such folder")
    names = {stem_of(path).removesuffix(TEST) for path in in_folder(place, f"*{TEST}")}
    fitting = [name for name in names if task == name or task.startswith(f"{name}_")]
    if not fitting:
        raise UserError(
            f"{key} has no items of {task}: {nearest(task, names)} are there; add {task}{TEST}"
            f".jsonl, or give evaluation.files.{task}=<.jsonl file>"
        )
    name = max(fitting, key=len)
    examples = [file_of(place, name + ending) for ending in EXAMPLES]
    return [file_of(place, name + TEST), *[path for path in examples if path.is_file()][:1]]


@dataclass(frozen=True)
class LocalRows:
    """Rows for a single task or a group, of ``evaluation.files`` or ``evaluation.folder``."""

    key: str
    """How error messages begin."""
    splits: dict[str | None, list[dict[str, Any]]]
    """{split: its rows}; under None, those of the split that is scored."""
    examples: list[dict[str, Any]] | None = None
    """Rows of solved examples, whatever the task calls their split; None: a split has them."""

    @classmethod
    def of(cls, task: str, config: EvaluationConfig) -> LocalRows | None:
        """What the user gives of a task's data; None: nothing."""
        if task in config.files:
            return cls.read(task, config.files[task])
        if config.folder is None:
            return None
        items, *examples = in_folder_for(task, config.folder)
        return cls(
            key=f"evaluation.folder={config.folder}: {items.name}",
            splits={None: _checked(items)},
            examples=_checked(examples[0]) if examples else None,
        )

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
        if self.examples and examples:
            splits.setdefault(examples, self.examples)
        if shots and examples not in splits:
            raise UserError(
                f"{self.key}: the {shots} examples of {config['task']} come from its split "
                f"{examples}: give a folder with {scored}.jsonl and {examples}.jsonl, or no "
                f"examples, evaluation.shots.{config['task']}=0"
            )
        # A single task of a group whose rows lie in one file takes its own as well.
        named = config.get("dataset_name") and SUBJECT in next(iter(splits.values()))[0]
        if named or (grouped and config.get("dataset_name")):
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
