"""Rows of text through the base, a batch at a time: what enters a site at every token that carries
a signal.

Shapes: B batch, S sequence, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from steerlora.data.batches import ChatBatch
from steerlora.lm.decoder import residual_streams
from steerlora.lm.signal_tokens import SignalTokens


class SignalStream(NamedTuple):
    """The stream of a batch at a site, where the tokens stand, and the batch."""

    stream: Tensor
    """[T, D]."""
    row: Tensor
    """[T]."""
    position: Tensor
    """[T]."""
    batch: ChatBatch


def signal_streams(
    model: nn.Module, batches: Iterable[ChatBatch], site: int, rule: SignalTokens
) -> Iterator[SignalStream]:
    """Run batches as far as layer ``site``, without gradients.

    Args:
        model: the base, on one device.
        batches: on any device.
        site: the layer whose incoming stream is read.
        rule: which tokens carry a signal.
    """
    for batch in batches:
        batch = batch.to(model.device)
        mask = batch.attention_mask
        with torch.no_grad():
            stream = residual_streams(model, batch.input_ids, mask, [site])[site]
        row, position = rule(batch.input_ids, mask).nonzero(as_tuple=True)
        yield SignalStream(stream[row, position], row, position, batch)
