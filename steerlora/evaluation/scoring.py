"""One model's scores on a domains directory, whatever kind of domains it holds."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lm_eval.models.utils import resolve_max_length

from steerlora.config import EvaluationConfig
from steerlora.data.conversations import Conversation
from steerlora.data.domains.text.tasks import LIKELIHOOD
from steerlora.data.jsonl import read_rows
from steerlora.engine.artifacts import Artifact
from steerlora.evaluation.cross_entropy import heldout_cross_entropy
from steerlora.evaluation.harness import Harness
from steerlora.evaluation.punkt import ensure_punkt
from steerlora.evaluation.scores import Score
from steerlora.evaluation.statistics import standard_error
from steerlora.evaluation.suite import Domains, Suite
from steerlora.evaluation.tasks.classification import local as classification
from steerlora.evaluation.tasks.text import local as text

SPLITS_SENTENCES = ("ifeval", "text_ifeval")
"""Tasks that need NLTK's sentence splitter."""

_log = logging.getLogger(__name__)


class Scorer:
    """Scores a live model as it is at the time, with its adapter and intervention.

    Args:
        source: the domains artifact.
        model, tokenizer: what is scored.
        config: tasks, groups, metrics, limits, batch size, context.

    Attributes:
        suite: the tasks, groups and metrics in force.
        max_length: tokens of context: the configuration's, or the model's own.
        stand_ins: what was scored with something in place of what lm-eval asks for.
    """

    def __init__(self, source: Artifact, model, tokenizer, config: EvaluationConfig) -> None:
        self.domains = Domains.read(source.path)
        self.suite = Suite(self.domains, config)
        self.max_length = config.max_length or resolve_max_length(model.config, tokenizer)
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self._scratch = tempfile.TemporaryDirectory(prefix="steerlora-tasks-")
        self._warned: set[str] = set()
        self.stand_ins: list[str] = []
        folder = Path(self._scratch.name)
        if self.domains.kind == "text":
            text.local_task_yamls(source.path, folder, limit=config.generation_items)
        elif self.domains.kind == "classification":
            classification.local_task_yamls(self.domains, folder)
        self.harness = Harness(self.suite, [folder])

    def tasks(self, names: Sequence[str]) -> dict[str, Score]:
        """{task: score}."""
        for name in SPLITS_SENTENCES:
            if name in names:
                self._find_sentence_splitter(name)
        by_likelihood = [n for n in names if self.domains.metrics.get(n) == LIKELIHOOD]
        scores = self.harness.run(
            self.model,
            self.tokenizer,
            [name for name in names if name not in by_likelihood],
            batch_size=self.config.batch_size,
            max_length=self.max_length,
        )
        scores |= {name: self._likelihood(self.suite.owners[name]) for name in by_likelihood}
        self._warn_of_cuts(scores)
        return {name: scores[name] for name in names}

    def targets(self, names: Sequence[str] | None = None) -> dict[str, Score]:
        """{domain: score} of the domains' own tasks."""
        own = {name: self.domains.target_tasks[name] for name in names or self.domains.names}
        scores = self.tasks(list(own.values()))
        return {name: scores[task] for name, task in own.items()}

    def written(self) -> dict[str, Score]:
        """{domain: score} of the answers that are written out; none where no such tasks are."""
        scores = self.tasks(list(self.domains.written_tasks.values()))
        return {name: scores[task] for name, task in self.domains.written_tasks.items()}

    def _likelihood(self, domain: str) -> Score:
        """The mean over held-out rows of exp(-nats a response token)."""
        task = self.domains.target_tasks[domain]
        rows = self._heldout(domain)[: self.suite.limit_of(task)]
        result = heldout_cross_entropy(
            self.model,
            self.tokenizer,
            rows,
            batch_size=self.config.batch_size,
            max_length=self.max_length,
        )
        per_item = [math.exp(-nats / tokens) for nats, tokens in result.per_item]
        return Score(
            metric=LIKELIHOOD,
            value=sum(per_item) / len(per_item),
            stderr=standard_error(per_item),
            items=len(per_item),
            version=str(self.domains.version),
            per_item=per_item,
            others={"cross_entropy": result.value, "cross_entropy_stderr": result.stderr},
            cut=result.cut,
        )

    def _warn_of_cuts(self, scores: Mapping[str, Score]) -> None:
        """A warning for each task, once, of which some items do not fit."""
        for name, score in scores.items():
            if score.cut and name not in self._warned:
                self._warned.add(name)
                _log.warning(
                    "%s: %d of %d items do not fit into %d tokens beside the answer, and lost a "
                    "part; evaluation.max_length sets the limit, null is the model's own",
                    name,
                    score.cut,
                    score.items,
                    self.max_length,
                )

    def _find_sentence_splitter(self, task: str) -> None:
        """Before the task is loaded: its import would download what is not there."""
        rows = (turns for name in self.domains.names for turns in self._heldout(name))
        texts = [turn.content for turns in rows for turn in turns if turn.role == "user"]
        note = f"{task}: sentence splitter trained on local text"
        stands_in = ensure_punkt(Path(self._scratch.name) / "nltk", texts)
        if stands_in and note not in self.stand_ins:
            self.stand_ins.append(note)

    def _heldout(self, domain: str) -> list[Conversation]:
        return read_rows(self.domains.directory / f"heldout/{domain}.jsonl")
