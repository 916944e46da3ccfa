"""Prompts and responses as token ids: chat template, masks of the loss, batches.

B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""Label of a token that does not enter the loss (torch's cross_entropy convention)."""


class EncodedChat(NamedTuple):
    """One conversation turn as token ids; the response is ``input_ids[response_start:]``."""

    input_ids: list[int]
    response_start: int


def encode_chat(tokenizer, prompt: str, response: str, max_length: int) -> EncodedChat:
    """Render one prompt and response through the tokenizer's chat template.

    The prompt is tokenized exactly as at generation time (with the generation prompt) and the
    response after it, end of turn included. What exceeds ``max_length`` tokens is cut from the left
    of the prompt; a response that alone exceeds it loses its tail but keeps its end of turn.
    """
    turns = [{"role": "user", "content": prompt}]
    opening = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(
        [*turns, {"role": "assistant", "content": response}], tokenize=False
    )
    # Templates that open the answer differently in training and generation: trust generation.
    closing = (
        whole[len(opening) :]
        if whole.startswith(opening)
        else response + (tokenizer.eos_token or "")
    )
    prompt_ids = tokenizer(opening, add_special_tokens=False)["input_ids"]
    response_ids = tokenizer(closing, add_special_tokens=False)["input_ids"]
    if len(response_ids) > max_length:
        response_ids = [*response_ids[: max_length - 1], response_ids[-1]]
    prompt_ids = prompt_ids[max(0, len(prompt_ids) + len(response_ids) - max_length) :]
    return EncodedChat([*prompt_ids, *response_ids], len(prompt_ids))


@dataclass(frozen=True)
class ChatBatch:
    """Right-padded conversations.

    Attributes:
        input_ids: [B, S].
        attention_mask: [B, S], 1 on real tokens.
        labels: [B, S], the token ids where the loss counts them, else ``IGNORED``.
        domains: [B], index of each row's domain; -1 where it has none.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    domains: Tensor

    def to(self, device: torch.device | str) -> ChatBatch:
        return ChatBatch(*(getattr(self, name).to(device) for name in self.__annotations__))


def collate(
    rows: Sequence[EncodedChat],
    domains: Sequence[int],
    pad_token_id: int,
    *,
    loss_on_prompt: bool = False,
) -> ChatBatch:
    """Pad ``rows`` on the right to the longest and mark where the loss counts."""
    width = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    for index, row in enumerate(rows):
        ids = torch.tensor(row.input_ids)
        start = 0 if loss_on_prompt else row.response_start
        input_ids[index, : len(ids)] = ids
        attention_mask[index, : len(ids)] = 1
        labels[index, start : len(ids)] = ids[start:]
    return ChatBatch(input_ids, attention_mask, labels, torch.tensor(list(domains)))
