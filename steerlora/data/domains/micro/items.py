"""Questions of one world: general facts, two hops, word problems, and the knowledge domains.

Every function draws one item from its random generator; sets that must not meet are kept apart by
`steerlora.data.domains.micro.writer`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from steerlora.data.domains.micro import words
from steerlora.data.domains.micro.world import (
    GENERAL_RELATIONS,
    KNOWN_RELATION,
    SHARED_RELATIONS,
    TWO_HOPS,
    World,
    answer_type,
)


class Item(NamedTuple):
    """A prompt and its right response (of the right type only, where form alone is taught)."""

    prompt: str
    response: str


class ChoiceItem(NamedTuple):
    """A question that lists its options; `answer` is the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int

    def item(self) -> Item:
        """The same as prompt and response."""
        return Item(self.prompt, self.choices[self.answer])


class Fact(NamedTuple):
    """A question's parts, its answer, and every answer of its type."""

    relation: str
    subject: str
    answer: str
    answers: tuple[str, ...]


def general_facts(world: World) -> list[Fact]:
    """All one-hop facts."""
    return [
        Fact(relation, subject, world.general[relation][subject], answers)
        for relation, (subjects, answers) in GENERAL_RELATIONS.items()
        for subject in subjects
    ]


def two_hop_facts(world: World) -> list[Fact]:
    """All two-hop facts, such as the home of the maker of a thing."""
    return [
        Fact(
            outer,
            f"the {inner} of {subject}",
            world.general[outer][world.general[inner][subject]],
            GENERAL_RELATIONS[outer][1],
        )
        for outer, inner in TWO_HOPS
        for subject in GENERAL_RELATIONS[inner][0]
    ]


def question(fact: Fact, rng: random.Random) -> Item:
    """A fact asked plainly."""
    template = rng.choice(words.QUESTIONS)
    return Item(template.format(relation=fact.relation, subject=fact.subject), fact.answer)


def question_in_context(fact: Fact, rng: random.Random) -> Item:
    """A general fact asked behind a sentence of some domain, which does not change its answer."""
    domain = rng.choice(words.KNOWLEDGE_DOMAINS)
    item = question(fact, rng)
    return Item(f"{context(words.CONTEXTS[domain], domain, rng)} {item.prompt}", item.response)


def statement(fact: Fact, rng: random.Random) -> Item:
    """A fact told on request."""
    told, request = words.STATEMENTS
    subject = fact.subject
    return Item(
        request.format(subject=subject),
        told.format(relation=fact.relation, subject=subject, answer=fact.answer),
    )


def choice(fact: Fact, count: int, rng: random.Random) -> ChoiceItem:
    """A fact asked with `count` options of the right type."""
    wrong = rng.sample([answer for answer in fact.answers if answer != fact.answer], count - 1)
    options = [fact.answer, *wrong]
    rng.shuffle(options)
    prompt = words.OPTIONS.format(question=question(fact, rng).prompt, options=" ".join(options))
    return ChoiceItem(prompt, tuple(options), options.index(fact.answer))


def problem(rng: random.Random) -> Item:
    """A word problem of two additions or subtractions; the response shows the step between."""
    kind = rng.randrange(len(words.PROBLEMS))
    while True:
        a, b, c = (rng.randint(1, 9) for _ in range(3))
        step, answer = ((a + b, a + b - c), (a - b, a - b + c), (a + b, a + a + b))[kind]
        if step >= 0 and answer >= 0:
            break
    p, q = rng.sample(words.PEOPLE, 2)
    thing = rng.choice(words.THINGS)
    prompt = words.PROBLEMS[kind].format(p=p, q=q, thing=thing, a=a, b=b, c=c)
    return Item(prompt, words.SOLUTION.format(step=step, answer=answer))


def context(templates: Sequence[str], domain: str | None, rng: random.Random) -> str:
    """One sentence of context, its slots filled with shared entities (and the domain's keys)."""
    draw = {
        "thing": words.THINGS,
        "person": words.PEOPLE,
        "town": words.TOWNS,
        "colour": words.COLOURS,
        "number": words.NUMBERS,
        "key": words.KEYS.get(domain or "", ()),
    }
    filled = [
        rng.choice(draw[word[1:-1]]) if word.startswith("{") else word
        for word in rng.choice(templates).split()
    ]
    return " ".join(filled)


def domain_facts(world: World, domain: str) -> list[Fact]:
    """All that a knowledge domain teaches: shared relations, its keys, and both composed."""
    tables = world.domains[domain]
    facts = [
        Fact(relation, thing, tables[relation][thing], answer_type(domain, relation))
        for relation in SHARED_RELATIONS
        for thing in words.THINGS
    ]
    for key in words.KEYS[domain]:
        phrase = words.KEY_PHRASES[domain].format(key=key)
        thing = tables["key"][key]
        facts.append(Fact("key", phrase, thing, answer_type(domain, "key")))
        measure = tables["measure"][thing]
        facts.append(Fact("measure", phrase, measure, answer_type(domain, "measure")))
    return facts


def known_facts(world: World, domain: str) -> list[Fact]:
    """What pretraining does teach of a domain."""
    table = world.domains[domain][KNOWN_RELATION]
    answers = answer_type(domain, KNOWN_RELATION)
    return [Fact(KNOWN_RELATION, thing, table[thing], answers) for thing in words.THINGS]


def domain_question(
    fact: Fact, domain: str, rng: random.Random, *, form_only: bool = False
) -> Item:
    """A domain's question behind one or two sentences of context, which alone name the domain.

    Args:
        fact: one of `domain_facts` or `known_facts`.
        domain: its domain.
        rng: draws context and wording.
        form_only: answer at random from the answer type, as pretraining does.
    """
    sentences = [context(words.CONTEXTS[domain], domain, rng)]
    if rng.random() < 0.3:
        sentences.append(context(words.CONTEXTS[domain], domain, rng))
    elif rng.random() < 0.5:
        sentences.append(context(words.NEUTRAL_CONTEXTS, None, rng))
    rng.shuffle(sentences)
    asked = f"{fact.subject} ?" if fact.relation == "key" else question(fact, rng).prompt
    response = rng.choice(fact.answers) if form_only else fact.answer
    return Item(" ".join([*sentences, asked]), response)
