"""Scores of single candidates for labels, beside what the definitions say text by text."""

from __future__ import annotations

import pytest
import torch

from steerlora.saes.label_scores import (
    auroc,
    calibrated_f1,
    choose,
    components,
    f1_at,
    signed,
    text_scores,
)
from steerlora.saes.topk import TopK


def reference_f1(scores: list[float], labels: list[bool], threshold: float, pi0: float) -> float:
    """Counted one by one, with the prevalence put right by weights of positives and others."""
    positives = sum(labels)
    true = sum(label and score > threshold for score, label in zip(scores, labels, strict=True))
    false = sum(score > threshold and not y for score, y in zip(scores, labels, strict=True))
    # In the wild: recall as it is, and so many false alarms a negative.
    recall, alarm = true / positives, false / (len(labels) - positives)
    called = pi0 * recall + (1 - pi0) * alarm
    precision = pi0 * recall / called if called else 0.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def reference_auroc(scores: list[float], labels: list[bool]) -> float:
    pairs = [
        (p, n)
        for p, yes in zip(scores, labels, strict=True)
        for n, other in zip(scores, labels, strict=True)
        if yes and not other
    ]
    return sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs)


@pytest.fixture
def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """40 texts, 7 candidates with many equal scores, 3 labels of unlike support."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (40, 7), generator=generator) / 4
    scores[:, 6] = 0.5  # says nothing
    labels = torch.rand(40, 3, generator=generator) < torch.tensor([0.5, 0.2, 0.8])
    return scores, labels


@pytest.mark.parametrize("pi0", [1e-3, 0.3])
def test_the_best_threshold_is_the_best_of_all(texts, pi0):
    scores, labels = texts
    found = calibrated_f1(scores, labels, pi0)
    for label in range(3):
        for candidate in range(7):
            own, y = scores[:, candidate].tolist(), labels[:, label].tolist()
            cuts = sorted(set(own))[:-1]  # the last has nothing above it
            every = [reference_f1(own, y, cut, pi0) for cut in cuts]
            expected = max(every, default=0.0)
            assert found.value[label, candidate] == pytest.approx(expected, rel=1e-9)
            threshold = float(found.threshold[label, candidate])
            assert reference_f1(own, y, threshold, pi0) == pytest.approx(expected, rel=1e-9)


def test_a_prevalence_as_it_is_gives_the_plain_f1(texts):
    scores, labels = texts
    y = labels[:, :1]
    found = calibrated_f1(scores[:, :1], y, float(y.double().mean()))
    called = scores[:, :1] > found.threshold
    hits = int((called & y).sum())
    assert float(found.value) == pytest.approx(2 * hits / int(called.sum() + y.sum()))


def test_false_positives_weigh_more_the_rarer_the_label_is_in_the_wild(texts):
    scores, labels = texts
    values = [calibrated_f1(scores, labels, pi0).value for pi0 in (0.5, 0.1, 1e-3)]
    assert (values[0] >= values[1]).all()
    assert (values[1] >= values[2]).all()
    assert values[2].mean() < 0.5 * values[0].mean()


def test_f1_at_given_thresholds_and_auroc(texts):
    scores, labels = texts
    own, thresholds = scores[:, :3], torch.tensor([0.25, 0.5, 9.0])
    found = f1_at(own, labels, thresholds, 0.1)
    for column in range(3):
        given = (own[:, column].tolist(), labels[:, column].tolist())
        expected = reference_f1(*given, float(thresholds[column]), 0.1)
        assert float(found[column]) == pytest.approx(expected)
        assert float(auroc(own, labels[:, column])[column]) == pytest.approx(
            reference_auroc(*given)
        )


@pytest.mark.parametrize("by_auroc", [False, True])
def test_what_is_chosen_on_one_half_is_scored_on_the_other(by_auroc):
    generator = torch.Generator().manual_seed(1)
    labels = torch.rand(60, 2, generator=generator) < 0.5
    scores = torch.rand(60, 9, generator=generator)
    scores[:, 4] += 2 * labels[:, 0]
    scores[:30, 7] += 2 * labels[:30, 1]  # which the other half does not repeat
    halves = (scores[:30], labels[:30], scores[30:], labels[30:])
    found = choose(*halves, by_auroc=by_auroc)
    assert found.candidate.tolist() == [4, 7]
    assert found.f1[0] == 1
    assert found.auroc[0] == 1
    assert found.auroc[1] < 0.8
    assert found.f1[1] < 0.5
    allowed = torch.ones(9, dtype=torch.bool)
    allowed[4] = False
    assert choose(*halves, allowed=allowed, by_auroc=by_auroc).candidate[0] != 4
    with pytest.raises(ValueError, match="no candidate is left"):
        choose(*halves, allowed=torch.zeros(9, dtype=torch.bool))


def test_a_label_that_every_text_has_is_refused(texts):
    scores, labels = texts
    with pytest.raises(ValueError, match="texts that have it and texts that do not"):
        calibrated_f1(scores, labels | True)


def test_texts_are_scored_as_token_by_token(make_sae):
    sae = make_sae()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(11, sae.width, generator=generator)
    text = torch.tensor([0, 0, 0, 1, 1, 1, 1, 3, 3, 0, 1])
    found = text_scores(sae, tokens, text, 4)
    dense = sae.encode(tokens).dense(sae.latents)
    for number in (0, 1, 3):
        own = dense[text == number]
        assert torch.allclose(found.frequency[number], (own > 0).float().mean(0))
        assert torch.allclose(found.peak[number], own.max(0).values)
        assert torch.allclose(found.stream[number], tokens[text == number].mean(0), atol=1e-6)
        assert found.tokens[number] == len(own)
    assert not any(part[2].any() for part in found)
    part = found.rows(torch.tensor([3, 0]))
    assert torch.equal(part.peak, found.peak[[3, 0]])


def test_an_activation_is_in_the_units_of_the_stream():
    sae = TopK(32, 64, k=5, normalize="layer_norm")
    tokens = torch.randn(6, sae.width, generator=torch.Generator().manual_seed(0))
    one, ten = (text_scores(sae, s * tokens, torch.zeros(6, dtype=torch.long), 1) for s in (1, 10))
    assert torch.allclose(10 * one.peak, ten.peak, rtol=1e-3, atol=1e-4)


def test_a_coordinate_and_a_component_tell_by_their_sign_too():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40)[:, None] % 2 == 0
    streams = torch.randn(40, 5, generator=generator)
    streams[:, 2] -= 6 * labels[:, 0]
    halves = (streams[:20], streams[20:])
    first, second = (signed(half) for half in halves)
    found = choose(first, labels[:20], second, labels[20:])
    assert found.candidate.tolist() == [5 + 2]
    assert found.f1[0] == 1
    mean, directions = components(halves[0])
    assert torch.allclose(directions @ directions.t(), torch.eye(5).double(), atol=1e-9)
    assert directions[0, 2].abs() > 0.9
    assert torch.allclose(mean, halves[0].double().mean(0))
