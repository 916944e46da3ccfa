"""The command line: compose, check, run, report.

steerlora experiment=micro                        the micro reproduction
steerlora experiment=smoke                        the same path in under a minute
steerlora stage=adapter_training method=lora      one stage, and whatever it needs
steerlora -m method.rank=4,8 stage=evaluate       a sweep
steerlora -m hydra/launcher=submitit_slurm ...    its jobs as SLURM jobs
steerlora stage=inspect_sae sae.path=...          what a given SAE is, and whether it fits the model
steerlora stage=status                            what is stored
steerlora stage=runs method=lora                  what was trained and scored, by settings
steerlora stage=compare runs=[...]                what differs, and which differences hold up
steerlora stage=report experiment=micro           the report on what is stored, and what is missing
steerlora stage=plan model=qwen3_8b trainer=gpu   memory, time and disk, before a GPU is paid for
steerlora ... --cfg job --resolve                 the whole configuration
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import hydra
from omegaconf import DictConfig
from rich.console import Console

from steerlora.cli import compose, sections
from steerlora.cli.command_line import CommandLine
from steerlora.cli.overrides import SEARCH_PATH
from steerlora.cli.places import refuse_unwritable
from steerlora.cli.sweep import (
    has_outcomes,
    logged_as,
    prepare_outcomes,
    print_outcomes,
    run_job,
)
from steerlora.config import Config
from steerlora.distributed import ranks
from steerlora.engine import preemption
from steerlora.engine.manifests import plain
from steerlora.errors import Preempted, RankGone, UserError, WorkerDied
from steerlora.text import for_markup, for_terminal

if TYPE_CHECKING:
    from steerlora.cli.experiment import Plan
    from steerlora.engine.steps import Step

# A log file has no width of its own; 80 columns would squeeze the claims. Of several ranks, the
# first one prints.
console = Console(
    soft_wrap=True,
    width=None if sys.stdout.isatty() else 120,
    emoji=False,
    quiet=not ranks.is_main(),
)
ENDS = (UserError, KeyboardInterrupt, Preempted, RankGone, WorkerDied)
"""Exceptions that end a run before it is complete, each reported in one line."""


def main(arguments: Sequence[str] | None = None) -> None:
    """``steerlora``: exits with 0, 2 (the user's mistake), 130 (interrupted), 75 (preempted: the
    same command resumes the run) or 1."""
    # For a lost connection torch prints a page of C++ frames; our own line names the rank.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = _check(arguments)
        if command.help:
            _print_help()
            return
        if command.multirun:
            prepare_outcomes(command)
        sys.argv = ["steerlora", *command.overrides, *command.flags]
        compose.register_schemas()
        directory = str(sections.config_directory())
        least = 0
        try:
            hydra.main(config_path=directory, config_name="config", version_base="1.3")(_job)()
        except SystemExit:
            # A sweeper that found nothing: what its jobs report says why.
            if not (command.searches and has_outcomes()):
                raise
            least = 1
        if command.multirun:
            raise SystemExit(print_outcomes(command.jobs, console) or least)
    except ENDS as error:
        _end(error)


def _check(arguments: list[str]) -> CommandLine:
    """Refuse every wrong override before any work, those of all jobs of a sweep too."""
    command = CommandLine.parse(arguments)
    if command.informational:
        compose.tree(command.overrides)
        return command
    for job in command.jobs if command.multirun else [command.overrides]:
        config = compose.load(job)
        _runnable(config)
        if command.multirun:
            _planned(config, compose.variant_of(job))
        if command.searches and config.stage is None:
            raise UserError(
                "a sweep that searches needs the figure of one stage: give stage=<name>, such as "
                "stage=evaluate, and study.objective=<figure>"
            )
    return command


def _runnable(config: Config) -> None:
    if config.stage is None and config.study.name == "single":
        raise UserError(
            "nothing to do: give experiment=micro (or smoke, text), or stage=<name>; "
            "steerlora --help lists them"
        )
    if config.stage and config.stage.name == "report" and config.study.name == "single":
        raise UserError("stage=report needs what it reports: give experiment=micro, smoke or text")


def _print_help() -> None:
    console.print(__doc__.strip(), markup=False, highlight=False)
    console.print("\noptions of every group (group=option):")
    for group, options in sections.groups().items():
        console.print(f"  {group}: {', '.join(options)}", markup=False, highlight=False)
    console.print(
        "\nevery key and its value: steerlora ... --cfg job --resolve; Hydra's flags: --hydra-help",
        highlight=False,
    )


def _job(tree: DictConfig) -> float | None:
    """One run, or one job of a sweep; gives what a sweep looks for."""
    console.quiet = not ranks.is_main()  # a launcher may have set the rank only now
    config = compose.typed(tree)
    given = hydra.core.hydra_config.HydraConfig.get().overrides
    overrides = list(given.task)
    found = [text for text in given.hydra if text.startswith(SEARCH_PATH)]
    if config.study.name == "single" and (logged := logged_as()):
        overrides = [*logged, *overrides]
        config = compose.load([*overrides, *found])
    # Libraries' remarks concern no user of ours, and our own are printed by one rank only.
    logging.root.setLevel(logging.WARNING)
    ours = logging.INFO if ranks.is_main() else logging.WARNING
    logging.getLogger("steerlora").setLevel(ours)
    try:
        return run_job(
            lambda: execute(config, compose.variant_of([*overrides, *found]), [*overrides, *found]),
            config.study.objective,
        )
    except ENDS as error:
        _end(error)


def execute(
    config: Config, variant: compose.Compose, overrides: Sequence[str] = ()
) -> tuple[Path, ...]:
    """Run what a configuration asks for.

    Args:
        config: one stage, or an experiment.
        variant: the same run's configuration with some options changed.
        overrides: what the user gave; ``stage=runs`` lists only what agrees with it, and
            ``stage=report`` repeats it in the commands for what is missing.

    Returns:
        The folders of the artifacts of the stage that was asked for; none of an experiment.
    """
    if config.stage and config.stage.name == "plan":
        from steerlora import planning

        planning.show(console, config)
        return ()
    if config.stage and config.stage.name == "status":
        from steerlora.engine.inventory import listing, status_table

        console.print(status_table(listing(Path(config.artifacts.root).expanduser())))
        return ()
    if config.stage and config.stage.name in ("runs", "compare"):
        from steerlora.cli import stored_runs

        if config.stage.name == "runs":
            stored_runs.show(console, config, overrides)
        else:
            stored_runs.compare(console, config)
        return ()
    if config.stage and config.stage.name == "report":
        _report(config, variant, overrides)
        return ()
    with preemption.signals_handled(), ranks.joined(plain(config)):
        return _build(config, variant)


def _build(config: Config, variant: compose.Compose) -> tuple[Path, ...]:
    """Build what is missing, and print the results."""
    # Only now: the command line answers --help and mistakes without importing torch.
    from steerlora.cli import summary
    from steerlora.distributed.strategies import check_hardware
    from steerlora.engine.artifacts import ArtifactStore
    from steerlora.engine.progress import ConsoleProgress
    from steerlora.engine.run import run

    began = time.monotonic()
    planned, steps = _planned(config, variant)
    if planned and planned.left_out:
        others = for_markup(", ".join(planned.left_out))
        console.print(f"of {for_markup(config.study.main_model)} alone: leaves out {others}")
    check_hardware(config.trainer)
    refuse_unwritable(config, reports=planned is not None)
    with ConsoleProgress(console) as progress:
        store = ArtifactStore(config.artifacts.root)
        finished = run(
            steps,
            store,
            workers=config.study.workers,
            progress=progress,
            plugins=config.plugins,
            asked_for=None if planned else steps[0],
        )
    if not ranks.is_main():
        return ()
    if planned:
        from steerlora.cli import experiment

        written = experiment.report(config, planned, finished.artifacts)
        summary.print_experiment(console, config, finished, written, time.monotonic() - began)
        return ()
    summary.print_stage(console, steps, finished, time.monotonic() - began)
    summary.log_reused(steps, finished)
    return tuple(finished[step].path for step in steps)


def _report(config: Config, variant: compose.Compose, overrides: Sequence[str]) -> None:
    """Report on what is stored of an experiment; nothing is built."""
    from steerlora.cli import experiment, summary
    from steerlora.engine.artifacts import ArtifactStore

    planned = experiment.plan(config, variant)
    refuse_unwritable(config, reports=True)
    artifacts = experiment.stored(planned, ArtifactStore(config.artifacts.root))
    absent = experiment.missing(planned, artifacts, overrides)
    written = experiment.report(config, planned, artifacts, absent)
    summary.print_report(console, config, written, absent)


def _planned(config: Config, variant: compose.Compose) -> tuple[Plan | None, tuple[Step, ...]]:
    """The experiment, or None, and the steps to build.

    Raises:
        UserError: a step cannot be built with this configuration.
    """
    if config.stage and config.stage.name in ("status", "plan", "runs", "compare"):
        return None, ()
    if config.stage and config.stage.name != "report":
        from steerlora.engine.steps import STAGES

        STAGES.check("stage.name", config.stage.name)
        return None, tuple(STAGES[config.stage.name].steps(config, variant))
    from steerlora.cli import experiment

    planned = experiment.plan(config, variant)
    return planned, planned.steps


def _end(error: BaseException) -> NoReturn:
    """Print in one line why the run ends, and exit with the code for it."""
    line, code = {
        Preempted: (f"preempted: {error}; the same command goes on from there", 75),
        KeyboardInterrupt: (
            f"interrupted: {error}; the same command goes on from there"
            if str(error)
            else "interrupted: the same command goes on from what was saved last",
            130,
        ),
        RankGone: (f"error: {error}", 1),
        WorkerDied: (f"error: {error}", 1),
    }.get(type(error), (f"error: {error}", 2))
    if ranks.reports(error):
        print(for_terminal(line), file=sys.stderr, flush=True)
    raise SystemExit(code)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # By its importable name: launchers send the job's function to other processes.
    importlib.import_module("steerlora.__main__").main()
