"""Every loss: its definition in loops or dense float64, its gradient, and what that moves."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from steerlora.methods.lowrank import LowRank
from steerlora.methods.routed_lora import losses
from steerlora.saes.sparse import SparseFeatures

E, R, T, N = 4, 3, 12, 20
D, K = 3, 5


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
    assert losses.load_balance(gate.mean(0)).item() == pytest.approx(
        sum((u - 1 / E) ** 2 for u in usage)
    )
    # Balanced over tokens is enough: no token need be uniform.
    assert losses.load_balance(torch.eye(E).mean(0)).item() == pytest.approx(0)


def test_load_balance_leaves_inactive_specialists_out():
    active = torch.tensor([True, False, True, True])
    gate = gates() * active
    usage = [sum(row[e] for row in gate.tolist()) / T for e in (0, 2, 3)]
    expected = sum((u - 1 / 3) ** 2 for u in usage)
    assert losses.load_balance(gate.mean(0), active).item() == pytest.approx(expected)
    even = torch.tensor([[1 / 3, 0, 1 / 3, 1 / 3]])
    assert losses.load_balance(even.mean(0), active).item() == pytest.approx(0)
    assert losses.load_balance(even.mean(0)).item() > 0.05


def test_each_module_with_a_router_of_its_own_is_balanced_by_itself():
    one_sided = torch.eye(E)[torch.tensor([0, 1])].expand(T, 2, E)  # module m: specialist m only
    collapsed = (1 - 1 / E) ** 2 + (E - 1) / E**2
    assert losses.load_balance(one_sided.mean(0)).item() == pytest.approx(collapsed)
    modules = torch.stack([gates(0), gates(1)], 1)
    for loss in (losses.load_balance, losses.gate_sparsity, losses.rank_budget):
        mean = (loss(gates(0)) + loss(gates(1))) / 2
        assert loss(modules).item() == pytest.approx(mean.item())


def features(seed: int, least_active: int = 2) -> SparseFeatures:
    """Float64 features of T tokens, some entries inactive; the inactive repeat an index."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(T, N, generator=generator).topk(K, dim=1).indices
    values = torch.rand(T, K, generator=generator, dtype=torch.float64) + 0.1
    active = torch.randint(least_active, K + 1, (T, 1), generator=generator)
    silent = torch.arange(K) >= active
    return SparseFeatures(
        values.masked_fill(silent, 0), torch.where(silent, indices[:, :1], indices)
    )


def dense(found: SparseFeatures) -> torch.Tensor:
    """[T, N], differentiable in the values."""
    return torch.zeros(T, N, dtype=found.values.dtype).scatter_add(
        1, found.indices, found.values * (found.values > 0)
    )


GENERAL = torch.arange(N) % 3 != 0


def domain_facts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prototypes [D, N], masks [D, N] and the tokens' domains [T], some of which have none."""
    generator = torch.Generator().manual_seed(5)
    prototypes = torch.rand(D, N, generator=generator, dtype=torch.float64)
    masks = torch.rand(D, N, generator=generator) < 0.5
    return prototypes, masks, torch.randint(-1, D, (T,), generator=generator)


def dense_preservation(adapted: SparseFeatures, base: SparseFeatures) -> torch.Tensor:
    return ((dense(adapted) - dense(base)) * GENERAL).square().mean()


def dense_steering(adapted: SparseFeatures) -> torch.Tensor:
    prototypes, masks, domains = domain_facts()
    kept = domains >= 0
    gap = (dense(adapted)[kept] - prototypes[domains[kept]]) * masks[domains[kept]]
    return gap.square().mean()


def with_values(found: SparseFeatures) -> tuple[SparseFeatures, torch.Tensor]:
    values = found.values.clone().requires_grad_()
    return SparseFeatures(values, found.indices), values


@pytest.mark.parametrize("seed", range(5))
def test_preservation_equals_the_dense_formula(seed):
    base = features(seed + 10)
    (adapted, values), (slow, slow_values) = (with_values(features(seed)) for _ in range(2))
    found, expected = losses.preservation(adapted, base, GENERAL), dense_preservation(slow, base)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(v, x)[0] for v, x in ((found, values), (expected, slow_values))]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize("seed", range(5))
def test_steering_equals_the_dense_formula(seed):
    (adapted, values), (slow, slow_values) = (with_values(features(seed)) for _ in range(2))
    found, expected = losses.steering(adapted, *domain_facts()), dense_steering(slow)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(v, x)[0] for v, x in ((found, values), (expected, slow_values))]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)
    assert grads[0].abs().sum() > 0


def test_features_that_did_not_move_are_preserved_exactly():
    """Also in another order, with another number of entries a token, and in float32."""
    base = SparseFeatures(features(0).values.float(), features(0).indices)
    padded = SparseFeatures(*(torch.nn.functional.pad(part.flip(1), (0, 3)) for part in base))
    everything = torch.ones(N, dtype=torch.bool)
    assert losses.preservation(padded, base, everything).item() == 0
    assert losses.preservation(base, padded, everything).item() == 0


def one_token(latent: int, value: float) -> SparseFeatures:
    return SparseFeatures(torch.tensor([[value, 0.0]]), torch.tensor([[latent, 0]]))


def test_preservation_pulls_towards_the_base_and_only_general_features():
    for value, sign in ((3.0, 1), (1.0, -1)):  # above and below the base's 2
        adapted, values = with_values(one_token(4, value))
        loss = losses.preservation(adapted, one_token(4, 2.0), GENERAL)
        assert loss.item() == pytest.approx(1 / N)
        loss.backward()
        assert values.grad[0, 0].item() == pytest.approx(sign * 2 / N)
        assert values.grad[0, 1] == 0
    # A latent that the base alone, or the adapted stream alone, has.
    apart = losses.preservation(one_token(5, 3.0), one_token(4, 2.0), GENERAL)
    assert apart.item() == pytest.approx((9 + 4) / N)
    assert losses.preservation(one_token(3, 3.0), one_token(6, 2.0), GENERAL).item() == 0


def test_steering_pulls_towards_the_prototype_and_only_the_domain_s_features():
    prototypes, masks = torch.zeros(2, N), torch.zeros(2, N, dtype=torch.bool)
    prototypes[1, [4, 7]], masks[1, [4, 7]] = torch.tensor([2.0, 1.0]), True
    for value, sign in ((3.0, 1), (1.0, -1)):
        adapted, values = with_values(one_token(4, value))
        loss = losses.steering(adapted, prototypes, masks, torch.tensor([1]))
        assert loss.item() == pytest.approx((1 + 1) / N)  # the other 1 is silent latent 7
        loss.backward()
        assert values.grad[0, 0].item() == pytest.approx(sign * 2 / N)
        assert values.grad[0, 1] == 0
    other = losses.steering(one_token(4, 9.0), prototypes, masks, torch.tensor([0]))
    assert other.item() == 0


def test_tokens_of_no_domain_are_not_steered():
    prototypes, masks, _ = domain_facts()
    adapted, values = with_values(features(0))
    loss = losses.steering(adapted, prototypes, masks, torch.full((T,), -1))
    loss.backward()
    assert loss.item() == 0
    assert values.grad.abs().sum() == 0


def test_orthogonality_is_the_sum_of_absolute_products():
    expected = 0.0
    for layer in low_ranks():
        rows = layer.A.detach()
        for e in (0, 2):
            for i in range(R):
                for j in range(R):
                    expected += abs(float(rows[e * R + i] @ rows[3 * R + j]))
    assert losses.orthogonality(low_ranks(), E, 3, (0, 2)).item() == pytest.approx(expected)


def test_orthogonality_moves_the_current_specialist_away_and_no_other():
    layers = low_ranks()
    before = losses.orthogonality(layers, E, 3, (0, 2))
    before.backward()
    for layer in layers:
        own = torch.arange(E * R) >= 3 * R
        assert layer.A.grad[own].abs().sum() > 0
        assert layer.A.grad[~own].abs().sum() == 0
        assert layer.B.grad is None
        layer.A.data -= 1e-3 * layer.A.grad
    assert losses.orthogonality(layers, E, 3, (0, 2)) < before


def low_ranks() -> list[LowRank]:
    generator = torch.Generator().manual_seed(2)
    made = [LowRank(6, 5, E * R, generator).double(), LowRank(5, 8, E * R, generator).double()]
    for layer in made:
        torch.nn.init.normal_(layer.B, generator=generator)
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


def test_losses_on_routing_descend_the_right_way():
    logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    losses.gate_sparsity(logits.softmax(-1)).backward()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 2]  # descent raises the largest
    logits.grad = None
    losses.load_balance(logits.softmax(-1).mean(0)).backward()
    assert logits.grad[0, 0] > 0 > logits.grad[0, 2]  # descent lowers the most used
    mask = torch.rand(T, R, requires_grad=True)
    losses.rank_budget(mask).backward()
    assert (mask.grad > 0).all()  # descent spends less


def test_diversity_turns_alike_specialists_apart():
    layer = LowRank(2, 2, 2)
    layer.A.data = torch.tensor([[1.0, 0.0], [1.0, 0.5]])
    losses.specialist_diversity([layer], 2).backward()
    assert layer.A.grad[0, 1] > 0 > layer.A.grad[1, 1]  # descent: -y for the one, +y for the other


def test_gradients_on_routing():
    gate, active = gates().requires_grad_(), torch.tensor([True, True, False, True])
    assert torch.autograd.gradcheck(losses.gate_sparsity, (gate,))
    assert torch.autograd.gradcheck(losses.rank_budget, (gate,))
    assert torch.autograd.gradcheck(losses.load_balance, (gate,))
    assert torch.autograd.gradcheck(
        lambda g: losses.load_balance((g * active).mean(0), active), (gate,)
    )


def test_gradients_on_features():
    full = features(0, least_active=K)  # at an inactive entry the losses have no derivative
    values, base = full.values.requires_grad_(), features(1)

    def preserved(v):
        return losses.preservation(SparseFeatures(v, full.indices), base, GENERAL)

    def steered(v):
        return losses.steering(SparseFeatures(v, full.indices), *domain_facts())

    assert torch.autograd.gradcheck(preserved, (values,))
    assert torch.autograd.gradcheck(steered, (values,))


def test_gradients_on_weights():
    layer = low_ranks()[0]
    A, B = (p.detach().clone().requires_grad_() for p in (layer.A, layer.B))
    *earlier, current = (block.detach().clone() for block in A.split(R))

    def diversity(A, B):
        return losses.specialist_diversity([SimpleNamespace(A=A, B=B)], E)

    def orthogonality(current):
        stacked = SimpleNamespace(A=torch.cat([*earlier, current]))
        return losses.orthogonality([stacked], E, E - 1, (0, 1))

    assert torch.autograd.gradcheck(diversity, (A, B))
    assert torch.autograd.gradcheck(orthogonality, (current.requires_grad_(),))
