"""Which tasks are scored and how: what the domains bring, and what the configuration changes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from steerlora.config import EvaluationConfig
from steerlora.evaluation.records import typed

TARGET = "target"
"""The average of the domains' own tasks."""
OWN = ("micro_", "text_")
"""How the names of the tasks begin that domains bring; any other is lm-eval's own."""


@dataclass(frozen=True)
class Domains:
    """What ``domains.json`` of a domains directory says."""

    directory: Path
    """Where it lies."""
    kind: str
    version: int
    names: tuple[str, ...]
    """The domains, in order."""
    target_tasks: dict[str, str]
    """{domain: task}."""
    groups: dict[str, list[str]]
    """{average: tasks}."""
    metrics: dict[str, str]
    """{task: the metric key that is THE score}."""
    extra_tasks: tuple[str, ...] = ()
    """Tasks reported besides."""

    @classmethod
    def read(cls, directory: Path) -> Domains:
        said = json.loads((directory / "domains.json").read_text())
        fields = {name: value for name, value in said.items() if name in cls.__annotations__}
        return typed(cls, {"directory": directory, **fields})


@dataclass(frozen=True)
class Suite:
    """The tasks, groups and metrics in force."""

    domains: Domains
    """Whose own tasks are the targets."""
    config: EvaluationConfig
    """How tasks are run."""

    @property
    def groups(self) -> dict[str, list[str]]:
        """{average: tasks}; the configuration's where it has any, else the domains'."""
        return self.config.groups or self.domains.groups

    @property
    def metrics(self) -> dict[str, str]:
        """{task: the metric key that is THE score}; the configuration's first."""
        return self.domains.metrics | self.config.metrics

    @property
    def averaged(self) -> dict[str, list[str]]:
        """The groups, and the domains' own tasks as one more."""
        return {**self.groups, TARGET: list(self.domains.target_tasks.values())}

    @property
    def tasks(self) -> list[str]:
        """Every task, once, in order."""
        grouped = [task for tasks in self.averaged.values() for task in tasks]
        return list(dict.fromkeys([*grouped, *self.domains.extra_tasks]))

    @property
    def owners(self) -> dict[str, str]:
        """{task: the domain whose own it is}."""
        return {task: domain for domain, task in self.domains.target_tasks.items()}
