"""A job of a sweep in itself; whole sweeps are in tests/readme and test_launchers.py."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from steerlora.cli.sweep import ABOUT, OUTCOMES, Outcome, run_job
from steerlora.cli.sweep_progress import job_done, job_started
from steerlora.engine.manifests import write_json
from steerlora.errors import UserError
from steerlora.reporting.wandb_agent import OF_ONE_RUN


@pytest.mark.parametrize("first", [0, 1])
def test_an_id_of_a_run_belongs_to_the_first_job(first, monkeypatch, tmp_path):
    """Jobs may share a process, and always share the environment that they were started from."""
    for name in OF_ONE_RUN:
        monkeypatch.setenv(name, "mine")
    monkeypatch.setenv(OUTCOMES, str(tmp_path))
    write_json(tmp_path / ABOUT, {"searches": False, "jobs": ["", "", ""]})
    found = {}
    for number in range(first, 3):
        about = {"job": SimpleNamespace(num=number), "overrides": SimpleNamespace(task=["a=1"])}
        job = SimpleNamespace(mode=RunMode.MULTIRUN, **about)
        monkeypatch.setattr(HydraConfig, "get", lambda job=job: job)

        def work(number: int = number) -> tuple:
            found[number] = {os.environ.get(name) for name in OF_ONE_RUN}
            return ()

        run_job(work, "average/target")
    assert found == {number: {None if number else "mine"} for number in range(first, 3)}


JOBS = ["seed=0", "seed=1", "", "seed=3"]


def test_a_job_says_which_it_is_and_how_long_the_others_take(tmp_path):
    said = []
    for number, seconds in enumerate((100.0, 10.0, 12.0, 11.0)):
        said.append(job_started(tmp_path, number, JOBS))
        Outcome(number, seconds=seconds).write(tmp_path)
        said.append(job_done(tmp_path, number, JOBS))
    assert said == [
        "job 1 of 4 (seed=0): started",
        "job 1 of 4 (seed=0): done in 1:40; 3 left, about 5:00",
        "job 2 of 4 (seed=1): started",
        "job 2 of 4 (seed=1): done in 0:10; 2 left, about 1:50",
        "job 3 of 4: started",
        # The first one built what all share: a middling job says more.
        "job 3 of 4: done in 0:12; 1 left, about 0:12",
        "job 4 of 4 (seed=3): started",
        "job 4 of 4 (seed=3): done in 0:11",
    ]


def test_of_a_search_nobody_knows_how_many_jobs_it_has(tmp_path):
    assert job_started(tmp_path, 2, []) == "job 3: started"
    Outcome(2, seconds=3.0).write(tmp_path)
    assert job_done(tmp_path, 2, []) == "job 3: done in 0:03"


def test_jobs_at_the_same_time_share_what_is_left(tmp_path):
    for number in range(4):
        job_started(tmp_path, number, JOBS * 2)
    Outcome(0, seconds=10.0).write(tmp_path)
    assert job_done(tmp_path, 0, JOBS * 2).endswith("; 7 left, about 0:18")  # four at once
    Outcome(1, seconds=2.0, code=1, error="no").write(tmp_path)
    said = job_done(tmp_path, 1, JOBS * 2)  # what failed at once does not shorten the rest
    assert said == "job 2 of 8 (seed=1): failed in 0:02; 6 left, about 0:20"


@pytest.mark.parametrize("fails", [False, True])
def test_a_jobs_lines_are_printed(fails, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(OUTCOMES, str(tmp_path))
    write_json(tmp_path / ABOUT, {"searches": False, "jobs": JOBS})
    about = {"job": SimpleNamespace(num=1), "overrides": SimpleNamespace(task=["a=1"])}
    job = SimpleNamespace(mode=RunMode.MULTIRUN, **about)
    monkeypatch.setattr(HydraConfig, "get", lambda: job)

    def work() -> tuple:
        if fails:
            raise UserError("no")
        return ()

    run_job(work, "average/target")
    first, last = capsys.readouterr().out.splitlines()
    assert first == "job 2 of 4 (seed=1): started"
    assert last.startswith(f"job 2 of 4 (seed=1): {'failed' if fails else 'done'} in 0:00; 3 left")
