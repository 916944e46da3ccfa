"""``report.html``: all of it is from the records, one click from its source, and in one file."""

from __future__ import annotations

import html
import itertools
import json
import re
from dataclasses import replace

import pytest
from helpers.artifacts import store_evaluation
from helpers.pages import HOSTILE, Reader, page_of, stored_records, unpacked
from helpers.world import DOMAINS, World

from steerlora.reporting.labels import BANNER
from steerlora.reporting.report_page import MissingCell, numbers, order_of
from steerlora.reporting.tables import Cell


@pytest.fixture(scope="module")
def made(tmp_path_factory, methods):
    root = tmp_path_factory.mktemp("page")
    missing = (MissingCell(label="evaluate x", command="steerlora experiment='a b'"),)
    return page_of(root, stored_records(root), methods, missing=missing)


def test_every_number_is_there_and_leads_to_its_artifact(made):
    path, _, rows, artifacts = made
    page = path.read_text()
    shown, details = unpacked(page, "numbers"), unpacked(page, "details")
    assert len(shown) == sum(len(row.figures) for row in rows)
    values = {(line[7][2], line[7][1]) for line in shown}
    for row in rows:
        for figure in row.figures.values():
            assert (row.artifact.fingerprint, figure.value) in values
    assert {line[4] for line in shown} == {*DOMAINS, "all"}
    for artifact in artifacts:
        about = details[artifact.fingerprint]
        assert artifact.fingerprint in about
        for upstream in artifact.manifest["inputs"].values():
            assert f'data-shows="{upstream}"' in about


def test_what_can_be_clicked_opens_something(made):
    page = made[0].read_text()
    details = unpacked(page, "details")
    asked = set(re.findall(r'data-shows="([^"]*)"', page + "".join(details.values())))
    asked |= {line[7][2] for line in unpacked(page, "numbers")}
    asked |= {line[0][2] for line in unpacked(page, "artifacts")}
    assert len(asked) > 30
    assert asked <= set(details)


def test_claims_tables_and_figures_are_all_there(made):
    path, report, _, _ = made
    page, details = path.read_text(), unpacked(path.read_text(), "details")
    for claim in report.claims:
        said = html.unescape(details[f"claim-{claim.id}"])
        assert claim.shown_verdict in said
        assert claim.definition in said
    assert page.count("<figure>") == len(report.drawn) > 3
    (scale,) = [table for table in report.shown if table.name == "scale"]
    found = page.split('id="table-scale"')[1].split("</table>")[0]
    assert found.count("<tr>") == 1 + len(scale.rows)
    for cell in itertools.chain(*scale.rows):
        assert f">{cell.text}</td>" in found
    assert "steerlora experiment=&#39;a b&#39;" in page


def test_all_lines_of_a_claim_are_sorted_as_its_first(made):
    path, report, _, _ = made
    found = path.read_text().split('id="claims-table"')[1].split("</table>")[0]
    rows = [re.findall(r'<td data-order="([^"]*)">', row) for row in found.split("<tr>")[2:]]
    several = [claim for claim in report.claims if len(claim.measures) > 1]
    assert several
    assert len(rows) == sum(1 + len(c.measures) * (len(c.measures) > 1) for c in report.claims)
    for claim in several:
        own = [row for row in rows if row[0] == claim.id]
        assert len(own) == 1 + len(claim.measures)
        assert all(row == own[0] for row in own)
        assert own[0][2]  # of the first measure, where the claim's own line has none


def test_nothing_is_fetched(made):
    page = made[0].read_text()
    assert all(address.startswith("data:") for address in Reader(page).loaded)
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, re.DOTALL))
    assert "@import" not in styles
    assert "url(" not in styles


def test_what_names_say_is_text(tmp_path, methods):
    world = World(items=8)
    record = replace(world.evaluation(HOSTILE, HOSTILE, 0), fingerprint="")
    names = [store_evaluation(tmp_path, record)]
    missing = [MissingCell(label=HOSTILE, command=HOSTILE)]
    path, *_ = page_of(tmp_path, names, methods, missing=missing, name=HOSTILE)
    page = path.read_text()
    for text in (page, *unpacked(page, "details").values()):
        # Of the page's own there is the last script; parts are data.
        running = [tag for tag in re.findall(r"<script[^>]*>", text) if "octet" not in tag]
        assert running == (["<script>"] if text is page else [])
        assert "\x1b" not in text


def test_a_smoke_run_says_so(tmp_path, methods):
    names = [store_evaluation(tmp_path, World(items=8).evaluation("micro_m", "lora", 0))]
    path, *_ = page_of(tmp_path, names, methods, meaningful=False)
    assert BANNER in path.read_text()
    path, *_ = page_of(tmp_path, names, methods)
    assert BANNER not in path.read_text()


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("0.533 ± 0.020", "0.533"),
        ("−0.5 [−1.0, 0.1]", "-0.5"),
        ("+12.0 %", "+12.0"),
        ("1,200", "1200"),
        ("–", ""),
        ("sc_lora", "sc_lora"),
    ],
)
def test_cells_are_sorted_by_the_number_that_they_begin_with(text, order):
    assert order_of(Cell(text)) == order


def test_what_is_not_a_number_is_valid_json(made, methods):
    _, _, rows, _ = made
    row = rows[1]
    figure = next(iter(row.figures.values()))._replace(value=float("nan"), stderr=None)
    (line,) = numbers([replace(row, figures={"average/target": figure})], methods)
    assert json.loads(json.dumps(line, allow_nan=False))[7][:2] == ["–", None]
