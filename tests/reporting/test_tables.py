from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy import stats

from steerlora.evaluation.forgetting import forgetting_metrics
from steerlora.evaluation.statistics import holm
from steerlora.reporting.claim_measures import measure_claims
from steerlora.reporting.controls import ablation_table, retrained_table
from steerlora.reporting.drawing import STYLE, save
from steerlora.reporting.labels import BANNER
from steerlora.reporting.orders import forgetting_table
from steerlora.reporting.scale import scale_table
from steerlora.reporting.tables import (
    MISSING,
    Cell,
    Table,
    best_cells,
    interval_text,
    number,
    write_table,
)
from steerlora.text import for_markdown

DOMAINS = ["instruction", "math", "code", "medicine", "law"]


def test_numbers_as_text():
    assert number(0.12345) == "0.123"
    assert number(-0.5, 1) == "−0.5"
    assert number(-0.0001, 3, sign=True) == "+0.000"
    assert number(None) == number(float("nan")) == MISSING
    assert interval_text((50, 40, 60), 1, " %") == "50.0 % [40.0, 60.0]"
    assert interval_text((50, np.nan, np.nan), 1, " %") == "50.0 %"
    assert interval_text((np.nan, 1, 2), 1) == MISSING


def test_best_is_marked_only_where_the_errors_allow_it():
    assert best_cells([0.5, 0.9, 0.6], [0.01] * 3, meaningful=True) == [False, True, False]
    assert best_cells([0.5, 0.61, 0.6], [0.01] * 3, meaningful=True) == [False] * 3
    assert best_cells([0.5, 0.9], [0.01] * 2, meaningful=False) == [False] * 2
    assert best_cells([0.5, np.nan], [0.01] * 2, meaningful=True) == [False] * 2


@pytest.mark.parametrize("meaningful", [True, False])
def test_written_files_parse_back(tmp_path, meaningful):
    table = Table(
        "demo",
        "Caption with 5 % & more",
        pd.DataFrame({"name": ["a_b", "c|d"], "score": [0.1, np.nan]}),
        ["Name", "Score"],
        [[Cell("a_b"), Cell("0.1", best=True)], [Cell("c|d"), Cell("−1 ± 2")]],
    )
    files = write_table(table, tmp_path, meaningful=meaningful)
    assert [file.name for file in files] == ["demo.md", "demo.csv", "demo.tex"]
    for file in files:
        assert (BANNER in file.read_text().lower()) is not meaningful
    data = pd.read_csv(tmp_path / "demo.csv")
    pd.testing.assert_frame_equal(data[["name", "score"]], table.data)

    lines = (tmp_path / "demo.md").read_text().splitlines()
    grid = [line for line in lines if line.startswith("|")]
    assert grid[0] == "| Name | Score |"
    assert grid[2:] == ["| a_b | **0.1** |", "| c\\|d | −1 ± 2 |"]

    latex = (tmp_path / "demo.tex").read_text()
    assert r"a\_b & \textbf{0.1} \\" in latex
    assert r"5 \% \& more" in latex
    assert r"$-$1 $\pm$ 2" in latex
    assert latex.count("\\begin") == latex.count("\\end") == 2
    latex.encode("ascii")


def test_scale_table(world, methods):
    table = scale_table(world.evaluations(), methods, meaningful=True)
    data = table.data.set_index(["model", "method"])
    row = data.loc["micro_m", "sc_lora"]
    assert row.seeds == 2
    assert row.instruction_following == pytest.approx(0.4355)
    assert row.instruction_following_gain == pytest.approx(0.0355)
    assert row.instruction_following_gain_low < 0.0355 < row.instruction_following_gain_high
    assert row.instruction_following_stderr == pytest.approx(0.0005)  # of 0.435 and 0.436
    assert row.target_law == pytest.approx(0.6005)
    assert np.isnan(data.loc["micro_m", "none"].gsm8k_gain)
    assert list(data.index)[:4] == [("micro_s", a) for a in ("none", "lora", "moe_lora", "sc_lora")]
    assert all(len(cells) == len(table.columns) for cells in table.rows)
    assert table.rows[5][3].text == "0.436 ± 0.001 (+0.036)"
    assert not any(cell.best for row in table.rows for cell in row)  # all adapters are equal
    one = scale_table(world.evaluations(seeds=(0,)), methods, meaningful=True)
    assert one.rows[1][3].text == "0.435 ± 0.012 (+0.035)"  # the error of the items alone
    assert "of items alone where there is one replicate" in one.caption


def test_bases_that_know_too_little_are_named(world, methods):
    def with_general(record, value):
        changed = replace(record.averages["general_knowledge"], value=value)
        return replace(record, averages={**record.averages, "general_knowledge": changed})

    knows = {("micro_s", 0): 0.98, ("micro_s", 1): 0.979, ("micro_m", 0): 1.0, ("micro_m", 1): 0.5}
    records = [
        with_general(record, knows[record.model, record.seed])
        for record in world.evaluations(models=("micro_s", "micro_m"))
        if record.method == "none"
    ]
    (note,) = scale_table(records, methods, meaningful=True, least_general=0.98).notes
    assert note == (
        "Bases with general knowledge below 0.98, of 4: micro_s of replicate 1 (0.979), micro_m of "
        "replicate 1 (0.500)."
    )
    (note,) = scale_table(records[:1], methods, meaningful=True, least_general=0.98).notes
    assert note == "Bases with general knowledge below 0.98, of 1: none."
    assert not scale_table(records, methods, meaningful=True).notes


def test_scale_table_where_not_every_task_was_asked_for(world, methods):
    records = [
        replace(
            record,
            tasks={},
            averages={name: a for name, a in record.averages.items() if name != "mmlu_pro"},
        )
        for record in world.evaluations(models=("micro_m",))
    ]
    table = scale_table(records, methods, meaningful=True)
    row = table.data.set_index("method").loc["sc_lora"]
    assert row.instruction_following_gain == pytest.approx(0.0355)
    # Replicates are paired, and no items are needed for it.
    assert row.instruction_following_gain_high - 0.0355 == pytest.approx(12.706 * 0.0005, rel=1e-3)
    assert "MMLU-Pro" not in table.columns
    assert "law" not in table.columns


def test_ablation_table(world, methods):
    table = ablation_table([world.ablation(0), world.ablation(1)])
    data = table.data.set_index(["intervention", "domain"])
    row = data.loc["invert", "average"]
    intact, inverted = np.array([0.6, 0.602]), 0.6 * 0.38 + np.array([0.0, 0.002]) * 0.38**2
    assert row.drop_percent == pytest.approx(100 * (1 - inverted.mean() / intact.mean()))
    assert row.drop_low < row.drop_percent < row.drop_high
    assert (row.seeds, row["items"]) == (2, 500)
    p_values = {
        name: stats.ttest_rel(*(np.array([0.0, 0.002]) * k**2 + 0.6 * k for k in (1.0, kept)))[1]
        for name, kept in world.kept.items()
        if name != "intact"
    }
    expected = holm(list(p_values.values()))[list(p_values).index("invert")]
    assert row.p_holm == pytest.approx(expected)
    intact, inverted = (
        np.concatenate(
            [
                np.mean([world.ablation(s).interventions[name][d].per_item for s in (0, 1)], 0)
                for d in DOMAINS
            ]
        )
        for name in ("intact", "invert")
    )
    assert row.d_z == pytest.approx((intact - inverted).mean() / (intact - inverted).std(ddof=1))
    assert data.loc["oracle_domain", "average"].d_z < 0  # a gain is a negative drop
    assert np.isfinite(data.loc["invert", "law"].d_z)
    assert np.isnan(data.loc["intact", "average"].d_z)
    assert table.columns[-2:] == ["d_z", "p (Holm)"]
    assert [cell.text for cell in table.rows[0]][-2:] == ["", ""]
    assert data.loc["invert", "law"]["items"] == 100
    assert np.isnan(data.loc["intact", "average"].drop_percent)
    assert [row[0].text for row in table.rows][:2] == ["intact", "replace_dense"]
    assert table.columns[:3] == ["Intervention", "average", "instruction"]


def test_ablation_of_two_methods_has_rows_for_both(world, methods):
    table = ablation_table([world.ablation(0), world.ablation(0, method="moe_lora")])
    assert table.columns[0] == "Model"
    assert {row[0].text for row in table.rows} == {"micro_m sc_lora", "micro_m moe_lora"}


def test_retrained_table(world, methods):
    evaluations = world.evaluations(models=("micro_m",))
    controls = [world.retrained("shuffle", seed, 0.45) for seed in (0, 1, 2)]  # 2 has no intact
    controls += [world.retrained("invert", 0, 0.3)]
    ablations = [world.ablation(seed) for seed in (0, 1)]
    table = retrained_table(controls, evaluations, ablations)
    data = table.data.set_index("intervention")
    assert list(data.index) == ["shuffle", "invert"]
    shuffle = data.loc["shuffle"]
    assert shuffle.intact == pytest.approx(0.6005)
    assert shuffle.retrained == pytest.approx(0.451)
    assert shuffle.retrained_drop_percent == pytest.approx(100 * (1 - 0.4505 / 0.6005), abs=0.01)
    assert shuffle.evaluation_drop_percent == pytest.approx(
        ablation_table(ablations).data.set_index(["intervention", "domain"])
        .loc["shuffle", "average"].drop_percent
    )  # fmt: skip
    assert shuffle.evaluation_drop_low < shuffle.evaluation_drop_percent
    assert table.rows[0][5].text.startswith("25.0 % [")
    assert all(len(row) == len(table.columns) for row in table.rows)
    # Without an ablation only its column is empty; without an intact adapter there is no drop.
    alone = retrained_table(controls, evaluations, [])
    assert [row[6].text for row in alone.rows] == [MISSING, MISSING]
    assert [row[5].text for row in retrained_table(controls, [], []).rows] == [MISSING, MISSING]


def test_notes_stand_under_the_table(tmp_path):
    table = Table(
        "demo", "Caption.", pd.DataFrame({"a": [1]}), ["A"], [[Cell("1")]], ("5 % & more.",)
    )
    md, _, tex = (file.read_text() for file in write_table(table, tmp_path, meaningful=True))
    assert md.endswith("| 1 |\n\n- 5 % & more.\n")
    assert "\\end{tabular}\n\\par 5 \\% \\& more.\n\\end{table}" in tex


def test_forgetting_table(world, methods):
    records = world.sequentials()
    table = forgetting_table(records, methods, meaningful=True)
    data = table.data.set_index(["order", "method"])
    assert data.loc["all", "sc_lora"].runs == 8
    assert data.loc["all", "sc_lora"].reduction_percent == pytest.approx(25.0)
    assert data.loc["all", "sc_lora"].positive_forgetting == pytest.approx(0.3)
    # The order called broad_first and the class of orders that begin with instruction.
    in_class = data.loc["broad_first"].loc["sc_lora"]
    assert sorted(in_class.runs) == [2, 4]
    record = next(r for r in records if (r.order, r.method) == ("random_0", "lora"))
    metrics = forgetting_metrics(record.matrix, sequence=record.sequence, domains=record.domains)
    for name, value in metrics.items():
        assert data.loc["random_0", "lora"][name] == pytest.approx(value, abs=0.01)
    best = [row for row in table.rows if row[4].best]
    assert {row[2].text for row in best} == {"sc_lora"}  # the lower forgetting is the better


def test_no_records_no_table(methods):
    assert scale_table([], methods, meaningful=True) is None
    assert ablation_table([]) is None
    assert forgetting_table([], methods, meaningful=True) is None
    assert retrained_table([], [], []) is None


HOSTILE = "\x1b[31mlaw|\n\\input{x}<img src=y>[a](b)$x$[bold]"


def test_a_name_does_nothing_in_a_table(tmp_path):
    table = Table("t", HOSTILE, pd.DataFrame({"a": [1]}), [HOSTILE], [[Cell(HOSTILE)]], (HOSTILE,))
    markdown, _, latex = (
        path.read_text() for path in write_table(table, tmp_path, meaningful=True)
    )
    caption, *grid, _, note = markdown.strip().splitlines()
    assert note == "- " + for_markdown(HOSTILE)
    assert caption == for_markdown(HOSTILE)
    (heading, _, row) = [line for line in grid if line]
    assert heading == row == f"| {for_markdown(HOSTILE)} |"
    assert "\\input" not in latex
    assert latex.count("law") == 4
    assert "\x1b" not in markdown + latex


def test_a_dollar_in_a_name_is_no_formula(tmp_path):
    with rc_context(STYLE):
        figure = Figure()
        figure.subplots().set_title("a$b_{$")
        files = save(figure, tmp_path / "f.png", meaningful=True, note="a$b")
    assert [path.name for path in files] == ["f.png", "f.pdf"]
    assert all(path.is_file() for path in files)


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        (["gsm8k"], "GSM8K"),
        (["micro_gsm8k"], "micro-GSM8K"),
        (["gsm8k_cot"], "gsm8k_cot"),
        (["gsm8k", "text_gsm8k"], "GSM8K, text-GSM8K"),
        ([], "GSM8K"),
    ],
)
def test_a_stand_in_has_its_own_name_in_table_and_claims(world, methods, tasks, expected):
    records = [
        replace(record, groups=record.groups | {"gsm8k": tasks})
        for record in world.evaluations(models=("micro_m",))
    ]
    assert expected in scale_table(records, methods, meaningful=True).columns
    marginal = measure_claims(records, [], [], methods, main_model="micro_m")[2]
    assert f"micro_m, {expected}" in [measure.label for measure in marginal.measures]
