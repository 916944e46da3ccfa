"""What stages hand to reports: a typed record of an evaluation, of an ablation, of a sequence.

A record is a JSON file of its stage's artifact. Another `SCHEMA` means another artifact: the number
is part of the versions of the stages that write records, so nothing old is reused, and a file that
is read directly is refused where its number differs.

Shapes: D domains, T domains of a sequence, E specialists.
"""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from steerlora.engine.manifests import read_json, write_json
from steerlora.errors import UserError
from steerlora.evaluation.scores import Estimate, Score

SCHEMA = 1
"""Raised when a field of a record gets another name, type or meaning."""

BASE = "none"
"""The method of a record of the base model."""

INTACT = "intact"
"""The name, among an ablation's interventions, of none."""


@dataclass(frozen=True, kw_only=True)
class RoutingSummary:
    """How evenly specialists are used, over real tokens.

    The formulas are those of the class that measures it.
    """

    usage_entropy: float
    """Entropy of the mean gate over active specialists, in units of log E: 1 even, 0 collapsed."""
    token_entropy: float
    """Mean entropy of a token's gate, in units of log E; 0 is a hard choice."""
    load_cv2: float
    """Squared coefficient of variation of the specialists' loads."""
    dead_specialists: int
    """Active specialists that are next to never used."""
    max_load: float
    """Share of the most used specialist, 1/E to 1."""
    mean_rank: float
    """Mean over tokens of the sum of the rank mask, in rank components."""


@dataclass(frozen=True, kw_only=True)
class RoutingAtStep(RoutingSummary):
    """A measurement during training."""

    step: int
    """Optimizer steps done."""


@dataclass(frozen=True, kw_only=True)
class Routing(RoutingSummary):
    """Routing of one control site over held-out text of every domain."""

    routed: float
    """Share of the tokens that have an update at all."""
    mutual_information: float
    """Of domains and specialists, normalised, 0 to 1; 1: each domain has its own specialist."""
    mutual_information_null: float
    """Its mean where the domains' labels are permuted over sequences."""
    mutual_information_null_95: float
    """The 0.95 quantile of the same."""
    gate_by_domain: dict[str, list[float]]
    """{domain: mean gate [E]}."""
    rank_by_domain: dict[str, float]
    """{domain: mean rank of a token}."""
    tokens: int
    """How many tokens were seen."""


@dataclass(frozen=True, kw_only=True)
class OfOneRun:
    """Where a record comes from."""

    model: str
    """Name of the base model."""
    method: str
    """Name of the method that adapted it; `BASE` for none."""
    seed: int
    """Of the adapted model, its data order and the interventions' draws; 0 for the base."""
    fingerprint: str
    """Of the artifact."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(OfOneRun):
    """The base model or an adapted one on every task."""

    domains: tuple[str, ...]
    """The D domains, in order."""
    tasks: dict[str, Score]
    """{task: score}."""
    averages: dict[str, Estimate]
    """{group of tasks: their unweighted mean}; "target" is the domains' own tasks."""
    groups: dict[str, list[str]]
    """{group: tasks}, without "target"; some of the tasks may not have been asked for."""
    target_tasks: dict[str, str]
    """{domain: its own task}."""
    intervention: str = "none"
    """The change of the control signal that acted during every task."""
    phase: str = "evaluation"
    """"training": the method was also trained under the intervention."""
    routing_by_site: dict[int, Routing] = field(default_factory=dict)
    """{layer of the control site: routing}; empty where nothing is routed."""
    routing_history: tuple[RoutingAtStep, ...] = ()
    """Routing of the first control site in the course of training."""
    stand_ins: tuple[str, ...] = ()
    """What was scored with something in place of what the task asks for."""

    @property
    def routing(self) -> Routing | None:
        """Routing of the first control site."""
        return next(iter(self.routing_by_site.values()), None)


@dataclass(frozen=True, kw_only=True)
class Ablation(OfOneRun):
    """A trained method under every intervention, on every domain's own task."""

    domains: tuple[str, ...]
    """The D domains, in order."""
    interventions: dict[str, dict[str, Score]]
    """{intervention, `INTACT` among them: {domain: score}}."""
    doses: dict[str, dict[float, dict[str, Score]]] = field(default_factory=dict)
    """{intervention: {strength below 1: {domain: score}}}."""


@dataclass(frozen=True, kw_only=True)
class GeneralKnowledge:
    """Average of the general-knowledge tasks."""

    before: Estimate
    """Of the base model."""
    after: Estimate
    """After the last domain of the sequence."""


@dataclass(frozen=True, kw_only=True)
class MemoryEvent:
    """A change of which specialists there are."""

    step: int
    """Optimizer steps done in the domain."""
    domain: str
    """What was training."""
    event: str
    """"spawn", "merge" or "prune"."""
    specialists: list[int]
    """Which; of a merge, the one that stays is first."""
    why: str
    """The quantity that passed its threshold."""


@dataclass(frozen=True, kw_only=True)
class DomainSequence(OfOneRun):
    """One method trained on the domains one after the other, scored on all of them after each."""

    order: str
    """Name of the order."""
    sequence: tuple[str, ...]
    """The T domains in the order of learning."""
    broad: str | None
    """The broad domain among them, of which the paper says that it should come first; None: none
    is."""
    domains: tuple[str, ...]
    """The D domains that the columns of the matrix stand for."""
    matrix: list[list[float]]
    """[T + 1, D] scores; row 0 is the base model's, row t is after the t-th domain."""
    stderr: list[list[float]]
    """[T + 1, D] their standard errors from the evaluation items."""
    items: int
    """Evaluation items of a domain; the fewest of all domains."""
    metrics: dict[str, float]
    """Forgetting and transfer (`steerlora.evaluation.forgetting`)."""
    general: GeneralKnowledge | None = None
    """None where there is no task for it."""
    drift: tuple[float, ...] = ()
    """[T] change of general features after each domain; empty without a monitor site."""
    events: tuple[MemoryEvent, ...] = ()
    """What the memory policy did, in order."""
    replay: float = 0.0
    """Share of rows of earlier domains in training."""
    written: list[list[float]] = field(default_factory=list)
    """[T + 1, D] scores of the same questions with the answers written out, as ``matrix``; empty
    where the domains have no such tasks."""


Record = TypeVar("Record", Evaluation, Ablation, DomainSequence)

FILES: dict[str, type] = {
    "scores.json": Evaluation,
    "ablation.json": Ablation,
    "sequential.json": DomainSequence,
}
"""{file of an artifact: the kind of record in it}."""


def write_record(path: Path, record: Record) -> None:
    """Write a record, and the `SCHEMA` that it has, as JSON.

    Raises:
        UserError: a number in it is not finite.
    """
    write_json(path, {"schema": SCHEMA, **vars(record)})


def read_record(path: Path, kind: type[Record]) -> Record:
    """The record that `write_record` wrote.

    Raises:
        UserError: there is no such file, it has another schema, or is no such record.
    """
    content = read_json(path)
    schema = content.pop("schema", None) if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise UserError(
            f"{path} has schema {schema or 'none'}, and records of schema {SCHEMA} are read: "
            "run its stage again, which builds it anew"
        )
    try:
        return typed(kind, content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no record of kind {kind.__name__}: {error}") from error


def find_record(folder: Path) -> Evaluation | Ablation | DomainSequence | None:
    """The record in an artifact's folder; None where its stage writes none.

    Raises:
        UserError: as `read_record`.
    """
    for name, kind in FILES.items():
        if (folder / name).is_file():
            return read_record(folder / name, kind)
    return None


def typed(kind: Any, value: Any) -> Any:
    """``value``, of JSON's own types, as what the annotation ``kind`` says."""
    if dataclasses.is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{name: typed(hints[name], item) for name, item in value.items()})
    container, inner = get_origin(kind), get_args(kind)
    if container is types.UnionType:  # X | None
        return None if value is None else typed(inner[0], value)
    if container is dict:
        return {inner[0](key): typed(inner[1], item) for key, item in value.items()}
    if container in (list, tuple):
        return container(typed(inner[0], item) for item in value)
    return value


_hints = cache(get_type_hints)
