"""What a task's scoring gives, and the averages of groups of tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    stderr: float
    """From the evaluation items."""


@dataclass(frozen=True)
class Score:
    """One task's score."""

    metric: str
    """lm-eval's key, "name,filter"."""
    value: float
    """Mean over items."""
    stderr: float
    """Its standard error."""
    items: int
    """How many."""
    version: str
    """Of the task."""
    per_item: list[float]
    """The metric of each item; those of an lm-eval group task after task, in its order."""
    others: dict[str, float] = field(default_factory=dict)
    """The task's other metrics."""
    shots: int | None = 0
    """Solved examples before each item; None where a group's tasks differ."""
    cut: int = 0
    """Items that did not fit into the context, of which the beginning of the prompt, or the end of
    a held-out response, was lost."""


def averages(
    scores: Mapping[str, Score], groups: Mapping[str, Sequence[str]]
) -> dict[str, Estimate]:
    """{group: unweighted mean over its tasks}, as far as they are scored."""
    found = {}
    for name, tasks in groups.items():
        scored = [scores[task] for task in tasks if task in scores]
        if scored:
            found[name] = Estimate(
                sum(score.value for score in scored) / len(scored),
                math.sqrt(sum(score.stderr**2 for score in scored)) / len(scored),
            )
    return found
