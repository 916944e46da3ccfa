"""The report of experiment ``routing_signals``: when SAE features tell domains apart better.

L levels of a condition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steerlora.evaluation.routing_signals import (
    DOMAINS,
    HIDDEN,
    LAST,
    NOISE,
    PROJECTION,
    ROWS,
    SAE,
    SHARED,
    SIGNALS,
    TOKENS,
    UNTRAINED,
    WORDS,
    RoutingSignals,
)
from steerlora.reporting.claims import Claim, judged_claim, without_verdicts
from steerlora.reporting.drawing import COLOURS, PAPER, panels
from steerlora.reporting.effects import Measure, fingerprints
from steerlora.reporting.evidence import replicates_text
from steerlora.reporting.report import Report, write_stage_report
from steerlora.reporting.tables import (
    OVER,
    Table,
    interval_fields,
    interval_text,
    number,
    row_interval,
    row_of,
)
from steerlora.reporting.verdicts import LEAST_SHARE

if TYPE_CHECKING:
    from steerlora.config import Config

FIGURE = "accuracy"
BETTER = 0.02
"""Accuracy by which one signal would have to be better to be worth an SAE."""
NAMES = {
    SAE: "SAE features",
    HIDDEN: "hidden states",
    LAST: "last hidden states",
    UNTRAINED: "untrained SAE",
    PROJECTION: "random projection",
    WORDS: "embeddings of the words",
}
AXES = {
    TOKENS: "tokens seen",
    SHARED: "share of sentences that all domains share",
    DOMAINS: "domains",
    NOISE: "share of random tokens",
    ROWS: "training texts a domain",
}
HARD = {
    TOKENS: ("after few tokens", False),
    SHARED: ("where domains are alike", True),
    DOMAINS: ("among many domains", True),
    NOISE: ("in noise", True),
    ROWS: ("from few texts", False),
}
"""{condition: (what its harder half of levels is, whether those are the high ones)}."""
RULE = (
    "Each effect is a difference of accuracies that the claim says is positive, mean over the "
    f"levels named. The smallest that counts is {LEAST_SHARE} of {BETTER}. Where a claim has "
    "several measures, all must satisfy it. Intervals are Student's t over replicates. Again is "
    "the probability that another study of the same size would decide alike."
)


def write_routing_signals(
    config: Config, records: Sequence[RoutingSignals], provenance: dict[str, Any]
) -> Report:
    """Write the report on some records into ``results.dir``."""
    seeds = sorted({record.seed for record in records})
    return write_stage_report(
        config,
        records,
        provenance,
        claims=signal_claims(records, meaningful=config.study.meaningful),
        tables=[accuracy_table(records), pairs_table(records)],
        figure=FIGURE,
        draw=partial(accuracy_figure, records),
        caption="Share of the texts that go to their own domain, by signal, with 95 % intervals; "
        "dotted: a guess; grey: the most that can be reached, where it is known",
        note=f"{replicates_text(seeds)}; {records[0].items:,} texts",
        varied=config.study.vary,
    )


Figures = Callable[[RoutingSignals, str], float | None]
"""A record's accuracy by one signal, mean over some levels or pairs; None: it has none."""


def signal_claims(
    records: Sequence[RoutingSignals], *, meaningful: bool = True
) -> tuple[Claim, ...]:
    """A claim a condition, one on pairs, and two on what the SAE's training is good for.

    Args:
        meaningful: False for a smoke run, which has figures and no verdicts.
    """
    rivals = (HIDDEN, LAST)
    found = []
    for place, (name, (words, _)) in enumerate(HARD.items(), 1):
        found.append(
            _claim(
                records,
                f"R{place}",
                f"SAE features tell domains apart better {words}",
                partial(_harder, name),
                rivals,
                f"mean over the harder half of the levels of: {AXES[name]}",
            )
        )
    found += [
        _claim(
            records,
            "R6",
            "SAE features tell the most alike of real domains apart better",
            _alike_pairs,
            rivals,
            "mean over the third of the pairs of domains whose words are the most alike",
        ),
        _claim(
            records,
            "R7",
            "SAE features tell domains apart better on the whole",
            _overall,
            rivals,
            "mean over all levels, of conditions first",
        ),
        _claim(
            records,
            "R8",
            "It is the SAE's training that does it",
            _overall,
            (UNTRAINED, PROJECTION),
            "mean over all levels, of conditions first",
        ),
    ]
    return tuple(found) if meaningful else without_verdicts(found)


def _harder(name: str, record: RoutingSignals, signal: str) -> float | None:
    """Mean over the harder half of a condition's levels."""
    values = record.accuracy.get(name, {}).get(signal)
    if not values:
        return None
    half, high = -(-len(values) // 2), HARD[name][1]
    return float(np.mean(values[-half:] if high else values[:half]))


def _overall(record: RoutingSignals, signal: str) -> float | None:
    means = [np.mean(found[signal]) for found in record.accuracy.values()]
    return float(np.mean(means)) if means else None


def _alike_pairs(record: RoutingSignals, signal: str) -> float | None:
    chosen = sorted(record.pairs, key=lambda pair: -pair.likeness)
    chosen = chosen[: -(-len(chosen) // 3)]
    return float(np.mean([pair.accuracy[signal] for pair in chosen])) if chosen else None


def _claim(
    records: Sequence[RoutingSignals],
    id: str,
    text: str,
    figure: Figures,
    rivals: Sequence[str],
    over: str,
) -> Claim:
    beside = _less(records, figure, WORDS) if HIDDEN in rivals else None
    return judged_claim(
        id,
        text,
        "our own question",
        f"accuracy by SAE features less that by each other signal, {over}.",
        [_less(records, figure, rival) for rival in rivals],
        unit="accuracy",
        smallest=BETTER,
        note=""
        if beside is None
        else f"Less {NAMES[WORDS]}: {interval_text(beside.interval, 3, sign=True)}.",
        rule=RULE,
    )


def _less(records: Sequence[RoutingSignals], figure: Figures, rival: str) -> Measure | None:
    """SAE features less a rival, in every replicate."""
    values = [(figure(record, SAE), figure(record, rival)) for record in records]
    pairs = [
        (r, own - other) for r, (own, other) in zip(records, values, strict=True) if own is not None
    ]
    if not pairs:
        return None
    return Measure(
        f"less {NAMES[rival]}",
        tuple(record.seed for record, _ in pairs),
        tuple(difference for _, difference in pairs),
        None,
        (0.0,) * len(pairs),
        min(record.items for record, _ in pairs),
        fingerprints(record for record, _ in pairs),
    )


def accuracy_table(records: Sequence[RoutingSignals]) -> Table:
    """A row a level of every condition."""
    rows = []
    for name, levels in records[0].levels.items():
        for place, level in enumerate(levels):

            def at(record: RoutingSignals, signal: str, name=name, place=place) -> float:
                return record.accuracy[name][signal][place]

            rows.append({"condition": name, "level": level} | _fields(records, at))
    return Table(
        "accuracy",
        "Share of the texts that go to their own domain; all else is at the reference of the "
        f"configuration ({OVER}).",
        pd.DataFrame(rows),
        ["condition", "level", *NAMES.values(), "SAE less hidden states"],
        [row_of(AXES[row["condition"]], f"{row['level']:g}", *_cells(row)) for row in rows],
    )


def pairs_table(records: Sequence[RoutingSignals]) -> Table | None:
    """A row a pair of domains, the most alike first."""
    likeness: dict[tuple[str, str], list[float]] = {}
    for record in records:
        for pair in record.pairs:
            likeness.setdefault(tuple(pair.domains), []).append(pair.likeness)
    rows = []
    for domains, found in sorted(likeness.items(), key=lambda item: -np.mean(item[1])):

        def of(record: RoutingSignals, signal: str, domains=domains) -> float:
            return next(p for p in record.pairs if tuple(p.domains) == domains).accuracy[signal]

        head = {"one": domains[0], "other": domains[1], "likeness": float(np.mean(found))}
        rows.append(head | _fields(records, of))
    if not rows:
        return None
    return Table(
        "pairs",
        "Two domains told apart from each other, those first whose words are the most alike "
        f"(cosine of how often either uses each token); share of the texts ({OVER}).",
        pd.DataFrame(rows),
        ["domains", "likeness", *NAMES.values(), "SAE less hidden states"],
        [
            row_of(f"{row['one']}, {row['other']}", number(row["likeness"], 2), *_cells(row))
            for row in rows
        ],
    )


def _fields(records: Sequence[RoutingSignals], at: Figures) -> dict[str, float]:
    """Columns of every signal, and of the SAE's less the hidden states'."""
    found: dict[str, float] = {}
    for signal in SIGNALS:
        values = tuple(at(record, signal) for record in records)
        seeds = tuple(record.seed for record in records)
        zeros = (0.0,) * len(records)
        found |= interval_fields(signal, Measure(signal, seeds, values, None, zeros, 0, ()))
    return found | interval_fields("difference", _less(records, at, HIDDEN))


def _cells(row: dict[str, Any]) -> list[str]:
    shown = [row_interval(row, signal, 3) for signal in NAMES]
    return [*shown, row_interval(row, "difference", 3, sign=True)]


def accuracy_figure(records: Sequence[RoutingSignals]) -> Figure | None:
    """A panel a condition; None where none varies."""
    first = records[0]
    if not first.levels:
        return None
    data = accuracy_table(records).data
    figure, axes = panels(len(first.levels), columns=3, height=2.6)
    for axis, (name, levels) in zip(axes, first.levels.items(), strict=True):
        for colour, (signal, label) in zip(COLOURS, NAMES.items(), strict=False):
            _line(axis, data[data.condition == name], signal, label, colour)
        axis.plot(levels, first.chance[name], ":", color="black", linewidth=1)
        if name in first.best:
            axis.plot(levels, first.best[name], color=PAPER, linewidth=3, zorder=0)
        if name in (TOKENS, DOMAINS, ROWS):
            axis.set_xscale("log", base=2)
            axis.set_xticks(levels, [f"{level:g}" for level in levels])
            axis.minorticks_off()
        axis.set_xlabel(AXES[name], fontsize=9)
        axis.set_ylim(0, 1.02)
        axis.grid(axis="y")
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=3, fontsize=8)
    return figure


def _line(axis: Axes, rows: pd.DataFrame, signal: str, label: str, colour: str) -> None:
    middle = rows[signal].to_numpy()
    arms = np.vstack([middle - rows[f"{signal}_low"], rows[f"{signal}_high"] - middle])
    axis.errorbar(
        rows.level, middle, np.nan_to_num(arms).clip(min=0), label=label, color=colour, marker="o",
        markersize=3, linewidth=1, capsize=2,
    )  # fmt: skip
