"""What of conversations did not fit: counted, and said."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from steerlora.data.chat import EncodedChat

_log = logging.getLogger(__name__)


class Cuts(NamedTuple):
    """How many conversations are not whole.

    Attributes:
        prompts: those that lost the beginning of what comes before the last answer.
        responses: those of which the last answer lost its tail, and its end of turn.
    """

    prompts: int
    responses: int


def cuts_of(rows: Sequence[EncodedChat]) -> Cuts:
    return Cuts(sum(row.prompt_cut for row in rows), sum(row.response_cut for row in rows))


def warn_of_cuts(rows: Mapping[str, Sequence[EncodedChat]], max_length: int) -> None:
    """One warning where conversations did not fit into ``trainer.max_length``.

    Args:
        rows: {what they are: conversations}.
        max_length: tokens of a conversation at most.
    """
    found = {name: cuts_of(own) for name, own in rows.items()}
    told = [
        f"{name} {cuts.responses} and {cuts.prompts} of {len(rows[name])}"
        for name, cuts in found.items()
        if any(cuts)
    ]
    if told:
        _log.warning(
            "trainer.max_length=%d: some answers lose their tail (and do not teach where to stop), "
            "and some prompts their beginning: %s",
            max_length,
            ", ".join(told),
        )
