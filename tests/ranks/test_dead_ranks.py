"""A rank that dies, without torchrun, as under srun: the others end within a minute, saying which.

Rank 0 hosts the rendezvous store.
"""

from __future__ import annotations

import time

import pytest
from runs import ADAPTER, MINUTE, assert_close, checkpoints, reached, until, weights


def test_rank_0_is_killed(start, root):
    runs = start.ranks(ADAPTER, "trainer.strategy=zero3", f"artifacts.root={root}")
    until(reached(root, 5))
    runs[0].kill()
    began = time.monotonic()
    assert runs[1].wait() == 1
    assert time.monotonic() - began < MINUTE
    says = "error: rank 0 is gone: it hosted the rendezvous store; rank 1 ends too"
    assert runs[1].line == says
    assert "frame #" not in runs[1].err  # torch's own account of it


ENDS_WHILE_LOOKING = """
from runs import free_port
from steerlora.distributed import group, ranks

group.HEARTBEAT_INTERVAL = 0.0
group.Group(ranks.Ranks(world=1, port=free_port()))
"""


def test_an_end_while_looking_for_others_is_no_crash(start):
    """Python's end would abort a thread that is in the store's C++."""
    runs = [start("--help", first=ENDS_WHILE_LOOKING, slow_end=True) for _ in range(5)]
    assert [run.wait() for run in runs] == [0] * 5


RAISES = """
import os
from steerlora.methods.module import MethodModule

original = MethodModule.training_step

def training_step(self, *args):
    if self.global_step == 7 and os.environ["RANK"] == "{victim}":
        raise ZeroDivisionError("out of luck")
    return original(self, *args)

MethodModule.training_step = training_step
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_fails_is_named_with_its_reason(victim, start, root, unbroken):
    first = RAISES.format(victim=victim)
    runs = start.ranks(ADAPTER, "trainer.strategy=ddp", f"artifacts.root={root}", first=first)
    assert runs[victim].wait() == 1
    assert "ZeroDivisionError: out of luck" in runs[victim].err
    began = time.monotonic()
    other = runs[1 - victim]
    assert other.wait() == 1
    assert time.monotonic() - began < MINUTE
    assert other.line == f"error: rank {victim} ended: out of luck; rank {1 - victim} ends too"
    assert [path.name for path in checkpoints(root)] == ["step-00000006", "step-00000007"]
    # One process goes on from there.
    again = start(ADAPTER, f"artifacts.root={root}").ends_well()
    assert "resuming from step-00000007" in again.out
    assert_close(weights(root), unbroken)
