"""Which conversations a method trains on, and which its training is followed on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from steerlora.config import TrainerConfig
from steerlora.data.chat import EncodedChat
from steerlora.data.cuts import cuts_of
from steerlora.engine.artifacts import Artifact
from steerlora.errors import UserError
from steerlora.stages.common import training_rows
from steerlora.training.validation import split


class RowsToLearn(NamedTuple):
    """The conversations of the training domains."""

    training: dict[str, list[EncodedChat]]
    """{domain: those that are trained on}."""
    validation: dict[str, list[EncodedChat]]
    """{domain: those that are set aside}; empty where none are."""
    cuts: dict[str, int]
    """The figures ``cut_prompts`` and ``cut_responses``: how many of all did not fit."""


def rows_to_learn(
    domains: Artifact, names: Sequence[str], tokenizer: Any, trainer: TrainerConfig
) -> RowsToLearn:
    """The conversations that a method trains on, and those that its training is followed on.

    Conversations that do not fit whole are among neither where ``trainer.drop_cut`` says so.

    Raises:
        UserError: none is left of a domain, or too few for ``trainer.validation.rows``.
    """
    found = training_rows(
        domains, names, tokenizer, trainer.max_length, last_only=trainer.last_turn_only
    )
    cuts = cuts_of(list(chain.from_iterable(found.values())))
    if trainer.drop_cut:
        found = {
            name: [row for row in rows if not (row.prompt_cut or row.response_cut)]
            for name, rows in found.items()
        }
        for name, rows in found.items():
            if not rows:
                raise UserError(
                    f"trainer.drop_cut=true leaves nothing of {name}: none of it fits whole in "
                    f"trainer.max_length={trainer.max_length}; set a larger one"
                )
    aside = {}
    if count := trainer.validation.rows:
        parts = {name: split(name, rows, count) for name, rows in found.items()}
        found = {name: part.training for name, part in parts.items()}
        aside = {name: part.validation for name, part in parts.items()}
    cut = {f"cut_{what}": number for what, number in cuts._asdict().items()}
    return RowsToLearn(found, aside, cut)
