"""How LoRA around SAEs trains: by the divergence of the spliced model from the base.

B batch, S sequence, D model width.

    KL(p || q),  p = base(x),  q = method(x),  a mean over all real tokens

The published code sums over the tokens of a sequence instead, which makes the loss's scale that of
the context's length. Where LoRA begins at the first site, the base's forward gives both the teacher
and the stream that the SAE reads: the layers below run once, without gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from steerlora.data.batches import ChatBatch
from steerlora.distributed.shards import elements
from steerlora.lm.decoder import continued, edited, hidden_states
from steerlora.lm.divergence import kl_divergence, output_logits
from steerlora.lm.flops import distilling_flops_per_token, training_flops_per_token
from steerlora.lm.shapes import DecoderShape
from steerlora.methods.base import Learner
from steerlora.methods.spliced_lora.adapter import ADAPTER, SplicedLoRA
from steerlora.methods.spliced_lora.config import SplicedLoRAConfig
from steerlora.training.language import Text


class Below(NamedTuple):
    """What a batch's text gives whatever the weights that train are."""

    stream: Tensor
    """Enters the first site, reconstructed; [B, S, D]."""
    teacher: Tensor
    """Leaves the base's final norm; [B, S, D]."""


class Kept:
    """Both of these for rows that were seen before, up to so many tokens.

    Args:
        tokens: how many.
    """

    def __init__(self, tokens: int) -> None:
        self.room = tokens
        self._rows: dict[bytes, Below] = {}

    def find(self, batch: ChatBatch) -> Below | None:
        """Those of a batch, whose padding is zero; None where a row was not kept."""
        keys = self._keys(batch)
        if not all(key in self._rows for key in keys):
            return None
        rows, shape = [self._rows[key] for key in keys], batch.input_ids.shape
        found = []
        for parts in zip(*rows, strict=True):
            whole = parts[0].new_zeros(*shape, parts[0].shape[-1])
            for row, part in zip(whole, parts, strict=True):
                row[: len(part)] = part
            found.append(whole)
        return Below(*found)

    def keep(self, batch: ChatBatch, found: Below) -> None:
        """Those of its rows for which there is room."""
        for index, (key, mask) in enumerate(
            zip(self._keys(batch), batch.attention_mask, strict=True)
        ):
            length = int(mask.sum())
            if key not in self._rows and length <= self.room:
                self._rows[key] = Below(*(part[index, :length].clone() for part in found))
                self.room -= length

    def _keys(self, batch: ChatBatch) -> list[bytes]:
        parts = [batch.input_ids, batch.attention_mask]
        parts += [] if batch.position_ids is None else [batch.position_ids]
        whole = torch.stack(parts, -1).cpu()
        lengths = batch.attention_mask.sum(1).tolist()
        return [row[:length].numpy().tobytes() for row, length in zip(whole, lengths, strict=True)]


@dataclass(kw_only=True)
class SplicedLearner(Learner):
    """Trains a `SplicedLoRA`."""

    method: SplicedLoRA
    _kept: Kept = field(default_factory=lambda: Kept(0))

    def __post_init__(self) -> None:
        self._kept = Kept(self.config.cached_tokens)

    @property
    def config(self) -> SplicedLoRAConfig:
        return self.method.config

    def losses(self, batch: ChatBatch) -> dict[str, tuple[float, Tensor]]:
        if self.config.objective == "cross_entropy":
            return {"cross_entropy": (1.0, self._cross_entropy(batch))}
        if self.config.adapted == "all":
            teacher, student = self._teacher(batch), self._hidden(batch)
        else:
            below = self.below(batch)
            teacher, student = below.teacher, self.above(batch, below.stream)
        real = batch.attention_mask.bool()
        if self.config.teacher == "shuffled":
            if len(real) < 2:
                raise ValueError(
                    "method.teacher=shuffled takes another row of a part of a batch, and this part "
                    "has one: use fewer parts (ranks times trainer.accumulate), or a larger "
                    "trainer.batch_size"
                )
            teacher = teacher.roll(1, 0)
            real = real & real.roll(1, 0)
        kl = kl_divergence(self.model, teacher[real], student[real]) / real.sum()
        return {"kl": (1.0, kl * batch.shares.real)}

    def below(self, batch: ChatBatch) -> Below:
        """What the layers below the first site and the base's other ones give of a batch."""
        kept = self._kept.find(batch) if self.config.cached_tokens else None
        if kept is not None:
            return kept
        site, streams = self.config.sites[0], []
        with torch.no_grad():
            with edited(self.model, {site: lambda stream: streams.append(stream) or stream}):
                teacher = self._teacher(batch)
            self._begin(batch)
            found = Below(self.method.rebuilt(site, streams[0]), teacher)
        if self.config.cached_tokens:
            self._kept.keep(batch, found)
        return found

    def above(self, batch: ChatBatch, stream: Tensor) -> Tensor:
        """What leaves the final norm, [B, S, D], of the layers from the first site on."""
        self._begin(batch)
        self.method.forward_state.begun = True
        site = self.config.sites[0]
        inputs: dict[str, Any] = {"attention_mask": batch.attention_mask}
        if batch.position_ids is not None:  # packed: see `hidden_states`
            inputs = {"attention_mask": None, "position_ids": batch.position_ids}
        stream = self.method.mapped(site, stream)
        return continued(self.model, stream, site, None, **inputs)

    def _begin(self, batch: ChatBatch) -> None:
        """A forward that is made in parts begins: the decoder itself does not tell the method."""
        packed = batch.position_ids is not None
        given = {
            "input_ids": batch.input_ids,
            "attention_mask": None if packed else batch.attention_mask,
            "position_ids": batch.position_ids,
        }
        self.method.observe(self.model, given)

    def _hidden(self, batch: ChatBatch) -> Tensor:
        return hidden_states(self.model, batch.input_ids, batch.attention_mask, batch.position_ids)

    def _teacher(self, batch: ChatBatch) -> Tensor:
        with torch.no_grad(), self.method.disabled():
            return self._hidden(batch)

    def _cross_entropy(self, batch: ChatBatch) -> Tensor:
        """Of every next token, the streams left as they are; over the number of real tokens."""
        with self.method.only(ADAPTER):
            hidden = self._hidden(batch)
        real = batch.attention_mask.bool()
        counted = real[:, :-1] & real[:, 1:]
        if batch.position_ids is not None:
            counted &= batch.position_ids[:, 1:] > 0
        logits = output_logits(self.model, hidden[:, :-1][counted])
        nats = F.cross_entropy(logits, batch.input_ids[:, 1:][counted], reduction="sum")
        return nats / real.sum() * batch.shares.real

    def flops_per_token(self, shape: DecoderShape, text: Text) -> float:
        method, config = self.method, self.config
        counts = {
            "adapter_parameters": sum(map(elements, method.products())),
            "first_adapted_layer": method.first_layer,
            "sequence": text.length,
        }
        if config.objective == "cross_entropy":
            return training_flops_per_token(shape, **counts)
        return distilling_flops_per_token(
            shape,
            begins=method.first_layer,
            cached=bool(config.cached_tokens),
            sae_parameters=sum(sae.width * sae.latents for sae in method.saes.values()),
            **counts,
        )
