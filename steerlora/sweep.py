"""Sweeps: what the command line asks for, and how each job of a sweep ended."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console
from rich.table import Table

from steerlora.compose import check_sweep
from steerlora.errors import UserError

OUTCOMES = "STEERLORA_SWEEP_OUTCOMES"
"""Environment variable: the folder where the jobs of a sweep write how they ended."""


@dataclass(frozen=True)
class Sweep:
    """A command line, read.

    Attributes:
        arguments: all of it, the overrides first.
        overrides: its ``key=value`` part.
        multirun: it is a sweep.
        informational: it only asks for help or for the configuration.
        help: it asks for our own help.
        jobs: the overrides of every job of a sweep, checked.
    """

    arguments: list[str]
    overrides: list[str]
    multirun: bool
    informational: bool
    help: bool
    jobs: list[list[str]] = field(default_factory=list)

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Sweep:
        parser = get_args_parser()
        parser.error = _refuse
        asked = parser.parse_intermixed_args(list(arguments))
        informational = bool(asked.help or asked.hydra_help or asked.cfg or asked.info)
        if asked.resolve and not asked.cfg:
            raise UserError("--resolve goes with --cfg job")
        if asked.multirun and informational:
            raise UserError("--multirun runs jobs: leave it out to be shown something")
        jobs: list[list[str]] = []
        if asked.multirun:
            jobs = check_sweep([item for item in asked.overrides if not item.startswith("hydra")])
        # Hydra reads overrides only up to the first flag.
        flags = [argument for argument in arguments if argument not in asked.overrides]
        return cls(
            arguments=[*asked.overrides, *flags],
            overrides=asked.overrides,
            multirun=asked.multirun,
            informational=informational,
            help=asked.help,
            jobs=jobs,
        )

    def open(self) -> None:
        """Where the jobs, whatever process they run in, write how they ended."""
        os.environ[OUTCOMES] = tempfile.mkdtemp(prefix="steerlora-sweep-")

    @staticmethod
    def record(work: Callable[[], None]) -> None:
        """Do one job; in a sweep, note how it ended: one failure does not stop the others."""
        hydra = HydraConfig.get()
        if hydra.mode != RunMode.MULTIRUN:
            work()
            return
        outcome = {"job": int(hydra.job.num), "overrides": hydra.job.override_dirname, "code": 0}
        began = time.monotonic()
        try:
            work()
        except UserError as error:
            outcome |= {"code": 2, "error": str(error)}
        except Exception as error:
            traceback.print_exc()
            outcome |= {"code": 1, "error": f"{type(error).__name__}: {error}"}
        outcome["seconds"] = time.monotonic() - began
        folder = Path(os.environ[OUTCOMES])
        (folder / f"{outcome['job']}.json").write_text(json.dumps(outcome))

    def close(self, console: Console) -> int:
        """Print how every job ended; the exit code is the worst one."""
        folder = Path(os.environ.pop(OUTCOMES))
        outcomes = [json.loads(path.read_text()) for path in folder.glob("*.json")]
        shutil.rmtree(folder)
        table = Table(title="sweep")
        for column in ("job", "overrides", "seconds", "outcome"):
            table.add_column(column)
        for outcome in sorted(outcomes, key=lambda item: item["job"]):
            ended = "done" if outcome["code"] == 0 else f"failed: {outcome['error']}"
            seconds = f"{outcome['seconds']:.1f}"
            table.add_row(str(outcome["job"]), outcome["overrides"], seconds, ended)
        console.print(table)
        if len(outcomes) < len(self.jobs):
            console.print(f"{len(self.jobs) - len(outcomes)} jobs did not report how they ended")
            return 1
        codes = {outcome["code"] for outcome in outcomes}
        return 1 if 1 in codes else max(codes, default=0)


def _refuse(message: str) -> NoReturn:
    """Hydra's parser prints its usage; a mistake is one line here."""
    raise UserError(f"{message}; steerlora --help and --hydra-help list the flags")
