"""Specialists of one adapter: what routes to them, and whether their deltas lie along it."""

import torch

from steerlora.saes.geometry.specialists import (
    Signal,
    routing_latents,
    share_within,
    specialists_of,
)
from steerlora.saes.topk import TopK


def test_routing_latents_go_along_with_the_gate():
    generator = torch.Generator().manual_seed(0)
    gate = torch.rand(200, 1, generator=generator)
    features = torch.rand(200, 6, generator=generator)
    features[:, 2] += 5 * gate[:, 0]
    features[:, 4] -= 5 * gate[:, 0]
    found = routing_latents(torch.cat([gate, 1 - gate], 1), features, 1)
    assert found.tolist() == [[2], [4]]


def test_the_share_within_a_span():
    rows = torch.tensor([[3.0, 0, 4], [0, 5, 0]])
    assert abs(share_within(rows, torch.eye(3)[:1]) - 9 / 50) < 1e-6
    assert abs(share_within(rows, torch.eye(3) * 7) - 1) < 1e-6


def test_specialists_that_write_what_routes_to_them_are_told_from_others():
    generator = torch.Generator().manual_seed(0)
    gates = torch.eye(2)[torch.randint(2, (300,), generator=generator)]
    directions = torch.eye(16)
    features = torch.zeros(300, 16)
    features[:, :8] = gates[:, :1] * torch.rand(300, 8, generator=generator)
    features[:, 8:] = gates[:, 1:] * torch.rand(300, 8, generator=generator)
    deltas = [features[:, :8] @ directions[:8], features[:, 8:] @ directions[8:]]
    saes = [[TopK(16, 32, k=2, seed=2 * e + copy) for copy in range(2)] for e in range(2)]
    about = {"method": "m", "seed": 0, "layer": 1, "generator": generator}
    found = specialists_of(deltas, deltas, saes, Signal(gates, features, directions), **about)
    own, other = found.routed[0]
    assert own > 0.99
    assert other < 0.01
    assert found.routed[1][1] > found.routed[1][0]
    assert 0 < found.routed_random[0][0] < 1
    assert specialists_of(deltas, deltas, saes, None, **about).routed == []
