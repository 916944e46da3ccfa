"""The evaluation half of a text domains artifact: lm-eval items and their description."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from steerlora.data.domains.text.rows import SourceRow, is_listed
from steerlora.data.jsonl import file_of, read_objects

VERSION = 2
LIKELIHOOD = "likelihood"
"""The metric of a domain's target score, and the end of its name."""
SHORT_ANSWER_DOMAINS = ("medicine", "law")
"""Domains whose answers are short enough for multiple choice, each with a task file."""

BORROWED_TESTS = ("gsm8k_test", "ifeval_test")
"""Files, without their endings, that lm-eval's own tasks read, where they are there."""
_METRICS = {
    "text_gsm8k": "exact_match,flexible-extract",
    "text_ifeval": "prompt_level_strict_acc,none",
}
_MAX_CHOICES = 10
_MAX_CHOICE_CHARACTERS = 40


@dataclass
class ShortAnswers:
    """The answers seen in training, by task: the choices of that task's multiple-choice items."""

    by_task: dict[str, set[str] | None] = field(default_factory=lambda: defaultdict(set))

    def add(self, row: SourceRow) -> None:
        """Take note of one training row; a task with long or many answers has no choices."""
        seen, answer = self.by_task[row.task], row.response.strip()
        if seen is None:
            return
        seen.add(answer)
        if len(answer) > _MAX_CHOICE_CHARACTERS or len(seen) > _MAX_CHOICES:
            self.by_task[row.task] = None

    def items(self, rows: Iterable[SourceRow], chats: Iterable[dict[str, Any]]) -> list[dict]:
        """Held-out rows as multiple-choice items, where the answer is one that training had.

        A row of several turns is none: the task asks one question.

        Args:
            rows: held-out rows.
            chats: the same rows as they are shown to a model.

        Returns:
            ``{"prompt", "choices", "answer"}``, the answer as an index.
        """
        items = []
        for row, chat in zip(rows, chats, strict=True):
            choices = sorted(self.by_task.get(row.task) or ())
            if len(choices) > 1 and chat.get("response") in choices:
                answer = choices.index(chat["response"])
                items.append({"prompt": chat["prompt"], "choices": choices, "answer": answer})
        return items


def borrowed_items(source: Path, most: int) -> dict[str, list[dict]]:
    """The first rows of the test files that lm-eval's own tasks read, by our name of the task."""
    paths = {name: file_of(source, name) for name in BORROWED_TESTS}
    return {
        f"text_{name.removesuffix('_test')}": [row for _, row in islice(read_objects(path), most)]
        for name, path in paths.items()
        if is_listed(path)
    }


def describe(names: tuple[str, ...], tasks: list[str]) -> dict[str, object]:
    """The domains, the tasks there are items for, and how each task is scored.

    The target score of a domain is the likelihood of its held-out responses, the mean over rows of
    exp(-nats a token), from 0 to 1; ``extra_tasks`` are accuracies reported beside it. Of all of
    them, higher is better.
    """
    targets = {name: f"text_{name}_{LIKELIHOOD}" for name in names}
    return {
        "kind": "text",
        "version": VERSION,
        "names": list(names),
        "target_tasks": targets,
        "extra_tasks": [f"text_{name}" for name in names if f"text_{name}" in tasks],
        "groups": {
            "instruction_following": [task for task in tasks if task == "text_ifeval"],
            "general_knowledge": [],
            "mmlu_pro": [],
            "gsm8k": [task for task in tasks if task == "text_gsm8k"],
        },
        "metrics": {task: _METRICS.get(task, "acc,none") for task in tasks}
        | dict.fromkeys(targets.values(), LIKELIHOOD),
        "higher_is_better": dict.fromkeys([*tasks, *targets.values()], True),
    }
