"""Datasets of the hub, and files that stand in for them, as a domains artifact."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from steerlora.cli import compose
from steerlora.config import DomainsConfig, SourceConfig
from steerlora.data.domains.hub import writer
from steerlora.data.domains.hub.source import open_split
from steerlora.engine.progress import Opened, Progress, SilentProgress
from steerlora.errors import UserError
from steerlora.stages import domains

COMMIT, OTHER = "a" * 40, "b" * 40


def save(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def first_of(row: dict) -> str:
    """The user's first turn of a row of the artifact."""
    turns = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    return next(turn["content"] for turn in turns if turn["role"] == "user")


def config(sources: dict[str, dict], **changes) -> DomainsConfig:
    made = {
        "evaluation_items": 10,
        "train_items": 30,
        "pretrain_items": 30,
        "broad": next(iter(sources)),
    }
    return DomainsConfig(kind="hub", names=list(sources), sources=sources, **{**made, **changes})


def write(made: DomainsConfig, directory: Path) -> dict:
    writer.write(directory, made, SilentProgress(), "domains")
    return json.loads((directory / "domains.json").read_text())


@pytest.fixture
def talk(tmp_path) -> dict:
    """A broad source: 200 conversations, some with a system's turn or with nothing answered."""
    rows = []
    for i in range(200):
        turns = [
            {"role": "user", "content": f"Do {i}."},
            {"role": "assistant", "content": f"Done {i}."},
            {"role": "user", "content": "More?"},
            {"role": "assistant", "content": "No."},
        ]
        rows.append(
            {"id": i, "messages": [{"role": "system", "content": "Obey."}, *turns][i % 2 :]}
        )
    rows.append({"id": 200, "messages": [{"role": "user", "content": "Anyone?"}]})
    rows.append({"id": 201, "messages": []})
    return {"path": save(tmp_path / "talk.jsonl", rows), "messages": "messages"}


@pytest.fixture
def sums(tmp_path) -> dict:
    """A folder with a test split; two training prompts are in it up to case and white space."""
    train = [{"question": f"Sum {i}?", "answer": i} for i in range(60)]
    train += [{"question": f" SUM\n{i}? ", "answer": 0} for i in (1000, 1049)]
    train += [{"question": "Sum 5?", "answer": 6}, {"question": "  ", "answer": 1}]
    save(tmp_path / "sums/train.jsonl", train)
    test = [{"question": f"Sum {i}?", "answer": i} for i in range(1000, 1050)]
    save(tmp_path / "sums/test.jsonl", test)
    return {
        "path": str(tmp_path / "sums"),
        "heldout_split": "test",
        "prompt": "question",
        "response": "The sum is {answer}.",
    }


def test_the_artifact_is_that_of_real_text(talk, sums, tmp_path):
    said = write(config({"talk": talk, "sums": sums}), tmp_path / "out")
    assert said["kind"] == "text"
    assert said["names"] == ["talk", "sums"]
    assert said["metrics"] == {
        "text_talk_likelihood": "likelihood",
        "text_sums_likelihood": "likelihood",
    }
    assert set(said["higher_is_better"].values()) == {True}
    assert set(said["target_tasks"].values()) == set(said["metrics"])
    counts = said["counts"]
    assert counts["talk"]["heldout_from"] == "train"
    assert counts["sums"]["heldout_from"] == "test"
    for name in ("talk", "sums"):
        heldout = load(tmp_path / f"out/heldout/{name}.jsonl")
        train = load(tmp_path / f"out/train/{name}.jsonl")
        assert (len(heldout), len(train)) == (10, 30)
        assert (counts[name]["heldout"], counts[name]["adaptation"]) == (10, 30)
        form = {"messages"} if name == "talk" else {"prompt", "response"}
        assert all(set(row) == form for row in heldout + train)
    assert len(load(tmp_path / "out/pretrain.jsonl")) == 30
    assert (counts["talk"]["pretraining"], counts["sums"]["pretraining"]) == (30, 0)
    for row in load(tmp_path / "out/train/talk.jsonl"):  # every turn, the system's too
        number = first_of(row)[3:-1]
        asked, *_ = [turn["content"] for turn in row["messages"] if turn["role"] == "system"] or [0]
        assert asked == (0 if int(number) % 2 else "Obey.")
        said = [turn["content"] for turn in row["messages"] if turn["role"] != "system"]
        assert said == [f"Do {number}.", f"Done {number}.", "More?", "No."]
    for row in load(tmp_path / "out/train/sums.jsonl"):
        assert row["prompt"].removeprefix("Sum ") == f"{row['response'][11:-1]}?"


def parts(kind: str, number: int) -> list[dict]:
    """Two turns of which the first is in parts, one of them of some kind."""
    first = [{"type": "text", "text": f"Do {number}"}, {"type": kind, "text": "."}]
    return [
        {"role": "user", "content": first},
        {"role": "assistant", "content": [{"type": "text", "text": "Done."}]},
    ]


def test_parts_of_a_turn_are_joined(tmp_path):
    rows = [{"turns": parts("text", i)} for i in range(40)]
    source = {"path": save(tmp_path / "talk.jsonl", rows), "messages": "turns"}
    write(config({"talk": source}), tmp_path / "out")
    for row in load(tmp_path / "out/train/talk.jsonl"):
        assert row["prompt"] in {f"Do {i}." for i in range(40)}
        assert row["response"] == "Done."


def test_parts_that_are_no_text_are_named_by_their_row(tmp_path):
    rows = [{"turns": parts("image" if i == 7 else "text", i)} for i in range(40)]
    source = {"path": save(tmp_path / "talk.jsonl", rows), "messages": "turns"}
    says = r"^domains\.sources\.talk\.messages: row 8: turn 1 has a part of type image; "
    with pytest.raises(UserError, match=says):
        write(config({"talk": source}), tmp_path / "out")


def test_what_has_no_answer_is_counted(talk, tmp_path):
    made = config({"talk": talk}, train_items=1000, pretrain_items=1000)
    assert write(made, tmp_path / "out")["counts"]["talk"]["blank"] == 2


def test_general_text_has_a_size_of_its_own(talk, tmp_path):
    made = config({"talk": talk}, train_items=20, pretrain_items=5)
    counts = write(made, tmp_path / "out")["counts"]["talk"]
    assert (counts["adaptation"], counts["pretraining"]) == (20, 5)


def test_no_prompt_is_in_two_sets(talk, sums, tmp_path):
    sizes = {"train_items": 1000, "pretrain_items": 1000, "evaluation_items": 20}
    everything = config({"talk": talk, "sums": sums}, **sizes)
    counts = write(everything, tmp_path / "out")["counts"]
    sets = [
        {" ".join(first_of(row).split()).casefold() for row in load(path)}
        for path in sorted((tmp_path / "out").rglob("*.jsonl"))
    ]
    assert sum(map(len, sets)) == len(set().union(*sets)) == 200 + 60 + 20
    assert counts["sums"]["held_out_prompt"] == 2  # of the whole test split, not of the 20 kept
    assert counts["sums"]["repeated"] == 1


def test_a_test_prompt_of_one_domain_is_trained_on_in_none(talk, sums, tmp_path):
    leak = {"messages": [{"role": r, "content": "Sum 1007?"} for r in ("user", "assistant")]}
    leaky = save(tmp_path / "leaky.jsonl", [*load(Path(talk["path"])), *[leak] * 3])
    write(config({"talk": talk | {"path": leaky}, "sums": sums}, train_items=999), tmp_path / "out")
    seen = load(tmp_path / "out/train/talk.jsonl") + load(tmp_path / "out/pretrain.jsonl")
    assert "Sum 1007?" not in {first_of(row) for row in seen}


def test_the_seed_and_nothing_else_decides(talk, sums, tmp_path):
    files = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(config({"talk": talk, "sums": sums}, seed=seed), tmp_path / place)
        paths = sorted((tmp_path / place).rglob("*.json*"))
        files.append({path.relative_to(tmp_path / place): path.read_bytes() for path in paths})
    assert files[0] == files[1]
    assert files[0].keys() == files[2].keys()
    train = Path("train/talk.jsonl")
    assert files[0][train] != files[2][train]


def test_rows_come_from_all_over_the_source(talk, tmp_path):
    write(config({"talk": talk}), tmp_path / "out")
    numbers = [int(first_of(row)[3:-1]) for row in load(tmp_path / "out/train/talk.jsonl")]
    assert max(numbers) > 150
    assert min(numbers) < 50


def test_a_template_has_columns_and_their_fields(tmp_path):
    rows = [
        {"law": {"text": f"Section {i}", "year": 1900 + i}, "question": None, "yes": bool(i % 2)}
        for i in range(20)
    ]
    source = {
        "path": save(tmp_path / "laws.jsonl", rows),
        "prompt": "{law[text]} of {law[year]}\n\n{question}",
        "response": "yes",
    }
    write(config({"laws": source}, evaluation_items=2), tmp_path / "out")
    for row in load(tmp_path / "out/train/laws.jsonl"):
        number = int(row["prompt"].split()[1])
        assert row["prompt"] == f"Section {number} of {1900 + number}"
        assert row["response"] == str(bool(number % 2))


def test_long_work_reports_its_rows(talk, sums, tmp_path):
    events = []

    class Recorder(Progress):
        def emit(self, event) -> None:
            events.append(event)

    writer.write(tmp_path / "out", config({"talk": talk, "sums": sums}), Recorder(), "domains")
    tasks = [event for event in events if isinstance(event, Opened)]
    assert [(task.description, task.total) for task in tasks] == [
        ("domains: talk", 60),  # and general text
        ("domains: sums", 30),
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": "questoin"}, "no column 'questoin'; did you mean 'question'"),
        ({"prompt": "{question} {hint}"}, "no column 'hint'.*(columns: question, answer)"),
        ({"prompt": "{question"}, "prompt='{question': "),
        ({"response": "{answer[steps]}"}, "does not fit a row"),
        ({"prompt": None, "response": None, "messages": "question"}, "role and content"),
        ({"split": "training"}, r"no training\.jsonl \(there: test\.jsonl, train\.jsonl\)"),
        ({"path": "nowhere.jsonl"}, "nowhere.jsonl: there is no such file"),
    ],
)
def test_a_wrong_source_is_refused_in_one_line(changes, says, sums, tmp_path):
    with pytest.raises(UserError, match=rf"^domains\.sources\.sums.*{says}") as caught:
        write(config({"sums": sums | changes}), tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"q": "a", "a": "b"}] * 4, "too few rows to hold out any"),
        ([{"q": "a", "a": "b"}] * 10, r"0 to train on, 1 held out, 10 with a held-out prompt"),
        ([{"q": [1, 2], "a": "b"}] * 9, r"holds no text but lists.*'\{q\[0\]\}'"),
    ],
)
def test_rows_that_cannot_do_are_refused(rows, says, tmp_path):
    source = {"path": save(tmp_path / "few.jsonl", rows), "prompt": "q", "response": "a"}
    with pytest.raises(UserError, match=says):
        write(config({"few": source}), tmp_path / "out")


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{'a': 1}\nnothing\n")
    source = {"path": str(tmp_path / "bad.jsonl"), "prompt": "q", "response": "a"}
    with pytest.raises(
        UserError, match=r"^domains\.sources\.bad: .*bad\.jsonl cannot be read: JSON"
    ):
        write(config({"bad": source}), tmp_path / "out")


# The hub itself: nothing can be reached in the tests, so its cache stands in.


def cached(root: Path, commit: str, rows: list[dict]) -> None:
    """A dataset ``some/sums`` as ``load_dataset`` leaves it in the cache of a revision."""
    home = root / "pinned" / commit / "some___sums/main/0.0.0" / commit
    home.mkdir(parents=True)
    stored = datasets.Dataset.from_list(rows)
    with datasets.arrow_writer.ArrowWriter(
        path=str(home / "sums-train.arrow"), features=stored.features
    ) as writer:
        writer.write_table(stored.data.table)
        count, size = writer.finalize()
    split = {"name": "train", "num_bytes": size, "num_examples": count, "dataset_name": "sums"}
    datasets.DatasetInfo(
        features=stored.features,
        builder_name="parquet",
        dataset_name="sums",
        config_name="main",
        version="0.0.0",
        splits={"train": split},
    ).write_to_directory(str(home))


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """As with HF_HUB_OFFLINE=1 and an empty cache; where the cache is."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


HUB = {
    "path": "some/sums",
    "name": "main",
    "revision": COMMIT,
    "prompt": "question",
    "response": "answer",
}


def test_a_fetched_dataset_is_read_without_a_network(offline, tmp_path):
    cached(offline, COMMIT, [{"question": f"Sum {i}?", "answer": str(i)} for i in range(40)])
    said = write(config({"sums": HUB}), tmp_path / "out")
    assert said["counts"]["sums"]["heldout"] == 8
    assert len(load(tmp_path / "out/train/sums.jsonl")) > 5


def test_one_that_was_not_fetched_says_how_to(offline):
    made = config({"sums": HUB}, name="paper")
    with pytest.raises(UserError) as caught:
        writer.write(offline.parent / "out", made, SilentProgress(), "domains")
    said = str(caught.value)
    assert said.startswith("domains.sources.sums.path=some/sums cannot be reached (")
    assert said.endswith("network: python scripts/download.py domains=paper")
    assert "\n" not in said


def test_of_two_revisions_the_one_asked_for_is_read(offline):
    for commit in (COMMIT, OTHER):  # the second is the newer
        cached(offline, commit, [{"question": commit, "answer": "1"}])
    for commit in (COMMIT, OTHER):
        source = SourceConfig(**(HUB | {"revision": commit}))
        assert open_split("sums", source, "train")[0]["question"] == commit
    third = SourceConfig(**(HUB | {"revision": "c" * 40}))
    with pytest.raises(UserError, match="some/sums cannot be reached"):
        open_split("sums", third, "train")


def test_packed_files_are_read_as_others_are(tmp_path):
    rows = b'{"question": "1 + 1 ?", "answer": "2"}\n' * 3
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(rows))
    for path in (tmp_path, tmp_path / "train.jsonl.gz"):
        source = SourceConfig(path=str(path), prompt="question", response="answer")
        assert source.local
        found = open_split("sums", source, "train", cache=tmp_path / "cache")
        assert found[0]["answer"] == "2"
        assert len(found) == 3


@pytest.mark.parametrize("changes", [{"name": "mian"}, {"split": "training"}])
def test_a_wrong_configuration_or_split_is_named(changes, offline):
    cached(offline, COMMIT, [{"question": "1", "answer": "1"}])
    source = SourceConfig(**(HUB | changes))
    with pytest.raises(UserError, match=next(iter(changes.values()))) as caught:
        open_split("sums", source, source.split)
    assert "\n" not in str(caught.value)


# What an artifact is called.


def fingerprint(*changes: str) -> str:
    return domains.step(compose.load(["domains=paper", *changes])).fingerprint


@pytest.mark.parametrize(
    "change",
    [
        "math.path=other/dataset",
        "math.name=socratic",
        f"math.revision={OTHER}",
        "math.split=test",
        "math.heldout_split=null",
        "math.prompt=answer",
        "math.response=question",
        "instruction.messages=turns",
    ],
)
def test_everything_that_a_source_says_counts(change):
    assert fingerprint(f"domains.sources.{change}") != fingerprint()


def test_the_broad_domain_counts_and_an_unused_source_does_not():
    assert fingerprint("domains.broad=law") != fingerprint()
    fewer = ("domains.names=[math,law]", "domains.broad=law")
    assert fingerprint(*fewer) == fingerprint(*fewer, "domains.sources.code.prompt=solution")


def test_files_count_by_content_not_by_place(tmp_path):
    for place, text in (("a", "x"), ("b", "x"), ("c", "y")):
        save(tmp_path / place / "m.jsonl", [{"question": text, "answer": "1"}])
    a, b, c = (fingerprint(f"domains.sources.math.path={tmp_path / p}/m.jsonl") for p in "abc")
    assert a == b != c
    named = f"domains.sources.math.path={tmp_path}/a/m.jsonl"
    assert fingerprint(named, "domains.sources.math.name=null") == a


def test_the_shipped_sources_are_pinned_to_commits():
    made = compose.load(["domains=paper"]).domains
    assert list(made.sources) == made.names
    assert all(len(source.revision) == 40 for source in made.sources.values())
    assert not any(source.local for source in made.sources.values())
    replaced = replace(made, train_items=3)
    assert replaced.sources == made.sources
