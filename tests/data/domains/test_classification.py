"""Classification tasks as domains: reading, checking, splitting, what a user gets wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from steerlora.cli import compose
from steerlora.config import DomainsConfig, OrderConfig
from steerlora.data.domains.classification import writer
from steerlora.data.orders import sequence_of
from steerlora.errors import UserError
from steerlora.evaluation.suite import Domains
from steerlora.stages.domains import step as domains_step

TASKS = {"topic": ("sport", "world", "tech"), "mood": ("good", "bad")}


def save(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(task: str, start: int, count: int) -> list[dict]:
    labels = TASKS[task]
    return [
        {
            "prompt": f"What is the {task}?\n\nText: number {i} says so.\nAnswer:",
            "response": labels[i % len(labels)],
            "choices": list(labels),
        }
        for i in range(start, start + count)
    ]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two tasks, one with a test file, and the orders that there are of them."""
    folder = tmp_path / "source"
    folder.mkdir()
    save(folder / "topic_train.jsonl", rows_of("topic", 0, 30))
    save(folder / "topic_test.jsonl", rows_of("topic", 100, 12))
    save(folder / "mood_train.jsonl", rows_of("mood", 0, 20))
    orders = {"1": ["topic", "mood"], "2": ["mood"], "3": ["topic", "law"], "4": ["mood", "mood"]}
    (folder / "orders.json").write_text(json.dumps(orders))
    return folder


def written(source: Path, name: str = "domains", **options) -> Path:
    directory = source.parent / name
    writer.write(directory, source=source, seed=0, names=("topic", "mood"), **options)
    return directory


def prompts(path: Path) -> set[str]:
    return {row["prompt"] for row in load(path)}


def test_held_out_rows_are_the_test_file_s_or_no_training_rows(source):
    directory = written(source, evaluation_items=5)
    topic, mood = (load(directory / f"evaluation/classification_{n}.jsonl") for n in TASKS)
    tested = {row["prompt"] for row in rows_of("topic", 100, 12)}
    assert {row["prompt"] for row in topic} < tested
    assert len(topic) == 5
    assert len(mood) == 4  # a fifth of the training rows
    assert len(load(directory / "train/mood.jsonl")) == 16
    for name in TASKS:
        held_out = prompts(directory / f"heldout/{name}.jsonl")
        assert not held_out & prompts(directory / f"train/{name}.jsonl")
    for row in (*topic, *mood):
        assert row["choices"][row["answer"]] == row["response"]
        assert row["choices"] == sorted(row["choices"])


def test_for_development_no_test_row_is_scored_or_trained_on(source):
    save(source / "topic_train.jsonl", rows_of("topic", 0, 30) + rows_of("topic", 100, 3))
    directory = written(source, development=True)
    tested = {row["prompt"] for row in rows_of("topic", 100, 12)}
    seen = prompts(directory / "heldout/topic.jsonl") | prompts(directory / "train/topic.jsonl")
    assert len(seen & tested) <= 1  # held out of training rows, where it is one of them too
    assert not prompts(directory / "train/topic.jsonl") & tested
    assert len(load(directory / "heldout/topic.jsonl")) == 6


def test_the_same_arguments_give_the_same_bytes_and_a_description_that_reads(source):
    one, other = written(source, "a"), written(source, "b")
    files = [path.relative_to(one) for path in sorted(one.rglob("*")) if path.is_file()]
    assert all((one / file).read_bytes() == (other / file).read_bytes() for file in files)
    domains = Domains.read(one)
    assert domains.target_tasks["mood"] == "classification_mood"
    assert domains.written_tasks["mood"] == "classification_mood_written"


def test_general_text_is_there_where_it_is_given(source):
    assert load(written(source, "none") / "pretrain.jsonl") == []
    save(source / "talk.jsonl", [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(4)])
    directory = written(source, general=source / "talk.jsonl", pretrain_items=3)
    assert [row["prompt"] for row in load(directory / "pretrain.jsonl")] == ["q0", "q1", "q2"]


def test_a_long_prompt_keeps_what_is_asked(source, caplog):
    rows = rows_of("topic", 0, 9)
    rows[0]["prompt"] = "What is the topic?\n\n" + "word " * 100 + "\nAnswer:"
    save(source / "topic_train.jsonl", rows)
    directory = written(source, prompt_characters=80)
    first = load(directory / "train/topic.jsonl")[0]["prompt"]
    assert len(first) == 80
    assert first.startswith("What is the topic?\n\nword")
    assert first.endswith("Answer:")
    assert "domains.prompt_characters=80 lost their middle: 1 topic rows" in caplog.text


def _one_label(row):
    row["choices"] = ["sport"]


def _other_answer(row):
    row["response"] = "law"


def _twice(row):
    row["choices"] = ["sport", "sport", "world"]


def _other_choices(row):
    row["choices"] = ["sport", "world"]


def _no_choices(row):
    del row["choices"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_one_label, r"topic_train.jsonl:4: 'choices' has 1 label: there is nothing to tell apart"),
        (_other_answer, r"topic_train.jsonl:4: the response law is none of the row's choices"),
        (_twice, r"topic_train.jsonl:4: 'choices' has a label twice"),
        (_other_choices, r"topic_train.jsonl:4: the row's choices are sport, world; the rows befo"),
        (_no_choices, r"topic_train.jsonl:4: 'choices' must be a list of labels"),
    ],
)
def test_a_row_that_is_no_classification_is_named(source, spoil, says):
    rows = rows_of("topic", 0, 9)
    spoil(rows[3])
    save(source / "topic_train.jsonl", rows)
    with pytest.raises(UserError, match=says):
        written(source)


def test_a_label_that_no_row_has_is_named(source):
    rows = [row | {"choices": [*row["choices"], "law"]} for row in rows_of("topic", 0, 9)]
    save(source / "topic_train.jsonl", rows)
    with pytest.raises(UserError, match="no row's response is law, which is among the choices"):
        written(source)


def test_a_task_that_is_not_there_is_named_with_those_that_are(source):
    with pytest.raises(UserError, match=r"law_train.jsonl is missing \(domains found there: mood"):
        writer.write(source.parent / "x", source=source, seed=0, names=("law",))


CONFIG = DomainsConfig(kind="classification", names=["topic", "mood"], broad=None, dir="x")


def listed(source: Path, name: str) -> tuple[str, ...]:
    order = OrderConfig(kind="listed", listed=name)
    return sequence_of(order, replace(CONFIG, dir=str(source)))


def test_an_order_is_the_one_that_the_folder_lists(source):
    assert [listed(source, name) for name in "12"] == [("topic", "mood"), ("mood",)]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("3", "order 3 names law, which domains.names does not"),
        ("4", "order 4 names mood twice"),
        ("11", r"order.listed=11: .*orders.json has no such order: did you mean '1'"),
    ],
)
def test_an_order_that_is_none_is_named(source, name, says):
    with pytest.raises(UserError, match=says):
        listed(source, name)


def test_a_folder_without_orders_and_domains_without_a_folder_are_named(source):
    (source / "orders.json").write_text('["topic"]')
    with pytest.raises(UserError, match="lists no orders"):
        listed(source, "1")
    with pytest.raises(UserError, match="come from no folder"):
        sequence_of(OrderConfig(kind="listed"), DomainsConfig())


def test_where_no_domain_is_broad_none_comes_first():
    with pytest.raises(UserError, match="none of domains=micro is the broad one"):
        sequence_of(OrderConfig(), CONFIG)


def test_files_general_text_and_development_count_and_places_do_not(source, tmp_path):
    def fingerprint(*changes: str, folder: Path = source) -> str:
        given = ["domains=continual", "domains.names=[topic,mood]", f"domains.dir={folder}"]
        return domains_step(compose.load([*given, *changes])).fingerprint

    moved = tmp_path / "moved"
    moved.mkdir()
    for file in source.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    talk = tmp_path / "talk.jsonl"
    talk.write_text("{}")
    before = fingerprint()
    assert fingerprint(folder=moved) == before
    others = {fingerprint("domains.development=true"), fingerprint(f"domains.general={talk}")}
    (moved / "mood_train.jsonl").write_text("")
    others.add(fingerprint(folder=moved))
    assert len(others | {before}) == 4


def test_what_needs_general_text_says_so_before_anything_is_built(source):
    given = ["domains=continual", f"domains.dir={source}", "domains.names=[topic,mood]"]
    with pytest.raises(UserError, match="null_specialist=true knows general text"):
        compose.load([*given, "method=sc_lora_context"])
    from steerlora.stages import base

    with pytest.raises(UserError, match="pretrained here, on general text"):
        base.step(compose.load(given))
