"""A folder of JSON-lines files as conversations, checked row by row.

Everything here streams: a file is read once from top to bottom and only counters stay in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from steerlora.data.conversations import ROLES, Conversation, Turn, exchange
from steerlora.data.jsonl import file_of, in_folder, read_objects, stem_of, type_name
from steerlora.errors import UserError

TRAIN = "_train"
"""How the names of the files to train on end, before ``.jsonl`` or ``.jsonl.gz``."""


MESSAGES = "messages"
"""The column of a row that has its conversation whole."""


class SourceRow(NamedTuple):
    """One line of a source file.

    Attributes:
        turns: the conversation up to its last answer; empty where a turn of it is blank, or none
            is answered.
        task: the sub-task the row belongs to (LegalBench's ``task``), or "".
    """

    turns: Conversation
    task: str = ""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The user's turns."""
        return tuple(turn.content for turn in self.turns if turn.role == "user")

    @property
    def prompt(self) -> str:
        """The user's first turn: what tells rows apart."""
        return self.prompts[0]

    @property
    def response(self) -> str:
        """The last answer."""
        return self.turns[-1].content


def check_domains(source: Path, names: tuple[str, ...]) -> None:
    """UserError unless a folder has a ``<name>_train.jsonl`` for each domain."""
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; domains.dir takes a folder of .jsonl files")
    found = [stem_of(path).removesuffix(TRAIN) for path in in_folder(source, f"*{TRAIN}")]
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"{file_of(source, missing[0] + TRAIN)} is missing (domains found there: "
            f"{', '.join(found) or 'none'}); add the file, or choose others with "
            "domains.names=[...]"
        )


def is_listed(path: Path) -> bool:
    """Whether its folder lists a file: one that cannot be read is refused, not passed over."""
    return os.path.lexists(path)


def source_rows(
    path: Path, *, prompt_key: str = "prompt", response_key: str = "response"
) -> Iterator[SourceRow]:
    """The conversations of ``path``: ``messages`` where a row has them, else prompt and response.

    Raises:
        UserError: naming file and line, for whatever `read_objects` or `turns_of` refuses, for a
            missing key (with the row's keys) and for a value that is not text; naming the file when
            no row of it can be used.
    """
    empty = True
    for place, row in read_objects(path):
        if row.get(MESSAGES) is not None:
            turns = turns_of(row[MESSAGES], place)
        else:
            pair = text_of(row, prompt_key, place), text_of(row, response_key, place)
            turns = exchange(*pair) if all(map(str.strip, pair)) else ()
        empty &= not turns
        yield SourceRow(turns, text_of(row, "task", place) if "task" in row else "")
    if empty:
        raise UserError(f"{path} has no row with a {prompt_key} and a {response_key}")


def turns_of(messages: Any, place: str) -> Conversation:
    """A list of ``{"role", "content"}`` up to its last answer.

    A system's turn that is blank is left out. A turn after the last answer is left out as well: it
    is answered by nobody.

    Args:
        messages: of a row. A content is text, null, or a list of parts of type text, which are
            joined as they are.
        place: of the row, for messages.

    Returns:
        The turns, without white space around them; none where a turn of the user or the assistant
        is blank, or no user's is answered.

    Raises:
        UserError: another form, role or type of part.
    """
    if not isinstance(messages, list) or not all(
        isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in messages
    ):
        raise UserError(f"{place}: '{MESSAGES}' must be a list of turns with role and content")
    turns = []
    for number, turn in enumerate(messages, start=1):
        if turn["role"] not in ROLES:
            raise UserError(
                f"{place}: turn {number} has the role {turn['role']!r}; roles are "
                f"{', '.join(ROLES)}"
            )
        turns.append(Turn(turn["role"], _content(turn["content"], f"{place}: turn {number}")))
    while turns and turns[-1].role != "assistant":
        turns.pop()
    turns = [turn for turn in turns if turn.content or turn.role != "system"]
    answered = any(turn.role == "user" for turn in turns) and all(turn.content for turn in turns)
    return tuple(turns) if answered else ()


def _content(value: Any, place: str) -> str:
    """The text of a turn, whose place messages name."""
    if value is None:
        return ""
    if isinstance(value, list):
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise UserError(
                    f"{place} has a part of type {kind or type_name(part)}; models here read parts "
                    'of type text, {"type": "text", "text": ...}'
                )
        value = "".join(part["text"] for part in value)
    return _checked(value, "content", place).strip()


def text_of(row: dict, key: str, place: str) -> str:
    """``row[key]``, refused with ``place`` unless it is there and is text."""
    if key not in row:
        keys = ", ".join(sorted(row)) or "none"
        raise UserError(f"{place}: the row has no '{key}' (its keys: {keys})")
    return _checked(row[key], key, place)


def _checked(value: Any, key: str, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: '{key}' must be text, this is {type_name(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: '{key}' has half a surrogate pair, which is no text") from None
    return value
