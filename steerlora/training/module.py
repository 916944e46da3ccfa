"""Adapter training: the task's loss and the auxiliary losses, adapter-only checkpoints.

B batch, S sequence, T real tokens, E specialists, R rank components.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from steerlora.config import AdapterConfig, TrainerConfig
from steerlora.data.chat import ChatBatch
from steerlora.distributed.reductions import mean_over_ranks, world
from steerlora.distributed.shards import elements
from steerlora.errors import UserError
from steerlora.lm.decoder import check_packing
from steerlora.lm.flops import training_flops_per_token
from steerlora.methods.routed_lora import losses
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.monitor import Monitor
from steerlora.training.language import Text, next_token_loss, shape_of
from steerlora.training.loop import rise_hold_fall


class AdapterModule(L.LightningModule):
    """An attached adapter in training; the base and the SAEs stay frozen.

    Args:
        model: the base, with ``adapter`` attached.
        adapter: what trains.
        config: weights of the losses; one of weight zero costs nothing.
        trainer: AdamW's settings.
        total_steps: length of the schedule.
        monitor: for the preservation and steering losses; unused where both are off.
        current: the specialist of the domain in training, for the orthogonality loss.
        earlier: those of the domains before it; with none, that loss is absent.

    Raises:
        ValueError: a loss that compares features, and no monitor to read them.
        UserError: packed rows, and a model in which packed conversations would see each other.
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
        monitor: Monitor | None = None,
        current: int | None = None,
        earlier: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if config.monitored and monitor is None:
            raise ValueError(
                "the preservation and steering losses compare features at a monitor site: give a "
                "monitor, or set both weights to zero"
            )
        if trainer.packing:
            try:
                check_packing(model)
            except ValueError as error:
                raise UserError(f"trainer.packing=true: {error}; set it to false") from error
        self.model, self.adapter = model, adapter
        self.config, self.settings, self.total_steps = config, trainer, total_steps
        self.monitor = monitor if config.monitored else None
        self.current, self.earlier = current, tuple(earlier)

    def training_step(self, batch: ChatBatch, index: int) -> Tensor:
        with self.monitor.recording() if self.monitor else nullcontext():
            task = next_token_loss(self.model, batch)
        terms = {"task": (self.config.task, task), **self.auxiliary(batch)}
        loss = sum(weight * term for weight, term in terms.values())
        self.log("train/loss", loss, sync_dist=True)
        self.log_dict({f"train/{name}": term for name, (_, term) in terms.items()}, sync_dist=True)
        return loss

    def auxiliary(self, batch: ChatBatch) -> dict[str, tuple[float, Tensor]]:
        """{name: (weight, value)} of the losses that are on besides the task's, after its forward.

        Of routing that several sites or modules have, a loss is the mean. Of a part of a batch,
        losses over tokens are multiplied by the part's share of them; usage, for load balance, is
        that of all ranks' parts (of the parts that one rank takes in turn, each has its own).
        """
        return {**self._on_features(batch), **self._on_routing(batch), **self._on_weights()}

    def _on_features(self, batch: ChatBatch) -> dict[str, tuple[float, Tensor]]:
        config, monitor = self.config, self.monitor
        terms: dict[str, tuple[float, Tensor]] = {}
        if monitor is None:
            return terms
        adapted = monitor.features()
        if config.preservation:
            value = losses.preservation(adapted, monitor.base_features(), monitor.general)
            terms["preservation"] = (config.preservation, value * batch.shares.real)
        if config.steering:
            real = batch.attention_mask.bool()
            owners = batch.domains[:, None].expand_as(real)[real]
            value = losses.steering(adapted, monitor.prototypes, monitor.domain, owners)
            terms["steering"] = (config.steering, value * batch.shares.owned)
        return terms

    def _on_routing(self, batch: ChatBatch) -> dict[str, tuple[float, Tensor]]:
        config, sites = self.config, list(self.adapter.sites.values())
        real, active, share = batch.attention_mask.bool(), self.adapter.active, batch.shares.real
        terms: dict[str, tuple[float, Tensor]] = {}
        if sites and config.gate_sparsity:
            values = [losses.gate_sparsity(site.routing.gate[real]) for site in sites]
            terms["gate_sparsity"] = (config.gate_sparsity, torch.stack(values).mean() * share)
        if sites and config.load_balance:
            usages = [site.routing.gate[real].mean(0) for site in sites]
            if world() > 1:
                usages = [mean_over_ranks(usage * share) for usage in usages]
            values = [losses.load_balance(usage, active) for usage in usages]
            terms["load_balance"] = (config.load_balance, torch.stack(values).mean())
        if sites and config.rank_budget and config.dynamic_rank:
            values = [losses.rank_budget(site.routing.mask[real]) for site in sites]
            terms["rank_budget"] = (config.rank_budget, torch.stack(values).mean() * share)
        return terms

    def _on_weights(self) -> dict[str, tuple[float, Tensor]]:
        config, layers = self.config, self.adapter.layers.values()
        terms: dict[str, tuple[float, Tensor]] = {}
        if config.diversity and config.specialists > 1 and config.routing != "none":
            value = losses.specialist_diversity(layers, config.specialists)
            terms["diversity"] = (config.diversity, value)
        if config.orthogonality and self.earlier:
            value = losses.orthogonality(layers, config.specialists, self.current, self.earlier)
            terms["orthogonality"] = (config.orthogonality, value)
        return terms

    def flops_per_token(self, batch: ChatBatch) -> float:
        """Floating-point operations, forward and backward; 0: unknown."""
        shape, text, adapter = shape_of(self.model), Text.of(batch), self.adapter
        if shape is None:
            return 0.0
        return training_flops_per_token(
            shape,
            adapter_parameters=sum(map(elements, adapter.layers.parameters())),
            first_adapted_layer=min(int(name.split(":")[0]) for name in adapter.layers),
            sequence=text.length,
            labelled=text.labelled,
            sae_parameters=sum(sae.width * sae.latents for sae in adapter.saes.values()),
        )

    def configure_optimizers(self):
        parameters = [p for p in self.adapter.parameters() if p.requires_grad]
        return scheduled_adamw(parameters, self.settings, self.total_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k.startswith("adapter.")}


def scheduled_adamw(
    parameters: Sequence[nn.Parameter], settings: TrainerConfig, total: int
) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
    """AdamW whose rate rises, holds and falls over ``total`` steps, as Lightning takes it."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    rise, fall = (round(s * total) for s in (settings.warmup_fraction, settings.decay_fraction))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rise_hold_fall(step, total, rise, fall)
    )
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]
