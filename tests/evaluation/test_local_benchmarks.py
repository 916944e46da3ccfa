"""Real benchmarks from a folder of jsonl files: what each task reads, and what is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from steerlora.cli import compose
from steerlora.config import EvaluationConfig
from steerlora.data.concept_rows import concept_files, read_concepts
from steerlora.errors import UserError
from steerlora.evaluation import registered
from steerlora.evaluation.local_rows import LocalRows, digest
from steerlora.evaluation.suite import Domains, Suite
from steerlora.stages import causal_ablation, evaluate, sequential_forgetting

OWN = {
    "arc_easy_test": [
        {
            "id": str(number),
            "question": f"What is {number}?",
            "choices": {"text": ["wet", "dry", "hot"], "label": ["1", "2", "3"]},
            "answerKey": "123"[number],
        }
        for number in range(3)
    ],
    "openbookqa_test": [
        {
            "id": str(number),
            "question_stem": f"Water {number} is",
            "choices": {"text": ["wet", "dry"], "label": ["A", "B"]},
            "answerKey": "AB"[number],
        }
        for number in range(2)
    ],
    "piqa_test": [
        {"goal": f"Open {number}.", "sol1": "Pull.", "sol2": "Push.", "label": number}
        for number in range(2)
    ],
    "boolq_test": [
        {"passage": f"{number} is a number.", "question": "is it", "idx": number, "label": number}
        for number in range(2)
    ],
}
"""Invented rows in the columns of the data sets that ``evaluation=paper`` has not."""
TASKS = compose.load(["evaluation=local"]).evaluation.groups["general_knowledge"]


def save(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(paper_rows, tmp_path) -> Path:
    for name, rows in OWN.items():
        save(tmp_path / f"{name}.jsonl", rows)
    for task, name in (
        ("arc_challenge", "arc_challenge"),
        ("hellaswag", "hellaswag"),
        ("truthfulqa_mc2", "truthfulqa"),
        ("winogrande", "winogrande"),
        ("mmlu", "mmlu"),
    ):
        splits = paper_rows[task]
        save(tmp_path / f"{name}_test.jsonl", splits.get("test") or splits["validation"])
    save(tmp_path / "mmlu_dev.jsonl", paper_rows["mmlu"]["dev"])
    return tmp_path


def load(task: str, folder: Path, **options) -> registered.Loaded:
    local = LocalRows.of(task, EvaluationConfig(folder=str(folder)))
    return registered.load(task, local=local, **options)


def test_every_task_reads_the_file_that_its_name_begins_with(folder):
    items = {
        task: sum(len(list(one.eval_docs)) for one in load(task, folder).tasks.values())
        for task in TASKS
    }
    assert items == {
        "arc_easy": 3,
        "arc_challenge": 5,
        "openbookqa": 2,
        "piqa": 2,
        "winogrande": 5,
        "boolq": 2,
        "hellaswag": 6,
        "mmlu": 60,
        "truthfulqa_mc2": 4,
    }
    (anatomy,) = load("mmlu_anatomy", folder).tasks.values()
    assert {row["subject"] for row in anatomy.eval_docs} == {"anatomy"}
    # Solved examples come from the file beside.
    (anatomy,) = load("mmlu_anatomy", folder, shots=1).tasks.values()
    assert [row["question"] for row in anatomy.fewshot_docs()] == ["Which of anatomy is 9?"]
    with pytest.raises(UserError, match="the 2 examples of piqa come from its split train"):
        load("piqa", folder, shots=2)


def change(folder: Path, name: str, place: int, key: str, value) -> None:
    path = folder / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[place][key] = value
    save(path, rows)


@pytest.mark.parametrize(
    ("name", "key", "value", "says"),
    [
        ("arc_easy", "answerKey", "D", "row 2 of arc_easy: its answer is not among its 3 choices"),
        ("openbookqa", "answerKey", "", "row 2 of openbookqa: its answer is not among its 2"),
        ("piqa", "label", 2, "row 2 of piqa: its answer 2 is not among its 2 choices"),
        ("piqa", "label", -1, "row 2 of piqa: its answer -1 is not among"),
        ("boolq", "label", 5, "row 2 of boolq: its answer 5 is not among"),
        ("winogrande", "answer", "3", "row 2 of winogrande: its answer is not among its 2"),
        ("hellaswag", "label", "4", "row 2 of hellaswag: its answer 4 is not among its 4"),
        ("mmlu", "answer", 4, "row 2 of mmlu_abstract_algebra: its answer 4 is not among its 4"),
    ],
)
def test_an_answer_that_is_not_among_the_choices_is_refused(folder, name, key, value, says):
    change(folder, f"{name}_test", 1, key, value)
    with pytest.raises(UserError, match=says) as refused:
        load(name, folder)
    assert str(refused.value).startswith(f"evaluation.folder={folder}: {name}_test.jsonl: row 2")
    assert "\n" not in str(refused.value)
    assert load(name, folder, limit=1)  # that row is not scored


@pytest.mark.parametrize(
    ("name", "key"),
    [("arc_easy", "choices"), ("piqa", "sol2"), ("boolq", "passage"), ("truthfulqa", "question")],
)
def test_a_column_that_is_not_there_is_refused(folder, name, key):
    path = folder / f"{name}_test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    save(path, [{k: v for k, v in row.items() if k != key} for row in rows])
    task = "truthfulqa_mc2" if name == "truthfulqa" else name
    with pytest.raises(UserError, match=rf"{name}_test\.jsonl: {task} cannot read it") as refused:
        load(task, folder)
    assert "its columns have to be those of" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_without_the_task_s_file_is_refused(folder):
    (folder / "piqa_test.jsonl").unlink()
    with pytest.raises(UserError, match=r"no items of piqa: .* add piqa_test\.jsonl, or give"):
        LocalRows.of("piqa", EvaluationConfig(folder=str(folder)))
    given = EvaluationConfig(folder=str(folder), files={"piqa": str(folder / "boolq_test.jsonl")})
    assert LocalRows.of("piqa", given).key.startswith("evaluation.files.piqa=")
    with pytest.raises(UserError, match="/no: there is no such folder"):
        digest(EvaluationConfig(folder=f"{folder}/no"), ["piqa"])


def suite(tmp_path: Path, **config) -> Suite:
    domains = Domains(
        directory=tmp_path,
        kind="text",
        version=1,
        names=("law", "code"),
        target_tasks={"law": "text_law", "code": "text_code"},
        groups={"general": ["text_general"]},
        metrics={},
    )
    return Suite(domains, EvaluationConfig(**config))


def test_target_stands_for_the_domains_own_tasks(tmp_path):
    assert suite(tmp_path).chosen == ["text_general", "text_law", "text_code"]
    named = suite(tmp_path, tasks=["text_code", "target", "mmlu"])
    assert named.chosen == ["text_code", "text_law", "mmlu"]


def test_a_task_may_have_a_limit_of_its_own(tmp_path):
    limited = suite(tmp_path, limit=9, limits={"mmlu": 2})
    assert [limited.limit_of(task) for task in ("mmlu", "piqa")] == [2, 9]
    assert suite(tmp_path, limits={"mmlu": 2}).limit_of("piqa") is None


def test_what_ablation_and_sequence_compare_with_follows_the_tasks_asked_for():
    given = ["model=micro_xs", "method=sc_lora", "evaluation.tasks=[micro_law]"]
    config = compose.load(given)
    assert evaluate.step(config).config.evaluation.tasks == ["micro_law"]
    for step, name in (
        (causal_ablation.step(config), "intact"),
        (sequential_forgetting.step(config), "base_scores"),
    ):
        assert step.inputs[name].config.evaluation.tasks == ["target", "micro_law"]
    every = replace(config, evaluation=replace(config.evaluation, tasks=None))
    assert causal_ablation.step(every).inputs["intact"].config.evaluation.tasks is None


def real_benchmarks() -> Path:
    """The folder of real benchmarks, or a skip that says how to name it."""
    beside = next(Path(__file__).resolve().parents[3].glob("*/data/benchmarks"), None)
    folder = Path(os.environ.get("STEERLORA_BENCHMARKS_DIR", beside or "nowhere"))
    if not folder.is_dir():
        pytest.skip("set STEERLORA_BENCHMARKS_DIR to a folder of benchmarks to run this test")
    return folder


@pytest.mark.slow
def test_all_rows_of_real_benchmarks_can_be_scored():
    folder = real_benchmarks()
    for task in TASKS:
        assert load(task, folder, limit=20).tasks


def test_the_real_tables_of_concepts_can_be_read():
    folder = real_benchmarks()
    try:
        files = concept_files(folder)["axbench_concept10"]
    except (KeyError, UserError):
        pytest.skip("the folder has no axbench_concept10_train.jsonl and _test.jsonl")
    text = read_concepts("axbench_concept10", files)
    assert list(text.concepts) == list(range(10))
    for concept in text.concepts:
        assert [len(rows) for rows in text.training(concept)] == [72, 72]
        positive, others = text.testing(concept)
        assert len(positive) == 36
        assert len(others) >= 36
