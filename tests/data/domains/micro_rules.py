"""What is right, worked out from a prompt's text and the world's tables alone.

Evaluation answers are proven with these rules. They read the prompt as its reader does and know
nothing of how it was made; instructions have their verifiers beside their lm-eval task.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

from steerlora.data.domains.micro import words

_ASKED = re.compile(r"(?:what is|tell me|find) the (\w+) of (.+?) [?.](?: options : (.+) \.)?$")
_KEY = {
    domain: re.compile(phrase.replace("{key}", r"(\w+)") + r"(?: \?)?$")
    for domain, phrase in words.KEY_PHRASES.items()
}
_EVENT = re.compile(
    r"(?P<who>\w+) has (?P<has>\d+) (?P<more>more than (?P<whom>\w+)|\w+) \."
    r"|gets (?P<gets>\d+) more|gives (?P<gives>\d+) to \w+"
)


def answer(prompt: str, tables: Mapping) -> str:
    """The answer to a general question, a word problem or a domain's question.

    Args:
        prompt: its text, as in an evaluation row.
        tables: `world.json`: `general` and `domains`.

    Returns:
        The answer; for a word problem only its final number.

    Raises:
        ValueError: the prompt asks nothing that these rules know, or lists no right option.
    """
    if "how many" in prompt:
        return _count(prompt)
    sentences = re.split(r"(?<= [.?]) ", prompt)
    if "options :" in prompt:
        sentences[-2:] = [" ".join(sentences[-2:])]
    domain = domain_of(" ".join(sentences[:-1])) if len(sentences) > 1 else None
    asked = sentences[-1]
    found = _ASKED.search(asked)
    if found is None:
        return _subject(asked, domain, tables)
    relation, phrase, options = found.groups()
    subject = _subject(phrase, domain, tables)
    # A general fact is the same behind any domain's context.
    general = relation in tables["general"] or domain is None
    source = tables["general"] if general else tables["domains"][domain]
    result = source[relation][subject]
    if options and options.split().count(result) != 1:
        raise ValueError(f"{result!r} is not exactly one of the options: {prompt}")
    return result


def domain_of(text: str) -> str | None:
    """The knowledge domain whose own words a context uses; None where none does.

    Raises:
        ValueError: two domains' own words meet.
    """
    used = set(text.split())
    found = [domain for domain in words.KNOWLEDGE_DOMAINS if used & exclusive_words(domain)]
    if len(found) > 1:
        raise ValueError(f"{' and '.join(found)} meet in: {text}")
    return found[0] if found else None


@cache
def exclusive_words(domain: str) -> frozenset[str]:
    """The words of a domain's contexts, with its keys, that nothing outside the domain uses."""
    phrases = (phrase for choices in words.INSTRUCTION_PHRASES.values() for phrase in choices)
    general = (
        *words.NEUTRAL_CONTEXTS,
        *words.QUESTIONS,
        *words.STATEMENTS,
        words.OPTIONS,
        *words.PROBLEMS,
        *phrases,
    )
    common = _context_words(general) | frozenset(words.RELATIONS)
    for other in words.KNOWLEDGE_DOMAINS:
        if other != domain:
            common |= _context_words(words.CONTEXTS[other]) | frozenset(words.KEYS[other])
    return (_context_words(words.CONTEXTS[domain]) | frozenset(words.KEYS[domain])) - common


def _context_words(templates: Iterable[str]) -> frozenset[str]:
    return frozenset().union(*map(words.literal_words, templates)) - {"."}


def _subject(phrase: str, domain: str | None, tables: Mapping) -> str:
    """What a subject phrase stands for: itself, an inner question's answer, or a key's thing."""
    if " " not in phrase:
        return phrase
    if inner := re.fullmatch(r"the (\w+) of (\w+)", phrase):
        relation, subject = inner.groups()
        return tables["general"][relation][subject]
    if domain and (key := _KEY[domain].fullmatch(phrase)):
        return tables["domains"][domain]["key"][key.group(1)]
    raise ValueError(f"no rule reads {phrase!r}")


def _count(prompt: str) -> str:
    """Follow who holds how many through a word problem."""
    held: dict[str, int] = {}
    first = ""
    for event in _EVENT.finditer(prompt):
        if event["who"]:
            held[event["who"]] = int(event["has"]) + held.get(event["whom"] or "", 0)
            first = first or event["who"]
        elif event["gets"]:
            held[first] += int(event["gets"])
        else:
            held[first] -= int(event["gives"])
    if "both" in prompt:
        return str(sum(held.values()))
    return str(held[re.search(r"how many does (\w+) have", prompt)[1]])
