"""Figures mean the same in every stage, and are those of the record."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from helpers.world import DOMAINS, KEPT, World

from steerlora.reporting.run_figures import (
    NORMAL,
    Figure,
    figures_of,
    is_headline,
    scores_behind,
)


@pytest.fixture
def world():
    return World()


def test_an_evaluation_has_targets_averages_tasks_and_routing(world):
    record = world.evaluation("micro_m", "sc_lora", 0)
    found = figures_of("evaluate", {}, record)
    assert {f"target/{domain}" for domain in DOMAINS} <= set(found)
    assert found["average/target"].value == pytest.approx(0.6)
    assert found["routing/usage_entropy"].value == 0.95
    assert found["target/law"].stderr == record.tasks["world_law"].stderr
    assert found["task/world_mmlu"].value == pytest.approx(0.62)
    assert "task/world_law" not in found


def test_an_ablation_has_a_drop_a_domain_with_an_interval(world):
    found = figures_of("causal_ablation", {}, world.ablation(0))
    for name, kept in KEPT.items():
        if name == "intact":
            continue
        for key in (f"drop_pct/{name}", *(f"drop_pct/{name}/{domain}" for domain in DOMAINS)):
            assert found[key].value == pytest.approx(100 * (1 - kept))
            low, high = found[key].interval
            assert low < found[key].value < high
    assert found["average/target"].value == pytest.approx(0.6)
    assert not any("intact" in key for key in found)


def test_a_share_of_nothing_is_no_drop(world):
    record = world.ablation(0)
    nothing = {
        domain: replace(score, value=0.0)
        for domain, score in record.interventions["intact"].items()
    }
    record = replace(record, interventions=record.interventions | {"intact": nothing})
    assert not [key for key in figures_of("causal_ablation", {}, record) if "drop" in key]


def test_a_sequence_has_forgetting_and_what_is_kept(world):
    record = world.general(world.sequential("lora", "broad_first", 0))
    found = figures_of("sequential_forgetting", {}, record)
    assert found["forgetting/positive_mean"].value == record.metrics["positive_forgetting"]
    assert found["forgetting/final_average"].value == record.metrics["final_average"]
    share = record.general.after.value / record.general.before.value
    assert found["general_kept"].value == pytest.approx(share)
    assert found["average/target"].value == pytest.approx(np.mean(record.matrix[-1]))


def test_a_training_has_its_throughput_and_its_own_figures():
    summary = {"tokens": 5, "tokens_per_second": 2.5, "fvu": 0.1, "fingerprint": "x", "ok": True}
    assert figures_of("sae_training", summary) == {
        "throughput/tokens": Figure(5.0),
        "throughput/tokens_per_second": Figure(2.5),
        "sae_training/fvu": Figure(0.1),
    }
    assert figures_of("activations", {"tokens": 5}) == {"activations/tokens": Figure(5.0)}


def test_an_interval_needs_an_error():
    assert Figure(1.0).interval is None
    assert Figure(1.0, math.nan).interval is None
    assert Figure(1.0, 0.5).interval == (1.0 - 0.5 * NORMAL, 1.0 + 0.5 * NORMAL)


@pytest.mark.parametrize(
    "name", ["average/target", "average/gsm8k", "target/law", "task/world_mmlu"]
)
def test_a_figure_is_the_mean_of_the_scores_behind_it(world, name):
    record = world.evaluation("micro_m", "sc_lora", 0)
    scores = scores_behind(record, name)
    figure = figures_of("evaluate", {}, record)[name]
    assert figure.value == pytest.approx(np.mean([score.value for score in scores]))


def test_headlines_name_no_single_domain(world):
    names = figures_of("x", {}, world.ablation(0)) | figures_of(
        "x", {}, world.evaluation("micro_m", "sc_lora", 0)
    )
    shown = [name for name in names if is_headline(name)]
    assert {"average/target", "drop_pct/shuffle"} <= set(shown)
    assert not [name for name in shown if name.rpartition("/")[2] in (*DOMAINS, "world_mmlu")]
