"""Recomputed activations and compiled layers: the same training, and nothing left behind."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import trainings
from safetensors.torch import load_file
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from steerlora.lm.decoder import layers_of
from steerlora.training import execution

LAYERS = 3


def weights(folder: Path, **options) -> dict[str, torch.Tensor]:
    trainings.adapter_training(folder, trainings.settings(**options))
    return load_file(folder / "state.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, torch.Tensor]:
    return weights(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def models(monkeypatch) -> list:
    """Every model that trains."""
    found, start = [], execution.LayerExecution.on_train_start

    def noted(self, trainer, module):
        start(self, trainer, module)
        found.append(module.model)

    monkeypatch.setattr(execution.LayerExecution, "on_train_start", noted)
    return found


def test_recomputing_activations_changes_no_bit(plain, models, tmp_path, monkeypatch):
    runs = []
    forward = Qwen3MLP.forward

    def counted(self, x):
        runs.append(torch.is_grad_enabled())
        return forward(self, x)

    monkeypatch.setattr(Qwen3MLP, "forward", counted)
    weights(tmp_path / "kept")
    once = len(runs)
    found = weights(tmp_path / "again", activation_checkpointing=True)
    assert all(torch.equal(found[name], value) for name, value in plain.items())
    # Each step runs the adapted layers, all but the first, once more.
    assert len(runs) - once == once + trainings.STEPS * (LAYERS - 1)
    assert models[-1].is_gradient_checkpointing is False  # given back as it was


def test_compiled_layers_train_alike(plain, models, tmp_path, monkeypatch):
    """By a backend that generates no code: what is tested is what is compiled, and that it runs."""
    compiled = []
    original = torch.compile

    def eager(function, **kwargs):
        compiled.append(kwargs)
        return original(function, backend="eager", **kwargs)

    monkeypatch.setattr(torch, "compile", eager)
    found = weights(tmp_path, compile=True)
    assert compiled == [{"dynamic": True}] * LAYERS
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    for name, value in plain.items():
        close(found[name], value, msg=name)
    assert all(layer._compiled_call_impl is None for layer in layers_of(models[0]))


def test_neither_is_on_unasked(models, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    monkeypatch.setattr(
        "transformers.PreTrainedModel.gradient_checkpointing_enable",
        lambda *_: pytest.fail("recomputed"),
    )
    weights(tmp_path)
    assert models
