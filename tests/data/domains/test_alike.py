"""Made-up domains: what they share, what they have of their own, and how far they can be told."""

from __future__ import annotations

import pytest

from steerlora.data.domains.micro import words
from steerlora.data.domains.micro.alike import (
    COMMON,
    MOST_DOMAINS,
    OWN,
    AlikeDomains,
    best_accuracy,
)


def sentences_of(prompt: str, among) -> int:
    """How many sentences of a prompt are made of one of these (source, sentence)."""
    parts = [part.split() for part in prompt.split(" . ")[:-1]]
    patterns = [one.removesuffix(" .").split() for _, one in among]

    def made_of(part, pattern) -> bool:
        return len(part) == len(pattern) and all(
            slot.startswith("{") or slot == word for slot, word in zip(pattern, part, strict=True)
        )

    return sum(any(made_of(part, pattern) for pattern in patterns) for part in parts)


def test_sentences_are_dealt_out_once():
    made = AlikeDomains(3)
    dealt = [one for own in (*made.own, made.common) for one in own]
    assert len(made.own) == MOST_DOMAINS == 16
    assert {len(own) for own in made.own} == {OWN}
    assert len(made.common) == COMMON
    assert sorted(dealt) == sorted((d, one) for d, own in words.CONTEXTS.items() for one in own)
    assert AlikeDomains(3).own == made.own != AlikeDomains(4).own


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_so_many_sentences_are_shared_as_asked(shared):
    made = AlikeDomains(0)
    prompts = made.prompts(5, 300, sentences=3, shared=shared, seed=1)
    common = sum(sentences_of(prompt, made.common) for prompt in prompts)
    own = sum(sentences_of(prompt, made.own[5]) for prompt in prompts)
    assert own / 900 == pytest.approx(1 - shared, abs=0.06)
    assert common / 900 == pytest.approx(shared, abs=0.06)
    assert set(" ".join(prompts).split()) <= set(words.vocabulary())


def test_the_same_seed_gives_the_same_prompts_and_domains_differ():
    made = AlikeDomains(0)
    wording = {"sentences": 2, "shared": 0.5}
    one = made.prompts(0, 20, **wording, seed=1)
    assert one == made.prompts(0, 20, **wording, seed=1)
    assert one != made.prompts(0, 20, **wording, seed=2)
    assert one != made.prompts(1, 20, **wording, seed=1)
    assert one[:5] == made.prompts(0, 5, **wording, seed=1)  # fewer are the first of more


def test_the_most_that_can_be_reached():
    assert best_accuracy(8, 3, 0.0) == 1
    assert best_accuracy(8, 3, 1.0) == 1 / 8
    # Of two domains and one sentence: half of the texts have it and are known, half are guessed.
    assert best_accuracy(2, 1, 0.5) == 0.75
