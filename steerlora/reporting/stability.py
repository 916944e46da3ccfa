"""Stability: do studies of other replicates come to the same verdicts?

Shapes: S replicates of a study, N studies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from steerlora.evaluation.records import BASE, Ablation, DomainSequence, Evaluation, Record
from steerlora.reporting.claim_measures import measure_claims
from steerlora.reporting.coverage import EVERY
from steerlora.reporting.effects import uncontrolled
from steerlora.reporting.methods import Methods
from steerlora.reporting.tables import Table, number, row_of
from steerlora.reporting.verdicts import (
    DIRECTION,
    IN_RANGE,
    LEAST_AGAIN,
    NO_VERDICT,
    NOT_MEASURED,
    NOT_REPRODUCED,
    PARTLY,
    UNDECIDED,
    VERDICTS,
    Judged,
)


def judgements(
    evaluations: list[Evaluation],
    ablations: list[Ablation],
    sequentials: list[DomainSequence],
    methods: Methods,
    main_model: str,
    seeds: list[int],
    studies: dict[int, np.ndarray],
    *,
    meaningful: bool,
) -> dict[int, dict[str, list[Judged]]]:
    """{replicates: {claim: the verdict of every study}}, by the code of the reports."""
    plain = uncontrolled(evaluations)
    found: dict[int, dict[str, list[Judged]]] = {}
    for size, chosen in studies.items():
        by_claim: dict[str, list[Judged]] = {}
        for members in chosen:
            of = {seeds[place] for place in members}
            claims = measure_claims(
                _of(plain, of), _of(ablations, of), _of(sequentials, of), methods,
                main_model=main_model, meaningful=meaningful,
            )  # fmt: skip
            for claim in claims:
                by_claim.setdefault(claim.id, []).append(claim.judged)
        found[size] = by_claim
    return found


def _of(records: list[Record], seeds: set[int]) -> list[Record]:
    """Those of some replicates, and of bases that stand for every replicate."""
    bases = Counter(record.model for record in records if record.method == BASE)
    return [
        record
        for record in records
        if record.seed in seeds or (record.method == BASE and bases[record.model] == 1)
    ]


def verdicts_table(
    judged: dict[int, dict[str, list[Judged]]], studies: dict[int, np.ndarray]
) -> Table | None:
    """Which verdicts studies came to, and whether another study came to the same.

    Args:
        judged: by `judgements`.
        studies: which replicates each study has.
    """
    rows, totals = [], {}
    for size, found in judged.items():
        members = np.zeros((len(studies[size]), studies[size].max() + 1))
        np.put_along_axis(members, studies[size], 1.0, axis=1)
        apart = members @ members.T == 0
        for claim, ones in found.items():
            by_intervals = [one.by_intervals for one in ones]
            for rule, said in ((True, [one.verdict for one in ones]), (False, by_intervals)):
                if set(said) <= {NOT_MEASURED, NO_VERDICT}:
                    continue
                row = {"claim": claim, "replicates": size, "rule": rule}
                counts = counted(said) | _compared(said, by_intervals, apart)
                total = totals.setdefault((size, rule), Counter())
                total.update(counts)
                rows.append(row | counts)
    rows += [
        {"claim": EVERY, "replicates": size, "rule": rule} | total
        for (size, rule), total in totals.items()
    ]
    if not rows:
        return None
    names = [*VERDICTS, "pairs", "again", "alike", "otherwise"]
    data = pd.DataFrame(rows).reindex(columns=["claim", "replicates", "rule", *names]).fillna(0)
    total = data[list(VERDICTS)].sum(axis=1)
    shares = data[list(VERDICTS)].div(total, axis=0)
    data[list(VERDICTS)] = shares
    data.insert(3, "studies", total.astype(int))
    for name in ("again", "alike", "otherwise"):
        data[name] = (data[name] / data.pairs).where(data.pairs > 0)
    of = data.set_index(["claim", "replicates", "rule"])
    cells = []
    for claim, size in dict.fromkeys(zip(data.claim, data.replicates, strict=True)):
        with_rule, alone = of.loc[claim, size, True], of.loc[claim, size, False]
        cells.append(
            row_of(
                claim,
                str(size),
                str(int(with_rule.studies)),
                *(number(with_rule[verdict], 2) for verdict in SHOWN),
                number(with_rule.again, 2),
                number(with_rule.alike, 2),
                number(with_rule.otherwise, 2),
                number(1 - alone[UNDECIDED] - alone[NOT_MEASURED], 2),
                number(alone.alike, 2),
                number(alone.otherwise, 2),
            )
        )
    caption = (
        "Verdicts: the share of studies of so many replicates that came to each. Of the pairs of "
        "studies without a common replicate of which one decided: again, how often the intervals "
        f"of the other say the same, which the rule of verdicts wants to be {LEAST_AGAIN}; alike "
        "and otherwise, how often the other decided the same, or the opposite. Intervals alone: "
        "the same without the rule."
    )
    headings = ["Claim", "Replicates", "Studies", *(name.capitalize() for name in SHOWN)]
    headings += ["Again", "Alike", "Otherwise", "Intervals alone: decided", "Alike", "Otherwise"]
    return Table("verdicts", caption, data, headings, cells)


SHOWN = (IN_RANGE, DIRECTION, NOT_REPRODUCED, UNDECIDED, PARTLY)
DECIDED = {IN_RANGE: 1, DIRECTION: 1, NOT_REPRODUCED: -1}


def counted(said: Sequence[str]) -> dict[str, int]:
    """{verdict: how often it was reached}, without those that never were."""
    counted = Counter(said)
    return {verdict: counted[verdict] for verdict in VERDICTS if counted[verdict]}


def _compared(
    said: Sequence[str], by_intervals: Sequence[str], apart: np.ndarray
) -> dict[str, int]:
    """Pairs (a study that decided, another), of how many the other's intervals say the same, and
    how many decided the same, and otherwise.

    Args:
        said: [N] verdicts.
        by_intervals: [N] what the intervals alone say.
        apart: [N, N] whether two studies have no replicate in common.
    """
    side, alone = (
        np.array([DECIDED.get(verdict, 0) for verdict in verdicts])
        for verdicts in (said, by_intervals)
    )
    both = side[:, None] * side[None, :] * apart
    return {
        "pairs": int((apart & (side != 0)[:, None]).sum()),
        "again": int((side[:, None] * alone[None, :] * apart > 0).sum()),
        "alike": int((both > 0).sum()),
        "otherwise": int((both < 0).sum()),
    }
