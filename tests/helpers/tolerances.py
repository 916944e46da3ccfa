"""How far two ways to one result may be apart: what their arithmetic allows, on any processor.

A product or a sum over another shape is blocked otherwise, and how is the processor's to choose: it
is the same up to rounding, never to the bit. To the bit are only the same kernels on the same
shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT32_STEPS = 256
"""Roundings to float32 on the longest way through a test's model, generously: transformers takes
norms, rotary tables and eager softmaxes in float32 whatever the model's type. A norm is three or
four of them over a sum of 32, there are four norms a layer, and three layers."""


def assert_close_in_float32(found: Tensor, expected: Tensor, message: str | None = None) -> None:
    """Apart by no more than the steps in float32 explain: 3e-5 of the largest value of all.

    Of the largest, since a small value is a sum of larger ones, whose roundings it has.
    """
    allowed = FLOAT32_STEPS * torch.finfo(torch.float32).eps * float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=allowed, msg=message)
