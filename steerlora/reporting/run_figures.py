"""The figures of one artifact, under names that mean the same in every stage.

======================================  ==========================================================
``target/<domain>``                     score on the domain's own task
``average/<group>``                     mean over a group of tasks; ``target`` is all domains' own
``drop_pct/<intervention>/<domain>``    100 (intact - changed) / intact of the domain's score
``drop_pct/<intervention>``             the same of the mean over all domains
``forgetting/<measure>``                of a sequence; the formulas are those of
                                        `steerlora.evaluation.forgetting`
``general_kept``                        general knowledge after a sequence, as a share of the base's
``routing/<measure>``                   of the first control site
``throughput/<measure>``                of a training
======================================  ==========================================================

What a stage alone measures has the stage's name in front (``sae_training/fvu``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from steerlora.evaluation.records import (
    INTACT,
    Ablation,
    DomainSequence,
    Evaluation,
    RoutingSummary,
)
from steerlora.evaluation.scores import Estimate, Score
from steerlora.evaluation.statistics import CONFIDENCE
from steerlora.reporting.effects import drop, mean_of

FORGETTING = {
    "positive_forgetting": "positive_mean",
    "chaudhry_forgetting": "chaudhry",
    "backward_transfer": "backward_transfer",
    "forward_transfer": "forward_transfer",
    "final_average": "final_average",
}
"""{metric of a sequence: what follows ``forgetting/``}."""

THROUGHPUT = {
    "tokens": "tokens",
    "seconds": "seconds",
    "tokens_per_second": "tokens_per_second",
    "mfu": "mfu",
    "peak_memory_bytes": "peak_memory_bytes",
}
"""{figure of a training: what follows ``throughput/``}."""

LOWER = ("forgetting/positive_mean", "forgetting/chaudhry")
"""Figures of which less is better."""

NORMAL = 1.959963984540054  # the 0.975 quantile of the normal distribution
assert CONFIDENCE == 0.95


class Figure(NamedTuple):
    """A number and, where it rests on evaluation items, its standard error."""

    value: float
    stderr: float | None = None
    """From the items alone: what another draw of items would change. None: not known."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """Ends of the normal 95 % interval over items; None where there is no error."""
        if self.stderr is None or not math.isfinite(self.stderr):
            return None
        return self.value - NORMAL * self.stderr, self.value + NORMAL * self.stderr


def figures_of(
    stage: str,
    summary: Mapping[str, Any],
    record: Evaluation | Ablation | DomainSequence | None = None,
) -> dict[str, Figure]:
    """{name: figure} of an artifact.

    Args:
        stage: that built it.
        summary: what the stage measured, as in the artifact's manifest.
        record: that the stage wrote, if it writes one; then the summary says nothing more.
    """
    if isinstance(record, Evaluation):
        return _of_evaluation(record)
    if isinstance(record, Ablation):
        return _of_ablation(record)
    if isinstance(record, DomainSequence):
        return _of_sequence(record)
    numbers = {
        name: float(value)
        for name, value in summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    trained = "tokens_per_second" in numbers  # else "tokens" counts what was read
    return {
        f"throughput/{THROUGHPUT[name]}"
        if trained and name in THROUGHPUT
        else f"{stage}/{name}": Figure(value)
        for name, value in numbers.items()
    }


def _figure(estimate: Any) -> Figure:
    return Figure(estimate.value, estimate.stderr)


def _of_evaluation(record: Evaluation) -> dict[str, Figure]:
    targets = {d: record.tasks.get(task) for d, task in record.target_tasks.items()}
    found = {f"average/{name}": _figure(mean) for name, mean in record.averages.items()}
    found |= {f"target/{name}": _figure(score) for name, score in targets.items() if score}
    own = set(record.target_tasks.values())
    found |= {
        f"task/{name}": _figure(score) for name, score in record.tasks.items() if name not in own
    }
    if record.routing is not None:
        measures = {field.name for field in fields(RoutingSummary)} | {
            "routed",
            "mutual_information",
            "mutual_information_null",
        }
        routing = record.routing
        found |= {
            f"routing/{name}": Figure(float(getattr(routing, name))) for name in sorted(measures)
        }
    return found


def _of_ablation(record: Ablation) -> dict[str, Figure]:
    intact = record.interventions[INTACT]
    found = {"average/target": _figure(mean_of(list(intact.values())))}
    found |= {f"target/{domain}": _figure(score) for domain, score in intact.items()}
    for name in record.interventions:
        if name == INTACT:
            continue
        for domain in (None, *record.domains):
            measure = drop([record], name, [domain] if domain else ())
            value = measure.interval.value if measure else math.nan
            if math.isfinite(value):
                key = f"drop_pct/{name}/{domain}" if domain else f"drop_pct/{name}"
                found[key] = Figure(value, measure.item_errors[0])
    return found


def _of_sequence(record: DomainSequence) -> dict[str, Figure]:
    last = [
        Estimate(value, error)
        for value, error in zip(record.matrix[-1], record.stderr[-1], strict=True)
    ]
    found = {
        f"target/{domain}": _figure(score)
        for domain, score in zip(record.domains, last, strict=True)
    }
    found["average/target"] = _figure(mean_of(last))
    found |= {
        f"forgetting/{FORGETTING.get(name, name)}": Figure(value)
        for name, value in record.metrics.items()
    }
    if record.general:
        before, after = record.general.before, record.general.after
        found["average/general_knowledge"] = _figure(after)
        if before.value > 0:
            found["general_kept"] = Figure(after.value / before.value)
    return found


def scores_behind(record: Any, name: str) -> list[Score]:
    """The scores whose mean a figure is, with the metric of every item; empty: it is no mean."""
    kind, _, rest = name.partition("/")
    if isinstance(record, Evaluation):
        tasks = {
            "average": {"target": [*record.target_tasks.values()], **record.groups}.get(rest, []),
            "target": [record.target_tasks.get(rest)],
            "task": [rest],
        }.get(kind, [])
        return [record.tasks[task] for task in tasks if task in record.tasks]
    if isinstance(record, Ablation):
        intact = record.interventions[INTACT]
        if name == "average/target":
            return list(intact.values())
        return [intact[rest]] if kind == "target" and rest in intact else []
    return []


def is_headline(name: str) -> bool:
    """Whether a table for people has room for the figure: no single domain's or task's."""
    first, *rest = name.split("/")
    shown = ("average", "drop_pct", "general_kept")
    return (first in shown and len(rest) < 2) or name in (
        *LOWER[:1],
        "forgetting/final_average",
        "throughput/tokens_per_second",
    )
