"""Missing artifacts are built, group by group of steps, in this process or in workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlora.distributed import ranks
from steerlora.engine import preemption
from steerlora.engine.artifacts import Artifact, ArtifactStore
from steerlora.engine.manifests import plain
from steerlora.engine.memory import shortage_explained
from steerlora.engine.pool import WorkerPool
from steerlora.engine.progress import Progress
from steerlora.engine.steps import STAGES, Context, Step
from steerlora.errors import UserError
from steerlora.registry import import_plugins


def found_or_refused(step: Step, store: ArtifactStore) -> Artifact:
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
class Facts:
    """What all steps of a run have in common."""

    store: ArtifactStore
    """Where artifacts are, and are put."""

    plugins: tuple[str, ...]
    """Modules that register stages and what they build, imported by each worker."""

    asked_for: str | None
    """Fingerprint of the step that the command is about."""


@dataclass(frozen=True)
class _Job:
    """Steps that are built together, with the artifacts they read, ready to be sent to a worker."""

    steps: tuple[Step, ...]
    inputs: dict[str, Artifact | tuple[Artifact, ...]]
    facts: Facts


@dataclass(frozen=True)
class Built:
    """What became of a step."""

    artifact: Artifact
    """What it asked for."""

    seconds: float
    """Its share of the wall time of its group."""

    reused: bool
    """Whether the artifact was there, or another process built it meanwhile."""


def build_groups(
    missing: Sequence[Step],
    artifacts: Mapping[str, Artifact],
    facts: Facts,
    workers: int,
    progress: Progress,
) -> Iterator[tuple[tuple[Step, ...], list[Built]]]:
    """Build every group of steps; the caller adds what it holds to ``artifacts`` before it asks for
    the next.

    Args:
        missing: the steps, inputs first.
        artifacts: {fingerprint: what is there}.
        workers: processes that build side by side; with 1, this one does.

    Raises:
        Exception: the first error of a step, as it was raised.
    """
    groups = _groups(missing)

    def job(group: tuple[Step, ...]) -> _Job:
        return _Job(group, _inputs(group[0], artifacts), facts)  # which are the others' too

    if workers == 1:
        for group in groups:
            preemption.stop_if_requested("what was finished is stored")  # after a training's end
            try:
                built = _execute(job(group), progress)
            except Exception as error:
                error.add_note(f"while building '{_label(group)}'")
                raise
            yield group, built
        return
    urgency = _critical_paths(missing)
    waiting = sorted(groups, key=lambda group: -max(urgency[step.fingerprint] for step in group))
    unfinished = {step.fingerprint for step in missing}
    with WorkerPool(workers, progress, _threads(workers)) as pool:
        while unfinished:
            ready = [
                group
                for group in waiting
                if not any(upstream.fingerprint in unfinished for upstream in group[0].upstream)
            ]
            for group in ready[: pool.idle]:
                waiting.remove(group)
                pool.submit(group, _label(group), _execute, job(group))
            group, built = pool.wait()
            unfinished.difference_update(step.fingerprint for step in group)
            yield group, built


def _groups(steps: Sequence[Step]) -> list[tuple[Step, ...]]:
    """The steps that are built together, in the order of the first of each group."""
    found: dict[tuple[str, str], list[Step]] = {}
    for step in steps:
        found.setdefault((step.stage, step.group), []).append(step)
    return [tuple(group) for group in found.values()]


def _label(group: tuple[Step, ...]) -> str:
    return ", ".join(step.label for step in group)


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


def _execute(job: _Job, progress: Progress) -> list[Built]:
    """Build the artifacts of a group of steps, or find that another process has."""
    import_plugins(job.facts.plugins)
    by_name = {step.fingerprint: step for step in job.steps}
    store, name = job.facts.store, job.steps[0].stage
    stage, began = STAGES[name], time.monotonic()
    new: list[str] = []

    def context(step: Step, directory: Path) -> Context:
        return Context(
            config=step.config,
            inputs=job.inputs,
            directory=directory,
            home=store.directory(name, step.fingerprint),
            fingerprint=step.fingerprint,
            label=step.label,
            progress=progress,
            asked_for=step.fingerprint == job.facts.asked_for,
            earlier=_first_stored(step.earlier, store) if ranks.is_main() else None,
        )

    def fill(folders: Mapping[str, Path]) -> dict[str, Mapping | None]:
        contexts = [context(by_name[key], folder) for key, folder in folders.items()]
        with shortage_explained(_label(job.steps)):
            if stage.together:
                return dict(zip(folders, stage.build(contexts), strict=True))
            return {one.fingerprint: stage.build(one) for one in contexts}

    def builder(folders: dict[str, Path]) -> dict[str, Mapping | None]:
        new.extend(folders)
        if stage.shared:
            ranks.broadcast(new)
        return fill(folders)

    with _interruption_as_keyboard_interrupt(), _nothing_unstored_after():
        if ranks.is_main():
            records = {key: _record(step) for key, step in by_name.items()}
            artifacts = store.build_together(name, records, builder, progress.message)
            ranks.broadcast(None)
        else:
            # Which of them all ranks build together, where it comes to that; then the end.
            while (together := ranks.broadcast()) is not None:
                fill({key: store.unfinished(name, key) for key in together})
            artifacts = {key: found_or_refused(step, store) for key, step in by_name.items()}
    each = (time.monotonic() - began) / len(by_name)
    return [Built(artifacts[key], each, key not in new) for key in by_name]


def _record(step: Step) -> dict[str, Any]:
    """What a manifest says of its step."""
    config = plain(step.config)
    return {
        "label": step.label,
        "version": STAGES[step.stage].version,
        "seed": config.get("seed"),
        "cost": step.cost,
        "config": config,
        "inputs": step.input_fingerprints,
    }


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
