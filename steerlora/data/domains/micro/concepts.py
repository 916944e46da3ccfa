"""Concepts of the micro world: texts that are labelled by them, prompts that could bring any of
them, and exact rules of what an answer has.

A concept is what AxBench calls one (Wu et al. 2025, arXiv 2501.17148): something that a text may
speak of. There are three families.

- A *relation*, such as the colour of things. Texts are questions of it, behind a sentence of some
  domain. Prompts ask to tell about a thing or a person, of which several relations are known.
- A *domain*. Texts are its questions behind its own context. Prompts ask what every domain is
  asked, behind a sentence that belongs to none.
- A *category*, such as towns. Texts write about its members. Prompts ask to write about something
  else, in a form that can be checked.

Labelled texts and prompts share no prompt.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from steerlora.data.domains.micro import items, words
from steerlora.data.domains.micro.items import Fact
from steerlora.data.domains.micro.world import (
    GENERAL_RELATIONS,
    KNOWN_RELATION,
    SHARED_RELATIONS,
    World,
    answer_type,
)

RELATIONS = ("colour", "origin", "maker", "home", "trade")
"""Those of subjects that have several."""
CATEGORIES = tuple(words.CATEGORIES)
CONCEPTS = (*RELATIONS, *words.KNOWLEDGE_DOMAINS, *CATEGORIES)
START, QUOTES = FORMS = ("startend:start_word", "startend:quotation")
"""Forms that pretraining teaches."""
MARKS = frozenset(words.MARKS)
BEST = 2
"""The highest grade of a rule; 0 is the lowest."""


class LabelledText(NamedTuple):
    """A question and its answer, which speak of a concept."""

    prompt: str
    response: str
    concept: str


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What an unsteered model answers without the concept, or with it by chance."""

    text: str
    natural: str
    """A prompt of the same form that a fluent answer with the concept would follow; for what a
    concept alone does not change, ``text`` itself."""
    concept: str
    asks: str
    """"statement", a relation of a domain, or one of `FORMS`."""
    about: str
    """The subject, or of a form the word that is asked for."""


def world_of(tables: dict) -> World:
    """The world that a domains artifact holds as ``world.json``."""
    return World(general=tables["general"], domains=tables["domains"])


def labelled_texts(
    world: World, concepts: Sequence[str], each: int, seed: int
) -> list[LabelledText]:
    """So many different texts of each concept, concept after concept."""
    found = []
    for concept in concepts:
        rng, own = random.Random(f"texts {concept} {seed}"), {}
        while len(own) < each:
            text = _text(world, concept, rng)
            own[text.prompt] = text
        found += own.values()
    return found


def _text(world: World, concept: str, rng: random.Random) -> LabelledText:
    if concept in RELATIONS:
        table = world.general[concept]
        subject = rng.choice(tuple(table))
        fact = Fact(concept, subject, table[subject], GENERAL_RELATIONS[concept][1])
        return LabelledText(*items.question_in_context(fact, rng), concept)
    if concept in words.KNOWLEDGE_DOMAINS:
        known = rng.random() < 0.5
        facts = items.known_facts if known else items.domain_facts
        fact = rng.choice(facts(world, concept))
        return LabelledText(
            *items.domain_question(fact, concept, rng, form_only=not known), concept
        )
    topic = rng.choice(words.CATEGORIES[concept])
    return LabelledText(*_written(topic, rng.choice(FORMS), rng), concept)


def _written(topic: str, form: str, rng: random.Random, word: str | None = None) -> tuple[str, str]:
    """(prompt, answer) that writes about a topic in a form, behind a sentence of any domain."""
    members = next(own for own in words.CATEGORIES.values() if topic in own)
    body = f"{topic} {members[(members.index(topic) + 1) % len(members)]}"
    word = word or _other_word(rng, members)
    asked, answer = {
        START: (
            words.INSTRUCTION_PHRASES[START][0].format(keyword=word, word=word),
            f"{word} {body}",
        ),
        QUOTES: (words.INSTRUCTION_PHRASES[QUOTES][0], f'" {body} "'),
    }[form]
    domain = rng.choice(words.KNOWLEDGE_DOMAINS)
    before = items.context(words.CONTEXTS[domain], domain, rng)
    return f"{before} {words.TOPIC_PHRASE.format(topic=topic)} {asked}", answer


def _other_word(rng: random.Random, *barred: Iterable[str]) -> str:
    taken = {word for own in barred for word in own}
    every = sorted({word for own in words.CATEGORIES.values() for word in own} - taken)
    return rng.choice(every)


def prompts(world: World, concept: str, count: int, seed: int) -> list[Prompt]:
    """So many different prompts for a concept."""
    rng, found = random.Random(f"prompts {concept} {seed}"), {}
    while len(found) < count:
        one = _prompt(world, concept, rng)
        found[one.text] = one
    return list(found.values())


def _prompt(world: World, concept: str, rng: random.Random) -> Prompt:
    neutral = items.context(words.NEUTRAL_CONTEXTS, None, rng)
    if concept in RELATIONS:
        subject = rng.choice(tuple(world.general[concept]))
        text = f"{neutral} {words.STATEMENTS[1].format(subject=subject)}"
        return Prompt(text=text, natural=text, concept=concept, asks="statement", about=subject)
    if concept in words.KNOWLEDGE_DOMAINS:
        relation = rng.choice((*SHARED_RELATIONS, KNOWN_RELATION))
        thing = rng.choice(words.THINGS)
        asked = rng.choice(words.QUESTIONS).format(relation=relation, subject=thing)
        own = items.context(words.CONTEXTS[concept], concept, rng)
        return Prompt(
            text=f"{neutral} {asked}",
            natural=f"{own} {asked}",
            concept=concept,
            asks=relation,
            about=thing,
        )
    members, form = words.CATEGORIES[concept], rng.choice(FORMS)
    topic = _other_word(rng, members)
    others = next(own for own in words.CATEGORIES.values() if topic in own)
    word = _other_word(rng, members, others)
    state = rng.getstate()
    text, _ = _written(topic, form, rng, word)
    rng.setstate(state)  # the same sentence before it
    natural, _ = _written(rng.choice(members), form, rng, word)
    return Prompt(text=text, natural=natural, concept=concept, asks=form, about=word)


def concept_grade(world: World, prompt: Prompt, answer: str) -> int:
    """2 where at least half of an answer has the concept, 1 where some of it has, else 0.

    Halves are of the sentences of a statement, and of the words of other answers, numbers and the
    word that a form asks for left out.
    """
    if prompt.asks == "statement":
        marked = {prompt.concept, *GENERAL_RELATIONS[prompt.concept][1]}
        parts = [part.split() for part in answer.split(".") if part.strip()]
        return _grade([bool(marked & set(part)) for part in parts])
    said = [word for word in answer.split() if word not in MARKS and word not in words.NUMBERS]
    if prompt.asks == START and said[:1] == [prompt.about]:
        said = said[1:]
    if prompt.asks in FORMS:
        marked = set(words.CATEGORIES[prompt.concept])
    elif prompt.asks == KNOWN_RELATION:
        marked = {world.domains[prompt.concept][KNOWN_RELATION][prompt.about]}
    elif prompt.asks == "measure":
        marked = {words.UNITS[prompt.concept]}
    else:
        marked = set(words.KEEPERS[prompt.concept])
    return _grade([word in marked for word in said])


def _grade(has: Sequence[bool]) -> int:
    return 0 if not any(has) else BEST if 2 * sum(has) >= len(has) else 1


def instruction_grade(world: World, prompt: Prompt, answer: str) -> int:
    """2 where an answer does what was asked, 1 where it does so in part, else 0.

    A statement is one sentence, and true of the subject; in part: it names the subject. An answer
    to a domain's question is an answer that some domain has, and nothing more; in part: it has one.
    A form is kept; in part: its word, or a quotation mark, is there.
    """
    said = answer.split()
    if prompt.asks == "statement":
        true = {
            words.STATEMENTS[0].format(
                relation=relation, subject=prompt.about, answer=table[prompt.about]
            )
            for relation, table in world.general.items()
            if prompt.about in table
        }
        return BEST if answer.strip() in true else int(prompt.about in said)
    if prompt.asks == START:
        return BEST if said[:1] == [prompt.about] and len(said) > 1 else int(prompt.about in said)
    if prompt.asks == QUOTES:
        whole = len(said) > 2 and said[0] == said[-1] == '"' and said.count('"') == 2
        return BEST if whole else int('"' in said)
    every = {one for domain in words.KNOWLEDGE_DOMAINS for one in answer_type(domain, prompt.asks)}
    heads = {one.split()[-1] for one in every}  # of a measure, the unit
    return BEST if answer.strip() in every else int(bool(heads & set(said)))


def repeats(answer: str) -> bool:
    """Whether a word comes three times in a row, or is more than half of four words or more."""
    said = answer.split()
    thrice = any(a == b == c for a, b, c in zip(said, said[1:], said[2:], strict=False))
    return thrice or (len(said) > 3 and any(2 * said.count(word) > len(said) for word in said))
