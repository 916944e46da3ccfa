"""A method in training, without a stage around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import nn

from steerlora.config import InterventionConfig, TrainerConfig
from steerlora.engine.progress import SilentProgress
from steerlora.methods.base import Learner, Method, Task
from steerlora.methods.module import MethodModule
from steerlora.methods.monitor import Monitor
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.config import LossWeights
from steerlora.training.loop import fit


def learner_of(
    model: nn.Module,
    method: Method,
    *,
    domains: Sequence[str] = ("law", "math"),
    **settings: Any,
) -> Learner:
    """How a method trains on the text of these domains; ``settings`` as for a `Learner`."""
    given = {"pad_token_id": 0, "seed": 0, "intervention": InterventionConfig()} | settings
    return method.config.learner(method, model=model, domains=domains, **given)


def method_module(
    model: nn.Module,
    adapter: Adapter,
    *,
    trainer: TrainerConfig,
    steps: int,
    monitor: Monitor | None = None,
    in_training: Task | None = None,
    **losses: float,
) -> MethodModule:
    """An attached adapter in training.

    Args:
        model: the base model.
        adapter: attached to it.
        trainer: AdamW's settings.
        steps: length of the schedule.
        monitor: for losses that compare features.
        in_training: the task that the learner is told of; None: none.
        losses: their weights, where not the defaults.
    """
    adapter.config = replace(
        adapter.config,
        losses=LossWeights(**losses),
        monitor=monitor.layer if monitor else adapter.config.monitor,
        isolation="own" if losses.get("orthogonality") else "free",
    )
    learner = learner_of(model, adapter, monitor=monitor)
    if in_training is not None:
        learner.training(in_training)  # not entered: every specialist may change
    return MethodModule(learner, trainer=trainer, total_steps=steps)


def train(
    module: MethodModule,
    batch: Callable[[int], Any],
    directory: Path,
    steps: int,
    callbacks: Iterable[Callback] = (),
    **settings: Any,
) -> dict[str, float]:
    """The figures of a training.

    Args:
        module: what trains.
        batch: gives the batch of a step.
        directory: of its checkpoints; one that is there is resumed.
        steps: how many.
        callbacks: in this order.
        settings: of the trainer, where not the module's own.
    """
    return fit(
        module,
        batch,
        steps,
        trainer=replace(module.settings, **settings),
        checkpoints=directory,
        progress=SilentProgress(),
        description="test",
        callbacks=list(callbacks),
    )


class Stopped(Exception):
    """Of a training, by :class:`StopAt`."""


class StopAt(Callback):
    """Stops a training just before a step, from 0."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            raise Stopped
