"""Language-model training: next-token loss on the positions that count, and the base's pretraining.

B batch, S sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerlora.data.chat import IGNORED, ChatBatch
from steerlora.lm.decoder import hidden_states
from steerlora.lm.flops import pretraining_flops_per_token
from steerlora.lm.shapes import DecoderShape
from steerlora.training.loop import rise_hold_fall


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
    logits = model.get_output_embeddings()(hidden[:, :-1][counted])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
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


class PretrainingModule(L.LightningModule):
    """A whole model on documents: AdamW, warm-up over 5 %, decay over the last half.

    Args:
        model: every weight trains.
        learning_rate: peak.
        total_steps: length of the schedule.
    """

    def __init__(self, model: nn.Module, *, learning_rate: float, total_steps: int) -> None:
        super().__init__()
        self.model = model
        self.learning_rate, self.total_steps = learning_rate, total_steps

    def training_step(self, batch: ChatBatch, index: int) -> Tensor:
        loss = next_token_loss(self.model, batch)
        self.log("train/loss", loss, sync_dist=True)
        return loss

    def flops_per_token(self, batch: ChatBatch) -> float:
        """Floating-point operations, forward and backward; 0: unknown."""
        shape = DecoderShape.complete(self.model.config)
        return pretraining_flops_per_token(shape, Text.of(batch).length) if shape else 0.0

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=self.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=True,
        )
        total = self.total_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rise_hold_fall(step, total, total // 20, total // 2)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]
