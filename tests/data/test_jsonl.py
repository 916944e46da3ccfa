from __future__ import annotations

import gzip

import pytest

from steerlora.data.conversations import exchange
from steerlora.data.jsonl import (
    file_of,
    in_folder,
    read_objects,
    read_rows,
    stem_of,
    write_objects,
)
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
        (b'{"a": 1, "a": 2}', r"the key 'a' is given twice in one object"),
        (b'{"a": {"b": 1, "b": 1}}', r"the key 'b' is given twice in one object"),
        (b'{"a": ' + b"1" * 5000 + b"}", r"not valid JSON \(a number has too many digits\)"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_broken_line_is_named(line, says, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line)
    with pytest.raises(UserError, match=rf"rows\.jsonl:3: {says}"):
        list(read_objects(path))


def test_a_packed_file_is_read_as_one_that_is_not(tmp_path):
    rows = b'{"a": 1}\n{"a": 2}\n'
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(rows))
    assert [row["a"] for _, row in read_objects(tmp_path / "x.jsonl.gz")] == [1, 2]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(rows)[:-9])
    with pytest.raises(UserError, match=r"x\.jsonl\.gz: not a whole gzip file"):
        list(read_objects(tmp_path / "x.jsonl.gz"))
    (tmp_path / "x.jsonl.gz").write_bytes(rows)
    with pytest.raises(UserError, match=r"x\.jsonl\.gz: not a whole gzip file"):
        list(read_objects(tmp_path / "x.jsonl.gz"))


def test_a_folders_files_are_found_packed_or_not(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz", "b.jsonl.gz", "c.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in in_folder(tmp_path)] == ["a.jsonl", "b.jsonl.gz"]
    assert file_of(tmp_path, "b").name == "b.jsonl.gz"
    assert file_of(tmp_path, "d").name == "d.jsonl"
    assert stem_of(tmp_path / "b.jsonl.gz") == stem_of(tmp_path / "b.jsonl") == "b"
