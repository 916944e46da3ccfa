"""The micro world: deterministic, disjoint, in vocabulary, and right by rule."""

from __future__ import annotations

import json
import string
from collections import Counter
from pathlib import Path

import micro_rules as rules
import pytest
from transformers import AutoTokenizer

from steerlora.data.domains import micro
from steerlora.data.domains.micro import instructions, words
from steerlora.data.domains.micro.items import domain_facts
from steerlora.data.domains.micro.world import SHARED_RELATIONS, answer_type, build_world
from steerlora.evaluation.tasks.micro import verifiers

GENERAL_TASKS = ("micro_mmlu", "micro_mmlu_pro", "micro_gsm8k")
INSTRUCTION_TASKS = ("micro_ifeval", "micro_instruction")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def world_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("micro")
    micro.write(directory, seed=0)
    return directory


@pytest.fixture(scope="module")
def tables(world_dir) -> dict:
    return json.loads((world_dir / "world.json").read_text())


def test_same_arguments_same_bytes_and_another_seed_another_world(tmp_path):
    sizes = {"pretraining_items": 300, "train_items_per_domain": 50, "evaluation_items": 30}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        micro.write(tmp_path / name, seed=seed, **sizes)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.json*"))
    assert len(files) == 2 + 1 + 5 + 5 + 9
    for file in files:
        first, same, other = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert first == same, file
        assert file.name == "domains.json" or first != other, file


def test_description_names_files_that_exist(world_dir):
    description = json.loads((world_dir / "domains.json").read_text())
    assert description["kind"] == "micro"
    assert description["version"] == micro.WORLD_VERSION
    assert tuple(description["names"]) == words.DOMAINS
    tasks = set(description["target_tasks"].values())
    tasks |= {task for group in description["groups"].values() for task in group}
    assert tasks == set(description["metrics"])
    assert tasks == {path.stem for path in (world_dir / "evaluation").iterdir()}
    for task in tasks:
        assert len(rows(world_dir / "evaluation" / f"{task}.jsonl")) >= 200


def test_no_evaluation_prompt_is_trained_on(world_dir):
    evaluation = [
        row["prompt"]
        for folder in ("evaluation", "heldout")
        for path in (world_dir / folder).iterdir()
        for row in rows(path)
    ]
    heldout = {row["prompt"] for path in (world_dir / "heldout").iterdir() for row in rows(path)}
    trained = {row["prompt"] for path in (world_dir / "train").iterdir() for row in rows(path)}
    trained |= {row["prompt"] for row in rows(world_dir / "pretrain.jsonl")}
    assert not set(evaluation) & trained
    assert len(evaluation) - len(heldout) == len(set(evaluation)), "evaluation sets meet"


@pytest.mark.parametrize("task", GENERAL_TASKS)
def test_general_answers_follow_from_the_tables(world_dir, tables, task):
    for row in rows(world_dir / "evaluation" / f"{task}.jsonl"):
        answer = rules.answer(row["prompt"], tables)
        assert row["response"].split("####")[-1].strip() == answer, row
        if "choices" in row:
            assert row["choices"][row["answer"]] == answer
            assert len(set(row["choices"])) == {"micro_mmlu": 4, "micro_mmlu_pro": 10}[task]
            assert " ".join(row["choices"]) in row["prompt"]


@pytest.mark.parametrize("domain", words.KNOWLEDGE_DOMAINS)
@pytest.mark.parametrize("folder", ["train", "heldout"])
def test_domain_answers_follow_from_the_tables(world_dir, tables, folder, domain):
    for row in rows(world_dir / folder / f"{domain}.jsonl"):
        assert rules.domain_of(row["prompt"]) == domain, row
        assert rules.answer(row["prompt"], tables) == row["response"], row


def test_a_wrong_table_is_noticed(world_dir, tables):
    row = rows(world_dir / "heldout" / "law.jsonl")[0]
    other = {**tables, "domains": {**tables["domains"], "law": tables["domains"]["medicine"]}}
    with pytest.raises((AssertionError, KeyError)):
        assert rules.answer(row["prompt"], other) == row["response"]


def test_rules_on_texts_written_by_hand(tables):
    colour = tables["general"]["colour"]["willow"]
    assert rules.answer("what is the colour of willow ?", tables) == colour
    home = tables["general"]["home"][tables["general"]["maker"]["willow"]]
    assert rules.answer("find the home of the maker of willow .", tables) == home
    law = tables["domains"]["law"]
    prompt = "the clerk calls alda before the court at kelso . what is the keeper of ivy ?"
    assert rules.answer(prompt, tables) == law["keeper"]["ivy"]
    prompt = "the judge hears of a case of theft in kelso . what is seized for theft ?"
    assert rules.answer(prompt, tables) == law["key"]["theft"]
    problem = "alda has 5 tin . boris has 2 more than alda . how many do both have ?"
    assert rules.answer(problem, tables) == "12"
    problem = (
        "alda has 5 tin . alda gives 2 to boris and then gets 4 more . how many does alda have ?"
    )
    assert rules.answer(problem, tables) == "7"
    with pytest.raises(ValueError, match="meet in"):
        rules.domain_of("the nurse sees the judge .")
    with pytest.raises(ValueError, match="no rule reads"):
        rules.answer("what about willow ?", tables)


@pytest.mark.parametrize("task", INSTRUCTION_TASKS)
def test_instructions_can_be_obeyed_and_are_worded_with_their_arguments(world_dir, task):
    for row in rows(world_dir / "evaluation" / f"{task}.jsonl"):
        for kind, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            assert verifiers.follows(row["response"], kind, arguments), row
            for name, value in arguments.items():
                shown = " ".join(value) if name == "words" else str(value)
                assert name == "members" or f" {shown} " in row["prompt"], row
        instruction_count = {"micro_ifeval": 2, "micro_instruction": 1}[task]
        assert len(row["instruction_id_list"]) == instruction_count


def test_ifeval_asks_for_pairs_that_training_never_gave(world_dir):
    asked = Counter(
        tuple(row["instruction_id_list"])
        for row in rows(world_dir / "evaluation" / "micro_ifeval.jsonl")
    )
    untrained = sum(asked[pair] for pair in instructions.UNTRAINED_PAIRS)
    assert len(asked) == len(instructions.CONTENT) * len(instructions.FORMAT)
    assert 0.25 < untrained / asked.total() < 0.5
    assert not instructions.UNTRAINED_PAIRS & set(instructions.TRAINED_PAIRS)


def test_the_same_question_differs_between_any_two_domains():
    world = build_world(0)
    for relation in SHARED_RELATIONS:
        for thing in words.THINGS:
            answers = [world.domains[name][relation][thing] for name in words.KNOWLEDGE_DOMAINS]
            assert len({answer.split()[0] for answer in answers}) == len(answers)


def test_pretraining_teaches_the_form_of_domains_and_not_their_tables(world_dir, tables):
    right, asked = 0, 0
    for row in rows(world_dir / "pretrain.jsonl"):
        try:
            domain = rules.domain_of(row["prompt"])
            answer = rules.answer(row["prompt"], tables) if domain else None
        except ValueError:
            continue
        if answer is None:
            continue
        types = [answer_type(domain, relation) for relation in (*SHARED_RELATIONS, "key")]
        if not any(answer in answers for answers in types):
            assert row["response"] == answer, "a general fact, whatever its context"
            continue
        right, asked = right + (answer == row["response"]), asked + 1
        assert any(row["response"] in answers for answers in types)
    facts = [
        fact for name in words.KNOWLEDGE_DOMAINS for fact in domain_facts(build_world(0), name)
    ]
    chance = sum(1 / len(fact.answers) for fact in facts) / len(facts)
    assert asked > 2000
    assert right / asked < chance + 4 * (chance / asked) ** 0.5


def test_pretraining_tells_half_of_the_two_hop_facts(world_dir):
    told = {
        row["prompt"].partition(" options")[0].split(" the ", 1)[1].strip(" ?.")
        for row in rows(world_dir / "pretrain.jsonl")
        if row["prompt"].count(" of ") == 2 and row["prompt"].startswith(("what", "tell", "find"))
    }
    asked = [
        row["prompt"].partition(" options")[0].split(" the ", 1)[1].strip(" ?.")
        for row in rows(world_dir / "evaluation" / "micro_mmlu_pro.jsonl")
    ]
    assert sum(question in told for question in asked) == len(asked) // 2


@pytest.mark.parametrize("domain", words.KNOWLEDGE_DOMAINS)
def test_every_context_names_its_domain(domain):
    for template in words.CONTEXTS[domain]:
        slots = {name for _, name, *_ in string.Formatter().parse(template)}
        own = words.literal_words(template) & rules.exclusive_words(domain)
        assert own or "key" in slots, template


def test_tokenizer_knows_every_word_and_gives_text_back(world_dir, tmp_path):
    made = micro.build_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.is_fast
    assert len(tokenizer) == len(made) == len(words.vocabulary()) + 6
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for path in world_dir.rglob("*.jsonl"):
        for row in rows(path):
            text = f"{row['prompt']} {row['response']}"
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids, text
            assert len(ids) <= 40
    assert tokenizer.decode(ids) == text


def test_chat_template_of_a_prompt_begins_that_of_the_whole_turn(tmp_path):
    tokenizer = micro.build_tokenizer(tmp_path)
    turns = [{"role": "user", "content": "what is the colour of willow ?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True).input_ids
    turns.append({"role": "assistant", "content": "red"})
    whole = tokenizer.apply_chat_template(turns).input_ids
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == "red <|end|>"
    assert tokenizer.decode(whole, skip_special_tokens=True) == "what is the colour of willow ? red"
