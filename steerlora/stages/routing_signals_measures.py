"""What stage ``routing_signals`` measures: texts as signals, and one rule fitted to each of them.

Shapes: R texts, S tokens of a text, L lengths, W width of a signal (D model width or N latents).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerlora.data.batches import by_length, collate
from steerlora.data.chat import EncodedChat
from steerlora.evaluation.routing_signals import (
    HIDDEN,
    LAST,
    PROJECTION,
    SAE,
    UNTRAINED,
    WORDS,
)
from steerlora.lm.decoder import final_norm, layers_of, residual_streams
from steerlora.lm.signal_tokens import SignalTokens
from steerlora.methods.config import MethodConfig
from steerlora.saes.base import SparseAutoencoder

BATCH_SIZE = 32

Texts = Sequence[EncodedChat]
Found = dict[str, Tensor]
"""{signal: [R, L, W]}."""


class SignalReader:
    """Reads every signal of a text in one forward of the base.

    Args:
        model: the base.
        sae: of the site; it moves to the model's device.
        site: whose incoming stream it reads.
        rule: which tokens carry a signal.
        pad_token_id: fills batches.
        seed: of the untrained SAE and of the projection.
    """

    def __init__(
        self,
        model: nn.Module,
        sae: SparseAutoencoder,
        site: int,
        rule: SignalTokens,
        pad_token_id: int,
        seed: int,
    ) -> None:
        self.model, self.site, self.rule, self.pad_token_id = model, site, rule, pad_token_id
        self.sae = sae.to(model.device)
        self.untrained = self.sae.untrained_like(seed)
        drawn = torch.Generator().manual_seed(seed)
        projection = torch.randn(sae.width, sae.latents, generator=drawn)
        self.projection = projection.to(model.device) / sae.width**0.5

    @torch.no_grad()
    def __call__(self, texts: Texts, lengths: Sequence[int | None]) -> Found:
        """Means over the first tokens that carry a signal, as many as each length says (None: all);
        a shorter text has them all."""
        parts: dict[str, list[Tensor]] = {}
        order: list[int] = []
        for group in by_length(texts, BATCH_SIZE):
            order += group
            batch = collate([texts[i] for i in group], [-1] * len(group), self.pad_token_id)
            batch = batch.to(self.model.device)
            weights = _weights(self.rule(batch.input_ids, batch.attention_mask), lengths)
            for name, signal in self._signals(batch.input_ids, batch.attention_mask).items():
                parts.setdefault(name, []).append((weights @ signal.float()).cpu())
        back = torch.tensor(order).argsort()
        return {name: torch.cat(own)[back] for name, own in parts.items()}

    def _signals(self, input_ids: Tensor, mask: Tensor) -> Found:
        """{signal: [B, S, W]}."""
        last = len(layers_of(self.model))
        sites = sorted({0, self.site, last})
        streams = residual_streams(self.model, input_ids, mask, sites)
        stream = streams[self.site]
        hidden = _normed(stream)
        return {
            SAE: self.sae.encode(stream).dense(self.sae.latents),
            UNTRAINED: self.untrained.encode(stream).dense(self.sae.latents),
            PROJECTION: hidden @ self.projection,
            HIDDEN: hidden,
            LAST: final_norm(self.model)(streams[last]),
            WORDS: streams[0],
        }


def _normed(stream: Tensor) -> Tensor:
    """At a root mean square of 1, as a router of hidden states reads them."""
    stream = stream.float()
    return stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-6)


def _weights(counted: Tensor, lengths: Sequence[int | None]) -> Tensor:
    """[B, S] and L lengths -> [B, L, S], the weights of means over the first tokens."""
    place = counted.long().cumsum(1)
    chosen = [counted & (place <= (length or counted.shape[1])) for length in lengths]
    weights = torch.stack(chosen, 1).float()
    return weights / weights.sum(-1, keepdim=True).clamp_min(1)


def accuracy(
    method: MethodConfig,
    train: Mapping[int, Tensor],
    test: Mapping[int, Tensor],
    seed: int,
) -> list[float]:
    """Share of the test rows that the method's rule sends to their own domain, [L].

    Args:
        method: whose rule it is.
        train: {domain: [R, W]}, to whose domains it is fitted, one after the other.
        test: {domain: [R, L, W]} of the same domains.
        seed: of what the rule draws.
    """
    # No rule's result depends on the unit of a signal then.
    unit = torch.cat([*train.values()]).norm(dim=-1).mean().clamp_min(1e-12)
    router = method.domain_router(next(iter(train.values())).shape[-1], len(train), seed)
    right: list[Tensor] = []
    for place, rows in enumerate(train.values()):
        router.fit(place, rows / unit)
    for place, rows in enumerate(test.values()):
        nearest = router.nearness(rows.flatten(0, 1) / unit)[:, : len(train)].argmax(-1)
        right.append((nearest == place).view(rows.shape[:2]))
    return torch.cat(right).double().mean(0).tolist()


def with_noise(
    texts: Texts, share: float, rule: SignalTokens, words: Tensor, seed: int
) -> list[EncodedChat]:
    """The texts with this share of their tokens that carry a signal replaced.

    Args:
        words: ids to draw from, [V].
        seed: says which tokens, and by what.
    """
    drawn = torch.Generator().manual_seed(seed)
    found = []
    for text in texts:
        ids = torch.tensor(text.input_ids)
        counted = rule(ids[None], torch.ones_like(ids)[None])[0]
        hit = counted & torch.isin(ids, words) & (torch.rand(len(ids), generator=drawn) < share)
        drawn_ids = words[torch.randint(len(words), (len(ids),), generator=drawn)]
        found.append(EncodedChat(torch.where(hit, drawn_ids, ids).tolist(), text.response_start))
    return found


def ordinary_tokens(tokenizer: Any) -> Tensor:
    """Ids of the vocabulary that stand for text, [V]."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return torch.tensor(sorted(set(range(len(tokenizer))) - special))


def likeness(one: Texts, other: Texts, vocabulary: int) -> float:
    """Cosine of how often two sets of texts use each token."""
    counts = torch.stack(
        [
            torch.bincount(
                torch.tensor([i for t in texts for i in t.input_ids]), minlength=vocabulary
            )
            for texts in (one, other)
        ]
    ).double()
    return float(torch.cosine_similarity(counts[0], counts[1], dim=0))
