"""What files hold is their identity: every byte, whatever their place, hashed once."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from helpers.files import NO_FILES

from steerlora.engine import content
from steerlora.engine.content import MEMORY, ContentHashes, absolute, identity_of, open_file
from steerlora.errors import UserError

SIZE = 3 * 2**20


@pytest.fixture
def file(tmp_path) -> Path:
    """A file of three MiB that was written an hour ago, with its copy's folder beside it."""
    path = tmp_path / "model" / "weights"
    path.parent.mkdir()
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def hashed(monkeypatch) -> list[Path]:
    """The files that are read."""
    read = []
    original = content.sha256
    monkeypatch.setattr(content, "sha256", lambda file: read.append(file) or original(file))
    return read


@pytest.fixture
def settled(monkeypatch) -> None:
    """Files that this test has just written count as old."""
    monkeypatch.setattr(content, "SETTLED", -1.0)


def identity(file: Path, root: Path) -> str:
    return identity_of({"weights": file}, root)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("place", [0, 2**20, SIZE // 2, SIZE - 1])
def test_every_byte_counts_even_where_size_and_time_stay(file, tmp_path, place):
    before, times = identity(file, tmp_path), file.stat()
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(b"\1")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert identity(file, tmp_path) != before


def test_the_place_does_not_count_and_the_name_does(file, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes())
    assert identity(copy, tmp_path) == identity(file, tmp_path)
    assert identity_of({"other": file}, tmp_path) != identity(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert identity(Path("model/weights"), tmp_path) == identity(file, tmp_path)
    assert absolute("model") == absolute(str(tmp_path / "model")) == str(file.parent)
    assert absolute("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


@pytest.mark.usefixtures("settled")
def test_a_file_is_read_once_until_it_changes(file, tmp_path, hashed):
    first = identity(file, tmp_path)
    assert identity(file, tmp_path) == first
    assert hashed == [file]
    replaced = file.with_name("new")
    replaced.write_bytes(file.read_bytes())
    replaced.replace(file)
    assert identity(file, tmp_path) == first
    assert hashed == [file, file]


def test_a_file_that_has_just_changed_is_not_remembered(file, tmp_path, hashed):
    identity(file, tmp_path)
    assert not (tmp_path / MEMORY).exists()
    identity(file, tmp_path)
    assert hashed == [file, file]
    assert max(file.stat()[-3:]) <= time.time()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("said", ["", "[", "[]", "{}", '{"PATH": 1}', '{"PATH": [[0], 1]}'])
def test_a_memory_that_is_broken_is_done_without(file, tmp_path, said):
    right = identity(file, tmp_path / "other")
    (tmp_path / MEMORY).write_text(said.replace("PATH", str(file)))
    assert identity(file, tmp_path) == right
    assert json.loads((tmp_path / MEMORY).read_text())[str(file)][1]


@pytest.mark.usefixtures("settled")
def test_a_root_that_cannot_be_written_to_is_done_without(file, tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    assert identity(file, blocked / "root") == identity(file, tmp_path)


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize(
    "read", [open_file, lambda path: ContentHashes(path.with_name(MEMORY)).of([path])]
)
def test_what_is_no_file_is_one_line(tmp_path, kind, read):
    path, says = NO_FILES[kind](tmp_path / "law.jsonl")
    with pytest.raises(UserError, match=says) as error:
        read(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
