"""Configuration of end-to-end training; free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from steerlora.config.checks import Section
from steerlora.config.ranges import Count, NotNegative, OneOf, Positive

STARTS = ("trained", "new")


@dataclass(frozen=True, kw_only=True)
class EndToEndConfig(Section, key="sae.end_to_end"):
    """Training of an SAE in the place of its stream, so that the model's output stays: by the
    divergence KL(base || base with the reconstruction)."""

    steps: Annotated[int, Interval(ge=0, le=10**9)] = 0
    """Optimizer steps, from 0 (the SAE learns to reconstruct, and no more)."""
    start: Annotated[str, OneOf(STARTS)] = "trained"
    """"trained": the SAE that was trained to reconstruct, or that of ``sae.path``, is fine-tuned,
    which costs few steps; "new": an untrained one."""
    batch_size: Count = 16
    """Rows of text a step, from 1."""
    mse_weight: NotNegative = 1.0
    """Weight of the fraction of variance unexplained beside the divergence, which counts as much as
    it at every step; 0: the divergence alone."""
    learning_rate: Positive | None = None
    """Adam's peak rate; null: as for ``sae.learning_rate``."""
