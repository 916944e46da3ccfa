"""Many TopK SAEs of one shape trained at once: one batched product in place of one each.

Shapes: S SAEs, B tokens of a batch, T tokens in all, D width, N latents, K active latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steerlora.saes.topk import TopK
from steerlora.saes.training import SAEModule

PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")
BIASES = ("b_enc", "b_dec")


@dataclass(frozen=True, kw_only=True)
class TogetherSettings:
    """One course of training, the same for all."""

    steps: int
    batch_size: int
    """B."""
    adam_beta2: float = 0.95
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.2
    trained: tuple[str, ...] = PARAMETERS
    """Names of the parameters that train."""


class _Stack(nn.Module):
    """The parameters of S SAEs, stacked."""

    def __init__(self, saes: Sequence[TopK], trained: Sequence[str]) -> None:
        super().__init__()
        for name in PARAMETERS:
            stacked = torch.stack([getattr(sae, name).detach() for sae in saes])
            self.register_parameter(name, nn.Parameter(stacked, requires_grad=name in trained))
        self.k = saes[0].k

    def losses(self, x: Tensor) -> Tensor:
        """Fraction of variance unexplained of each SAE's batch, [S, B, D] -> [S]."""
        scores = torch.baddbmm(self.b_enc[:, None], x - self.b_dec[:, None], self.W_enc)
        values, indices = scores.topk(self.k, dim=-1, sorted=False)
        features = torch.zeros_like(scores).scatter(-1, indices, values.relu())
        residual = x - torch.baddbmm(self.b_dec[:, None], features, self.W_dec)
        deviation = (x - x.mean(1, keepdim=True)).square().sum((1, 2))
        return residual.square().sum((1, 2)) / deviation.clamp_min(1e-30)

    @torch.no_grad()
    def free_of_rows(self) -> None:
        """Take the part along each row out of the decoder's gradient."""
        gradient = self.W_dec.grad
        if gradient is not None:
            along = torch.linalg.vecdot(gradient, self.W_dec)[..., None]
            gradient.addcmul_(along, self.W_dec, value=-1)

    @torch.no_grad()
    def unit_rows(self) -> None:
        self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12))


def train_together(
    saes: Sequence[TopK],
    data: Sequence[Tensor],
    seeds: Sequence[int],
    settings: TogetherSettings,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Train SAEs in place, each on its own activations.

    What comes out is what each would be alone: `SAEModule`'s losses and rate, without the auxiliary
    loss on dead latents, from the same batches. Decoder rows stay unit vectors.

    Args:
        saes: of one shape and k, their ``b_dec`` centred (`SparseAutoencoder.center_on`).
        data: of each, [T, D]; in the SAE's own units.
        seeds: of the order of each SAE's tokens.
        settings: of the training.
        progress: called after a step with 1.

    Raises:
        ValueError: shapes that differ, or as many data sets or seeds as there are not SAEs.
    """
    shapes = {(sae.width, sae.latents, sae.k) for sae in saes}
    if len(shapes) != 1 or not len(saes) == len(data) == len(seeds):
        raise ValueError(
            f"{len(saes)} SAEs of {len(shapes)} shapes with {len(data)} data sets and "
            f"{len(seeds)} seeds: give one of each for every SAE, all of one shape"
        )
    stack = _Stack(saes, settings.trained)
    stack.unit_rows()
    course = SAEModule(
        saes[0],
        total_steps=settings.steps,
        warmup_steps=int(settings.warmup_fraction * settings.steps),
        decay_fraction=settings.decay_fraction,
    )
    trained = [part for part in stack.parameters() if part.requires_grad]
    betas = (0.9, settings.adam_beta2)
    optimizer = torch.optim.Adam(trained, lr=course.lr, betas=betas, fused=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = course.lr * course.lr_factor(step)
        batch = torch.stack(
            [
                rows[torch.randint(len(rows), (settings.batch_size,), generator=generator)]
                for rows, generator in zip(data, generators, strict=True)
            ]
        )
        optimizer.zero_grad(set_to_none=True)
        stack.losses(batch).sum().backward()
        stack.free_of_rows()
        optimizer.step()
        if "W_dec" in settings.trained:
            stack.unit_rows()
        if progress is not None:
            progress(1)
    with torch.no_grad():
        for number, sae in enumerate(saes):
            for name in PARAMETERS:
                getattr(sae, name).copy_(getattr(stack, name)[number])
