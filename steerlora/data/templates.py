"""What a chat template makes of conversations: the text that asks, and the text that answers.

A template is a program that comes with the model. Where it puts an answer, and what ends a turn, is
found by rendering texts that no template holds (`_PROBE`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from steerlora.data.conversations import Conversation, Turn
from steerlora.errors import UserError

_PROBE = "qzprobeqz"

Messages = list[dict[str, str]]
"""A conversation as transformers takes it."""


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        opening: all before the last answer, exactly as at generation.
        closing: the last answer, up to its end of turn.
        earlier: where in ``opening`` the answers before it stand, each with its end of turn, as
            (first character, one after the last).
    """

    opening: str
    closing: str
    earlier: tuple[tuple[int, int], ...] = ()


def render(tokenizer, rows: Sequence[Conversation], *, last_only: bool = False) -> list[Rendered]:
    """Conversations through the tokenizer's chat template.

    Where the template has no place for a system prompt (Gemma 2's refuses one), the prompt is put
    before the next turn of the user, with a blank line between them.

    Args:
        tokenizer: with a chat template.
        rows: the conversations.
        last_only: do not look for the answers before the last.

    Raises:
        UserError: the template refuses a conversation, or does not show an answer of it.
    """
    if any(turn.role == "system" for turns in rows for turn in turns) and not _has_system(
        tokenizer
    ):
        rows = [_folded(turns) for turns in rows]
    whole = [[{"role": role, "content": content} for role, content in turns] for turns in rows]
    asked = [messages[:-1] for messages in whole]
    openings = _apply(tokenizer, asked, add_generation_prompt=True)
    end = end_of_turn(tokenizer)
    closings = [
        _closing(opening, text, messages[-1]["content"], end)
        for opening, text, messages in zip(openings, _apply(tokenizer, whole), whole, strict=True)
    ]
    earlier: dict[int, tuple[tuple[int, int], ...]] = {}
    if not last_only:
        earlier = _earlier(tokenizer, asked, openings, end)
    return [
        Rendered(opening, closing, earlier.get(index, ()))
        for index, (opening, closing) in enumerate(zip(openings, closings, strict=True))
    ]


def end_of_turn(tokenizer) -> str:
    """What the template writes after an answer, up to and with the token that ends the turn.

    That is the first added token of the tokenizer there, such as ``<|im_end|>``, ``<|eot_id|>`` or
    ``<end_of_turn>``, whatever its end of text is called. A template that writes none there ends a
    turn with the text that it does write, and one that writes nothing with the end of text.
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    (text,) = _apply(tokenizer, [messages])
    after = text.rpartition(_PROBE)[2]
    # White space is an added token of some tokenizers, and ends nothing.
    tokens = sorted(filter(str.strip, tokenizer.added_tokens_encoder), key=len, reverse=True)
    found = re.search("|".join(map(re.escape, tokens)), after) if tokens else None
    return after[: found.end()] if found else after.rstrip() or tokenizer.eos_token or ""


def _closing(opening: str, whole: str, response: str, end: str) -> str:
    if not whole.startswith(opening):
        # Templates that open the answer differently in training and generation: trust generation.
        return response + end
    closing = whole[len(opening) :]
    if end not in closing:
        return closing.rstrip() + end
    return closing[: closing.rindex(end) + len(end)]  # templates may go on after it


def _earlier(
    tokenizer, asked: Sequence[Messages], openings: Sequence[str], end: str
) -> dict[int, tuple[tuple[int, int], ...]]:
    """{index of a conversation: where its answers stand in its opening}, of those that have any.

    Answers are replaced by probes, so that what stands between them is known, and with it where
    each of them begins and ends, also where the template changes its white space.
    """
    places = {
        index: [place for place, turn in enumerate(messages) if turn["role"] == "assistant"]
        for index, messages in enumerate(asked)
        if len(messages) > 1
    }
    places = {index: own for index, own in places.items() if own}
    marked = [
        [turn | {"content": _mark(p)} if p in own else turn for p, turn in enumerate(asked[index])]
        for index, own in places.items()
    ]
    texts = _apply(tokenizer, marked, add_generation_prompt=True) if marked else []
    found = {}
    for (index, own), text in zip(places.items(), texts, strict=True):
        spans = _between(openings[index], text, [_mark(place) for place in own], end)
        if spans is None:
            raise UserError(
                "the model's chat template does not show every answer of "
                f"{_told(index, asked[index])}: split it into conversations of one answer each"
            )
        found[index] = spans
    return found


def _mark(place: int) -> str:
    return f"({place}{_PROBE})"


def _between(
    text: str, marked: str, marks: Sequence[str], end: str
) -> tuple[tuple[int, int], ...] | None:
    """What stands in ``text`` where ``marked`` has its marks, with an end of turn that follows.

    None where the two do not agree on the rest.
    """
    pieces = []
    for mark in marks:
        piece, found, marked = marked.partition(mark)
        if not found:
            return None
        pieces.append(piece)
    if not text.startswith(pieces[0]) or not text.endswith(marked):
        return None
    spans, start = [], len(pieces[0])
    for piece in (*pieces[1:], None):
        stop = len(text) - len(marked) if piece is None else text.find(piece, start)
        if stop < start:
            return None
        spans.append((start, stop + len(end) if text.startswith(end, stop) else stop))
        start = stop + len(piece or "")
    return tuple(spans)


def _has_system(tokenizer) -> bool:
    """Whether the template has a place for a system prompt."""
    messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "?"}]
    try:
        return _PROBE in tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:
        return False


def _folded(turns: Conversation) -> Conversation:
    """``turns`` with each system prompt in front of the user's turn that comes next."""
    folded: list[Turn] = []
    system: list[str] = []
    for turn in turns:
        if turn.role == "system":
            system.append(turn.content)
        elif turn.role == "user":
            folded.append(Turn("user", "\n\n".join([*system, turn.content])))
            system = []
        else:
            folded += [Turn("user", text) for text in system]  # nothing of the user's comes next
            folded.append(turn)
            system = []
    return tuple(folded)


def _apply(tokenizer, conversations: Sequence[Messages], **how: Any) -> list[str]:
    """The template's text of each conversation.

    Raises:
        UserError: it refuses one.
    """
    try:
        return tokenizer.apply_chat_template(conversations, tokenize=False, **how)
    except TemplateError:
        for index, messages in enumerate(conversations):
            try:
                tokenizer.apply_chat_template(messages, tokenize=False, **how)
            except TemplateError as error:
                raise UserError(
                    f"the model's chat template refuses {_told(index, messages)}: {error}"
                ) from error
        raise


def _told(index: int, messages: Messages) -> str:
    """How messages name a conversation."""
    roles = ", ".join(turn["role"] for turn in messages)
    beginning = " ".join(messages[0]["content"].split())[:40]
    return f"conversation {index + 1} ({roles}: {beginning!r})"
