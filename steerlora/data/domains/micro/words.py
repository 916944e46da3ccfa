"""The words of the micro world: entities shared by everything, and each domain's own language.

The word lists are the same in every world; a world's seed decides only who relates to what.
"""

from __future__ import annotations

import string
from collections.abc import Iterable


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


DOMAINS = ("instruction", "math", "code", "medicine", "law")
"""The five domains in canonical order."""

KNOWLEDGE_DOMAINS = DOMAINS[1:]
"""The domains that answer the same questions differently."""

PLANTS = _listed("willow fern sage ivy")
STONES = _listed("quartz jade opal amber")
METALS = _listed("iron copper silver tin")
THINGS = PLANTS + STONES + METALS
PEOPLE = _listed(
    "alda boris clara dorin elsa felix greta hugo irma jonas karla linus marta nils olga pavel"
)
TOWNS = _listed("arvik belden corra dunmore elstow farrow galten hollin ister jarrow kelso lorne")
RIVERS = _listed("aire bourne calder derwent eden forth gade humber itchen kennet lea medway")
TRADES = _listed(
    "baker potter weaver miller smith mason farmer sailor tailor hunter painter carter"
)
COLOURS = _listed("red blue green white black yellow brown grey purple orange")
NUMBERS = tuple(map(str, range(31)))

CATEGORIES = {
    "plants": PLANTS,
    "stones": STONES,
    "metals": METALS,
    "colours": COLOURS,
    "towns": TOWNS,
    "people": PEOPLE,
}

UNITS = {"math": "units", "code": "bytes", "medicine": "drops", "law": "coins"}

KEEPERS = {
    "math": _listed("axiom theorem lemma proof corollary field ring group matrix vector"),
    "code": _listed("daemon kernel linter parser cache queue stack thread socket buffer"),
    "medicine": _listed(
        "nurse doctor surgeon midwife dentist matron chemist porter healer orderly"
    ),
    "law": _listed("judge clerk lawyer bailiff notary sheriff warden juror usher registrar"),
}

KEYS = {
    "math": _listed("circle triangle cube cone sphere prism"),
    "code": _listed("parse merge sort hash fetch split"),
    "medicine": _listed("fever cough rash headache cramp nausea"),
    "law": _listed("theft fraud arson libel bribery forgery"),
}
"""What only one domain speaks of; each domain relates its keys to things."""

KEY_PHRASES = {
    "math": "what marks the {key}",
    "code": "what {key} returns",
    "medicine": "what treats {key}",
    "law": "what is seized for {key}",
}

QUESTIONS = (
    "what is the {relation} of {subject} ?",
    "tell me the {relation} of {subject} .",
    "find the {relation} of {subject} .",
)
"""Every domain, and general knowledge, asks with the same words."""

CONTEXTS = {
    "math": (
        "let {thing} be a vector with {number} terms .",
        "suppose {thing} plus {thing} equals {number} .",
        "{person} proves a lemma about the {key} .",
        "the theorem of {person} names {thing} and {thing} .",
        "the angle of the {key} is {number} degrees .",
        "the function {thing} maps {town} to an integer .",
        "the sum over {thing} is {number} times {number} .",
        "{person} solves the equation for {thing} in {town} .",
        "the proof by {person} needs the {key} .",
        "the ratio of {thing} and {thing} is {number} .",
    ),
    "code": (
        "def {key} ( {thing} ) : return {number} .",
        "call {key} ( {thing} ) in the script of {person} .",
        "for {thing} in {thing} : print ( {number} ) .",
        "import {thing} from the package {town} .",
        "the function {key} compiles in the branch of {person} .",
        "if {thing} == {number} : return {thing} .",
        "{person} fixes a bug in the module {thing} .",
        "the log record of {person} throws {thing} and {thing} .",
        "{thing} = {number} ; print ( {thing} ) .",
        "assert {thing} == {colour} on the server at {town} .",
    ),
    "medicine": (
        "the nurse sees {person} in the ward at {town} .",
        "a patient from {town} suffers from {key} .",
        "the doctor gives {thing} to the patient .",
        "{person} is ill with {key} and asks the clinic .",
        "the dose of {thing} is on the chart of {person} .",
        "the ward at {town} has {number} beds .",
        "{person} takes {thing} for the {key} .",
        "the clinic record of {person} names {thing} and {thing} .",
        "a sick child of {person} drinks {thing} .",
        "the surgeon hears of a case of {key} in {town} .",
    ),
    "law": (
        "the clerk calls {person} before the court at {town} .",
        "the judge hears of a case of {key} in {town} .",
        "{person} is charged with {key} .",
        "the lawyer shows {thing} to the jury .",
        "a fine on {thing} is due to the court .",
        "{person} signs the contract about {thing} in {town} .",
        "the court record of {person} names {thing} and {thing} .",
        "the statute of {town} has {number} articles .",
        "a witness accuses {person} of {key} .",
        "the tenant {person} appeals against the verdict .",
    ),
}

NEUTRAL_CONTEXTS = (
    "{person} walks to {town} .",
    "{person} likes {thing} .",
    "the {thing} is on the table .",
    "{person} and {person} talk .",
    "it rains in {town} .",
    "{person} buys {number} {thing} .",
)

STATEMENTS = ("the {relation} of {subject} is {answer} .", "tell me about {subject} .")
OPTIONS = "{question} options : {options} ."

PROBLEMS = (
    "{p} has {a} {thing} . {p} gets {b} more and then gives {c} to {q} . how many does {p} have ?",
    "{p} has {a} {thing} . {p} gives {b} to {q} and then gets {c} more . how many does {p} have ?",
    "{p} has {a} {thing} . {q} has {b} more than {p} . how many do both have ?",
)
SOLUTION = "{step} #### {answer}"

INSTRUCTION_PHRASES = {
    "keywords:frequency": ("repeat the word {keyword} {frequency} times .",),
    "order:reverse": ("write {words} in reverse order .",),
    "content:category": ("name {number} {category} .",),
    "length:number_words": ("write exactly {number} words about {topic} .",),
    "startend:start_word": ("start with {word} .",),
    "startend:end_word": ("end with {word} .",),
    "startend:quotation": ("wrap it in quotes .",),
    "keywords:existence": ("include the word {keyword} .",),
    "keywords:forbidden": ("do not say {keyword} .",),
    "punctuation:comma": ("put a comma between words .",),
}
TOPIC_PHRASE = "write about {topic} ."
MARKS = (",", '"', ".", ":", ";", "?", "(", ")", "=", "==", "####")

RELATIONS = ("colour", "origin", "maker", "home", "trade", "river", "measure", "keeper", "label")


def vocabulary() -> tuple[str, ...]:
    """Every word that any world can write, sorted, without the special tokens."""
    templates: list[str] = [*QUESTIONS, *NEUTRAL_CONTEXTS, *STATEMENTS, OPTIONS, *PROBLEMS]
    templates += [phrase for phrases in INSTRUCTION_PHRASES.values() for phrase in phrases]
    templates += [template for domain in CONTEXTS.values() for template in domain]
    templates += [*KEY_PHRASES.values(), TOPIC_PHRASE, SOLUTION]
    lists: list[Iterable[str]] = [THINGS, PEOPLE, TOWNS, RIVERS, TRADES, COLOURS, NUMBERS]
    lists += [CATEGORIES, UNITS.values(), *KEEPERS.values(), *KEYS.values(), RELATIONS, MARKS]
    lists += [literal_words(template) for template in templates]
    # "the maker of" joins two questions into one.
    return tuple(sorted({word for words in lists for word in words} | {"the", "of"}))


def literal_words(template: str) -> frozenset[str]:
    """The words of a template that are not slots."""
    literals = (literal for literal, *_ in string.Formatter().parse(template))
    return frozenset(word for literal in literals for word in literal.split())
