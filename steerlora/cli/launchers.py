"""The jobs of a sweep under submitit: as SLURM jobs, or as processes of this machine.

Hydra's plugin for submitit waits for what a job returns. If a job dies without returning, the sweep
ends in a traceback or, on a cluster that keeps no accounts, waits for ever. Here a job has ended
once it has written its outcome, or has left the queue without one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, fields, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.config import (
    BaseQueueConf,
    LocalQueueConf,
    SlurmQueueConf,
)
from omegaconf import II

from steerlora.cli.sweep import ABOUT, OUTCOMES, Outcome
from steerlora.cli.sweep_progress import job_done
from steerlora.engine.manifests import read_json
from steerlora.text import for_terminal

if TYPE_CHECKING:
    from submitit import AutoExecutor, Job

OUTCOME_DELAY = 10.0  # seconds that a file may take to appear on a shared file system
LONGEST_PAUSE = 30.0  # seconds at most between two queries of the queue
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
)
"""States of a SLURM job that will not run again."""


@dataclass
class SlurmOptions(SlurmQueueConf):
    """``hydra.launcher`` for SLURM jobs: the plugin's options, with defaults that suit us."""

    _target_: str = "hydra_plugins.steerlora_launcher.SlurmLauncher"

    name: str = "steerlora"
    """Name of the jobs in the queue."""

    submitit_folder: str = "${hydra.sweep.dir}/logs/%j"
    """Folder of the logs and of the pickled jobs. It must be on a file system that all nodes
    share."""

    stderr_to_stdout: bool = True
    """Whether errors are written to the same log as the output."""

    gpus_per_node: int | None = II("hydra.launcher.tasks_per_node")
    """GPUs of a job on each node, by default one for every task. Null runs without GPUs. Several
    tasks are the ranks of one training, and need a trainer with a strategy for ranks."""

    timeout_min: int = 240
    """Time limit of a job in minutes. The job saves ``signal_delay_s`` seconds before it, queues
    again and resumes, at most ``max_num_timeout`` times."""

    max_num_timeout: int = 100
    """How often a job may reach its time limit, queue again and resume. At least 0."""

    additional_parameters: dict[str, Any] = field(default_factory=lambda: {"requeue": True})
    """{option of sbatch: value}, for options that have no key here."""

    srun_args: list[str] = field(default_factory=lambda: ["--wait=60"])
    """Options of srun. By default, when the first of several tasks has ended, the others have 60
    seconds to report why they end."""


@dataclass
class LocalOptions(LocalQueueConf):
    """``hydra.launcher`` for processes on this machine, which all run at the same time.

    With ``gpus_per_node=n`` every job sees the machine's first n GPUs; with null, none.
    """

    _target_: str = "hydra_plugins.steerlora_launcher.LocalLauncher"

    submitit_folder: str = "${hydra.sweep.dir}/logs/%j"
    """Folder of the logs and of the pickled jobs."""

    stderr_to_stdout: bool = True
    """Whether errors are written to the same log as the output."""

    timeout_min: int = 7 * 24 * 60
    """Minutes after which a job is ended, by default a week. At least 1."""


def register_options() -> None:
    """Replace the plugin's own options by these. Call it after the plugin has stored its own."""
    for name, options in (("submitit_slurm", SlurmOptions), ("submitit_local", LocalOptions)):
        ConfigStore.instance().store(group="hydra/launcher", name=name, node=options())


class Jobs:
    """What both kinds of submitit jobs have in common: a mixin for the plugin's launchers."""

    params: Mapping[str, Any]
    outcomes: str
    _EXECUTOR: str  # submitit's name of it

    def __call__(self, *arguments: Any) -> Any:
        """In the job: a cluster may not pass on the environment."""
        os.environ[OUTCOMES] = self.outcomes
        return super().__call__(*arguments)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list:
        """Submit the jobs and wait until each has ended. What they give is in their outcomes."""
        from submitit.core.utils import FailedJobError

        self.outcomes = os.environ[OUTCOMES]
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        arguments = [
            (list(overrides), "hydra.sweep.dir", number, f"job_{number}", Singleton.get_state())
            for number, overrides in zip(numbers, job_overrides, strict=True)
        ]
        executor = self._executor()
        try:
            with redirect_stderr(StringIO()):  # submitit prints the error too
                jobs = executor.map_array(self, *zip(*arguments, strict=True))
        except FailedJobError as error:
            reason = " ".join(str(error).split())
            hint = "; hydra.launcher.gpus_per_node=null asks for no GPU" if "gres" in reason else ""
            _refuse(f"the jobs were not accepted: {reason}{hint}")
        print(self._submitted(jobs), flush=True)
        self._wait(dict(zip(numbers, jobs, strict=True)))
        return [self._returned(number) for number in numbers]

    def _returned(self, number: int) -> JobReturn:
        """A job's outcome as Hydra's sweepers read it."""
        outcome = Outcome.read(Path(self.outcomes), number)
        found = JobReturn()
        found.status, found.return_value = JobStatus.COMPLETED, outcome and outcome.value
        return found

    def _executor(self) -> AutoExecutor:
        from submitit import AutoExecutor

        options = {key: value for key, value in self.params.items() if key != "submitit_folder"}
        shared = {option.name for option in fields(BaseQueueConf)}
        own = f"{self._EXECUTOR}_max_num_timeout"
        executor = AutoExecutor(
            folder=self.params["submitit_folder"],
            cluster=self._EXECUTOR,
            **{own: options.pop("max_num_timeout")} if "max_num_timeout" in options else {},
        )
        executor.update_parameters(
            **{
                key if key in shared else f"{self._EXECUTOR}_{key}": value
                for key, value in options.items()
            }
        )
        return executor

    def _submitted(self, jobs: Sequence[Job]) -> str:
        """One line for the user: what was started, and where its logs will be."""
        raise NotImplementedError

    def _ended(self, jobs: Mapping[int, Job]) -> dict[int, str]:
        """{number: last state} of those jobs that will not run again."""
        raise NotImplementedError

    def _wait(self, jobs: dict[int, Job]) -> None:
        """Wait until every job has an outcome: its own, or one that says that it died."""
        folder = Path(self.outcomes)
        shown = read_json(folder / ABOUT)["jobs"]
        silent: dict[int, float] = {}  # jobs that have ended without an outcome, and since when
        pause = 1.0
        ask_at = time.monotonic() + pause
        while jobs:
            time.sleep(1.0)
            os.utime(folder)  # makes a network file system list it again
            for number in list(jobs):
                if outcome := Outcome.read(folder, number):
                    log = _log(jobs.pop(number))
                    if outcome.code == 1:
                        replace(outcome, error=f"{outcome.error}; {log}").write(folder)
                    print(job_done(folder, number, shown), flush=True)
            if (now := time.monotonic()) < ask_at:
                continue
            ended = self._ended(jobs)
            silent = {number: silent.get(number, now) for number in ended}
            for number, since in silent.items():
                if now >= since + OUTCOME_DELAY:
                    line = (
                        f"ended without reporting why ({ended[number]}); {_log(jobs.pop(number))}"
                    )
                    Outcome(number, code=1, error=line).write(folder)
                    print(job_done(folder, number, shown), flush=True)
            pause = 1.0 if silent else min(2 * pause, LONGEST_PAUSE)
            ask_at = now + pause


class SlurmJobs(Jobs):
    """Jobs of a cluster; they outlive this process."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list:
        if shutil.which("sbatch") is None:
            _refuse(
                "hydra/launcher=submitit_slurm: this machine has no sbatch; run it where SLURM is, "
                "or use hydra/launcher=submitit_local, or joblib"
            )
        return super().launch(job_overrides, initial_job_idx)

    def _submitted(self, jobs: Sequence[Job]) -> str:
        number = jobs[0].job_id.split("_")[0]
        return (
            f"SLURM job {number} has the sweep's {len(jobs)} jobs, which outlive this command "
            f"(scancel {number} ends them); logs: {jobs[0].paths.folder.parent}"
        )

    def _ended(self, jobs: Mapping[int, Job]) -> dict[int, str]:
        # Asks the queue, not the accounts, which some clusters do not keep. The queue drops a job
        # some minutes after its end.
        listed = subprocess.run(
            ["squeue", "--me", "--states=all", "--array", "--noheader", "--format=%i %T"],
            capture_output=True,
            text=True,
        )
        if listed.returncode:  # a controller that is busy, or starts again
            return {}
        states = dict(line.split() for line in listed.stdout.splitlines())
        found = {number: states.get(job.job_id) for number, job in jobs.items()}
        return {
            number: f"SLURM job {jobs[number].job_id} {state or 'has left the queue'}"
            for number, state in found.items()
            if state is None or state in ENDED
        }


class LocalJobs(Jobs):
    """Jobs as processes of this machine; they end with this one."""

    def __call__(self, *arguments: Any) -> Any:
        """In the job: without srun, its tasks are told their ranks by torchrun's variables."""
        from submitit.helpers import TorchDistributedEnvironment

        if self.params["tasks_per_node"] > 1:
            os.environ.pop("MASTER_PORT", None)  # jobs at the same time need one each
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        return super().__call__(*arguments)

    def _submitted(self, jobs: Sequence[Job]) -> str:
        return f"the sweep's {len(jobs)} jobs have started; logs: {jobs[0].paths.folder.parent}"

    def _ended(self, jobs: Mapping[int, Job]) -> dict[int, str]:
        return {number: job.state for number, job in jobs.items() if job.done()}


def _log(job: Job) -> str:
    paths = job.task(0).paths
    return f"its log: {paths.stdout if paths.stdout.exists() else paths.folder}"


def _refuse(line: str) -> NoReturn:
    """Print an error and exit. If it were raised, Hydra would print a traceback."""
    shutil.rmtree(os.environ[OUTCOMES])
    print(for_terminal(f"error: {line}"), file=sys.stderr, flush=True)
    raise SystemExit(2)
