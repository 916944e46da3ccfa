"""What a domains artifact may say of itself: names and tasks of closed lists, whoever wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steerlora.config import DomainsConfig
from steerlora.data.domains.classification import writer as classification
from steerlora.data.domains.micro.writer import _description
from steerlora.data.domains.text.tasks import describe
from steerlora.errors import UserError
from steerlora.evaluation.harness import TASKS
from steerlora.evaluation.suite import KINDS, Domains


def write(directory: Path, said: object) -> Path:
    (directory / "domains.json").write_text(json.dumps(said))
    return directory


@pytest.mark.parametrize(
    "said",
    [
        _description(),
        describe(("law", "legal b"), ["text_law"]),
        classification.describe(("sst-2", "yahoo")),
    ],
)
def test_what_is_written_is_read(said, tmp_path):
    domains = Domains.read(write(tmp_path, json.loads(json.dumps(said))))
    assert list(domains.names) == said["names"]
    assert domains.target_tasks == said["target_tasks"]
    assert domains.directory == tmp_path


def test_kinds_are_the_folders_of_tasks():
    folders = {path.name for path in TASKS.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == set(KINDS)


def test_a_path_as_kind_runs_no_code(tmp_path):
    """lm-eval would import what a task file of that folder names by ``!function``."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "code.py").write_text("raise SystemExit('ran')")
    (tasks / "t.yaml").write_text("task: t\nprocess_docs: !function code.run\n")
    for kind in (str(tasks), "../../../tmp", "hub", "", None, ["micro"]):
        with pytest.raises(UserError, match="does not describe domains"):
            Domains.read(write(tmp_path, _description() | {"kind": kind}))


@pytest.mark.parametrize("name", ["../law", "/law", "..", "a\nb", "\x1b[31m", ""])
def test_domains_of_a_configuration_have_plain_names(name):
    with pytest.raises(UserError, match=r"domains\.names") as error:
        DomainsConfig(kind="text", dir="text", names=["law", name], broad="law")
    assert "\n" not in str(error.value)


LAW = {"law": "text_law_likelihood"}


@pytest.mark.parametrize(
    "changes",
    [
        {"names": ["../law"], "target_tasks": {"../law": "text_law"}},
        {"names": ["/etc/law"], "target_tasks": {"/etc/law": "text_law"}},
        {"names": [".."], "target_tasks": {"..": "text_law"}},
        {"names": ["a\nb"], "target_tasks": {"a\nb": "text_law"}},
        {"names": [""], "target_tasks": {"": "text_law"}},
        {"names": [], "target_tasks": {}},
        {"names": ["law", "law"]},
        {"names": "law"},
        {"names": [1], "target_tasks": {"1": "text_law"}},
        {"target_tasks": {"law": "winogrande"}},
        {"target_tasks": {"law": "/tmp/task.yaml"}},
        {"target_tasks": {"law": None}},
        {"target_tasks": {}},
        {"target_tasks": []},
        {"groups": {"gsm8k": ["gsm8k"]}},
        {"groups": {"gsm8k": "text_gsm8k"}},
        {"groups": ["text_gsm8k"]},
        {"extra_tasks": ["../text_law"]},
        {"extra_tasks": None},
        {"target_tasks": {"law": "text_/../law"}},
        {"extra_tasks": ["text_a"], "written_tasks": {"law": "text_b"}},
        {"extra_tasks": ["text_a"], "written_tasks": {"math": "text_a"}},
        {"written_tasks": ["text_a"]},
        {"metrics": {"text_law": 1}},
        {"metrics": {"hellaswag": "acc,none"}},
        {"version": "1"},
    ],
    ids=str,
)
def test_other_names_are_refused_in_one_line(changes, tmp_path):
    said = describe(("law",), []) | {"target_tasks": LAW} | changes
    with pytest.raises(UserError, match="does not describe domains: build them again"):
        Domains.read(write(tmp_path, said))


@pytest.mark.parametrize("said", [None, [], 1, {}, {"kind": "text"}])
def test_another_form_is_refused_in_one_line(said, tmp_path):
    with pytest.raises(UserError, match="does not describe domains"):
        Domains.read(write(tmp_path, said))
    with pytest.raises(UserError, match="is missing"):
        Domains.read(tmp_path / "nowhere")
