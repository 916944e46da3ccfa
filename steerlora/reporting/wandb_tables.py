"""A record's numbers as tables for W&B: {name: (columns, rows)}."""

from __future__ import annotations

from typing import Any

from steerlora.evaluation.records import INTACT, Ablation, DomainSequence, Evaluation
from steerlora.reporting.run_figures import figures_of

Rows = tuple[list[str], list[list[Any]]]


def tables_of(record: Evaluation | Ablation | DomainSequence) -> dict[str, Rows]:
    """The tables of a record, whichever kind it is; those without a row are left out."""
    if isinstance(record, Evaluation):
        found = {"scores": _scores(record), "routing": _routing(record)}
    elif isinstance(record, Ablation):
        found = {"drops": _drops(record)}
    else:
        found = {"forgetting_matrix": _matrix(record)}
    return {name: table for name, table in found.items() if table[1]}


def _scores(record: Evaluation) -> Rows:
    owner = {task: domain for domain, task in record.target_tasks.items()}
    columns = ["task", "domain", "metric", "value", "stderr", "items", "cut", "version", "shots"]
    return columns, [
        [name, owner.get(name), s.metric, s.value, s.stderr, s.items, s.cut, s.version, s.shots]
        for name, s in record.tasks.items()
    ]


def _routing(record: Evaluation) -> Rows:
    """The heatmap of the gate, a row a cell."""
    columns = ["site", "domain", "specialist", "gate", "mean_rank"]
    return columns, [
        [site, domain, specialist, gate, routing.rank_by_domain.get(domain)]
        for site, routing in record.routing_by_site.items()
        for domain, gates in routing.gate_by_domain.items()
        for specialist, gate in enumerate(gates)
    ]


def _drops(record: Ablation) -> Rows:
    figures = figures_of("", {}, record)
    intact = record.interventions[INTACT]
    columns = ["intervention", "domain", "intact", "score", "stderr", "items"]
    rows = []
    for name, by_domain in record.interventions.items():
        for domain, score in by_domain.items():
            row = [name, domain, intact[domain].value, score.value, score.stderr, score.items]
            drop = figures.get(f"drop_pct/{name}/{domain}")
            low, high = (drop.interval if drop else None) or (None, None)
            rows.append([*row, drop.value if drop else None, low, high])
    return [*columns, "drop_pct", "drop_pct_low", "drop_pct_high"], rows


def _matrix(record: DomainSequence) -> Rows:
    learnt = ["base", *record.sequence]
    columns = ["stage", "learnt", *record.domains]
    return columns, [[stage, learnt[stage], *row] for stage, row in enumerate(record.matrix)]
