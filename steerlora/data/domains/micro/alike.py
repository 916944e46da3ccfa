"""Made-up domains that speak alike: ways of speaking of their own, and ways that all of them share.

They are for telling text apart, not for learning: a prompt has no answer.
"""

from __future__ import annotations

import random

from steerlora.data.domains.micro import words
from steerlora.data.domains.micro.items import context
from steerlora.data.domains.micro.world import SHARED_RELATIONS

OWN = 2
"""Sentences, with slots, that only one domain speaks in."""
COMMON = 8
"""Sentences that all of them speak in."""
MOST_DOMAINS = (sum(map(len, words.CONTEXTS.values())) - COMMON) // OWN


class AlikeDomains:
    """Domains dealt out of the sentences of the knowledge domains, which the base has read.

    Args:
        seed: deals out the sentences.
    """

    def __init__(self, seed: int) -> None:
        pool = [(domain, one) for domain, own in words.CONTEXTS.items() for one in own]
        random.Random(f"alike domains {seed}").shuffle(pool)
        self.common, dealt = pool[:COMMON], pool[COMMON:]
        self.own = [dealt[place : place + OWN] for place in range(0, OWN * MOST_DOMAINS, OWN)]

    def prompts(
        self, domain: int, count: int, *, sentences: int, shared: float, seed: int
    ) -> list[str]:
        """So many prompts of a domain: sentences, then a question as every domain asks it.

        Args:
            domain: from 0 and below `MOST_DOMAINS`.
            count: of prompts.
            sentences: before the question.
            shared: probability of each sentence that it is one of those which all domains share.
            seed: draws the sentences and fills their slots.
        """
        rng = random.Random(f"alike domain {domain} {seed}")
        return [self._prompt(domain, sentences, shared, rng) for _ in range(count)]

    def _prompt(self, domain: int, sentences: int, shared: float, rng: random.Random) -> str:
        told = []
        for _ in range(sentences):
            source, sentence = rng.choice(
                self.common if rng.random() < shared else self.own[domain]
            )
            told.append(context([sentence], source, rng))
        relation, subject = rng.choice(SHARED_RELATIONS), rng.choice(words.THINGS)
        asked = rng.choice(words.QUESTIONS).format(relation=relation, subject=subject)
        return " ".join([*told, asked])


def best_accuracy(domains: int, sentences: int, shared: float) -> float:
    """Of whoever knows every sentence: a prompt without one of its domain's own is a guess."""
    return 1 - shared**sentences * (1 - 1 / domains)
