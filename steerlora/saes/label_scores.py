"""How well single latents tell a label: calibrated F1 and AUROC, on labelled texts.

Shapes: R texts, T tokens, D model width, N candidates (latents, coordinates, components), C labels.

A candidate has a score a text. The text is called positive where the score exceeds a threshold; the
F1 of that is calibrated to a prevalence (Siblini et al. 2020, "Master your metrics with
calibration"), so that rare and common labels compare:

    F1 = 2 TP / (2 TP + a FP + FN),    a = pi (1 - pi0) / (pi0 (1 - pi))

with pi the share of positives among the texts and pi0 that in the wild: where positives are
over-represented, false ones weigh as they would there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steerlora.saes.base import SparseAutoencoder

PREVALENCE = 1e-3
"""pi0 of supervised steering (arXiv 2605.31183)."""
_BLOCK = 4096
"""Candidates that are sorted at once."""


class TextScores(NamedTuple):
    """What a site says of each text, over the tokens that carry a signal."""

    frequency: Tensor
    """[R, N] share of the tokens on which each latent is active."""
    peak: Tensor
    """[R, N] largest activation on a token, in the units of the stream."""
    stream: Tensor
    """[R, D] mean stream."""
    tokens: Tensor
    """[R] tokens."""

    def rows(self, index: Tensor) -> TextScores:
        """Those texts alone."""
        return TextScores(*(part[index] for part in self))


@torch.inference_mode()
def text_scores(sae: SparseAutoencoder, tokens: Tensor, text: Tensor, texts: int) -> TextScores:
    """Scores of each text, on the CPU.

    Args:
        sae: reads the tokens.
        tokens: [T, D] streams, on the SAE's device.
        text: [T] number of the text that each belongs to; one without any has zeros.
        texts: R.
    """
    inputs = sae.normalized(tokens)
    values, indices = sae.encode_normalized(inputs.x)
    count = torch.bincount(text, minlength=texts)
    places = (text[:, None] * sae.latents + indices).flatten()
    fired = values.new_zeros(texts * sae.latents)
    fired.index_add_(0, places, (values > 0).to(values.dtype).flatten())
    peak = torch.zeros_like(fired)
    peak.scatter_reduce_(0, places, (values * inputs.scale).flatten(), "amax")
    stream = values.new_zeros(texts, sae.width)
    stream.index_add_(0, text, tokens.to(values.dtype))
    share = count.clamp_min(1)[:, None]
    return TextScores(
        (fired.view(texts, -1) / share).cpu(),
        peak.view(texts, -1).cpu(),
        (stream / share).cpu(),
        count.cpu(),
    )


class F1(NamedTuple):
    """The best threshold of every candidate for every label, and the F1 there."""

    value: Tensor
    """[C, N], from 0 to 1."""
    threshold: Tensor
    """[C, N]; infinite where no threshold parts the texts."""


def weight_of_false_positives(labels: Tensor, prevalence: float) -> Tensor:
    """a of each label, [R, C] bool -> [C].

    Raises:
        ValueError: a label that all texts have, or none has.
    """
    share = labels.double().mean(0)
    if ((share == 0) | (share == 1)).any():
        raise ValueError("a label needs texts that have it and texts that do not")
    return share * (1 - prevalence) / (prevalence * (1 - share))


def calibrated_f1(scores: Tensor, labels: Tensor, prevalence: float = PREVALENCE) -> F1:
    """The largest calibrated F1 over all distinct scores of a candidate as thresholds.

    A threshold that calls every text positive is none.

    Args:
        scores: [R, N].
        labels: [R, C] bool.
        prevalence: pi0.

    Raises:
        ValueError: a label that all texts have, or none has.
    """
    weight = weight_of_false_positives(labels, prevalence)
    parts = [_of_block(block, labels, weight) for block in scores.double().split(_BLOCK, dim=1)]
    return F1(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))


def _of_block(scores: Tensor, labels: Tensor, weight: Tensor) -> F1:
    ordered, order = scores.sort(dim=0, descending=True)
    parts = ordered[:-1] > ordered[1:]  # between equal scores there is no threshold
    called = torch.arange(1, len(scores), dtype=scores.dtype)[:, None]
    values, thresholds = [], []
    for label, a in zip(labels.t(), weight, strict=True):
        hits = label[order].to(scores.dtype).cumsum(0)[:-1]
        f1 = 2 * hits / (hits + a * (called - hits) + label.sum())
        best, place = torch.where(parts, f1, -1.0).max(0)
        there = best >= 0
        values.append(best.clamp_min(0))
        at = ordered[1:].gather(0, place[None])[0]
        thresholds.append(torch.where(there, at, torch.inf))
    return F1(torch.stack(values), torch.stack(thresholds))


def f1_at(
    scores: Tensor, labels: Tensor, thresholds: Tensor, prevalence: float = PREVALENCE
) -> Tensor:
    """Calibrated F1 of one candidate a label at a given threshold.

    Args:
        scores, labels: [R, C], the scores of each label's own candidate.
        thresholds: [C].
        prevalence: pi0.

    Returns:
        [C]; 0 where nothing is called positive.
    """
    called = scores > thresholds
    hits, false = (called & labels).sum(0), (called & ~labels).sum(0)
    weight = weight_of_false_positives(labels, prevalence)
    return 2 * hits / (hits + weight * false + labels.sum(0))


def auroc(scores: Tensor, labels: Tensor) -> Tensor:
    """Probability that a positive text scores above another; a tie counts half.

    Args:
        scores: [R, N].
        labels: [R] bool, both values among them.

    Returns:
        [N].
    """
    positive = scores[labels].double().t().contiguous()
    others = scores[~labels].double().t().contiguous().sort(dim=1).values
    below, up_to = (torch.searchsorted(others, positive, right=right) for right in (False, True))
    return (below + up_to).double().mean(1) / (2 * others.shape[1])


class Choice(NamedTuple):
    """The candidate that tells each label best on some texts, and how it does on others."""

    candidate: Tensor
    """[C]."""
    score: Tensor
    """[C] that it was chosen by: F1, or AUROC."""
    f1: Tensor
    """[C] calibrated, on the other texts, at the threshold that was best on the first."""
    auroc: Tensor
    """[C] on the other texts."""


def choose(
    chosen_on: Tensor,
    labels: Tensor,
    told_on: Tensor,
    told_labels: Tensor,
    *,
    allowed: Tensor | None = None,
    by_auroc: bool = False,
    prevalence: float = PREVALENCE,
) -> Choice:
    """Choose a candidate a label on one half of the texts; its figures are of the other half.

    Args:
        chosen_on, told_on: [R, N] scores of the halves.
        labels, told_labels: [R, C] bool.
        allowed: [N] bool, the candidates to choose from; None: all.
        by_auroc: by AUROC in place of calibrated F1.
        prevalence: pi0.

    Raises:
        ValueError: no candidate is allowed; a label that all texts have, or none has.
    """
    if allowed is not None and not allowed.any():
        raise ValueError("no candidate is left to choose from")
    found = calibrated_f1(chosen_on, labels, prevalence)
    scores = found.value
    if by_auroc:
        scores = torch.stack([auroc(chosen_on, label) for label in labels.t()])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -1.0)
    best, candidate = scores.max(1)
    threshold = found.threshold.gather(1, candidate[:, None])[:, 0]
    own = told_on[:, candidate]
    aurocs = [
        auroc(one[:, None], label) for one, label in zip(own.t(), told_labels.t(), strict=True)
    ]
    return Choice(
        candidate, best, f1_at(own, told_labels, threshold, prevalence), torch.cat(aurocs)
    )


def signed(scores: Tensor) -> Tensor:
    """Scores [R, N] of candidates that tell a label by their sign too: each and its opposite,
    [R, 2 N]."""
    return torch.cat([scores, -scores], 1)


def components(streams: Tensor) -> tuple[Tensor, Tensor]:
    """Principal components of streams, the largest first.

    Args:
        streams: [R, D].

    Returns:
        the mean [D], and unit directions in rows, [min(R, D), D].
    """
    mean = streams.double().mean(0)
    return mean, torch.linalg.svd(streams.double() - mean, full_matrices=False).Vh
