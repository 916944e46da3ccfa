"""How long the rest of a run will take: learnt from finished steps, and from earlier runs'.

A step's ``cost`` compares steps of one stage. What a unit of it takes is learnt for every stage,
so that a run of few long trainings and many short evaluations is not judged by whichever of them
was last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

from steerlora.engine.manifests import MANIFEST, read_json
from steerlora.engine.steps import Step
from steerlora.errors import UserError

MOST_STORED = 20
"""Stored artifacts of a stage whose times are read, the newest."""


class TimeLeft:
    """Predicts the seconds that a run still takes.

    Args:
        steps: to build, inputs first.
        workers: that build side by side.
        earlier: {stage: seconds a unit of cost of artifacts that were built before}; counts until
            a step of that stage is finished.
    """

    def __init__(
        self, steps: Sequence[Step], workers: int, earlier: Mapping[str, Sequence[float]]
    ) -> None:
        self._waiting = {step.fingerprint: step for step in steps}
        self._workers, self._earlier = workers, earlier
        self._own: dict[str, list[float]] = {}

    def finished(self, step: Step, seconds: float | None) -> None:
        """A step is done.

        Args:
            seconds: that it took; None where another process built it, which says nothing.
        """
        del self._waiting[step.fingerprint]
        if seconds is not None and step.cost > 0:
            self._own.setdefault(step.stage, []).append(seconds / step.cost)

    @property
    def seconds(self) -> float | None:
        """Until all are done; None while nothing is known of any stage."""
        rates = {stage: median(known) for stage, known in self._earlier.items() if known}
        rates |= {stage: median(known) for stage, known in self._own.items()}
        if not rates:
            return None
        unknown = median(rates.values())
        longest: dict[str, float] = {}  # of the chains of steps that end with each
        total = 0.0
        for name, step in self._waiting.items():
            own = step.cost * rates.get(step.stage, unknown)
            before = (longest.get(upstream.fingerprint, 0.0) for upstream in step.upstream)
            longest[name] = own + max(before, default=0.0)
            total += own
        return max(total / self._workers, max(longest.values(), default=0.0))


def stored_rates(root: Path, stages: Iterable[str]) -> dict[str, list[float]]:
    """{stage: seconds a unit of cost, of its newest artifacts under ``root``}."""
    return {stage: _rates(root / stage) for stage in dict.fromkeys(stages)}


def _rates(folder: Path) -> list[float]:
    try:
        manifests = sorted(folder.glob(f"*/{MANIFEST}"), key=lambda path: -path.stat().st_mtime)
    except OSError:  # one is gone meanwhile
        return []
    rates = []
    for path in manifests[:MOST_STORED]:
        try:
            content = read_json(path)
            rates.append(content["wall_seconds"] / content["cost"])
        except (UserError, OSError, KeyError, TypeError, ZeroDivisionError):
            continue  # of another version, or damaged: an estimate can do without it
    return rates
