"""A run builds the missing artifacts of the requested steps, reuses the rest, and times them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from steerlora.distributed import ranks
from steerlora.engine import preemption
from steerlora.engine.artifacts import Artifact, ArtifactStore
from steerlora.engine.estimates import TimeLeft, stored_rates
from steerlora.engine.manifests import plain
from steerlora.engine.memory import shortage_explained
from steerlora.engine.pool import WorkerPool
from steerlora.engine.progress import Progress, SilentProgress
from steerlora.engine.steps import STAGES, Context, Step
from steerlora.errors import UserError
from steerlora.registry import import_plugins

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
                facts = _Facts(store, tuple(plugins), asked_for and asked_for.fingerprint)
                for step, built in _build(missing, artifacts, facts, workers, progress):
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
    artifacts = {name: _found(by_name[name], store) for name in there}
    return artifacts, [by_name[name] for name in missing]


def _found(step: Step, store: ArtifactStore) -> Artifact:
    """What rank 0 found or built, as another rank sees it.

    Raises:
        UserError: it does not.
    """
    artifact = store.find(step.stage, step.fingerprint)
    if artifact is None:
        raise UserError(
            f"rank {ranks.current().rank} does not see {step.stage}/{step.fingerprint} under "
            f"{store.root}: artifacts.root must be a folder that all machines share"
        )
    return artifact


@dataclass(frozen=True)
class _Facts:
    """What all steps of a run have in common."""

    store: ArtifactStore
    plugins: tuple[str, ...]
    asked_for: str | None
    """Fingerprint of the step that the command is about."""


@dataclass(frozen=True)
class _Job:
    """A step with the artifacts it reads, ready to be sent to a worker."""

    step: Step
    inputs: dict[str, Artifact | tuple[Artifact, ...]]
    facts: _Facts


@dataclass(frozen=True)
class _Built:
    artifact: Artifact
    seconds: float
    reused: bool


def _build(
    missing: Sequence[Step],
    artifacts: Mapping[str, Artifact],
    facts: _Facts,
    workers: int,
    progress: Progress,
) -> Iterator[tuple[Step, _Built]]:
    """Build every step; the caller adds each to ``artifacts`` before it asks for the next."""

    def job(step: Step) -> _Job:
        return _Job(step, _inputs(step, artifacts), facts)

    if workers == 1:
        for step in missing:
            preemption.stop_if_requested("what was finished is stored")  # after a training's end
            try:
                built = _execute(job(step), progress)
            except Exception as error:
                error.add_note(f"while building '{step.label}'")
                raise
            yield step, built
        return
    urgency = _critical_paths(missing)
    waiting = sorted(missing, key=lambda step: -urgency[step.fingerprint])
    unfinished = {step.fingerprint for step in missing}
    with WorkerPool(workers, progress, _threads(workers)) as pool:
        while unfinished:
            ready = [
                step
                for step in waiting
                if not any(upstream.fingerprint in unfinished for upstream in step.upstream)
            ]
            for step in ready[: pool.idle]:
                waiting.remove(step)
                pool.submit(step, step.label, _execute, job(step))
            step, built = pool.wait()
            unfinished.remove(step.fingerprint)
            yield step, built


def _critical_paths(steps: Sequence[Step]) -> dict[str, float]:
    """Seconds of the longest chain of steps that begins with each; ``steps`` has inputs first."""
    longest = {step.fingerprint: step.cost for step in steps}
    for step in reversed(steps):
        for upstream in step.upstream:
            if upstream.fingerprint in longest:
                chain = upstream.cost + longest[step.fingerprint]
                longest[upstream.fingerprint] = max(longest[upstream.fingerprint], chain)
    return longest


def _threads(workers: int) -> dict[str, str]:
    """The environment that shares the cores out among workers, unless the user set fewer."""
    share = max(1, len(os.sched_getaffinity(0)) // workers)
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return {"OMP_NUM_THREADS": str(min(share, int(wanted)) if wanted.isdigit() else share)}


def _inputs(
    step: Step, artifacts: Mapping[str, Artifact]
) -> dict[str, Artifact | tuple[Artifact, ...]]:
    return {
        name: artifacts[value.fingerprint]
        if isinstance(value, Step)
        else tuple(artifacts[item.fingerprint] for item in value)
        for name, value in step.inputs.items()
    }


def _execute(job: _Job, progress: Progress) -> _Built:
    """Build the artifact of a step, or find that another process has."""
    import_plugins(job.facts.plugins)
    step, store = job.step, job.facts.store
    stage, began, reused = STAGES[step.stage], time.monotonic(), True

    def fill(directory: Path) -> Mapping | None:
        context = Context(
            config=step.config,
            inputs=job.inputs,
            directory=directory,
            home=store.directory(step.stage, step.fingerprint),
            fingerprint=step.fingerprint,
            label=step.label,
            progress=progress,
            asked_for=step.fingerprint == job.facts.asked_for,
            earlier=_first_stored(step.earlier, store) if ranks.is_main() else None,
        )
        with shortage_explained(step.label):
            return stage.build(context)

    def builder(directory: Path) -> Mapping | None:
        nonlocal reused
        reused = False
        if stage.shared:
            ranks.broadcast(True)
        return fill(directory)

    with _interruption_as_keyboard_interrupt(), _nothing_unstored_after():
        if ranks.is_main():
            config = plain(step.config)
            record = {
                "label": step.label,
                "version": stage.version,
                "seed": config.get("seed"),
                "cost": step.cost,
                "config": config,
                "inputs": step.input_fingerprints,
            }
            artifact = store.build(step.stage, step.fingerprint, record, builder, progress.message)
            ranks.broadcast(None)
        else:
            # Whether all ranks build it together, where it comes to that; then the end.
            while ranks.broadcast() is True:
                fill(store.unfinished(step.stage, step.fingerprint))
            artifact = _found(step, store)
    return _Built(artifact, time.monotonic() - began, reused)


def _first_stored(steps: Sequence[Step], store: ArtifactStore) -> Artifact | None:
    """The artifact of the first of ``steps`` that has one."""
    found = (store.find(step.stage, step.fingerprint) for step in steps)
    return next((artifact for artifact in found if artifact), None)


@contextmanager
def _interruption_as_keyboard_interrupt() -> Iterator[None]:
    """Lightning answers Ctrl-C with ``sys.exit(1)`` and leaves Ctrl-C ignored; undo both."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _nothing_unstored_after() -> Iterator[None]:
    """What trains inside is stored at the end, or lost."""
    try:
        yield
    finally:
        preemption.stored()


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
