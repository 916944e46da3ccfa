"""lm-eval's own tasks on local stand-ins for their data: found, scored, grouped, refused."""

from __future__ import annotations

from dataclasses import replace

import datasets
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

import steerlora.__main__ as command
from steerlora.cli import compose
from steerlora.config import EvaluationConfig
from steerlora.engine.artifacts import Artifact, ArtifactStore
from steerlora.engine.run import run
from steerlora.errors import UserError
from steerlora.evaluation import registered
from steerlora.evaluation.local_rows import LocalRows
from steerlora.evaluation.records import DomainSequence, Evaluation, read_record
from steerlora.evaluation.scores import averages
from steerlora.evaluation.scoring import Scorer
from steerlora.evaluation.statistics import standard_error
from steerlora.stages import base, causal_ablation, evaluate, sequential_forgetting
from steerlora.stages.common import load_base

TINY = (
    "model=micro_xs",
    "model.steps=2",
    "model.batch_size=4",
    "domains.train_items=10",
    "domains.pretrain_items=100",
    "domains.evaluation_items=6",
    "logger=none",
)
TASKS = [
    "ifeval",
    "mmlu",
    "arc_challenge",
    "hellaswag",
    "truthfulqa_mc2",
    "winogrande",
    "mmlu_pro",
    "gsm8k",
]
VERSIONS = {
    "ifeval": "4.0",
    "mmlu": "2",
    "arc_challenge": "1.0",
    "hellaswag": "1.0",
    "truthfulqa_mc2": "3.0",
    "winogrande": "1.0",
    "mmlu_pro": "2.0",
    "gsm8k": "3.0",
}
ANSWER = "So, the answer is (A).\n#### 41"
"""What the fake model always writes; of several choices it takes the first."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Artifact]:
    step = base.step(compose.load(TINY))
    report = run([step], ArtifactStore(tmp_path_factory.mktemp("world")))
    return {artifact.stage: artifact for artifact in report.artifacts.values()}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No hub, no downloads, NLTK as on a machine without its data; and not all of lm-eval's tasks
    are indexed, which takes seconds, for these eight."""
    monkeypatch.setattr(registered, "_all", _refuse)
    monkeypatch.setattr(datasets, "load_dataset", _refuse)
    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", _refuse)
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk, "download", _refuse)
    monkeypatch.setenv("NLTK_DATA", "")
    monkeypatch.setattr(nltk.data, "path", list(nltk.data.path))


def _refuse(*_: object, **__: object) -> None:
    raise ConnectionError("no network")


@pytest.fixture
def fake(monkeypatch):
    """The model that always answers A; what it was asked."""
    asked: list = []

    def loglikelihood(self, requests, disable_tqdm=False):
        asked.extend((self, request) for request in requests)
        return [(0.0 if request.idx == 0 else -1000.0, request.idx == 0) for request in requests]

    def generate_until(self, requests, disable_tqdm=False):
        asked.extend((self, request) for request in requests)
        return [ANSWER for _ in requests]

    monkeypatch.setattr(HFLM, "loglikelihood", loglikelihood)
    monkeypatch.setattr(HFLM, "generate_until", generate_until)
    return asked


def paper(files: dict[str, str], **changes) -> EvaluationConfig:
    config = compose.load(["evaluation=paper"]).evaluation
    return replace(config, **{"files": files, "batch_size": 8} | changes)


def scorer(world, config: EvaluationConfig) -> Scorer:
    return Scorer(world["domains"], *load_base(world["base"]), config)


def share(answers: list[int]) -> float:
    """Of items whose answer is the first."""
    return answers.count(0) / len(answers)


def test_every_task_is_scored_as_by_hand(world, paper_files, paper_rows, fake):
    suite = scorer(world, paper(paper_files))
    scores = suite.tasks(TASKS)
    rows = paper_rows
    mmlu = [row["answer"] for row in rows["mmlu"]["test"]]
    by_hand = {
        "ifeval": 0.0,  # a comma in every one, too few words in the others
        "mmlu": share(mmlu),
        "arc_challenge": 2 / 5,
        "hellaswag": 2 / 6,
        "truthfulqa_mc2": 2 / 4,
        "winogrande": 3 / 5,
        "mmlu_pro": share([row["answer_index"] for row in rows["mmlu_pro"]["test"]]),
        "gsm8k": 1 / 4,  # 1 + 40
    }
    assert {name: score.value for name, score in scores.items()} == pytest.approx(by_hand)
    assert {name: score.version for name, score in scores.items()} == VERSIONS
    assert {name: score.shots for name, score in scores.items() if score.shots} == {
        "mmlu_pro": 5,
        "gsm8k": 5,
    }
    for name, score in scores.items():
        assert score.metric == suite.suite.metrics[name]
        assert score.items == len(score.per_item)
        assert score.value == pytest.approx(sum(score.per_item) / score.items)
    assert scores["gsm8k"].others == {"exact_match,strict-match": 0.25}
    assert set(scores["ifeval"].others) == {
        "inst_level_strict_acc,none",
        "prompt_level_loose_acc,none",
        "inst_level_loose_acc,none",
    }
    assert scores["ifeval"].others["inst_level_strict_acc,none"] == 1 / 5  # a sentence, as asked
    assert scores["hellaswag"].stderr == standard_error(scores["hellaswag"].per_item)
    assert suite.stand_ins == ["ifeval: sentence splitter trained on local text"]
    found = averages(scores, suite.suite.averaged)
    general = ("mmlu", "arc_challenge", "hellaswag", "truthfulqa_mc2", "winogrande")
    assert found["general_knowledge"].value == pytest.approx(
        sum(by_hand[task] for task in general) / 5
    )
    assert found["mmlu_pro"].value == pytest.approx(by_hand["mmlu_pro"])


def test_a_groups_items_follow_each_other_and_its_error_is_pooled(
    world, paper_files, paper_rows, fake
):
    score = scorer(world, paper(paper_files)).tasks(["mmlu"])["mmlu"]
    # lm-eval's order of subjects: those of stem by name first, and so the three of algebra.
    of_subject = {}
    for row in paper_rows["mmlu"]["test"]:
        of_subject.setdefault(row["subject"], []).append(float(row["answer"] == 0))
    algebra, anatomy = of_subject["abstract_algebra"], of_subject["anatomy"]
    assert (algebra, anatomy) == ([1.0, 0.0, 0.0], [0.0, 0.0])
    names = [
        name.removeprefix("mmlu_")
        for name in registered.load("mmlu", local=LocalRows.read("mmlu", paper_files["mmlu"])).tasks
    ]
    assert names[:3] == ["abstract_algebra", "anatomy", "astronomy"]
    assert names.index("virology") < names.index("sociology") < names.index("philosophy")
    assert score.per_item == [item for name in names for item in of_subject[name]]
    # Three and two items, and 55 that are alone: squares within subjects 2/3, 60 - 57 freedoms.
    assert score.items == 60
    assert score.stderr == pytest.approx(((2 / 3) / 3 / 60) ** 0.5)


def test_examples_are_turns_and_the_same_for_every_model(world, paper_files, fake):
    suite = scorer(world, paper(paper_files))
    suite.tasks(["gsm8k"])
    first = [request.args[0] for _, request in fake]
    fake.clear()
    suite.tasks(["gsm8k"])
    assert [request.args[0] for _, request in fake] == first
    assert all(prompt.count("<|assistant|>") == 6 for prompt in first)
    assert len(set(first)) == 4
    fake.clear()
    scores = scorer(world, paper(paper_files, shots={"gsm8k": 2, "mmlu": 1})).tasks(
        ["gsm8k", "mmlu"]
    )
    assert (scores["gsm8k"].shots, scores["mmlu"].shots) == (2, 1)
    prompts = [request.args[0] for _, request in fake]
    assert {prompt.count("<|assistant|>") for prompt in prompts[:4]} == {3}
    assert {prompt.count("<|assistant|>") for prompt in prompts[4:]} == {2}


def test_limits_and_lengths_of_answers(world, paper_files, fake):
    def asked(**changes) -> list:
        fake.clear()
        scorer(world, paper(paper_files, **changes)).tasks(["gsm8k", "hellaswag"])
        return [request for _, request in fake]

    def generations(requests) -> list[dict]:
        return [request.args[1] for request in requests if request.request_type == "generate_until"]

    assert len(asked()) == 4 + 6 * 4
    assert len(asked(generation_items=3)) == 3 + 6 * 4
    assert len(asked(limit=2, generation_items=3)) == 2 + 2 * 4
    assert {kwargs["max_gen_toks"] for kwargs in generations(asked())} == {256}
    assert {kwargs["max_gen_toks"] for kwargs in generations(asked(max_length=100))} == {50}
    told = generations(asked(max_generated_tokens=7))
    assert {kwargs["max_gen_toks"] for kwargs in told} == {7}
    assert {tuple(kwargs["until"]) for kwargs in told} == {("Question:", "</s>", "<|im_end|>")}


def test_no_length_of_context_is_the_models_own(world, paper_files):
    assert scorer(world, paper(paper_files)).max_length == 1024
    assert scorer(world, paper(paper_files, max_length=64)).max_length == 64


def test_a_real_model_scores_all_eight(world, paper_files):
    found = scorer(world, paper(paper_files, limit=2, max_generated_tokens=2, max_length=512))
    scores = found.tasks(TASKS)
    assert list(scores) == TASKS
    assert {name: score.items for name, score in scores.items()} == {
        **dict.fromkeys(TASKS, 2),
        "mmlu": 59,
        "mmlu_pro": 15,
    }
    assert 0 < scores["truthfulqa_mc2"].value < 1
    again = found.tasks(["mmlu", "truthfulqa_mc2"])
    assert again["mmlu"].per_item == scores["mmlu"].per_item
    assert again["truthfulqa_mc2"].per_item == scores["truthfulqa_mc2"].per_item


# Thinking


def thinking(tokenizer):
    """A tokenizer with a chat template like Qwen3's, thinking unless told otherwise."""
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template += (
        "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
        "{{ '<think> </think>' }}{% endif %}"
    )
    return tokenizer


def test_thoughts_are_for_written_answers_only(world, paper_files, fake):
    found = scorer(world, paper(paper_files))
    thinking(found.tokenizer)
    found.tasks(["gsm8k", "winogrande", "mmlu_pro"])
    prompts = {"generate_until": set(), "loglikelihood": set()}
    for _, request in fake:
        prompts[request.request_type].add(request.args[0].endswith("<think> </think>"))
    assert prompts == {"generate_until": {False}, "loglikelihood": {True}}


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("<think> #### 41 </think> #### 40", 1.0),
        ("<think> #### 40 </think> #### 41", 0.0),
        ("<think> #### 40", 0.0),  # cut off before it answered
        ("#### 40", 1.0),
    ],
)
def test_thoughts_are_no_part_of_the_answer(world, paper_files, monkeypatch, written, right):
    found = scorer(
        world, paper(paper_files, limit=1, metrics={"gsm8k": "exact_match,strict-match"})
    )
    thinking(found.tokenizer)
    found.tokenizer.add_tokens(written.split())

    def generate(self, context, max_length, stop, **_):
        ids = found.tokenizer(written, add_special_tokens=False)["input_ids"]
        return torch.cat([context, torch.tensor([ids] * len(context))], dim=1)

    monkeypatch.setattr(HFLM, "_model_generate", generate)
    assert found.tasks(["gsm8k"])["gsm8k"].value == right


# Where models and data are


def test_a_model_over_several_devices_is_not_moved(world, paper_files, tmp_path, monkeypatch):
    _, tokenizer = load_base(world["base"])
    places = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    layers = {"model.layers.0": "cpu", "model.layers.1": "disk"}  # stands for a second GPU
    spread = AutoModelForCausalLM.from_pretrained(
        world["base"] / "model", device_map=places | layers, offload_folder=tmp_path
    )
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    monkeypatch.setattr(type(spread), "to", _refuse)
    config = paper(paper_files, limit=1, max_generated_tokens=2)
    tasks = ["gsm8k", "winogrande", "truthfulqa_mc2"]
    whole = scorer(world, config).tasks(tasks)
    scores = Scorer(world["domains"], spread, tokenizer, config).tasks(tasks)
    assert {t: s.per_item for t, s in scores.items()} == {t: s.per_item for t, s in whole.items()}


def test_data_out_of_reach_says_how_to_get_it(world):
    with pytest.raises(UserError) as refused:
        scorer(world, paper({})).tasks(["mmlu"])
    message = str(refused.value)
    assert "the data of mmlu, cais/mmlu, cannot be reached (ConnectionError: no network)" in message
    assert "scripts/download.py evaluation=paper" in message
    assert "evaluation.files.mmlu=<" in message
    assert "\n" not in message


# Through the stages


def test_the_stages_score_and_report_the_suite(world, paper_files):
    root = world["base"].path.parent.parent
    overrides = [
        *TINY,
        "method=lora",
        "method.rank=2",
        "domains.broad=law",
        "order.steps_per_domain=1",
        "trainer.max_steps=1",
        "trainer.batch_size=2",
        "evaluation=paper",
        "evaluation.limit=1",
        "evaluation.max_generated_tokens=2",
        "evaluation.groups.general_knowledge=[winogrande,arc_challenge]",
        f"artifacts.root={root}",
        *(f"evaluation.files.{task}={paper_files[task]}" for task in TASKS if task != "mmlu"),
    ]
    command.main(["stage=evaluate", "evaluation.tasks=[gsm8k,micro_law]", *overrides])
    command.main(["stage=sequential_forgetting", *overrides])
    config = compose.load(overrides)
    store = ArtifactStore(root)
    given = compose.load([*overrides, "evaluation.tasks=[gsm8k,micro_law]"])
    scored = store.find("evaluate", evaluate.step(given).fingerprint)
    record = read_record(scored / evaluate.SCORES, Evaluation)
    assert list(record.tasks) == ["gsm8k", "micro_law"]
    assert record.tasks["gsm8k"].version == "3.0"
    assert record.tasks["gsm8k"].shots == 5
    assert record.groups == config.evaluation.groups
    assert set(record.averages) == {"gsm8k", "target"}
    before = evaluate.step(config, adapted=False, targets=True)
    scored = store.find("evaluate", before.fingerprint)
    base_scores = read_record(scored / evaluate.SCORES, Evaluation)
    assert base_scores.stand_ins == ("ifeval: sentence splitter trained on local text",)
    assert {"micro_law", "mmlu_pro", "arc_challenge"} <= set(base_scores.tasks)
    assert "micro_mmlu" not in base_scores.tasks
    step = sequential_forgetting.step(config)
    sequence = store.find("sequential_forgetting", step.fingerprint)
    forgetting = read_record(sequence / sequential_forgetting.RESULT, DomainSequence)
    assert forgetting.general.before == base_scores.averages["general_knowledge"]
    assert forgetting.general.after.stderr >= 0
    assert forgetting.broad == "law" == forgetting.sequence[0]


# Mistakes


def test_a_wrong_name_is_refused_with_the_nearest_before_anything_is_built(monkeypatch):
    small = registered._few()
    monkeypatch.setattr(registered, "_all", lambda: small)
    for wrong in (
        "groups.general=[mmlu,hellaswg]",
        "files.hellaswg=x",
        "shots.hellaswg=1",
    ):
        config = compose.load([*TINY, f"evaluation.{wrong}"])
        for step in (evaluate.step, causal_ablation.step, sequential_forgetting.step):
            with pytest.raises(UserError, match="task hellaswg: did you mean 'hellaswag'"):
                step(config)
    with pytest.raises(UserError, match=r"items of ai2_arc, .* in it: arc_challenge, arc_easy$"):
        registered.find("ai2_arc")


def test_a_metric_that_there_is_not_is_refused_with_the_nearest(world, paper_files, fake):
    wrong = paper(paper_files, metrics={"gsm8k": "exact_match,flexible"})
    with pytest.raises(UserError, match=r"metrics\.gsm8k=.*did you mean 'exact_match,flexible-"):
        scorer(world, wrong).tasks(["gsm8k"])
