"""Training of a sparse autoencoder of any architecture on stored activations.

Shapes: T tokens of a batch, D model width, N latents.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor

from steerlora.distributed.reductions import sum_over_ranks, world
from steerlora.distributed.strategies import editable
from steerlora.saes.base import SparseAutoencoder, squared_deviation
from steerlora.saes.config import KEEPS_SIZE, SAEConfig


class SAELosses(NamedTuple):
    """Scalars of one batch."""

    total: Tensor
    """What is minimised: the FVU and the penalty."""
    fvu: Tensor
    """Fraction of variance unexplained."""
    kl: Tensor | None = None
    """Divergence of the spliced model from the base, in nats per token, where there is one."""


def input_scale(config: SAEConfig, first: Tensor) -> float:
    """What activations [T, D] are divided by in training, from those of the first batch."""
    if not config.scale_inputs or config.normalize not in KEEPS_SIZE:
        return 1.0
    return (first.float().norm(dim=-1).mean() / math.sqrt(first.shape[-1])).item()


def start_on(sae: SparseAutoencoder, config: SAEConfig, first: Tensor) -> None:
    """Begin with the centre and the thresholds of the first batch's activations."""
    if config.median_start:
        sae.center_on(first)
    sae.initialize_thresholds(first)


def course(config: SAEConfig, steps: int, tokens: int) -> dict[str, Any]:
    """What `SAEModule` takes from a configuration, beside the rate.

    Args:
        steps: of the training.
        tokens: a step.
    """
    return {
        "adam_beta2": config.adam_beta2,
        "total_steps": steps,
        "warmup_steps": int(config.warmup_fraction * steps),
        "decay_fraction": config.decay_fraction,
        "dead_after_tokens": round(config.dead_fraction * steps * tokens),
    }


class SAEModule(lightning.LightningModule):
    """One optimizer step per batch of activations.

    The loss is the fraction of variance unexplained of the batch (squared error over squared
    deviation from the batch mean, in the SAE's own units), plus the architecture's penalty
    (`SparseAutoencoder.training_errors`).

    Where the SAE says so (`unit_norm`), decoder rows stay unit vectors. Ranks that share a batch
    divide by its deviation, not by that of their own parts.

    The default rate and ``adam_beta2`` belong together. The gradient of the fraction unexplained
    shrinks with it (25-fold in 300 steps at 2e-4); Adam's usual memory of a thousand steps keeps
    dividing by the large first gradients, so that the steps shrink too. A memory of twenty follows.
    Both numbers were chosen on the streams of two micro bases (pretraining and SAE seeds 3 and 4;
    TopK, 512 latents, k 16, 307,200 tokens), among rates of 2e-4 to 1.6e-3 and memories of 0.9 to
    0.999, for the fraction of held-out variance unexplained, where no more than 5 % of latents were
    silent on 5000 held-out tokens: 0.0227 and 0.0249, against 0.0527 and 0.0573 at 2e-4 and 0.999.
    Clipping the gradient's norm to 0.01 at the same rate reached 0.0219 and 0.0242; that norm would
    have to be found anew for every shape and loss. With one of the seeds the choice also explained
    more than 2e-4 and 0.999 at 256 to 8192 latents, k 8 to 64, and batches of 256 to 4096 tokens.
    All this was found on activations as they are; divided to a mean norm of sqrt(D)
    (`input_scale`), at the same settings, the variance unexplained of two other bases' streams
    (5000 of the tokens) falls from 0.0192 and 0.0212 to 0.0158 and 0.0173, with 2.7 and 2.1 %
    of latents silent in place of 3.5 and 1.8 %.

    Logged: ``sae/loss``, ``sae/fvu``, ``sae/l0``, ``sae/dead_fraction``, ``sae/lr``.

    Args:
        sae: trained in place; centre it on activations beforehand (`SparseAutoencoder.center_on`).
        total_steps: optimizer steps of the whole run.
        lr: Adam's peak rate; None is 8e-4 / sqrt(N / 2^14), sparsify's law at four times its rate.
        adam_beta2: decay a step of Adam's mean of squared gradients.
        warmup_steps: linear rise from 0.
        decay_fraction: share of the run, at its end, that falls linearly to 0; 0: none.
        dead_after_tokens: a latent that has not fired for so many tokens is dead.
        scale: batches are divided by it; `SparseAutoencoder.rescale` then brings the trained SAE
            back to their own units.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        *,
        total_steps: int,
        lr: float | None = None,
        adam_beta2: float = 0.95,
        warmup_steps: int = 0,
        decay_fraction: float = 0.2,
        dead_after_tokens: int = 10_000_000,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.sae = sae
        self.scale = scale
        self.lr = 8e-4 / math.sqrt(sae.latents / 2**14) if lr is None else lr
        self.adam_beta2 = adam_beta2
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.decay_steps = max(1, round(decay_fraction * total_steps)) if decay_fraction else 0
        self.dead_after_tokens = dead_after_tokens
        if sae.unit_norm:
            sae.normalize_decoder()
        idle = torch.zeros(sae.latents, dtype=torch.long, device=sae.W_dec.device)
        self.register_buffer("tokens_since_fired", idle)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """batch [T, D] -> loss."""
        logged = (self.global_step + 1) % self.trainer.log_every_n_steps == 0
        loss, figures = self.step(batch, self.global_step, in_full=logged)
        self.log_dict(figures, sync_dist=True)
        return loss

    def step(
        self, batch: Tensor, step: int, *, in_full: bool
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """What is minimised at a step, and what is logged of it.

        Args:
            batch: [T, D].
            step: optimizer steps before it.
            in_full: whether a logger sees this step: else little is worked out.
        """
        self.sae.begin_step(step / self.total_steps)
        losses, fired = self.losses(batch)
        (fired,) = sum_over_ranks([fired])
        tokens = self.tokens_in(batch)
        self.count_idle_tokens(fired, tokens)
        figures = {"sae/loss": losses.total.detach()}
        if losses.kl is not None:
            figures["sae/kl"] = losses.kl.detach()
        if in_full:
            figures["sae/fvu"] = losses.fvu.detach()
            figures["sae/l0"] = fired.sum() / tokens
            figures["sae/dead_fraction"] = self.dead().float().mean()
            figures["sae/lr"] = self.lr * self.lr_factor(step)
        return losses.total, figures

    def losses(self, batch: Tensor) -> tuple[SAELosses, Tensor]:
        """batch [T, D] -> the losses, and how often each latent fired [N]."""
        x = self.sae.normalized(batch).x / self.scale
        errors = self.sae.training_errors(x, self.dead())
        fvu = errors.error / squared_deviation(self.sae.written(x))
        return SAELosses(fvu + errors.penalty, fvu), errors.fired

    def tokens_in(self, batch: Tensor) -> int:
        """Tokens that the SAE reads in this step, over all ranks."""
        return len(batch) * world()

    def dead(self) -> Tensor:
        """[N] bool, latents that have not fired for long."""
        return self.tokens_since_fired >= self.dead_after_tokens

    @torch.no_grad()
    def count_idle_tokens(self, fired: Tensor, tokens: int) -> None:
        """Note which latents fired [N] over so many tokens."""
        self.tokens_since_fired += tokens
        self.tokens_since_fired.masked_fill_(fired > 0, 0)

    def flops_per_token(self, batch: Tensor) -> float:
        """Floating-point operations, forward and backward; 0: unknown."""
        return self.sae.training_flops_per_token()

    def configure_optimizers(self) -> dict[str, Any]:
        betas = (0.9, self.adam_beta2)
        optimizer = torch.optim.Adam(self.sae.parameters(), lr=self.lr, betas=betas, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def lr_factor(self, step: int) -> float:
        """Share of the peak rate at optimizer step ``step``, counted from 0; never 0 in the run."""
        warmup = (step + 1) / (self.warmup_steps + 1)
        decay = (self.total_steps - step) / (self.decay_steps + 1)
        return max(0.0, min(1.0, warmup, decay))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.sae.unit_norm:
            with editable(self.trainer, [self.sae.W_dec]):
                self.sae.normalize_decoder()
