"""The rows that our lm-eval tasks read: items of a domains artifact."""

from __future__ import annotations

from pathlib import Path

import datasets

from steerlora.errors import UserError


def documents(*, file: str, domains_dir: str | None = None, **_: object) -> dict:
    """lm-eval's `custom_dataset` hook: a task's rows as its `test` split.

    Args:
        file: name of the evaluation file (from the task's `dataset_kwargs`).
        domains_dir: the domains artifact (from the run's metadata).

    Raises:
        UserError: no such directory was given, or it lacks the file.
    """
    if domains_dir is None:
        raise UserError(
            f"{file} needs its items: lm_eval --metadata "
            '\'{"domains_dir": "<directory>"}\' or TaskManager(metadata=...)'
        )
    path = Path(domains_dir) / "evaluation" / f"{file}.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing: these domains have no items for {file}")
    return {"test": datasets.Dataset.from_json(str(path), keep_in_memory=True)}
