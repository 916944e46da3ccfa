"""What is asked of every SAE's tensors, whatever library wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from steerlora.errors import UserError


def refuse_unusable(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """UserError, naming the tensor, unless all hold finite floating-point numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{file}: {name} is {tensor.dtype}, not floating-point: fetch it again")
        if wrong := int((~tensor.isfinite()).sum()):
            raise UserError(
                f"{file}: {wrong} of the {tensor.numel()} values of {name} are NaN or infinite: "
                "fetch or train it again"
            )
