"""A change of a method's control signal, made on purpose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from steerlora.config.checks import Section
from steerlora.config.ranges import Distinct, Layer, Name, OneOf, Seed, Share


@dataclass(frozen=True, kw_only=True)
class InterventionConfig(Section, key="intervention"):
    """A change of the control signal; only methods that have one can be intervened on."""

    name: Name = "none"
    """"none", or the registered name of an intervention."""
    seed: Seed = 0
    """Of its random draws."""
    strength: Share = 1.0
    """How much of the changed signal is mixed in, from 0 (intact) to 1."""
    sites: Annotated[list[Layer], Distinct()] = field(default_factory=list)
    """Control sites that it changes, by layer; empty: all."""
    domains: Annotated[list[Name], Distinct()] = field(default_factory=list)
    """Domains whose tokens it changes; empty: all."""
    phase: Annotated[str, OneOf(("evaluation", "training"))] = "evaluation"
    """"evaluation" (the causal test of a trained adapter), or "training": the adapter is trained
    and evaluated under it (a retrained control)."""

    @property
    def retrained(self) -> bool:
        """Whether an adapter is trained under it."""
        return self.name != "none" and self.phase == "training"
