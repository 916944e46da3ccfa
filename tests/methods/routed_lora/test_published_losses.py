"""The published losses: each against its formula in loops, with gradients, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.features import taxonomy
from helpers.training import learner_of
from torch import Tensor

from steerlora.data.batches import collate
from steerlora.data.chat import EncodedChat
from steerlora.errors import UserError
from steerlora.lm.decoder import residual_streams
from steerlora.methods.lowrank import LowRank
from steerlora.methods.routed_lora import losses, published_losses
from steerlora.methods.routed_lora.compared_sites import ComparedSites
from steerlora.methods.routed_lora.config import LossWeights, RoutedLoRAConfig

E, R, T, M = 4, 3, 12, 2
ACTIVE = torch.tensor([True, False, True, True])
CLOSE = {"rtol": 1e-10, "atol": 1e-13}


def gates(*shape: int, sharpness: float = 1.0) -> tuple[Tensor, Tensor]:
    """Of active specialists, from even ones to nearly one-hot; and the logits behind them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, E, generator=generator, dtype=torch.float64).requires_grad_()
    return (sharpness * logits).masked_fill(~ACTIVE, -torch.inf).softmax(-1), logits


def same_value_and_gradient(found: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(found, expected, **CLOSE)
    ours = torch.autograd.grad(found, inputs, retain_graph=True)
    theirs = torch.autograd.grad(expected, inputs, retain_graph=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def slow_sparsity(gate: Tensor, active: int) -> Tensor:
    low, peaks = [], []
    for token in gate.reshape(-1, E):
        entropy = -sum(g * g.log() for g in token if g > 0)
        low.append((0.2 * math.log(active) - entropy).clamp(min=0))
        peaks.append((max(token) - 0.9).clamp(min=0))
    return sum(low) / len(low) + sum(peaks) / len(peaks)


@pytest.mark.parametrize("sharpness", [0.1, 3.0, 5.0])
@pytest.mark.parametrize("shape", [(T,), (T, M)])
def test_gate_sparsity_is_what_low_entropy_and_high_peaks_cost(shape, sharpness):
    gate, logits = gates(*shape, sharpness=sharpness)
    found = published_losses.gate_sparsity(gate, ACTIVE)
    same_value_and_gradient(found, slow_sparsity(gate, 3), logits)
    assert (found > 0) == (sharpness > 1)


def test_gate_sparsity_pushes_the_other_way_than_ours():
    logits = torch.tensor([[8.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    everyone = torch.ones(3, dtype=torch.bool)
    published = published_losses.gate_sparsity(logits.softmax(-1), everyone)
    ours = losses.gate_sparsity(logits.softmax(-1))
    (one,), (other,) = torch.autograd.grad(published, logits), torch.autograd.grad(ours, logits)
    assert one[0, 0] > 0 > other[0, 0]


@pytest.mark.parametrize("modules", [(), (M,)])
def test_load_balance_is_a_mean_over_active_specialists(modules):
    gate, logits = gates(T, *modules)
    parts = []
    for one in gate.unbind(1) if modules else [gate]:
        usage = [one[:, e].mean() for e in range(E) if ACTIVE[e]]
        parts.append(sum((u - 1 / 3) ** 2 for u in usage) / 3)
    expected = sum(parts) / len(parts)
    usage = gate.mean(0)
    same_value_and_gradient(published_losses.load_balance(usage, ACTIVE), expected, logits)
    ours = losses.load_balance(usage, ACTIVE)
    torch.testing.assert_close(ours, 3 * expected, **CLOSE)


def test_every_module_may_have_active_specialists_of_its_own():
    """[M, E] in place of [E], in ours too."""
    active = torch.stack([ACTIVE, torch.tensor([True, True, False, False])])
    gate = gates(T, M)[0].detach()
    gate[:, 1] = 0
    gate[:, 1, 0], gate[:, 1, 1] = 0.995, 0.005
    expected = [slow_sparsity(gate[:, 0], 3), slow_sparsity(gate[:, 1], 2)]
    found = published_losses.gate_sparsity(gate, active)
    torch.testing.assert_close(found, sum(expected) / 2, **CLOSE)
    for form, shares in ((published_losses, (3, 2)), (losses, (1, 1))):
        parts = [
            (gate[:, m].mean(0)[active[m]] - 1 / int(active[m].sum())).square().sum() / shares[m]
            for m in range(M)
        ]
        found = form.load_balance(gate.mean(0), active)
        torch.testing.assert_close(found, sum(parts) / 2, **CLOSE)


def low_ranks() -> list[LowRank]:
    generator = torch.Generator().manual_seed(2)
    made = [LowRank(6, 5, E * R, generator).double(), LowRank(5, 8, E * R, generator).double()]
    for layer in made:
        torch.nn.init.normal_(layer.B, generator=generator)
    return made


def test_diversity_is_the_mean_of_the_whole_gram_of_active_specialists():
    layers, parts = low_ranks(), []
    for layer in layers:
        for blocks in (
            [layer.A[e * R : (e + 1) * R].flatten() for e in range(E) if ACTIVE[e]],
            [layer.B[:, e * R : (e + 1) * R].t().flatten() for e in range(E) if ACTIVE[e]],
        ):
            gram = [[torch.cosine_similarity(a, b, 0) ** 2 for b in blocks] for a in blocks]
            parts.append(sum(sum(row) for row in gram) / 9)
    found = published_losses.specialist_diversity([(layer, ACTIVE) for layer in layers], E)
    inputs = [p for layer in layers for p in (layer.A, layer.B)]
    same_value_and_gradient(found, sum(parts) / len(parts), *inputs)
    for gradient in torch.autograd.grad(found, [layers[0].A]):
        moved = gradient.view(E, -1).abs().sum(1) > 0
        assert torch.equal(moved, ACTIVE)


def test_diversity_has_finite_gradients_where_b_is_still_zero():
    layer = LowRank(6, 5, E * R)
    published_losses.specialist_diversity([(layer, ACTIVE)], E).backward()
    assert layer.A.grad.abs().sum() > 0
    assert torch.equal(layer.B.grad, torch.zeros_like(layer.B))


def chats():
    generator = torch.Generator().manual_seed(0)
    rows = [
        EncodedChat(torch.randint(1, 61, (length,), generator=generator).tolist(), 2)
        for length in (9, 4, 7, 5)
    ]
    return collate(rows, [0, 1, 0, -1], pad_token_id=0)


def as_dense(features, latents: int = 64) -> Tensor:
    zeros = torch.zeros(*features.values.shape[:-1], latents, dtype=features.values.dtype)
    return zeros.scatter_add(-1, features.indices, features.values)


def published(make_adapter, model, **weights: float):
    """An adapter of all three layers in the published arrangement, and its learner."""
    adapter = make_adapter(
        model,
        sites=(0, 1, 2),
        source="base",
        reads="output",
        router="mlp",
        router_hidden=5,
        rank_hidden=3,
        per_module=True,
        published_losses=True,
        losses=LossWeights(**weights),
    )
    for sae in adapter.saes.values():
        sae.double()
    adapter.taxonomies = {site: taxonomy() for site in adapter.sites}
    return adapter, learner_of(model, adapter)


def test_preservation_and_steering_are_summed_over_what_leaves_every_layer(
    make_model, make_adapter
):
    model = make_model(torch.float64)
    adapter, learner = published(make_adapter, model, preservation=1.0, steering=0.5)
    batch = chats()
    terms = learner.losses(batch)
    real = batch.attention_mask.bool()
    owners = batch.domains[:, None].expand_as(real)[real]
    facts = taxonomy()
    with adapter.disabled():
        before = residual_streams(model, batch.input_ids, batch.attention_mask, [1, 2, 3])
    adapted = model.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        output_hidden_states=True,
    ).hidden_states
    last = {}
    hook = model.model.norm.register_forward_pre_hook(lambda _, given: last.update(x=given[0]))
    model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    hook.remove()
    kept, steered = 0, 0
    for site in range(3):
        stream = last["x"] if site == 2 else adapted[site + 1]
        z = as_dense(adapter.saes[site].encode(stream[real]))
        z_base = as_dense(adapter.saes[site].encode(before[site + 1][real]))
        kept = kept + ((z - z_base) * facts.general).square().mean()
        own = owners >= 0
        gap = (z[own] - facts.prototypes[owners[own]].double()) * facts.domain[owners[own]]
        steered = steered + gap.square().mean()
    weights = [p for p in adapter.parameters() if p.requires_grad]
    for name, expected in (("preservation", kept), ("steering", steered)):
        found = terms[name][1]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
        ours = torch.autograd.grad(found, weights, retain_graph=True)
        theirs = torch.autograd.grad(expected, weights, retain_graph=True)
        for one, other in zip(ours, theirs, strict=True):
            # The model's norms are of float32, whatever comes in.
            error, largest = (one - other).abs().max(), other.abs().max()
            assert error <= 1e-5 * largest
        assert sum(float(one.abs().sum()) for one in ours) > 0


def test_the_learner_takes_the_published_form_of_every_loss(make_model, make_adapter):
    model = make_model(torch.float64)
    weights = {"gate_sparsity": 1.0, "load_balance": 1.0, "diversity": 1.0}
    adapter, learner = published(make_adapter, model, **weights)
    batch = chats()
    terms = learner.losses(batch)
    real = batch.attention_mask.bool()
    gates = [site.routing.gate[real] for site in adapter.sites.values()]
    everyone = adapter.active
    form = published_losses
    expected = {
        "gate_sparsity": sum(form.gate_sparsity(g, everyone) for g in gates) / 3,
        "load_balance": sum(form.load_balance(g.mean(0), everyone) for g in gates) / 3,
        "diversity": form.specialist_diversity(
            [(layer, everyone) for layer in adapter.layers.values()], E
        ),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name][1], value, rtol=1e-10, atol=0)
    adapter.config = replace(adapter.config, published_losses=False)
    ours = learner_of(model, adapter).losses(batch)
    assert all((ours[name][1] - expected[name]).abs() > 1e-6 for name in expected)


def test_a_site_needs_a_taxonomy(make_model, make_adapter):
    model = make_model()
    adapter = make_adapter(model, sites=(0, 1), source="base", reads="output")
    with pytest.raises(ValueError, match="no taxonomy of the features at control site 1"):
        ComparedSites(model, adapter, {0: taxonomy()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reads": "output"}, "set method.source=base and method.router=linear"),
        ({"reads": "outputs"}, "method.reads=outputs"),
        (
            {"published_losses": True, "losses": LossWeights(steering=1.0)},
            "set method.signal=sae and method.reads=output, or",
        ),
    ],
)
def test_what_makes_no_method_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        RoutedLoRAConfig(**changes)
