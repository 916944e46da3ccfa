"""What learns to write texts of a label: ReFT-r1's vector, or any method on few rows.

B batch, S sequence, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerlora.config import TrainerConfig
from steerlora.data.batches import ChatBatch, collate
from steerlora.data.chat import EncodedChat
from steerlora.lm.decoder import decoder_of, edited
from steerlora.lm.signal_tokens import SignalTokens
from steerlora.methods.base import Method
from steerlora.methods.module import scheduled_adamw
from steerlora.training.language import next_token_loss

EPOCHS, BATCH, RATE, TOP, PENALTY = 3, 6, 0.01, 8, 0.005
"""AxBench's settings of ReFT-r1."""


def drawn_batches(
    rows: Sequence[EncodedChat], size: int, steps: int, pad_token_id: int, seed: int
) -> Iterator[ChatBatch]:
    """Batches of rows: each row once an epoch, in a new order."""
    generator, left = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        while len(left) < size:
            left += torch.randperm(len(rows), generator=generator).tolist()
        taken, left = left[:size], left[size:]
        yield collate([rows[index] for index in taken], [-1] * size, pad_token_id)


def reft_vector(
    model: nn.Module,
    site: int,
    rule: SignalTokens,
    rows: Sequence[EncodedChat],
    pad_token_id: int,
    seed: int,
) -> Tensor:
    """The unit vector v [D] of ReFT-r1 (arXiv 2501.17148), learnt on the answers of some rows.

    In training x becomes x + mean(TopK(ReLU(x v))) v on every token that carries a signal, and what
    is not among the largest is held down. As published v gets its unit length before the
    optimizer's step and leaves the sphere by it; here it gets it after.
    """
    device = next(model.parameters()).device
    width = decoder_of(model).config.hidden_size
    v = F.normalize(torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0)
    v = v.to(device).requires_grad_()
    steps = max(1, EPOCHS * len(rows) // BATCH)
    optimizer = torch.optim.AdamW([v], lr=RATE, weight_decay=0.0)
    for step, batch in enumerate(drawn_batches(rows, BATCH, steps, pad_token_id, seed)):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        batch = batch.to(device)
        others: list[Tensor] = []
        where = rule(batch.input_ids, batch.attention_mask)
        with edited(model, {site: partial(_represented, v, where, others)}):
            loss = next_token_loss(model, batch)
        loss = loss + step / steps * PENALTY * others[0]
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            v.grad -= (v.grad @ v) * v
        nn.utils.clip_grad_norm_([v], 1.0)
        optimizer.step()
        with torch.no_grad():
            v /= v.norm()
    return v.detach().cpu()


def _represented(v: Tensor, where: Tensor, others: list[Tensor], stream: Tensor) -> Tensor:
    """The stream [B, S, D] with each row's mean of its largest latents along v.

    Args:
        where: [B, S], tokens that count.
        others: gets the mean of the latents that are not among the largest.
    """
    latent = (stream @ v.to(stream)).relu() * where
    top = latent.topk(min(TOP, latent.shape[1]), 1).values
    left = (where.sum(1) - top.shape[1]).clamp_min(1)
    others.append(((latent.sum(1) - top.sum(1)) / left).mean())
    return stream + where[..., None] * top.mean(1)[:, None, None] * v.to(stream)


def learn(
    method: Method,
    rows: Sequence[EncodedChat],
    trainer: TrainerConfig,
    pad_token_id: int,
    seed: int,
) -> None:
    """Train an attached method on the answers of some rows, by ``trainer``'s settings of AdamW."""
    parameters = [own for own in method.parameters() if own.requires_grad]
    trainer = replace(trainer, batch_size=min(trainer.batch_size, len(rows)))
    steps = trainer.max_steps
    (optimizer,), (schedule,) = scheduled_adamw(parameters, trainer, steps)
    device = next(method.model.parameters()).device
    for batch in drawn_batches(rows, trainer.batch_size, steps, pad_token_id, seed):
        loss = next_token_loss(method.model, batch.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, trainer.gradient_clip)
        optimizer.step()
        schedule["scheduler"].step()
