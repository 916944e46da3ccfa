"""How an SAE does on held-out activations in the course of its training.

Shapes: T tokens, D model width.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from steerlora.distributed import ranks
from steerlora.distributed.strategies import editable
from steerlora.saes.metrics import sae_metrics
from steerlora.saes.several import SeveralSAEs
from steerlora.saes.training import SAEModule
from steerlora.training.loop import LOG_EVERY, ends_step

LOOKS = 10
"""Measurements in a training, evenly spaced; the one at its end, on more text, is another."""


def buffer_of(streams: Tensor, tokens: int) -> Tensor:
    """So many tokens at most, evenly spaced over [T, ...]."""
    return streams[:: max(1, math.ceil(len(streams) / tokens))].clone()


class HeldOut(Callback):
    """Measures reconstruction on a buffer of activations that training never reads.

    With as many tokens in the buffer as in a batch, all looks together cost less than `LOOKS` steps
    of training. Figures are logged as ``heldout/<name>``, in SAEBench's names.

    Args:
        buffer: [T, D], or [T, 2, D] for a transcoder; None on ranks that do not measure.
        steps: of the training.
        number: of the SAE in a training of several; None: it trains alone.

    Attributes:
        history: one entry a look: ``step``, optimizer steps done; ``tokens`` trained on; and every
            figure of `steerlora.saes.metrics.Reconstruction` that is a finite number.
    """

    def __init__(self, buffer: Tensor | None, steps: int, number: int | None = None) -> None:
        self.buffer, self.number = buffer, number
        self.every = LOG_EVERY * max(1, steps // (LOOKS * LOG_EVERY))
        self.history: list[dict[str, float]] = []

    @property
    def state_key(self) -> str:
        return "HeldOut" if self.number is None else f"HeldOut {self.number}"

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = state["history"]

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: SAEModule | SeveralSAEs,
        outputs: Any,
        batch: Tensor,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if not ends_step(trainer, batch_idx) or step % self.every:
            return
        alone = self.number is None
        sae = module.sae if alone else module.parts[self.number].sae
        # Every rank comes here: one alone could not gather weights that are sharded.
        with editable(trainer, list(sae.parameters())):
            if self.buffer is None:
                return
            training = sae.training
            figures = sae_metrics(sae.eval().for_inference(), self.buffer)
            sae.train(training)
        found = {name: value for name, value in figures.items() if math.isfinite(value)}
        tokens = step * len(batch) * ranks.current().world
        self.history.append({"step": step, "tokens": tokens, **found})
        prefix = "heldout" if alone else f"{self.number}/heldout"
        module.log_dict({f"{prefix}/{name}": value for name, value in found.items()})
