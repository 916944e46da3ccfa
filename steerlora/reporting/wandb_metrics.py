"""The course of a training in W&B: which axis each metric has, and one count over all domains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch.loggers.logger import Logger

TOKENS, STEP, STAGE = "tokens", "step", "sequence/stage"
"""Tokens trained on, optimizer steps done, and domains learnt."""

OVER_TOKENS = ("train/*", "sae/*", "heldout/*", "routing/*", "throughput/*", "memory/*")
OVER_STEPS = ("validation/*",)
OVER_STAGES = ("sequence/*",)
AT_THE_END = ("target/*", "average/*", "task/*", "drop_pct/*", "forgetting/*", "general_kept")


def define_metrics(run: Any) -> None:
    """Say what each metric is drawn over."""
    for axis in (TOKENS, STEP, STAGE):
        run.define_metric(axis, hidden=True)
    for name in OVER_TOKENS:
        run.define_metric(name, step_metric=TOKENS)
    for name in OVER_STEPS:
        run.define_metric(name, step_metric=STEP)
    for name in OVER_STAGES:
        run.define_metric(name, step_metric=STAGE)
    for name in AT_THE_END:
        run.define_metric(name, summary="last")


@dataclass
class Counts:
    """How far a run's trainings have come; those of a sequence are one after the other."""

    step: int = 0
    """Optimizer steps."""
    tokens: int = 0
    """Tokens over all ranks."""


class TrainingMetrics(Logger):
    """A Lightning logger that writes into a run, with steps and tokens counted on.

    Args:
        run: of W&B.
        counts: of the trainings that this run has logged before; brought up to date.
        first_step: optimizer steps of earlier trainings, where they are known; else those of
            ``counts``.
    """

    def __init__(self, run: Any, counts: Counts, first_step: int | None = None) -> None:
        super().__init__()
        self.run, self.counts = run, counts
        self._first = counts.step if first_step is None else first_step
        self._before = counts.tokens

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return self.run.id

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The run has its configuration already."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write metrics of a step; ``train/tokens`` among them moves the count of tokens on."""
        metrics = {name: value for name, value in metrics.items() if name != "epoch"}
        self.counts.step = self._first + (step or 0)
        if (tokens := metrics.pop("train/tokens", None)) is not None:
            self.counts.tokens = self._before + int(tokens)
        self.run.log({**metrics, STEP: self.counts.step, TOKENS: self.counts.tokens})
