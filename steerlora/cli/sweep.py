"""The jobs of a sweep: what varies, how each ended, and the table of them all."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console

from steerlora.cli.command_line import CommandLine
from steerlora.cli.compose import load
from steerlora.cli.sweep_progress import job_done, job_started
from steerlora.distributed import ranks
from steerlora.engine.manifests import read_json, write_json
from steerlora.errors import UserError, nearest
from steerlora.reporting.wandb_agent import OF_ONE_RUN

OUTCOMES = "STEERLORA_SWEEP_OUTCOMES"
"""Environment variable: the folder where the jobs of a sweep write how they ended."""

ABOUT = "sweep.json"
"""File of that folder that says what the sweep is called and varies, and whether it searches."""

LONGEST = 40  # characters of what a sweep varies, in its name


@dataclass(frozen=True)
class Outcome:
    """How a job of a sweep ended."""

    job: int
    """Number of the job in the sweep, from 0."""

    code: int = 0
    """The exit code that it would have as a run of its own; 0 for success."""

    error: str = ""
    """Why ``code`` is not 0. Empty for success."""

    seconds: float = 0.0
    """Wall time of the job."""

    value: float | None = None
    """The figure that a sweep looks for; None if the job failed, or nothing searches."""

    artifacts: tuple[str, ...] = ()
    """Folders of what the job was asked for; empty for an experiment."""

    overrides: tuple[str, ...] = ()
    """What the job was given."""

    @classmethod
    def read(cls, folder: Path, job: int) -> Outcome | None:
        """The outcome that a job wrote; None if it has not written one yet."""
        path = folder / f"{job}.json"
        if not path.exists():
            return None
        written = json.loads(path.read_text())
        lists = {name: tuple(written[name]) for name in ("artifacts", "overrides")}
        return cls(**{**written, **lists})

    def write(self, folder: Path) -> None:
        """Write it whole or not at all, since a launcher may read at any time."""
        part = folder / f"{self.job}.part"
        part.write_text(json.dumps(asdict(self)))
        part.rename(folder / f"{self.job}.json")


def prepare_outcomes(command: CommandLine) -> None:
    """Make the folder where the jobs of a sweep, on any machine, write their outcomes.

    Args:
        command: of the sweep.

    Raises:
        UserError: nothing can be written there.
    """
    jobs = command.jobs
    root = Path(load(jobs[0]).artifacts.root).resolve() / "sweeps"
    try:
        root.mkdir(parents=True, exist_ok=True)
        os.environ[OUTCOMES] = tempfile.mkdtemp(prefix=".outcomes-", dir=root)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename} ({error.strerror}): "
            "choose another place with artifacts.root=DIR"
        ) from error
    keys = list(dict.fromkeys(key for own in varied(jobs) for key in own))
    short = "-".join(key.rpartition(".")[2] for key in keys) or "sweep"
    name = f"{re.sub(r'[^0-9A-Za-z_-]+', '-', short)[:LONGEST]}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    # How many trials a search will have is its sweeper's affair.
    shown = [] if command.searches else [_shown(own) for own in varied(jobs)]
    about = {"name": name, "varied": keys, "searches": command.searches, "jobs": shown}
    write_json(Path(os.environ[OUTCOMES]) / ABOUT, about)


def varied(jobs: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Of every job, the overrides that are not the same in all jobs, as {key: value}."""
    common = set.intersection(*map(set, jobs))
    return [
        {key.lstrip("+"): value for key, _, value in (item.partition("=") for item in own)}
        for own in ([item for item in job if item not in common] for job in jobs)
    ]


def _shown(own: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in own.items())


def logged_as() -> list[str]:
    """Overrides by which W&B lists a job with its sweep, and names it after what varies; none
    outside a sweep. The user's own take precedence."""
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        return []
    about = read_json(Path(os.environ[OUTCOMES]) / ABOUT)
    keys = ",".join(f"'{key}'" for key in about["varied"])
    return [f"logger.group='{about['name']}'", f"logger.varied=[{keys}]"]


def run_job(work: Callable[[], Sequence[Path]], objective: str) -> float | None:
    """Do the work of one run. In a sweep, write its outcome; a failure does not stop the others.

    Args:
        work: gives the folders of the artifacts that were asked for.
        objective: the figure of theirs that a sweep looks for.

    Returns:
        That figure, for a sweeper that searches; None if the job failed, or nothing searches.
    """
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        work()
        return None
    if int(hydra.job.num):
        for name in OF_ONE_RUN:  # of the first job
            os.environ.pop(name, None)
    code, error, value = 0, "", None
    number, folder = int(hydra.job.num), Path(os.environ[OUTCOMES])
    about = read_json(folder / ABOUT)
    if ranks.is_main():
        print(job_started(folder, number, about["jobs"]), flush=True)
    began, found = time.monotonic(), ()
    try:
        found = work()
        if about["searches"] and ranks.is_main():
            value = value_of(found, objective)
    except UserError as mistake:
        code, error = 2, str(mistake)
    except Exception as failure:
        traceback.print_exc()
        code, error = 1, f"{type(failure).__name__}: {failure}"
    if ranks.is_main():
        Outcome(
            job=number,
            code=code,
            error=error,
            seconds=time.monotonic() - began,
            artifacts=tuple(map(str, found)),
            overrides=tuple(hydra.overrides.task),
            value=value,
        ).write(folder)
        print(job_done(folder, number, about["jobs"]), flush=True)
    return value


def value_of(folders: Sequence[Path], objective: str) -> float:
    """The figure of some artifacts that a sweep looks for; of the first that has it.

    Raises:
        UserError: none of them has it.
    """
    from steerlora.cli.sweep_table import rows_in

    figures = [row.figures for row in rows_in(list(map(str, folders))) if row is not None]
    for found in figures:
        if objective in found:
            return found[objective].value
    known = nearest(objective, [name for found in figures for name in found])
    raise UserError(f"study.objective={objective}: there is no such figure; {known}")


def has_outcomes() -> bool:
    """Whether any job of this command's sweep has said how it ended."""
    folder = os.environ.get(OUTCOMES)
    return folder is not None and bool(_numbers(Path(folder)))


def print_outcomes(jobs: Sequence[Sequence[str]], console: Console) -> int:
    """Print what came of every job of a sweep, write it as CSV, and remove the folder of outcomes.

    Args:
        jobs: the overrides of every job; a sweep that searches has run others.
        console: where the table is printed.

    Returns:
        The sweep's exit code, the worst of the jobs'.
    """
    # Only now: --help and mistakes are answered without pandas.
    from steerlora.cli.sweep_table import Line, rows_in, sweep_data, sweep_table

    folder = Path(os.environ.pop(OUTCOMES))
    about = read_json(folder / ABOUT)
    given = _chosen(folder, about["varied"]) if about["searches"] else varied(jobs)
    lines, codes = [], set()
    for number, own in enumerate(given):
        outcome = Outcome.read(folder, number) or Outcome(
            number, code=1, error="it did not report how it ended"
        )
        ended = f"failed: {outcome.error}" if outcome.code else "done"
        for row in rows_in(outcome.artifacts):
            lines.append(Line(number, own, outcome.seconds, ended, row))
        codes.add(outcome.code)
    path = folder.with_name(f"{about['name']}.csv")
    shutil.rmtree(folder)
    try:
        sweep_data(lines).to_csv(path, index=False)
    except OSError as error:
        console.print(f"the table cannot be written to {path} ({error.strerror})", markup=False)
        path = None
    console.print(sweep_table(lines, path))
    return 1 if 1 in codes else max(codes)


def _chosen(folder: Path, keys: Sequence[str]) -> list[dict[str, str]]:
    """Of every job that a sweeper chose, the overrides of what the sweep varies."""
    numbers = _numbers(folder)
    found: list[dict[str, str]] = [{} for _ in range(max(numbers) + 1)]
    for number in numbers:
        outcome = Outcome.read(folder, number)
        given = (text.partition("=") for text in (outcome.overrides if outcome else ()))
        found[number] = {key: value for key, _, value in given if key in keys}
    return found


def _numbers(folder: Path) -> list[int]:
    """Of the jobs that have written an outcome."""
    return [int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit()]
