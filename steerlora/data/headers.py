"""What of a tokenizer's text carries no signal: the header of its chat template, special tokens."""

from __future__ import annotations

from itertools import takewhile

from steerlora.data.chat import encode_chats
from steerlora.data.conversations import exchange
from steerlora.lm.signal_tokens import SignalTokens

_CONTENTS = ("apple", "Zebra", "7", "(", "é", "木")
"""Messages that share no beginning, not even a letter's form."""
_LONG_ENOUGH = 2**20
"""Tokens: no header is cut."""


def signal_tokens_of(tokenizer) -> SignalTokens:
    """The rule for text of this tokenizer.

    The template's header is what conversations of different messages have in common at their
    beginning, as token ids. With a system prompt of their own, conversations may leave the header
    earlier; what of it they share is left out all the same.

    The token that an answer follows carries a signal even where it is a special one, such as a mark
    of the answering role: from it the answer's first token is predicted, and routed.

    Args:
        tokenizer: with a chat template or without, where there is no header.

    Raises:
        UserError: the template refuses a conversation of one question and one answer.
    """
    header: tuple[int, ...] = ()
    before_answers: set[int] = set()
    if tokenizer.chat_template is not None:
        chats = [exchange(content, content) for content in _CONTENTS]
        rows = encode_chats(tokenizer, chats, _LONG_ENOUGH)
        before_answers = {row.input_ids[row.response_start - 1] for row in rows}
        columns = zip(*(row.input_ids for row in rows), strict=False)
        together = takewhile(lambda ids: len(set(ids)) == 1, columns)
        header = tuple(ids[0] for ids in together)
    # A tokenizer names few of its special tokens; the others are marked where they are added.
    marked = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    special = sorted({*tokenizer.all_special_ids, *marked} - before_answers)
    return SignalTokens(prefix=header, special=tuple(special), first=True)
