"""A method in training under Lightning: its learner's losses, AdamW, checkpoints of it alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from steerlora.config import TrainerConfig
from steerlora.data.batches import ChatBatch
from steerlora.distributed.shards import elements
from steerlora.errors import UserError
from steerlora.lm.decoder import check_packing
from steerlora.lm.flops import training_flops_per_token
from steerlora.lm.shapes import DecoderShape
from steerlora.methods.base import Learner
from steerlora.training.language import Text
from steerlora.training.loop import rise_hold_fall


class MethodModule(L.LightningModule):
    """An attached method in training; the base and the SAEs stay frozen.

    Args:
        learner: of the method.
        trainer: AdamW's settings.
        total_steps: length of the schedule.

    Raises:
        UserError: packed rows, and a model in which packed conversations would see each other.
    """

    strict_loading = False  # checkpoints hold the method only

    def __init__(self, learner: Learner, *, trainer: TrainerConfig, total_steps: int) -> None:
        super().__init__()
        if trainer.packing:
            try:
                check_packing(learner.model)
            except ValueError as error:
                raise UserError(f"trainer.packing=true: {error}; set it to false") from error
        self.model, self.method = learner.model, learner.method
        self.learner, self.settings, self.total_steps = learner, trainer, total_steps

    def training_step(self, batch: ChatBatch, index: int) -> Tensor:
        terms = self.learner.losses(batch)
        loss = sum(weight * term for weight, term in terms.values())
        self.log("train/loss", loss, sync_dist=True)
        trainer = self._trainer
        if trainer and (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            # Of other steps no logger sees it.
            parts = {f"train/{name}": term for name, (_, term) in terms.items()}
            self.log_dict(parts, sync_dist=True)
        return loss

    def validation_step(self, batch: ChatBatch, index: int) -> Tensor:
        return self.learner.validation_loss(batch)

    def flops_per_token(self, batch: ChatBatch) -> float:
        """Floating-point operations, forward and backward; 0: unknown."""
        shape, text = DecoderShape.complete(self.model.config), Text.of(batch)
        method = self.method
        if shape is None:
            return 0.0
        own = self.learner.flops_per_token(shape, text)
        if own is not None:
            return own
        return training_flops_per_token(
            shape,
            adapter_parameters=sum(map(elements, method.products())),
            first_adapted_layer=method.first_layer,
            sequence=text.length,
            labelled=text.labelled,
            sae_parameters=sum(sae.width * sae.latents for sae in method.saes.values()),
        )

    def configure_optimizers(self):
        parameters = [p for p in self.method.parameters() if p.requires_grad]
        settings = self.settings
        if self.method.config.optimizer.constant_rate:
            settings = replace(settings, warmup_fraction=0.0, decay_fraction=0.0)
        optimizers, schedules = scheduled_adamw(parameters, settings, self.total_steps)
        if self.learner.optimizer:
            (optimizer,) = optimizers
            optimizer.load_state_dict(optimizer.state_dict() | {"state": self.learner.optimizer})
        return optimizers, schedules

    def on_train_end(self) -> None:
        if self.method.config.optimizer.over_domains:
            state = self.optimizers(use_pl_optimizer=False).state_dict()["state"]
            self.learner.optimizer = {
                number: {name: held.detach().to("cpu", copy=True) for name, held in own.items()}
                for number, own in state.items()
            }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k.startswith("method.")}


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
