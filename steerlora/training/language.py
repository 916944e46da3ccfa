"""Language-model training: next-token loss on the positions that count, and the base's pretraining.

B batch, S sequence, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerlora.data.batches import IGNORED, ChatBatch
from steerlora.lm.decoder import hidden_states, layers_of
from steerlora.lm.divergence import output_logits
from steerlora.lm.flops import pretraining_flops_per_token
from steerlora.lm.shapes import DecoderShape
from steerlora.training.loop import begins_step
from steerlora.training.muon import Muon


def next_token_loss(model: nn.Module, batch: ChatBatch) -> Tensor:
    """Mean cross-entropy in nats of the labelled tokens, weighted where the batch has weights.

    Of a part of a batch it is multiplied by the part's share of those tokens. The output head runs
    on labelled positions only: with V in the hundred thousands it is most of the memory.
    """
    hidden = hidden_states(model, batch.input_ids, batch.attention_mask, batch.position_ids)
    targets = batch.labels[:, 1:]
    counted = targets != IGNORED
    if not batch.shares.labelled:  # a part may have nothing to learn from, and still takes part
        return hidden.sum() * 0
    logits = output_logits(model, hidden[:, :-1][counted])
    if batch.weights is None:
        return F.cross_entropy(logits, targets[counted]) * batch.shares.labelled
    weights = batch.weights[:, 1:][counted]
    losses = F.cross_entropy(logits, targets[counted], reduction="none")
    return (losses * weights).sum() / weights.sum() * batch.shares.labelled


class Text(NamedTuple):
    """What a batch's text costs: its mean length, and the share of its tokens that have labels."""

    length: float
    labelled: float

    @classmethod
    def of(cls, batch: ChatBatch) -> Text:
        # Packed conversations attend to themselves alone.
        rows = len(batch.input_ids)
        if batch.position_ids is not None:
            rows = max(rows, int((batch.position_ids == 0).sum()))
        real = int(batch.attention_mask.sum())
        return cls(real / rows, int((batch.labels != IGNORED).sum()) / max(real, 1))


WARM_UP = 30
"""Steps over which the rates of pretraining rise."""
EVERY = 25
"""Steps between two looks at the held-out text."""
PATIENCE = 3
"""Looks in a row without progress after which the rates fall."""


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[ChatBatch]) -> float:
    """Mean cross-entropy in nats over the labelled tokens of all batches."""
    training = model.training
    model.eval()
    nats = tokens = 0.0
    for batch in batches:
        count = int((batch.labels[:, 1:] != IGNORED).sum())
        batch = batch.to(next(model.parameters()).device)
        nats, tokens = nats + float(next_token_loss(model, batch)) * count, tokens + count
    model.train(training)
    return nats / max(tokens, 1)


class PretrainingModule(L.LightningModule):
    """A whole model on documents, for as long as its loss on held-out ones falls: Muon for the
    matrices of its layers, AdamW for the rest.

    After a short rise the rates stay until the held-out loss has come down to a given level, or no
    longer falls, and then go to zero over half as many steps again: the trapezoid of Hägele et al.
    2024 (arXiv 2405.18392), with its length found on the way.

    Args:
        model: every weight trains.
        matrix_learning_rate: Muon's peak.
        learning_rate: AdamW's peak, for embeddings and norms.
        held_out: text that does not train; labels where its loss counts.
        target_loss: level of the held-out loss, in nats a token; 0: there is none to reach.
        tolerance: share by which the held-out loss must fall below its lowest so far to be
            progress.
        most_steps: after two thirds of which the rates fall in any case.

    Attributes:
        converged: whether the held-out loss was at its level, or had stopped falling, before the
            rates fell.
        held_out_loss: at the last look or the end, in nats a token; NaN before.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        matrix_learning_rate: float,
        learning_rate: float,
        held_out: Sequence[ChatBatch],
        target_loss: float,
        tolerance: float,
        most_steps: int,
    ) -> None:
        super().__init__()
        self.model, self.held_out = model, held_out
        self.target_loss, self.tolerance = target_loss, tolerance
        self.rates, self.most_steps = (matrix_learning_rate, learning_rate), most_steps
        self.converged, self.held_out_loss = False, math.nan
        self._lowest, self._in_vain = math.inf, 0
        self._held: int | None = None  # steps before the rates fall, once that is known

    def on_train_batch_start(self, batch: ChatBatch, batch_idx: int) -> int | None:
        """Look at the held-out text and set the rates, before a step; -1 ends the training.

        Before a step and not after the last one: a training that resumes from a checkpoint begins
        with the look that the unbroken one had there.
        """
        if not begins_step(self.trainer, batch_idx):
            return None
        done = self.global_step
        if done and done % EVERY == 0:
            self._look()
        if self._held is None:
            self.converged = self._in_vain >= PATIENCE or self.held_out_loss <= self.target_loss
            if self.converged or done >= 2 * self.most_steps // 3:
                self._held = done
        factor = min(1.0, (done + 1) / WARM_UP)
        if self._held is not None:
            fall = max(1, self._held // 2)
            if done >= self._held + fall:
                self.trainer.should_stop = True
                return -1
            factor = min(factor, 1 - (done - self._held) / fall)
        for group, peak in zip(self.optimizers().param_groups, self.rates, strict=True):
            group["lr"] = peak * factor
        return None

    def _look(self) -> None:
        self.held_out_loss = mean_loss(self.model, self.held_out)
        self.log("heldout/loss", self.held_out_loss)
        self._in_vain += 1
        if self.held_out_loss < self._lowest * (1 - self.tolerance):
            self._lowest, self._in_vain = self.held_out_loss, 0

    def on_train_end(self) -> None:
        self.held_out_loss = mean_loss(self.model, self.held_out)

    def training_step(self, batch: ChatBatch, index: int) -> Tensor:
        loss = next_token_loss(self.model, batch)
        self.log("train/loss", loss, sync_dist=True)
        return loss

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["looks"] = [self._lowest, self._in_vain, self._held, self.converged]

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self._lowest, self._in_vain, self._held, self.converged = checkpoint["looks"]

    def flops_per_token(self, batch: ChatBatch) -> float:
        """Floating-point operations, forward and backward; 0: unknown."""
        shape = DecoderShape.complete(self.model.config)
        return pretraining_flops_per_token(shape, Text.of(batch).length) if shape else 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        hidden = {id(p) for p in layers_of(self.model).parameters() if p.dim() == 2}
        matrices = [p for p in self.model.parameters() if id(p) in hidden]
        others = [p for p in self.model.parameters() if id(p) not in hidden]
        matrix_rate, rate = self.rates
        return Muon(matrices, others, matrix_lr=matrix_rate, lr=rate)
