"""The published metrics against loops over tokens, pairs and layers."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from helpers.features import taxonomy
from helpers.training import learner_of

from steerlora.data.batches import collate
from steerlora.data.chat import EncodedChat
from steerlora.methods.base import Task
from steerlora.methods.routed_lora import published_metrics
from steerlora.methods.routed_lora.compared_sites import ComparedSites
from steerlora.methods.routed_lora.config import LossWeights

E, R, LATENTS = 4, 3, 64


def rows(seed: int) -> list[EncodedChat]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (5, 8, 3)
    return [
        EncodedChat(torch.randint(1, 61, (n,), generator=generator).tolist(), 1) for n in lengths
    ]


ROWS = {"law": rows(0), "math": rows(1)}


@pytest.fixture
def attached(make_model, make_adapter):
    model = make_model()
    adapter = make_adapter(
        model,
        sites=(0, 2),
        source="base",
        reads="output",
        per_module=True,
        published_losses=True,
        losses=LossWeights(steering=1.0),
    )
    adapter.taxonomies = {site: taxonomy() for site in adapter.sites}
    return model, adapter


def dense(features) -> np.ndarray:
    zeros = torch.zeros(*features.values.shape[:-1], LATENTS)
    return zeros.scatter_add(-1, features.indices, features.values).numpy()


@torch.no_grad()
def by_hand(model, adapter, site: int) -> dict[str, float]:
    """Of one site, token by token."""
    watched = ComparedSites(model, adapter, adapter.taxonomies)
    largest, ranks, norms, counts = [], [], [], np.zeros((2, E))
    drift, overlaps = [], []
    for d, own in enumerate(ROWS.values()):
        batch = collate(own, [d] * 3, 0)
        with watched.recording():
            model.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
        found = dict(zip(adapter.sites, watched.found(), strict=True))[site]
        routing, real = adapter.sites[site].routing, batch.attention_mask.bool()
        z = dense(adapter.sites[site].features)[real.numpy()]
        now, before = dense(found.adapted), dense(found.base)
        own_latents = taxonomy().domain[d].numpy()
        drift.append(
            ((now - before)[:, own_latents] ** 2).sum() / (before[:, own_latents] ** 2).sum()
        )
        shares = []
        for t, (b, s) in enumerate(real.nonzero().tolist()):
            gate = routing.gate[b, s].mean(0)
            largest.append(float(gate.max()))
            counts[d, int(gate.argmax())] += 1
            ranks.append(float(routing.mask[b, s].sum(-1).mean()))
            norms.append(float(np.linalg.norm(z[t])))
            strong = {n for n in np.argsort(-before[t])[:16] if before[t, n] > 0}
            kept = {n for n in np.argsort(-now[t])[:16] if now[t, n] > 0}
            shares.append(len(strong & kept) / len(strong))
        overlaps.append(np.mean(shares))
    best = max(
        sum(counts[d, e] for d, e in enumerate(chosen)) for chosen in permutations(range(E), 2)
    )
    return {
        "routing_accuracy": best / counts.sum(),
        "domain_drift": float(np.mean(drift)),
        "top_k_overlap": float(np.mean(overlaps)),
        "gate_rank_correlation": float(np.corrcoef(largest, ranks)[0, 1]),
        "gate_feature_correlation": float(np.corrcoef(largest, norms)[0, 1]),
    }


def test_every_metric_is_its_formula_averaged_over_sites(attached):
    model, adapter = attached
    watched = ComparedSites(model, adapter, adapter.taxonomies)
    found = published_metrics.measure(model, adapter, watched, ROWS, 0)
    sites = [by_hand(model, adapter, site) for site in adapter.sites]
    for name in sites[0]:
        assert found[name] == pytest.approx(np.mean([one[name] for one in sites]), rel=1e-4), name
    assert set(found) == {*sites[0], "interference_cosine"}
    assert found["interference_cosine"] == published_metrics.interference(adapter)


def test_interference_is_the_cosine_of_whole_updates(attached):
    _, adapter = attached
    adapter.active[1] = False
    cosines = []
    for layer in adapter.layers.values():
        updates = [
            (layer.B[:, e * R : (e + 1) * R] @ layer.A[e * R : (e + 1) * R]).flatten()
            for e in (0, 2, 3)
        ]
        pairs = combinations(updates, 2)
        cosines += [torch.cosine_similarity(a, b, 0).item() for a, b in pairs]
    found = published_metrics.interference(adapter)
    assert found == pytest.approx(np.mean(cosines), abs=1e-6)
    adapter.active[2:] = False
    assert published_metrics.interference(adapter) == 0


def test_joint_training_ends_with_them(attached):
    model, adapter = attached
    learner = learner_of(model, adapter)
    assert "metrics" not in learner.history()
    learner.end(Task(ROWS))
    assert set(learner.history()["metrics"]) >= {"routing_accuracy", "domain_drift"}
