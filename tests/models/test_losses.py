"""Auxiliary losses: their definitions in plain loops, and gradients that reach the router."""

from __future__ import annotations

import math

import pytest
import torch

from steerlora.models import losses
from steerlora.models.lowrank import LowRank
from steerlora.models.router import Router

E, R, T, N = 4, 3, 12, 20


def gates(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(T, E, generator=generator, dtype=torch.float64).softmax(-1)


def test_gate_sparsity_is_the_mean_entropy():
    gate = gates()
    expected = sum(-g * math.log(g) for row in gate.tolist() for g in row) / T
    assert losses.gate_sparsity(gate).item() == pytest.approx(expected)
    one_hot = torch.eye(E, dtype=torch.float64)
    assert losses.gate_sparsity(one_hot).item() == pytest.approx(0, abs=1e-9)


def test_rank_budget_is_the_mean_mask():
    assert losses.rank_budget(torch.tensor([[1.0, 0.5], [0.5, 0.0]])).item() == 0.5


def test_load_balance_is_the_distance_of_mean_usage_from_uniform():
    gate = gates()
    usage = [sum(row[e] for row in gate.tolist()) / T for e in range(E)]
    assert losses.load_balance(gate).item() == pytest.approx(sum((u - 1 / E) ** 2 for u in usage))
    # Balanced over tokens is enough: no token need be uniform.
    assert losses.load_balance(torch.eye(E).repeat(3, 1)).item() == pytest.approx(0)


def low_ranks() -> list[LowRank]:
    made = [LowRank(6, 5, E * R).double(), LowRank(5, 8, E * R).double()]
    for layer in made:
        torch.nn.init.normal_(layer.B, generator=torch.Generator().manual_seed(2))
    return made


def test_diversity_is_the_mean_squared_cosine_between_specialists():
    cosines = []
    layers = low_ranks()
    for layer in layers:
        for part in (
            [layer.A[e * R : (e + 1) * R].flatten() for e in range(E)],
            [layer.B[:, e * R : (e + 1) * R].t().flatten() for e in range(E)],
        ):
            cosines += [
                torch.cosine_similarity(part[i], part[j], dim=0).item() ** 2
                for i in range(E)
                for j in range(E)
                if i != j
            ]
    found = losses.specialist_diversity(layers, E)
    assert found.item() == pytest.approx(sum(cosines) / len(cosines))


def test_diversity_has_finite_gradients_where_b_is_still_zero():
    layers = [LowRank(6, 5, E * R)]
    losses.specialist_diversity(layers, E).backward()
    assert layers[0].A.grad.abs().sum() > 0
    assert torch.equal(layers[0].B.grad, torch.zeros_like(layers[0].B))


def test_gradients():
    gate = gates().requires_grad_()
    layer = low_ranks()[0]
    assert torch.autograd.gradcheck(losses.gate_sparsity, (gate,))
    assert torch.autograd.gradcheck(losses.load_balance, (gate,))

    def diversity(A, B):
        layer.A.data, layer.B.data = A.data, B.data
        fake = type("Layer", (), {"A": A, "B": B})
        return losses.specialist_diversity([fake], E)

    leaves = [p.detach().clone().requires_grad_() for p in (layer.A, layer.B)]
    assert torch.autograd.gradcheck(diversity, tuple(leaves))


@pytest.mark.parametrize("name", ["gate_sparsity", "load_balance", "rank_budget"])
def test_every_loss_on_routing_moves_the_router(name):
    """The published code computes them on detached gates, so that they train nothing."""
    router = Router(N, specialists=E, rank=R, top_k=2, generator=torch.Generator().manual_seed(0))
    signal = torch.randn(T, N, generator=torch.Generator().manual_seed(1))
    routing = router.route(router.logits_dense(signal))
    getattr(losses, name)(routing.mask if name == "rank_budget" else routing.gate).backward()
    gate_part, mask_part = router.weight.grad.split([E, R], dim=1)
    moved, still = (mask_part, gate_part) if name == "rank_budget" else (gate_part, mask_part)
    assert moved.abs().sum() > 1e-6
    assert still.abs().sum() == 0
