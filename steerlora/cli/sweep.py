"""The parsed command line, and the outcomes of a sweep's jobs."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console

from steerlora.cli.compose import load, tree
from steerlora.cli.overrides import (
    SEARCH_PATH,
    folder_of,
    jobs_of,
    read,
    refuse_lists_of_options,
    spelt_out,
    with_folders,
)
from steerlora.distributed import ranks
from steerlora.engine.manifests import read_json, write_json
from steerlora.errors import UserError

ABOUT = "sweep.json"
"""File of that folder that says what the sweep is called and what it varies."""

OUTCOMES = "STEERLORA_SWEEP_OUTCOMES"
"""Environment variable: the folder where the jobs of a sweep write how they ended."""

LONGEST = 40  # characters of what a sweep varies, in its name
REFUSED = {
    "config_path": "there is one configuration; --config-dir=<folder> adds YAML files of yours",
    "config_name": "there is one configuration; experiment=<name> chooses what it is about",
    "experimental_rerun": "give the same command again, and it goes on where it was",
}
"""{flag of Hydra's that would go round the checks here: what to do instead}."""


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

    artifacts: tuple[str, ...] = ()
    """Folders of what the job was asked for; empty for an experiment."""

    @classmethod
    def read(cls, folder: Path, job: int) -> Outcome | None:
        """The outcome that a job wrote; None if it has not written one yet."""
        path = folder / f"{job}.json"
        if not path.exists():
            return None
        written = json.loads(path.read_text())
        return cls(**{**written, "artifacts": tuple(written["artifacts"])})

    def write(self, folder: Path) -> None:
        """Write it whole or not at all, since a launcher may read at any time."""
        part = folder / f"{self.job}.part"
        part.write_text(json.dumps(asdict(self)))
        part.rename(folder / f"{self.job}.json")


@dataclass(frozen=True)
class CommandLine:
    """The parsed arguments of ``steerlora``."""

    flags: list[str]
    """The arguments that Hydra is given besides the overrides."""

    overrides: list[str]
    """The ``key=value`` arguments; what ``--config-dir`` says is ``hydra.searchpath`` among them,
    and a sweep's values are spelt out."""

    multirun: bool
    """Whether a sweep is asked for (``-m``)."""

    informational: bool
    """Whether only help or the configuration is asked for, and nothing is run."""

    help: bool
    """Whether SteerLoRA's own help is asked for."""

    jobs: list[list[str]] = field(default_factory=list)
    """The overrides of every job of a sweep, each job's configuration checked."""

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> CommandLine:
        """Parse the arguments of a run or a sweep.

        Raises:
            UserError: a wrong flag, flags that exclude each other, or a wrong override of a sweep.
        """
        parser = get_args_parser()
        parser.error = _refuse
        asked = parser.parse_intermixed_args(list(arguments))
        informational = bool(asked.help or asked.hydra_help or asked.cfg or asked.info)
        if asked.resolve and not asked.cfg:
            raise UserError("--resolve goes with --cfg job")
        if asked.multirun and ranks.current().world > 1:
            raise UserError(
                "a sweep is started once, not by every rank: leave torchrun or srun out, and give "
                "hydra/launcher=submitit_local hydra.launcher.tasks_per_node=2 for two ranks a job"
            )
        if asked.multirun and informational:
            raise UserError("--multirun runs jobs: leave it out to be shown something")
        for flag, instead in REFUSED.items():
            if getattr(asked, flag):
                raise UserError(f"--{flag.replace('_', '-')}: {instead}")
        more = [folder_of("--config-dir", asked.config_dir)] if asked.config_dir else []
        refuse_lists_of_options(read(asked.overrides))
        overrides = with_folders(asked.overrides, more)
        jobs: list[list[str]] = []
        if asked.multirun:
            overrides = spelt_out(overrides)
            of_hydra = [item for item in overrides if item.startswith("hydra")]
            tree(of_hydra)
            found = [item for item in of_hydra if item.startswith(SEARCH_PATH)]
            swept = jobs_of([item for item in overrides if item not in of_hydra])
            jobs = [[*job, *found] for job in swept]
        of_ours = ArgumentParser(add_help=False)
        of_ours.add_argument("--config-dir", "-cd")
        _, rest = of_ours.parse_known_args(list(arguments))
        return cls(
            # Hydra reads overrides only up to the first flag.
            flags=[argument for argument in rest if argument not in asked.overrides],
            overrides=overrides,
            multirun=asked.multirun,
            informational=informational,
            help=asked.help,
            jobs=jobs,
        )


def prepare_outcomes(jobs: Sequence[Sequence[str]]) -> None:
    """Make the folder where the jobs of a sweep, on any machine, write their outcomes.

    Args:
        jobs: the overrides of every job.

    Raises:
        UserError: nothing can be written there.
    """
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
    write_json(Path(os.environ[OUTCOMES]) / ABOUT, {"name": name, "varied": keys})


def varied(jobs: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Of every job, the overrides that are not the same in all jobs, as {key: value}."""
    common = set.intersection(*map(set, jobs))
    return [
        {key.lstrip("+"): value for key, _, value in (item.partition("=") for item in own)}
        for own in ([item for item in job if item not in common] for job in jobs)
    ]


def logged_as() -> list[str]:
    """Overrides by which W&B lists a job with its sweep, and names it after what varies; none
    outside a sweep. The user's own take precedence."""
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        return []
    about = read_json(Path(os.environ[OUTCOMES]) / ABOUT)
    keys = ",".join(f"'{key}'" for key in about["varied"])
    return [f"logger.group='{about['name']}'", f"logger.varied=[{keys}]"]


def run_job(work: Callable[[], Sequence[Path]]) -> None:
    """Do the work of one run. In a sweep, write its outcome; a failure does not stop the others.

    Args:
        work: gives the folders of the artifacts that were asked for.
    """
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        work()
        return
    if int(hydra.job.num):
        os.environ.pop("WANDB_RUN_ID", None)  # it belongs to one run, of the first job
    code, error = 0, ""
    began, found = time.monotonic(), ()
    try:
        found = work()
    except UserError as mistake:
        code, error = 2, str(mistake)
    except Exception as failure:
        traceback.print_exc()
        code, error = 1, f"{type(failure).__name__}: {failure}"
    if ranks.is_main():
        Outcome(
            job=int(hydra.job.num),
            code=code,
            error=error,
            seconds=time.monotonic() - began,
            artifacts=tuple(map(str, found)),
        ).write(Path(os.environ[OUTCOMES]))


def print_outcomes(jobs: Sequence[Sequence[str]], console: Console) -> int:
    """Print what came of every job of a sweep, write it as CSV, and remove the folder of outcomes.

    Args:
        jobs: the overrides of every job.
        console: where the table is printed.

    Returns:
        The sweep's exit code, the worst of the jobs'.
    """
    # Only now: --help and mistakes are answered without pandas.
    from steerlora.cli.sweep_table import Line, rows_in, sweep_data, sweep_table

    folder = Path(os.environ.pop(OUTCOMES))
    lines, codes = [], set()
    for number, own in enumerate(varied(jobs)):
        outcome = Outcome.read(folder, number) or Outcome(
            number, code=1, error="it did not report how it ended"
        )
        ended = f"failed: {outcome.error}" if outcome.code else "done"
        for row in rows_in(outcome.artifacts):
            lines.append(Line(number, own, outcome.seconds, ended, row))
        codes.add(outcome.code)
    path = folder.with_name(f"{read_json(folder / ABOUT)['name']}.csv")
    shutil.rmtree(folder)
    try:
        sweep_data(lines).to_csv(path, index=False)
    except OSError as error:
        console.print(f"the table cannot be written to {path} ({error.strerror})", markup=False)
        path = None
    console.print(sweep_table(lines, path))
    return 1 if 1 in codes else max(codes)


def _refuse(message: str) -> NoReturn:
    """Stands in for the parser's own `error`, which would print Hydra's usage."""
    raise UserError(f"{message}; steerlora --help and --hydra-help list the flags")
