"""A real SLURM of this machine runs a sweep, and one training over two tasks.

`scripts/single_machine_slurm.sh start` sets it up; where it is set up and stopped, tests start it.
A cluster's own SLURM is not used: tests have no business in its queue.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import steerlora.__main__ as command
from steerlora.cli import compose, launchers
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.run import run
from steerlora.stages import adapter_training

ROOT = Path(__file__).parents[2]
SET_UP = ROOT / "scripts" / "single_machine_slurm.sh"
TRAIN = ROOT / "scripts" / "slurm_train.sh"
CONFIGURATION = Path("/etc/slurm/slurm.conf")

TINY = (
    *("model=micro_xs", "model.steps=2", "model.batch_size=4", "domains.train_items=10"),
    *("domains.evaluation_items=4", "sae.max_tokens=400", "sae.steps=2", "sae.batch_size=32"),
    *("method.rank=2", "logger=none", "trainer=zero3", "trainer.max_steps=80"),
    *("trainer.batch_size=4", "trainer.precision=32-true", "trainer.accelerator=cpu"),
)


@pytest.fixture(scope="module", autouse=True)
def slurm() -> None:
    """This machine's SLURM, up; stopped again where it was stopped."""
    written = CONFIGURATION.exists() and "single_machine_slurm.sh" in CONFIGURATION.read_text()
    if not written or os.cpu_count() < 2:
        pytest.skip(f"no SLURM of two CPUs that tests may use: sudo {SET_UP} start")
    stopped = subprocess.run([SET_UP, "status"], capture_output=True).returncode != 0
    if stopped:
        started = subprocess.run([SET_UP, "start"], capture_output=True, text=True)
        if started.returncode:
            pytest.skip(started.stderr.strip())
    yield
    for job in Submitted.jobs:  # of a test that failed
        subprocess.run(["scancel", "--quiet", job.number])
    if stopped:
        subprocess.run([SET_UP, "stop"], capture_output=True, check=True)


def until(happened: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, subprocess.getoutput("squeue --me --states=all")
        time.sleep(0.1)


class Submitted:
    """A job of two tasks of `scripts/slurm_train.sh`, submitted in ``cwd``."""

    jobs: ClassVar[list[Submitted]] = []

    def __init__(self, *arguments: str, cwd: Path, package: Path = ROOT) -> None:
        environment = {"PYTHON": sys.executable, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
        submitted = subprocess.run(
            ["sbatch", "--parsable", "--ntasks=2", TRAIN, *arguments],
            cwd=cwd,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        assert submitted.returncode == 0, submitted.stderr
        self.number, self.cwd = submitted.stdout.strip(), cwd
        self.jobs.append(self)

    @property
    def log(self) -> str:
        return (self.cwd / f"steerlora-{self.number}.log").read_text()

    def signal(self, *options: str) -> None:
        subprocess.run(["scancel", *options, self.number], check=True)

    def end(self) -> dict[str, str]:
        """What SLURM says of it once it has left the queue: JobState, ExitCode, Restarts, ..."""
        queued = ["squeue", "--noheader", f"--jobs={self.number}"]
        until(lambda: not subprocess.run(queued, capture_output=True).stdout)
        shown = subprocess.getoutput(f"scontrol show job {self.number}")
        return dict(re.findall(r"(\w+)=(\S*)", shown))


def test_a_sweep_runs_as_slurm_jobs(tmp_path, monkeypatch, capfd):
    """One is done, one fails, and one is cancelled before it can say a word."""
    for folder, last in (("good", '{"prompt": "law 30 ?", "response": "30"}'), ("bad", "{nope")):
        for name in ("law", "math"):
            rows = [json.dumps({"prompt": f"{name} {i} ?", "response": str(i)}) for i in range(30)]
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}_train.jsonl").write_text("\n".join([*rows, last]))
    shutil.copytree(tmp_path / "good", tmp_path / "never")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["steerlora"])
    monkeypatch.setattr(command, "console", Console(soft_wrap=True, width=400))
    monkeypatch.setattr(launchers, "OUTCOME_DELAY", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    wait = launchers.SlurmJobs._wait

    def cancel_the_last(launcher, jobs):
        subprocess.run(["scancel", jobs[2].job_id], check=True)
        wait(launcher, jobs)

    monkeypatch.setattr(launchers.SlurmJobs, "_wait", cancel_the_last)
    with pytest.raises(SystemExit) as ended:
        command.main(
            [
                *("-m", "hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=null"),
                *("stage=domains", "domains=text", "domains.names=[law,math]", "logger=none"),
                *("domains.broad=law", "domains.dir=good,bad,never"),
            ]
        )
    out, err = capfd.readouterr()
    assert (ended.value.code, err) == (1, ""), out
    submitted = re.search(r"SLURM job (\d+) has the sweep's 3 jobs", out)
    rows = [line for line in out.splitlines() if line.startswith("│")]
    assert re.match(r"│ 0 +│ good +│ .* │ done ", rows[0])
    assert re.match(r"│ 1 +│ bad +│ .* │ failed: .*law_train.jsonl:31: not", rows[1])
    died = rf"ended without reporting why \(SLURM job {submitted[1]}_2 .*\); its log: {tmp_path}/"
    assert re.match(rf"│ 2 +│ never +│ .* │ failed: {died}", rows[2])
    assert len(list(tmp_path.glob("artifacts/domains/*/manifest.json"))) == 1


def test_two_tasks_preempted_and_queued_again_train_one_processs_adapter(tmp_path):
    one = tmp_path / "one"
    config = compose.load([*TINY, "trainer.strategy=single", f"artifacts.root={one}"])
    run([adapter_training.step(config)], ArtifactStore(one))
    two = tmp_path / "two"
    shutil.copytree(one, two, ignore=lambda folder, _: ["adapter_training"] * (folder == str(one)))
    job = Submitted(
        *("stage=adapter_training", *TINY, f"artifacts.root={two}"),
        "trainer.checkpoint_seconds=0.1",
        cwd=tmp_path,
    )
    until(lambda: list(two.glob("adapter_training/*.partial/checkpoints/step-*")))
    job.signal("--signal=USR1")
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.log
    assert f"saved; job {job.number} queues up again" in job.log
    assert "resuming from step-" in job.log
    assert job.log.count("stages: ") == 1  # one of the two tasks has the say
    found, expected = (
        load_file(next(root.glob("adapter_training/*/adapter/adapter_model.safetensors")))
        for root in (two, one)
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """A package named steerlora that waits, to be signalled; its second task may die."""
    package = tmp_path / "stand_in" / "steerlora"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "rank = os.environ['SLURM_PROCID']\n"
        "if rank == '1' and 'die' in sys.argv: time.sleep(0.5); sys.exit(3)\n"
        "pathlib.Path(f'{rank}.waits').touch()\n"
        "time.sleep(60)\n"
    )
    return package.parent


def test_a_task_that_dies_ends_the_job_for_good(tmp_path, stand_in):
    """The other one is asked to end, and saves: which is no reason to try again."""
    job = Submitted("die", cwd=tmp_path, package=stand_in)
    ended = job.end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "3:0", "0")
    assert "task 1: Exited with exit code 3" in job.log
    assert "queues up again" not in job.log


def test_a_job_that_is_cancelled_stays_so(tmp_path, stand_in):
    job = Submitted("wait", cwd=tmp_path, package=stand_in)
    until(lambda: len(list(tmp_path.glob("*.waits"))) == 2)
    job.signal()
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert "queues up again" not in job.log
