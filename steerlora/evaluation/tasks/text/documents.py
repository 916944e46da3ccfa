"""The multiple-choice items of a text domains artifact, for the task files beside this one."""

from __future__ import annotations

from pathlib import Path

import datasets

from steerlora.data.jsonl import read_objects
from steerlora.errors import UserError


def text_medicine(domains_dir: str | None = None, **_: object) -> dict[str, datasets.Dataset]:
    """PubMedQA questions answered with yes, no or maybe."""
    return _items(domains_dir, "text_medicine")


def text_law(domains_dir: str | None = None, **_: object) -> dict[str, datasets.Dataset]:
    """LegalBench rows; the choices are the answers that training had for the row's task."""
    return _items(domains_dir, "text_law")


def _items(domains_dir: str | None, task: str) -> dict[str, datasets.Dataset]:
    if domains_dir is None:
        raise UserError(
            f'{task} needs its items: lm_eval --metadata \'{{"domains_dir": "/path/to/domains"}}\''
        )
    path = Path(domains_dir) / "evaluation" / f"{task}.jsonl"
    if not path.exists():
        raise UserError(f"{path} is missing: these domains have no items for {task}")
    rows = [row for _, row in read_objects(path)]
    return {"test": datasets.Dataset.from_list(rows)}
