"""lm-eval's registry and the user's rows for it: what fits is loaded, what does not is refused."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
from lm_eval.api import registry

from steerlora.config import EvaluationConfig
from steerlora.errors import UserError
from steerlora.evaluation import registered
from steerlora.evaluation.local_rows import LocalRows, digest


def test_what_a_task_reads_from_the_hub():
    assert registered.hub_datasets("gsm8k") == [("openai/gsm8k", "main")]
    assert registered.hub_datasets("mmlu_pro") == [("TIGER-Lab/MMLU-Pro", None)]
    mmlu = registered.hub_datasets("mmlu")
    assert len(mmlu) == 57
    assert ("cais/mmlu", "virology") in mmlu


@pytest.fixture
def own_tasks(tmp_path) -> str:
    """A folder with a task file of the user's, and the rows it reads."""
    rows = [{"prompt": "one ?", "answer": number % 2} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{prompt}}"\ndoc_to_choice: ["a", "b"]\ndoc_to_target: "{{answer}}"\n'
        "metric_list: [{metric: acc}]\n"
    )
    return str(tmp_path)


def test_a_task_file_of_the_users_is_found(own_tasks):
    (task,) = registered.load("mine", folder=own_tasks).tasks.values()
    assert len(list(task.test_docs())) == 4
    assert registered.hub_datasets("mine", own_tasks) == []
    assert registered.find("gsm8k", own_tasks) is registered.find("gsm8k")
    assert digest(EvaluationConfig(), ["mine"]) == ""
    given = EvaluationConfig(include_path=own_tasks)
    before = digest(given, ["mine"])
    (Path(own_tasks) / "other.yaml").touch()
    assert digest(given, ["mine"]) != before
    with pytest.raises(UserError, match="there is no such folder"):
        digest(EvaluationConfig(include_path=own_tasks + "/no"), ["mine"])


def test_packed_rows_are_read_as_others_are(tmp_path):
    rows = b'{"question": "1 + 1 ?", "answer": "#### 2"}\n' * 3
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(rows))
    assert list(LocalRows.read("gsm8k", str(tmp_path)).splits) == ["test"]
    local = LocalRows.read("gsm8k", str(tmp_path / "test.jsonl.gz"))
    task = registered.load("gsm8k", local=local, shots=0).tasks["gsm8k"]
    assert len(list(task.test_docs())) == 3


def test_no_metric_is_looked_for_on_the_hub(paper_files, monkeypatch):
    """lm-eval downloads metrics that it does not know: none of ours is such."""
    asked = []
    get = registry.get_metric
    monkeypatch.setattr(
        "lm_eval.api.task.get_metric", lambda name, *rest: asked.append(name) or get(name, *rest)
    )
    for task in paper_files.keys() - {"ifeval"}:  # ifeval scores by itself
        registered.load(task, local=LocalRows.read(task, paper_files[task]))
    assert set(asked) == {"acc", "acc_norm", "exact_match"}
    assert set(asked) <= set(registry.metric_registry.keys())


def change(paper_files, task: str, tmp_path: Path, edit) -> str:
    """The rows of a task's scored file, edited."""
    path = Path(paper_files[task])
    folder = shutil.copytree(path, tmp_path / "copy") if path.is_dir() else None
    scored = folder / "test.jsonl" if folder else tmp_path / "copy.jsonl"
    rows = [json.loads(line) for line in (scored if folder else path).read_text().splitlines()]
    scored.write_text("".join(json.dumps(row) + "\n" for row in edit(rows)))
    return str(folder or scored)


def without(key: str):
    return lambda rows: [{k: v for k, v in row.items() if k != key} for row in rows]


@pytest.mark.parametrize(
    ("task", "edit", "says"),
    [
        (
            "gsm8k",
            without("question"),
            r"cannot read it .*'question'.* those of openai/gsm8k",
        ),
        ("hellaswag", without("ctx_b"), r"cannot read it \(KeyError: 'ctx_b'\)"),
        ("mmlu", without("subject"), "needs a column subject, such as 'abstract_algebra'"),
        (
            "mmlu",
            lambda rows: [row for row in rows if row["subject"] not in ("anatomy", "virology")],
            "no rows for mmlu_anatomy, mmlu_virology, of the 57 tasks of mmlu: add them, or name",
        ),
        (
            "mmlu_pro",
            lambda rows: [row for row in rows if row["category"] in ("law", "math")],
            "no rows for mmlu_pro_biology, .* and 7 more, of the 14 tasks of mmlu_pro",
        ),
        ("arc_challenge", lambda rows: rows[:1] + without("id")(rows[1:]), "copy.jsonl:2: has col"),
        ("winogrande", lambda rows: [], "copy.jsonl has no rows"),
    ],
)
def test_rows_that_do_not_fit_are_refused(paper_files, tmp_path, task, edit, says):
    with pytest.raises(UserError, match=says) as refused:
        registered.load(task, local=LocalRows.read(task, change(paper_files, task, tmp_path, edit)))
    assert "\n" not in str(refused.value)


def test_examples_have_to_come_from_somewhere(paper_files, tmp_path):
    only = str(Path(paper_files["gsm8k"]) / "test.jsonl")
    local = LocalRows.read("gsm8k", only)
    with pytest.raises(UserError, match=r"5 examples of gsm8k .* evaluation\.shots\.gsm8k=0"):
        registered.load("gsm8k", local=local)
    assert registered.load("gsm8k", local=local, shots=0).tasks["gsm8k"].config.num_fewshot == 0
    with pytest.raises(UserError, match="takes 9 examples and finds 8"):
        registered.load("gsm8k", local=LocalRows.read("gsm8k", paper_files["gsm8k"]), shots=9)
    local = LocalRows.read("truthfulqa_mc2", paper_files["truthfulqa_mc2"])
    with pytest.raises(UserError, match=r"shots\.truthfulqa_mc2=3: .* without examples"):
        registered.load("truthfulqa_mc2", local=local, shots=3)
    (tmp_path / "train.jsonl").write_text('{"question": "1", "answer": "1"}\n')
    with pytest.raises(UserError, match=r"gsm8k is scored on test\.jsonl, not there"):
        registered.load("gsm8k", local=LocalRows.read("gsm8k", str(tmp_path)))


def test_files_count_by_content_not_by_place(paper_files, tmp_path):
    copies = {
        task: str(shutil.copytree(place, tmp_path / task))
        if Path(place).is_dir()
        else shutil.copy(place, tmp_path / f"other_{task}.jsonl")
        for task, place in paper_files.items()
    }

    def of(files: dict[str, str]) -> str:
        given = {task: str(place) for task, place in files.items()}
        return digest(EvaluationConfig(files=given), [*given])

    assert of(copies) == of(paper_files) != of({})
    with Path(copies["ifeval"]).open("a") as rows:
        rows.write("\n")
    assert of(copies) != of(paper_files)
    with pytest.raises(UserError, match=r"evaluation\.files\.mmlu=nowhere: no such file"):
        of({"mmlu": "nowhere"})
