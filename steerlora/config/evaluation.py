"""What is evaluated through lm-eval."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Interval, MinLen

from steerlora.config.checks import Section
from steerlora.config.ranges import Count, Distinct, Location, Matches, NotEmpty
from steerlora.errors import UserError

Tasks = Annotated[list[NotEmpty], MinLen(1), Distinct()]
"""Tasks of lm-eval or of the domains, at least one, each once."""
METRIC = Matches(r"[^,\s]+,[^,\s]+", "metric,filter, as acc,none")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section, key="evaluation"):
    """Which tasks lm-eval scores, and how."""

    batch_size: Count = 128
    """Sequences in one batch at most. At least 1."""

    limit: Count | None = None
    """Items of each task at most, or of each task in a group of lm-eval's. At least 1; null takes
    all."""

    limits: dict[str, Count] = field(default_factory=dict)
    """{task: items at most, in place of ``limit``}, at least 1; of a group of lm-eval's, of each
    task in it."""

    generation_items: Count | None = 40
    """Items at most of each of lm-eval's own tasks with a long written answer. At least 1; null
    takes all."""

    tasks: Tasks | None = None
    """Names of the tasks to score; "target" stands for the domains' own. Null scores every task of
    ``groups`` and of the domains. A causal ablation scores those domains of which it names the
    task, all where it names none; a sequence scores all domains, and after its end those tasks of
    general knowledge that are named."""

    max_length: Count | None = None
    """Tokens of context at most. At least 1; null takes the model's own limit. A prompt that does
    not fit beside its answer loses its beginning; a warning says how many do, and so does each
    score."""

    max_generated_tokens: Count | None = None
    """Tokens of a written answer at most. At least 1; null takes what the task says. Either way,
    an answer has at most half the context."""

    groups: dict[str, Tasks] = field(default_factory=dict)
    """{name of an average: its tasks}, tasks of lm-eval's registry or of the domains. They replace
    the domains' own groups; empty keeps those. The domains' target tasks are scored in any
    case, and so the name "target" is taken."""

    metrics: dict[str, Annotated[str, METRIC]] = field(default_factory=dict)
    """{task: "metric,filter"}, the metric of lm-eval that is the task's score, such as
    "acc,none". It goes before the metric that the domains name. A task without either takes the
    first metric that lm-eval reports."""

    shots: dict[str, Annotated[int, Interval(ge=0, le=1000)]] = field(default_factory=dict)
    """{task: number of solved examples before each item}, at least 0. Other tasks have the number
    that lm-eval gives them."""

    files: dict[str, Location] = field(default_factory=dict)
    """{task: local data in place of the task's dataset on the hub}, a .jsonl file with the same
    columns, or a folder with one such file for each split. For lm-eval's own tasks and groups
    only."""

    folder: Location | None = None
    """Folder of jsonl files with data of lm-eval's own tasks: ``<name>_test.jsonl``, and for solved
    examples ``<name>_train.jsonl`` or ``<name>_dev.jsonl``, each with the columns of the task's
    dataset on the hub. A task reads the file whose name it begins with (truthfulqa_mc2 reads
    truthfulqa), and ``files`` go before it. Null: no such folder."""

    include_path: Location | None = None
    """Folder of task files of lm-eval's form, whose tasks ``groups`` and ``tasks`` may name. Null:
    lm-eval's own tasks only."""

    spread: bool = False
    """Whether a model that is not trained is split over all visible GPUs, in evaluation and in the
    stages that only read it (activations, features, the SAE's quality)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "target" in self.groups:
            raise UserError(
                "evaluation.groups.target: the domains' own tasks have that name; choose another"
            )
