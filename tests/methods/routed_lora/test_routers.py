"""Gate, rank mask and routers: definitions written out, gradients in float64."""

from __future__ import annotations

import pytest
import torch

from steerlora.methods.routed_lora.config import RoutedLoRAConfig
from steerlora.methods.routed_lora.routers import (
    LinearRouter,
    MLPRouter,
    Router,
    monotone_mask,
    rank_bias,
    top_k_gate,
)
from steerlora.saes.sparse import SparseFeatures

B, S, E, R, N, K, M, H = 5, 6, 4, 16, 40, 5, 3, 7
KINDS = {"linear": LinearRouter, "mlp": MLPRouter}
T = B * S
ALL = torch.ones(E, dtype=torch.bool)
REAL = torch.ones(B, S, dtype=torch.bool)


def signals(seed: int = 0) -> tuple[SparseFeatures, torch.Tensor]:
    """Features [B, S, K] and the same as a dense [B, S, N], float64."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(B, S, K, generator=generator, dtype=torch.float64)
    indices = torch.rand(B, S, N, generator=generator).topk(K).indices
    dense = torch.zeros(B, S, N, dtype=torch.float64).scatter(-1, indices, values)
    return SparseFeatures(values, indices), dense


def router(kind: str = "linear", **changes) -> Router:
    settings = {"specialists": E, "rank": R, "top_k": 2, "router_hidden": H} | changes
    config = RoutedLoRAConfig(**settings)
    modules = M if config.per_module else 1
    return KINDS[kind](N, config, modules, torch.Generator().manual_seed(0)).double()


@torch.no_grad()
def randomized(made: Router) -> Router:
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.normal_(generator=generator)
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


@pytest.mark.parametrize("kind", KINDS)
def test_initial_effective_rank_is_not_one(kind):
    """Zero logits, as published, start 16 components at an effective rank of about 1."""
    routing, _ = router(kind, initial_rank=0.75)(signals()[0], REAL, ALL)
    assert routing.mask.sum(-1).mean().item() == pytest.approx(0.75 * R, rel=0.02)
    assert monotone_mask(torch.zeros(R)).sum() < 1.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_module", [False, True])
def test_fresh_routers_send_tokens_to_different_specialists(kind, per_module):
    routing, _ = router(kind, top_k=1, per_module=per_module)(signals()[0], REAL, ALL)
    assert len(routing.gate.argmax(-1).unique()) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_module", [False, True])
@pytest.mark.parametrize("dynamic_rank", [False, True])
def test_sparse_and_dense_signals_give_the_same_routing_and_gradients(
    kind, per_module, dynamic_rank
):
    sparse, dense = signals()
    ours = randomized(router(kind, per_module=per_module, dynamic_rank=dynamic_rank))
    found = [ours(signal, REAL, ALL)[0] for signal in (sparse, dense)]
    modules = (M,) if per_module else ()
    assert found[0].gate.shape == (B, S, *modules, E)
    assert found[0].mask.shape == (B, S, *modules, R)
    gradients = []
    for routing in found:
        loss = (routing.gate.cumsum(-1) ** 2).sum() + (routing.mask.cumsum(-1) ** 2).sum()
        gradients.append(torch.autograd.grad(loss, list(ours.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-9)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-9)
        assert one.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_a_module_is_as_many_routers(kind):
    """Stacked and batched, module m's answer is that of a router with m's weights alone."""
    sparse, _ = signals()
    ours = randomized(router(kind, per_module=True))
    together, _ = ours(sparse, REAL, ALL)
    for module in range(M):
        single = router(kind)
        outputs = E + R
        if kind == "linear":
            columns = slice(module * outputs, (module + 1) * outputs)
            weights = {"weight": ours.weight[:, columns], "bias": ours.bias[columns]}
        else:
            weights = {
                name: tensor[:, [module]] if name == "hidden_weight" else tensor[[module]]
                for name, tensor in ours.state_dict().items()
            }
        single.load_state_dict(weights)
        alone, _ = single(sparse, REAL, ALL)
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one, other[:, :, module], atol=1e-12, rtol=1e-9)


def test_the_perceptrons_are_two_layers_with_gelu():
    sparse, dense = signals()
    ours = randomized(router("mlp", top_k=E))
    routing, _ = ours(sparse, REAL, ALL)
    w = {name: tensor.detach() for name, tensor in ours.named_parameters()}
    units = dense @ w["hidden_weight"][:, 0] + w["hidden_bias"][0]
    units = units * 0.5 * (1 + torch.erf(units / 2**0.5))
    gate = torch.softmax(units[..., :H] @ w["gate_weight"][0] + w["gate_bias"][0], -1)
    mask = torch.sigmoid(units[..., H:] @ w["rank_weight"][0] + w["rank_bias"][0])
    torch.testing.assert_close(routing.gate, gate, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(routing.mask, mask.clamp_min(1e-4).cumprod(-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [2, 4])
def test_gradients_of_the_routing(kind, top_k):
    sparse, _ = signals()
    sparse, real = SparseFeatures(*(part[:1, :4] for part in sparse)), REAL[:1, :4]
    ours = randomized(router(kind, rank=3, top_k=top_k))
    names = [name for name, _ in ours.named_parameters()]

    def routing(*values):
        weights = dict(zip(names, values, strict=True))
        return tuple(torch.func.functional_call(ours, weights, (sparse, real, ALL))[0])

    arguments = tuple(p.detach().clone().requires_grad_() for p in ours.parameters())
    assert torch.autograd.gradcheck(routing, arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_without_dynamic_rank_the_mask_is_one_and_has_no_weights(kind):
    ours = router(kind, dynamic_rank=False)
    assert not any("rank" in name for name, _ in ours.named_parameters())
    assert sum(p.numel() for p in ours.parameters()) < sum(
        p.numel() for p in router(kind).parameters()
    )
    routing, _ = ours(signals()[0], REAL, ALL)
    assert torch.equal(routing.mask, torch.ones(B, S, R).double())


def test_inactive_specialists_have_no_gate():
    active = torch.tensor([True, False, True, False])
    routing, _ = randomized(router(top_k=2))(signals()[0], REAL, active)
    assert (routing.gate[..., ~active] == 0).all()
    torch.testing.assert_close(routing.gate.sum(-1), torch.ones(B, S).double())


def test_one_active_specialist_takes_all():
    active = torch.tensor([False, False, True, False])
    routing, _ = randomized(router(top_k=2))(signals()[0], REAL, active)
    torch.testing.assert_close(routing.gate[..., 2], torch.ones(B, S).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_module", [False, True])
def test_prototypes_reweight_the_gate_by_cosine(kind, per_module):
    sparse, dense = signals()
    plain = randomized(router(kind, top_k=E, per_module=per_module))
    ours = router(kind, top_k=E, per_module=per_module, prototypes=True)
    ours.load_state_dict({**plain.state_dict(), "prototypes": ours.prototypes})
    prototypes = torch.randn(E, N, generator=torch.Generator().manual_seed(5)).double()
    ours.set_prototypes(prototypes)
    before, _ = plain(sparse, REAL, ALL)
    after, _ = ours(sparse, REAL, ALL)
    cosine = torch.nn.functional.cosine_similarity(dense[..., None, :], prototypes, dim=-1)
    if per_module:
        cosine = cosine[..., None, :]
    expected = before.gate * (1 + cosine) / 2
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(after.gate, expected, atol=1e-6, rtol=1e-6)
    assert (after.gate - before.gate).abs().max() > 1e-3


def test_more_domains_than_specialists_share_them():
    ours = router(prototypes=True)
    prototypes = torch.randn(E + 1, N).double()
    ours.set_prototypes(prototypes)
    torch.testing.assert_close(ours.prototypes[0], prototypes[0] + prototypes[E])
    torch.testing.assert_close(ours.prototypes[1:], prototypes[1:E])
