"""How units train: by the next token's loss, with gates that follow what they have seen.

M units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from steerlora.data.batches import ChatBatch
from steerlora.distributed.reductions import sum_over_ranks, world
from steerlora.methods.base import Learner, Task
from steerlora.methods.stan.adapter import Stan
from steerlora.methods.stan.gates import most_active

LATEST = 0.1
"""Share that the last batch has in a threshold; the batches before it have the rest."""


class FollowGate(Callback):
    """Tells the adapter each step, and sets what its gate remembers after it.

    What it sets are buffers of the adapter, so a training that resumes has them.

    Args:
        method: what trains.
    """

    def __init__(self, method: Stan) -> None:
        self.method = method

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: ChatBatch, batch_idx: int
    ) -> None:
        self.method.begin_step(trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: ChatBatch,
        batch_idx: int,
    ) -> None:
        noted = self.method.forward_state.noted
        for name, value in zip(noted, sum_over_ranks(noted.values()), strict=True):
            units = self.method.layers[name]
            if self.method.config.gate == "threshold":
                share = LATEST if units.threshold.any() else 1.0
                units.threshold.lerp_(value.to(units.threshold) / world(), share)
            elif units.kept.all():
                units.fired += value
                if trainer.global_step >= self.method.config.chosen_after * trainer.max_steps:
                    units.kept.copy_(most_active(units.fired, self.method.config.k))


@dataclass(kw_only=True)
class StanLearner(Learner):
    """Trains a `Stan`."""

    method: Stan

    def callbacks(self, task: Task) -> list[Callback]:
        return [FollowGate(self.method)] if self.method.config.gate != "token" else []
