"""What several ranks refuse: in one line, with exit code 2 on every rank, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import ADAPTER

from steerlora.cli import compose
from steerlora.engine.steps import STAGES
from steerlora.errors import UserError
from steerlora.stages import base, sae_training


def content(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            f"{ADAPTER} trainer.strategy=ddp trainer.batch_size=5",
            "trainer.batch_size=5: 2 equal parts (2 ranks, each 1 in turn) cannot be made of it; "
            "use 4 or 6",
        ),
        (f"{ADAPTER} trainer=gpu", "this machine has no GPU that torch can use; trainer=cpu runs"),
        (ADAPTER, "2 ranks were started, and trainer.strategy=single uses one: choose trainer=ddp"),
        (
            f"{ADAPTER} trainer.strategy=zero2 trainer.precision=16-mixed",
            "trainer.precision=16-mixed: DeepSpeed here runs 32-true or bf16-mixed",
        ),
    ],
)
def test_all_ranks_refuse_before_any_work(arguments, says, start, root):
    before = content(root)
    runs = start.ranks(*arguments.split(), f"artifacts.root={root}")
    assert says in runs[0].mistake
    assert runs[1].wait() == 2
    assert "error" not in runs[1].err
    assert content(root) == before


@pytest.mark.parametrize(
    ("step", "option", "says"),
    [
        (base.step, "model.batch_size=7", "model.batch_size=7: 2 equal parts"),
        (lambda config: sae_training.steps(config)[0], "sae.batch_size=63", "sae.batch_size=63: 2"),
    ],
)
def test_every_training_checks_its_own_batch(step, option, says, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    asked = step(compose.load(["experiment=smoke", option]))
    with pytest.raises(UserError, match=says):
        STAGES[asked.stage].check(asked.config)


def test_ranks_that_disagree_both_refuse(start, root):
    """Even where one of them would refuse what it was given."""
    before = content(root)
    runs = start.ranks(
        ADAPTER,
        "trainer.strategy=ddp",
        f"artifacts.root={root}",
        each=(("trainer.batch_size=8",), ("trainer.batch_size=16", "trainer.accelerator=gpu")),
    )
    assert runs[0].mistake == (
        "error: rank 1 was started with another configuration than rank 0: "
        "trainer.accelerator=cpu and gpu, trainer.batch_size=8 and 16; "
        "give every rank the same command"
    )
    assert runs[1].wait() == 2
    assert content(root) == before


def test_before_ranks_join_the_first_of_each_machine_reports(start, root):
    each = ((), ("trainer.batch_size=-1",))
    runs = start.ranks(ADAPTER, f"artifacts.root={root}", each=each, machines=True)
    assert "trainer.batch_size=-1: must be a whole number from 1" in runs[1].mistake
    assert runs[0].poll() is None


def test_a_model_that_cannot_be_reached(start, root):
    runs = start.ranks(
        "stage=base",
        "trainer.strategy=ddp",
        "model=micro_m",
        "model.path=no/such-model",
        f"artifacts.root={root}",
        HF_HUB_OFFLINE="1",
    )
    line = runs[0].mistake
    assert "model.path=no/such-model cannot be loaded" in line
    assert "scripts/download.py" in line
    assert runs[1].wait() == 1
    assert runs[1].line.startswith("error: rank 0 ended: model.path=no/such-model cannot be loaded")
