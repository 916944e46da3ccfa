"""What a sequence of domains keeps: adapters that load, and where it goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import steerlora
from steerlora.engine.artifacts import Artifact, ArtifactStore
from steerlora.engine.run import run
from steerlora.errors import UserError
from steerlora.evaluation.records import DomainSequence, read_record
from steerlora.evaluation.scoring import Scorer
from steerlora.stages import common, sequential_forgetting
from steerlora.stages.common import load_base
from steerlora.stages.sequence import SequenceScorer
from steerlora.stages.sequence_state import FOLDER

MEMORY = (
    "method=sc_lora",
    "method.active=2",
    "method.memory.enabled=true",
    "method.memory.every=1",
    "method.memory.spawn_confidence=1",
    "method.memory.spawn_similarity=1",
    "method.replay.ratio=0.5",
    "method.optimizer.over_domains=true",
    "order.steps_per_domain=2",
)
FIRST = ("instruction", "math", "code")


@pytest.fixture
def make_store(smoke, tmp_path):
    """``make_store("a")``: the experiment's artifacts, to add to."""
    return lambda name: ArtifactStore(shutil.copytree(smoke.root, tmp_path / name))


@pytest.fixture
def trainings(monkeypatch) -> list[str]:
    """What has trained since, by description."""
    found, original = [], common.fit

    def fit(*args, **kwargs):
        found.append(kwargs["description"])
        return original(*args, **kwargs)

    monkeypatch.setattr(common, "fit", fit)
    return found


def given(smoke, domains, *changes: str):
    order = ("order=given", f"order.sequence=[{','.join(domains)}]")
    return sequential_forgetting.step(smoke.config(*order, *changes))


def record_of(artifact: Artifact) -> DomainSequence:
    return read_record(artifact / sequential_forgetting.RESULT, DomainSequence)


def adapters(artifact: Artifact) -> list[Path]:
    return sorted((artifact / FOLDER).iterdir())


@pytest.mark.parametrize("method", ["lora", "sc_lora", "sc_lora_context", "inf_lora"])
def test_the_adapter_after_every_domain_loads_and_scores_as_it_did(method, smoke, make_store):
    step = given(smoke, FIRST, f"method={method}", "method.replay.ratio=0")
    report = run([step], make_store("a"))
    record, folders = record_of(report[step]), adapters(report[step])
    assert [folder.name for folder in folders] == ["0_instruction", "1_math", "2_code"]
    for row, folder in zip(record.matrix[1:], folders, strict=True):
        model, tokenizer = load_base(report[step.inputs["base"]])
        steerlora.load_adapter(model, folder)
        domains = report[step.inputs["domains"]]
        scorer = Scorer(domains, model, tokenizer, step.config.evaluation)
        assert [score.value for score in scorer.targets().values()] == row


def test_a_sequence_that_has_grown_goes_on_from_where_it_ended(smoke, make_store, trainings):
    """And comes to what one comes to that was trained in one go."""
    store, whole = make_store("a"), given(smoke, FIRST, *MEMORY)
    expected = run([whole], make_store("b"))[whole]
    run([given(smoke, FIRST[:1], *MEMORY)], store)
    run([given(smoke, FIRST[:2], *MEMORY)], store)
    trainings.clear()
    grown = run([given(smoke, FIRST, *MEMORY)], store)[whole]
    assert [description.split(": ")[1] for description in trainings] == ["code (3/3)"]
    assert record_of(grown) == record_of(expected)
    for found, wanted in zip(adapters(grown), adapters(expected), strict=True):
        assert found.name == wanted.name
        for name in ("adapter_model.safetensors", "state.safetensors"):
            found_tensors, tensors = load_file(found / name), load_file(wanted / name)
            assert found_tensors.keys() == tensors.keys()
            assert all(torch.equal(found_tensors[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    "changes",
    [("seed=3",), ("method.rank=3",), ("order.steps_per_domain=2",), ("model.seed=3",)],
)
def test_of_another_sequence_nothing_is_taken_over(changes, smoke, make_store, trainings):
    store, plain = make_store("a"), ("method=lora", "method.replay.ratio=0")
    run([given(smoke, FIRST[:1], *plain)], store)
    trainings.clear()
    run([given(smoke, FIRST[:2], *plain, *changes)], store)
    domains = [text for text in trainings if text.startswith("sequential_forgetting")]
    assert len(domains) == 2  # another base is trained as well


def test_other_first_domains_are_another_sequence(smoke):
    grown = given(smoke, ("math", "instruction", "code"))
    assert given(smoke, FIRST[:2]).fingerprint not in {one.fingerprint for one in grown.earlier}
    assert [one.config.sequence for one in grown.earlier] == [("math", "instruction"), ("math",)]


def test_what_was_trained_is_only_scored_after_an_interrupt_in_scoring(
    smoke, make_store, trainings, monkeypatch
):
    store, step = make_store("a"), given(smoke, FIRST[:2], *MEMORY)
    expected = record_of(run([step], make_store("b"))[step])
    original, calls = SequenceScorer.targets, []

    def targets(self):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(SequenceScorer, "targets", targets)
    trainings.clear()
    with pytest.raises(KeyboardInterrupt):
        run([step], store)
    assert record_of(run([step], store)[step]) == expected
    assert len(trainings) == 2


def test_a_damaged_adapter_of_an_interrupted_sequence_is_trained_again(
    smoke, make_store, trainings, monkeypatch
):
    store, step = make_store("a"), given(smoke, FIRST[:2], "method=lora")
    expected = record_of(run([step], make_store("b"))[step])

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SequenceScorer, "drift", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run([step], store)
    (weights,) = store.root.glob("*/*.partial/adapters/0_instruction/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    trainings.clear()
    assert record_of(run([step], store)[step]) == expected
    assert len(trainings) == 2


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ("[]", r"name some of instruction, math, .*, each once"),
        ("[law,history]", r"name some of instruction, math, .*, each once"),
        ("[law,law]", r"\['law', 'law'\]: give each once"),
    ],
)
def test_a_sequence_names_domains_that_there_are_each_once(sequence, message, smoke):
    with pytest.raises(UserError, match=message):
        smoke.config("order=given", f"order.sequence={sequence}")
