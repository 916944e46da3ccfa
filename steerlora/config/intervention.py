"""A change of a method's control signal, made on purpose."""

from __future__ import annotations

from dataclasses import dataclass, field

from steerlora.config.checks import one_of, share


@dataclass(frozen=True, kw_only=True)
class InterventionConfig:
    """A change of the control signal; only methods that have one can be intervened on."""

    name: str = "none"
    """"none", or the registered name of an intervention."""
    seed: int = 0
    """Of its random draws."""
    strength: float = 1.0
    """How much of the changed signal is mixed in, from 0 (intact) to 1."""
    sites: list[int] = field(default_factory=list)
    """Control sites that it changes, by layer; empty: all."""
    domains: list[str] = field(default_factory=list)
    """Domains whose tokens it changes; empty: all."""
    phase: str = "evaluation"
    """"evaluation" (the causal test of a trained adapter), or "training": the adapter is trained
    and evaluated under it (a retrained control)."""

    @property
    def retrained(self) -> bool:
        """Whether an adapter is trained under it."""
        return self.name != "none" and self.phase == "training"

    def __post_init__(self) -> None:
        share("intervention", self, "strength")
        one_of("intervention.phase", self.phase, ("evaluation", "training"))
