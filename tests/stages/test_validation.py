"""Adapters whose training is followed on conversations that are set aside, by configuration."""

from __future__ import annotations

import json

import pytest
from helpers.experiments import TINY
from helpers.offline import read_runs

from steerlora.cli import compose
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.run import run
from steerlora.stages import adapter_training, sequential_forgetting

FOLLOWED = (
    "trainer.validation.rows=4",
    "trainer.validation.every_steps=1",
    "trainer.validation.keep_best=true",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("followed"))


@pytest.mark.slow
def test_a_training_says_how_it_did_and_logs_it(store, tmp_path):
    """Under a control that has to know every row's domain."""
    words = [text for text in TINY if text != "logger=none"]
    under = ("method=sc_lora", "intervention=oracle_domain", "intervention.phase=training")
    config = compose.load([*words, *FOLLOWED, *under, f"logger.dir={tmp_path}"])
    step = adapter_training.step(config)
    artifact = run([step], store)[step]
    history = json.loads((artifact / adapter_training.HISTORY).read_text())["validation"]
    assert [one["step"] for one in history] == [0, 1, 2]
    assert all(set(one["domains"]) == set(config.domains.names) for one in history)
    losses = [one["loss"] for one in history]
    summary = artifact.manifest["summary"]
    assert summary["validation_loss_before"] == losses[0]
    assert summary["validation_loss"] == min(losses)
    assert history[summary["validation_step"]]["loss"] == min(losses)
    assert summary["steps"] == 2
    (logged,) = [one for one in read_runs(tmp_path) if one.stage == "adapter_training"]
    found = [row for row in logged.history if "validation/loss" in row]
    assert [row["step"] for row in found] == [0, 1, 2]
    assert [row["validation/loss"] for row in found] == losses
    assert found[-1]["validation/loss/law"] == history[-1]["domains"]["law"]
    assert logged.axes["validation/*"] == "step"
    assert logged.summary["adapter_training/validation_loss"] == min(losses)


@pytest.mark.slow
def test_every_domain_of_a_sequence_is_followed(store, caplog):
    caplog.set_level("INFO", logger="steerlora")
    step = sequential_forgetting.step(
        compose.load([*TINY, *FOLLOWED, "method=lora", "order=given", "order.sequence=[law,math]"])
    )
    run([step], store)
    told = [text for text in caplog.messages if "validation loss" in text]
    assert len(told) == 2
    assert all("trained 1 of 1 steps" in text for text in told)
