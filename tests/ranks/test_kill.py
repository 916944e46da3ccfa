"""Killed at random moments, with SIGKILL, a training ends with the weights of one that was not.

Bit for bit, on one CPU process. Moments are drawn anew from a fixed seed: somewhere in a step, in
the middle of writing a checkpoint, in the middle of writing what comes of the training.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from runs import (
    TRAININGS,
    Run,
    Starter,
    assert_same,
    checkpoints,
    seen,
    step_of,
    trained,
    until,
    weights,
)
from torch import Tensor

STEPS = 40  # of each of `TRAININGS`


def done(root: Path, stage: str) -> int:
    """Steps behind the newest checkpoint."""
    steps = 0
    for path in checkpoints(root, stage):
        before, _, _ = path.parent.name.partition("_")  # 3_medicine
        steps = max(steps, step_of(path) + 8 * (int(before) if before.isdigit() else 0))
    return steps


def kill_in_a_step(run: Run, root: Path, stage: str, draw: random.Random) -> None:
    """A step of those that are left, and then somewhere in it."""
    step = draw.randint(done(root, stage) + 1, STEPS - 12)
    until(lambda: done(root, stage) >= step)
    time.sleep(draw.uniform(0, 0.03))
    run.send(signal.SIGKILL)


def kill_while(run: Run, root: Path, pattern: str) -> None:
    """Just when a file is there that is not there for long."""
    while True:
        until(lambda: seen(root, pattern))
        run.send(signal.SIGSTOP)
        if seen(root, pattern):
            return run.send(signal.SIGKILL)
        run.send(signal.SIGCONT)


def kill_in_a_checkpoint(run: Run, root: Path, stage: str, draw: random.Random) -> None:
    step = draw.randint(done(root, stage) + 1, STEPS - 20)
    until(lambda: done(root, stage) >= step)
    kill_while(run, root, f"{stage}/*.partial/checkpoints/**/step-*.tmp")
    assert seen(root, f"{stage}/*.partial/checkpoints/**/step-*.tmp")


def kill_at_the_end(run: Run, root: Path, stage: str, draw: random.Random) -> None:
    """While the results are written, before they are an artifact."""
    kill_while(run, root, f"{stage}/*.partial/*/*.safetensors")
    assert not trained(root, stage)


def kill_while_a_domain_is_kept(run: Run, root: Path, stage: str, draw: random.Random) -> None:
    kill_while(run, root, f"{stage}/*.partial/adapters/*.tmp")


KILLS = {
    "base": (kill_in_a_step, kill_at_the_end),
    "sae_training": (kill_in_a_checkpoint, kill_at_the_end),
    "adapter_training": (kill_in_a_checkpoint, kill_in_a_step, kill_at_the_end),
    "sequential_forgetting": (
        *(kill_in_a_step, kill_in_a_checkpoint, kill_in_a_step),
        kill_while_a_domain_is_kept,
    ),
}


def record(root: Path, stage: str) -> dict[str, str]:
    """What a training leaves besides weights, where nothing in it is a time or a path."""
    (artifact,) = (manifest.parent for manifest in trained(root, stage))
    names = ("sequential.json", "training.json", "quality.json")
    return {name: (artifact / name).read_text() for name in names if (artifact / name).exists()}


class Ends(NamedTuple):
    """Of one training, unbroken or killed on the way."""

    tensors: dict[str, Tensor]
    record: dict[str, str]
    said: str


def unbroken_and_killed(start: Starter, root: Path, aside: Path, stage: str) -> tuple[Ends, Ends]:
    whole = start(*TRAININGS[stage], f"artifacts.root={aside}")
    whole.ends_well()
    expected = Ends(weights(aside, stage), record(aside, stage), whole.out)
    command, draw = (*TRAININGS[stage], f"artifacts.root={root}"), random.Random(stage)
    for kill in KILLS[stage]:
        run = start(*command)
        kill(run, root, stage, draw)
        assert run.wait() == -signal.SIGKILL
    last = start(*command).ends_well()
    return expected, Ends(weights(root, stage), record(root, stage), last.out)


@pytest.fixture(scope="module")
def ends(ask, upstream, tmp_path_factory) -> dict[str, Future[tuple[Ends, Ends]]]:
    """Of every training, two at a time."""
    found = {}
    with ThreadPoolExecutor(2) as pool:
        for stage in TRAININGS:
            folder = tmp_path_factory.mktemp(stage)
            roots = [Path(shutil.copytree(upstream, folder / name)) for name in ("a", "b")]
            found[stage] = pool.submit(unbroken_and_killed, Starter(folder, ask), *roots, stage)
    return found


@pytest.mark.parametrize("stage", TRAININGS)
def test_a_killed_training_ends_as_an_unbroken_one(stage, ends):
    expected, found = ends[stage].result()
    assert expected.tensors
    assert_same(found.tensors, expected.tensors)
    assert found.record == expected.record
    assert "resuming from step-" in found.said
    if "memory" in " ".join(TRAININGS[stage]):
        events = json.loads(next(iter(expected.record.values())))["events"]
        assert "spawn" in [event["event"] for event in events]


def test_there_were_more_than_ten_kills():
    assert sum(map(len, KILLS.values())) == 11
