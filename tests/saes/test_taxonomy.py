"""Feature statistics against counting by hand, and the taxonomy on constructed use."""

from __future__ import annotations

import pytest
import torch

from steerlora.config.features import CONTROLS as NAMES
from steerlora.saes.sparse import SparseFeatures
from steerlora.saes.taxonomy import CONTROLS, FeatureStatistics, absolute_change, classify

LATENTS = 16


def features(*tokens: dict[int, float]) -> SparseFeatures:
    """Tokens as {latent: value}, padded with inactive latents to three a token."""
    rows = [list(token.items()) + [(LATENTS - 1, 0.0)] * (3 - len(token)) for token in tokens]
    values = torch.tensor([[value for _, value in row] for row in rows])
    return SparseFeatures(values, torch.tensor([[index for index, _ in row] for row in rows]))


def test_statistics_count_and_average():
    statistics = FeatureStatistics(2, LATENTS)
    statistics.update(features({0: 2.0, 3: 1.0}, {0: 4.0}), 0)
    statistics.update(features({3: 6.0}), 1)
    statistics.update(features({3: 2.0}, {5: 1.0}, {}), 1)
    assert statistics.tokens.tolist() == [2, 4]
    assert statistics.frequency()[0, [0, 3, 5, 15]].tolist() == [1.0, 0.5, 0.0, 0.0]
    assert statistics.mean()[0, [0, 3]].tolist() == [3.0, 0.5]
    assert statistics.mean()[1, [3, 5]].tolist() == [2.0, 0.25]


def test_pieces_equal_the_whole():
    generator = torch.Generator().manual_seed(0)
    whole = SparseFeatures(
        torch.rand(50, 3, generator=generator),
        torch.randint(LATENTS, (50, 3), generator=generator),
    )
    once, pieces = FeatureStatistics(1, LATENTS), FeatureStatistics(1, LATENTS)
    once.update(whole, 0)
    for start in range(0, 50, 7):
        pieces.update(SparseFeatures(*(part[start : start + 7] for part in whole)), 0)
    torch.testing.assert_close(once.mean(), pieces.mean())
    torch.testing.assert_close(once.frequency(), pieces.frequency())


@pytest.fixture
def statistics() -> FeatureStatistics:
    """Latent 0 in every token of all three domains; 1, 2, 3 each in one; the rest unused."""
    statistics = FeatureStatistics(3, LATENTS)
    for domain in range(3):
        statistics.update(features({0: 1.0, domain + 1: 5.0}, {0: 1.0, domain + 1: 3.0}), domain)
    return statistics


def test_general_is_frequent_and_even_and_domain_is_selective(statistics):
    taxonomy = classify(statistics, least=0)
    assert taxonomy.general.nonzero().flatten().tolist() == [0]
    assert [row.nonzero().flatten().tolist() for row in taxonomy.domain] == [[1], [2], [3]]


def test_prototypes_are_the_mean_at_the_domain_s_own_features(statistics):
    prototypes = classify(statistics, least=0).prototypes
    assert prototypes[1].nonzero().flatten().tolist() == [2]
    assert prototypes[1, 2] == 4.0


def test_a_feature_that_is_never_active_is_in_neither(statistics):
    taxonomy = classify(statistics, least=64)
    unused = torch.arange(4, LATENTS)
    assert not taxonomy.general[unused].any()
    assert not taxonomy.domain[:, unused].any()


def test_the_least_number_takes_in_the_nearest():
    statistics = FeatureStatistics(2, LATENTS)
    for domain in range(2):  # latent n is n + 1 times as strong in domain 0; all are uneven
        tokens = [{n: (n + 1.0) if domain == 0 else 0.1} for n in range(8)]
        statistics.update(features(*tokens), domain)
    taxonomy = classify(statistics, largest_variation=-1.0, domain_quantile=1.0, least=2)
    assert taxonomy.general.sum() == 2
    own = taxonomy.domain[0].nonzero().flatten().tolist()
    assert len(own) == 2
    assert 7 in own or taxonomy.general[7]
    assert not (taxonomy.domain & taxonomy.general).any()


def test_a_feature_that_drifts_to_the_instruct_model_is_not_general():
    statistics = FeatureStatistics(2, LATENTS)
    for domain in range(2):
        statistics.update(features({0: 1.0, 1: 1.0, 2: 1.0}), domain)
    drift = torch.full((LATENTS,), 0.1)
    drift[1] = 5.0
    still = classify(statistics, least=0, drift=drift, drift_quantile=0.7)
    assert still.general.nonzero().flatten().tolist() == [0, 2]
    anything = classify(statistics, least=0, drift=drift, drift_quantile=1.0)
    assert anything.general.nonzero().flatten().tolist() == [0, 1, 2]


def test_the_least_number_takes_in_features_of_little_drift_first():
    statistics = FeatureStatistics(2, 32)
    for domain in range(2):  # latent 0 is even over domains, 1 to 3 are not
        tokens = [{0: 1.0}, {0: 1.0}] if domain else [{0: 1.0, 1: 1.0, 2: 1.0}, {0: 1.0, 3: 1.0}]
        statistics.update(features(*tokens), domain)
    drift = torch.zeros(32)
    drift[[0, 3]] = 1.0
    settings = {"largest_variation": 0.1, "drift": drift, "drift_quantile": 0.5}
    for least, general in ((0, []), (2, [1, 2]), (4, [0, 1, 2, 3])):
        found = classify(statistics, least=least, **settings).general
        assert found.nonzero().flatten().tolist() == general


def test_one_domain_has_nothing_to_compare_with():
    with pytest.raises(ValueError, match="at least 2"):
        classify(FeatureStatistics(1, LATENTS))


def test_general_may_be_what_is_frequent_on_other_text(statistics):
    frequency = torch.zeros(LATENTS, dtype=torch.float64)
    frequency[[2, 0]] = torch.tensor([0.9, 0.1], dtype=torch.float64)

    def general(variation: float) -> list[int]:
        found = classify(
            statistics,
            frequency=frequency,
            general_quantile=0.9,
            largest_variation=variation,
            least=0,
        )
        return found.general.nonzero().flatten().tolist()

    assert general(9.0) == [0, 2]
    assert general(0.8) == [0]  # 2 is one domain's alone


def test_the_change_of_tokens_is_not_that_of_their_mean():
    before = features({0: 1.0, 3: 2.0}, {0: 3.0}, {1: 1.0})
    after = features({0: 3.0, 3: 2.0}, {0: 1.0}, {})
    found = absolute_change(before, after, LATENTS)
    assert found[[0, 1, 3]].tolist() == [4.0, 1.0, 0.0]
    repeated = [SparseFeatures(*(part.repeat(900, 1) for part in z)) for z in (before, after)]
    assert torch.equal(absolute_change(*repeated, LATENTS), 900 * found)


def classified(latents: int = 64):
    generator = torch.Generator().manual_seed(0)
    statistics = FeatureStatistics(3, latents)
    for domain in range(3):
        values = torch.rand(40, 9, generator=generator)
        statistics.update(
            SparseFeatures(values, torch.randint(latents, (40, 9), generator=generator)), domain
        )
    return classify(statistics), statistics.mean()


def test_every_control_is_known_by_name():
    assert tuple(CONTROLS) == NAMES
    taxonomy, mean = classified()
    assert CONTROLS["none"](taxonomy, mean, 0) is taxonomy


def test_dense_leaves_no_feature_out():
    taxonomy, mean = classified()
    found = CONTROLS["dense"](taxonomy, mean, 0)
    assert found.general.all()
    assert found.domain.all()
    assert torch.equal(found.prototypes, mean)


def test_random_keeps_the_numbers_and_nothing_else():
    taxonomy, mean = classified()
    found, again, other = (CONTROLS["random"](taxonomy, mean, seed) for seed in (0, 0, 1))
    assert found.general.sum() == taxonomy.general.sum()
    assert torch.equal(found.domain.sum(1), taxonomy.domain.sum(1))
    assert not (found.general & found.domain).any()
    assert torch.equal(found.prototypes, mean * found.domain)
    assert not torch.equal(found.general, taxonomy.general)
    assert torch.equal(found.general, again.general)
    assert not torch.equal(found.general, other.general)


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_prototypes_are_all_another_domains(seed):
    taxonomy, mean = classified()
    found = CONTROLS["shuffled_prototypes"](taxonomy, mean, seed)
    assert torch.equal(found.domain, taxonomy.domain)
    sources = [
        [d for d in range(3) if torch.equal(row, taxonomy.prototypes[d])]
        for row in found.prototypes
    ]
    assert sorted(own[0] for own in sources) == [0, 1, 2]
    assert all(d not in own for d, own in enumerate(sources))
