"""Held-out cross-entropy of responses: the target score of domains of real text.

B batch, S sequence, D model width, V vocabulary, R response tokens of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steerlora.data.batches import by_length, collate
from steerlora.data.chat import EncodedChat, encode_chats
from steerlora.data.conversations import Conversation

_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Config fields of models whose logits are more than the output embedding of the hidden state."""


class CrossEntropy(NamedTuple):
    """Cross-entropy of responses given their prompts."""

    per_item: list[tuple[float, int]]
    """For each row, in the order given, its summed loss in nats and its response tokens."""
    value: float
    """Nats per response token over all rows (long responses weigh more)."""
    stderr: float
    """Standard error of ``value`` over rows, as the ratio of two sums (Cochran 1977, *Sampling
    Techniques*, section 6.4); NaN for a single row."""
    cut: int = 0
    """Rows that did not fit, of which the prompt or the response lost a part."""


@torch.no_grad()
def heldout_cross_entropy(
    model: nn.Module,
    tokenizer,
    rows: Sequence[Conversation],
    *,
    batch_size: int,
    max_length: int,
) -> CrossEntropy:
    """Score the answers of ``rows``, ends of turn included and all that is asked excluded.

    Rows are sorted by length before batching, so that little of a batch is padding; a batch is
    padded on the right, and of long rows it has fewer. Where the model lets us, only positions of
    answers reach the output embedding: with a large vocabulary the logits of the prompt would be
    most of the work.

    Args:
        model: a causal language model of transformers, adapted or not; left in the mode it was in.
        tokenizer: its tokenizer, with a chat template and a padding token.
        rows: held-out conversations.
        batch_size: rows a batch at most.
        max_length: most tokens of a row; see :func:`steerlora.data.chat.encode_chats`.

    Returns:
        The losses by row, their mean by token in nats, and its standard error.
    """
    assert rows, "no rows to score"
    encoded = encode_chats(tokenizer, rows, max_length)
    per_item: dict[int, tuple[float, int]] = {}
    training = model.training
    model.eval()
    try:
        for indices in by_length(encoded, batch_size):
            batch = [encoded[index] for index in indices]
            losses = _response_losses(model, batch, tokenizer.pad_token_id)
            per_item |= zip(indices, losses, strict=True)
    finally:
        model.train(training)
    found = summarise([per_item[index] for index in range(len(rows))])
    return found._replace(cut=sum(row.prompt_cut or row.response_cut for row in encoded))


def summarise(per_item: list[tuple[float, int]]) -> CrossEntropy:
    """Mean by token and its standard error over items, from ``(nats, tokens)`` of each item."""
    tokens, items = sum(count for _, count in per_item), len(per_item)
    value = math.fsum(nats for nats, _ in per_item) / tokens
    residual = math.fsum((nats - value * count) ** 2 for nats, count in per_item)
    stderr = math.sqrt(items / (items - 1) * residual) / tokens if items > 1 else math.nan
    return CrossEntropy(per_item, value, stderr)


def _response_losses(
    model: nn.Module, rows: Sequence[EncodedChat], pad_token_id: int
) -> list[tuple[float, int]]:
    """Summed loss in nats and number of tokens of each row's answers."""
    device = next(model.parameters()).device
    batch = collate(rows, [-1] * len(rows), pad_token_id).to(device)
    labels = batch.labels[:, 1:]  # position s predicts token s + 1; token 0 has no predictor
    counted = labels >= 0  # [B, S - 1]
    logits = _logits_at(model, batch.input_ids, batch.attention_mask, counted)  # [R, V]
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    targets = labels[counted].to(logits.device)  # of a model that is spread over devices
    losses = nn.functional.cross_entropy(logits, targets, reduction="none").double().to(device)
    by_row = torch.zeros(counted.shape, dtype=torch.float64, device=device)
    by_row[counted] = losses
    return list(zip(by_row.sum(1).tolist(), counted.sum(1).tolist(), strict=True))


def _logits_at(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor
) -> Tensor:
    """Logits [R, V] at the marked ones of the first S - 1 positions."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if _is_plain_causal_lm(model):
        hidden = model.model(**inputs).last_hidden_state  # [B, S, D]
        return model.lm_head(hidden[:, :-1][positions.to(hidden.device)])
    return model(**inputs).logits[:, :-1][positions]


def _is_plain_causal_lm(model: nn.Module) -> bool:
    """Whether the logits are exactly ``lm_head(model.model(...))``, as in Qwen3 and Llama."""
    return (
        isinstance(model, PreTrainedModel)
        and model.base_model_prefix == "model"
        and isinstance(getattr(model, "lm_head", None), nn.Linear)
        and not any(getattr(model.config, name, None) for name in _LOGIT_TRANSFORMS)
    )
