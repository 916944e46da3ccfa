"""What a click on a number, a row or a claim opens in a report's page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence

from steerlora.engine.artifacts import Artifact
from steerlora.engine.machine import built_by
from steerlora.reporting.claims import Claim
from steerlora.reporting.html_page import render_part
from steerlora.reporting.methods import Methods
from steerlora.reporting.run_rows import RunRow
from steerlora.reporting.tables import Table
from steerlora.reporting.verdicts import MEANINGS

Details = dict[str, str]
"""{name: HTML, escaped}."""


def of_artifacts(artifacts: Iterable[Artifact]) -> Details:
    """By fingerprint: configuration, machine, versions, seconds, and what it was built from."""
    known = {artifact.fingerprint: artifact for artifact in artifacts}
    return {
        name: render_part(
            "artifact.html",
            artifact=artifact,
            manifest=artifact.manifest,
            seconds=artifact.manifest.get("wall_seconds"),
            machine=built_by(artifact.manifest),
            config=json.dumps(artifact.manifest["config"], indent=1, ensure_ascii=False),
            upstream={
                input_name: known.get(fingerprint, fingerprint)
                for input_name, fingerprint in artifact.manifest.get("inputs", {}).items()
            },
        )
        for name, artifact in known.items()
    }


def of_claims(claims: Sequence[Claim], artifacts: Mapping[str, Artifact]) -> Details:
    """By ``claim-C1``: definition, rule, measures, and the artifacts that they come from."""
    return {
        f"claim-{claim.id}": render_part(
            "claim.html",
            claim=claim,
            meaning=MEANINGS.get(claim.verdict, ""),
            rule=claim.rule,
            claim_sources=[artifacts[n] for n in claim.fingerprints if n in artifacts],
        )
        for claim in claims
    }


def of_tables(tables: Sequence[Table], rows: Sequence[RunRow], methods: Methods) -> Details:
    """By ``scale-0``: the artifacts that have the model, the method, the order and the intervention
    of that row of the table, as far as its cells name one."""
    scored = [row for row in rows if row.record is not None]
    found = {}
    for table in tables:
        for number, cells in enumerate(table.rows):
            texts = dict(zip(table.columns, (cell.text for cell in cells), strict=True))
            sources = _sources(texts, scored, methods)
            found[f"{table.name}-{number}"] = render_part(
                "sources.html",
                title=", ".join(texts[name] for name in NAMES if texts.get(name)),
                sources=[row.artifact for row in sources],
            )
    return found


NAMES: dict[str, Callable[[RunRow, Methods], set[str]]] = {
    "Model": lambda row, methods: {row.record.model},
    "Method": lambda row, methods: {
        methods.label(row.record.method),
        methods.long_label(row.record.method),
    },
    "Order": lambda row, methods: {str(row.settings["order.name"])},
    "Intervention": lambda row, methods: {
        str(row.settings["intervention.name"]),
        *getattr(row.record, "interventions", ()),
    },
}
"""{heading of a column: what its cell may say for a row to be of an artifact}."""


def _sources(
    texts: Mapping[str, str], rows: Sequence[RunRow], methods: Methods
) -> Sequence[RunRow]:
    """The artifacts that agree with every cell that names something; "all orders" names nothing."""
    for name, said in NAMES.items():
        own = [row for row in rows if texts.get(name) in said(row, methods)]
        rows = own or rows
    return rows
