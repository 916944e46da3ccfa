from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from steerlora.methods.routed_lora import health as routing_health
from steerlora.methods.routed_lora.health import (
    RoutingHealth,
    normalised_mutual_information,
    on_tokens,
)

DOMAINS = ["a", "b", "c", "d"]


def health(gates, domains, ranks=None, sequences=None, **where):
    gates = np.asarray(gates, dtype=float)
    meter = RoutingHealth(DOMAINS, gates.shape[1], **where)
    meter.update(gates, np.ones(len(gates)) if ranks is None else ranks, domains, sequences)
    return meter.result()


def test_perfect_specialisation():
    domains = np.repeat(np.arange(4), 25)
    sequences = np.arange(100) // 5
    result = health(np.eye(4)[domains], domains, sequences=sequences)
    assert result["mutual_information"] == pytest.approx(1.0)
    assert result["usage_entropy"] == pytest.approx(1.0)
    assert result["token_entropy"] == pytest.approx(0.0)
    assert result["load_cv2"] == pytest.approx(0.0)
    assert result["max_load"] == pytest.approx(0.25)
    assert result["dead_specialists"] == 0
    assert result["mutual_information_null_95"] < 0.6


def test_collapse():
    result = health([[1.0, 0.0, 0.0, 0.0]] * 40, np.arange(40) % 4)
    assert result["usage_entropy"] == pytest.approx(0.0)
    assert result["mutual_information"] == 0.0
    assert result["dead_specialists"] == 3
    assert result["max_load"] == 1.0
    assert result["load_cv2"] == pytest.approx(3.0)  # (1 - 1/4)^2 + 3 (1/4)^2 over 4, over (1/4)^2


def test_values_worked_by_hand():
    gates = [[0.8, 0.2], [0.4, 0.6], [0.5, 0.5]]
    result = health(gates, [0, 0, 2], ranks=[2.0, 4.0, 9.0])
    usage = np.array([1.7, 1.3]) / 3
    entropy = lambda p: -(np.array(p) * np.log(p)).sum() / np.log(2)  # noqa: E731
    assert result["usage_entropy"] == pytest.approx(entropy(usage))
    assert result["token_entropy"] == pytest.approx(np.mean([entropy(g) for g in gates]))
    assert result["load_cv2"] == pytest.approx(usage.var() / usage.mean() ** 2)
    assert result["mean_rank"] == pytest.approx(5.0)
    assert result["rank_by_domain"] == {"a": pytest.approx(3.0), "c": pytest.approx(9.0)}
    assert result["gate_by_domain"]["a"] == pytest.approx([0.6, 0.4])
    assert result["tokens"] == 3


def test_mutual_information_equals_scikit_learns_formula_on_hard_labels():
    # Joint of 8: rows 4/4, columns 6/2; I = sum p log(p / (row col)), by hand.
    joint = np.array([[4.0, 0.0], [2.0, 2.0]]) / 8
    rows, columns = joint.sum(1), joint.sum(0)
    information = sum(
        joint[i, j] * np.log(joint[i, j] / (rows[i] * columns[j]))
        for i in range(2)
        for j in range(2)
        if joint[i, j]
    )
    entropies = [-(p * np.log(p)).sum() for p in (rows, columns)]
    expected = information / np.mean(entropies)
    assert normalised_mutual_information(joint * 8) == pytest.approx(expected)


def test_null_is_small_for_independent_tokens_and_mutual_information_is_at_the_null():
    generator = np.random.default_rng(0)
    gates = generator.dirichlet(np.full(4, 0.3), 3000)
    domains = generator.integers(0, 4, 3000)
    result = health(gates, domains, sequences=np.arange(3000))
    assert result["mutual_information_null"] < 0.002
    assert result["mutual_information"] < 2 * result["mutual_information_null_95"]


def test_null_permutes_sequences_so_that_correlated_tokens_do_not_look_specialised():
    # Every sequence picks a specialist at random: 40 sequences of 50 equal tokens. The mutual
    # information is far from 0 by chance, and only a null over sequences knows it.
    generator = np.random.default_rng(1)
    sequences = np.repeat(np.arange(40), 50)
    gates = np.eye(4)[generator.integers(0, 4, 40)][sequences]
    domains = generator.integers(0, 4, 40)[sequences]
    over_sequences = health(gates, domains, sequences=sequences)
    over_tokens = health(gates, domains, sequences=np.arange(2000))
    assert over_sequences["mutual_information"] > 10 * over_tokens["mutual_information_null_95"]
    assert over_sequences["mutual_information"] < over_sequences["mutual_information_null_95"]


def test_streaming_equals_one_call_and_result_changes_nothing():
    generator = np.random.default_rng(2)
    gates = generator.dirichlet(np.ones(3), 600)
    ranks, domains = generator.uniform(0, 16, 600), np.repeat(generator.integers(0, 4, 60), 10)
    sequences = np.arange(600) // 10
    whole, parts = RoutingHealth(DOMAINS, 3), RoutingHealth(DOMAINS, 3)
    whole.update(gates, ranks, domains, sequences)
    for start in range(0, 600, 50):
        part = slice(start, start + 50)
        parts.update(gates[part], ranks[part], domains[part], sequences[part])
        parts.result()
    first, second = whole.result(), parts.result()
    for name in ("usage_entropy", "token_entropy", "load_cv2", "mutual_information", "mean_rank"):
        assert second[name] == pytest.approx(first[name], rel=1e-12)
    assert second["mutual_information_null"] == pytest.approx(
        first["mutual_information_null"], rel=0.2
    )
    assert whole.result() == first


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(routing_health, "RESERVOIR", 32)
    meter = RoutingHealth(DOMAINS, 2)
    generator = np.random.default_rng(3)
    seen = []
    for call in range(200):
        gates = generator.dirichlet(np.ones(2), 10)
        meter.update(gates, np.ones(10), np.full(10, call % 4), np.arange(10))
        seen.append(len(meter._keys))
    assert max(seen) == 32
    # A uniform sample: not the first sequences, nor the last.
    assert set(meter._unit_domains.tolist()) == {0, 1, 2, 3}
    assert meter.result()["tokens"] == 2000


def test_torch_tensors_of_low_precision_that_require_grad_and_json():
    gates = torch.full((6, 4), 0.25, dtype=torch.bfloat16, requires_grad=True)
    meter = RoutingHealth(DOMAINS, 4)
    meter.update(gates, torch.full((6,), 7.0), torch.tensor([0, 1, 2, 3, 0, 1]))
    result = meter.result()
    assert result["usage_entropy"] == pytest.approx(1.0)
    assert json.loads(json.dumps(result)) == result


def test_dead_threshold_is_a_part_of_the_uniform_share():
    share = routing_health.DEAD_SHARE / 4
    below, above = share * 0.99, share * 1.01
    assert health([[1 - below, below / 3, below / 3, below / 3]], [0])["dead_specialists"] == 3
    assert health([[1 - 3 * above, above, above, above]], [0])["dead_specialists"] == 0


def test_tokens_that_a_null_specialist_took_use_no_specialist_and_no_rank():
    routed = [[0.8, 0.2], [0.4, 0.6]]
    null = [[0.0, 0.0]] * 3
    alone = health(routed, [0, 0], ranks=[6.0, 6.0])
    mixed = health(routed + null, [0, 0, 0, 2, 2], ranks=[6.0] * 5)
    for name in ("usage_entropy", "token_entropy", "load_cv2", "dead_specialists", "max_load"):
        assert mixed[name] == pytest.approx(alone[name]), name
    assert (alone["routed"], mixed["routed"]) == (1.0, pytest.approx(0.4))
    assert mixed["mean_rank"] == pytest.approx(12 / 5)
    assert mixed["rank_by_domain"] == {"a": pytest.approx(4.0), "c": 0.0}
    assert mixed["gate_by_domain"]["c"] == [0.0, 0.0]
    nothing = health(null, [0, 1, 2])
    assert (nothing["usage_entropy"], nothing["dead_specialists"], nothing["routed"]) == (0, 2, 0)
    assert nothing["mutual_information"] == 0.0


def test_inactive_specialists_are_neither_dead_nor_unused_capacity():
    gates = [[0.5, 0.5, 0.0, 0.0]] * 4
    assert health(gates, [0, 1, 2, 3])["dead_specialists"] == 2
    half = health(gates, [0, 1, 2, 3], active=torch.tensor([True, True, False, False]))
    assert (half["usage_entropy"], half["token_entropy"]) == (pytest.approx(1), pytest.approx(1))
    assert (half["dead_specialists"], half["load_cv2"]) == (0, pytest.approx(0))
    assert len(half["gate_by_domain"]["a"]) == 4
    one = health([[1.0, 0.0]] * 2, [0, 1], active=[True, False])
    assert (one["usage_entropy"], one["token_entropy"], one["dead_specialists"]) == (1.0, 0.0, 0)
    assert health([[1.0]], [0])["usage_entropy"] == 1.0


def test_tokens_of_no_domain_count_in_the_load_alone():
    owned = health([[0.9, 0.1], [0.2, 0.8]], [0, 1])
    more = health([[0.9, 0.1], [0.2, 0.8], [1.0, 0.0]], [0, 1, -1])
    assert more["max_load"] == pytest.approx(2.1 / 3)
    assert more["tokens"] == 3
    assert more["mean_rank"] == pytest.approx(1.0)
    for name in ("mutual_information", "gate_by_domain", "rank_by_domain"):
        assert more[name] == owned[name], name


def test_the_summary_is_part_of_the_result():
    meter = RoutingHealth(DOMAINS, 2)
    meter.update(np.array([[0.9, 0.1]]), np.ones(1), np.zeros(1))
    assert meter.summary().items() <= meter.result().items()
    assert "mutual_information" not in meter.summary()


def test_routing_of_a_batch_without_its_padding():
    generator = torch.Generator().manual_seed(0)
    gate = torch.rand(2, 3, 4, generator=generator)
    mask = torch.rand(2, 3, 5, generator=generator)
    real = torch.tensor([[True, True, False], [True, False, False]])
    gates, ranks = on_tokens(gate, mask, real)
    assert torch.equal(gates, torch.stack([gate[0, 0], gate[0, 1], gate[1, 0]]))
    assert torch.allclose(ranks, torch.stack([mask[0, 0], mask[0, 1], mask[1, 0]]).sum(-1))
    # Two modules with routers of their own: the mean over them.
    both = (torch.stack([gate, 1 - gate], 2), torch.stack([mask, mask + 1], 2))
    gates, ranks = on_tokens(*both, real)
    assert torch.allclose(gates, torch.full((3, 4), 0.5))
    assert torch.allclose(ranks, mask[real].sum(-1) + 2.5)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="an active one of 2 specialists"):
        RoutingHealth(DOMAINS, 2, active=[False, False])
    with pytest.raises(ValueError, match="an active one of 2 specialists"):
        RoutingHealth(DOMAINS, 2, active=[True, False, False])
    meter = RoutingHealth(DOMAINS, 2)
    with pytest.raises(ValueError, match="no tokens"):
        meter.result()
    with pytest.raises(ValueError, match=r"gates must be \[tokens, 2\]"):
        meter.update(np.ones((3, 4)) / 4, np.ones(3), np.zeros(3))
    with pytest.raises(ValueError, match="must be"):
        meter.update(np.ones((3, 2)) / 2, np.ones(2), np.zeros(3))
    with pytest.raises(ValueError, match="domain ids"):
        meter.update(np.ones((3, 2)) / 2, np.ones(3), np.full(3, 4))
    with pytest.raises(ValueError, match="finite"):
        meter.update(np.full((3, 2), np.nan), np.ones(3), np.zeros(3))
