"""The published metrics of a trained adapter, over training text of every domain.

T real tokens, E specialists, R rank components, N latents, K active latents, D domains.

Where the publication names a metric and gives no formula, the one here is ours
(`docs/published.md`). Each is a mean over control sites; gates and ranks of a site whose modules
have routers of their own are means over its modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from steerlora.data.batches import collate
from steerlora.data.chat import EncodedChat
from steerlora.distributed.shards import sharded, whole_weights
from steerlora.lm.decoder import decoder_of
from steerlora.methods.monitor import squared_change
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.compared_sites import ComparedSite, ComparedSites
from steerlora.methods.routed_lora.health import on_tokens
from steerlora.saes.sparse import SparseFeatures

STRONGEST = 16
"""Strongest latents of a token, for their overlap."""


class Seen(NamedTuple):
    """One site's tokens of one domain.

    Attributes:
        gates: [T, E].
        ranks: [T], effective ranks.
        norms: [T], of the features that route.
        overlap: mean over tokens, from 0 to 1.
        changed, kept: squares of the domain's own features' change, and of themselves, summed.
    """

    gates: Tensor
    ranks: Tensor
    norms: Tensor
    overlap: float
    changed: float
    kept: float


@torch.no_grad()
def measure(
    model: nn.Module,
    adapter: Adapter,
    sites: ComparedSites,
    rows: Mapping[str, Sequence[EncodedChat]],
    pad_token_id: int,
) -> dict[str, float]:
    """All metrics.

    - ``routing_accuracy``: share of tokens whose largest gate is their domain's specialist, under
      the best assignment of domains to specialists, one to one.
    - ``interference_cosine``: cosine of the updates B_e A_e of two specialists, mean over pairs of
      those active and over adapted layers.
    - ``domain_drift``: squared change of each domain's own features, from the base to the adapted
      model on its own text, over their squares; mean over domains.
    - ``top_k_overlap``: share of a token's ``STRONGEST`` latents in the base that are so in the
      adapted model too.
    - ``gate_rank_correlation``: Pearson's, over tokens, of the largest gate and the effective rank.
    - ``gate_feature_correlation``: likewise of the largest gate and the norm of the features.

    Args:
        model: in evaluation mode, with ``adapter`` attached.
        sites: of that adapter.
        rows: {domain: its text}; domains in the taxonomies' order.
        pad_token_id: fills batches.
    """
    by_site: dict[int, list[Seen]] = {site: [] for site in adapter.sites}
    for number, own in enumerate(rows.values()):
        batch = collate(own, [number] * len(own), pad_token_id).to(model.device)
        counted = adapter.with_signal(batch)
        with sites.recording():
            decoder_of(model)(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
        for site, found in zip(adapter.sites.values(), sites.found(), strict=True):
            gates, ranks = on_tokens(site.routing.gate, site.routing.mask, counted)
            norms = site.features.values[counted].norm(dim=-1)
            own_latents = found.taxonomy.domain[number]
            changed = squared_change(found.adapted, found.base, own_latents)
            kept = (found.base.values.square() * own_latents[found.base.indices]).sum()
            overlap = _overlap(found)
            seen = Seen(gates, ranks, norms, overlap, float(changed), float(kept))
            by_site[site.layer].append(seen)
    named = {
        "routing_accuracy": _accuracy,
        "domain_drift": lambda seen: _mean([one.changed / max(one.kept, 1e-12) for one in seen]),
        "top_k_overlap": lambda seen: _mean([one.overlap for one in seen]),
        "gate_rank_correlation": lambda seen: _correlation(seen, "ranks"),
        "gate_feature_correlation": lambda seen: _correlation(seen, "norms"),
    }
    metrics = {name: _mean([of(seen) for seen in by_site.values()]) for name, of in named.items()}
    return metrics | {"interference_cosine": interference(adapter)}


def _accuracy(seen: Sequence[Seen]) -> float:
    numbers = torch.arange(seen[0].gates.shape[1], device=seen[0].gates.device)
    counts = [(one.gates.argmax(-1, keepdim=True) == numbers).sum(0) for one in seen]
    counts = torch.stack(counts).cpu()  # [D, E]
    domains, specialists = linear_sum_assignment(counts.numpy(), maximize=True)
    return float(counts[domains, specialists].sum() / counts.sum())


def _correlation(seen: Sequence[Seen], other: str) -> float:
    """Of what never varies it is 0."""
    columns = [torch.cat([one.gates.amax(-1) for one in seen])]
    columns.append(torch.cat([getattr(one, other) for one in seen]))
    first, second = (column.double() - column.double().mean() for column in columns)
    return float((first @ second) / (first.norm() * second.norm()).clamp_min(1e-12))


def _overlap(found: ComparedSite) -> float:
    base, adapted = (_strongest(z) for z in (found.base, found.adapted))
    same = (base[:, :, None] == adapted[:, None, :]).any(-1) & (base >= 0)
    return float((same.sum(-1) / (base >= 0).sum(-1).clamp_min(1)).mean())


def _strongest(features: SparseFeatures) -> Tensor:
    """Latents of the largest values, [T, at most ``STRONGEST``]; -1 where fewer are active."""
    best = features.values.topk(min(STRONGEST, features.values.shape[-1]), dim=-1)
    return features.indices.gather(-1, best.indices).masked_fill(best.values <= 0, -1)


@torch.no_grad()
def interference(adapter: Adapter) -> float:
    """Mean cosine of the updates of two active specialists; 0 where there are no two.

    <B_i A_i, B_j A_j> = sum((B_i^T B_j) * (A_i A_j^T)): no [D_out, D_in] matrix. Collective where
    ranks share the weights.
    """
    count, cosines = adapter.config.specialists, []
    weights = {p: p for p in adapter.layers.parameters()}
    if any(map(sharded, weights)):
        weights = whole_weights(adapter.layers)
    active = adapter.active.expand(len(adapter.layers), count)
    for layer, own in zip(adapter.layers.values(), active, strict=True):
        A = weights[layer.A].unflatten(0, (count, -1))  # [E, R, D_in]
        B = weights[layer.B].t().unflatten(0, (count, -1))  # [E, R, D_out]
        products = torch.einsum("ird,jsd->ijrs", A, A) * torch.einsum("ird,jsd->ijrs", B, B)
        gram = products.sum((-2, -1))
        norms = gram.diagonal().clamp_min(1e-12).sqrt()
        for i, j in combinations(own.nonzero().flatten().tolist(), 2):
            cosines.append(float(gram[i, j] / (norms[i] * norms[j])))
    return _mean(cosines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
