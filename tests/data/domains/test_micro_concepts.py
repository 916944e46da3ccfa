"""Concepts of the micro world: labelled texts, prompts, and rules that grade answers."""

from __future__ import annotations

import pytest

from steerlora.data.domains.micro import words
from steerlora.data.domains.micro.concepts import (
    CONCEPTS,
    FORMS,
    MARKS,
    Prompt,
    concept_grade,
    instruction_grade,
    labelled_texts,
    prompts,
    repeats,
    world_of,
)
from steerlora.data.domains.micro.world import build_world

WORLD = build_world(0)


def test_a_world_is_read_back_from_its_tables():
    assert world_of({"general": WORLD.general, "domains": WORLD.domains}) == WORLD


def test_texts_and_prompts_are_of_this_world_different_and_repeatable():
    texts = labelled_texts(WORLD, CONCEPTS, 40, seed=3)
    assert texts == labelled_texts(WORLD, CONCEPTS, 40, seed=3)
    assert texts != labelled_texts(WORLD, CONCEPTS, 40, seed=4)
    assert [text.concept for text in texts] == [c for c in CONCEPTS for _ in range(40)]
    asked = [prompt for concept in CONCEPTS for prompt in prompts(WORLD, concept, 20, seed=3)]
    assert len({p.text for p in asked if p.concept == "towns"}) == 20
    read = {text.prompt for text in texts}
    assert not read & {prompt.text for prompt in asked}
    vocabulary = set(words.vocabulary())
    for text in (*texts, *asked):
        for part in (text.prompt, text.response) if hasattr(text, "response") else (text.text,):
            assert set(part.split()) <= vocabulary


def test_texts_of_a_category_write_about_it_and_its_prompts_do_not():
    members = set(words.CATEGORIES["towns"])
    for text in labelled_texts(WORLD, ["towns"], 30, seed=0):
        said = [word for word in text.response.split() if word not in MARKS]
        assert len(members & set(said)) == 2
    for prompt in prompts(WORLD, "towns", 30, seed=0):
        assert prompt.asks in FORMS
        asked = prompt.text.split(" . ", 1)[1]
        assert not members & set(asked.split())
        assert members & set(prompt.natural.split(" . ", 1)[1].split())


def statement(relation: str, subject: str, answer: str | None = None) -> str:
    answer = answer or WORLD.general[relation][subject]
    return f"the {relation} of {subject} is {answer} ."


def asked(concept: str, asks: str, about: str) -> Prompt:
    return Prompt(text="", natural="", concept=concept, asks=asks, about=about)


FERN = asked("colour", "statement", "fern")
LABEL = WORLD.domains["law"]["label"]["fern"]
OTHER_LABEL = WORLD.domains["math"]["label"]["fern"]
CASES = [
    # (prompt, answer, concept, instruction)
    (FERN, statement("colour", "fern"), 2, 2),
    (FERN, statement("maker", "fern"), 0, 2),
    (FERN, statement("maker", "fern") + " " + statement("colour", "fern"), 2, 1),
    (FERN, "alda . boris . red .", 1, 0),
    (FERN, statement("colour", "ivy"), 2, 0),
    (FERN, "", 0, 0),
    (asked("law", "keeper", "fern"), "judge", 2, 2),
    (asked("law", "keeper", "fern"), "nurse", 0, 2),
    (asked("law", "keeper", "fern"), "judge of fern and iron", 1, 1),
    (asked("law", "measure", "fern"), "7 coins", 2, 2),
    (asked("law", "measure", "fern"), "7 drops", 0, 2),
    (asked("law", "measure", "fern"), "coins", 2, 1),
    (asked("law", "measure", "fern"), "7", 0, 0),
    (asked("law", "label", "fern"), LABEL, 2, 2),
    (asked("law", "label", "fern"), OTHER_LABEL, 0, 2),
    (asked("towns", FORMS[0], "fern"), "fern kelso ister", 2, 2),
    (asked("towns", FORMS[0], "fern"), "fern kelso iron tin", 1, 2),
    (asked("towns", FORMS[0], "fern"), "kelso fern", 2, 1),
    (asked("towns", FORMS[0], "fern"), "fern", 0, 1),
    (asked("towns", FORMS[0], "fern"), "kelso", 2, 0),
    (asked("towns", FORMS[1], "fern"), '" kelso iron "', 2, 2),
    (asked("towns", FORMS[1], "fern"), '" kelso', 2, 1),
    (asked("towns", FORMS[1], "fern"), "iron", 0, 0),
]


@pytest.mark.parametrize(("prompt", "answer", "concept", "instruction"), CASES)
def test_answers_are_graded_by_rule(prompt, answer, concept, instruction):
    assert concept_grade(WORLD, prompt, answer) == concept
    assert instruction_grade(WORLD, prompt, answer) == instruction


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("fern fern fern", True),
        ("fern fern iron", False),
        ("fern iron fern iron fern", True),
        ("fern iron fern iron", False),
        ("", False),
    ],
)
def test_an_answer_that_repeats_itself(answer, expected):
    assert repeats(answer) == expected
