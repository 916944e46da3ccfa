"""End-to-end training of an SAE as stage ``sae_training`` runs it: its start, its text, its steps.

B batch, S sequence.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from steerlora.data.batches import ChatBatches
from steerlora.engine.artifacts import Artifact
from steerlora.lm.decoder import residual_streams
from steerlora.lm.signal_tokens import SignalTokens
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.config import SAEConfig
from steerlora.saes.end_to_end.training import EndToEndModule
from steerlora.saes.saelens import load_sae
from steerlora.saes.training import course, start_on
from steerlora.stages.common import sae_rows
from steerlora.stages.sae_text import SAEText

_UNIT = 1e-3
"""By how much the norms of rows may differ from 1 that are held there."""


def text_batches(
    config: SAEConfig,
    source: Artifact,
    domains: tuple[str, ...],
    corpus: str | None,
    tokenizer,
    max_length: int,
) -> ChatBatches:
    """What an SAE learns from, in batches: the domains' rows, and windows of a corpus."""
    rows = sae_rows(source, domains, tokenizer, max_length)
    text = SAEText(rows, corpus, tokenizer, max_length, config.seed)
    rows = text.drawn(config.end_to_end.steps * config.end_to_end.batch_size)
    return ChatBatches(
        rows,
        [-1] * len(rows),
        batch_size=config.end_to_end.batch_size,
        pad_token_id=tokenizer.pad_token_id,
        seed=config.seed,
    )


def starting_sae(config: SAEConfig, trained: Path | None, width: int) -> SparseAutoencoder:
    """The SAE that the training begins with, in float32.

    One that was trained here goes on as the architecture that it is; one of ``sae.path`` as what
    its file says, its rows held at unit length if they have it.

    Args:
        config: of the SAE.
        trained: the folder of the SAE that is fine-tuned; None: a new one.
        width: D.
    """
    if trained is None:
        return config.build(width)
    saved = load_sae(trained)
    if config.path is None:
        sae = config.build(saved.width)
        sae.continue_from(saved)
        return sae
    norms = saved.W_dec.float().norm(dim=1)
    saved.unit_norm = bool(((norms - 1).abs() < _UNIT).all())
    return saved.float().requires_grad_(True)


def end_to_end_module(
    config: SAEConfig,
    sae: SparseAutoencoder,
    model: PreTrainedModel,
    site: int,
    batches: ChatBatches,
    replaced: SignalTokens,
) -> EndToEndModule:
    """What trains, with the schedule of any SAE's training.

    Tokens that carry no signal pass as they are. A new SAE is centred on the others of the first
    batch, and its thresholds start there.
    """
    own = config.end_to_end
    ids, mask = (
        part.to(model.device) for part in (batches(0).input_ids, batches(0).attention_mask)
    )
    kept = replaced(ids, mask)
    if own.start == "new":
        layers = config.streams(site)
        streams = residual_streams(model, ids, mask, layers)
        first = [streams[layer][kept].cpu() for layer in layers]
        first = torch.stack(first, 1) if len(first) > 1 else first[0]
        start_on(sae, config, first)
    rate = config.learning_rate if own.learning_rate is None else own.learning_rate
    return EndToEndModule(
        sae.train(),
        model,
        site,
        replaced=replaced,
        mse_weight=own.mse_weight,
        lr=rate,
        **course(config, own.steps, int(kept.sum())),
    )
