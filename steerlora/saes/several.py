"""Several SAEs of one base that train side by side on the same text.

Shapes: T tokens of a batch, D model width, C columns of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from steerlora.distributed.strategies import editable
from steerlora.saes.training import SAEModule


class SeveralSAEs(lightning.LightningModule):
    """One forward of the base feeds them all; each trains as it would alone.

    Their losses are added, and no parameter is in two of them. One Adam has a group of parameters
    for each, with a rate, a memory and a clipping of its own.

    Logged: what `SAEModule` logs, under ``<number of the SAE>/``.

    Args:
        parts: what would train each SAE, all for the same number of steps.
        columns: which columns of a batch [T, C, D] each reads.
    """

    clips_groups = True
    """The norm of the gradients is clipped in each group of parameters by itself."""

    def __init__(self, parts: Sequence[SAEModule], columns: Sequence[slice]) -> None:
        super().__init__()
        assert len({part.total_steps for part in parts}) == 1, "trainings of unlike length"
        self.parts, self.columns = nn.ModuleList(parts), tuple(columns)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """batch [T, C, D] -> the sum of the losses."""
        logged = (self.global_step + 1) % self.trainer.log_every_n_steps == 0
        total = batch.new_zeros((), dtype=torch.float32)
        for number, part in enumerate(self.parts):
            loss, figures = part.step(self.read(number, batch), self.global_step, in_full=logged)
            named = {f"{number}/{name}": value for name, value in figures.items()}
            self.log_dict(named, sync_dist=True)
            total = total + loss
        return total

    def read(self, number: int, batch: Tensor) -> Tensor:
        """What an SAE reads of a batch: [T, D], or [T, 2, D] for a transcoder."""
        rows = batch[:, self.columns[number]]
        return rows if rows.shape[1] > 1 else rows[:, 0]

    def flops_per_token(self, batch: Tensor) -> float:
        """Of all SAEs, forward and backward; 0: unknown of one."""
        found = [part.sae.training_flops_per_token() for part in self.parts]
        return sum(found) if all(found) else 0.0

    def configure_optimizers(self) -> dict[str, Any]:
        groups = [
            {"params": [*part.sae.parameters()], "lr": part.lr, "betas": (0.9, part.adam_beta2)}
            for part in self.parts
        ]
        optimizer = torch.optim.Adam(groups, fused=True)
        factors = [part.lr_factor for part in self.parts]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        for part in self.parts:
            if part.sae.unit_norm:
                with editable(self.trainer, [part.sae.W_dec]):
                    part.sae.normalize_decoder()
