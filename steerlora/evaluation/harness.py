"""lm-eval and us: our models as its models, domains as its tasks, its scores as ours."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import lm_eval
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steerlora.errors import UserError, nearest
from steerlora.formats.adapter import load_adapter, trained_under

TASKS = Path(__file__).parent / "tasks"
FEWSHOT_SEED = 1234
"""lm-eval's own default."""

datasets.disable_progress_bars()
for noisy in ("lm_eval", "lm-eval", "lm_eval.evaluator", "lm_eval.models.huggingface"):
    logging.getLogger(noisy).setLevel(logging.ERROR)


@register_model("steerlora")
class SteerLoRALM(HFLM):
    """A base model with an adapter, and if wanted an intervention, for lm-eval.

    ``--model steerlora --model_args pretrained=<base>,adapter=<folder>,intervention=shuffle``

    Args:
        pretrained: directory or hub id of the base, or a live model.
        adapter: folder of a saved adapter; None scores the base (or what a live model carries).
        sae: folder of its SAE, where it is not at the recorded place.
        intervention: a control that acts during every request (``steerlora.models.interventions``),
            or "none"; an adapter that was trained under one must be told which.
        intervention_seed, intervention_domain, intervention_strength: its seed, the true domain for
            ``oracle_domain``, and how much of the changed signal is mixed in, from 0 to 1.
        kwargs: HFLM's own.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        adapter: str | None = None,
        sae: str | None = None,
        intervention: str | None = None,
        intervention_seed: int = 0,
        intervention_domain: str | None = None,
        intervention_strength: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(pretrained=pretrained, **kwargs)
        self.adapter = load_adapter(self.model, adapter, sae=sae) if adapter else None
        if intervention and self.adapter is None:
            raise UserError(f"intervention={intervention} needs adapter=<folder>")
        under = trained_under(adapter) if adapter else "none"
        if intervention is None and under != "none":
            raise UserError(
                f"adapter {adapter} was trained under an intervention: pass intervention={under}, "
                "or intervention=none to score it without"
            )
        self._control = contextlib.nullcontext
        if intervention not in (None, "none"):
            self._control = partial(
                self.adapter.intervention,
                intervention,
                seed=int(intervention_seed),
                domain=intervention_domain,
                strength=float(intervention_strength),
            )

    def generate_until(self, requests, disable_tqdm: bool = True):
        with self._control():
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def loglikelihood(self, requests, disable_tqdm: bool = True):
        with self._control():
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)


@dataclass(frozen=True)
class Domains:
    """What ``domains.json`` of a domains directory says.

    Attributes:
        directory: where it lies.
        names: the domains, in order.
        target_tasks: {domain: task}.
        groups: {average: tasks}.
        metrics: {task: the metric key that is THE score}.
        extra_tasks: tasks reported besides.
    """

    directory: Path
    kind: str
    version: int
    names: tuple[str, ...]
    target_tasks: dict[str, str]
    groups: dict[str, list[str]]
    metrics: dict[str, str]
    extra_tasks: tuple[str, ...] = ()

    @classmethod
    def read(cls, directory: Path) -> Domains:
        said = json.loads((directory / "domains.json").read_text())
        return cls(
            directory=directory,
            kind=said["kind"],
            version=said["version"],
            names=tuple(said["names"]),
            target_tasks=said["target_tasks"],
            groups=said["groups"],
            metrics=said["metrics"],
            extra_tasks=tuple(said.get("extra_tasks", ())),
        )

    @property
    def tasks(self) -> list[str]:
        """Every task, once, in order."""
        grouped = [task for tasks in self.groups.values() for task in tasks]
        return list(dict.fromkeys([*grouped, *self.target_tasks.values(), *self.extra_tasks]))


@dataclass(frozen=True)
class Score:
    """One task's score.

    Attributes:
        metric: lm-eval's key, "name,filter".
        value, stderr: the mean over items and its standard error.
        items: how many.
        version: the task's version.
        per_item: the metric of each item.
        others: the task's other metrics.
    """

    metric: str
    value: float
    stderr: float
    items: int
    version: str
    per_item: list[float]
    others: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Harness:
    """lm-eval with the tasks of one domains directory loaded once.

    Args:
        domains: whose tasks.
        extra_paths: folders of further task files.
    """

    def __init__(self, domains: Domains, extra_paths: Sequence[Path] = ()) -> None:
        self.domains = domains
        self.manager = TaskManager(
            include_path=[str(TASKS / domains.kind), *map(str, extra_paths)],
            include_defaults=False,
            metadata={"domains_dir": str(domains.directory)},
        )
        self._loaded: dict[str, Any] = {}

    def _task(self, name: str):
        if name not in self._loaded:
            # lm-eval skips a task file that does not parse without a word.
            if name not in self.manager.all_tasks:
                raise UserError(f"no lm-eval task {name}: {nearest(name, self.manager.all_tasks)}")
            task = self.manager.load([name])["tasks"][name]
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            self._loaded[name] = task
        return self._loaded[name]

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[str],
        *,
        batch_size: int,
        max_length: int,
        limit: int | None = None,
    ) -> dict[str, Score]:
        """Score a live model (with whatever adapter and intervention it carries) on tasks.

        Raises:
            UserError: an unknown task.
        """
        loaded = {name: self._task(name) for name in tasks}
        with _quiet():
            # Its `evaluate`, not `simple_evaluate`: that one reseeds every random generator and
            # lists the machine's packages by sub-processes, a second a call.
            results = lm_eval.evaluate(
                lm=SteerLoRALM(
                    model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
                ),
                task_dict={"tasks": loaded, "groups": {}, "group_map": {}},
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=True,
            )
        return {name: self._score(name, results) for name in tasks}

    def _score(self, task: str, results: dict) -> Score:
        key = self.domains.metrics.get(task)
        figures = {
            name: value
            for name, value in results["results"][task].items()
            if isinstance(value, float) and "stderr" not in name
        }
        if key is None:
            key = next(iter(figures))
        metric, chosen_filter = key.split(",")
        samples = [s for s in results["samples"][task] if s.get("filter", "none") == chosen_filter]
        per_item = [_number(sample[metric]) for sample in samples]
        return Score(
            metric=key,
            value=figures[key],
            stderr=standard_error(per_item),
            items=len(per_item),
            version=str(results["versions"].get(task)),
            per_item=per_item,
            others={name: value for name, value in figures.items() if name != key},
        )


def standard_error(values: Sequence[float]) -> float:
    """Of the mean, with the sample standard deviation; 0 for fewer than two values."""
    count = len(values)
    if count < 2:
        return 0.0
    mean = sum(values) / count
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)


def averages(scores: dict[str, Score], domains: Domains) -> dict[str, dict[str, float]]:
    """{group: {"value", "stderr"}}: unweighted means over a group's tasks, and the targets."""
    groups = {**domains.groups, "target": list(domains.target_tasks.values())}
    found = {}
    for name, tasks in groups.items():
        scored = [scores[task] for task in tasks if task in scores]
        if scored:
            found[name] = {
                "value": sum(score.value for score in scored) / len(scored),
                "stderr": math.sqrt(sum(score.stderr**2 for score in scored)) / len(scored),
            }
    return found


def _number(value: Any) -> float:
    if isinstance(value, list | tuple):
        return sum(map(float, value)) / max(len(value), 1)
    return float(value)


@contextlib.contextmanager
def _quiet():
    """lm-eval's progress bars out of the way: ours stand in for them."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
