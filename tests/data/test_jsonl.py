from __future__ import annotations

import pytest

from steerlora.data.conversations import exchange
from steerlora.data.jsonl import read_objects, read_rows, write_objects
from steerlora.errors import UserError


def test_rows_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "folder/rows.jsonl"
    rows = [{"prompt": "a\u2028b\r", "response": "é"}, {"prompt": "", "response": "\n", "more": 1}]
    write_objects(path, rows)
    assert [row for _, row in read_objects(path)] == rows
    assert read_rows(path) == [exchange("a\u2028b\r", "é"), exchange("", "\n")]
    assert [place for place, _ in read_objects(path)] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"a": ', "not valid JSON"),
        (b"[1]", "a row is a JSON object, this is a list"),
        (b"\xff", "not UTF-8 text"),
    ],
)
def test_a_broken_line_is_named(line, says, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line)
    with pytest.raises(UserError, match=rf"rows\.jsonl:3: {says}"):
        list(read_objects(path))
