"""Adapter training: the task's loss and the auxiliary losses, adapter-only checkpoints.

T real tokens, E specialists, R rank components.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from steerlora.config import AdapterConfig, TrainerConfig
from steerlora.data.chat import ChatBatch
from steerlora.models import losses
from steerlora.models.adapter import Adapter
from steerlora.training.language import next_token_loss
from steerlora.training.loop import rise_hold_fall


class AdapterModule(L.LightningModule):
    """An attached adapter in training; the base and the SAEs stay frozen.

    Args:
        model: the base, with ``adapter`` attached.
        adapter: what trains.
        config: weights of the auxiliary losses; a zero weight costs nothing.
        trainer: AdamW's settings.
        total_steps: length of the schedule.
    """

    strict_loading = False  # checkpoints hold the adapter only

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        *,
        config: AdapterConfig,
        trainer: TrainerConfig,
        total_steps: int,
    ) -> None:
        super().__init__()
        self.model, self.adapter = model, adapter
        self.config, self.settings, self.total_steps = config, trainer, total_steps

    def training_step(self, batch: ChatBatch, index: int) -> Tensor:
        terms = {"task": (1.0, next_token_loss(self.model, batch))}
        terms |= self.auxiliary(batch.attention_mask.bool())
        loss = sum(weight * term for weight, term in terms.values())
        self.log("train/loss", loss)
        self.log_dict({f"train/{name}": term for name, (_, term) in terms.items()})
        return loss

    def auxiliary(self, real: Tensor) -> dict[str, tuple[float, Tensor]]:
        """{name: (weight, value)} of the auxiliary losses that are on; ``real`` is [B, S]."""
        config, sites = self.config, list(self.adapter.sites.values())
        terms: dict[str, tuple[float, Tensor]] = {}
        gates = [site.routing.gate[real] for site in sites]
        if gates and config.gate_sparsity:
            values = torch.stack([losses.gate_sparsity(gate) for gate in gates])
            terms["gate_sparsity"] = (config.gate_sparsity, values.mean())
        if gates and config.load_balance:
            values = torch.stack([losses.load_balance(gate) for gate in gates])
            terms["load_balance"] = (config.load_balance, values.mean())
        if gates and config.rank_budget and config.dynamic_rank:
            values = torch.stack([losses.rank_budget(site.routing.mask[real]) for site in sites])
            terms["rank_budget"] = (config.rank_budget, values.mean())
        if gates and config.diversity and config.specialists > 1:
            value = losses.specialist_diversity(self.adapter.layers.values(), config.specialists)
            terms["diversity"] = (config.diversity, value)
        return terms

    def configure_optimizers(self):
        settings = self.settings
        optimizer = torch.optim.AdamW(
            [p for p in self.adapter.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        total = self.total_steps
        rise, fall = (round(s * total) for s in (settings.warmup_fraction, settings.decay_fraction))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rise_hold_fall(step, total, rise, fall)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k.startswith("adapter.")}
