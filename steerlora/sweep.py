"""Sweeps: what the command line asks for, and how each job of a sweep ended."""

from __future__ import annotations

import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console
from rich.table import Table

from steerlora.compose import check_sweep
from steerlora.errors import UserError

OUTCOMES = "STEERLORA_SWEEP_OUTCOMES"
"""Environment variable: the folder where the jobs of a sweep write how they ended."""

_FLAGS = ("-m", "--multirun")
_INFORMATIONAL = ("--cfg", "-c", "--help", "-h", "--hydra-help", "--info", "-i", "--version")
_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn")


@dataclass(frozen=True)
class Sweep:
    """A command line, read.

    Attributes:
        arguments: all of it.
        overrides: its ``key=value`` part.
        multirun: it is a sweep.
        informational: it only asks for help or for the configuration.
        jobs: the overrides of every job of a sweep, checked.
    """

    arguments: list[str]
    overrides: list[str]
    multirun: bool
    informational: bool
    jobs: list[list[str]] = field(default_factory=list)

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Sweep:
        overrides, skip = [], False
        for argument in arguments:
            if skip:
                skip = False
            elif argument in _WITH_VALUE:
                skip = True
            elif not argument.startswith("-"):
                overrides.append(argument)
        multirun = any(flag in arguments for flag in _FLAGS)
        informational = any(argument.split("=")[0] in _INFORMATIONAL for argument in arguments)
        jobs: list[list[str]] = []
        if multirun and not informational:
            hydra_free = [item for item in overrides if not item.startswith("hydra")]
            jobs = check_sweep(hydra_free)
            os.environ[OUTCOMES] = tempfile.mkdtemp(prefix="steerlora-sweep-")
        return cls(list(arguments), overrides, multirun, informational, jobs)

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
