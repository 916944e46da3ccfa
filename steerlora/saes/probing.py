"""What an SAE's features say of a text: linear probes on few latents, as in SAEBench.

Shapes: R texts, T tokens, D model width, N latents, C columns that a probe reads.

Definitions and names are those of SAEBench (arXiv 2503.09532) and of Gurnee et al., "Finding
neurons in a haystack" (arXiv 2305.01610).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from steerlora.saes.base import SparseAutoencoder

TOPS = (1, 2, 5)
"""Numbers of latents that a sparse probe reads."""


class Pooled(NamedTuple):
    """Texts, each as a mean over its tokens."""

    streams: Tensor
    """[R, D] activations."""
    features: Tensor
    """[R, N] features, in the units of the stream: latent i adds this times ``W_dec[i]`` to it."""

    def rows(self, index: Tensor) -> Pooled:
        """Those texts alone."""
        return Pooled(self.streams[index], self.features[index])


@torch.inference_mode()
def pool(sae: SparseAutoencoder, tokens: Tensor, text: Tensor, texts: int) -> Pooled:
    """Mean activation and mean features of each text, on the CPU.

    Args:
        sae: reads the activations.
        tokens: [T, D] activations, on the SAE's device.
        text: [T] number of the text that each belongs to; one without any is zero.
        texts: R.
    """
    inputs = sae.normalized(tokens)
    values, indices = sae.encode_normalized(inputs.x)
    weight = 1 / torch.bincount(text, minlength=texts)[text][:, None].to(values.dtype)
    features = values.new_zeros(texts * sae.latents)
    places = text[:, None] * sae.latents + indices
    features.index_add_(0, places.flatten(), (values * inputs.scale * weight).flatten())
    streams = values.new_zeros(texts, sae.width)
    streams.index_add_(0, text, tokens.to(values.dtype) * weight)
    return Pooled(streams.cpu(), features.view(texts, -1).cpu())


class Probe(NamedTuple):
    """A linear classifier of two classes: positive where ``x . weight + bias > 0``."""

    weight: Tensor
    """[C]."""
    bias: float

    def accuracy(self, rows: Tensor, labels: Tensor) -> float:
        """Share of the rows [R, C] that are classified as ``labels`` [R] bool say."""
        found = rows.to(self.weight) @ self.weight + self.bias > 0
        return float((found == labels).double().mean())


def fit_probe(rows: Tensor, labels: Tensor) -> Probe:
    """Logistic regression with a ridge penalty on columns of unit deviation.

    Args:
        rows: [R, C].
        labels: [R] bool, both values among them.

    Returns:
        The probe, of columns as they are.
    """
    from sklearn.linear_model import LogisticRegression

    rows = rows.double()
    mean, deviation = rows.mean(0), rows.std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    model = LogisticRegression(max_iter=1000)
    model.fit(((rows - mean) / deviation).numpy(), labels.numpy())
    weight = torch.from_numpy(model.coef_[0]) / deviation
    return Probe(weight, float(model.intercept_[0]) - float(weight @ mean))


def balanced(labels: Tensor, seed: int) -> Tensor:
    """Rows of which half are positive: all of the rarer value, and as many of the other.

    Args:
        labels: [R] bool.
        seed: decides which of the commoner value.

    Returns:
        Their numbers, in ascending order.
    """
    return as_many_of_each((labels, ~labels), seed)


def as_many_of_each(cases: Sequence[Tensor], seed: int) -> Tensor:
    """Rows that have as many of every case as the rarest has.

    Args:
        cases: [R] bool each, where it is.
        seed: decides which of the commoner ones.

    Returns:
        Their numbers, in ascending order.
    """
    generator = torch.Generator().manual_seed(seed)
    found = [case.nonzero().flatten() for case in cases]
    count = min(map(len, found))
    chosen = [rows[torch.randperm(len(rows), generator=generator)[:count]] for rows in found]
    return torch.cat(chosen).sort().values


def mean_difference(rows: Tensor, labels: Tensor) -> Tensor:
    """Mean of the positive rows less that of the others, [R, C], [R] bool -> [C]."""
    return rows[labels].double().mean(0) - rows[~labels].double().mean(0)


def sparse_probing(
    train: Pooled, test: Pooled, train_labels: Tensor, test_labels: Tensor, seed: int
) -> dict[str, float]:
    """Accuracy of probes that tell one class from the others, means over classes.

    Half of the texts are of the class, in training and in the test: chance is 0.5. The k latents of
    a sparse probe are those whose mean differs most between class and others in training.

    Args:
        train, test: texts.
        train_labels, test_labels: [R] number of each text's class.
        seed: of the choice of texts of other classes.

    Returns:
        ``sae_test_accuracy`` from all latents, ``sae_top_<k>_test_accuracy`` from k of them,
        ``llm_test_accuracy`` from the whole stream, ``llm_top_<k>_test_accuracy`` from k of its
        coordinates.
    """
    scores: dict[str, list[float]] = {}
    for one in train_labels.unique().tolist():
        there, here = train_labels == one, test_labels == one
        fitted, tested = balanced(there, seed), balanced(here, seed)
        there, here = there[fitted], here[tested]
        for name, before, after in zip(
            ("llm", "sae"), train.rows(fitted), test.rows(tested), strict=True
        ):
            difference = mean_difference(before, there).abs()
            columns = {f"{name}_test_accuracy": torch.arange(len(difference))} | {
                f"{name}_top_{k}_test_accuracy": difference.topk(min(k, len(difference))).indices
                for k in TOPS
            }
            for key, chosen in columns.items():
                probe = fit_probe(before[:, chosen], there)
                scores.setdefault(key, []).append(probe.accuracy(after[:, chosen], here))
    return {name: _mean(values) for name, values in scores.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
