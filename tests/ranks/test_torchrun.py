"""Real torchrun: preempted, bereft of a rank, and over two nodes.

Weights are compared with those of one process, to 1e-5.
"""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import psutil
from runs import (
    ADAPTER,
    MINUTE,
    Run,
    assert_close,
    checkpoints,
    free_port,
    reached,
    step_of,
    until,
    weights,
)

PAIR = "--standalone --nproc-per-node 2"


def rank_of(agent: Run, rank: int) -> psutil.Process:
    """A rank's process among those that torchrun started."""
    for child in psutil.Process(agent.number).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError(f"torchrun has no rank {rank}")


def test_preempted_then_bereft_of_a_rank_it_ends_as_one_process(start, root, unbroken, tmp_path):
    command = (ADAPTER, "trainer.strategy=zero2", f"artifacts.root={root}")
    # A signal to torchrun is handed on: both ranks save.
    agent = start.torchrun(PAIR, *command)
    until(reached(root, 5))
    agent.send(signal.SIGTERM)
    assert agent.wait() != 0
    step = step_of(checkpoints(root)[-1])
    assert f"preempted: saved at step {step} of 40" in agent.err
    # The same command goes on. A rank is killed: the other says which, and ends.
    agent = start.torchrun(PAIR, *command)
    until(reached(root, step + 5))
    assert f"resuming from step-{step:08d}" in agent.out
    rank_of(agent, 1).send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert agent.wait() != 0
    assert time.monotonic() - began < MINUTE
    assert "error: rank 1 is gone: it sends no heartbeat; rank 0 ends too" in agent.err
    assert "frame #" not in agent.err  # torch's own account of it
    # From what is there two ranks go on, and so does a process on its own.
    newest = checkpoints(root)[-1].name
    alone = Path(shutil.copytree(root, tmp_path / "alone"))
    pair = start.ranks(*command)
    assert [run.wait() for run in pair] == [0, 0], pair[0].err
    one = start(ADAPTER, f"artifacts.root={alone}").ends_well()
    for run, where in ((pair[0], root), (one, alone)):
        assert f"resuming from {newest}" in run.out
        assert_close(weights(where), unbroken)


def test_two_agents_train_the_adapter_of_one_process(start, root, unbroken):
    """Two nodes on loopback, one rank each."""
    options = (
        "--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id test "
        f"--rdzv-endpoint localhost:{free_port()}"
    )
    command = (ADAPTER, "trainer.strategy=zero3", f"artifacts.root={root}")
    agents = [start.torchrun(options, *command) for _ in range(2)]
    for agent in agents:
        agent.ends_well()
    # Which of them has rank 0 is torchrun's to say; that one alone prints.
    assert sorted("done, 40/40 steps" in agent.out for agent in agents) == [False, True]
    assert_close(weights(root), unbroken)
