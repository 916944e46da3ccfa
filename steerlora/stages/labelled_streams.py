"""Labelled texts through a base, and what can be steered by that was found on them.

R texts, T tokens, D model width, N latents, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerlora.data.batches import batches_by_length, by_length
from steerlora.data.chat import EncodedChat
from steerlora.lm.signal_tokens import SignalTokens
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.label_scores import (
    TextScores,
    choose,
    components,
    signed,
    text_scores,
)
from steerlora.saes.probing import fit_probe
from steerlora.stages.signal_streams import signal_streams

BATCH_SIZE = 64
NEAREST = 10
"""Latents that fire most nearly as often as the chosen one, of which a control draws one."""


@dataclass(frozen=True, kw_only=True)
class LabelledStreams:
    """Texts at one site."""

    model: nn.Module
    site: int
    rule: SignalTokens
    pad_token_id: int
    rows: Sequence[EncodedChat]
    """[R]"""
    labels: Tensor
    """[R, C] bool."""
    saes: dict[str, SparseAutoencoder]
    scores: dict[str, TextScores]
    """{SAE: of the texts in their order}."""
    norm: float
    """Mean length of a token's stream."""
    scale: dict[str, float]
    """{SAE: what its units are in those of the stream, mean over tokens}."""
    l0: dict[str, float]
    """{SAE: latents that are active on a token}."""

    @property
    def choosing(self) -> Tensor:
        """Every other text: it chooses; the others tell."""
        return torch.arange(0, len(self.rows), 2)

    @property
    def telling(self) -> Tensor:
        return torch.arange(1, len(self.rows), 2)

    def halves(self, scores: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        """Scores [R, X] and labels of the texts that choose, and of those that tell."""
        given = self.labels if labels is None else labels
        choosing, telling = self.choosing, self.telling
        return scores[choosing], given[choosing], scores[telling], self.labels[telling]


def read_texts(
    model: Any,
    site: int,
    rule: SignalTokens,
    pad_token_id: int,
    rows: Sequence[EncodedChat],
    labels: Tensor,
    saes: dict[str, SparseAutoencoder],
) -> LabelledStreams:
    """Run the texts as far as the site."""
    parts: dict[str, list[TextScores]] = {name: [] for name in saes}
    sums = dict.fromkeys(("norm", "tokens", *saes), 0.0)
    batches = batches_by_length(rows, BATCH_SIZE, pad_token_id)
    for stream, row, _, batch in signal_streams(model, batches, site, rule):
        sums["norm"] += float(stream.double().norm(dim=1).sum())
        sums["tokens"] += len(stream)
        for name, sae in saes.items():
            parts[name].append(text_scores(sae, stream, row, len(batch.input_ids)))
            scale = sae.normalized(stream).scale
            sums[name] += float(scale.double().expand(len(stream), 1).sum())
    order = [index for group in by_length(rows, BATCH_SIZE) for index in group]
    back = torch.tensor(order).argsort()
    scores = {
        name: TextScores(*(torch.cat(part)[back] for part in zip(*found, strict=True)))
        for name, found in parts.items()
    }
    return LabelledStreams(
        model=model,
        site=site,
        rule=rule,
        pad_token_id=pad_token_id,
        rows=rows,
        labels=labels,
        saes=saes,
        scores=scores,
        norm=sums["norm"] / sums["tokens"],
        scale={name: sums[name] / sums["tokens"] for name in saes},
        l0={
            name: float((own.frequency.sum(1) * own.tokens).sum() / own.tokens.sum())
            for name, own in scores.items()
        },
    )


class Aim(NamedTuple):
    """What a concept is steered by."""

    f1: float | None
    auroc: float | None
    """On the texts that tell."""
    candidate: int | None = None
    """A latent's number, or that of what else was chosen among."""
    vector: Tensor | None = None
    """[D] of any length; None: a latent steers."""
    sae: str | None = None
    """Whose latent it is."""


def latents(
    data: LabelledStreams,
    sae: str,
    *,
    allowed: Tensor | None = None,
    labels: Tensor | None = None,
) -> list[Aim]:
    """Each label's latent by calibrated F1 of its firing frequency.

    Args:
        allowed: [N] bool, beside having fired at all.
        labels: [R, C] that choose, in place of the texts' own.
    """
    frequency = data.scores[sae].frequency
    fired = frequency[data.choosing].any(0)
    found = choose(
        *data.halves(frequency, labels), allowed=fired if allowed is None else fired & allowed
    )
    return [
        Aim(float(f1), float(auroc), int(latent), sae=sae)
        for latent, f1, auroc in zip(found.candidate, found.f1, found.auroc, strict=True)
    ]


def like_latents(data: LabelledStreams, sae: str, aims: Sequence[Aim], seed: int) -> list[Aim]:
    """For each latent another one that fires about as often, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    frequency = data.scores[sae].frequency
    rate = frequency.mean(0)
    found = []
    for number, aim in enumerate(aims):
        distance = (rate - rate[aim.candidate]).abs()
        distance[aim.candidate] = torch.inf
        near = distance.topk(min(NEAREST, len(rate) - 1), largest=False).indices
        latent = int(near[torch.randint(len(near), (1,), generator=generator)])
        own = choose(*(one[:, k : k + 1] for one, k in _columns(data, frequency, latent, number)))
        found.append(Aim(float(own.f1), float(own.auroc), latent, sae=sae))
    return found


def _columns(data: LabelledStreams, scores: Tensor, candidate: int, label: int):
    return zip(data.halves(scores), (candidate, label, candidate, label), strict=True)


def latent_directions(data: LabelledStreams, sae: str) -> list[Aim]:
    """AxBench's SAE baseline with its own choice of latents, by AUROC of the largest activation:
    their decoder rows are added to every token, whatever the latent is there."""
    peak = data.scores[sae].peak
    found = choose(*data.halves(peak), allowed=peak[data.choosing].any(0), by_auroc=True)
    rows = data.saes[sae].W_dec.detach().float().cpu()[found.candidate]
    return [
        Aim(float(f1), float(auroc), int(latent), row)
        for latent, f1, auroc, row in zip(found.candidate, found.f1, found.auroc, rows, strict=True)
    ]


def coordinates(data: LabelledStreams, sae: str) -> list[Aim]:
    """The coordinate of the stream, with a sign, that tells each label best."""
    streams = data.scores[sae].stream
    return _of_axes(data, streams, torch.eye(streams.shape[1]))


def principal_components(data: LabelledStreams, sae: str) -> list[Aim]:
    """The same of the principal components of the texts that choose."""
    streams = data.scores[sae].stream.double()
    mean, axes = components(streams[data.choosing])
    return _of_axes(data, (streams - mean) @ axes.t(), axes.float())


def _of_axes(data: LabelledStreams, scores: Tensor, axes: Tensor) -> list[Aim]:
    found = choose(*data.halves(signed(scores)))
    both = torch.cat([axes, -axes])
    return [
        Aim(float(f1), float(auroc), int(number) % len(axes), both[number])
        for number, f1, auroc in zip(found.candidate, found.f1, found.auroc, strict=True)
    ]


def directions(data: LabelledStreams, sae: str, find: Callable[[int], Tensor]) -> list[Aim]:
    """A direction for each label; as scores of texts, projections of their mean streams.

    Args:
        find: gives that of a label by its number, [D].
    """
    streams, found = data.scores[sae].stream.double(), []
    for label in range(data.labels.shape[1]):
        vector = find(label)
        scores = (streams @ vector.double())[:, None]
        own = choose(*(one[:, k : k + 1] for one, k in _columns(data, scores, 0, label)))
        found.append(Aim(float(own.f1), float(own.auroc), vector=vector.float()))
    return found


def difference_of_means(data: LabelledStreams, sae: str, label: int) -> Tensor:
    """Mean of the tokens of texts that have the label less that of the others."""
    own = data.scores[sae].rows(data.choosing)
    has = data.labels[data.choosing, label]
    totals, tokens = own.stream.double() * own.tokens[:, None], own.tokens.double()
    means = [totals[part].sum(0) / tokens[part].sum() for part in (has, ~has)]
    return means[0] - means[1]


def probe_direction(data: LabelledStreams, sae: str, label: int) -> Tensor:
    """The weights of a linear classifier of texts by their mean streams."""
    choosing = data.choosing
    return fit_probe(data.scores[sae].stream[choosing], data.labels[choosing, label]).weight


def positives(data: LabelledStreams, label: int) -> list[EncodedChat]:
    """The texts with the label among those that choose."""
    return [data.rows[index] for index in data.choosing.tolist() if data.labels[index, label]]
