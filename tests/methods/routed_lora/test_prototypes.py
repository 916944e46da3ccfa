"""Prototype routing: cosines written out, switches, padding, packing, a KV cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from steerlora.methods.routed_lora import prototypes as module
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.config import CONTEXTS, RoutedLoRAConfig
from steerlora.methods.routed_lora.prototypes import Metric, PrototypeRouter, cosines_so_far
from steerlora.saes.sparse import SparseFeatures

B, S, N, K, E = 3, 11, 20, 4, 3
REAL = torch.ones(B, S, dtype=torch.bool)
REAL[1, :4] = False  # left padding
REAL[2, 7:] = False  # right padding
ACTIVE = torch.ones(E, dtype=torch.bool)


def signals() -> tuple[SparseFeatures, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(B, S, K, generator=generator, dtype=torch.float64)
    indices = torch.rand(B, S, N, generator=generator).topk(K).indices
    dense = torch.zeros(B, S, N, dtype=torch.float64).scatter(-1, indices, values)
    return SparseFeatures(values, indices), dense


def config(**changes) -> RoutedLoRAConfig:
    settings = {"specialists": E, "rank": 2, "router": "prototype", "dynamic_rank": False}
    settings["whitened"] = False
    return RoutedLoRAConfig(**(settings | {"context": "causal_mean", "margin": 0.0} | changes))


def router(known: tuple[int, ...] = (0, 1, 2), general: bool = True, **changes) -> PrototypeRouter:
    made = PrototypeRouter(N, config(**changes)).double()
    rows = signals()[1][REAL][[0, 9, 15, 20]]
    for specialist in known:
        made.fit(specialist, rows[[specialist]])
    if general:
        made.fit(None, rows[[E]])
    return made


def slowly(dense: torch.Tensor, context: str, decay: float) -> torch.Tensor:
    """Averages over the real tokens so far, one token at a time."""
    found = torch.zeros_like(dense)
    for row in range(B):
        total, weight = torch.zeros(N, dtype=torch.float64), 0.0
        for position in range(S):
            if REAL[row, position]:
                keep = {"token": 0.0, "causal_mean": 1.0, "ema": decay}[context]
                total = keep * total + dense[row, position]
                weight = keep * weight + 1
            found[row, position] = total / max(weight, 1e-300)
    return found


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("entries", [2**24, 3 * B * N])
def test_cosines_of_pooled_features(context, entries, monkeypatch):
    """Whole sequences at once or three tokens at a time: the same."""
    monkeypatch.setattr(module, "DENSE_ENTRIES", entries)
    sparse, dense = signals()
    rows = torch.randn(5, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    centre = rows.mean(0)
    settings = config(context=context, decay=0.6)
    for signal in (sparse, dense):
        found, _ = cosines_so_far(signal, rows, centre, REAL, settings)
        expected = F.cosine_similarity(
            (slowly(dense, context, 0.6) - centre)[:, :, None], rows - centre, dim=-1
        )
        torch.testing.assert_close(found[REAL], expected[REAL], atol=1e-12, rtol=1e-9)


def test_a_hard_gate_is_the_nearest_known_prototype():
    _, dense = signals()
    ours = router(known=(0, 2), general=False)
    gate = ours(dense, REAL, ACTIVE)[0].gate
    rows = ours.prototypes[[0, 2]]
    centred = rows - rows.mean(0)
    cosines = F.cosine_similarity(
        (slowly(dense, "causal_mean", 0) - rows.mean(0))[:, :, None], centred, dim=-1
    )
    expected = torch.tensor([0, 2])[cosines.argmax(-1)]
    assert torch.equal(gate.argmax(-1)[REAL], expected[REAL])
    assert torch.equal(gate.sum(-1)[REAL], torch.ones_like(gate.sum(-1)[REAL]))
    assert len(expected[REAL].unique()) == 2


def test_general_text_has_no_update():
    _, dense = signals()
    with_general, without = router(), router(general=False)
    gates = [made(dense, REAL, ACTIVE)[0].gate[REAL].sum(-1) for made in (with_general, without)]
    assert 0 < gates[0].mean() < 1
    assert (gates[1] == 1).all()


def test_no_update_where_the_two_nearest_are_too_alike():
    _, dense = signals()
    ours = router(general=False)
    known = ours.prototypes[:E]
    cosines, _ = cosines_so_far(dense, known, known.mean(0), REAL, config(margin=0.0))
    best = cosines.topk(2, dim=-1).values
    gap = best[..., 0] - best[..., 1]
    margin = float(gap[REAL].median())
    gate = router(general=False, margin=margin)(dense, REAL, ACTIVE)[0].gate
    assert torch.equal(gate.sum(-1)[REAL] == 1, (gap >= margin)[REAL])
    assert 0 < (gate.sum(-1)[REAL] == 0).double().mean() < 1


def test_a_soft_gate_is_the_softmax_of_the_cosines():
    _, dense = signals()
    hard = router()
    soft = router(hard_gate=False, temperature=0.3)(dense, REAL, ACTIVE)[0].gate
    known = hard.prototypes
    cosines, _ = cosines_so_far(dense, known, known.mean(0), REAL, config())
    expected = torch.softmax(cosines / 0.3, -1)[..., :E]
    torch.testing.assert_close(soft[REAL], expected[REAL])
    assert (soft[REAL].sum(-1) < 1).all()  # general text's share is no update


def test_a_prototype_that_comes_alone_takes_every_token():
    _, dense = signals()
    gate = router(known=(1,), general=False, margin=0.5)(dense, REAL, ACTIVE)[0].gate
    assert (gate[..., 1] == 1).all()


def within_domain_covariance(domains: list[torch.Tensor]) -> torch.Tensor:
    deviations = torch.cat([signals - signals.mean(0) for signals in domains])
    return deviations.t() @ deviations / len(deviations)


def some_domains(seed: int = 0) -> list[torch.Tensor]:
    """Signals that vary far more in some directions than in others."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -2, N, dtype=torch.float64)
    return [
        torch.randn(count, N, generator=generator, dtype=torch.float64) * spread + place
        for place, count in enumerate((30, 50, 20))
    ]


def test_the_covariance_of_a_stream_is_that_of_all_at_once():
    domains = some_domains()
    ours = PrototypeRouter(N, config(whitened=True)).double()
    for specialist, own in enumerate(domains):
        ours.fit(specialist, own)
        torch.testing.assert_close(ours.prototypes[specialist], own.mean(0))
    expected = within_domain_covariance(domains)
    found = ours.basis.t() @ (ours.variance[:, None] * ours.basis)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(ours.total_variance, expected.trace())
    assert int(ours.samples) == sum(map(len, domains))


def test_of_a_large_covariance_the_leading_directions_are_kept(monkeypatch):
    monkeypatch.setattr(module, "COVARIANCE_RANK", 5)
    domains = some_domains()
    ours = PrototypeRouter(N, config(whitened=True)).double()
    ours.fit(0, domains[0])
    expected = torch.linalg.eigvalsh(within_domain_covariance(domains[:1])).flip(0)
    torch.testing.assert_close(ours.variance, expected[:5], atol=1e-12, rtol=1e-6)
    gram = ours.basis @ ours.basis.t()
    torch.testing.assert_close(gram, torch.eye(5).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(ours.total_variance, expected.sum())


def test_whitened_cosines_are_those_of_the_inverse_covariance():
    """x^T (Sigma + floor)^-1 y over the norms of the same kind, solved directly."""
    domains = some_domains()
    ours = PrototypeRouter(N, config(whitened=True)).double()
    for specialist, own in enumerate(domains):
        ours.fit(specialist, own)
    covariance = within_domain_covariance(domains)
    floor = module.SHRINKAGE * covariance.trace() / N
    inverse = torch.linalg.inv(covariance + floor * torch.eye(N).double())
    prototypes = ours.prototypes[:E]
    centre = prototypes.mean(0)
    dense = torch.cat([own[:S] for own in domains]).view(B, S, N)
    found, _ = cosines_so_far(
        dense, prototypes, centre, REAL, config(context="token"), metric=ours.metric()
    )
    x, p = dense - centre, prototypes - centre
    inner = torch.einsum("bsn,nm,pm->bsp", x, inverse, p)
    norms = torch.einsum("bsn,nm,bsm->bs", x, inverse, x).sqrt()
    own = torch.einsum("pn,nm,pm->p", p, inverse, p).sqrt()
    expected = inner / norms[..., None] / own
    torch.testing.assert_close(found[REAL], expected[REAL], atol=1e-9, rtol=1e-7)
    plain, _ = cosines_so_far(dense, prototypes, centre, REAL, config(context="token"))
    assert (plain - found)[REAL].abs().max() > 0.05


def test_whitening_finds_domains_that_plain_cosines_confuse():
    """What sets domains apart here is a small direction beneath a large one that varies in all."""
    generator = torch.Generator().manual_seed(0)
    domains = []
    for place in range(E):
        own = torch.randn(200, N, generator=generator, dtype=torch.float64) * 0.05
        own[:, 0] += 3 * torch.randn(200, generator=generator, dtype=torch.float64)
        own[:, 1 + place] += 0.5
        domains.append(own)
    right = {}
    for whitened in (True, False):
        ours = PrototypeRouter(N, config(whitened=whitened, context="token")).double()
        for specialist, own in enumerate(domains):
            ours.fit(specialist, own[:100])
        signals = torch.stack([own[100:] for own in domains])
        real = torch.ones(signals.shape[:2], dtype=torch.bool)
        chosen = ours(signals, real, ACTIVE)[0].gate.argmax(-1)
        right[whitened] = (chosen == torch.arange(E)[:, None]).double().mean()
    assert right[True] > 0.99
    assert right[False] < 0.9


def test_a_metric_of_no_direction_is_the_plain_one():
    rows = torch.randn(4, N, dtype=torch.float64)
    assert torch.equal(Metric(torch.zeros(0, N).double(), torch.zeros(0).double())(rows), rows)


@pytest.mark.parametrize("signals", [torch.zeros(N), torch.zeros(3, N + 1), torch.zeros(0, N)])
def test_signals_that_are_no_matrix_of_the_width_are_refused(signals):
    with pytest.raises(ValueError, match=r"signals must be \[texts, 20\]"):
        PrototypeRouter(N, config()).fit(0, signals)


def test_a_shorter_type_leaves_the_prototypes_as_they_were():
    ours = PrototypeRouter(N, config(whitened=True))
    ours.fit(0, some_domains()[0])
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    ours.to(torch.bfloat16)
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_no_known_domain_is_refused():
    with pytest.raises(ValueError, match="before any domain is known"):
        router(known=(), general=False)(signals()[1], REAL, ACTIVE)


@pytest.fixture
def adapted(make_model, make_sae):
    """A model whose adapter knows three domains and general text."""

    def make(**changes):
        model = make_model()
        settings = {"rank": 2, "alpha": 2.0, "sites": [1], "signal": "sae", "whitened": True}
        settings |= changes
        adapter = Adapter(model, config(**settings), {1: make_sae(seed=1)})
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for layer in adapter.layers.values():
                layer.B.normal_(0, 0.2, generator=generator)
        made = adapter.routers["1"]
        for specialist in (0, 1, 2, None):
            made.fit(specialist, torch.rand(4, made.prototypes.shape[1], generator=generator))
        return model, adapter.attach(model)

    return make


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("signal", ["sae", "dense"])
def test_generation_with_a_cache_equals_generation_without(context, signal, adapted, tokens):
    model, _ = adapted(context=context, signal=signal, margin=0.02)
    ids, mask = tokens([7, 4, 5])
    ids, mask = ids.flip(1), mask.flip(1)
    chosen = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(input_ids=ids, attention_mask=mask, **chosen)
    uncached = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **chosen)
    assert torch.equal(cached, uncached)


def test_columns_that_nobody_uses_are_not_computed(adapted, tokens):
    """Each token has one specialist; with no gradient, only those in use are computed."""
    model, adapter = adapted()
    ids, mask = tokens([9, 6])
    recorded = model(input_ids=ids, attention_mask=mask).logits
    site = adapter.sites[1]
    assert site.found.columns is None
    used = (site.found.scales[0] != 0).flatten(0, -2).any(0)
    with torch.no_grad():
        saved = model(input_ids=ids, attention_mask=mask).logits
    assert site.found.columns[0].tolist() == used.nonzero().flatten().tolist()
    assert site.found.scales[0].shape[-1] == len(site.found.columns[0])
    torch.testing.assert_close(saved, recorded, atol=1e-5, rtol=1e-5)


def test_the_state_comes_back_from_disk(adapted, make_model, make_sae, tmp_path, tokens):
    from steerlora.lm.identity import model_fingerprint
    from steerlora.methods.saving import load_adapter, save_adapter
    from steerlora.saes.saelens import save_sae

    model, adapter = adapted()
    ids, mask = tokens([9, 6])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
    sae = tmp_path / "sae"
    save_sae(adapter.saes[1], sae, metadata={"mean_feature_norm": 1.0})
    other = make_model()
    save_adapter(
        adapter,
        tmp_path / "adapter",
        base_fingerprint=model_fingerprint(other),
        sae_paths={1: sae},
    )
    load_adapter(other, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids, attention_mask=mask).logits, expected)
