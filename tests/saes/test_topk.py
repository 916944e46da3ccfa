"""TopK: its operations, and what its files say."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from steerlora.saes.topk import TopK

TOKENS = 96


def counted(run) -> float:
    """FLOPs a token, as torch counts those of matrix products."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / TOKENS


def test_the_encoder_s_product_is_counted_and_its_table_rows_besides():
    sae, x = TopK(64, 512, k=8), torch.randn(TOKENS, 64)
    sae.b_dec.requires_grad_(False)  # its gradient is one product a batch, not a token
    found = counted(lambda: sae(x).sum().backward())
    said = sae.training_flops_per_token()
    assert said - found == pytest.approx(4 * 2 * 8 * 64)  # torch counts no embedding-bag


def test_operations_are_known_without_weights():
    with torch.device("meta"):
        assert TopK(64, 512, k=8).training_flops_per_token() == 2 * 64 * 512 + 8 * 8 * 64
