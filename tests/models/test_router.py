"""Gate, rank mask and router: definitions written out, gradients in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from steerlora.models.router import Router, monotone_mask, rank_bias, top_k_gate

E, R, N, K, T = 4, 16, 40, 5, 30


def sparse_signal(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """values, indices [T, K] and the same as a dense [T, N], float64."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(T, K, generator=generator, dtype=torch.float64)
    indices = torch.rand(T, N, generator=generator).topk(K).indices
    return values, indices, torch.zeros(T, N, dtype=torch.float64).scatter(1, indices, values)


def router(**changes) -> Router:
    settings = {"specialists": E, "rank": R, "top_k": 2} | changes
    made = Router(N, generator=torch.Generator().manual_seed(0), **settings).double()
    with torch.no_grad():
        made.weight.normal_(generator=torch.Generator().manual_seed(1))
    return made


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (4, 2.0)])
def test_gate_is_the_renormalised_top_k_of_the_softmax(top_k, temperature):
    logits = torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate = top_k_gate(logits, top_k, temperature)
    for row, found in zip(logits, gate, strict=True):
        exponentials = [float(torch.exp(v / temperature)) for v in row]
        softmax = [value / sum(exponentials) for value in exponentials]
        kept = sorted(range(E), key=lambda e: -softmax[e])[:top_k]
        total = sum(softmax[e] for e in kept) + 1e-8
        expected = [softmax[e] / total if e in kept else 0.0 for e in range(E)]
        torch.testing.assert_close(
            found, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0
        )


def test_mask_is_a_running_product_of_clamped_sigmoids():
    logits = torch.tensor([[3.0, -1.0, -30.0, 2.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    found = monotone_mask(logits)
    for row, mask in zip(logits.tolist(), found.tolist(), strict=True):
        product = 1.0
        for logit, m in zip(row, mask, strict=True):
            product *= max(1e-4, float(torch.sigmoid(torch.tensor(logit).double())))
            assert m == pytest.approx(product, rel=1e-9)
    assert (found.diff(dim=-1) <= 0).all()
    assert (found > 0).all()


@pytest.mark.parametrize("effective", [1.0, 4.0, 12.0, 15.5])
def test_rank_bias_gives_the_effective_rank_asked_for(effective):
    mask = monotone_mask(torch.full((R,), rank_bias(R, effective), dtype=torch.float64))
    assert mask.sum().item() == pytest.approx(effective, rel=1e-6)


def test_initial_effective_rank_is_not_one():
    """Zero logits, as published, start 16 components at an effective rank of about 1."""
    values, indices, _ = sparse_signal()
    fresh = Router(N, specialists=E, rank=R, top_k=2, initial_rank=0.75).double()
    mean_rank = fresh.route(fresh.logits_sparse(values, indices)).mask.sum(-1).mean().item()
    assert mean_rank == pytest.approx(0.75 * R, rel=0.02)
    assert monotone_mask(torch.zeros(R)).sum() < 1.01


def test_fresh_routers_send_tokens_to_different_specialists():
    values, indices, _ = sparse_signal()
    fresh = Router(N, specialists=E, rank=R, top_k=1).double()
    chosen = fresh.route(fresh.logits_sparse(values, indices)).gate.argmax(-1)
    assert len(chosen.unique()) > 1


def test_sparse_and_dense_signals_give_the_same_logits_and_gradients():
    values, indices, dense = sparse_signal()
    ours = router()
    logits = ours.logits_sparse(values.view(5, 6, K), indices.view(5, 6, K))
    assert logits.shape == (5, 6, E + R)
    torch.testing.assert_close(logits.view(T, -1), ours.logits_dense(dense), atol=1e-12, rtol=0)
    weights = torch.randn(T, E + R, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    parameters = list(ours.parameters())
    sparse = torch.autograd.grad((logits.view(T, -1) * weights).sum(), parameters)
    full = torch.autograd.grad((ours.logits_dense(dense) * weights).sum(), parameters)
    for a, b in zip(sparse, full, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("top_k", [2, 4])
def test_gradients_of_the_routing(top_k):
    values, indices, _ = sparse_signal()
    ours = router(rank=3, top_k=top_k)
    values, indices = values[:4], indices[:4]

    def routing(weight, bias):
        return torch.func.functional_call(
            _Route(ours), {"router.weight": weight, "router.bias": bias}, (values, indices)
        )

    arguments = tuple(p.detach().clone().requires_grad_() for p in (ours.weight, ours.bias))
    assert torch.autograd.gradcheck(routing, arguments)


class _Route(nn.Module):
    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, values, indices):
        return tuple(self.router.route(self.router.logits_sparse(values, indices)))


def test_without_dynamic_rank_the_mask_is_one_and_has_no_weights():
    values, indices, _ = sparse_signal()
    ours = router(dynamic_rank=False)
    assert ours.weight.shape == (N, E)
    assert torch.equal(
        ours.route(ours.logits_sparse(values, indices)).mask, torch.ones(T, R).double()
    )
