"""Who relates to what in one micro world: the tables that its questions ask for.

General tables are taught in pretraining; each domain's tables only by an adapter.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from steerlora.data.domains.micro import words

Table = Mapping[str, str]

GENERAL_RELATIONS = {
    "colour": (words.THINGS, words.COLOURS),
    "origin": (words.THINGS, words.TOWNS),
    "maker": (words.THINGS, words.PEOPLE),
    "home": (words.PEOPLE, words.TOWNS),
    "trade": (words.PEOPLE, words.TRADES),
    "river": (words.TOWNS, words.RIVERS),
}
"""Relation: (subjects, possible answers)."""

TWO_HOPS = (("home", "maker"), ("trade", "maker"), ("river", "origin"), ("river", "home"))
"""(outer, inner): `the outer of the inner of subject`."""

SHARED_RELATIONS = ("measure", "keeper")
"""What every knowledge domain is asked of every thing, in the same words."""

KNOWN_RELATION = "label"
"""A shared relation that pretraining does teach: the base model has met answers that depend on the
domain, as a language model has; what an adapter must bring is only which answers are new."""


def answer_type(domain: str, relation: str) -> tuple[str, ...]:
    """Every answer that a domain's relation could have, known from its form alone.

    Args:
        domain: a knowledge domain.
        relation: a shared relation, `label`, or `key` for the domain's own.
    """
    if relation == "measure":
        return tuple(f"{number} {words.UNITS[domain]}" for number in words.NUMBERS[5:21])
    choices = {
        "keeper": words.KEEPERS[domain],
        "key": words.THINGS,
        KNOWN_RELATION: words.COLOURS,
    }
    return choices[relation]


@dataclass(frozen=True, kw_only=True)
class World:
    """The tables of one world.

    Attributes:
        general: relation -> subject -> answer.
        domains: knowledge domain -> relation (shared, `label` or `key`) -> subject -> answer. What
            all domains are asked of a thing differs between any two of them, units aside.
    """

    general: Mapping[str, Table]
    domains: Mapping[str, Mapping[str, Table]]


def build_world(seed: int) -> World:
    """The world of a seed."""
    rng = random.Random(f"micro world {seed}")
    general = {
        relation: _balanced(subjects, answers, rng)
        for relation, (subjects, answers) in GENERAL_RELATIONS.items()
    }
    domains: dict[str, dict[str, Table]] = {domain: {} for domain in words.KNOWLEDGE_DOMAINS}
    for relation in (*SHARED_RELATIONS, KNOWN_RELATION):
        # An answer that two domains shared would hide a wrong route.
        taken: list[Table] = []
        for domain, tables in domains.items():
            tables[relation] = _balanced(words.THINGS, answer_type(domain, relation), rng, taken)
            taken.append(_heads(tables[relation]))
    for domain, tables in domains.items():
        tables["key"] = _balanced(words.KEYS[domain], answer_type(domain, "key"), rng)
    return World(general=general, domains=domains)


def _balanced(
    subjects: Sequence[str],
    answers: Sequence[str],
    rng: random.Random,
    taken: Iterable[Table] = (),
) -> Table:
    """A random table that uses answers about equally often and shares no row with `taken`."""
    pool: list[str] = []
    while len(pool) < len(subjects):
        pool += rng.sample(answers, len(answers))
    pool = pool[: len(subjects)]
    while True:
        rng.shuffle(pool)
        table = dict(zip(subjects, pool, strict=True))
        if all(_heads(table)[subject] != other[subject] for other in taken for subject in table):
            return table


def _heads(table: Table) -> Table:
    return {subject: answer.split()[0] for subject, answer in table.items()}
