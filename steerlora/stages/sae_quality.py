"""How well an SAE does at its site: on rows of text, in figures that can be implausible.

Shapes: B batch, S sequence, T tokens, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steerlora.data.batches import batches_by_length
from steerlora.data.chat import encode_chats
from steerlora.engine.artifacts import Artifact
from steerlora.lm.decoder import residual_streams
from steerlora.lm.outliers import largest_usual_norm, usual_tokens
from steerlora.lm.signal_tokens import SignalTokens
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.metrics import Behavior, Reconstruction, ce_recovered, sae_metrics
from steerlora.stages.common import domain_names, read_rows

PROOF_ROWS = 64
"""Held-out rows a domain on which quality is measured."""
MOST_ACTIVE = 0.25
"""Share of the latents from which on it is implausible that a token has so many active."""


class TextBatch(NamedTuple):
    """Rows of token ids, and which of them are real; both [B, S]."""

    input_ids: Tensor
    attention_mask: Tensor


class Quality(Reconstruction, Behavior):
    """How well an SAE does: the record ``quality.json``, in SAEBench's names."""

    mean_feature_norm: float
    """E |z|, which features are divided by where they route."""
    tokens: int
    """On how many tokens all this was measured."""


def held_out_batches(source: Artifact, tokenizer, max_length: int) -> list[TextBatch]:
    """Held-out rows of every domain of a domains artifact."""
    rows = []
    for name in domain_names(source):
        rows += read_rows(source / f"heldout/{name}.jsonl")[:PROOF_ROWS]
    encoded = encode_chats(tokenizer, rows, max_length)
    return [
        TextBatch(batch.input_ids, batch.attention_mask)
        for batch in batches_by_length(encoded, PROOF_ROWS, tokenizer.pad_token_id)
    ]


class Streams(NamedTuple):
    """What an SAE is measured on."""

    rows: Tensor
    """[T, sites, D], at tokens that are outliers at none of the sites."""
    largest: tuple[float, ...]
    """The norm at each site above which a token is an outlier."""


@torch.no_grad()
def streams_of(
    model: PreTrainedModel, batches: Sequence[TextBatch], sites: Sequence[int], rule: SignalTokens
) -> Streams:
    """The streams entering these layers at the tokens that training would read: those that carry a
    signal, and of them no outliers (`steerlora.lm.outliers`)."""
    streams = []
    for batch in batches:
        ids, mask = (part.to(model.device) for part in batch)
        found = residual_streams(model, ids, mask, sites)
        kept = rule(ids, mask)
        streams.append(torch.stack([found[site][kept] for site in sites], 1))
    rows = torch.cat(streams)
    norms = rows.float().norm(dim=-1)  # [T, sites]
    usual = torch.stack([usual_tokens(one) for one in norms.T]).all(0)
    return Streams(rows[usual], tuple(largest_usual_norm(one) for one in norms.T))


@torch.no_grad()
def quality(
    model: PreTrainedModel,
    sae: SparseAutoencoder,
    site: int,
    batches: Sequence[TextBatch],
    rule: SignalTokens,
) -> Quality:
    """Reconstruction, sparsity and cross-entropy recovered.

    Cross-entropy is recovered by splicing into a layer's input: no figure of it where the stream
    leaves the last layer and enters none.

    Args:
        model: the base.
        sae: on the model's device.
        site: the stream that it reads.
        batches: the text.
        rule: which tokens of it carry a signal.
    """
    sites = [site, site + sae.span] if sae.span else [site]
    streams = streams_of(model, batches, sites, rule)
    activations = streams.rows if sae.span else streams.rows[:, 0]
    norms = sae.encode(sae.read(activations)).values.norm(dim=-1)
    on_device = [tuple(part.to(model.device) for part in batch) for batch in batches]
    return {
        **sae_metrics(sae, activations),
        **ce_recovered(
            model,
            sae,
            site,
            on_device,
            signal_tokens=rule,
            largest=streams.largest[0],
            span=sae.span,
        ),
        "mean_feature_norm": float(norms.mean()),
        "tokens": len(activations),
    }


def implausible(figures: Reconstruction, latents: int) -> str | None:
    """What of an SAE's figures says that it was made for other activations; None: nothing.

    Args:
        figures: of :func:`quality`.
        latents: N.
    """
    fvu, l0 = figures["fvu"], figures["l0"]
    if not math.isfinite(fvu) or fvu >= 1:
        return f"it leaves {fvu:.3g} of the variance unexplained, which their mean alone would not"
    if l0 == 0:
        return "no latent is active on any token"
    if l0 > MOST_ACTIVE * latents:
        return f"{l0:.4g} of {latents} latents are active on a token"
    return None
