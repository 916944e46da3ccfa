"""Files of one JSON object a line: reading and writing them.

Reading streams: a file is read once from top to bottom.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from steerlora.data.conversations import Conversation, from_row
from steerlora.engine.content import open_file
from steerlora.errors import UserError

_TYPE_NAMES = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a number",
    list: "a list",
    str: "text",
    type(None): "null",
}


def read_objects(path: Path) -> Iterator[tuple[str, dict]]:
    """Each JSON object of ``path`` with its place, ``file:line``; blank lines are passed over.

    Raises:
        UserError: naming file and line, for bad JSON, a line that is no object, or bad UTF-8; for
            what is no file.
    """
    with open_file(path) as lines:
        for number, raw in enumerate(lines, start=1):
            place = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig").strip()
                if not line:
                    continue
                row = json.loads(line)
            except UnicodeDecodeError:
                raise UserError(f"{place}: not UTF-8 text; save the file as UTF-8") from None
            except (json.JSONDecodeError, RecursionError) as error:
                reason = getattr(error, "msg", "nested too deeply")
                raise UserError(f"{place}: not valid JSON ({reason})") from None
            if not isinstance(row, dict):
                raise UserError(f"{place}: a row is a JSON object, this is {type_name(row)}")
            yield place, row


def read_rows(path: Path) -> list[Conversation]:
    """The conversation of every row of a file of a domains artifact."""
    return [from_row(row) for _, row in read_objects(path)]


def write_objects(path: Path, rows: Iterable[Mapping]) -> None:
    """One JSON object a line, in ASCII: text may hold characters that count as line ends.

    The folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="ascii") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def type_name(value: object) -> str:
    """What a message calls the type of a value, JSON's or another."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)
