"""Every architecture beside a slow, obvious twin: dense, and differentiated by autograd alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.batch_topk import BatchTopK
from steerlora.saes.gated import Gated
from steerlora.saes.jumprelu import JumpReLU
from steerlora.saes.matryoshka import MatryoshkaBatchTopK, MatryoshkaTopK
from steerlora.saes.skip_transcoder import SkipTranscoder
from steerlora.saes.topk import TopK

K = 5


@dataclass(frozen=True)
class Case:
    """An architecture, what it is made with, and its dense twin."""

    architecture: type[SparseAutoencoder]
    features: Callable[[SparseAutoencoder, Tensor], Tensor]
    """(sae, x [T, D]) -> features in use [T, N]."""
    loss: Callable[[SparseAutoencoder, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(sae, what training reads, dead [N] bool) -> its loss, and the features [T, N] in it."""
    settings: dict[str, Any] = field(default_factory=dict)
    saved_as: str = ""
    """The name in the file of what is saved: SAELens's, where it has one."""
    streams: Callable[[Tensor], Tensor] = lambda x: x
    """x [T, D] -> what training reads."""

    def make(self, width: int, latents: int, **settings: Any) -> SparseAutoencoder:
        return self.architecture(width, latents, **self.settings | settings)


def pre_activations(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    return (x - sae.b_dec * sae.apply_b_dec_to_input) @ sae.W_enc


def rows(sae: SparseAutoencoder) -> Tensor:
    return F.normalize(sae.W_dec, dim=1) if sae.unit_norm else sae.W_dec


def deviation(x: Tensor) -> Tensor:
    return (x - x.mean(0)).square().sum()


# Features in use


def topk_features(sae, x):
    scores = pre_activations(sae, x) + sae.b_enc
    return torch.where(scores >= scores.topk(K).values[:, -1:], scores, 0).relu()


def features_above(sae, x):
    scores = pre_activations(sae, x) + sae.b_enc
    return torch.where(scores > sae.threshold.detach(), scores, 0).relu()


def gated_features(sae, x):
    scores = pre_activations(sae, x)
    return (scores + sae.b_gate > 0) * (scores * sae.r_mag.exp() + sae.b_mag).relu()


# Losses


def auxiliary(sae, x, dead, residual):
    """AuxK: what the best D / 2 dead latents leave of the residual."""
    half = sae.width // 2
    count = min(half, int(dead.sum()))
    if not count:
        return 0
    scores = pre_activations(sae, x) + sae.b_enc
    masked = scores.masked_fill(~dead, -torch.inf)
    extra = torch.where(masked >= masked.topk(count).values[:, -1:], scores, 0).relu()
    target = residual.detach()
    error = (target - extra @ rows(sae)).square().sum() / deviation(target)
    return sae.auxiliary * min(1, int(dead.sum()) / half) * error


def selected_loss(sae, x, dead, kept, prefixes):
    loss = 0
    for last in prefixes:
        residual = x - sae.b_dec - kept[:, :last] @ rows(sae)[:last]
        loss = loss + residual.square().sum() / deviation(x)
    return loss + auxiliary(sae, x, dead, residual), kept


def whole_batch(sae, x):
    scores = (pre_activations(sae, x) + sae.b_enc).relu()
    return torch.where(scores >= scores.flatten().topk(K * len(x)).values[-1], scores, 0)


def topk_loss(sae, x, dead):
    return selected_loss(sae, x, dead, topk_features(sae, x), [sae.latents])


def batch_topk_loss(sae, x, dead):
    return selected_loss(sae, x, dead, whole_batch(sae, x), [sae.latents])


def nested(sae):
    return [sae.latents // 4, sae.latents // 2, sae.latents]


def matryoshka_topk_loss(sae, x, dead):
    return selected_loss(sae, x, dead, topk_features(sae, x), nested(sae))


def matryoshka_batch_topk_loss(sae, x, dead):
    return selected_loss(sae, x, dead, whole_batch(sae, x), nested(sae))


def two_streams(x):
    return torch.stack([x, x.flip(-1) + (x - x.mean()).relu()], 1)


def skip_transcoder_loss(sae, streams, dead):
    x, y = streams.unbind(1)
    kept = topk_features(sae, x)
    residual = y - sae.b_dec - kept @ rows(sae) - x @ sae.W_skip.t()
    loss = residual.square().sum() / deviation(y)
    return loss + auxiliary(sae, x, dead, residual), kept


def jumprelu_loss(sae, x, dead):
    sigma = (deviation(x) / x.numel()).sqrt()
    epsilon = sae.bandwidth * sigma
    scores = pre_activations(sae, x) + sae.b_enc
    active = (scores > sae.threshold).to(x).detach()
    near = ((scores - sae.threshold).abs() < epsilon / 2).to(x).detach()
    moved = sae.threshold - sae.threshold.detach()  # zero, with the threshold's gradient
    step = active - near / epsilon * moved
    features = scores * active - sae.threshold.detach() * near / epsilon * moved
    residual = x - sae.b_dec - features @ rows(sae)
    size = step if sae.penalty == "l0" else (4 * features / sigma).tanh()
    loss = residual.square().sum() / deviation(x) + sae.sparsity * size.sum(1).mean()
    return loss, features


def gated_loss(sae, x, dead):
    features = gated_features(sae, x)
    gate = (pre_activations(sae, x) + sae.b_gate).relu()
    residual = x - sae.b_dec - features @ rows(sae)
    by_gate = x - sae.b_dec.detach() - gate @ rows(sae).detach()
    rho = (x - x.mean(0)).square().sum(1).mean().sqrt()
    loss = (residual.square().sum() + by_gate.square().sum()) / deviation(x)
    return loss + sae.l1 * gate.sum(1).mean() / rho, features


CASES = {
    "topk": Case(TopK, topk_features, topk_loss, {"k": K, "auxiliary": 0.5}, "topk"),
    "topk free": Case(TopK, topk_features, topk_loss, {"k": K, "unit_norm": False}, "topk"),
    "batch_topk": Case(
        BatchTopK, features_above, batch_topk_loss, {"k": K, "auxiliary": 0.5}, "jumprelu"
    ),
    "matryoshka_topk": Case(
        MatryoshkaTopK, topk_features, matryoshka_topk_loss, {"k": K, "levels": 3}, "topk"
    ),
    "matryoshka_batch_topk": Case(
        MatryoshkaBatchTopK,
        features_above,
        matryoshka_batch_topk_loss,
        {"k": K, "levels": 3},
        "jumprelu",
    ),
    "skip_transcoder": Case(
        SkipTranscoder,
        topk_features,
        skip_transcoder_loss,
        {"k": K},
        "topk_skip_transcoder",
        two_streams,
    ),
    "jumprelu l0": Case(JumpReLU, features_above, jumprelu_loss, {"initial_l0": K}, "jumprelu"),
    "jumprelu l0 free": Case(
        JumpReLU, features_above, jumprelu_loss, {"initial_l0": K, "unit_norm": False}, "jumprelu"
    ),
    "jumprelu tanh": Case(
        JumpReLU, features_above, jumprelu_loss, {"initial_l0": K, "penalty": "tanh"}, "jumprelu"
    ),
    "gated": Case(Gated, gated_features, gated_loss, {"initial_l0": K, "l1": 0.3}, "gated"),
}
