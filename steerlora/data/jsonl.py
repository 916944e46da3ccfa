"""Files of one JSON object a line: reading and writing them.

Reading streams: a file is read once from top to bottom. One whose name ends in ``.gz`` is
unpacked on the way.
"""

from __future__ import annotations

import gzip
import json
import zlib
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


SUFFIXES = (".jsonl", ".jsonl.gz")
"""How the names of such files end."""


def in_folder(folder: Path, stem: str = "*") -> list[Path]:
    """The files ``<stem>.jsonl`` and ``<stem>.jsonl.gz`` of a folder, by name, one of each."""
    found = {stem_of(path) for suffix in SUFFIXES for path in folder.glob(f"{stem}{suffix}")}
    return sorted(file_of(folder, name) for name in found)


def file_of(folder: Path, stem: str) -> Path:
    """``<stem>.jsonl`` of a folder, or the packed one where only that is there."""
    plain, packed = (folder / f"{stem}{suffix}" for suffix in SUFFIXES)
    return packed if packed.exists() and not plain.exists() else plain


def stem_of(path: Path) -> str:
    """A file's name less the ending."""
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def _lines(path: Path) -> Iterator[bytes]:
    with open_file(path) as file, gzip.open(file) if path.suffix == ".gz" else file as lines:
        try:
            yield from lines
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path}: not a whole gzip file ({error})") from error


def read_objects(path: Path) -> Iterator[tuple[str, dict]]:
    """Each JSON object of ``path`` with its place, ``file:line``; blank lines are passed over.

    Raises:
        UserError: naming file and line, for bad JSON, a line that is no object, bad UTF-8, a key
            that comes twice in an object, or a number of too many digits; for what is no file, or
            a broken gzip file.
    """
    for number, raw in enumerate(_lines(path), start=1):
        place = f"{path}:{number}"
        try:
            line = raw.decode("utf-8-sig").strip()
            if not line:
                continue
            row = json.loads(line, object_pairs_hook=_object)
        except UnicodeDecodeError:
            raise UserError(f"{place}: not UTF-8 text; save the file as UTF-8") from None
        except _Repeated as error:
            raise UserError(f"{place}: the key {error} is given twice in one object") from None
        except RecursionError:
            raise UserError(f"{place}: not valid JSON (nested too deeply)") from None
        except ValueError as error:
            # Python reads no whole number of more than some thousand digits.
            reason = getattr(error, "msg", "a number has too many digits")
            raise UserError(f"{place}: not valid JSON ({reason})") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: a row is a JSON object, this is {type_name(row)}")
        yield place, row


class _Repeated(Exception):
    """A key comes twice: of which value to take, the file says nothing."""


def _object(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Repeated(repr(next(name for name in names if names.count(name) > 1))[:100])
    return row


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
