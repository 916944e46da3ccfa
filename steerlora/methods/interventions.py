"""The interventions that methods register, by name; free of torch."""

from __future__ import annotations

from steerlora.errors import UserError
from steerlora.registry import Registry

INTERVENTIONS: Registry[type] = Registry("intervention", "steerlora.methods.*.interventions")
"""Every intervention by its name in configurations and tables."""
intervention = INTERVENTIONS.register


def check_phase(name: str, phase: str) -> None:
    """Refuse an intervention that does not exist, or means nothing in a phase.

    Args:
        name: of the intervention.
        phase: "evaluation" or "training".

    Raises:
        UserError: says what would be right.
    """
    INTERVENTIONS.check("intervention.name", name)
    if phase == "training" and not INTERVENTIONS[name].in_training:
        raise UserError(
            f"{name} in phase training: latents permuted before training are latents by "
            "other names, which is no control; use phase evaluation, or randomize"
        )
