"""Conversations as token ids, as much of them as fits."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from steerlora.data.conversations import Conversation, exchange
from steerlora.data.templates import render


class EncodedChat(NamedTuple):
    """A conversation as token ids; its last answer is ``input_ids[response_start:]``.

    Attributes:
        input_ids: all of it, or as much as fits.
        response_start: number of tokens before the last answer.
        earlier: the answers before the last that the loss counts, as (first token, one after the
            last).
        prompt_cut: whether what comes before the last answer lost its beginning.
        response_cut: whether the last answer lost its tail, and with it its end of turn.
    """

    input_ids: list[int]
    response_start: int
    earlier: tuple[tuple[int, int], ...] = ()
    prompt_cut: bool = False
    response_cut: bool = False

    @property
    def answers(self) -> tuple[tuple[int, int], ...]:
        """Everything that the loss counts, as (first token, one after the last)."""
        return (*self.earlier, (self.response_start, len(self.input_ids)))


def encode_chat(tokenizer, prompt: str, response: str, max_length: int) -> EncodedChat:
    """One question and its answer, by :func:`encode_chats`."""
    return encode_chats(tokenizer, [exchange(prompt, response)], max_length)[0]


def encode_chats(
    tokenizer, rows: Sequence[Conversation], max_length: int, *, last_only: bool = False
) -> list[EncodedChat]:
    """Render conversations through the tokenizer's chat template.

    What comes before the last answer is tokenized exactly as at generation time (with the
    generation prompt) and the answer after it, up to its end of turn. Where both exceed
    ``max_length`` tokens, the answer loses its tail, its end of turn included, until half is left
    to what comes before; and that loses its beginning, and with it the loss of earlier answers.

    Args:
        tokenizer: with a chat template.
        rows: the conversations.
        max_length: tokens of a conversation at most.
        last_only: only the last answer of a conversation is to be learnt.

    Raises:
        UserError: as :func:`steerlora.data.templates.render`.
    """
    if not rows:
        return []
    rendered = render(tokenizer, rows, last_only=last_only)
    prompts = tokenizer(
        [row.opening for row in rendered],
        add_special_tokens=False,
        return_offsets_mapping=any(row.earlier for row in rendered),
    )
    responses = tokenizer([row.closing for row in rendered], add_special_tokens=False)["input_ids"]
    encoded = []
    for index, (row, response_ids) in enumerate(zip(rendered, responses, strict=True)):
        earlier = []
        if row.earlier:
            earlier = _tokens_of(row.earlier, prompts["offset_mapping"][index])
        encoded.append(_fitted(prompts["input_ids"][index], response_ids, earlier, max_length))
    return encoded


def _tokens_of(
    spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Spans of characters as spans of the tokens that end in them.

    Args:
        spans: (first character, one after the last), in order.
        offsets: the same of every token.
    """
    ends = [end for _, end in offsets]
    found = ((bisect_right(ends, first), bisect_right(ends, stop)) for first, stop in spans)
    return [(first, stop) for first, stop in found if first < stop]


def _fitted(
    prompt: list[int], response: list[int], earlier: list[tuple[int, int]], max_length: int
) -> EncodedChat:
    room = max_length - min(len(prompt), max_length // 2)
    kept = response[:room]
    lost = max(0, len(prompt) + len(kept) - max_length)
    return EncodedChat(
        [*prompt[lost:], *kept],
        len(prompt) - lost,
        # A token without one before it is not predicted.
        tuple([(first - lost, stop - lost) for first, stop in earlier if first > lost]),
        lost > 0,
        len(kept) < len(response),
    )
