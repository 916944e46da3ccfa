"""What the finished domains of a sequence leave behind, so that an interrupted one resumes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from steerlora.engine.manifests import CHECKPOINTS
from steerlora.training.checkpoints import Files, agreed, place

FOLDER = f"{CHECKPOINTS}/domains"


@dataclass
class SequenceState:
    """A sequence after some of its domains."""

    rows: list[dict]
    """Of the score matrix; the first is the base's."""
    drift: list[float] = field(default_factory=list)
    """Of general features after each domain, with a monitor."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """The method's state dict; empty before the first domain."""
    learner: dict[str, Any] = field(default_factory=dict)
    """The learner's state; empty before the first domain."""
    optimizer: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Of the optimizer, where one goes through all domains."""

    @property
    def domains(self) -> int:
        """How many are finished."""
        return len(self.rows) - 1

    def save(self, directory: Path, identity: str) -> None:
        """Keep it as a training's checkpoint is kept: whole or not at all, the one before too.

        Args:
            directory: the stage's.
            identity: of the sequence.
        """
        tree = {one.name: getattr(self, one.name) for one in fields(self)}
        Files(identity).save_checkpoint(tree, place(directory / FOLDER, self.domains))

    @classmethod
    def resumed(cls, directory: Path, identity: str) -> SequenceState | None:
        """What was kept, the same for every rank; None where no domain was finished."""
        found = agreed(directory / FOLDER, identity)
        return cls(**Files().load_checkpoint(found)) if found else None
