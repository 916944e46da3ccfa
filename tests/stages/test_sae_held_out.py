"""What is measured on held-out activations in training is so of the SAE as it then is."""

from __future__ import annotations

import math

import pytest
import torch

from steerlora.config import TrainerConfig
from steerlora.engine.progress import SilentProgress
from steerlora.saes.batch_topk import BatchTopK
from steerlora.saes.metrics import sae_metrics
from steerlora.saes.topk import TopK
from steerlora.saes.training import SAEModule
from steerlora.stages.sae_held_out import HeldOut, buffer_of
from steerlora.training.loop import fit

WIDTH, LATENTS, STEPS, BATCH = 8, 32, 20, 16


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def trained(architecture: type, folder, callbacks, steps: int = STEPS):
    sae = architecture(WIDTH, LATENTS, k=4)
    fit(
        SAEModule(sae, total_steps=STEPS, lr=1e-2),
        lambda step: rows(BATCH, step),
        steps,
        trainer=TrainerConfig(accelerator="cpu", precision="32-true", checkpoint_seconds=1e9),
        checkpoints=folder,
        progress=SilentProgress(),
        description="sae",
        callbacks=callbacks,
    )
    return sae


@pytest.mark.parametrize("architecture", [TopK, BatchTopK])
def test_the_last_look_is_of_the_sae_that_comes_out(architecture, tmp_path):
    watch = HeldOut(buffer := rows(50, 99), STEPS)
    sae = trained(architecture, tmp_path, [watch])
    assert [entry["step"] for entry in watch.history] == [10, 20]
    assert [entry["tokens"] for entry in watch.history] == [10 * BATCH, 20 * BATCH]
    found = {k: v for k, v in watch.history[-1].items() if k not in ("step", "tokens")}
    assert found == pytest.approx(sae_metrics(sae.eval().for_inference(), buffer))


@pytest.mark.parametrize("architecture", [TopK, BatchTopK])
def test_looking_changes_nothing(architecture, tmp_path):
    seen = trained(architecture, tmp_path / "a", [HeldOut(rows(50, 99), STEPS)])
    alone = trained(architecture, tmp_path / "b", [])
    assert all(torch.equal(seen.state_dict()[k], v) for k, v in alone.state_dict().items())
    assert seen.training == alone.training


def test_a_rank_without_a_buffer_measures_nothing(tmp_path):
    watch = HeldOut(None, STEPS)
    trained(TopK, tmp_path, [watch])
    assert watch.history == []


def test_the_history_of_before_an_interruption_is_kept():
    before, after = HeldOut(None, STEPS), HeldOut(None, STEPS)
    before.history.append({"step": 10, "fvu": 0.5})
    after.load_state_dict(before.state_dict())
    assert after.history == before.history


@pytest.mark.parametrize(("given", "tokens"), [(7, 10), (10, 10), (11, 10), (25, 10), (1000, 64)])
def test_a_buffer_is_spread_over_the_text_and_no_larger_than_asked(given, tokens):
    found = buffer_of(torch.arange(given), tokens)
    assert len(found) <= tokens
    assert len(set(found.diff().tolist())) <= 1
    assert math.isclose(int(found[-1]), given - 1, abs_tol=math.ceil(given / tokens))
