"""The parsed command line."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from steerlora.cli.compose import Sweeper, sweeper_of
from steerlora.cli.overrides import (
    SEARCH_PATH,
    folder_of,
    jobs_of,
    read,
    refuse_lists_of_options,
    samples_of,
    spelt_out,
    with_folders,
    with_own_model,
)
from steerlora.distributed import ranks
from steerlora.errors import UserError

REFUSED = {
    "config_path": "there is one configuration; --config-dir=<folder> adds YAML files of yours",
    "config_name": "there is one configuration; experiment=<name> chooses what it is about",
    "experimental_rerun": "give the same command again, and it goes on where it was",
}
"""{flag of Hydra's that would go round the checks here: what to do instead}."""


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
    """The overrides of every job of a sweep, each job's configuration checked; of a sweep that
    searches, of jobs that it may come to."""

    searches: bool = False
    """Whether Hydra's sweeper chooses the jobs by what earlier ones gave."""

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
        overrides = with_own_model(with_folders(asked.overrides, more))
        jobs: list[list[str]] = []
        sweeper = Sweeper(searches=False, params=[])
        if asked.multirun:
            of_hydra = [item for item in overrides if item.startswith("hydra")]
            sweeper = sweeper_of(of_hydra)
            found = [item for item in of_hydra if item.startswith(SEARCH_PATH)]
            if sweeper.searches:
                own = [item for item in overrides if item not in of_hydra]
                swept = samples_of([*sweeper.params, *own])
            else:
                overrides = spelt_out(overrides)
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
            searches=sweeper.searches,
        )


def _refuse(message: str) -> NoReturn:
    """Stands in for the parser's own `error`, which would print Hydra's usage."""
    raise UserError(f"{message}; steerlora --help and --hydra-help list the flags")
