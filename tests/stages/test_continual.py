"""The continual benchmark at a size that teaches nothing: listed orders, both scores, the table."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from steerlora.cli import compose, experiment
from steerlora.data.orders import sequence_of
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.run import run
from steerlora.evaluation.records import DomainSequence, read_record
from steerlora.reporting.published_figures import LONG, STANDARD
from steerlora.stages import sequential_forgetting

TASKS = {"topic": ("sport", "world", "tech"), "mood": ("good", "bad")}


def published_folder() -> Path:
    """The folder of the published tasks, or a skip that says how to name it."""
    beside = next(Path(__file__).resolve().parents[3].glob("*/data/continual"), None)
    folder = Path(os.environ.get("STEERLORA_CONTINUAL_DIR", beside or "nowhere"))
    if not folder.is_dir():
        pytest.skip("set STEERLORA_CONTINUAL_DIR to a folder of the fifteen tasks to run this test")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("tasks")
    for name, labels in TASKS.items():
        for part, count in (("train", 18), ("test", 6)):
            rows = [
                {
                    "prompt": f"Which {name}? Number {i} of {part}.",
                    "response": labels[i % len(labels)],
                    "choices": list(labels),
                }
                for i in range(count)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (made / f"{name}_{part}.jsonl").write_text(text)
    talk = [{"prompt": f"How is {i}?", "response": f"It is {i}."} for i in range(60)]
    (made / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    orders = {"1": ["topic", "mood"], "2": ["mood", "topic"], "3": ["topic"]}
    (made / "orders.json").write_text(json.dumps(orders))
    return made


@pytest.fixture(scope="module")
def study(folder, tmp_path_factory):
    """The experiment, run: its configuration, its plan and its report."""
    root = tmp_path_factory.mktemp("artifacts")
    overrides = [
        "experiment=cl",
        "model=micro_xs",
        "model.steps=2",
        "model.batch_size=8",
        "model.vocabulary=300",
        f"domains.dir={folder}",
        f"domains.general={folder / 'talk.jsonl'}",
        "domains.names=[topic,mood]",
        "study.orders=[listed_1,listed_2]",
        "study.sequential_methods=[seq_lora,epi]",
        "study.baseline_method=seq_lora",
        "method.rank=2",
        "trainer.batch_size=4",
        "trainer.max_length=96",
        "order.steps_per_domain=1",
        "evaluation.max_length=96",
        "logger=none",
        f"artifacts.root={root}",
        f"results.dir={root / 'results'}",
    ]
    config = compose.load(overrides)
    planned = experiment.plan(config, lambda *changes: compose.load([*overrides, *changes]))
    built = run(planned.steps, ArtifactStore(root))
    return planned, built, experiment.report(config, planned, built.artifacts)


def test_labels_are_ranked_and_written_out_after_every_task(study):
    planned, built, _ = study
    for one in planned.sequentials:
        path = built[one.step] / sequential_forgetting.RESULT
        record = read_record(path, DomainSequence)
        assert record.broad is None
        assert [len(rows) for rows in (record.matrix, record.written)] == [3, 3]
        assert all(len(row) == 2 for row in record.written)
        assert record.items == 6
    orders = [one.step.config.sequence for one in planned.sequentials]
    assert set(orders) == {("topic", "mood"), ("mood", "topic")}


def test_the_report_has_the_benchmark_s_table(study):
    _, _, written = study
    table = written.tables["continual"]
    assert set(table.method) == {"seq_lora", "epi"}
    assert set(table.order) == {"all orders", "listed_1", "listed_2"}
    assert table["AP"].between(0, 100).all()
    assert (written.directory / "continual.md").is_file()


@pytest.mark.parametrize(
    ("option", "tasks"), [("cl", STANDARD), ("cl_full", LONG), ("cl_qwen3", STANDARD)]
)
def test_the_published_orders_are_of_the_published_tasks(option, tasks):
    overrides = [f"experiment={option}", f"domains.dir={published_folder()}"]
    for name in compose.load(overrides).study.orders:
        number = name.removeprefix("listed_")
        config = compose.load([*overrides, "order=listed", f"order.listed={number}"])
        assert frozenset(sequence_of(config.order, config.domains)) == tasks
