from __future__ import annotations

import numpy as np
import pytest

from steerlora.errors import UserError
from steerlora.evaluation.forgetting import (
    backward_transfer,
    chaudhry_forgetting,
    final_average,
    forgetting_metrics,
    forward_transfer,
    positive_forgetting,
    positive_forgetting_stderr,
    score_matrix,
)

# Three domains learnt in order a, b, c; row 0 is the base model.
HAND = np.array(
    [
        [0.1, 0.7, 0.2],
        [0.9, 0.3, 0.4],
        [0.5, 0.6, 0.1],
        [0.6, 0.2, 0.8],
    ]
)


def test_metrics_of_a_matrix_worked_by_hand():
    # a: best before the end 0.9, final 0.6 -> 0.3; b: best 0.7 is the BASE's, final 0.2 -> 0.5.
    assert positive_forgetting(HAND) == pytest.approx((0.3 + 0.5) / 2)
    # Chaudhry: no base row, so b's best is 0.6 -> 0.4.
    assert chaudhry_forgetting(HAND) == pytest.approx((0.3 + 0.4) / 2)
    # BWT: a 0.6 - 0.9, b 0.2 - 0.6.
    assert backward_transfer(HAND) == pytest.approx((-0.3 - 0.4) / 2)
    # FWT: b before its stage 0.3 - 0.7, c before its stage 0.1 - 0.2.
    assert forward_transfer(HAND) == pytest.approx((-0.4 - 0.1) / 2)
    assert final_average(HAND) == pytest.approx((0.6 + 0.2 + 0.8) / 3)


def test_the_best_score_excludes_the_last_stage_and_the_last_domain():
    scores = HAND.copy()
    scores[-1, 0] = 0.95  # a ends higher than ever: not forgotten, though Chaudhry's F turns it
    assert positive_forgetting(scores) == pytest.approx((0.0 + 0.5) / 2)
    assert chaudhry_forgetting(scores) == pytest.approx((-0.05 + 0.4) / 2)
    scores[0, 2] = 1.0  # c is last: had no time to be forgotten, whatever the base knew
    assert positive_forgetting(scores) == pytest.approx((0.0 + 0.5) / 2)


def test_columns_follow_the_sequence_not_the_record():
    by_name = HAND[:, [2, 0, 1]]
    metrics = forgetting_metrics(by_name, sequence=["a", "b", "c"], domains=["c", "a", "b"])
    assert metrics == forgetting_metrics(HAND)
    assert set(metrics) == {
        "positive_forgetting",
        "chaudhry_forgetting",
        "backward_transfer",
        "forward_transfer",
        "final_average",
    }


def test_domains_never_learnt_are_left_out():
    wide = np.hstack([np.full((4, 1), 9.0), HAND])
    metrics = forgetting_metrics(wide, sequence=["a", "b", "c"], domains=["x", "a", "b", "c"])
    assert metrics == forgetting_metrics(HAND)


def test_one_domain_cannot_forget():
    metrics = forgetting_metrics([[0.1], [0.9]])
    assert metrics.pop("final_average") == 0.9
    assert set(metrics.values()) == {0.0}


def test_two_domains():
    metrics = forgetting_metrics([[0.1, 0.2], [0.8, 0.3], [0.5, 0.9]])
    assert metrics["positive_forgetting"] == pytest.approx(0.3)
    assert metrics["chaudhry_forgetting"] == pytest.approx(0.3)
    assert metrics["forward_transfer"] == pytest.approx(0.1)


def test_item_error_of_positive_forgetting_matches_simulation():
    scores = np.array([[0.1, 0.1, 0.1], [0.9, 0.3, 0.1], [0.6, 0.8, 0.1], [0.4, 0.5, 0.8]])
    stderr = np.full(scores.shape, 0.01)
    draws = np.random.default_rng(0).normal(scores, stderr, (4000, *scores.shape))
    simulated = np.std([positive_forgetting(draw) for draw in draws])
    assert positive_forgetting_stderr(scores, stderr) == pytest.approx(simulated, rel=0.05)


def test_item_error_counts_only_what_was_forgotten():
    scores = np.array([[0.1, 0.1], [0.5, 0.1], [0.9, 0.8]])
    assert positive_forgetting_stderr(scores, np.full(scores.shape, 0.1)) == 0.0


def test_wrong_shapes_say_what_is_needed():
    with pytest.raises(UserError, match="needs 4 rows"):
        score_matrix(HAND[:3])
    with pytest.raises(UserError, match="no column for law"):
        score_matrix(HAND, sequence=["a", "law", "c"], domains=["a", "b", "c"])
    with pytest.raises(UserError, match="two axes"):
        score_matrix([0.1, 0.2])
