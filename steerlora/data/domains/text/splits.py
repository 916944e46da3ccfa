"""Which row goes where: held out, pretraining or training, and no prompt in two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from steerlora.data.domains.text.rows import SourceRow


class HeldOut(NamedTuple):
    """The held-out rows of a domain, where they come from, the prompts kept from training."""

    rows: list[SourceRow]
    origin: str
    keys: set[bytes]


@dataclass
class DomainCounts:
    """What became of the rows of one domain.

    Attributes:
        heldout_from: where the held-out rows come from: a file, or a split.
        heldout: held-out rows written.
        pretraining: rows written to ``pretrain.jsonl``.
        adaptation: rows written to ``train/<domain>.jsonl``.
        held_out_prompt: training rows left out because a prompt of theirs is a held-out or test
            prompt.
        repeated: training rows left out because an earlier row asks the same.
        blank: training rows left out because a turn of theirs is blank, or none is answered.
        shortened: of the rows written, those of which a prompt lost its middle.
    """

    heldout_from: str
    heldout: int
    pretraining: int = 0
    adaptation: int = 0
    held_out_prompt: int = 0
    repeated: int = 0
    blank: int = 0
    shortened: int = 0


def first_of_each(rows: Iterable[SourceRow], keys: set[bytes]) -> Iterator[SourceRow]:
    """Usable ``rows`` without repeated prompts; ``keys`` fills up with the prompts seen."""
    for row in rows:
        if not row.turns:
            continue
        key = prompt_key(row.prompt)
        if key not in keys:
            keys.add(key)
            yield row


def training_rows(
    rows: Iterable[SourceRow],
    reserved: set[bytes],
    counts: DomainCounts,
    shown: Callable[[str], str] = str,
) -> Iterator[SourceRow]:
    """The usable rows that are neither held out nor repeated; the others are counted.

    Args:
        rows: of a training file or split.
        reserved: keys of held-out prompts, of every domain.
        counts: where the others are counted.
        shown: what a model is shown of a prompt; that must not be held out either.
    """
    seen: set[bytes] = set()
    for row in rows:
        if not row.turns:
            counts.blank += 1
            continue
        question = prompt_key("\n".join([row.task, *(turn.content for turn in row.turns[:-1])]))
        keys = {prompt_key(text) for prompt in row.prompts for text in (prompt, shown(prompt))}
        if keys & reserved:
            counts.held_out_prompt += 1
        elif question in seen:
            counts.repeated += 1
        else:
            seen.add(question)
            yield row


def prompt_key(prompt: str) -> bytes:
    """A digest that prompts share when they differ in case and white space only."""
    return hashlib.blake2b(" ".join(prompt.split()).casefold().encode(), digest_size=16).digest()


def uniform(prompt: str, seed: int, purpose: str) -> float:
    """A number in [0, 1) that depends on the prompt, the seed and the purpose only."""
    key = f"{purpose}:{seed}:".encode() + prompt_key(prompt)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
