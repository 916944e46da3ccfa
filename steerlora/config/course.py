"""Continual adaptation: what is done against forgetting in a sequence of domains."""

from __future__ import annotations

from dataclasses import dataclass

from steerlora.config.checks import one_of, positive, share


@dataclass(frozen=True, kw_only=True)
class ContinualConfig:
    """What is done against forgetting while an adapter is trained on one domain after another."""

    specialists: str = "free"
    """Which specialists are trained. "free": all of them, in every domain. "frozen": as "free",
    but when a domain ends, the specialist that was used most in it is frozen. "own": each domain
    trains the next specialist, and the others are frozen."""

    replay_ratio: float = 0.0
    """Share of the steps that repeat a batch of an earlier domain. From 0 to 1."""

    replay_batches: int = 128
    """Batches of each domain that are stored for replay. At least 1."""

    memory: bool = False
    """Whether specialists are spawned, merged and pruned, in sequences and in joint training."""

    memory_every: int = 50
    """Steps between two decisions of the memory policy. At least 1."""

    spawn_confidence: float = 0.5
    """A specialist is spawned where the gate's mean confidence is below this, and
    ``spawn_similarity`` holds too. Confidence is 0 for a gate that is even over the specialists
    in the top k, 1 for a one-hot gate. From 0 to 1."""

    spawn_similarity: float = 0.95
    """A specialist is spawned where the cosine between the text's mean features and those of every
    active specialist is below this, and ``spawn_confidence`` holds too. From 0 to 1."""

    merge_similarity: float = 0.99
    """Two specialists are merged where the cosine of their mean features is above this. From 0 to
    1."""

    prune_usage: float = 0.1
    """A specialist is pruned where its usage is below this fraction of the even share. From 0 to
    1."""

    def __post_init__(self) -> None:
        one_of("continual.specialists", self.specialists, ("free", "frozen", "own"))
        positive("continual", replay_batches=self.replay_batches, memory_every=self.memory_every)
        share(
            "continual",
            replay_ratio=self.replay_ratio,
            spawn_confidence=self.spawn_confidence,
            spawn_similarity=self.spawn_similarity,
            merge_similarity=self.merge_similarity,
            prune_usage=self.prune_usage,
        )
