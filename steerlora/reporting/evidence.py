"""What a figure rests on, in a line: replicates by their seeds, and items or tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from steerlora.evaluation.records import (
    BASE,
    INTACT,
    Ablation,
    DomainSequence,
    Evaluation,
    Record,
)


def evidence(records: Sequence[Record], *, tokens: bool = False) -> str:
    """``4 replicates (seeds 0 to 3); 200 items a task``.

    Of one replicate it says that there are no intervals; where models differ in their replicates,
    it says so of each.

    Args:
        records: all that a figure shows; those of a base model count where there are no others.
        tokens: whether the figure is about tokens of text and not about items of tasks.
    """
    adapted = [record for record in records if record.method != BASE] or records
    models: dict[tuple[int, ...], list[str]] = {}
    for model in dict.fromkeys(record.model for record in adapted):
        seeds = tuple(sorted({record.seed for record in adapted if record.model == model}))
        models.setdefault(seeds, []).append(model)
    several = len(models) > 1
    parts = [
        (f"{', '.join(names)}: " if several else "") + replicates_text(seeds)
        for seeds, names in models.items()
    ]
    counted = _tokens(adapted) if tokens else _items(adapted)
    return "; ".join([*parts, *counted])


def replicates_text(seeds: Sequence[int]) -> str:
    """``4 replicates (seeds 0 to 3)``; of one, that it has no interval."""
    if len(seeds) == 1:
        return f"1 replicate (seed {seeds[0]}), no interval"
    first, last = seeds[0], seeds[-1]
    in_a_row = len(seeds) > 2 and list(seeds) == list(range(first, last + 1))
    named = f"{first} to {last}" if in_a_row else ", ".join(map(str, seeds))
    return f"{len(seeds)} replicates (seeds {named})"


def _items(records: Iterable[Record]) -> list[str]:
    found: set[int] = set()
    unit = "task"
    for record in records:
        if isinstance(record, Evaluation):
            found |= {score.items for score in record.tasks.values()}
        elif isinstance(record, Ablation):
            unit = "domain"
            found |= {score.items for score in record.interventions[INTACT].values()}
        elif isinstance(record, DomainSequence):
            unit = "domain"
            found.add(record.items)
    return [f"{_span(found)} items a {unit}"] if found - {0} else []


def _tokens(records: Iterable[Record]) -> list[str]:
    found = {r.routing.tokens for r in records if isinstance(r, Evaluation) and r.routing}
    return [f"{_span(found)} tokens"] if found - {0} else []


def _span(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
