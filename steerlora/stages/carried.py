"""What a sequence has behind it: kept after every domain, so that an interrupted one goes on."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from torch import Tensor

from steerlora.engine.manifests import CHECKPOINTS
from steerlora.training.checkpoints import Files, agreed, place

FOLDER = f"{CHECKPOINTS}/domains"


@dataclass
class Carried:
    """What the finished domains leave behind.

    Attributes:
        rows: of the score matrix; the first is the base's.
        drift: of general features after each domain, with a monitor.
        frozen: specialists that train no more.
        events: of the memory policy.
        weights: the adapter's state dict; empty before the first domain.
        memory: the memory policy's tensors.
    """

    rows: list[dict]
    drift: list[float] = field(default_factory=list)
    frozen: list[int] = field(default_factory=list)
    events: list[dict] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)

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
    def resumed(cls, directory: Path, identity: str) -> Carried | None:
        """What was kept, the same for every rank; None where no domain was finished."""
        found = agreed(directory / FOLDER, identity)
        return cls(**Files().load_checkpoint(found)) if found else None
