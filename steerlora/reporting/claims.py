"""Does it hold? A claim of the paper beside our number, its verdict, how it is shown.

How a verdict is reached is `steerlora.reporting.verdicts`. What each claim is measured by is its
``definition``, which ``claims.md`` shows; `steerlora.reporting.claim_measures` computes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.table import Column
from rich.table import Table as TerminalTable
from rich.text import Text

from steerlora.evaluation.statistics import Interval
from steerlora.reporting.effects import Measure
from steerlora.reporting.labels import BANNER
from steerlora.reporting.tables import MISSING, interval_text, markdown_grid, number, page, row_of
from steerlora.reporting.verdicts import (
    DIRECTION,
    IN_RANGE,
    LEAST_AGAIN,
    LEAST_SHARE,
    MEANINGS,
    NO_VERDICT,
    NOT_MEASURED,
    NOT_REPRODUCED,
    PARTLY,
    RULE,
    UNDECIDED,
    Judged,
    judge,
)
from steerlora.text import for_markdown, for_markup

Studies = Mapping[str, Mapping[int, Mapping[str, int]]]
"""{claim: {replicates: {verdict: how many studies came to it}}}, of a calibration study."""


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
    counts_from: str
    """The smallest effect that counts, as text."""
    measures: tuple[Measure, ...] = ()
    """Ours, one entry a model or an intervention; none if not measured."""
    judged: Judged
    """The verdict, and what it comes from."""
    note: str = ""
    """What else a reader should know."""
    rule: str = RULE
    """How verdicts are reached; the same for all claims of a report."""

    @property
    def verdict(self) -> str:
        """One of those of `steerlora.reporting.verdicts`."""
        return self.judged.verdict

    @property
    def shown_verdict(self) -> str:
        """The verdict; of an undecided one also over how many replicates."""
        if self.verdict != UNDECIDED:
            return self.verdict
        return f"{UNDECIDED} ({_replicates(self.judged.replicates)})"

    @property
    def shown_again(self) -> str:
        """Probability that another study of this size comes to what the intervals say."""
        return number(self.judged.again, 2)

    @property
    def envelope(self) -> Interval | None:
        """Mean of the measures, lowest and highest bound, fewest replicates, most items."""
        if not self.measures:
            return None
        values, lows, highs, seeds, items = zip(*(m.interval for m in self.measures), strict=True)
        return Interval(sum(values) / len(values), min(lows), max(highs), min(seeds), max(items))

    @property
    def ours(self) -> str:
        """Our figure as text: one interval, or how far several reach."""
        if not self.measures:
            return MISSING
        if len(self.measures) == 1:
            return self.shown(self.measures[0])
        digits, unit, sign = self._format
        values = [measure.interval.value for measure in self.measures]
        ends = [number(end, digits, sign=sign) for end in (min(values), max(values))]
        return " to ".join(dict.fromkeys(ends)) + unit

    def shown(self, measure: Measure) -> str:
        """A measure as text, with its interval."""
        digits, unit, sign = self._format
        return interval_text(measure.interval, digits, unit, sign=sign)

    @property
    def details(self) -> list[str]:
        """Every measure on a line of its own."""
        return [
            f"{measure.label}: {self.shown(measure)}; "
            f"{_replicates(measure.interval.seeds)}"
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


def judged_claim(
    id: str,
    text: str,
    paper: str,
    definition: str,
    measures: Sequence[Measure | None],
    *,
    unit: str,
    smallest: float,
    range: tuple[float | None, float | None] = (None, None),
    direction: Sequence[Interval] | None = None,
    agrees: bool = False,
    whole: bool = True,
    counts_from: str | None = None,
    note: str = "",
    rule: str = RULE,
) -> Claim:
    """A claim with its verdict.

    Args:
        id, text, paper, definition, unit, note, rule: as in `Claim`.
        measures: those that are not None are ours.
        smallest: effect that the paper's figure implies; `LEAST_SHARE` of it counts.
        range: of the paper's figure.
        direction: intervals that the claim says are positive; the measures' unless given.
        agrees: whether the figures also agree with the paper's.
        whole: whether what is measured is all that the claim names.
        counts_from: the smallest effect that counts, as text; that of ``smallest`` unless given.
    """
    known = tuple(measure for measure in measures if measure is not None)
    effects = [measure.interval for measure in known] if direction is None else direction
    if counts_from is None:
        least = LEAST_SHARE * smallest
        counts_from = f"{number(least, 1)} %" if unit == "percent" else number(least, 4, sign=True)
    return Claim(
        id=id,
        text=text,
        paper=paper,
        low=range[0],
        high=range[1],
        unit=unit,
        definition=definition,
        counts_from=counts_from,
        measures=known,
        judged=judge(effects, smallest=smallest, agrees=agrees, whole=whole) if known else Judged(),
        note=note,
        rule=rule,
    )


def _replicates(count: int) -> str:
    return f"{count} replicate" if count == 1 else f"{count} replicates"


COLUMNS = ("Claim", "Paper", "Ours [95 % interval]", "Replicates", "Items", "Counts from")
COLUMNS += ("Verdict", "Again")


def claim_rows(claim: Claim) -> list[list[str]]:
    """The claim's row; where it has several measures, each of them is a row below."""
    name, several = f"{claim.id} {claim.text}", len(claim.measures) > 1
    ours = [[MISSING] * 3] if not claim.measures else [_ours(claim, m) for m in claim.measures]
    first = [""] * 3 if several else ours[0]
    head = [name, claim.paper, *first, claim.counts_from, claim.shown_verdict, claim.shown_again]
    if not several:
        return [head]
    below = zip(claim.measures, ours, strict=True)
    return [head, *([f"… {m.label}", "", *cells, "", "", ""] for m, cells in below)]


def _ours(claim: Claim, measure: Measure) -> list[str]:
    """A measure's cells: its figure, replicates and items."""
    counts = (measure.interval.seeds, measure.interval.items)
    return [claim.shown(measure), *(str(count) if count else MISSING for count in counts)]


def without_verdicts(claims: Sequence[Claim]) -> tuple[Claim, ...]:
    """The claims of a run that is not meaningful: figures, and no verdict."""
    return tuple(replace(claim, judged=Judged(NO_VERDICT)) for claim in claims)


def claims_grid(claims: Sequence[Claim]) -> str:
    """The claims as a Markdown table, a row for every measure, and what its verdicts say."""
    rows = [row_of(*row) for claim in claims for row in claim_rows(claim)]
    meanings = "\n".join(_meanings(claims, "- **{}**: {}."))
    return f"{markdown_grid(COLUMNS, rows)}\n\n{meanings}"


def _meanings(claims: Sequence[Claim], line: str) -> list[str]:
    """A line for every verdict that the claims have."""
    had = {claim.verdict for claim in claims}
    return [line.format(name, says) for name, says in MEANINGS.items() if name in had]


def claims_markdown(
    claims: Sequence[Claim], *, name: str, meaningful: bool, studies: Studies | None = None
) -> str:
    """``claims.md``: the table, the rule, then every claim with its definition and sources.

    Args:
        studies: what a calibration study saw, if there is one.
    """
    parts = [claims_grid(claims), f"How a verdict is reached. {for_markdown(_rule(claims))}"]
    for claim in claims:
        parts.append(f"## {claim.id}: {claim.shown_verdict}")
        parts.append(for_markdown(f"{claim.text}. Paper: {claim.paper}. Ours: {claim.definition}"))
        if claim.measures:
            parts.append("\n".join(f"- {for_markdown(line)}" for line in claim.details))
        counts = f"The smallest effect that counts: {claim.counts_from}."
        said = (counts, _how_sure(claim), _observed(claim, studies), claim.note)
        parts += [for_markdown(text) for text in said if text]
        if claim.fingerprints:
            sources = ", ".join(f"`{fingerprint[:12]}`" for fingerprint in claim.fingerprints)
            parts.append(f"From artifacts {sources}.")
    return page(parts, meaningful=meaningful, title=f"Claims: {name}")


def _rule(claims: Sequence[Claim]) -> str:
    return claims[0].rule if claims else RULE


def _how_sure(claim: Claim) -> str:
    """What the intervals say, where another study would often not say it again."""
    judged = claim.judged
    if judged.verdict in (judged.by_intervals, PARTLY):
        return ""
    return (
        f"The intervals alone say: {judged.by_intervals}. Another study of "
        f"{_replicates(judged.replicates)} would say so again with probability "
        f"{claim.shown_again}, which is less than {LEAST_AGAIN}."
    )


def _observed(claim: Claim, studies: Studies | None) -> str:
    """How often studies of as many replicates came to the claim's verdict."""
    counts = (studies or {}).get(claim.id, {}).get(claim.judged.replicates)
    if not counts or claim.verdict in (NOT_MEASURED, NO_VERDICT):
        return ""
    total = sum(counts.values())
    shares = {name: f"{number(100 * count / total, 0)} %" for name, count in counts.items()}
    own = shares.pop(claim.verdict, "none")
    others = ", ".join(f"{share} to {name}" for name, share in shares.items())
    return (
        f"Of {total} studies of {_replicates(claim.judged.replicates)}, {own} came to this verdict"
        + (f" ({others})." if others else ".")
    )


def claims_json(claims: Sequence[Claim], *, name: str, meaningful: bool) -> str:
    """``claims.json``; numbers that do not exist are null."""
    document = {
        "name": name,
        "meaningful": meaningful,
        **({} if meaningful else {"banner": BANNER}),
        "rule": _rule(claims),
        "verdicts": MEANINGS,
        "claims": [
            {
                "id": claim.id,
                "claim": claim.text,
                "paper": {"text": claim.paper, "low": claim.low, "high": claim.high},
                "unit": claim.unit,
                "definition": claim.definition,
                "counts_from": claim.counts_from,
                "ours": {"text": claim.ours, **_numbers(claim.envelope)},
                "measures": [
                    {"label": measure.label, **_numbers(measure.interval)}
                    for measure in claim.measures
                ],
                "verdict": claim.verdict,
                **_nulls(
                    by_intervals=claim.judged.by_intervals,
                    again=claim.judged.again,
                    replicates=claim.judged.replicates,
                ),
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
    return _nulls(**interval._asdict())


def _nulls(**values: float | int | str) -> dict[str, float | int | str | None]:
    """The values, those that are not numbers as nothing."""
    return {name: None if value != value else value for name, value in values.items()}


STYLES = {
    IN_RANGE: "green",
    DIRECTION: "cyan",
    NOT_REPRODUCED: "red",
    UNDECIDED: "yellow",
    PARTLY: "yellow",
    NOT_MEASURED: "dim",
    NO_VERDICT: "dim",
}


def claims_terminal(claims: Sequence[Claim], *, name: str, meaningful: bool) -> TerminalTable:
    """The claims for the terminal, verdicts in colour; 80 columns are enough for it."""
    title = f"{for_markup(name)}: the paper's claims" + ("" if meaningful else f"\n{BANNER}")
    columns = (
        Column("Claim", ratio=1),
        Column("Paper", max_width=14),
        Column("Ours [95 % interval]", no_wrap=True),
        Column("Verdict", width=12),
    )
    table = TerminalTable(
        *columns,
        title=title,
        caption=Text("\n".join(_meanings(claims, "{}: {}")), no_wrap=False, overflow="fold"),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        expand=True,
    )
    for claim in claims:
        style = STYLES[claim.verdict]
        for what, paper, ours, *_, reached, _ in claim_rows(claim):
            cells = map(for_markup, (what, paper, ours))
            table.add_row(*cells, Text(reached, style=style))
    return table
