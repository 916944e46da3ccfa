"""Which tasks are scored and how: what the domains bring, and what the configuration changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerlora.config import EvaluationConfig
from steerlora.engine.manifests import read_json
from steerlora.errors import UserError
from steerlora.evaluation.records import typed
from steerlora.text import is_plain_name

TARGET = "target"
"""The average of the domains' own tasks."""
KINDS = ("micro", "text", "classification")
"""Kinds of domains that artifacts hold: each has a folder of task files here."""
OWN = tuple(f"{kind}_" for kind in KINDS)
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
    written_tasks: dict[str, str] = field(default_factory=dict)
    """{domain: the extra task that asks the same, and has the answer written out}; sequences score
    it too. Empty where targets are no classification."""

    @classmethod
    def read(cls, directory: Path) -> Domains:
        """The description of a domains artifact, which may be anyone's.

        Raises:
            UserError: it is missing, or has another form. Names become parts of paths, and lm-eval
                runs the code of the task files of a kind: both are taken from closed lists.
        """
        path = directory / "domains.json"
        said = read_json(path)
        if not _well_formed(said):
            raise UserError(f"{path} does not describe domains: build them again")
        fields = {name: value for name, value in said.items() if name in cls.__annotations__}
        return typed(cls, fields | {"directory": directory})


def _well_formed(said: Any) -> bool:
    """Whether ``domains.json`` says what `Domains` holds, with names of their own kind."""
    needed = {"kind", "version", "names", "target_tasks", "groups", "metrics"}
    if not isinstance(said, dict) or not needed <= set(said) or said["kind"] not in KINDS:
        return False
    names, targets, groups = said["names"], said["target_tasks"], said["groups"]
    extra, metrics = said.get("extra_tasks", []), said["metrics"]
    written = said.get("written_tasks", {})
    if not (
        isinstance(said["version"], int)
        and isinstance(targets, dict)
        and isinstance(groups, dict)
        and isinstance(written, dict)
        and _are_names(names)
        and _are_names([*targets.values()])
        and _are_names(extra)
        and all(map(_are_names, groups.values()))
        and isinstance(metrics, dict)
        and all(isinstance(metric, str) for metric in metrics.values())
    ):
        return False
    tasks = [*targets.values(), *extra, *metrics, *(task for of in groups.values() for task in of)]
    return (
        0 < len(names) == len(set(names))
        and set(targets) == set(names)
        and (not written or set(written) == set(names))
        and all(task in extra for task in written.values())
        and all(str(task).startswith(f"{said['kind']}_") for task in tasks)
    )


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_plain_name, value))


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
    def chosen(self) -> list[str]:
        """The tasks to score: those that the configuration names, or every task."""
        if self.config.tasks is None:
            return self.tasks
        own = self.averaged[TARGET]
        named = [own if name == TARGET else [name] for name in self.config.tasks]
        return list(dict.fromkeys(task for tasks in named for task in tasks))

    def limit_of(self, task: str) -> int | None:
        """Items of a task at most, or of each task in a group; None: all."""
        return self.config.limits.get(task, self.config.limit)

    @property
    def owners(self) -> dict[str, str]:
        """{task: the domain whose own it is}."""
        return {task: domain for domain, task in self.domains.target_tasks.items()}
