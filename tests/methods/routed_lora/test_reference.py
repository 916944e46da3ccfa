"""``sc_lora_reference`` against the published arrangement: same weights, same outputs, float64.

``scripts/published_arrangement.py`` shares no code with the adapter but the SAEs' parameters: dense
features from a copy of the base, controllers one by one, every specialist's output apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from published_arrangement import PublishedArrangement, Setting
from torch import Tensor, nn

from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.config import RoutedLoRAConfig
from steerlora.saes.relu import ReLU

LAYERS, E, R, H, ALPHA = 3, 4, 3, 6, 6.0
H_RANK = 5
SCALES = {0: 1.5, 1: 2.5, 2: 0.75}
CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # the epsilon of 1e-8 in the gate is well within sight


@dataclass(frozen=True)
class Pair:
    """The same weights twice."""

    ours: nn.Module
    adapter: Adapter
    slow: nn.Module
    arrangement: PublishedArrangement

    def logits(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Of real tokens, [T, V] each."""
        self.arrangement.observe(ids, mask)
        return tuple(
            model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
            for model in (self.ours, self.slow)
        )


def by_name(
    arrangement: PublishedArrangement, read: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The arrangement's tensors under the names, and in the shapes, of the adapter's docstring."""
    found = {}
    for (layer, path), made in arrangement.controlled.items():
        name = f"layers.{layer}:{path.replace('.', '/')}"
        found[f"{name}.A"] = read(made.A).flatten(0, 1)
        found[f"{name}.B"] = read(made.B).transpose(0, 1).flatten(1)
    for layer in range(LAYERS):
        modules = [made for (owner, _), made in arrangement.controlled.items() if owner == layer]

        def stacked(pick: Callable, modules=modules) -> Tensor:
            return torch.stack([read(pick(module)) for module in modules])

        gate, rank = (lambda m, i: m.gate[i]), (lambda m, i: m.rank[i])
        hidden = [
            torch.cat([stacked(lambda m, s=s: s(m, 0).weight) for s in (gate, rank)], 1),
            torch.cat([stacked(lambda m, s=s: s(m, 0).bias) for s in (gate, rank)], 1),
        ]
        found |= {
            f"routers.{layer}.hidden_weight": hidden[0].permute(2, 0, 1),
            f"routers.{layer}.hidden_bias": hidden[1],
            f"routers.{layer}.gate_weight": stacked(lambda m: m.gate[2].weight).mT,
            f"routers.{layer}.gate_bias": stacked(lambda m: m.gate[2].bias),
            f"routers.{layer}.rank_weight": stacked(lambda m: m.rank[2].weight).mT,
            f"routers.{layer}.rank_bias": stacked(lambda m: m.rank[2].bias),
        }
    return found


@pytest.fixture
def make_pair(make_model, make_sae) -> Callable[..., Pair]:
    """``make_pair(top_k=2, active=None, relu=False, reads="output")``: weights large enough for
    every term to matter."""

    def make(
        top_k: int = 2, active: int | None = None, relu: bool = False, reads: str = "output"
    ) -> Pair:
        ours, slow = make_model(torch.float64), make_model(torch.float64)
        saes = {layer: make_sae(seed=layer).double() for layer in range(LAYERS)}
        if relu:
            norm = {"normalize": "layer_norm_input"}
            saes = {layer: ReLU(32, 64, seed=layer, **norm).double() for layer in range(LAYERS)}
        config = RoutedLoRAConfig(
            signal="sae",
            router="mlp",
            router_hidden=H,
            rank_hidden=H_RANK,
            reads=reads,
            per_module=True,
            source="base",
            sites=tuple(range(LAYERS)),
            specialists=E,
            active=active,
            rank=R,
            alpha=ALPHA,
            top_k=top_k,
        )
        adapter = Adapter(ours, config, saes, feature_scales=SCALES).double().attach(ours)
        setting = Setting(
            specialists=E,
            rank=R,
            alpha=ALPHA,
            top_k=top_k,
            hidden=H,
            rank_hidden=H_RANK,
            outputs=reads == "output",
            active=None if active is None else torch.arange(E) < active,
        )
        arrangement = PublishedArrangement(slow, saes, setting, SCALES)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in arrangement.trainable():
                parameter.normal_(0, 0.3, generator=generator)
            for made in arrangement.controlled.values():
                made.rank[2].bias.normal_(0, 5.0, generator=generator)  # some below the floor
        weights = by_name(arrangement, torch.detach)
        assert set(weights) == {n for n, p in adapter.named_parameters() if p.requires_grad}
        adapter.load_state_dict(weights, strict=False)
        return Pair(ours, adapter, slow, arrangement)

    return make


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("top_k", "active", "relu", "reads"),
    [
        (2, None, False, "input"),
        (2, 2, True, "output"),
        (2, 3, False, "output"),
        (1, None, False, "output"),
        (4, None, True, "input"),
    ],
)
def test_logits_and_every_gradient_equal_the_published_arrangement(
    make_pair, tokens, top_k, active, relu, reads, left
):
    pair = make_pair(top_k, active, relu, reads)
    ids, mask = tokens([7, 4, 5])
    if left:
        ids, mask = ids.flip(1), mask.flip(1)
    ours, slow = pair.logits(ids, mask)
    torch.testing.assert_close(ours, slow, **CLOSE)

    wanted = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3)).double()
    (ours * wanted).sum().backward()
    (slow * wanted).sum().backward()
    expected = by_name(pair.arrangement, lambda p: p.grad)
    for name, parameter in pair.adapter.named_parameters():
        if parameter.requires_grad:
            largest = expected[name].abs().max().item()
            assert largest > 0, name
            # The small entries are sums of large ones, so that rounding is of the largest's size.
            # With one specialist kept, the gate's gradient is what the epsilon of 1e-8 leaves.
            close = 1e-6 if top_k == 1 else 1e-10
            error = (parameter.grad - expected[name]).abs().max().item()
            assert error <= close * largest, (name, error, largest)


def test_the_features_are_those_of_the_base_though_every_layer_is_adapted(make_pair, tokens):
    """With source "inline" the features above the first layer would be another stream's."""
    pair = make_pair()
    ids, mask = tokens([7, 4])
    pair.logits(ids, mask)
    for layer, signal in enumerate(pair.arrangement.signals):
        features = pair.adapter.sites[layer].features
        dense = torch.zeros_like(signal.z).scatter(-1, features.indices, features.values)
        torch.testing.assert_close(dense[mask.bool()], signal.z[mask.bool()], **CLOSE)


def test_float32_agrees_as_far_as_float32_goes(make_pair, tokens):
    pair = make_pair()
    ids, mask = tokens([7, 4])
    exact = pair.logits(ids, mask)[1]
    for part in (pair.ours, pair.adapter, *pair.adapter.saes.values()):
        part.float()
    single = pair.ours(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    assert (single - exact).abs().max() < 1e-3 * exact.abs().max()
