"""Writes a micro world: pretraining, training, held-out and evaluation rows.

Evaluation items are drawn first, and no later set may repeat their prompts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from steerlora.data.domains.micro import instructions, items, words
from steerlora.data.domains.micro.items import ChoiceItem, Fact, Item
from steerlora.data.domains.micro.world import World, build_world
from steerlora.data.jsonl import write_objects

WORLD_VERSION = 1
"""Raised whenever the same arguments would write other bytes: it enters the fingerprint."""

PRETRAINING_MIX = {
    "question": 0.08,
    "question_in_context": 0.18,
    "statement": 0.04,
    "choice": 0.12,
    "two_hop": 0.06,
    "two_hop_choice": 0.08,
    "problem": 0.12,
    "domain_form": 0.10,
    "domain_known": 0.11,
    "instruction": 0.09,
    "instruction_form": 0.02,
}
"""Share of each kind of pretraining document."""

INSTRUCTION_PAIR_SHARE = 0.4
"""Share of instruction training that gives two instructions at once."""

GROUPS = {
    "instruction_following": ["micro_ifeval"],
    "general_knowledge": ["micro_mmlu"],
    "mmlu_pro": ["micro_mmlu_pro"],
    "gsm8k": ["micro_gsm8k"],
}
METRICS = {
    "micro_ifeval": "prompt_level_strict_acc,none",
    "micro_mmlu": "acc,none",
    "micro_mmlu_pro": "acc,none",
    "micro_gsm8k": "exact_match,none",
    "micro_instruction": "prompt_level_strict_acc,none",
    **{f"micro_{domain}": "exact_match,none" for domain in words.KNOWLEDGE_DOMAINS},
}


def write(
    directory: Path,
    *,
    seed: int = 0,
    pretraining_items: int = 24_000,
    train_items_per_domain: int = 4_000,
    evaluation_items: int = 200,
) -> None:
    """Write a whole micro world; the same arguments write the same bytes.

    Files (all rows JSON, one a line): `domains.json`, `world.json` (the tables),
    `pretrain.jsonl`, `train/<domain>.jsonl`, `heldout/<domain>.jsonl`, `evaluation/<task>.jsonl`.

    Args:
        directory: made if it does not exist.
        seed: of the tables and of every draw.
        pretraining_items: documents for the base model.
        train_items_per_domain: prompt and response pairs for adapters.
        evaluation_items: items of each evaluation set.
    """
    world = build_world(seed)
    taught_hops, untaught_hops = _split_two_hops(world, seed)

    evaluation = _evaluation(world, taught_hops, untaught_hops, evaluation_items, seed)
    reserved = {row["prompt"] for rows in evaluation.values() for row in rows}
    train = {
        domain: _draw(
            _trainer(world, domain), train_items_per_domain, f"train {domain} {seed}", reserved
        )
        for domain in words.DOMAINS
    }
    pretraining = _draw(
        _pretrainer(world, taught_hops), pretraining_items, f"pretrain {seed}", reserved
    )

    _write_json(directory / "domains.json", _description())
    _write_json(directory / "world.json", asdict(world))
    write_objects(directory / "pretrain.jsonl", map(_row, pretraining))
    for domain in words.DOMAINS:
        write_objects(directory / "train" / f"{domain}.jsonl", map(_row, train[domain]))
        rows = evaluation[f"micro_{domain}"]
        heldout = ({"prompt": row["prompt"], "response": row["response"]} for row in rows)
        write_objects(directory / "heldout" / f"{domain}.jsonl", heldout)
    for task, rows in evaluation.items():
        write_objects(directory / "evaluation" / f"{task}.jsonl", rows)


def _evaluation(
    world: World, taught: list[Fact], untaught: list[Fact], count: int, seed: int
) -> dict[str, list[dict]]:
    """Rows of every evaluation set, each set without repeated prompts."""
    facts = items.general_facts(world)
    pairs = sorted({*instructions.TRAINED_PAIRS, *instructions.UNTRAINED_PAIRS})
    singles = (*instructions.CONTENT, *instructions.FORMAT)

    def one_of(facts: list[Fact], options: int) -> Callable[[int, random.Random], ChoiceItem]:
        return lambda number, rng: items.choice(facts[number % len(facts)], options, rng)

    # Even numbers ask a composition that pretraining taught, odd ones a composition it did not.
    hops = [fact for both in zip(taught, untaught, strict=True) for fact in both]
    makers: dict[str, Callable[[int, random.Random], tuple]] = {
        "micro_ifeval": lambda number, rng: instructions.pair(pairs[number % len(pairs)], rng),
        "micro_mmlu": one_of(_shuffled(facts, seed), 4),
        "micro_mmlu_pro": one_of(hops, 10),
        "micro_gsm8k": lambda number, rng: items.problem(rng),
        "micro_instruction": lambda number, rng: instructions.single(
            singles[number % len(singles)], rng
        ),
    }
    for domain in words.KNOWLEDGE_DOMAINS:
        makers[f"micro_{domain}"] = _domain_item(
            _shuffled(items.domain_facts(world, domain), seed), domain
        )
    seen: set[str] = set()
    evaluation = {}
    for task, make in makers.items():
        drawn = _draw(make, count, f"{task} {seed}", seen, unique=True)
        seen.update(item.prompt for item in drawn)
        evaluation[task] = [_row(item) for item in drawn]
    return evaluation


def _domain_item(facts: list[Fact], domain: str) -> Callable[[int, random.Random], Item]:
    return lambda number, rng: items.domain_question(facts[number % len(facts)], domain, rng)


def _trainer(world: World, domain: str) -> Callable[[int, random.Random], tuple]:
    """Draws one training pair of a domain."""
    if domain != "instruction":
        return _domain_item(items.domain_facts(world, domain), domain)

    def instruction(number: int, rng: random.Random) -> tuple:
        if rng.random() < INSTRUCTION_PAIR_SHARE:
            return instructions.pair(rng.choice(instructions.TRAINED_PAIRS), rng)
        return instructions.single(rng.choice((*instructions.CONTENT, *instructions.FORMAT)), rng)

    return instruction


def _pretrainer(world: World, hops: list[Fact]) -> Callable[[int, random.Random], tuple]:
    """Draws one pretraining document: general facts in full, what is new of domains by form."""
    facts = items.general_facts(world)
    forms = {domain: items.domain_facts(world, domain) for domain in words.KNOWLEDGE_DOMAINS}

    known = {domain: items.known_facts(world, domain) for domain in words.KNOWLEDGE_DOMAINS}

    def domain_form(rng: random.Random) -> Item:
        domain = rng.choice(words.KNOWLEDGE_DOMAINS)
        return items.domain_question(rng.choice(forms[domain]), domain, rng, form_only=True)

    def domain_known(rng: random.Random) -> Item:
        domain = rng.choice(words.KNOWLEDGE_DOMAINS)
        return items.domain_question(rng.choice(known[domain]), domain, rng)

    def instruction_form(rng: random.Random) -> Item:
        kinds = (*instructions.CONTENT, *instructions.FORMAT)
        untaught = [kind for kind in kinds if kind not in instructions.PRETRAINED]
        prompt = instructions.single(rng.choice(untaught), rng).prompt
        return Item(prompt, instructions.random_response(rng))

    makers: dict[str, Callable[[random.Random], tuple]] = {
        "question": lambda rng: items.question(rng.choice(facts), rng),
        "question_in_context": lambda rng: items.question_in_context(rng.choice(facts), rng),
        "statement": lambda rng: items.statement(rng.choice(facts), rng),
        "choice": lambda rng: items.choice(rng.choice(facts), 4, rng).item(),
        "two_hop": lambda rng: items.question(rng.choice(hops), rng),
        "two_hop_choice": lambda rng: items.choice(rng.choice(hops), 10, rng).item(),
        "problem": items.problem,
        "domain_form": domain_form,
        "domain_known": domain_known,
        "instruction": lambda rng: instructions.single(rng.choice(instructions.PRETRAINED), rng),
        "instruction_form": instruction_form,
    }
    assert makers.keys() == PRETRAINING_MIX.keys()
    kinds, weights = zip(*PRETRAINING_MIX.items(), strict=True)
    return lambda number, rng: makers[rng.choices(kinds, weights)[0]](rng)


def _split_two_hops(world: World, seed: int) -> tuple[list[Fact], list[Fact]]:
    """Two-hop facts that pretraining tells, and as many that it leaves to be worked out."""
    facts = _shuffled(items.two_hop_facts(world), seed)
    half = len(facts) // 2
    return facts[:half], facts[half : 2 * half]


def _shuffled(facts: list[Fact], seed: int) -> list[Fact]:
    return random.Random(f"order {seed}").sample(facts, len(facts))


def _draw(
    make: Callable[[int, random.Random], tuple],
    count: int,
    name: str,
    reserved: set[str],
    *,
    unique: bool = False,
) -> list:
    """`count` items whose prompts are not reserved (nor repeated, if `unique`)."""
    rng = random.Random(name)
    barred = set(reserved)
    drawn: list = []
    while len(drawn) < count:
        item = make(len(drawn), rng)
        if item.prompt in barred:
            continue
        if unique:
            barred.add(item.prompt)
        drawn.append(item)
    return drawn


def _row(item: tuple) -> dict:
    """What is written of an item; a choice item with its response in words as well."""
    row = item._asdict()
    if isinstance(item, ChoiceItem):
        row["response"] = item.item().response
    return row


def _description() -> dict:
    return {
        "kind": "micro",
        "version": WORLD_VERSION,
        "names": list(words.DOMAINS),
        "target_tasks": {domain: f"micro_{domain}" for domain in words.DOMAINS},
        "groups": GROUPS,
        "metrics": METRICS,
    }


def _write_json(path: Path, value: Mapping) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
