"""A signal asks for room: trainings save, everything ends with 75, the same command goes on."""

from __future__ import annotations

import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from runs import (
    ADAPTER,
    TRAININGS,
    assert_same,
    checkpoints,
    reached,
    seen,
    step_of,
    until,
    weights,
)

REQUEUE = 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_training_saves_and_goes_on_from_exactly_there(number, start, root, unbroken):
    command = (ADAPTER, f"artifacts.root={root}")
    run = start(*command)
    until(reached(root, 5))
    run.send(number)
    assert run.wait() == REQUEUE
    step = step_of(checkpoints(root)[-1])
    assert run.line == (
        f"preempted: saved at step {step} of 40; the same command goes on from there"
    )
    again = start(*command).ends_well()
    assert f"resuming from step-{step:08d}" in again.out
    assert f"started at {step}/40 steps" in again.out
    assert_same(weights(root), unbroken)


CTRL_C = """
import os, signal
from steerlora.training.loop import Randomness

original, seen = Randomness.on_train_batch_start, []

def pressed(self, trainer, module, batch, index):
    seen.append(index)
    if len(seen) == {step}:
        os.kill(os.getpid(), signal.SIGINT)
    original(self, trainer, module, batch, index)

Randomness.on_train_batch_start = pressed
"""
"""Ctrl-C in the middle of a step, counted over all trainings of the process."""


@pytest.mark.parametrize("stage", TRAININGS)
def test_ctrl_c_saves_the_step_that_it_came_in(stage, start, upstream, tmp_path):
    """Far from the time of any checkpoint. Nothing before that step is computed again."""
    roots = [Path(shutil.copytree(upstream, tmp_path / name)) for name in ("whole", "broken")]
    whole, broken = (
        (*TRAININGS[stage], "trainer.checkpoint_seconds=1000", f"artifacts.root={root}")
        for root in roots
    )
    start(*whole).ends_well()
    run = start(*broken, first=CTRL_C.format(step=21))
    assert run.wait() == 130
    step = 5 if stage == "sequential_forgetting" else 21  # of the third domain, of eight each
    total = 8 if stage == "sequential_forgetting" else 40
    assert f"interrupted: saved at step {step} of {total}; " in run.line
    again = start(*broken).ends_well()
    assert f"resuming from step-{step:08d}" in again.out
    assert f"started at {step}/{total} steps" in again.out
    assert_same(weights(roots[1], stage), weights(roots[0], stage))


def test_a_second_ctrl_c_stops_at_once(start, root):
    second = """
from steerlora.engine import preemption
from steerlora.training.loop import Checkpoints

preemption.ECHO = -1.0
Checkpoints.on_train_batch_end = lambda *_: os.kill(os.getpid(), signal.SIGINT)
"""
    run = start(ADAPTER, f"artifacts.root={root}", first=CTRL_C.format(step=3) + second)
    assert run.wait() == 130
    assert run.line == "interrupted: the same command goes on from what was saved last"
    assert "Ctrl-C again: stop at once" in run.err
    assert not checkpoints(root)


def test_outside_a_training_it_ends_at_once(start, tmp_path):
    root = tmp_path / "artifacts"
    run = start("stage=domains", "domains.train_items=100000", f"artifacts.root={root}")
    until(lambda: seen(root, "domains/*.partial"))
    time.sleep(0.2)
    run.send(signal.SIGTERM)
    assert run.wait() == REQUEUE
    assert run.line == "preempted: nothing was lost; the same command goes on from there"


def test_the_workers_of_a_study_save_too(start, root, tmp_path):
    run = start(
        "study.workers=2",
        "study.seeds=[0,1]",
        "study.methods=[sc_lora]",
        "study.sequential_methods=[]",
        "study.interventions=[]",
        "trainer.checkpoint_seconds=1000",
        "trainer.max_steps=4000",
        f"results.dir={tmp_path / 'results'}",
        f"artifacts.root={root}",
    )
    until(lambda: len(re.findall(r"adapter_training .* seed \d: started", run.out)) == 2)
    run.send(signal.SIGUSR1)
    assert run.wait() == REQUEUE
    assert "preempted: nothing was lost" in run.line
    assert len({path.parent for path in checkpoints(root)}) == 2, run.out
    again = start(ADAPTER, "trainer.max_steps=4000", "seed=0", f"artifacts.root={root}")
    until(lambda: "resuming from step-" in again.out)
