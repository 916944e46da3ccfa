"""What trainings at small shapes really take, by the same count of live storages. All on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from steerlora.config import Config
from steerlora.data import harvest
from steerlora.data.batches import ChatBatch
from steerlora.engine.progress import SilentProgress
from steerlora.lm.signal_tokens import ALL_TOKENS
from steerlora.planning.building import (
    Built,
    base_model,
    batch_of,
    build_for_planning,
    training_batch,
)
from steerlora.planning.live import LiveMemory
from steerlora.saes.end_to_end.training import EndToEndModule
from steerlora.saes.training import SAEModule
from steerlora.stages.method_training import around
from steerlora.training.loop import fit

STEPS = 2  # the second has the optimizer's moments from its beginning


class Measured(NamedTuple):
    """Bytes of a training.

    Attributes:
        peak: the most.
        fixed: before the first step: of the base, what trains, SAEs and prototypes.
        kept: what the last step's backward found, besides these, the gradients and the optimizer.
        optimizer: its moments.
    """

    peak: int
    fixed: int
    kept: int
    optimizer: int


class Watched(LiveMemory):
    """Attributes: most: bytes at the peak of all."""

    most = 0

    def _look(self) -> None:
        self.most = max(self.most, self.now.total())


class AtBackward(Callback):
    """How much there is when a backward begins: the last step's."""

    def __init__(self, live: LiveMemory) -> None:
        self.live, self.found = live, 0

    def on_before_backward(self, trainer, module, loss) -> None:
        self.found = self.live.now.total()


@pytest.fixture
def measured_adapter_training(tmp_path: Path) -> Callable[[Config], Measured]:
    """Two steps of the configured training, every tensor followed."""

    def measure(config: Config) -> Measured:
        with Watched() as live:
            method = built(config)
            fixed, at_backward = live.now.total(), AtBackward(live)
            live.most = 0  # building has transients of its own
            train(method, config, tmp_path, at_backward)
        trained = sum(p.nbytes for p in method.module.parameters() if p.requires_grad)
        return Measured(live.most, fixed, at_backward.found - fixed - 2 * trained, 2 * trained)

    return measure


def train(method: Built, config: Config, directory: Path, *callbacks: Callback) -> None:
    """Two steps on the planned text, and what happens around them."""
    learner, task = method.learner, method.task
    hooks = around(lambda: learner.begin(task), lambda: learner.end(task))
    fit(
        method.module,
        _Same(training_batch(config, config.trainer.batch_size)),
        STEPS,
        trainer=config.trainer,
        checkpoints=directory / "checkpoints",
        progress=SilentProgress(),
        description="",
        callbacks=[*learner.callbacks(task), hooks, *callbacks],
    )


class _Same:
    """One batch for every step, in parts where there are several."""

    def __init__(self, batch: ChatBatch) -> None:
        self.batch = batch

    def __call__(self, step: int) -> ChatBatch:
        return self.batch

    def part(self, step: int, index: int, parts: int) -> ChatBatch:
        return self.batch.part(index, parts)


def built(config: Config) -> Built:
    """A random model in the type it computes in, with the configured method attached."""
    return build_for_planning(config, _base(config))


def _base(config: Config) -> torch.nn.Module:
    half = "bf16" in config.trainer.precision
    return base_model(config, torch.bfloat16 if half else torch.float32)


@pytest.fixture
def measured_sae_training(tmp_path: Path) -> Callable[..., int]:
    """``measured_sae_training(config, far=True)``: the peak of two steps on random activations, in
    bytes; one of them ``far`` from the others, which then has a large share of all latents."""

    def measure(config: Config, far: bool = True) -> int:
        with Watched() as live:
            sae = config.sae.build(config.model.width)
            streams = [2] if sae.span else []
            batch = torch.randn(config.sae.batch_size, *streams, config.model.width)
            batch[0] *= 100 if far else 1
            sae.initialize_thresholds(batch)
            live.most = 0
            fit(
                SAEModule(sae, total_steps=STEPS),
                lambda step: batch,
                STEPS,
                trainer=config.trainer,
                checkpoints=tmp_path / "checkpoints",
                progress=SilentProgress(),
                description="",
            )
        return live.most

    return measure


@pytest.fixture
def measured_end_to_end(tmp_path: Path) -> Callable[[Config, int], int]:
    """``measured_end_to_end(config, site)``: the peak of two steps, in bytes."""

    def measure(config: Config, site: int) -> int:
        own = config.sae.end_to_end
        with Watched() as live:
            model, sae = _base(config), config.sae.build(config.model.width)
            live.most = 0
            settings = {"replaced": ALL_TOKENS, "mse_weight": own.mse_weight, "total_steps": STEPS}
            batch = batch_of(config, own.batch_size)
            batch.input_ids.random_(
                config.model.vocabulary
            )  # streams that are all alike have no FVU
            fit(
                EndToEndModule(sae, model, site, **settings),
                _Same(batch),
                STEPS,
                trainer=replace(config.trainer, precision="32-true", accumulate=1),
                checkpoints=tmp_path / "checkpoints",
                progress=SilentProgress(),
                description="",
            )
        return live.most

    return measure


@pytest.fixture
def measured_harvest(tmp_path: Path, monkeypatch) -> Callable[..., int]:
    """``measured_harvest(config, sites, rows)``: the peak of two batches, in bytes."""

    def measure(config: Config, sites: tuple[int, ...], rows: int) -> int:
        with Watched() as live:
            model, batch = _base(config), batch_of(config, rows)
            # What is to be written lies in the CPU's memory, which is not the device's.
            monkeypatch.setattr(harvest._ShardWriter, "add", lambda writer, streams: None)
            batches = [(batch.input_ids, batch.attention_mask)] * 2
            harvest.harvest(model, batches, {site: tmp_path / str(site) for site in sites})
        return live.most

    return measure
