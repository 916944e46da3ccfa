"""Real text in several domains: a folder of JSON lines becomes a domains artifact.

The source folder has ``<domain>_train.jsonl`` (rows with ``prompt`` and ``response``) for every
domain and, where there is one, ``<domain>_test.jsonl`` of the same form. ``gsm8k_test.jsonl`` and
``ifeval_test.jsonl``, with the columns of lm-eval's own tasks, are used when they are there.

Three disjoint sets leave it. *Held-out* rows come from the test file (for math without one, from
``gsm8k_test``), or are split from the training rows. Of the training rows that match no held-out or
test prompt of any domain, even up to case and white space, a seeded hash of the prompt sends a
fraction to the *pretraining* of a small base model and the rest to *adaptation*: a base that had
been fitted to the adapter's own rows would leave it nothing to learn.
"""

from __future__ import annotations

import heapq
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from steerlora.data.domains.text.rows import (
    SUFFIX,
    SourceRow,
    check_domains,
    is_listed,
    text_of,
    usable_rows,
)
from steerlora.data.domains.text.splits import (
    DomainCounts,
    HeldOut,
    first_of_each,
    prompt_key,
    training_rows,
    uniform,
)
from steerlora.data.domains.text.tasks import (
    SHORT_ANSWER_DOMAINS,
    ShortAnswers,
    borrowed_items,
    describe,
)
from steerlora.data.jsonl import read_objects, write_objects
from steerlora.errors import UserError

DOMAINS = ("instruction", "math", "code", "medicine", "law")

PRETRAINING_SHARE = 0.5
"""Share of the training rows that goes to pretraining."""
HELDOUT_SHARE = 0.2
"""Share of the training rows held out, at most, where a domain has no test file."""
PROMPT_CHARACTERS = 480
"""Prompts above it lose their middle: the first quarter and the last three quarters of the budget
stay, joined by " ... ". Abstracts end in their question and instructions often begin with it, so
both ends matter. 480 characters are some 170 tokens of a 2048-entry BPE, and leave room for the
answer in a context of 256."""

_CUT = " ... "
_HEAD = 0.25

_log = logging.getLogger(__name__)


def write(
    directory: Path,
    *,
    source: Path,
    seed: int,
    names: tuple[str, ...] = DOMAINS,
    pretrain_items: int | None = None,
    train_items: int | None = None,
    evaluation_items: int = 200,
) -> None:
    """Write the domains artifact of ``source`` into ``directory``: same arguments, same bytes.

    Args:
        directory: where the artifact goes; created.
        source: the folder of JSON lines.
        seed: of every split, so of which rows are held out, pretrained on and adapted to.
        names: domains to use, in order.
        pretrain_items: most rows to pretrain on, as many of each domain; None: all.
        train_items: most rows of a domain to adapt to, the first ones; None: all.
        evaluation_items: most held-out rows of a domain and most items of an evaluation task.

    A row's ``task``, where it has one, is put before its prompt in words: without it LegalBench
    clauses do not say what is asked of them. It does not count as `PROMPT_CHARACTERS`.

    Raises:
        UserError: a file or key missing, a line that cannot be read (with its number), or a domain
            left without rows.
    """
    check_domains(source, names)
    for folder in ("train", "heldout", "evaluation"):
        (directory / folder).mkdir(parents=True, exist_ok=True)

    heldout, chats = {}, {}
    reserved = set(_borrowed_prompts(source))
    for name in names:
        heldout[name] = _hold_out(source, name, seed, evaluation_items)
        chats[name] = [_chat(row) for row in heldout[name].rows]
        reserved |= heldout[name].keys
        reserved |= {prompt_key(_shorten(row.prompt)) for row in heldout[name].rows}
        write_objects(directory / "heldout" / f"{name}.jsonl", chats[name])

    counts = {name: DomainCounts(held.origin, len(held.rows)) for name, held in heldout.items()}
    answers = {name: ShortAnswers() for name in names if name in SHORT_ANSWER_DOMAINS}
    share = pretrain_items and math.ceil(pretrain_items / len(names))
    with (directory / "pretrain.jsonl").open("w", encoding="ascii") as pretrain:
        for name in names:
            path = source / (name + SUFFIX)
            rows = training_rows(usable_rows(path), reserved, counts[name], _shorten)
            with (directory / "train" / f"{name}.jsonl").open("w", encoding="ascii") as train:
                for row in rows:
                    if name in answers:
                        answers[name].add(row)
                    line = json.dumps(_chat(row)) + "\n"
                    if uniform(row.prompt, seed, "pretraining") < PRETRAINING_SHARE:
                        if share is None or counts[name].pretraining < share:
                            pretrain.write(line)
                            counts[name].pretraining += 1
                    elif train_items is None or counts[name].adaptation < train_items:
                        train.write(line)
                        counts[name].adaptation += 1
            _check_filled(path, counts[name])

    items = {
        f"text_{name}": seen.items(heldout[name].rows, chats[name])
        for name, seen in answers.items()
    }
    items |= borrowed_items(source, evaluation_items)
    tasks = [task for task, rows in items.items() if rows]
    for task in tasks:
        write_objects(directory / "evaluation" / f"{task}.jsonl", items[task])
    description = describe(names, tasks)
    description["counts"] = {name: asdict(count) for name, count in counts.items()}
    (directory / "domains.json").write_text(json.dumps(description, indent=2) + "\n")


def _hold_out(source: Path, name: str, seed: int, most: int) -> HeldOut:
    """Choose at most ``most`` rows of a domain by the hash of their prompts, in file order."""
    path, gsm8k = source / f"{name}_test.jsonl", source / "gsm8k_test.jsonl"
    has_test = True
    if is_listed(path):
        rows = usable_rows(path)
    elif name == "math" and is_listed(gsm8k):
        path = gsm8k
        rows = usable_rows(path, prompt_key="question", response_key="answer")
    else:
        path, has_test = source / (name + SUFFIX), False
        rows = usable_rows(path)
        _log.info("no %s_test.jsonl: rows of %s are held out instead", name, path.name)

    keys: set[bytes] = set()
    ranked = (
        (uniform(row.prompt, seed, "heldout"), place, row)
        for place, row in enumerate(first_of_each(rows, keys))
    )
    chosen = heapq.nsmallest(most, ranked)
    if not has_test:
        chosen = chosen[: int(HELDOUT_SHARE * len(keys))]
        keys = {prompt_key(row.prompt) for _, _, row in chosen}
    if not chosen:
        raise UserError(f"{path} has too few rows to hold out any for domain '{name}'")
    return HeldOut([row for _, row in sorted((p, row) for _, p, row in chosen)], path.name, keys)


def _borrowed_prompts(source: Path) -> Iterator[bytes]:
    """Keys of every prompt of lm-eval's own test files: no domain may train on them."""
    for task, column in (("gsm8k", "question"), ("ifeval", "prompt")):
        path = source / f"{task}_test.jsonl"
        if is_listed(path):
            for place, row in read_objects(path):
                yield prompt_key(text_of(row, column, place))


def _check_filled(path: Path, counts: DomainCounts) -> None:
    if not counts.adaptation:
        raise UserError(
            f"{path} leaves no rows to adapt to ({counts.heldout} held out, "
            f"{counts.held_out_prompt} with a held-out prompt, {counts.repeated} repeated, "
            f"{counts.pretraining} for pretraining); add rows"
        )


def _chat(row: SourceRow) -> dict[str, str]:
    prompt = _shorten(row.prompt)
    if row.task:
        prompt = f"Task: {row.task.replace('_', ' ')}\n\n{prompt}"
    return {"prompt": prompt, "response": row.response.strip()}


def _shorten(text: str) -> str:
    """``text`` without its middle where it is longer than `PROMPT_CHARACTERS`."""
    text, most = text.strip(), PROMPT_CHARACTERS
    if len(text) <= most:
        return text
    head = int(_HEAD * most)
    return text[:head] + _CUT + text[len(text) - (most - head - len(_CUT)) :]
