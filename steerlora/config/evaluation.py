"""What is evaluated through lm-eval."""

from __future__ import annotations

from dataclasses import dataclass, field

from steerlora.config.checks import positive
from steerlora.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Which tasks lm-eval scores, and how."""

    batch_size: int = 128
    """Sequences in one batch at most. At least 1."""

    limit: int | None = None
    """Items of each task at most, or of each task in a group of lm-eval's. At least 1; null takes
    all."""

    generation_items: int | None = 40
    """Items at most of each of lm-eval's own tasks with a long written answer. At least 1; null
    takes all."""

    tasks: list[str] | None = None
    """Names of the tasks to score. Null scores every task of ``groups`` and of the domains."""

    max_length: int | None = None
    """Tokens of context at most. At least 1; null takes the model's own limit. A prompt that does
    not fit beside its answer loses its beginning; a warning says how many do, and so does each
    score."""

    max_generated_tokens: int | None = None
    """Tokens of a written answer at most. At least 1; null takes what the task says. Either way,
    an answer has at most half the context."""

    groups: dict[str, list[str]] = field(default_factory=dict)
    """{name of an average: its tasks}, tasks of lm-eval's registry or of the domains. They replace
    the domains' own groups; empty keeps those. The domains' target tasks are scored in any
    case, and so the name "target" is taken."""

    metrics: dict[str, str] = field(default_factory=dict)
    """{task: "metric,filter"}, the metric of lm-eval that is the task's score, such as
    "acc,none". It goes before the metric that the domains name. A task without either takes the
    first metric that lm-eval reports."""

    shots: dict[str, int] = field(default_factory=dict)
    """{task: number of solved examples before each item}, at least 0. Other tasks have the number
    that lm-eval gives them."""

    files: dict[str, str] = field(default_factory=dict)
    """{task: local data in place of the task's dataset on the hub}, a .jsonl file with the same
    columns, or a folder with one such file for each split. For lm-eval's own tasks and groups
    only."""

    spread: bool = False
    """Whether a model that is not trained is split over all visible GPUs, in evaluation and in the
    stages that only read it (activations, features, the SAE's quality)."""

    def __post_init__(self) -> None:
        positive(
            "evaluation", self, "batch_size limit generation_items max_length max_generated_tokens"
        )
        for task, shots in self.shots.items():
            if shots < 0:
                raise UserError(f"evaluation.shots.{task}={shots}: must not be negative")
        if "target" in self.groups:
            raise UserError(
                "evaluation.groups.target: the domains' own tasks have that name; choose another"
            )
        for task, key in self.metrics.items():
            if key.count(",") != 1:
                raise UserError(f"evaluation.metrics.{task}={key}: give metric,filter, as acc,none")
