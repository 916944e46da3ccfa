"""Whether an SAE isolates a concept: probes of the stream with the concept's latents taken out.

Shapes: R texts, D model width, N latents.

Two scores of SAEBench (arXiv 2503.09532), under its names. Taking latents out of every token of a
text, with the SAE's error left in, takes their mean features times their decoder rows from the mean
of its activations; so what probes of pooled activations read is known without another forward.
"""

from __future__ import annotations

import math

from torch import Tensor

from steerlora.saes.probing import (
    Pooled,
    Probe,
    as_many_of_each,
    balanced,
    fit_probe,
    mean_difference,
)

THRESHOLDS = (2, 5, 10, 20, 50, 100, 500)
"""Numbers of latents that are taken out, of those that an SAE has more of."""


def without(texts: Pooled, latents: Tensor, W_dec: Tensor) -> Tensor:
    """Mean activations [R, D] with these latents taken out."""
    return texts.streams - texts.features[:, latents] @ W_dec[latents]


def strongest(effects: Tensor, count: int) -> Tensor:
    """Numbers of the latents with the largest effects [N], of those above 0."""
    return effects.topk(min(count, int((effects > 0).sum()))).indices


def targeted_probe_perturbation(
    train: Pooled,
    test: Pooled,
    train_labels: Tensor,
    test_labels: Tensor,
    W_dec: Tensor,
    seed: int,
) -> dict[str, float]:
    """TPP: how much more a class's own latents hurt its probe than they hurt those of others.

    A latent's effect on a class is how much more it is active there than elsewhere, times what the
    class's probe reads along its row. The ``<n>`` with the largest effects are taken out.

    Args:
        train, test: texts.
        train_labels, test_labels: [R] number of each text's class; of two classes at least.
        W_dec: [N, D].
        seed: of the choice of texts of other classes.

    Returns:
        Means over classes, for every n: ``tpp_threshold_<n>_intended_diff_only``, what the probe of
        the class loses in accuracy; ``..._unintended_diff_only``, what the other classes' lose on
        average; ``..._total_metric``, the difference.
    """
    classes = train_labels.unique().tolist()
    W_dec = W_dec.to(train.streams)
    probes: dict[int, Probe] = {}
    effects: dict[int, Tensor] = {}
    tested = {one: balanced(test_labels == one, seed) for one in classes}
    for one in classes:
        rows = balanced(train_labels == one, seed)
        chosen, labels = train.rows(rows), train_labels[rows] == one
        probes[one] = fit_probe(chosen.streams, labels)
        more = mean_difference(chosen.features, labels).clamp_min(0)
        effects[one] = more * (W_dec.double() @ probes[one].weight)

    def accuracies(streams: Tensor) -> dict[int, float]:
        return {
            one: probe.accuracy(streams[tested[one]], test_labels[tested[one]] == one)
            for one, probe in probes.items()
        }

    clean, found = accuracies(test.streams), {}
    for count in _thresholds(W_dec):
        own = other = 0.0
        for one in classes:
            after = accuracies(without(test, strongest(effects[one], count), W_dec))
            lost = {name: clean[name] - value for name, value in after.items()}
            own += lost.pop(one) / len(classes)
            other += sum(lost.values()) / len(lost) / len(classes)
        found[f"tpp_threshold_{count}_total_metric"] = own - other
        found[f"tpp_threshold_{count}_intended_diff_only"] = own
        found[f"tpp_threshold_{count}_unintended_diff_only"] = other
    return found


def spurious_correlation_removal(
    train: Pooled,
    test: Pooled,
    train_labels: Tensor,
    test_labels: Tensor,
    W_dec: Tensor,
    seed: int,
) -> dict[str, float]:
    """SCR (SHIFT): how far a probe that learnt two attributes as one is freed of either.

    A biased probe learns from texts with both attributes or neither. Then the ``<n>`` latents with
    the largest effects on one attribute are taken out, by a probe trained on that one alone, and
    the biased probe is scored on the other attribute, where the first one says nothing. Direction 1
    frees the first attribute of the second one, direction 2 the other way round.

    Args:
        train, test: texts.
        train_labels, test_labels: [R, 2] bool, the two attributes; all four cases among them.
        W_dec: [N, D].
        seed: of the choice of texts of the commoner cases.

    Returns:
        For every n, ``scr_dir1_threshold_<n>`` and ``scr_dir2_threshold_<n>``: the share of the
        accuracy that the bias cost which is regained; ``scr_metric_threshold_<n>``: that of the
        direction in which the bias cost most. NaN where it cost none.
    """
    W_dec = W_dec.to(train.streams)
    fitted, tested = _even_cases(train_labels, seed), _even_cases(test_labels, seed)
    train, train_labels = train.rows(fitted), train_labels[fitted]
    test, test_labels = test.rows(tested), test_labels[tested]
    alike = train_labels[:, 0] == train_labels[:, 1]
    biased = fit_probe(train.streams[alike], train_labels[alike, 0])
    probes = [fit_probe(train.streams, train_labels[:, side]) for side in (0, 1)]
    clean = [probes[side].accuracy(test.streams, test_labels[:, side]) for side in (0, 1)]
    before = [biased.accuracy(test.streams, test_labels[:, side]) for side in (0, 1)]
    found = {}
    for count in _thresholds(W_dec):
        regained = []
        for wanted, spurious in ((0, 1), (1, 0)):
            more = mean_difference(train.features, train_labels[:, spurious])
            effects = (more * (W_dec.double() @ probes[spurious].weight)).abs()
            changed = without(test, strongest(effects, count), W_dec)
            after = biased.accuracy(changed, test_labels[:, wanted])
            cost = clean[wanted] - before[wanted]
            regained.append((after - before[wanted]) / cost if cost > 0 else math.nan)
        found[f"scr_dir1_threshold_{count}"], found[f"scr_dir2_threshold_{count}"] = regained
        found[f"scr_metric_threshold_{count}"] = regained[0 if before[0] < before[1] else 1]
    return found


def _thresholds(W_dec: Tensor) -> list[int]:
    return [count for count in THRESHOLDS if count < len(W_dec)]


def _even_cases(labels: Tensor, seed: int) -> Tensor:
    """Rows of [R, 2] bool of which each of the four cases has equally many."""
    case = labels[:, 0].long() * 2 + labels[:, 1].long()
    return as_many_of_each([case == number for number in range(4)], seed)
