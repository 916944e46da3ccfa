"""Real text in several domains: a folder of JSON lines becomes a domains artifact.

The source folder has ``<domain>_train.jsonl`` (rows with ``prompt`` and ``response``, or with
``messages``) for every domain and, where there is one, ``<domain>_test.jsonl`` of the same form.
``gsm8k_test.jsonl`` and ``ifeval_test.jsonl``, with the columns of lm-eval's own tasks, are used
when they are there.

Three disjoint sets leave it. *Held-out* rows come from the test file (for math without one, from
``gsm8k_test``), or are split from the training rows. Of the training rows that match no held-out or
test prompt of any domain, even up to case and white space, a seeded hash of the prompt sends a
fraction to the *pretraining* of a small base model and the rest to *adaptation*: a base that had
been fitted to the adapter's own rows would leave it nothing to learn. A base that is trained
already leaves all rows to adaptation.
"""

from __future__ import annotations

import heapq
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steerlora.data.conversations import Turn, to_row
from steerlora.data.domains.text.rows import (
    TRAIN,
    SourceRow,
    check_domains,
    is_listed,
    source_rows,
    text_of,
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
    BORROWED_TESTS,
    SHORT_ANSWER_DOMAINS,
    ShortAnswers,
    borrowed_items,
    describe,
)
from steerlora.data.jsonl import file_of, read_objects, write_objects
from steerlora.errors import UserError

DOMAINS = ("instruction", "math", "code", "medicine", "law")

PRETRAINING_SHARE = 0.5
"""Share of the training rows that goes to pretraining."""
HELDOUT_SHARE = 0.2
"""Share of the training rows held out, at most, where a domain has no test file."""
_CUT = " ... "
_HEAD = 0.25

_log = logging.getLogger(__name__)


def write(
    directory: Path,
    *,
    source: Path,
    seed: int,
    names: tuple[str, ...] = DOMAINS,
    pretraining: bool = True,
    pretrain_items: int | None = None,
    train_items: int | None = None,
    evaluation_items: int = 200,
    prompt_characters: int | None = None,
) -> None:
    """Write the domains artifact of ``source`` into ``directory``: same arguments, same bytes.

    Args:
        directory: where the artifact goes; created.
        source: the folder of JSON lines.
        seed: of every split, so of which rows are held out, pretrained on and adapted to.
        names: domains to use, in order.
        pretraining: whether a share of the rows is for pretraining.
        pretrain_items: most rows to pretrain on, as many of each domain; None: all.
        train_items: most rows of a domain to adapt to, the first ones; None: all.
        evaluation_items: most held-out rows of a domain and most items of an evaluation task.
        prompt_characters: longer prompts lose their middle, and are counted; None: none does.

    A row's ``task``, where it has one, is put before its first prompt in words: without it
    LegalBench clauses do not say what is asked of them. It is not shortened.

    Raises:
        UserError: a file or key missing, a line that cannot be read (with its number), or a domain
            left without rows.
    """
    check_domains(source, names)
    for folder in ("train", "heldout", "evaluation"):
        (directory / folder).mkdir(parents=True, exist_ok=True)

    def shorten(text: str) -> str:
        return without_middle(text.strip(), prompt_characters)

    def written(row: SourceRow, count: DomainCounts) -> dict[str, Any]:
        count.shortened += any(shorten(prompt) != prompt.strip() for prompt in row.prompts)
        return _chat(row, shorten)

    heldout, counts, chats = {}, {}, {}
    reserved = set(_borrowed_prompts(source))
    for name in names:
        heldout[name] = _hold_out(source, name, seed, evaluation_items)
        counts[name] = DomainCounts(heldout[name].origin, len(heldout[name].rows))
        chats[name] = [written(row, counts[name]) for row in heldout[name].rows]
        reserved |= heldout[name].keys
        reserved |= {prompt_key(shorten(row.prompt)) for row in heldout[name].rows}
        write_objects(directory / "heldout" / f"{name}.jsonl", chats[name])

    answers = {name: ShortAnswers() for name in names if name in SHORT_ANSWER_DOMAINS}
    set_aside = PRETRAINING_SHARE if pretraining else 0.0
    share = pretrain_items and math.ceil(pretrain_items / len(names))
    with (directory / "pretrain.jsonl").open("w", encoding="ascii") as pretrain:
        for name in names:
            path = file_of(source, name + TRAIN)
            rows = training_rows(source_rows(path), reserved, counts[name], shorten)
            with (directory / "train" / f"{name}.jsonl").open("w", encoding="ascii") as train:
                for row in rows:
                    if name in answers:
                        answers[name].add(row)
                    count = counts[name]
                    if uniform(row.prompt, seed, "pretraining") < set_aside:
                        if share is None or count.pretraining < share:
                            pretrain.write(json.dumps(written(row, count)) + "\n")
                            count.pretraining += 1
                    elif train_items is None or count.adaptation < train_items:
                        train.write(json.dumps(written(row, count)) + "\n")
                        count.adaptation += 1
            _check_filled(path, counts[name])
    shortened = {name: count.shortened for name, count in counts.items() if count.shortened}
    if shortened:
        _log.warning(
            "prompts of more than domains.prompt_characters=%d lost their middle: %s rows",
            prompt_characters,
            ", ".join(f"{number} {name}" for name, number in shortened.items()),
        )

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


def files_of(source: Path, names: Sequence[str]) -> list[Path]:
    """The files of a folder that `write` reads, by name; others that lie there do not matter."""
    own = [f"{name}_{part}" for name in names for part in ("train", "test")]
    found = {file_of(source, name) for name in (*own, *BORROWED_TESTS)}
    return sorted(filter(is_listed, found))


def _hold_out(source: Path, name: str, seed: int, most: int) -> HeldOut:
    """Choose at most ``most`` rows of a domain by the hash of their prompts, in file order."""
    path, gsm8k = file_of(source, f"{name}_test"), file_of(source, "gsm8k_test")
    has_test = True
    if is_listed(path):
        rows = source_rows(path)
    elif name == "math" and is_listed(gsm8k):
        path = gsm8k
        rows = source_rows(path, prompt_key="question", response_key="answer")
    else:
        path, has_test = file_of(source, name + TRAIN), False
        rows = source_rows(path)
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
        path = file_of(source, f"{task}_test")
        if is_listed(path):
            for place, row in read_objects(path):
                yield prompt_key(text_of(row, column, place))


def _check_filled(path: Path, counts: DomainCounts) -> None:
    if not counts.adaptation:
        raise UserError(
            f"{path} leaves no rows to adapt to ({counts.heldout} held out, "
            f"{counts.held_out_prompt} with a held-out prompt, {counts.repeated} repeated, "
            f"{counts.blank} with a blank turn or no answer, {counts.pretraining} for "
            "pretraining); add rows"
        )


def _chat(row: SourceRow, shorten: Callable[[str], str]) -> dict[str, Any]:
    """A row of the artifact: prompts shortened, and the first with the row's task before it."""
    turns, task = [], f"Task: {row.task.replace('_', ' ')}\n\n" if row.task else ""
    for turn in row.turns:
        content = turn.content.strip()
        if turn.role == "user":
            content, task = task + shorten(content), ""
        turns.append(Turn(turn.role, content))
    return to_row(tuple(turns))


def without_middle(text: str, most: int | None) -> str:
    """At most so many characters of a text: a quarter from its beginning, the rest from its end.

    Abstracts end in their question and instructions often begin with it, so both ends matter.
    """
    if most is None or len(text) <= most:
        return text
    head = int(_HEAD * most)
    return text[:head] + _CUT + text[len(text) - (most - head - len(_CUT)) :]
