"""No method: the base model alone, to be scored by the command line like any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from steerlora.methods.config import MethodConfig, method

if TYPE_CHECKING:
    from torch import nn

    from steerlora.methods.base import Method, Sources


@method("base_alone")
@dataclass(frozen=True, kw_only=True)
class BaseAlone(MethodConfig):
    """Stage ``evaluate`` scores the base; whatever trains or compares adapters refuses."""

    kind: str = "base_alone"
    """Registered name of the kind."""

    trains: ClassVar[bool] = False

    def build(self, model: nn.Module, sources: Sources, seed: int) -> Method:
        """Refused: there is none."""
        self.check_trains()
        raise NotImplementedError
