"""``stage=runs``, ``stage=compare`` and the table at the end of a sweep."""

from __future__ import annotations

import re

import pandas as pd
import pytest
from helpers.artifacts import store_evaluation
from helpers.world import World
from rich.console import Console

from steerlora.cli import compose, stored_runs
from steerlora.cli.sweep import varied
from steerlora.cli.sweep_table import Line, rows_in, sweep_data, sweep_table
from steerlora.engine.lineage import Library
from steerlora.errors import UserError
from steerlora.reporting.run_rows import SWEEPS, named


@pytest.fixture
def stored(tmp_path):
    """{(method, rank, seed): fingerprint} of evaluations under ``tmp_path``."""
    found = {}
    for method, rank in (("lora", 2), ("lora", 8), ("sc_lora", 8)):
        for seed in (0, 1):
            record = World().evaluation("micro_m", method, seed)
            found[method, rank, seed] = store_evaluation(tmp_path, record, rank=rank)
    return found


def shown(table) -> str:
    console = Console(width=300, record=True, force_terminal=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def listed(tmp_path, *overrides) -> str:
    given = ["stage=runs", f"artifacts.root={tmp_path}", *overrides]
    console = Console(width=300)
    with console.capture() as capture:
        stored_runs.show(console, compose.load(given), given)
    return capture.get()


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        ([], 3),
        (["method=lora"], 2),
        (["method=lora", "method.rank=8"], 1),
        (["method=sc_lora", "method.rank=2"], 0),
        (["method.rank=8", "seed=1"], 2),
        (["sae=topk", "logger=none"], 3),
    ],
)
def test_runs_are_filtered_by_overrides(tmp_path, stored, overrides, count):
    seeds = 1 if "seed=1" in overrides else 2
    out = listed(tmp_path, *overrides)
    # each evaluation has an adapter, which is not scored but trained
    assert out.count("│ evaluate") == out.count("│ adapter_training") == seeds * count
    assert "sae_training" not in out


def test_a_group_without_a_name_is_no_filter(tmp_path):
    with pytest.raises(UserError, match=r"filter by keys, such as trainer\.<key>="):
        listed(tmp_path, "trainer=cpu")


def compared(tmp_path, *runs) -> str:
    given = ["stage=compare", f"artifacts.root={tmp_path}", f"runs=[{','.join(runs)}]"]
    console = Console(width=300)
    with console.capture() as capture:
        stored_runs.compare(console, compose.load(given))
    return capture.get()


def test_a_comparison_names_what_differs_and_by_how_much(tmp_path, stored):
    fingerprints = [stored["lora", rank, seed] for rank in (2, 8) for seed in (0, 1)]
    out = compared(tmp_path, *(f"'{name}'" for name in fingerprints))
    what, scores, found = re.split(r"\n *(?:scores|differences to A) *\n", out)
    assert "method.rank" in what
    assert "trainer.max_steps" not in what
    assert fingerprints[0][:12] in what
    assert "0.601 [" in scores  # the mean of 0.600 and 0.601
    assert found.count("B − A") == 10
    assert "Holm over all 10" in found


def test_what_is_compared_may_be_folders_beginnings_and_sweeps(tmp_path, stored):
    library = Library(tmp_path)
    first, second = stored["lora", 2, 0], stored["lora", 8, 0]
    folder = tmp_path / SWEEPS
    folder.mkdir()
    pd.DataFrame({"job": [0, 1], "fingerprint": [first, None]}).to_csv(folder / "today.csv")
    for name in (first, first[:8], str(tmp_path / "evaluate" / first), "today"):
        assert [one.fingerprint for one in named([name], library)] == [first]
    both = named([first, "today", second], library)
    assert [one.fingerprint for one in both] == [first, second]


@pytest.mark.parametrize("name", ["ffff", "yesterday", "a"])
def test_what_is_not_stored_is_one_line(tmp_path, stored, name):
    with pytest.raises(UserError, match=f"runs: {name} is no artifact and no sweep.*stage=runs"):
        named([name], Library(tmp_path))


def test_one_run_cannot_be_compared(tmp_path, stored):
    with pytest.raises(UserError, match="compares two or more"):
        compared(tmp_path, f"'{stored['lora', 2, 0]}'")


def test_a_fingerprint_that_is_a_number_wants_quotes():
    with pytest.raises(UserError, match="put quotes around the name"):
        compose.load(["stage=compare", "runs=[12345678901234567890]"])


JOBS = [["stage=evaluate", f"method.rank={rank}", "+x=1"] for rank in (2, 8)]


def test_a_sweep_varies_what_is_not_the_same_in_all_its_jobs():
    assert varied(JOBS) == [{"method.rank": "2"}, {"method.rank": "8"}]
    assert varied(JOBS[:1]) == [{}]


def test_a_sweep_ends_with_settings_scores_and_the_best_in_bold(tmp_path, stored):
    names = stored["lora", 2, 0], stored["lora", 2, 1]
    lines = [
        Line(job, {"seed": str(job)}, 1.0, "done", row)
        for job, name in enumerate(names)
        for row in rows_in([str(tmp_path / "evaluate" / name)])
    ]
    lines.append(Line(2, {"seed": "2"}, 0.1, "failed: [no] luck", None))
    out = shown(sweep_table(lines, tmp_path / "x.csv"))
    assert "seed" in out
    assert "\x1b[1m0.601 ± 0.0" in out  # seed 1 has the higher score on target domains
    assert "\x1b[1m0.600 ± 0.0" not in out
    assert "failed: [no] luck" in out
    data = sweep_data(lines)
    assert list(data["seed"]) == ["0", "1", "2"]
    assert list(data["fingerprint"][:2]) == list(names)
    assert data["target/law"][1] == pytest.approx(0.601)
    assert data["target/law_stderr"][0] > 0
    assert data["average/target"].isna().tolist() == [False, False, True]


def test_a_job_without_artifacts_has_a_line():
    assert rows_in([]) == [None]
    assert rows_in(["/no/such/folder"]) == [None]
