"""A folder of JSON-lines files as prompts and responses, checked row by row.

Everything here streams: a file is read once from top to bottom and only counters stay in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from steerlora.data.jsonl import read_objects, type_name
from steerlora.errors import UserError

SUFFIX = "_train.jsonl"


class SourceRow(NamedTuple):
    """One usable line of a source file.

    Attributes:
        prompt: the user's turn as the file has it.
        response: the assistant's turn.
        task: the sub-task the row belongs to (LegalBench's ``task``), or "".
    """

    prompt: str
    response: str
    task: str


def check_domains(source: Path, names: tuple[str, ...]) -> None:
    """UserError unless a folder has a ``<name>_train.jsonl`` for each domain."""
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; domains.dir takes a folder of .jsonl files")
    found = sorted(path.name.removesuffix(SUFFIX) for path in source.glob(f"*{SUFFIX}"))
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"{source / (missing[0] + SUFFIX)} is missing (domains found there: "
            f"{', '.join(found) or 'none'}); add the file, or choose others with "
            "domains.names=[...]"
        )


def is_listed(path: Path) -> bool:
    """Whether its folder lists a file: one that cannot be read is refused, not passed over."""
    return os.path.lexists(path)


def usable_rows(
    path: Path, *, prompt_key: str = "prompt", response_key: str = "response"
) -> Iterator[SourceRow]:
    """The prompts and responses of ``path``; rows where either is blank are left out.

    Raises:
        UserError: naming file and line, for whatever `read_objects` refuses, for a missing key
            (with the row's keys) and for a value that is not text; naming the file when it has no
            usable row.
    """
    empty = True
    for place, row in read_objects(path):
        prompt = text_of(row, prompt_key, place)
        response = text_of(row, response_key, place)
        task = text_of(row, "task", place) if "task" in row else ""
        if prompt.strip() and response.strip():
            empty = False
            yield SourceRow(prompt, response, task)
    if empty:
        raise UserError(f"{path} has no row with a {prompt_key} and a {response_key}")


def text_of(row: dict, key: str, place: str) -> str:
    """``row[key]``, refused with ``place`` unless it is there and is text."""
    if key not in row:
        keys = ", ".join(sorted(row)) or "none"
        raise UserError(f"{place}: the row has no '{key}' (its keys: {keys})")
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{place}: '{key}' must be text, this is {type_name(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: '{key}' has half a surrogate pair, which is no text") from None
    return value
