"""What the micro world's lm-eval tasks read, and how their short answers are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
            f"{file} reads a domains directory: pass --metadata "
            '\'{"domains_dir": "<directory>"}\' or TaskManager(metadata=...)'
        )
    path = Path(domains_dir) / "evaluation" / f"{file}.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: is {domains_dir} a micro domains directory?")
    return {"test": datasets.Dataset.from_json(str(path), keep_in_memory=True)}


def exact_match(document: Mapping, results: Sequence[str]) -> dict[str, float]:
    """lm-eval's hook: 1.0 where the answer is the response, word for word.

    A worked solution ends in `#### answer`, as in GSM8K; only what follows the mark counts.
    """
    wanted, written = document["response"].split(), results[0].split()
    if "####" in wanted:
        wanted = wanted[wanted.index("####") :]
        written = written[written.index("####") :] if "####" in written else []
    return {"exact_match": float(wanted == written)}
