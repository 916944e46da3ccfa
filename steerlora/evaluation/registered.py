"""Tasks and groups of lm-eval's own registry: found by name, on the hub's data or local files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from steerlora.errors import UserError, nearest
from steerlora.evaluation.local_rows import LocalRows, NoRows

_HOME = Path(lm_eval.tasks.__file__).parent
_FOLDERS = (
    "arc",
    "gsm8k",
    "hellaswag",
    "ifeval",
    "mmlu/default",
    "mmlu_pro",
    "openbookqa",
    "piqa",
    "super_glue/boolq",
    "truthfulqa",
    "winogrande",
)
"""Where the tasks of ``evaluation=paper`` and ``local`` lie. Reading these task files takes a
twentieth of a second; all of lm-eval's 14,000, which any other name needs, several seconds."""
_SHOWN = 5
_LOCAL = (None, "json", "csv", "parquet", "text")
"""What a task of the user's may read in place of a data set of the hub."""


class Loaded(NamedTuple):
    """A task, or a group of tasks with the rule by which lm-eval averages them."""

    tasks: dict[str, Task]
    """{name: task}; of a single task, itself."""
    group: Group | None = None
    """The group; None for a single task."""

    @property
    def generative(self) -> bool:
        """Whether the model writes its answers, rather than weighing given ones."""
        return all(task.OUTPUT_TYPE == "generate_until" for task in self.tasks.values())


@lru_cache(maxsize=1)
def _few() -> TaskManager:
    return TaskManager(
        include_path=[str(_HOME / folder) for folder in _FOLDERS], include_defaults=False
    )


@lru_cache(maxsize=1)
def _all() -> TaskManager:
    return TaskManager()


@lru_cache(maxsize=4)
def _given(folder: str) -> TaskManager:
    return TaskManager(include_path=folder, include_defaults=False)


def find(name: str, folder: str | None = None) -> TaskManager:
    """The index that has a task or group of this name; kept for this process.

    Args:
        name: of the task or group.
        folder: of the user's task files, which go before lm-eval's own.

    Raises:
        UserError: lm-eval has no such name, or has it for tasks that it does not average.
    """
    if folder is not None and name in _given(folder).all_tasks:
        manager = _given(folder)
    else:
        manager = _few() if name in _few().all_tasks else _all()
    if name not in manager.all_tasks:
        theirs = _given(folder).all_tasks if folder is not None else ()
        raise UserError(f"no lm-eval task {name}: {nearest(name, [*theirs, *manager.all_tasks])}")
    single = name in manager.all_subtasks
    if not single and not (name in manager.all_groups and _averages_items(_group(manager, name))):
        members = _members(manager, name)
        more = f" and {len(members) - _SHOWN} more" if len(members) > _SHOWN else ""
        names = ", ".join(members[:_SHOWN]) + more
        raise UserError(
            f"lm-eval does not average the items of {name}, so it is no task: name the tasks in "
            f"it: {names}"
        )
    return manager


def _members(manager: TaskManager, name: str | dict) -> list[str]:
    """The single tasks of a name, in lm-eval's order."""
    if not isinstance(name, str):
        raise UserError(
            "an lm-eval group that changes its tasks cannot be scored here: name the tasks"
        )
    if name not in manager.task_index:
        raise UserError(
            f"no lm-eval task {name} among the task files that name it; a group of "
            "evaluation.include_path has the tasks of its own folder"
        )
    entry = manager.task_index[name]
    if name in manager.all_tags:
        children = sorted(entry.tags)
    elif name in manager.all_groups:
        children = entry.cfg["task"]
    else:
        return [name]
    return [member for child in children for member in _members(manager, child)]


def hub_datasets(name: str, folder: str | None = None) -> list[tuple[str, str | None]]:
    """(hub id, configuration) of every data set that a task or group reads, each once.

    Args:
        name: of the task or group.
        folder: of the user's task files.
    """
    manager = find(name, folder)
    configs = [manager.task_index[member].cfg for member in _members(manager, name)]
    return list(
        dict.fromkeys(
            (config["dataset_path"], config.get("dataset_name"))
            for config in configs
            if config.get("dataset_path") not in _LOCAL
        )
    )


def load(
    name: str,
    *,
    local: LocalRows | None = None,
    shots: int | None = None,
    folder: str | None = None,
    limit: int | None = None,
) -> Loaded:
    """A task or group, ready to be scored.

    Args:
        name: lm-eval's.
        local: rows in place of the hub's data, with the same columns.
        shots: solved examples before each item; None: as the task says.
        folder: of the user's task files.
        limit: items of each task that are scored, the first ones; None: all.

    Raises:
        UserError: no such task; data that cannot be reached, or does not fit the task; a group
            without rows for some of its tasks; examples for a task that fixes their number.
    """
    manager = find(name, folder)
    members = _members(manager, name)
    tasks, without_rows = {}, []
    for member in members:
        config = manager.task_index[member].cfg
        changes = _shots(name, config, shots)
        number = changes.get("num_fewshot", config.get("num_fewshot") or 0)
        try:
            if local:
                changes |= local.changes(config, number, grouped=name != member)
            with _explained(name, config, local):
                tasks[member] = _build(manager, member, changes)
            if local:
                _check_answers(local, tasks[member], limit)
        except NoRows:
            without_rows.append(member)
            continue
        if (found := len(tasks[member].sampler.df)) < number:
            raise UserError(
                f"{member} takes {number} examples and finds {found}: set evaluation.shots.{name}"
            )
    if without_rows:
        more = "" if len(without_rows) <= _SHOWN else f" and {len(without_rows) - _SHOWN} more"
        raise UserError(
            f"{local.key}: no rows for {', '.join(without_rows[:_SHOWN])}{more}, of the "
            f"{len(members)} tasks of {name}: add them, or name in evaluation.groups the tasks "
            "that there are rows for"
        )
    if name in manager.all_subtasks:
        return Loaded(tasks)
    group = _group(manager, name)
    for task in tasks.values():
        group.add(task)
    return Loaded(tasks, group)


def _check_answers(local: LocalRows, task: Task, limit: int | None) -> None:
    """Refuse a row whose answer is not among its choices: lm-eval counts it as wrong, or stops in
    the middle of a run.

    Raises:
        UserError: names the row.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for number, doc in enumerate(islice(task.eval_docs, limit), start=1):
        choices, answer, reason = [], None, ""
        try:
            choices = task.doc_to_choice(doc)
            text = task.doc_to_text(doc)
            # Where the choices are beginnings, the text is the number of the right one.
            answer = text if isinstance(text, int) else task.doc_to_target(doc)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            reason = f" ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
        answers = answer if isinstance(answer, list) else [answer]
        if not all(one in range(len(choices)) or one in choices for one in answers) or not answers:
            shown = "" if answer is None else f" {str(answer)[:50]}"
            raise UserError(
                f"{local.key}: row {number} of {task.config.task}: its answer{shown} is not among "
                f"its {len(choices) or 'own'} choices{reason}: mend the row or leave it out"
            )


def _shots(name: str, config: dict[str, Any], shots: int | None) -> dict[str, int]:
    if shots is None:
        return {}
    if shots and config.get("num_fewshot") == 0:
        raise UserError(f"evaluation.shots.{name}={shots}: lm-eval's task is without examples")
    return {"num_fewshot": shots}


def _build(manager: TaskManager, name: str, changes: dict[str, Any]) -> Task:
    # A task with changes is what lm-eval takes as a member of a group only: by itself it would
    # not inherit the registered one.
    return manager.load({"group": "one", "task": [{"task": name, **changes}]})["tasks"][name]


def _group(manager: TaskManager, name: str) -> Group:
    """lm-eval's group, still without tasks."""
    config = manager.task_index[name].cfg
    keys = ("group", "aggregate_metric_list", "metadata")
    return Group.from_config(deepcopy({key: config.get(key) for key in keys}))


def _averages_items(group: Group) -> bool:
    rules = group.aggregate_metric_list
    return bool(rules) and all(rule.weight_by_size for rule in rules)


@contextmanager
def _explained(name: str, config: dict[str, Any], local: LocalRows | None) -> Iterator[None]:
    """What goes wrong when lm-eval opens a task's data, as the user's mistake that it is."""
    hub = config.get("dataset_path") or "of its own"
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        if local is None and isinstance(error, OSError | ValueError):
            raise UserError(
                f"the data of {name}, {hub}, cannot be reached ({reason}): fetch it first, "
                f"python scripts/download.py evaluation=paper, or give evaluation.files.{name}="
                "<.jsonl file>"
            ) from error
        if local is None:
            raise
        if isinstance(error, IndexError) and config["task"] != name:
            raise NoRows from error  # none is left of those that the task chooses
        raise UserError(
            f"{local.key}: {config['task']} cannot read it ({reason}); its columns have to be "
            f"those of {hub}"
        ) from error
