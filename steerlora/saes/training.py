"""Training of a sparse autoencoder on stored activations.

Shapes: T tokens of a batch, D model width, N latents, K active latents.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor

from steerlora.distributed.reductions import sum_over_ranks, world
from steerlora.distributed.strategies import editable
from steerlora.lm.flops import sae_training_flops_per_token
from steerlora.saes.autoencoder import SparseAutoencoder, SparseFeatures


class SAELosses(NamedTuple):
    """Scalars of one batch."""

    total: Tensor
    """What is minimised: the FVU and the penalty."""
    fvu: Tensor
    """Fraction of variance unexplained."""


class SAEModule(lightning.LightningModule):
    """One optimizer step per batch of activations.

    The loss is the fraction of variance unexplained of the batch (squared error over squared
    deviation from the batch mean, in the SAE's own units), plus

    - for ``topk`` SAEs, ``aux_coefficient`` times AuxK (Gao et al., arXiv 2406.04093, A.2): the
      fraction of the residual unexplained by the best D / 2 dead latents, scaled down while fewer
      are dead. It decodes a residual, so without ``b_dec``;
    - for ``relu`` SAEs, ``l1_coefficient`` times the mean L1 norm of a token's features.

    Decoder rows stay unit vectors and their gradients orthogonal to them. Ranks that share a batch
    divide by its deviation, not by that of their own parts.

    Logged at every step: ``sae/loss``, ``sae/fvu``, ``sae/l0``, ``sae/dead_fraction``, ``sae/lr``.

    Args:
        sae: trained in place; centre it on activations beforehand (`SparseAutoencoder.center_on`).
        total_steps: optimizer steps of the whole run.
        lr: Adam's peak rate; None is 2e-4 / sqrt(N / 2^14), as in sparsify.
        warmup_steps: linear rise from 0.
        decay_fraction: share of the run, at its end, that falls linearly to 0.
        aux_coefficient: weight of AuxK; 0 turns it off.
        dead_after_tokens: a latent that has not fired for so many tokens is dead.
        l1_coefficient: weight of the L1 penalty.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        *,
        total_steps: int,
        lr: float | None = None,
        warmup_steps: int = 0,
        decay_fraction: float = 0.2,
        aux_coefficient: float = 1 / 32,
        dead_after_tokens: int = 10_000_000,
        l1_coefficient: float = 1e-3,
    ) -> None:
        super().__init__()
        self.sae = sae
        self.lr = 2e-4 / math.sqrt(sae.latents / 2**14) if lr is None else lr
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.decay_steps = max(1, round(decay_fraction * total_steps))
        self.aux_coefficient = aux_coefficient
        self.dead_after_tokens = dead_after_tokens
        self.l1_coefficient = l1_coefficient
        sae.normalize_decoder()
        idle = torch.zeros(sae.latents, dtype=torch.long, device=sae.W_dec.device)
        self.register_buffer("tokens_since_fired", idle)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """batch [T, D] -> loss."""
        losses, fired = self.losses(batch)
        (fired,) = sum_over_ranks([fired])
        tokens = len(batch) * world()
        self.count_idle_tokens(fired, tokens)
        dead = (self.tokens_since_fired >= self.dead_after_tokens).float().mean()
        self.log_dict(
            {
                "sae/loss": losses.total.detach(),
                "sae/fvu": losses.fvu.detach(),
                "sae/l0": fired.sum() / tokens,
                "sae/dead_fraction": dead,
                "sae/lr": self.optimizers().param_groups[0]["lr"],
            },
            sync_dist=True,
        )
        return losses.total

    def losses(self, batch: Tensor) -> tuple[SAELosses, Tensor]:
        """batch [T, D] -> the losses, and how often each latent fired [N]."""
        x = self.sae.normalized(batch).x
        compute = self._topk_errors if self.sae.activation == "topk" else self._relu_errors
        error, penalty, fired = compute(x)
        fvu = error / _deviation(x)
        return SAELosses(fvu + penalty, fvu), fired

    def _topk_errors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squared error, weighted AuxK, and how often each latent fired [N]."""
        sae, k = self.sae, self.sae.k
        dead = self._dead_latents()
        aux_k = min(sae.width // 2, len(dead))
        values, indices = sae.encode_normalized(x, dead if aux_k else None, aux_k)
        main = SparseFeatures(values[:, :k], indices[:, :k])
        residual = x - sae.b_dec - sae.directions(main, unit_rows=True)
        penalty = x.new_zeros(())
        if aux_k:
            target = residual.detach()
            aux = SparseFeatures(values[:, k:], indices[:, k:])
            error = (target - sae.directions(aux, unit_rows=True)).square().sum()
            scale = min(1.0, len(dead) / (sae.width // 2))
            penalty = self.aux_coefficient * scale * error / _deviation(target)
        fired = x.new_zeros(sae.latents)
        fired.index_add_(0, main.indices.flatten(), (main.values > 0).flatten().to(x.dtype))
        return residual.square().sum(), penalty, fired

    def _relu_errors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squared error, weighted L1, and how often each latent fired [N].

        Dense: early in training about half of all latents are active.
        """
        sae = self.sae
        shift = sae.b_dec if sae.apply_b_dec_to_input else 0
        with torch.autocast(x.device.type, enabled=False):
            latents = torch.relu((x - shift) @ sae.W_enc + sae.b_enc)
            residual = x - sae.b_dec - latents @ F.normalize(sae.W_dec, dim=1)
        penalty = self.l1_coefficient * latents.sum() / len(x)
        return residual.square().sum(), penalty, (latents > 0).sum(0).to(x.dtype)

    def _dead_latents(self) -> Tensor:
        """[n] latent numbers; empty when AuxK is off, which also spares the search."""
        if not self.aux_coefficient:
            return self.tokens_since_fired[:0]
        return (self.tokens_since_fired >= self.dead_after_tokens).nonzero()[:, 0]

    @torch.no_grad()
    def count_idle_tokens(self, fired: Tensor, tokens: int) -> None:
        """Note which latents fired [N] over so many tokens."""
        self.tokens_since_fired += tokens
        self.tokens_since_fired.masked_fill_(fired > 0, 0)

    def flops_per_token(self, batch: Tensor) -> float:
        """Floating-point operations, forward and backward; 0: unknown."""
        sae = self.sae
        if sae.activation != "topk":
            return 0.0
        return sae_training_flops_per_token(sae.width, sae.latents, sae.k)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.sae.parameters(), lr=self.lr, fused=True)
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
        with editable(self.trainer, [self.sae.W_dec]):
            self.sae.normalize_decoder()


def _deviation(x: Tensor) -> Tensor:
    """Squared deviation of all ranks' rows [T, D] from their mean, over the number of ranks.

    Errors of a rank's own rows over it average, over ranks, to the whole batch's.
    """
    if world() == 1:
        return (x - x.mean(0)).square().sum()
    total, count = sum_over_ranks([x.sum(0), x.new_tensor(float(len(x)))])
    (squares,) = sum_over_ranks([(x - total / count).square().sum()])
    return squares / world()
