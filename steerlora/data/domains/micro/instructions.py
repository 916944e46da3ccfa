"""Verifiable instructions in the manner of IFEval (Zhou et al. 2023, arXiv 2311.07911).

An instruction has an id, arguments, a wording and a response that obeys it. Ids and arguments are
checked by `steerlora.evaluation.tasks.micro.verifiers`, which shares no code with this file.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from steerlora.data.domains.micro import words
from steerlora.data.domains.micro.items import context

CONTENT = ("keywords:frequency", "order:reverse", "content:category", "length:number_words")
"""Instructions that say what to write."""

FORMAT = (
    "startend:start_word",
    "startend:end_word",
    "startend:quotation",
    "keywords:existence",
    "keywords:forbidden",
    "punctuation:comma",
)
"""Instructions that say how to write it."""

PRETRAINED = ("keywords:frequency", "content:category", "startend:start_word", "startend:quotation")
"""What the base model is taught to obey, one at a time; the rest it knows by form."""

UNTRAINED_PAIRS = frozenset(
    {
        ("keywords:frequency", "startend:end_word"),
        ("keywords:frequency", "punctuation:comma"),
        ("order:reverse", "startend:start_word"),
        ("order:reverse", "keywords:existence"),
        ("content:category", "startend:quotation"),
        ("content:category", "startend:end_word"),
        ("length:number_words", "punctuation:comma"),
        ("length:number_words", "startend:quotation"),
    }
)
"""Pairs of kinds that only the evaluation set asks for."""

TRAINED_PAIRS = tuple(
    (content, form)
    for content in CONTENT
    for form in FORMAT
    if (content, form) not in UNTRAINED_PAIRS
)

# Instructions may speak of anything, so that this domain overlaps with all the others.
WORDS = (
    *words.THINGS,
    *words.PEOPLE,
    *words.TOWNS,
    *words.COLOURS,
    *(key for keys in words.KEYS.values() for key in keys),
)


class Instruction(NamedTuple):
    """A prompt, the instructions it gives, and a response that obeys them."""

    prompt: str
    response: str
    instruction_id_list: tuple[str, ...]
    kwargs: tuple[Mapping, ...]


def single(kind: str, rng: random.Random) -> Instruction:
    """One instruction; a format instruction is given with a topic to write about."""
    if kind in CONTENT:
        return _compose(kind, None, rng)
    return _compose(None, kind, rng)


def pair(kinds: tuple[str, str], rng: random.Random) -> Instruction:
    """A content instruction and a format instruction to obey together."""
    return _compose(*kinds, rng)


def random_response(rng: random.Random) -> str:
    """A response of the right form that obeys nothing in particular."""
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 4)))


def _compose(content: str | None, form: str | None, rng: random.Random) -> Instruction:
    sentences, ids, arguments = [], [], []
    if rng.random() < 0.4:
        domain = rng.choice(words.KNOWLEDGE_DOMAINS)
        sentences.append(context(words.CONTEXTS[domain], domain, rng))
    if content:
        # The word that a format instruction adds counts among an exact number of words.
        adds = form in ("startend:start_word", "startend:end_word", "keywords:existence")
        body, given = _content(content, adds, rng)
        sentences.append(_phrase(content, given, rng))
        ids.append(content)
        arguments.append(given)
    else:
        members = words.CATEGORIES[rng.choice(tuple(words.CATEGORIES))]
        body = _following(members, rng.choice(members), 2)
        sentences.append(words.TOPIC_PHRASE.format(topic=body[0]))
    if form:
        body, given = _form(form, body, arguments, rng)
        sentences.append(_phrase(form, given, rng))
        ids.append(form)
        arguments.append(given)
    return Instruction(" ".join(sentences), " ".join(body), tuple(ids), tuple(arguments))


def _following(members: Sequence[str], first: str, count: int) -> list[str]:
    """`count` members in their usual order from `first` on: no chance in what is to be learnt."""
    start = members.index(first)
    return [members[(start + step) % len(members)] for step in range(count)]


def _phrase(kind: str, given: Mapping, rng: random.Random) -> str:
    shown = {**given, "words": " ".join(given.get("words", ()))}
    return rng.choice(words.INSTRUCTION_PHRASES[kind]).format(**shown)


def _content(kind: str, adds_word: bool, rng: random.Random) -> tuple[list[str], dict]:
    match kind:
        case "keywords:frequency":
            keyword, frequency = rng.choice(WORDS), rng.randint(2, 4)
            return [keyword] * frequency, {"keyword": keyword, "frequency": frequency}
        case "order:reverse":
            given = rng.sample(WORDS, rng.randint(2, 4))
            return given[::-1], {"words": given}
        case "content:category":
            category, number = rng.choice(tuple(words.CATEGORIES)), rng.randint(2, 3)
            members = words.CATEGORIES[category]
            given = {"category": category, "members": list(members), "number": number}
            return list(members[:number]), given
        case "length:number_words":
            number, topic = rng.randint(2, 5), rng.choice(words.THINGS)
            body = _following(words.THINGS, topic, number - adds_word)
            return body, {"number": number, "topic": topic}
    raise AssertionError(kind)


def _form(
    kind: str, body: list[str], arguments: list[dict], rng: random.Random
) -> tuple[list[str], dict]:
    # A category's other members would change its count, so added words come from elsewhere.
    barred = {*body, *(member for given in arguments for member in given.get("members", ()))}
    word = rng.choice([word for word in WORDS if word not in barred])
    match kind:
        case "startend:start_word":
            return [word, *body], {"word": word}
        case "startend:end_word":
            return [*body, word], {"word": word}
        case "keywords:existence":
            return [*body, word], {"keyword": word}
        case "keywords:forbidden":
            members = [member for given in arguments for member in given.get("members", ())]
            if not members:
                return body, {"keyword": word}
            # Bars a member that would have been named, so that obeying takes another one.
            keyword = rng.choice(body)
            kept = [member for member in members if member != keyword]
            return kept[: len(body)], {"keyword": keyword}
        case "startend:quotation":
            return ['"', *body, '"'], {}
        case "punctuation:comma":
            return " , ".join(body).split(), {}
    raise AssertionError(kind)
