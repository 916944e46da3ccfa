"""Sweeps under submitit: ranks, outcomes, jobs that die; here on this machine's processes."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

import steerlora.__main__ as command
from steerlora.cli import launchers, suggestions
from steerlora.cli.command_line import CommandLine
from steerlora.cli.launchers import LocalJobs, SlurmJobs
from steerlora.cli.sweep import ABOUT, OUTCOMES, Outcome, print_outcomes
from steerlora.engine.manifests import write_json
from steerlora.errors import UserError


@pytest.fixture
def steerlora(tmp_path, monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """``steerlora("-m", ...)`` in this process, in an empty folder: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["steerlora"])
    monkeypatch.setattr(command, "console", Console(soft_wrap=True, width=400))

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            command.main(arguments)
        return (ended.value.code, *capfd.readouterr())

    return call


def test_two_jobs_of_two_ranks_one_of_which_fails(steerlora, tmp_path):
    for folder, last in (("good", '{"prompt": "law 30 ?", "response": "30"}'), ("bad", "{nope")):
        for name in ("law", "math"):
            rows = [json.dumps({"prompt": f"{name} {i} ?", "response": str(i)}) for i in range(30)]
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}_train.jsonl").write_text("\n".join([*rows, last]))
    code, out, err = steerlora(
        *("-m", "hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"),
        *("stage=domains", "domains=text", "domains.names=[law,math]", "domains.broad=law"),
        *("domains.dir=good,bad", "trainer=ddp", "trainer.accelerator=cpu", "logger=none"),
    )
    assert (code, err) == (2, ""), out
    one, other = [line for line in out.splitlines() if line.startswith("│")]
    assert re.match(r"│ 0 +│ good +│ .* │ done ", one)
    assert re.match(r"│ 1 +│ bad +│ .* │ failed: .*law_train.jsonl:31: not", other)
    assert len(list(tmp_path.glob("artifacts/domains/*/manifest.json"))) == 1
    assert not list(tmp_path.glob("artifacts/sweeps/.outcomes-*"))
    # Every rank of every job ran once and started nothing; the first one has the say.
    logs = {path: path.read_text() for path in tmp_path.glob("artifacts/sweeps/*/logs/*/*_log.out")}
    assert len(logs) == 4
    for log in logs.values():
        assert log.count("Starting with JobEnvironment") == 1
    spoke = [path.name for path, log in logs.items() if "to build" in log]
    assert [name.endswith("_0_log.out") for name in spoke] == [True, True]


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


class Ending(launchers.Jobs):
    """Jobs of which some end without an outcome; nothing is run."""

    def __init__(self, outcomes: Path, dead: dict[int, str]) -> None:
        self.outcomes, self.dead = str(outcomes), dead

    def _ended(self, jobs):
        return {number: state for number, state in self.dead.items() if number in jobs}


def job(log: Path) -> SimpleNamespace:
    paths = SimpleNamespace(stdout=log, folder=log.parent)
    return SimpleNamespace(task=lambda rank: SimpleNamespace(paths=paths))


def test_a_job_that_dies_without_an_outcome_is_named_with_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launchers, "OUTCOME_DELAY", 0.5)
    folder = tmp_path / "outcomes"
    folder.mkdir()
    monkeypatch.setenv(OUTCOMES, str(folder))
    shown = [f"seed={number}" for number in range(4)]
    about = {"name": "seed_today", "varied": ["seed"], "searches": False, "jobs": shown}
    write_json(folder / ABOUT, about)
    Outcome(0, seconds=3.0).write(folder)
    Outcome(1, code=1, error="KeyError: 'x'").write(folder)
    (tmp_path / "1.out").touch()
    jobs = {number: job(tmp_path / f"{number}.out") for number in range(3)}
    Ending(folder, dead={0: "FINISHED", 2: "SLURM job 9_2 OUT_OF_MEMORY"})._wait(jobs)
    said = capsys.readouterr().out.splitlines()  # as each ends
    assert [line.split(";")[0] for line in said] == [
        "job 1 of 4 (seed=0): done in 0:03",
        "job 2 of 4 (seed=1): failed in 0:00",
        "job 3 of 4 (seed=2): failed in 0:00",
    ]
    console = Console(record=True, width=400, file=StringIO())
    overrides = [["seed=0"], ["seed=1"], ["seed=2"], ["seed=3"]]
    assert print_outcomes(overrides, console) == 1
    rows = [line for line in console.export_text().splitlines() if line.startswith("│")]
    assert rows[0].split("│")[1:3] == [" 0   ", " 0    "]  # job and seed
    assert "done" in rows[0]
    assert f"failed: KeyError: 'x'; its log: {tmp_path}/1.out" in rows[1]
    assert "failed: ended without reporting why (SLURM job 9_2 OUT_OF_MEMORY)" in rows[2]
    assert f"its log: {tmp_path} " in rows[2]  # it never started one: the folder
    assert "failed: it did not report how it ended" in rows[3]
    assert not folder.exists()
    assert (tmp_path / "seed_today.csv").read_text().splitlines()[4].startswith("3,3,")


def test_an_outcome_that_comes_late_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "OUTCOME_DELAY", 1.5)
    write_json(tmp_path / ABOUT, {"jobs": [""]})
    jobs = Ending(tmp_path, dead={0: "FAILED"})
    monkeypatch.setattr(jobs, "_ended", lambda _: Outcome(0).write(tmp_path) or {0: "FAILED"})
    jobs._wait({0: job(tmp_path / "0.out")})
    assert Outcome.read(tmp_path, 0) == Outcome(0)


@pytest.mark.parametrize("queue", ["9_0 RUNNING\n9_1 FAILED\n10 CANCELLED", None])
def test_the_queue_says_which_slurm_jobs_will_not_run_again(tmp_path, monkeypatch, queue):
    program(tmp_path / "squeue", "exit 1" if queue is None else f"echo '{queue}'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    jobs = {number: SimpleNamespace(job_id=f"9_{number}") for number in range(3)}
    expected = {1: "SLURM job 9_1 FAILED", 2: "SLURM job 9_2 has left the queue"}
    # A controller that does not answer says nothing about the jobs.
    assert SlurmJobs()._ended(jobs) == ({} if queue is None else expected)


def test_tasks_on_this_machine_are_told_their_ranks(monkeypatch):
    from steerlora.distributed import ranks

    told = {}

    class Plugin(SimpleNamespace):
        def __call__(self, *_):
            told["ranks"] = ranks.current()

    class Launcher(LocalJobs, Plugin):
        pass

    for name, value in (("EXECUTOR", "local"), ("LOCAL_JOB_ID", "71"), ("LOCAL_NTASKS", "2")):
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    for name in ("GLOBALID", "LOCALID"):
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", OUTCOMES):
        monkeypatch.setenv(name, "")  # to be what it was afterwards
    monkeypatch.setenv("MASTER_PORT", "29500")  # another job's
    Launcher(params={"tasks_per_node": 2}, outcomes="there")()
    found = told["ranks"]
    assert (found.rank, found.world, found.local_rank, found.local_world) == (1, 2, 1, 2)
    assert (found.address, found.launcher) == ("127.0.0.1", "torchrun")
    assert found.port != 29500
    assert os.environ[OUTCOMES] == "there"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("hydra/launcher=submitit_slrm", "submitit_slrm: did you mean 'submitit_slurm'"),
        (
            "hydra/launcher=submitit_slurm hydra.launcher.partitoin=x",
            "no such key: hydra.launcher.partitoin",
        ),
        (
            "hydra/launcher=submitit_slurm hydra.launcher.timeout_min=soon",
            "hydra.launcher.timeout_min: Value 'soon'",
        ),
    ],
)
def test_a_launchers_mistakes_are_named_before_any_job(arguments, says):
    with pytest.raises(UserError) as caught:
        CommandLine.parse(["-m", "stage=base", "seed=0,1", *arguments.split()])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_launcher_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr(suggestions, "has_launchers", lambda: False)
    with pytest.raises(UserError, match=r"may need pip install 'steerlora\[launchers\]'"):
        CommandLine.parse(["-m", "stage=base", "seed=0,1", "hydra/launcher=submitit_slrm"])


def test_a_sweep_is_not_started_by_every_rank(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="leave torchrun or srun out"):
        CommandLine.parse(["-m", "stage=base", "seed=0,1"])


def test_a_sweep_that_has_nowhere_to_write_is_one_line(steerlora):
    code, _, err = steerlora("-m", "stage=domains", "seed=0,1", "artifacts.root=/dev/null/there")
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("error: cannot write /dev/null/there/sweeps (Not a directory)")


def test_without_slurm_the_slurm_launcher_is_one_line(steerlora, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = steerlora("-m", "hydra/launcher=submitit_slurm", "stage=domains", "seed=0,1")
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("error: hydra/launcher=submitit_slurm: this machine has no sbatch")
    assert not list(tmp_path.glob("artifacts/sweeps/.outcomes-*"))


def test_jobs_that_slurm_does_not_take_are_one_line(steerlora, tmp_path, monkeypatch):
    program(tmp_path / "srun", "exit 1")
    program(
        tmp_path / "sbatch", "echo 'sbatch: error: Invalid generic resource (gres)' >&2; exit 1"
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    code, _, err = steerlora("-m", "hydra/launcher=submitit_slurm", "stage=domains", "seed=0,1")
    assert code == 2
    (line,) = err.splitlines()
    assert "the jobs were not accepted: sbatch: error: Invalid generic resource" in line
    assert "hydra.launcher.gpus_per_node=null asks for no GPU" in line
    (script,) = tmp_path.glob("artifacts/sweeps/*/logs/.submission_file_*.sh")
    asked = {line for line in script.read_text().splitlines() if line.startswith("#SBATCH")}
    assert {
        *("#SBATCH --gpus-per-node=1", "#SBATCH --requeue", "#SBATCH --signal=USR2@120"),
        *("#SBATCH --job-name=steerlora", "#SBATCH --time=240", "#SBATCH --open-mode=append"),
    } <= asked
    assert "--wait=60" in script.read_text()
