"""Probes and perturbations against slow references, planted latents, and an untrained SAE."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.perturbation import (
    spurious_correlation_removal,
    strongest,
    targeted_probe_perturbation,
    without,
)
from steerlora.saes.probing import Pooled, balanced, fit_probe, pool, sparse_probing
from steerlora.saes.relu import ReLU
from steerlora.saes.topk import TopK

WIDTH, LATENTS = 48, 64
SLACK = 4
"""Standard errors of a proportion: chance passes a test all but always."""


def text_of(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens [T, D], and the text of each: of lengths 1, 2, 3, ..."""
    text = torch.arange(count).repeat_interleave(torch.arange(count) % 7 + 1)
    generator = torch.Generator().manual_seed(seed)
    return 2 + torch.randn(len(text), WIDTH, generator=generator, dtype=torch.float64), text


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
def test_means_over_a_text_are_those_of_a_loop(normalize):
    sae = TopK(WIDTH, LATENTS, k=5, normalize=normalize, seed=1).double()
    tokens, text = text_of(9, 0)
    found = pool(sae, tokens, text, 9)
    for number in range(9):
        own = tokens[text == number]
        dense = sae.encode(own).dense(LATENTS) * sae.normalized(own).scale
        assert torch.allclose(found.streams[number], own.mean(0), rtol=1e-12, atol=0)
        assert torch.allclose(found.features[number], dense.mean(0).detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
def test_taking_latents_out_equals_doing_so_token_by_token(normalize):
    """SAEBench: decode without them, and add the SAE's error of all of them."""
    sae = TopK(WIDTH, LATENTS, k=5, normalize=normalize, seed=1).double()
    tokens, text = text_of(9, 0)
    latents = torch.tensor([3, 8, 21])
    inputs = sae.normalized(tokens)
    features = sae.encode_normalized(inputs.x)
    kept = features.among(~torch.isin(features.indices, latents))
    error = tokens - sae(tokens)
    changed = sae.decode(kept) * inputs.scale + inputs.mean + error
    expected = torch.stack([changed[text == number].mean(0) for number in range(9)]).detach()
    found = without(pool(sae, tokens, text, 9), latents, sae.W_dec.detach())
    assert torch.allclose(found, expected, rtol=1e-10)


def test_a_probe_is_the_minimum_of_its_loss():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2 == 0
    rows = torch.randn(200, 4, generator=generator, dtype=torch.float64) * torch.arange(1, 5)
    rows[labels, 1] += 1.5
    probe = fit_probe(rows + 7, labels)
    scaled = (rows - rows.mean(0)) / rows.std(0, correction=0)
    weight = (probe.weight * rows.std(0, correction=0)).requires_grad_()
    bias = torch.tensor(probe.bias + float(probe.weight @ (rows + 7).mean(0))).requires_grad_()
    sign = labels.double() * 2 - 1
    loss = torch.nn.functional.softplus(-sign * (scaled @ weight + bias)).sum()
    (loss + 0.5 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 0.05  # of a sum over 200 rows
    assert bias.grad.abs() < 0.05


def test_a_column_that_never_changes_is_no_trouble():
    labels = torch.arange(20) % 2 == 0
    rows = torch.stack([labels.double(), torch.ones(20)], 1)
    assert fit_probe(rows, labels).accuracy(rows, labels) == 1


@pytest.mark.parametrize("positive", [1, 30, 50, 99])
def test_half_of_a_balanced_choice_is_positive(positive):
    labels = torch.arange(100) < positive
    chosen = balanced(labels, seed=3)
    assert len(chosen) == len(set(chosen.tolist())) == 2 * min(positive, 100 - positive)
    assert labels[chosen].double().mean() == 0.5
    assert torch.equal(chosen, balanced(labels, seed=3))


class Planted(NamedTuple):
    """Texts whose concepts are orthogonal directions, and an SAE with a latent for each."""

    sae: SparseAutoencoder
    directions: Tensor

    def texts(self, concepts: Tensor, seed: int, noise: float = 0.3) -> Tensor:
        """Activations of one token a text, [R, D], of which ``concepts`` [R, C] are active."""
        generator = torch.Generator().manual_seed(seed)
        found = noise * torch.randn(len(concepts), WIDTH, generator=generator)
        return found + concepts.float() @ self.directions[: concepts.shape[1]]

    def pooled(self, streams: Tensor, sae: SparseAutoencoder | None = None) -> Pooled:
        return pool(sae or self.sae, streams, torch.arange(len(streams)), len(streams))


@pytest.fixture(scope="module")
def planted() -> Planted:
    generator = torch.Generator().manual_seed(5)
    directions = 3 * torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    sae = ReLU(WIDTH, LATENTS)
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.W_dec[:WIDTH] = directions / 3
        sae.W_enc.copy_(sae.W_dec.t())
        sae.b_enc.fill_(-0.5)
    return Planted(sae, directions)


def classes(count: int, texts: int, seed: int) -> Tensor:
    return torch.randint(count, (texts,), generator=torch.Generator().manual_seed(seed))


def one_hot(labels: Tensor, count: int) -> Tensor:
    return torch.nn.functional.one_hot(labels, count)


def test_a_planted_latent_is_found_by_a_probe_of_one(planted):
    train, test = classes(4, 400, 0), classes(4, 400, 1)
    before, after = (
        planted.pooled(planted.texts(one_hot(labels, 4), seed))
        for seed, labels in enumerate((train, test))
    )
    found = sparse_probing(before, after, train, test, seed=0)
    assert found["sae_top_1_test_accuracy"] > 0.98
    assert found["sae_test_accuracy"] > 0.95
    assert found["llm_test_accuracy"] > 0.98
    assert found["llm_top_1_test_accuracy"] < found["sae_top_1_test_accuracy"]


def test_labels_that_mean_nothing_are_told_by_chance(planted):
    train, test = classes(2, 400, 2), classes(2, 400, 3)
    before, after = (planted.pooled(torch.randn(400, WIDTH) + 1) for _ in range(2))
    chance = SLACK * 0.5 / math.sqrt(400)
    for name, value in sparse_probing(before, after, train, test, seed=0).items():
        assert value == pytest.approx(0.5, abs=chance), name


def test_an_untrained_sae_has_no_latent_for_a_concept(planted):
    """In one of many coordinates noise hides the concept, unless a latent is made for it."""
    train, test = classes(2, 600, 4), classes(2, 600, 5)
    random = planted.sae.untrained_like(seed=9)
    scores = {}
    for name, sae in (("own", planted.sae), ("random", random)):
        before, after = (
            planted.pooled(planted.texts(labels[:, None], seed, noise=1.0), sae)
            for seed, labels in enumerate((train, test))
        )
        scores[name] = sparse_probing(before, after, train, test, seed=0)
    assert scores["own"]["sae_top_1_test_accuracy"] > 0.9
    assert scores["random"]["sae_top_1_test_accuracy"] < 0.8
    assert scores["own"]["llm_test_accuracy"] == scores["random"]["llm_test_accuracy"]


def tpp(planted: Planted, sae: SparseAutoencoder) -> dict[str, float]:
    train, test = classes(4, 800, 6), classes(4, 800, 7)
    before, after = (
        planted.pooled(planted.texts(one_hot(labels, 4), seed), sae)
        for seed, labels in enumerate((train, test))
    )
    return targeted_probe_perturbation(before, after, train, test, sae.W_dec.detach(), seed=0)


def test_taking_out_a_planted_latent_hurts_its_own_class_alone(planted):
    found = tpp(planted, planted.sae)
    assert found["tpp_threshold_2_intended_diff_only"] > 0.3
    assert found["tpp_threshold_2_total_metric"] > 0.3
    for count in (2, 5, 10, 20, 50):
        parts = [found[f"tpp_threshold_{count}_{part}_diff_only"] for part in PARTS]
        assert found[f"tpp_threshold_{count}_total_metric"] == pytest.approx(parts[0] - parts[1])
    assert not any("100" in name for name in found)  # it has 64


PARTS = ("intended", "unintended")


def test_taking_out_latents_of_an_untrained_sae_hurts_no_class_much(planted):
    random = planted.sae.untrained_like(seed=9)
    assert abs(tpp(planted, random)["tpp_threshold_2_total_metric"]) < 0.1


def test_tpp_equals_a_loop_over_classes(planted):
    """Two latents out of each class, everything spelt out."""
    train, test = classes(3, 90, 8), classes(3, 90, 9)
    before, after = (
        planted.pooled(planted.texts(one_hot(labels, 3), seed, noise=1.5))
        for seed, labels in enumerate((train, test))
    )
    W_dec = planted.sae.W_dec.detach()
    probes, sets = [], []
    for one in range(3):
        rows, tested = balanced(train == one, 0), balanced(test == one, 0)
        probes.append(fit_probe(before.streams[rows], train[rows] == one))
        sets.append((tested, test[tested] == one))
    totals = []
    for one in range(3):
        rows = balanced(train == one, 0)
        yes, no = rows[train[rows] == one], rows[train[rows] != one]
        effect = {}
        for latent in range(LATENTS):
            column = before.features[:, latent].double()
            more = max(0.0, float(column[yes].mean() - column[no].mean()))
            effect[latent] = more * float(W_dec[latent].double() @ probes[one].weight)
        out = sorted((e for e in effect if effect[e]), key=effect.get, reverse=True)[:2]
        changed = after.streams - sum(
            after.features[:, latent, None] * W_dec[latent] for latent in out
        )
        lost = [
            probe.accuracy(after.streams[tested], labels) - probe.accuracy(changed[tested], labels)
            for probe, (tested, labels) in zip(probes, sets, strict=True)
        ]
        totals.append(lost[one] - (sum(lost) - lost[one]) / 2)
    found = targeted_probe_perturbation(before, after, train, test, W_dec, seed=0)
    assert found["tpp_threshold_2_total_metric"] == pytest.approx(sum(totals) / 3)


def scr(planted: Planted, sae: SparseAutoencoder) -> dict[str, float]:
    """Each value of either attribute is a concept."""
    train, test = (torch.stack([classes(2, 800, s), classes(2, 800, s + 1)], 1) for s in (10, 12))
    before, after = (
        planted.pooled(planted.texts(torch.cat([labels, 1 - labels], 1), seed, noise=0.5), sae)
        for seed, labels in enumerate((train, test))
    )
    return spurious_correlation_removal(
        before, after, train.bool(), test.bool(), sae.W_dec.detach(), seed=0
    )


def test_taking_out_a_planted_attribute_frees_a_biased_probe_of_it(planted):
    found = scr(planted, planted.sae)
    assert found["scr_metric_threshold_2"] > 0.5
    assert found["scr_metric_threshold_2"] in (
        found["scr_dir1_threshold_2"],
        found["scr_dir2_threshold_2"],
    )


def test_an_untrained_sae_frees_no_probe(planted):
    random = planted.sae.untrained_like(seed=9)
    assert abs(scr(planted, random)["scr_metric_threshold_2"]) < 0.35


def test_a_bias_that_costs_nothing_cannot_be_removed(planted):
    """Attributes that are the whole stream, without noise: the probe knows each one."""
    labels = torch.tensor([[a, b] for a in (0, 1) for b in (0, 1)] * 20).bool()
    streams = torch.zeros(80, WIDTH)
    streams[:, 0] = labels[:, 0].float() * 2 - 1
    texts = planted.pooled(streams)
    found = spurious_correlation_removal(
        texts, texts, labels, labels, planted.sae.W_dec.detach(), seed=0
    )
    assert math.isnan(found["scr_dir1_threshold_2"])


def test_latents_that_do_not_help_a_probe_are_left_in():
    assert strongest(torch.tensor([0.0, 2.0, 0.0, -1.0, 3.0]), 4).tolist() == [4, 1]
