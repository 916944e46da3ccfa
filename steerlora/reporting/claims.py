"""Does it hold? A claim of the paper beside our number, the rule for a verdict, how it is shown.

The rule looks at intervals, never at points (`verdict`). What each claim is measured by is its
``definition``, which ``claims.md`` shows; `steerlora.reporting.claim_measures` computes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.markup import escape as escape_markup
from rich.table import Table as TerminalTable
from rich.text import Text

from steerlora.evaluation.statistics import Interval
from steerlora.reporting.effects import Measure
from steerlora.reporting.labels import BANNER
from steerlora.reporting.tables import MISSING, interval_text, markdown_grid, number, page, row_of

IN_RANGE = "in range"
DIRECTION = "direction reproduced"
NOT_REPRODUCED = "not reproduced"
NOT_MEASURED = "not measured"

RULE = (
    "**not measured**: no records, or too few for an interval. "
    "**not reproduced**: some 95 % interval does not lie wholly on the claimed side of zero. "
    "**direction reproduced**: all of them do. "
    "**in range**: they do, and every interval also meets the paper's range. "
    "Where a claim is about several models or interventions, all must satisfy it. "
    "C3, C5 and C8 say in their definition what takes the place of zero and of the range."
)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim, measured."""

    id: str
    """``C1`` to ``C8``."""
    text: str
    """What the paper says."""
    paper: str
    """Its figure, as text."""
    low: float | None
    """Lower end of its figure; None where it gives no range."""
    high: float | None
    """Upper end of its figure; None where it gives no range."""
    unit: str
    """Of the range and of the measures."""
    definition: str
    """What ours is, in a sentence or two."""
    measures: tuple[Measure, ...] = ()
    """Ours, one entry a model or an intervention; none if not measured."""
    verdict: str = NOT_MEASURED
    """`IN_RANGE`, `DIRECTION`, `NOT_REPRODUCED` or `NOT_MEASURED`."""
    note: str = ""
    """What else a reader should know."""

    @property
    def envelope(self) -> Interval | None:
        """Mean of the measures, lowest and highest bound, fewest seeds, most items."""
        if not self.measures:
            return None
        values, lows, highs, seeds, items = zip(*(m.interval for m in self.measures), strict=True)
        return Interval(sum(values) / len(values), min(lows), max(highs), min(seeds), max(items))

    @property
    def ours(self) -> str:
        """Our figure as text: an interval, or the range of several."""
        if not self.measures:
            return MISSING
        digits, unit, sign = self._format
        values = [measure.interval.value for measure in self.measures]
        ends = [number(end, digits, sign=sign) for end in (min(values), max(values))]
        if len(set(ends)) == 1:
            return self._show(self.envelope)
        low, high = (number(bound, digits, sign=sign) for bound in self.envelope[1:3])
        return f"{ends[0]} to {ends[1]}{unit} [{low}, {high}]"

    @property
    def details(self) -> list[str]:
        """Every measure on a line of its own."""
        return [
            f"{measure.label}: {self._show(measure.interval)}; seeds: {measure.interval.seeds}"
            + (f"; items: {measure.interval.items}" if measure.interval.items else "")
            for measure in self.measures
        ]

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """The artifacts that the measures came from."""
        return tuple(dict.fromkeys(name for m in self.measures for name in m.fingerprints))

    @property
    def _format(self) -> tuple[int, str, bool]:
        return (1, " %", False) if self.unit == "percent" else (3, "", True)

    def _show(self, interval: Interval) -> str:
        digits, unit, sign = self._format
        return interval_text(interval, digits, unit, sign=sign)


def verdict(direction: Sequence[Interval], *, agrees: bool) -> str:
    """The rule.

    Args:
        direction: intervals that the claim says are positive.
        agrees: whether the figures also agree with the paper's.
    """
    if not direction or not all(interval.known for interval in direction):
        return NOT_MEASURED
    if not all(interval.low > 0 for interval in direction):
        return NOT_REPRODUCED
    return IN_RANGE if agrees else DIRECTION


def overlaps(interval: Interval, low: float, high: float) -> bool:
    """Whether an interval and the paper's range have a point in common."""
    return interval.low <= high and interval.high >= low


COLUMNS = ("Claim", "Paper", "Ours [95 % interval]", "Seeds", "Items", "Verdict")


def _row(claim: Claim) -> list[str]:
    seeds, items = (
        _span(getattr(measure.interval, field) for measure in claim.measures)
        for field in ("seeds", "items")
    )
    return [f"{claim.id} {claim.text}", claim.paper, claim.ours, seeds, items, claim.verdict]


def _span(counts: Iterable[int]) -> str:
    """``2`` or ``1–2``; a dash where nothing was counted."""
    found = sorted({count for count in counts if count})
    if not found:
        return MISSING
    return str(found[0]) if len(found) == 1 else f"{found[0]}–{found[-1]}"


def claims_grid(claims: Sequence[Claim]) -> str:
    """The claims as a Markdown table, one row each."""
    return markdown_grid(COLUMNS, [row_of(*_row(claim)) for claim in claims])


def claims_markdown(claims: Sequence[Claim], *, name: str, meaningful: bool) -> str:
    """``claims.md``: the table, the rule, then every claim with its definition and sources."""
    parts = [claims_grid(claims), f"How a verdict is reached. {RULE}"]
    for claim in claims:
        parts.append(f"## {claim.id}: {claim.verdict}")
        parts.append(f"{claim.text}. Paper: {claim.paper}. Ours: {claim.definition}")
        if claim.measures:
            parts.append("\n".join(f"- {line}" for line in claim.details))
        if claim.note:
            parts.append(claim.note)
        if claim.fingerprints:
            sources = ", ".join(f"`{fingerprint[:12]}`" for fingerprint in claim.fingerprints)
            parts.append(f"From artifacts {sources}.")
    return page(parts, meaningful=meaningful, title=f"Claims: {name}")


def claims_json(claims: Sequence[Claim], *, name: str, meaningful: bool) -> str:
    """``claims.json``; numbers that do not exist are null."""
    document = {
        "name": name,
        "meaningful": meaningful,
        **({} if meaningful else {"banner": BANNER}),
        "rule": RULE.replace("**", ""),
        "claims": [
            {
                "id": claim.id,
                "claim": claim.text,
                "paper": {"text": claim.paper, "low": claim.low, "high": claim.high},
                "unit": claim.unit,
                "definition": claim.definition,
                "ours": {"text": claim.ours, **_numbers(claim.envelope)},
                "measures": [
                    {"label": measure.label, **_numbers(measure.interval)}
                    for measure in claim.measures
                ],
                "verdict": claim.verdict,
                "note": claim.note,
                "artifacts": list(claim.fingerprints),
            }
            for claim in claims
        ],
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _numbers(interval: Interval | None) -> dict[str, float | int | None]:
    if interval is None:
        return dict.fromkeys(Interval._fields)
    return {field: None if value != value else value for field, value in interval._asdict().items()}


STYLES = {IN_RANGE: "green", DIRECTION: "cyan", NOT_REPRODUCED: "red", NOT_MEASURED: "dim"}


def claims_terminal(claims: Sequence[Claim], *, name: str, meaningful: bool) -> TerminalTable:
    """The claims for the terminal, verdicts in colour."""
    title = f"{name}: the paper's claims" + ("" if meaningful else f"\n{BANNER}")
    table = TerminalTable(*COLUMNS, title=escape_markup(title))
    for claim in claims:
        *cells, reached = _row(claim)
        table.add_row(*map(Text, cells), Text(reached, style=STYLES[reached]))
    return table
