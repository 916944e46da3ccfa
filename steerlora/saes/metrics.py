"""How faithful a sparse autoencoder is: to the activations, and to the model's own loss.

Shapes: B batch, S sequence, T tokens, D model width, N latents, V vocabulary. Names and formulas
are those of SAEBench (arXiv 2503.09532) and SAELens's evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from steerlora.lm.decoder import residual_streams, spliced_logits
from steerlora.lm.signal_tokens import NOT_FIRST, SignalTokens
from steerlora.saes.base import SparseAutoencoder


class Reconstruction(TypedDict):
    """How an SAE reconstructs: its quality, shrinkage and sparsity.

    x is an activation (of a transcoder the one written), y its reconstruction, z its features, and
    E a mean over tokens.
    """

    explained_variance: float
    """1 - ``fvu``."""
    fvu: float
    """Fraction of variance unexplained: sum |x - y|^2 / sum |x - E x|^2."""
    mse: float
    """E |x - y|^2 / D."""
    cossim: float
    """E cos(x, y)."""
    l2_norm_in: float
    """E |x|."""
    l2_norm_out: float
    """E |y|."""
    l2_ratio: float
    """E |y| / |x|."""
    relative_reconstruction_bias: float
    """E |y|^2 / E x.y; below 1 where reconstructions are shrunk."""
    l0: float
    """Active latents of a token."""
    l1: float
    """E |z|_1."""
    frac_alive: float
    """Share of the latents that are active on any of these tokens."""


class Behavior(TypedDict):
    """What a model's next-token predictions lose with its stream reconstructed (``with_sae``), and
    with it set to zero (``with_ablation``). Losses and divergences are in nats a token."""

    ce_loss_without_sae: float
    ce_loss_with_sae: float
    ce_loss_with_ablation: float
    ce_loss_score: float
    """(ablated - with SAE) / (ablated - without SAE); 1 is perfect."""
    kl_div_with_sae: float
    """KL(intact || with SAE)."""
    kl_div_with_ablation: float
    kl_div_score: float
    """1 - KL(intact || with SAE) / KL(intact || ablated); 1 is perfect."""


@torch.inference_mode()
def sae_metrics(
    sae: SparseAutoencoder, activations: Tensor | Iterable[Tensor], *, batch_size: int = 4096
) -> Reconstruction:
    """Reconstruction and sparsity over tokens, streaming.

    Args:
        sae: the autoencoder.
        activations: [T, D], [T, 2, D] for a transcoder, or an iterable of such; each is read in
            batches.
        batch_size: tokens at once.
    """
    if isinstance(activations, Tensor):
        activations = [activations]
    device = sae.W_dec.device
    tokens = 0
    totals: dict[str, Tensor] = {}
    total_x = torch.zeros(sae.width, dtype=torch.float64, device=device)
    alive = torch.zeros(sae.latents, dtype=torch.bool, device=device)
    for rows in activations:
        for batch in rows.split(batch_size):
            streams = batch.to(device)
            inputs = sae.normalized(sae.read(streams))
            features = sae.encode_normalized(inputs.x)
            y = (sae.output(inputs.x, features) * inputs.scale + inputs.mean).double()
            x = sae.written(streams).double()
            active = features.values > 0
            alive[features.indices[active]] = True
            total_x += x.sum(0)
            tokens += len(x)
            norm_in, norm_out = x.norm(dim=1), y.norm(dim=1)
            sums = {
                "error": (x - y).square().sum(),
                "x_square": x.square().sum(),
                "y_square": y.square().sum(),
                "x_dot_y": (x * y).sum(),
                "cossim": torch.cosine_similarity(x, y, dim=1).sum(),
                "l2_norm_in": norm_in.sum(),
                "l2_norm_out": norm_out.sum(),
                "l2_ratio": (norm_out / norm_in).sum(),
                "l0": active.sum().double(),
                "l1": features.values.double().sum(),
            }
            totals = {name: totals.get(name, 0) + value for name, value in sums.items()}
    assert tokens, "no activations to measure on"
    total = {name: float(value) for name, value in totals.items()}
    variance = total["x_square"] - float(total_x.square().sum()) / tokens
    fvu = total["error"] / variance
    return {
        "explained_variance": 1 - fvu,
        "fvu": fvu,
        "mse": total["error"] / (tokens * sae.width),
        "cossim": total["cossim"] / tokens,
        "l2_norm_in": total["l2_norm_in"] / tokens,
        "l2_norm_out": total["l2_norm_out"] / tokens,
        "l2_ratio": total["l2_ratio"] / tokens,
        "relative_reconstruction_bias": total["y_square"] / total["x_dot_y"],
        "l0": total["l0"] / tokens,
        "l1": total["l1"] / tokens,
        "frac_alive": float(alive.double().mean()),
    }


@torch.inference_mode()
def ce_recovered(
    model: nn.Module,
    sae: SparseAutoencoder,
    site: int,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    signal_tokens: SignalTokens = NOT_FIRST,
    largest: float = math.inf,
    span: int = 0,
) -> Behavior:
    """Next-token loss with the stream entering layer ``site`` reconstructed, and set to zero.

    Padding is neither replaced nor counted.

    Args:
        model: a causal language model.
        sae: trained on that stream.
        site: layer index.
        batches: (input_ids [B, S], attention_mask [B, S]).
        signal_tokens: the stream of other tokens stays as it is; the same as in harvesting.
        largest: so does that of tokens whose norm at ``site`` is above this.
        span: so many layers after ``site`` the stream is replaced, by what the SAE writes from that
            of ``site`` (:attr:`SparseAutoencoder.span`).
    """
    device = next(model.parameters()).device
    names = ("without_sae", "with_sae", "with_ablation")
    cross_entropy, divergence, tokens = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), 0
    was_training = model.training
    model.eval()
    try:
        for input_ids, attention_mask in batches:
            input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
            targets = _targets(input_ids, attention_mask)
            where = signal_tokens(input_ids, attention_mask)
            stream = residual_streams(model, input_ids, attention_mask, [site])[site]
            where = (where & (stream.float().norm(dim=-1) <= largest))[..., None]
            read = stream if span else None
            edits = {
                "without_sae": lambda x: x,
                # Of a model that is spread over devices, the stream may be on another one.
                "with_sae": lambda x, where=where, read=read: torch.where(
                    where.to(x.device), sae((x if read is None else read).to(device)).to(x), x
                ),
                "with_ablation": lambda x, where=where: x.masked_fill(where.to(x.device), 0),
            }
            intact = None
            for name, edit in edits.items():
                logits = spliced_logits(model, input_ids, attention_mask, site + span, edit)
                scores = logits[:, :-1][targets.counted].float().log_softmax(-1)  # [T, V]
                intact = scores if intact is None else intact
                chosen = scores.gather(1, targets.tokens[:, None])
                cross_entropy[name] -= float(chosen.double().sum())
                divergence[name] += float((intact.exp() * (intact - scores)).double().sum())
            tokens += len(targets.tokens)
    finally:
        model.train(was_training)
    assert tokens, "no next token to predict in these batches"
    loss = {name: value / tokens for name, value in cross_entropy.items()}
    kl = {name: value / tokens for name, value in divergence.items()}
    recovered = loss["with_ablation"] - loss["with_sae"]
    return {
        **{f"ce_loss_{name}": value for name, value in loss.items()},
        "ce_loss_score": _ratio(recovered, loss["with_ablation"] - loss["without_sae"]),
        "kl_div_with_sae": kl["with_sae"],
        "kl_div_with_ablation": kl["with_ablation"],
        "kl_div_score": _ratio(kl["with_ablation"] - kl["with_sae"], kl["with_ablation"]),
    }


class _Targets(NamedTuple):
    counted: Tensor
    """[B, S - 1]: positions whose next token is real, and which are real themselves."""
    tokens: Tensor
    """[T]: those next tokens."""


def _targets(input_ids: Tensor, attention_mask: Tensor) -> _Targets:
    real = attention_mask.bool()
    counted = real[:, :-1] & real[:, 1:]
    return _Targets(counted, input_ids[:, 1:][counted])


def _ratio(numerator: float, denominator: float) -> float:
    """NaN where ablation changes nothing, so that a score means nothing."""
    return numerator / denominator if denominator else float("nan")
