"""What an adapter adds to residual streams, with its low-rank updates as they are or replaced.

Shapes: B batch, S sequence, T tokens, D model width, E specialists, R rank, N latents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from steerlora.lm.decoder import decoder_of, edited
from steerlora.lm.signal_tokens import SignalTokens
from steerlora.methods.base import LowRankUpdate, Method
from steerlora.stages.sae_quality import TextBatch


class Updates(NamedTuple):
    """Matrices of a low-rank update."""

    A: Tensor
    """[E*R, D_in]."""
    B: Tensor
    """[D_out, E*R]."""


class TokenStreams(NamedTuple):
    """Of every token that carries a signal."""

    streams: dict[int, Tensor]
    """{site: [T, D]}."""
    gates: dict[int, Tensor]
    """{control site: weights of the specialists [T, E]}; empty where nothing is routed."""


@torch.no_grad()
def token_streams(
    model: nn.Module,
    batches: Sequence[TextBatch],
    sites: Sequence[int],
    rule: SignalTokens,
    method: Method | None = None,
) -> TokenStreams:
    """The streams entering ``sites``, of a model that may carry a method.

    Args:
        model: a causal language model.
        batches: rows of text.
        sites: layers, or their number for the stream that leaves the last.
        rule: which tokens carry a signal.
        method: whose gates are read too.
    """
    streams: dict[int, list[Tensor]] = {site: [] for site in sites}
    gates: dict[int, list[Tensor]] = defaultdict(list)
    found: dict[int, Tensor] = {}

    def record(site: int, stream: Tensor) -> Tensor:
        found[site] = stream
        return stream

    with edited(model, {site: partial(record, site) for site in sites}):
        for batch in batches:
            kept = _forward(model, batch, rule)
            for site in sites:
                streams[site].append(found[site][kept].cpu())
            for site, gate in (method.gates() if method else {}).items():
                gates[site].append(gate[kept].cpu())
    return TokenStreams(
        {site: torch.cat(parts) for site, parts in streams.items()},
        {site: torch.cat(parts) for site, parts in gates.items()},
    )


def _forward(model: nn.Module, batch: TextBatch, rule: SignalTokens) -> Tensor:
    """Run a batch; gives which of its tokens carry a signal, [B, S]."""
    ids, mask = (part.to(next(model.parameters()).device) for part in batch)
    decoder_of(model)(input_ids=ids, attention_mask=mask, use_cache=False)
    return rule(ids, mask)


@torch.no_grad()
def module_grams(
    method: Method, batches: Sequence[TextBatch], rule: SignalTokens
) -> dict[str, Tensor]:
    """{adapted module: X^T X of what the method adds to its output, [D_out, D_out]}."""
    grams: dict[str, Tensor] = {}
    counted: list[Tensor] = []

    def add(name: str, module: nn.Module, given: tuple, output: Tensor) -> None:
        added = (output - module.base(given[0]))[counted[-1]].double()
        grams[name] = grams.get(name, 0) + added.t() @ added

    model, targets = method.model, method.targets(method.model)
    hooks = [
        targets[name].linear.register_forward_hook(partial(add, name)) for name in method.low_rank()
    ]
    try:
        for batch in batches:
            ids, mask = (part.to(model.device) for part in batch)
            counted.append(rule(ids, mask))
            _forward(model, batch, rule)
    finally:
        for hook in hooks:
            hook.remove()
    return grams


@contextmanager
def with_updates(method: Method, given: Mapping[str, Updates]) -> Iterator[None]:
    """Inside, the method's low-rank updates have these matrices."""
    own = method.low_rank()
    before = {name: Updates(*(p.detach().clone() for p in own[name][:2])) for name in given}

    @torch.no_grad()
    def put(matrices: Mapping[str, Updates]) -> None:
        for name, (A, B) in matrices.items():
            own[name].A.copy_(A)
            own[name].B.copy_(B)

    put(given)
    try:
        yield
    finally:
        put(before)


def update_norm(updates: Mapping[str, LowRankUpdate]) -> float:
    """|scale B A|_F over all modules, of all specialists added up."""
    squares = [update.scale**2 * _square(*update[:2]) for update in updates.values()]
    return float(sum(squares)) ** 0.5


def _square(A: Tensor, B: Tensor) -> float:
    """|B A|_F^2, by R x R products."""
    A, B = A.detach().double(), B.detach().double()
    return float(((B.t() @ B) * (A @ A.t())).sum())


def scaled(updates: Mapping[str, LowRankUpdate], factor: float) -> dict[str, Updates]:
    """The same updates, so many times as large."""
    return {name: Updates(u.A.detach(), u.B.detach() * factor) for name, u in updates.items()}


def untrained(
    updates: Mapping[str, LowRankUpdate], generator: torch.Generator
) -> dict[str, Updates]:
    """Random matrices whose product has, module by module, the norm of the trained ones'."""
    found = {}
    for name, update in updates.items():
        A, B = (torch.randn(part.shape, generator=generator).to(part) for part in update[:2])
        B = B * (_square(update.A, update.B) / _square(A, B)) ** 0.5
        found[name] = Updates(A, B)
    return found


def specialist_alone(updates: Mapping[str, LowRankUpdate], number: int) -> dict[str, Updates]:
    """One specialist as it is, the others without any update; gates stay."""
    found = {}
    for name, update in updates.items():
        rank = len(update.A) // update.specialists
        own = torch.zeros(len(update.A), device=update.B.device)
        own[number * rank : (number + 1) * rank] = 1
        found[name] = Updates(update.A.detach(), update.B.detach() * own)
    return found
