"""Labelled text is read by name, column and label, and refused in one line."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from steerlora.data.labelled import read_labelled
from steerlora.errors import UserError


def write(folder, name: str, labels: list, columns=("text", "label")) -> None:
    text, label = columns
    rows = [{text: f"{name} {number}", label: given} for number, given in enumerate(labels)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("columns", [("text", "label"), ("prompt", "response")])
def test_training_and_test_files_are_one_data_set(columns, tmp_path):
    write(tmp_path, "news_train", ["good", "bad"] * 20, columns)
    write(tmp_path, "news_test", ["good", "bad"] * 10, columns)
    (found,) = read_labelled(tmp_path, rows=12)
    assert (found.name, found.labels) == ("news", ("bad", "good"))
    assert Counter(row.label for row in found.train) == {"good": 12, "bad": 12}
    assert Counter(row.label for row in found.test) == {"good": 10, "bad": 10}
    assert {row.text.split()[0] for row in found.test} == {"news_test"}


def test_a_file_alone_is_cut_in_two_without_overlap(tmp_path):
    write(tmp_path, "all", [number % 3 for number in range(120)])
    (found,) = read_labelled(tmp_path, rows=1000)
    assert (len(found.train), len(found.test)) == (90, 30)
    assert not {row.text for row in found.train} & {row.text for row in found.test}
    assert found.labels == ("0", "1", "2")


def test_labels_with_few_rows_are_left_out(tmp_path):
    write(tmp_path, "a_train", ["x"] * 20 + ["y"] * 20 + ["rare"] * 7)
    write(tmp_path, "a_test", ["x"] * 8 + ["y"] * 8 + ["rare"] * 9)
    write(tmp_path, "free", [f"answer {number}" for number in range(50)])
    (found,) = read_labelled(tmp_path, rows=1000)
    assert (found.name, found.labels) == ("a", ("x", "y"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], "a.jsonl:1: a row has text and label, or prompt and response"),
        ([{"text": 3, "label": "x"}], "a.jsonl:1: a row has text and label"),
        ([{"text": "a", "label": ["x"]}], "a.jsonl:1: a row has text and label"),
        ([{"text": "a", "label": "x"}] * 50, "no data set with two labels"),
        ([], "no data set with two labels"),
    ],
)
def test_what_has_no_labels_is_refused_in_one_line(rows, message, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=message) as error:
        read_labelled(tmp_path, rows=10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_files_is_refused(name, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no folder with jsonl files"):
        read_labelled(tmp_path / name, rows=10)
