"""What a method offers whose layers have units that act or not, token by token.

B batch, S sequence, M units of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor


class WithUnits(Protocol):
    """A method whose configuration says ``has_units``."""

    def watched(self) -> AbstractContextManager[None]:
        """Inside, :meth:`active_units` says of every forward which units act."""

    def active_units(self) -> dict[str, Tensor]:
        """{layer: which units acted in the last forward, [B, S, M] bool}."""

    def switched_off(self, units: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Inside, these units never act: {layer: their numbers, [n]}."""

    def unit_norms(self) -> dict[str, Tensor]:
        """{layer: the norm of what each unit writes, [M]}."""
