"""What a finished run prints: what it measured, how long each stage took, where to look."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from steerlora.config import Config
from steerlora.engine.run import RunReport
from steerlora.engine.steps import Step
from steerlora.reporting import runs
from steerlora.reporting.report_page import FILE
from steerlora.text import for_markup, for_terminal

if TYPE_CHECKING:
    from steerlora.reporting.report import Report
    from steerlora.reporting.report_page import MissingCell


def print_experiment(
    console: Console, config: Config, run: RunReport, written: Report, seconds: float
) -> None:
    """Print the claims, times and folders of a finished experiment."""
    console.print(written.terminal)
    _print_times(console, run)
    _print_place(console, config)
    root = for_markup(config.artifacts.root)
    console.print(f"artifacts: {root}/ (steerlora stage=status lists them)")
    console.print(
        f"{for_markup(config.study.name)}: {seconds:.0f} s in all, "
        f"peak memory {run.peak_memory_bytes / 2**30:.1f} GiB"
    )


def print_report(
    console: Console, config: Config, written: Report, missing: Sequence[MissingCell]
) -> None:
    """Print the claims of an experiment that may have gaps, and the commands that fill these."""
    console.print(written.terminal)
    for cell in missing:
        console.print(f"missing: {for_markup(cell.label)}")
        console.print(f"  {for_terminal(cell.command)}", markup=False, highlight=False)
    console.print(f"{len(missing)} missing" if missing else "nothing is missing")
    _print_place(console, config)


def _print_place(console: Console, config: Config) -> None:
    folder = for_markup(Path(config.results.dir))
    console.print(f"tables, figures and claims: {folder}/ (begin with {folder}/{FILE})")


def print_stage(console: Console, steps: Sequence[Step], run: RunReport, seconds: float) -> None:
    """Print the summary and the folder of every requested artifact."""
    for step in steps:
        artifact = run[step]
        table = Table(title=for_markup(step.label), show_header=False)
        for name, value in artifact.manifest["summary"].items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            table.add_row(for_markup(name), for_markup(shown))
        console.print(table)
        line = for_terminal(f"{step.stage}: {artifact.path}")
        console.print(line, markup=False, highlight=False)
    _print_times(console, run)
    console.print(f"{seconds:.0f} s in all")


def log_reused(steps: Sequence[Step], run: RunReport) -> None:
    """A light W&B run for every requested artifact that this run did not build."""
    reused = {(time.stage, time.label) for time in run.steps if time.reused}
    for step in steps:
        logger = getattr(step.config, "logger", None)
        if logger is not None and (step.stage, step.label) in reused:
            runs.log_reused(run[step], logger, asked_for=step is steps[0])


def _print_times(console: Console, run: RunReport) -> None:
    """Print the seconds of each stage, and how many artifacts were built and reused."""
    seconds: dict[str, float] = defaultdict(float)
    built: dict[str, int] = defaultdict(int)
    reused: dict[str, int] = defaultdict(int)
    for step in run.steps:
        seconds[step.stage] += step.seconds
        (reused if step.reused else built)[step.stage] += 1
    parts = [
        f"{name} {seconds[name]:.0f} s ({built[name]} built, {reused[name]} reused)"
        for name in seconds
    ]
    console.print("stages: " + ", ".join(parts), markup=False)
