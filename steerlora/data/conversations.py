"""A conversation: turns of a system, a user and an assistant, and how a row of JSON holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    """What one side says.

    Attributes:
        role: one of `ROLES`.
        content: the text.
    """

    role: str
    content: str


Conversation = tuple[Turn, ...]
"""Turns in order. The last one is the assistant's, and a user's comes before it."""


def exchange(prompt: str, response: str) -> Conversation:
    """The conversation of one question and one answer."""
    return Turn("user", prompt), Turn("assistant", response)


def to_row(turns: Conversation) -> dict[str, Any]:
    """A row of a domains artifact: ``prompt`` and ``response`` if that is all, or ``messages``."""
    if tuple(turn.role for turn in turns) == ("user", "assistant"):
        return {"prompt": turns[0].content, "response": turns[1].content}
    return {"messages": [turn._asdict() for turn in turns]}


def from_row(row: Mapping[str, Any]) -> Conversation:
    """The inverse of `to_row`."""
    if "messages" in row:
        return tuple(Turn(turn["role"], turn["content"]) for turn in row["messages"])
    return exchange(row["prompt"], row["response"])
