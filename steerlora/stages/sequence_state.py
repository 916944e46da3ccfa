"""What the domains of a sequence leave behind: from it one that was interrupted, or that has grown
by a domain, goes on.

A folder a domain, such as ``adapters/1_math``: the method as it was after it, which
:func:`steerlora.methods.saving.load_adapter` reads, the state of the learner and the optimizer, and
then the scores.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from steerlora.distributed import ranks
from steerlora.engine.manifests import read_json, write_json
from steerlora.methods.saving import WEIGHTS
from steerlora.training.checkpoints import read_tree, whole, write_tree

FOLDER = "adapters"
SCORES = "scores.json"


@dataclass
class SequenceState:
    """A sequence after some of its domains."""

    directory: Path
    """The stage's."""
    sequence: Sequence[str]
    """The domains as they come."""
    rows: list[dict]
    """Of the score matrix; the first is the base's. On the ranks that do not score, empty ones."""
    drift: list[float] = field(default_factory=list)
    """Of general features after each domain, with a monitor."""
    trained: int = 0
    """How many domains have been trained on; the last of them may not have been scored."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """The method's state dict; empty before the first domain."""
    learner: dict[str, Any] = field(default_factory=dict)
    """The learner's state; empty before the first domain."""
    optimizer: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Of the optimizer, where one goes through all domains."""

    @property
    def scored(self) -> int:
        """After how many domains there are scores."""
        return len(self.rows) - 1

    def name(self, position: int) -> str:
        """Of a domain's folder, in the stage's."""
        return f"{FOLDER}/{position}_{self.sequence[position]}"

    def save(self, write: Callable[[Path], None]) -> None:
        """Keep what the last domain has trained: whole or not at all.

        Args:
            write: the method, into a folder.
        """
        folder = self.directory / self.name(self.trained - 1)
        unfinished = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write(unfinished)
        write_tree(unfinished, {"learner": self.learner, "optimizer": self.optimizer})
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)

    def save_scores(self) -> None:
        """Keep the scores after the last domain."""
        scores = {"row": self.rows[-1], "drift": self.drift[-1] if self.drift else None}
        write_json(self.directory / self.name(self.scored - 1) / SCORES, scores)

    def take_over(self, earlier: Path) -> None:
        """Begin where a sequence ended that had the same first domains; does nothing where this one
        has begun.

        Args:
            earlier: its artifact.
        """
        if (self.directory / FOLDER).exists():
            return
        unfinished = self.directory / f"{FOLDER}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(earlier / FOLDER, unfinished)
        unfinished.rename(self.directory / FOLDER)

    def resume(self) -> None:
        """Take up what was kept, the same for every rank."""
        trained = scored = 0
        if ranks.is_main():
            trained, scored = self._kept()
        self.trained, scored = ranks.broadcast([trained, scored])
        for position in range(scored):
            scores = read_json(self.directory / self.name(position) / SCORES)
            self.rows.append(scores["row"])
            self.drift += [] if scores["drift"] is None else [scores["drift"]]
        if self.trained:
            last = self.directory / self.name(self.trained - 1)
            self.weights = load_file(last / WEIGHTS)
            kept = read_tree(last)
            self.learner, self.optimizer = kept["learner"], kept["optimizer"]

    def _kept(self) -> tuple[int, int]:
        """How many of the domains have an intact folder, and how many of those have scores."""
        for position in range(len(self.sequence)):
            folder = self.directory / self.name(position)
            if not folder.exists() or not whole(folder):
                return position, position
            if not (folder / SCORES).exists():
                return position + 1, position
        return len(self.sequence), len(self.sequence)
