"""What a configuration would take, before any GPU is paid for: ``stage=plan``.

Parameters, memory of each device by part, arithmetic, time and disk. The base and the method are
built from their own classes and run one step without storage, so that a plan has no formula of any
method; nothing is loaded. tests/planning compares plans with trainings that were measured.
"""

from __future__ import annotations

from rich.console import Console

from steerlora.config import Config
from steerlora.planning import fitting, report
from steerlora.planning.plan import Plan, make
from steerlora.text import for_markup

__all__ = ["Plan", "make", "show"]


def show(console: Console, config: Config) -> None:
    """Print the plan of a configuration.

    Raises:
        UserError: the configuration has no plan, or one that does not fit; says what to change.
    """
    plan = make(config)
    for table in report.tables(plan):
        console.print(table)
    for note in report.notes(plan):
        console.print(for_markup(note), highlight=False)
    fitting.refuse(plan)
