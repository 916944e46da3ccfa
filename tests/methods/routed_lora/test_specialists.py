"""Changing single specialists: weights as they should be, the others and the optimizer at peace."""

from __future__ import annotations

import pytest
import torch

from steerlora.methods.routed_lora.specialists import (
    clear_specialist,
    merge_specialists,
    settle_moments,
)

E, R = 4, 3


@pytest.fixture
def adapter(make_model, make_adapter):
    return make_adapter(make_model())


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def updates(adapter, specialist: int) -> list[torch.Tensor]:
    rows = adapter.config.rows_of(specialist)
    return [layer.B[:, rows] @ layer.A[rows] for layer in adapter.layers.values()]


def parts(adapter, specialist: int) -> list[torch.Tensor]:
    rows = adapter.config.rows_of(specialist)
    return [p.clone() for q in adapter.layers.values() for p in (q.A[rows], q.B[:, rows])]


def unchanged(adapter, specialist: int, before: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, before, parts(adapter, specialist)))


def test_a_cleared_specialist_is_as_at_the_beginning(adapter):
    before = [parts(adapter, e) for e in range(E)]
    clear_specialist(adapter, 1, generator())
    rows = adapter.config.rows_of(1)
    for layer in adapter.layers.values():
        bound = layer.A.shape[1] ** -0.5
        assert not layer.B[:, rows].any()
        assert layer.A[rows].abs().max() <= bound
        assert layer.A[rows].std().item() == pytest.approx(bound / 3**0.5, rel=0.3)
    assert all(unchanged(adapter, e, before[e]) for e in (0, 2, 3))
    assert not unchanged(adapter, 1, before[1])
    again = parts(adapter, 1)
    clear_specialist(adapter, 1, generator())
    assert unchanged(adapter, 1, again)


def test_a_merged_specialist_is_the_best_one_of_its_rank(adapter):
    first, second, others = updates(adapter, 0), updates(adapter, 2), parts(adapter, 1)
    absorbed = parts(adapter, 2)
    merge_specialists(adapter, 0, 2, (0.75, 0.25), generator())
    for a, b, found in zip(first, second, updates(adapter, 0), strict=True):
        U, s, Vh = torch.linalg.svd(0.75 * a + 0.25 * b)
        torch.testing.assert_close(found, U[:, :R] * s[:R] @ Vh[:R], atol=1e-5, rtol=0)
    assert unchanged(adapter, 1, others)
    assert unchanged(adapter, 2, absorbed)


def test_components_that_a_merge_leaves_empty_can_still_learn(adapter):
    """Zero in both factors, no gradient would ever reach them."""
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.B[:, adapter.config.rows_of(0)] = 0
            layer.B[:, adapter.config.rows_of(2)] = 0
    merge_specialists(adapter, 0, 2, (0.5, 0.5), generator())
    rows = adapter.config.rows_of(0)
    for layer in adapter.layers.values():
        assert not layer.B[:, rows].any()
        assert (layer.A[rows].norm(dim=1) > 0.1).all()


def test_moments_settle_where_specialists_changed_and_nowhere_else(adapter):
    optimizer = torch.optim.AdamW(adapter.layers.parameters(), lr=1e-3)
    for layer in adapter.layers.values():
        layer.A.grad, layer.B.grad = torch.randn_like(layer.A), torch.randn_like(layer.B)
    optimizer.step()
    before = {p: {n: v.clone() for n, v in s.items()} for p, s in optimizer.state.items()}
    settle_moments(adapter, optimizer.state, {1, 3}, typical=[0, 1])
    for layer in adapter.layers.values():
        for parameter, along in ((layer.A, 0), (layer.B, 1)):
            state, held = optimizer.state[parameter], before[parameter]
            for e in range(E):
                rows = torch.arange(e * R, (e + 1) * R)
                first, second = (
                    state[n].index_select(along, rows) for n in ("exp_avg", "exp_avg_sq")
                )
                if e in (1, 3):
                    assert not first.any()
                    usual = held["exp_avg_sq"].narrow(along, 0, 2 * R).mean(along, keepdim=True)
                    torch.testing.assert_close(second, usual.expand_as(second))
                else:
                    assert torch.equal(first, held["exp_avg"].index_select(along, rows))
                    assert torch.equal(second, held["exp_avg_sq"].index_select(along, rows))
    settle_moments(adapter, torch.optim.SGD(adapter.layers.parameters(), lr=1).state, {1}, [0])


def test_the_steps_after_a_change_are_no_larger_than_before(adapter):
    """Second moments of zero, under the parameter's own old step count, give up to 6.5 times."""
    layer = next(iter(adapter.layers.values()))
    optimizer = torch.optim.AdamW([layer.A, layer.B], lr=1e-3, weight_decay=0.0)
    noise = torch.Generator().manual_seed(0)

    def largest_step(steps: int) -> float:
        largest = 0.0
        for _ in range(steps):
            before = layer.A.detach()[adapter.config.rows_of(1)].clone()
            layer.A.grad = 1 + 0.1 * torch.randn(layer.A.shape, generator=noise)
            layer.B.grad = torch.zeros_like(layer.B)
            optimizer.step()
            moved = (layer.A.detach()[adapter.config.rows_of(1)] - before).abs().mean()
            largest = max(largest, moved.item())
        return largest

    largest_step(2000)
    settle_moments(adapter, optimizer.state, {1}, typical=[0, 1])
    assert largest_step(100) < 1.2e-3
    rows = adapter.config.rows_of(1)
    for moment in ("exp_avg", "exp_avg_sq"):
        optimizer.state[layer.A][moment][rows] = 0
    assert largest_step(100) > 5e-3
