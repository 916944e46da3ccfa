"""Several SAEs in one training against each in its own, and its resumption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steerlora.config import TrainerConfig
from steerlora.engine.progress import SilentProgress
from steerlora.saes.jumprelu import JumpReLU
from steerlora.saes.several import SeveralSAEs
from steerlora.saes.skip_transcoder import SkipTranscoder
from steerlora.saes.topk import TopK
from steerlora.saes.training import SAEModule
from steerlora.stages.sae_held_out import HeldOut
from steerlora.training.loop import fit

WIDTH, TOKENS, STEPS = 8, 32, 20
COLUMNS = [slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 5)]


def batch(step: int) -> Tensor:
    """[T, 5, D]."""
    return 3 + torch.randn(TOKENS, 5, WIDTH, generator=torch.Generator().manual_seed(step))


def parts() -> list[SAEModule]:
    """Unlike in architecture, size, rate and memory; the first has gradients that are clipped."""
    return [
        SAEModule(TopK(WIDTH, 32, k=2, seed=1), total_steps=STEPS, lr=1e-2),
        SAEModule(TopK(WIDTH, 16, k=4), total_steps=STEPS, lr=1e-3, adam_beta2=0.9),
        SAEModule(SkipTranscoder(WIDTH, 32, k=4, span=1), total_steps=STEPS, lr=1e-3),
        SAEModule(JumpReLU(WIDTH, 16), total_steps=STEPS, lr=1e-3, warmup_steps=5),
    ]


def train(module, batches: Callable, folder: Path, *callbacks) -> None:
    fit(
        module,
        batches,
        STEPS,
        trainer=TrainerConfig(gradient_clip=0.05, checkpoint_seconds=1e-9),
        checkpoints=folder,
        progress=SilentProgress(),
        description="several",
        callbacks=callbacks,
    )


def weights(module: SAEModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> tuple[SeveralSAEs, HeldOut]:
    module = SeveralSAEs(parts(), COLUMNS)
    watch = HeldOut(batch(99)[:, 1], STEPS, 1)
    train(module, batch, tmp_path_factory.mktemp("together"), watch)
    return module, watch


@pytest.mark.parametrize("number", range(4))
def test_each_comes_out_as_it_would_alone(together, number, tmp_path):
    module, watch = together
    alone, columns = parts()[number], COLUMNS[number]
    own = HeldOut(batch(99)[:, 1], STEPS)

    def rows(step: int) -> Tensor:
        found = batch(step)[:, columns]
        return found if found.shape[1] > 1 else found[:, 0]

    train(alone, rows, tmp_path, *([own] if number == 1 else []))
    ours, theirs = weights(module.parts[number]), weights(alone)
    before = weights(parts()[number])
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert not torch.equal(ours["sae.W_dec"], before["sae.W_dec"])
    if number == 1:
        assert [entry["step"] for entry in watch.history] == [10, 20]
        assert watch.history == own.history


def test_a_resumed_training_of_several_is_the_unbroken_one(together, tmp_path):
    class Stop(Exception):
        pass

    def broken(step: int) -> Tensor:
        if step == 13:
            raise Stop
        return batch(step)

    watches = [HeldOut(batch(99)[:, number], STEPS, number) for number in (0, 1)]
    with pytest.raises(Stop):
        train(SeveralSAEs(parts(), COLUMNS), broken, tmp_path, *watches)
    again, seen = SeveralSAEs(parts(), COLUMNS), []
    watches = [HeldOut(batch(99)[:, number], STEPS, number) for number in (0, 1)]
    train(again, lambda step: seen.append(step) or batch(step), tmp_path, *watches)
    assert 10 <= seen[0] <= 13
    for number, part in enumerate(together[0].parts):
        for name, value in weights(part).items():
            assert torch.equal(weights(again.parts[number])[name], value), (number, name)
    assert watches[1].history == together[1].history
    assert watches[0].history != watches[1].history


def test_unlike_lengths_are_no_one_training():
    short = SAEModule(TopK(WIDTH, 16, k=4), total_steps=3)
    with pytest.raises(AssertionError, match="unlike length"):
        SeveralSAEs([*parts(), short], [*COLUMNS, slice(0, 1)])
