"""``report.html``: a report as one file that a browser shows, without anything to fetch.

Whatever is in it comes from the records, and from the manifests of the artifacts that they lie in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlora.engine.artifacts import Artifact
from steerlora.engine.machine import built_by
from steerlora.reporting import page_details
from steerlora.reporting.claims import COLUMNS, Claim, claim_rows
from steerlora.reporting.html_page import data_url, packed, render, tables_library
from steerlora.reporting.labels import BANNER
from steerlora.reporting.methods import Methods
from steerlora.reporting.page_charts import charts, charts_library
from steerlora.reporting.report import Report
from steerlora.reporting.run_rows import RunRow
from steerlora.reporting.tables import MISSING, Cell, number
from steerlora.reporting.verdicts import MEANINGS

FILE = "report.html"

NUMBERS = ("Model", "Method", "Intervention", "Order", "Domain", "Seed", "Figure", "Value")
NUMBERS += ("± of items", "Stage")
FILTERS = [*range(7)]
"""Columns of the numbers that can be filtered by."""
TABLE_OPTIONS = {
    "paging": False,
    "order": [],
    "info": False,
    "autoWidth": False,
    "layout": {"topEnd": None},
}
"""What DataTables is told of a table of the report: it sorts, and no more."""
CLAIM_OPTIONS = TABLE_OPTIONS | {
    "orderFixed": {"post": [[len(COLUMNS), "asc"]]},
    "columnDefs": [{"targets": len(COLUMNS), "visible": False}],
}
"""The same of the claims; what ties, as a claim's lines do, stays in its order by a last column
with the lines' numbers, which is not shown."""
ARTIFACTS = ("Artifact", "Stage", "Seconds", "Completed, UTC", "Machine")


@dataclass(frozen=True, kw_only=True)
class MissingCell:
    """A step of an experiment whose artifact is not stored."""

    label: str
    """What it is."""
    command: str
    """Builds it."""


def write_page(
    report: Report,
    *,
    name: str,
    meaningful: bool,
    methods: Methods,
    rows: Sequence[RunRow],
    artifacts: Sequence[Artifact],
    missing: Sequence[MissingCell],
    provenance: str,
) -> Path:
    """Write the page beside the report's tables.

    Args:
        report: what was written.
        name, meaningful, methods: of the experiment, as `write_report` has them.
        rows: the artifacts that the report is made from, with their figures.
        artifacts: these and all that they were built from.
        missing: what the experiment names and is not stored.
        provenance: the text of ``provenance.json``.
    """
    by_name = {artifact.fingerprint: artifact for artifact in artifacts}
    details = page_details.of_artifacts(artifacts)
    details |= page_details.of_claims(report.claims, by_name)
    details |= page_details.of_tables(report.shown, rows, methods)
    drawn = charts(rows, methods)
    libraries = {f"tables-{kind}": text for kind, text in tables_library().items()}
    libraries |= {"charts-js": charts_library()} if drawn else {}
    parts = {
        "details": packed(details),
        "numbers": packed(numbers(rows, methods)),
        "artifacts": packed([_artifact_row(artifact) for artifact in artifacts]),
        "provenance": packed(provenance),
    }
    parts |= {"charts": packed(list(drawn.values()))} if drawn else {}
    page = render(
        "report.html",
        title=f"Results: {name}",
        banner="" if meaningful else BANNER,
        claim_columns=COLUMNS,
        claims=claim_lines(report.claims),
        claim_options=CLAIM_OPTIONS,
        meanings=_meanings(report.claims),
        missing=missing,
        rows=len(rows),
        artifact_count=len(artifacts),
        machines=_machines(artifacts),
        numbers_columns=NUMBERS,
        numbers_options=_numbers_options(),
        artifact_columns=ARTIFACTS,
        artifact_options=_artifact_options(),
        charts=list(drawn),
        tables=report.shown,
        table_options=TABLE_OPTIONS,
        order_of=order_of,
        figures=[
            (figure.files[0].stem, figure.caption, data_url(figure.svg)) for figure in report.drawn
        ],
        parts=parts | libraries,
    )
    path = report.directory / FILE
    path.write_text(page, encoding="utf-8")
    return path


@dataclass(frozen=True)
class ClaimLine:
    """A line of a claim in the table of claims."""

    claim: Claim
    number: int
    """Of the line, in the whole table."""
    texts: list[str]
    """What it shows, by column."""
    orders: list[str]
    """What it is sorted by, by column: all lines of a claim by the same, so that they stay
    together."""


def claim_lines(claims: Sequence[Claim]) -> list[ClaimLine]:
    """The lines of the table of claims."""
    found: list[ClaimLine] = []
    for claim in claims:
        lines = claim_rows(claim)
        first = [next(filter(None, texts), "") for texts in zip(*lines, strict=True)]
        orders = [claim.id, *(order_of(Cell(text)) for text in first[1:])]
        found += [ClaimLine(claim, n, texts, orders) for n, texts in enumerate(lines, len(found))]
    return found


def numbers(rows: Sequence[RunRow], methods: Methods) -> list[list[Any]]:
    """Every figure of every artifact: what it is of, and the number with its source."""
    found = []
    for row in rows:
        settings = row.settings
        said = [settings[f"{key}.name"] for key in ("model", "method", "intervention", "order")]
        seed = row.record.seed if row.record is not None else settings.get("seed", 0)
        for name, figure in row.figures.items():
            kind, *rest = name.split("/")
            intervention, domain = said[2], "all"
            if kind == "drop_pct":
                intervention, *rest = rest
            if kind in ("target", "drop_pct") and rest:
                (domain,) = rest
            shown = kind if kind in ("target", "drop_pct") else name
            digits = 1 if kind == "drop_pct" else 3
            order = figure.value if math.isfinite(figure.value) else None  # JSON knows no other
            value = [number(figure.value, digits), order, row.artifact.fingerprint]
            of = [said[0], methods.label(said[1]), intervention, said[3], domain, seed, shown]
            found.append([*of, value, number(figure.stderr, digits), row.artifact.stage])
    return found


def _numbers_options() -> dict[str, Any]:
    """What DataTables is told of the table of numbers."""
    kinds = {7: {"render": "sourced", "type": "num"}, 5: {"render": "text", "type": "num"}}
    return {
        "rows": "numbers",
        "columns": [kinds.get(place, {"render": "text"}) for place in range(len(NUMBERS))],
        "order": [],
        "pageLength": 25,
        "autoWidth": False,
        "layout": {
            "top1": {"searchPanes": {"columns": FILTERS, "initCollapsed": True, "threshold": 1}}
        },
    }


def _artifact_options() -> dict[str, Any]:
    plain = {"render": "text"}
    return {
        "rows": "artifacts",
        "columns": [{"render": "sourced"}, plain, {"render": "text", "type": "num"}, plain, plain],
        "order": [],
        "autoWidth": False,
    }


def _artifact_row(artifact: Artifact) -> list[Any]:
    manifest = artifact.manifest
    label = manifest.get("label") or artifact.fingerprint
    return [
        [label, label, artifact.fingerprint],
        artifact.stage,
        number(manifest.get("wall_seconds"), 1),
        manifest.get("created", "")[:16].replace("T", " "),
        str(built_by(manifest) or "unknown"),
    ]


def _machines(artifacts: Sequence[Artifact]) -> list[str]:
    return list(dict.fromkeys(str(built_by(one.manifest) or "unknown") for one in artifacts))


def _meanings(claims: Sequence[Claim]) -> dict[str, str]:
    had = {claim.verdict for claim in claims}
    return {verdict: says for verdict, says in MEANINGS.items() if verdict in had}


_NUMBER = re.compile(r"[+−-]?\d[\d,]*\.?\d*")


def order_of(cell: Cell) -> str:
    """What a cell is sorted by: the number that it begins with, else its text."""
    if cell.text == MISSING:
        return ""
    found = _NUMBER.match(cell.text)
    return found[0].replace("−", "-").replace(",", "") if found else cell.text
