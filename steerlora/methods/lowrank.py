"""A frozen linear layer with a bank of low-rank specialists, fused.

T tokens, D_in and D_out widths of the layer, E specialists, R rank of each.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerlora.lm.targets import ReplacedLinear


class ScaleSource(Protocol):
    """Where a layer reads the weight of every (specialist, rank) pair in the current forward."""

    scale: Tensor | None
    """[..., E*R], the outer product of gate and mask times alpha / r; None: a constant."""
    columns: Tensor | None
    """The pairs that any token of this forward uses, where others can be left out; None: all."""
    disabled: bool
    """The layer is the base's own for now."""


class LowRank(nn.Module):
    """The trainable matrices of one adapted layer, specialists stacked.

    Attributes:
        A: [E*R, D_in]; rows e*R ... (e+1)*R belong to specialist e.
        B: [D_out, E*R]; columns likewise. Zero at first, so that the adapter starts as the base.
    """

    def __init__(
        self, d_in: int, d_out: int, total_rank: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        # Kaiming-uniform with a = sqrt(5), as LoRA has it, on the fan-in of one row: D_in. (On a
        # three-dimensional stack torch would take the wrong fan-in.)
        bound = 1 / math.sqrt(d_in)
        self.A = nn.Parameter(
            torch.empty(total_rank, d_in).uniform_(-bound, bound, generator=generator)
        )
        self.B = nn.Parameter(torch.zeros(d_out, total_rank))


class AdaptedLinear(ReplacedLinear):
    """y = W x + (alpha / r) sum_e g_e B_e diag(m) A_e x as two products and one multiplication.

    With all specialists stacked the sum is ((x A^T) * scale) B^T: no loop over specialists, no
    [T, E, D_out] tensor; the second product accumulates into W x in place of a separate addition.

    Args:
        base: the frozen linear layer.
        low_rank: the specialists.
        source: gives the scale of each token.
        constant_scale: alpha / r, used where the source gives none (plain LoRA).
        dropout: share of the specialists' inputs that are zero wherever a gradient is recorded; the
            others are scaled up. The frozen layer sees all of them.
    """

    def __init__(
        self,
        base: nn.Linear,
        low_rank: LowRank,
        source: ScaleSource,
        constant_scale: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base)
        self.low_rank = low_rank
        self.source = source
        self.constant_scale = constant_scale
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """[..., D_in] -> [..., D_out]."""
        # Flat throughout: in-place accumulation into a view would cost a copy in the backward.
        flat = x.reshape(-1, x.shape[-1])
        output = self.base(flat)
        if not self.source.disabled:
            A, B, scale = self.low_rank.A, self.low_rank.B, self.source.scale
            if self.source.columns is not None:
                columns = self.source.columns.to(A.device)
                A, B = A[columns], B[:, columns]
            # The base stays in evaluation mode while a method trains; a gradient says that it does.
            if self.dropout and torch.is_grad_enabled():
                flat = F.dropout(flat, self.dropout)
            hidden = F.linear(flat, A.to(x.dtype))
            if scale is None:
                hidden = hidden * self.constant_scale
            else:
                hidden = hidden * scale.flatten(0, -2).to(hidden)
            output.addmm_(hidden, B.to(output.dtype).t())
        return output.view(*x.shape[:-1], -1)
