"""Pages of reports on invented records, and what a page of HTML consists of."""

from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from helpers.artifacts import store, store_evaluation
from helpers.world import World
from steerlora.engine.lineage import Library
from steerlora.evaluation.records import BASE
from steerlora.reporting.methods import Methods
from steerlora.reporting.report import write_report
from steerlora.reporting.report_page import write_page
from steerlora.reporting.run_rows import row_of

LOADS = {"src", "srcset", "action", "data", "poster", "background"}
"""Attributes whose addresses a browser asks for by itself."""

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\u202e"


class Reader(HTMLParser):
    """Tags, addresses that are fetched, and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [value for name, value in attributes if name in LOADS]
        self.loaded += [value for name, value in attributes if (tag, name) == ("link", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def unpacked(page: str, name: str) -> Any:
    """A part of a page, as page.js reads it."""
    content = re.search(rf'id="{name}">([^<]*)</script>', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(content)))


def stored_records(root: Path, *, methods=("lora", "sc_lora"), seeds=(0, 1)) -> list[str]:
    """Store evaluations, ablations and sequences; their fingerprints."""
    world = World(items=8)
    evaluations = [world.evaluation("micro_m", BASE, 0)]
    evaluations += [world.evaluation("micro_m", method, s) for method in methods for s in seeds]
    names = [store_evaluation(root, record) for record in evaluations]
    settings = {"model": "micro_m", "options": {}, "accelerator": "cpu"}
    for seed in seeds:
        config = settings | {"method": "sc_lora", "seed": seed, "interventions": ["shuffle"]}
        names.append(store(root, "causal_ablation", config, record=world.ablation(seed)))
        for method in world.forgetting:
            record = world.sequential(method, "broad_first", seed)
            config = {**settings, "method": {"name": method}, "seed": seed}
            config |= {"order": "broad_first", "sequence": list(record.domains)}
            names.append(store(root, "sequential_forgetting", config, record=record))
    return names


def page_of(
    root: Path, names: list[str], methods: Methods, *, missing=(), meaningful=True, name="demo"
):
    """Write a report on stored records, and its page: (path, report, rows, artifacts)."""
    library = Library(root)
    artifacts = library.ancestry(*map(library.find, names))
    rows = [row_of(library.find(one), library) for one in names]
    records = {"evaluations": [], "ablations": [], "sequentials": []}
    kinds = {"Evaluation": "evaluations", "Ablation": "ablations", "DomainSequence": "sequentials"}
    for row in rows:
        records[kinds[type(row.record).__name__]].append(row.record)
    common = {"methods": methods, "name": name, "meaningful": meaningful}
    report = write_report(
        root / "results", **records, **common, provenance={}, main_model="micro_m"
    )
    path = write_page(
        report, **common, rows=rows, artifacts=artifacts, missing=missing,
        provenance=(report.directory / "provenance.json").read_text(),
    )  # fmt: skip
    return path, report, rows, artifacts
