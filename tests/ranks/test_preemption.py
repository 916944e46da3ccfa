"""A signal asks for room: trainings save, everything ends with 75, the same command goes on."""

from __future__ import annotations

import re
import signal
import time

import pytest
from runs import ADAPTER, assert_same, checkpoints, reached, seen, step_of, until, weights

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


def test_ctrl_c_loses_nothing(start, root, unbroken):
    command = (ADAPTER, f"artifacts.root={root}")
    run = start(*command)
    until(reached(root, 5))
    run.send(signal.SIGINT)
    assert run.wait() == 130
    assert run.err == "interrupted: run the same command again, and it goes on where it was\n"
    again = start(*command).ends_well()
    assert "resuming from step-" in again.out
    assert_same(weights(root), unbroken)


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
