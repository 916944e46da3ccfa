"""The report of an experiment: tables, figures, claims and provenance, in one folder."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
from matplotlib import rc_context
from rich.table import Table as TerminalTable

from steerlora.config.run import PARTS
from steerlora.engine.manifests import library_versions
from steerlora.evaluation.records import Ablation, DomainSequence, Evaluation, Record
from steerlora.reporting import figures, health, routing_figures, sequence_figures
from steerlora.reporting.benchmark import benchmark_table
from steerlora.reporting.claim_measures import measure_claims
from steerlora.reporting.claims import (
    Claim,
    Studies,
    claims_grid,
    claims_json,
    claims_markdown,
    claims_terminal,
)
from steerlora.reporting.controls import ablation_table, retrained_table
from steerlora.reporting.drawing import STYLE, as_svg, save
from steerlora.reporting.effects import fingerprints, retrained, select, uncontrolled
from steerlora.reporting.evidence import evidence
from steerlora.reporting.methods import Methods
from steerlora.reporting.orders import forgetting_table, order_effects_table
from steerlora.reporting.own_method import method_table
from steerlora.reporting.scale import scale_table
from steerlora.reporting.sequences import apart_by_replay
from steerlora.reporting.tables import Table, markdown_parts, page, write_table
from steerlora.text import for_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from steerlora.config import Config

FIGURES = {
    "scale_gains": "Gain over the base model, with 95 % intervals where there are several "
    "replicates.",
    "ablation": "What the SAE signal carries: drop of target scores under interventions, with 95 % "
    "intervals; small marks are the domains.",
    "dose_response": "The same by strength of the intervention, with 95 % intervals.",
    "method": "The project's own method, the others, and each of its switches turned: means over "
    "replicates with 95 % intervals, and the orders below; dashed lines are the aims.",
    "pareto": "What is learnt against what is forgotten, by method, with 95 % intervals.",
    "forgetting_matrices": "Score of every domain after every stage of a sequence, means over "
    "replicates; framed: the domain that the stage has just learnt.",
    "general_drift": "How far general features move as domains are learnt, with 95 % intervals.",
    "gate_by_domain": "Which specialist each domain uses: one replicate, since specialists have no "
    "identity across replicates.",
    "rank_by_domain": "How much rank each domain uses, at the first control site.",
    "rank_by_layer": "How much rank each domain uses, at every control site.",
    "routing_over_time": "How evenly specialists are used in the course of training.",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written, and what to print."""

    directory: Path
    """Where it is."""
    files: tuple[Path, ...]
    """Every file written, in the order of writing."""
    claims: tuple[Claim, ...]
    """C1 to C8, measured."""
    tables: dict[str, pd.DataFrame]
    """Plain numbers by table name , of those that had records."""
    shown: tuple[Table, ...]
    """The same tables for people."""
    drawn: tuple[Drawn, ...]
    """Its figures."""
    terminal: TerminalTable
    """What to print: the claims. The other tables are too wide for a terminal."""


def write_report(
    directory: Path,
    *,
    evaluations: list[Evaluation],
    ablations: list[Ablation],
    sequentials: list[DomainSequence],
    methods: Methods,
    name: str,
    meaningful: bool,
    provenance: dict,
    main_model: str,
    studies: Studies | None = None,
    varied: Sequence[str] = (),
    least_general: float | None = None,
) -> Report:
    """Write everything that the records allow; what has no records is left out.

    Files that an earlier report left for tables and figures that now have no records are removed,
    so that the folder never shows a mixture of two runs.

    Args:
        directory: made if need be.
        evaluations: those under an intervention may be among them, and enter the table of
            retrained controls alone.
        ablations, sequentials: the other records.
        methods: the parts that methods have in the report.
        name: of the experiment, for headings.
        meaningful: False marks everything as a smoke run.
        provenance: anything JSON that says where the numbers came from (config, times, commit).
        main_model: the model whose ablation, sequences and routing are shown and measured.
        studies: which verdicts a calibration study saw (`steerlora.reporting.calibration`).
        varied: what every replicate has of its own, such as "base" or "adapter".
        least_general: as for `scale_table`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    provided = [*evaluations, *ablations, *sequentials]
    controls, evaluations = retrained(evaluations), uncontrolled(evaluations)
    sequentials = apart_by_replay(sequentials)
    built = {
        "scale": scale_table(
            evaluations, methods, meaningful=meaningful, least_general=least_general
        ),
        "ablation": ablation_table(ablations),
        "retrained": retrained_table(controls, evaluations, ablations),
        "forgetting": forgetting_table(sequentials, methods, meaningful=meaningful),
        "order_effects": order_effects_table(sequentials, methods),
        "method": method_table(sequentials, main_model, methods, meaningful=meaningful),
        "continual": benchmark_table(sequentials, methods, meaningful=meaningful),
    }
    tables = [table for table in built.values() if table is not None]
    claims = measure_claims(
        evaluations,
        ablations,
        sequentials,
        methods,
        main_model=main_model,
        meaningful=meaningful,
    )

    stale = [f"{table}.{suffix}" for table in built for suffix in ("md", "csv", "tex")]
    stale += [f"{figure}.{suffix}" for figure in FIGURES for suffix in ("png", "pdf")]
    for file in stale:
        (directory / file).unlink(missing_ok=True)
    return write_parts(
        directory,
        name=name,
        meaningful=meaningful,
        claims=claims,
        tables=tables,
        drawn=_draw(
            directory, evaluations, ablations, sequentials, methods, main_model, meaningful
        ),
        provenance=provenance_json(provenance, name, meaningful, provided),
        varied=varied,
        studies=studies,
    )


def write_parts(
    directory: Path,
    *,
    name: str,
    meaningful: bool,
    claims: tuple[Claim, ...],
    tables: Sequence[Table],
    drawn: Sequence[Drawn],
    provenance: str,
    varied: Sequence[str] = (),
    studies: Studies | None = None,
) -> Report:
    """Write tables, claims and the index of a report whose figures are drawn.

    Args:
        directory, name, meaningful, varied, studies: as for `write_report`.
        claims, tables, drawn: all that the report shows.
        provenance: the text of ``provenance.json``.
    """
    files = [
        file for table in tables for file in write_table(table, directory, meaningful=meaningful)
    ]
    texts = {
        "claims.md": claims_markdown(claims, name=name, meaningful=meaningful, studies=studies),
        "claims.json": claims_json(claims, name=name, meaningful=meaningful),
        "provenance.json": provenance,
        "results.md": _index(name, meaningful, varied, claims, tables, drawn),
    }
    for file, text in texts.items():
        (directory / file).write_text(text, encoding="utf-8")
    return Report(
        directory=directory,
        files=(*files, *(f for one in drawn for f in one.files), *(directory / t for t in texts)),
        claims=claims,
        tables={table.name: table.data for table in tables},
        shown=tuple(tables),
        drawn=tuple(drawn),
        terminal=claims_terminal(claims, name=name, meaningful=meaningful),
    )


def write_stage_report(
    config: Config,
    records: Sequence[Record],
    provenance: dict,
    *,
    claims: tuple[Claim, ...],
    tables: Sequence[Table | None],
    figure: str,
    draw: Callable[[], Figure | None],
    caption: str,
    note: str,
    varied: Sequence[str],
) -> Report:
    """Write the report of an experiment about a stage, which has one figure, into ``results.dir``.

    Args:
        records: what it rests on.
        provenance: what is known of the run.
        claims, varied: as for `write_report`.
        tables: those that are None have nothing to show.
        figure: name of its files.
        draw: draws it; None: there is nothing to draw.
        caption: what it shows.
        note: how many replicates, and of what, the figure rests on.
    """
    study, directory = config.study, Path(config.results.dir)
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    with rc_context(STYLE):
        drawing = draw()
        if drawing is not None:
            path = directory / f"{figure}.png"
            files = save(drawing, path, meaningful=study.meaningful, note=note)
            drawn.append(Drawn(files, f"{caption}; {note}.", as_svg(drawing)))
    return write_parts(
        directory,
        name=study.name,
        meaningful=study.meaningful,
        claims=claims,
        tables=[table for table in tables if table is not None],
        drawn=drawn,
        provenance=provenance_json(provenance, study.name, study.meaningful, list(records)),
        varied=varied,
    )


class Drawn(NamedTuple):
    """A figure that was written."""

    files: list[Path]
    """The PNG and the PDF."""
    caption: str
    """What it shows, and how many replicates and items that rests on."""
    svg: str
    """The drawing, for a page."""


def _draw(
    directory: Path,
    evaluations: list[Evaluation],
    ablations: list[Ablation],
    sequentials: list[DomainSequence],
    methods: Methods,
    main_model: str,
    meaningful: bool,
) -> list[Drawn]:
    ablations = select(ablations, model=main_model, method=methods.paper)
    sequentials = select(sequentials, model=main_model)
    routed = list(health.routed(evaluations, main_model, methods).values())
    routing = [record for records in routed for record in records]
    drawings = {
        figures.scale_gains: evaluations,
        figures.ablation: ablations,
        figures.dose_response: ablations,
        sequence_figures.method: sequentials,
        sequence_figures.pareto: sequentials,
        sequence_figures.forgetting_matrices: sequentials,
        sequence_figures.general_drift: sequentials,
        routing_figures.gate_by_domain: [records[0] for records in routed],
        routing_figures.rank_by_domain: routing,
        routing_figures.rank_by_layer: routing,
        routing_figures.routing_over_time: [r for r in routing if r.routing_history],
    }
    drawn = []
    with rc_context(STYLE):
        for draw, records in drawings.items():
            figure = draw(records, main_model, methods)
            if figure is not None:
                name = draw.__name__
                note = evidence(records, tokens=draw.__module__ == routing_figures.__name__)
                path = directory / f"{name}.png"
                files = save(figure, path, meaningful=meaningful, note=note)
                drawn.append(Drawn(files, f"{FIGURES[name]} {note}.", as_svg(figure)))
    return drawn


def provenance_json(given: dict, name: str, meaningful: bool, records: list[Record]) -> str:
    """``provenance.json``: what is given, versions of libraries, the records' artifacts."""
    versions = {"python": platform.python_version(), **library_versions()}
    document = {
        "name": name,
        "meaningful": meaningful,
        **given,
        "versions": versions | given.get("versions", {}),
        "artifacts": list(fingerprints(records)),
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _index(
    name: str,
    meaningful: bool,
    varied: Sequence[str],
    claims: tuple[Claim, ...],
    tables: Sequence[Table],
    drawn: Sequence[Drawn],
) -> str:
    parts = [
        *_replicates(varied),
        "## Claims",
        claims_grid(claims),
        "How each is measured and judged: [claims.md](claims.md), for programs "
        "[claims.json](claims.json). Where the numbers came from: "
        "[provenance.json](provenance.json).",
    ]
    for table in tables:
        parts += [
            f"## {table.name.replace('_', ' ').capitalize()}",
            *markdown_parts(table),
            f"As [CSV]({table.name}.csv), [LaTeX]({table.name}.tex).",
        ]
    if drawn:
        parts.append("## Figures")
    for (image, vector), caption, _ in drawn:
        shown = for_markdown(caption)
        parts.append(f"![{shown}]({image.name})\n\n{shown} As [PDF]({vector.name}).")
    return page(parts, meaningful=meaningful, title=f"Results: {name}")


def _replicates(varied: Sequence[str]) -> list[str]:
    """What a replicate is, in a sentence."""
    if not varied:
        return []
    same = [part for part in PARTS if part not in varied]
    return [
        f"A replicate has its own {_listed(varied)}, and order of the data; "
        f"{_listed([*same, 'world', 'evaluation items'])} are the same in all."
    ]


def _listed(names: Sequence[str]) -> str:
    """``base, SAE and adapter``"""
    shown = [name.replace("sae", "SAE") for name in names]
    return " and ".join(part for part in (", ".join(shown[:-1]), shown[-1]) if part)
