"""A run builds the missing artifacts of the requested steps, reuses the rest, and times them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from steerlora.distributed import ranks
from steerlora.engine.artifacts import Artifact, ArtifactStore
from steerlora.engine.building import Facts, build_groups, found_or_refused
from steerlora.engine.estimates import TimeLeft, stored_rates
from steerlora.engine.progress import Progress, SilentProgress
from steerlora.engine.steps import STAGES, Step
from steerlora.errors import UserError

MEMORY_INTERVAL = 1.0  # seconds between two looks at the memory in use


@dataclass(frozen=True)
class StepTime:
    """How long one step took in this run."""

    label: str
    """The step's label."""

    stage: str
    """The step's stage."""

    seconds: float
    """Wall time; 0 for an artifact that was complete before the run."""

    reused: bool
    """Whether the artifact was complete, or another process built it meanwhile."""


@dataclass(frozen=True)
class RunReport:
    """The result of a run. ``report[step]`` is the step's artifact."""

    artifacts: dict[str, Artifact]
    """{fingerprint: artifact}, of all steps that exist now."""

    steps: list[StepTime]
    """How long each step took, the reused ones first."""

    seconds: float
    """Wall time of the run."""

    peak_memory_bytes: int
    """Largest resident memory of this process and its workers together. Pages that they share are
    counted in each."""

    def __getitem__(self, step: Step) -> Artifact:
        return self.artifacts[step.fingerprint]


def run(
    steps: Sequence[Step],
    store: ArtifactStore,
    *,
    workers: int = 1,
    progress: Progress | None = None,
    plugins: Sequence[str] = (),
    asked_for: Step | None = None,
) -> RunReport:
    """Build what is missing of ``steps`` and of what they read; reuse the rest.

    An input that is gone, and that nothing missing reads, is not built again; a damaged one is.

    Args:
        workers: processes that build side by side; with 1, or a single step to build, the work is
            done in this process. Several ranks build one step after the other, together.
        plugins: modules that register stages, methods and so on; imported by each worker.
        asked_for: the step that the command is about, if it is about one.

    Raises:
        KeyboardInterrupt: Ctrl-C; the unfinished steps have saved what they save, and resume.
        Preempted: another signal, or Ctrl-C, that a training in progress has saved for.
        Exception: the first error of a step, as it was raised.
    """
    progress = progress or SilentProgress()
    began = time.monotonic()
    artifacts, missing = _look_up_together(steps, store)
    for step in missing:
        STAGES[step.stage].check(step.config)
    times = [
        StepTime(step.label, step.stage, 0.0, reused=True)
        for step in _in_order(steps)
        if step.fingerprint in artifacts
    ]
    with _PeakMemory() as memory:
        if missing:
            progress.message(f"{len(missing)} steps to build, {len(artifacts)} reused")
            workers = min(workers, len(missing)) if ranks.current().world == 1 else 1
            stored = stored_rates(store.root, (step.stage for step in missing))
            left = TimeLeft(missing, workers, stored)
            with progress.task("all steps", len(missing)) as task:
                task.advance(0, left=left.seconds)
                facts = Facts(store, tuple(plugins), asked_for and asked_for.fingerprint)
                for group, results in build_groups(missing, artifacts, facts, workers, progress):
                    for step, built in zip(group, results, strict=True):
                        artifacts[step.fingerprint] = built.artifact
                        times.append(StepTime(step.label, step.stage, built.seconds, built.reused))
                        progress.message(f"{step.label}: {built.seconds:.1f} s")
                        left.finished(step, None if built.reused else built.seconds)
                        task.advance(left=left.seconds)
    return RunReport(artifacts, times, time.monotonic() - began, memory.bytes)


def _in_order(steps: Sequence[Step]) -> list[Step]:
    """Every step that ``steps`` need, once, inputs first."""
    ordered: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step.fingerprint not in ordered:
            for upstream in step.upstream:
                visit(upstream)
            ordered[step.fingerprint] = step

    for step in steps:
        visit(step)
    return list(ordered.values())


def _look_up(steps: Sequence[Step], store: ArtifactStore) -> tuple[dict[str, Artifact], list[Step]]:
    """The artifacts that exist, and the steps to build, inputs first."""
    ordered = _in_order(steps)
    existed = {
        step.fingerprint
        for step in ordered
        if store.directory(step.stage, step.fingerprint).exists()
    }
    found = {step.fingerprint: store.find(step.stage, step.fingerprint) for step in ordered}
    needed = {step.fingerprint for step in steps} | existed
    for step in reversed(ordered):
        if step.fingerprint in needed and found[step.fingerprint] is None:
            needed.update(upstream.fingerprint for upstream in step.upstream)
    missing = [s for s in ordered if s.fingerprint in needed and found[s.fingerprint] is None]
    return {name: artifact for name, artifact in found.items() if artifact}, missing


def _look_up_together(
    steps: Sequence[Step], store: ArtifactStore
) -> tuple[dict[str, Artifact], list[Step]]:
    """`_look_up` by rank 0, whose findings are every rank's."""
    found: tuple[dict[str, Artifact], list[Step]] = ({}, [])
    if ranks.is_main():
        found = _look_up(steps, store)
    there, missing = ranks.broadcast([list(found[0]), [step.fingerprint for step in found[1]]])
    if ranks.is_main():
        return found
    by_name = {step.fingerprint: step for step in _in_order(steps)}
    if not set(by_name).issuperset([*there, *missing]):
        raise UserError(
            "rank 0 builds what this rank's configuration does not ask for: give every rank the "
            "same command"
        )
    artifacts = {name: found_or_refused(by_name[name], store) for name in there}
    return artifacts, [by_name[name] for name in missing]


class _PeakMemory:
    """The largest sum of resident memory of this process and its children, by sampling."""

    def __enter__(self) -> _PeakMemory:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        ended = False
        while not ended:
            ended = self._ended.wait(MEMORY_INTERVAL)
            total = 0
            for one in (process, *process.children(recursive=True)):
                with suppress(psutil.Error):  # a child that has just ended
                    total += one.memory_info().rss
            self.bytes = max(self.bytes, total)
