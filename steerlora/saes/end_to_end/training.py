"""End-to-end training: an SAE in the place of a stream of the frozen base, by what the base says.

Shapes: B batch, S sequence, T tokens, D model width, N latents.

With h the stream that the SAE writes, SAE(h) its reconstruction on the tokens that have one, and
p = base(x), q = base(x | h := SAE(h)), what is minimised is

    r KL(p || q) + mse_weight FVU + penalty

Braun et al., "Identifying functionally important features with end-to-end sparse dictionary
learning" (arXiv 2405.12241), train by KL alone, from the start; Karvonen (arXiv 2503.17272) shows
that a short training by KL and MSE of an SAE that reconstructs already does as well. r, which takes
no gradient, is FVU / KL of the step, as in his code, so that the two count alike whatever the
model; without an MSE it is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from steerlora.distributed.reductions import sum_over_ranks, world
from steerlora.lm.decoder import continued, edited, hidden_states
from steerlora.lm.divergence import kl_divergence
from steerlora.lm.flops import splicing_flops_per_token
from steerlora.lm.shapes import DecoderShape
from steerlora.saes.base import SparseAutoencoder, TrainingErrors, squared_deviation
from steerlora.saes.training import SAELosses, SAEModule

if TYPE_CHECKING:
    from steerlora.data.batches import ChatBatch

_LEAST_KL = 1e-12
"""Nats a token, below which KL is not scaled up any further."""


class Spliced(NamedTuple):
    """What came of one batch through the base and through the spliced base."""

    kl: Tensor
    """KL(p || q), summed over the real tokens."""
    written: Tensor
    """The stream that the SAE approximates, [T, D], in its own units."""
    errors: TrainingErrors
    """Of the SAE, on the tokens that it reconstructs."""


def spliced(
    model: nn.Module,
    sae: SparseAutoencoder,
    site: int,
    input_ids: Tensor,
    attention_mask: Tensor,
    replaced: Tensor,
    dead: Tensor,
) -> Spliced:
    """Run a batch through the frozen base, and on from the SAE's site with its reconstruction.

    The layers below run once, without gradient. The latents are selected as in the SAE's training.

    Args:
        model: a causal language model, no weight of which takes a gradient.
        sae: of the stream entering layer ``site``; what it writes is replaced.
        site: the layer.
        input_ids, attention_mask: [B, S].
        replaced: [B, S] bool, the tokens that are reconstructed; the others pass as they are.
        dead: [N] bool, latents that have not fired for long.
    """
    streams: dict[int, Tensor] = {}

    def record(layer: int, stream: Tensor) -> Tensor:
        streams[layer] = stream
        return stream

    layers = (site, site + sae.span) if sae.span else (site,)
    with torch.no_grad(), edited(model, {layer: partial(record, layer) for layer in layers}):
        teacher = hidden_states(model, input_ids, attention_mask)
    given = [streams[layer][replaced] for layer in layers]
    inputs = sae.normalized(torch.stack(given, 1) if sae.span else given[0])
    written = sae.written(inputs.x)
    errors = sae.training_errors(inputs.x, dead)
    rebuilt = (written - errors.residual) * inputs.scale + inputs.mean
    stream = streams[layers[-1]]
    stream = stream.index_put(replaced.nonzero(as_tuple=True), rebuilt.to(stream.dtype))
    student = continued(model, stream, layers[-1], None, attention_mask=attention_mask)
    real = attention_mask.bool()
    return Spliced(kl_divergence(model, teacher[real], student[real]), written, errors)


class EndToEndModule(SAEModule):
    """An SAE in training by the model around it; batches are text. The base stays as it is.

    KL is a mean over all real tokens, those that pass unreconstructed among them. Logged beside
    :class:`SAEModule`'s figures: ``sae/kl``, in nats a token.

    Args:
        sae: trained in place.
        model: the base, on the device of the training; it is frozen here, and no part of the
            module: neither optimizers nor checkpoints know it.
        site: the layer whose incoming stream the SAE reads.
        replaced: of ``input_ids`` and ``attention_mask``, [B, S] each, the tokens that are
            reconstructed, [B, S] bool.
        mse_weight: of the fraction of variance unexplained; 0: KL alone.
        settings: of :class:`SAEModule`.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        model: nn.Module,
        site: int,
        *,
        replaced: Callable[[Tensor, Tensor], Tensor],
        mse_weight: float,
        **settings: Any,
    ) -> None:
        super().__init__(sae, **settings)
        self._base = (model.eval().requires_grad_(False),)  # a module's attribute would be its part
        self.site, self.replaced, self.mse_weight = site, replaced, mse_weight

    @property
    def model(self) -> nn.Module:
        """The base."""
        return self._base[0]

    def losses(self, batch: ChatBatch) -> tuple[SAELosses, Tensor]:
        """The losses of a batch, and how often each latent fired [N]."""
        ids, mask = batch.input_ids, batch.attention_mask
        found = spliced(
            self.model, self.sae, self.site, ids, mask, self.replaced(ids, mask), self.dead()
        )
        # These batches leave no token out (`ALL_TOKENS`): the share is that of the real ones.
        kl = found.kl / mask.sum() * batch.shares.signal
        fvu = found.errors.error / squared_deviation(found.written)
        total = kl + found.errors.penalty
        if self.mse_weight:
            whole_kl, whole_fvu = sum_over_ranks([kl, fvu])
            scale = whole_fvu / whole_kl.clamp_min(_LEAST_KL * world())
            total = scale * kl + self.mse_weight * fvu + found.errors.penalty
        return SAELosses(total, fvu, kl.detach()), found.errors.fired

    def tokens_in(self, batch: ChatBatch) -> int:
        replaced = self.replaced(batch.input_ids, batch.attention_mask)
        (tokens,) = sum_over_ranks([replaced.sum()])
        return int(tokens)

    def flops_per_token(self, batch: ChatBatch) -> float:
        shape = DecoderShape.complete(self.model.config)
        if shape is None:
            return 0.0
        length = float(batch.attention_mask.sum()) / len(batch.input_ids)
        around = splicing_flops_per_token(shape, self.site + self.sae.span, length)
        return around + self.sae.training_flops_per_token()
