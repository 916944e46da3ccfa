"""One method trained on the domains one after the other, and scored after each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from steerlora.data.batches import ChatBatches, collate
from steerlora.data.chat import EncodedChat, encode_chats
from steerlora.data.packing import PackedBatches, training_batches
from steerlora.data.replay import ReplayBatches, ReplayRows
from steerlora.distributed import ranks
from steerlora.engine import preemption
from steerlora.engine.manifests import CHECKPOINTS
from steerlora.engine.steps import Context
from steerlora.evaluation.scores import Score
from steerlora.evaluation.scoring import Scorer
from steerlora.methods.base import Task
from steerlora.reporting.runs import RunLog
from steerlora.stages import evaluate, method_training
from steerlora.stages.common import domain_names, load_base, read_rows
from steerlora.stages.method_training import Attached
from steerlora.stages.rows_to_learn import rows_to_learn
from steerlora.stages.sequence_state import SequenceState

DRIFT_ROWS = 64
"""Held-out rows a domain on which the drift of general features is measured."""


class SequenceTrainer:
    """Trains the method on a domain at a time, on all ranks, and has it scored, on rank 0.

    The same model serves both, except where training shards it over ranks: a sharded model answers
    no single rank, so it is given up after each domain, and opened whole to be scored.

    Args:
        context: the stage's.
        log: of the stage's run.
        state: after the domains that were trained on; brought up to date, and kept, by `train`.
    """

    def __init__(self, context: Context, log: RunLog, state: SequenceState) -> None:
        self.context, self.log, self.state = context, log, state
        self.settings, self.source = context.config, context.inputs["domains"]
        self.names = domain_names(self.source)
        self._shards = self.settings.trainer.strategy == "zero3"
        self._open: Attached | None = None
        self._batches: dict[int, ChatBatches | PackedBatches] = {}
        self._validation: dict[int, dict[str, list[EncodedChat]]] = {}

    # The model

    @contextmanager
    def _attached(self, *, training: bool) -> Iterator[Attached]:
        """The base with the method as it is by now."""
        if self._open is None:
            self._open = self._opened(training)
        try:
            yield self._open
        finally:
            if self._shards:
                self._open = None  # the other use needs the memory
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def _opened(self, training: bool) -> Attached:
        inputs, settings = self.context.inputs, self.settings
        if training or not self._shards:
            model, tokenizer = method_training.load_to_train(inputs["base"], settings.trainer)
        else:
            # A model that has to be sharded may need more than one GPU to be scored, too.
            accelerator = settings.trainer.accelerator
            several = accelerator != "cpu" and torch.cuda.device_count() > 1
            model, tokenizer = load_base(inputs["base"], accelerator=accelerator, spread=several)
        attached = method_training.attach(
            self.context, model, tokenizer, domains=self.names, weights=self.state.weights
        )
        if self.state.learner:
            attached.learner.load_state(self.state.learner)
        attached.learner.optimizer = self.state.optimizer
        return attached

    # Training

    def train(self, position: int) -> None:
        """Train on one domain, with a schedule of its own, and keep the method."""
        state = self.state
        with self._attached(training=True) as attached:
            self._train(position, attached)
            state.weights = {
                name: tensor.detach().to("cpu", copy=True).contiguous()
                for name, tensor in attached.method.state_dict().items()
            }
            state.learner, state.optimizer = attached.learner.state(), attached.learner.optimizer
            state.trained = position + 1
            if ranks.is_main():
                state.save(lambda folder: self._write(attached, folder))
            preemption.stored()
            attached.learner.load_state(state.learner)
        preemption.stop_if_requested(f"saved after {self.settings.sequence[position]}")

    def _write(self, attached: Attached, folder: Path) -> None:
        """Write the method into ``folder``, to be moved to the domain's own."""
        name = self.state.name(self.state.trained - 1)
        method_training.save(self.context, attached, folder, written_for=name)

    def _train(self, position: int, attached: Attached) -> None:
        settings, replay = self.settings, self.settings.method.replay
        domain, steps = settings.sequence[position], settings.steps_per_domain
        batches = self._batches_of(position, attached)
        earlier = [
            self._batches_of(before, attached)
            for before in (range(position) if replay.ratio else ())
        ]
        kept = min(replay.batches, steps)
        options = {"ratio": replay.ratio, "kept": kept, "seed": settings.seed}
        if replay.how == "rows":
            pad = attached.tokenizer.pad_token_id
            replaying = ReplayRows(batches, earlier, **options, pad_token_id=pad)
        else:
            replaying = ReplayBatches(batches, earlier, **options)
        count = f"{position + 1}/{len(settings.sequence)}"
        method_training.train_task(
            self.context,
            attached.learner,
            Task({domain: batches.rows}, position),
            replaying,
            steps,
            self.log,
            validation=self._validation[position],
            checkpoints=self.context.directory / CHECKPOINTS / f"{position}_{domain}",
            description=f"{self.context.label}: {domain} ({count})",
            identity=f"{self.context.fingerprint}/{position}",
            run_logger=self.log.lightning(first_step=position * steps),
        )

    def _batches_of(self, position: int, attached: Attached) -> ChatBatches | PackedBatches:
        """A domain's own batches, a function of the step; replay asks for earlier ones again."""
        if position not in self._batches:
            settings = self.settings
            domain = settings.sequence[position]
            found = rows_to_learn(self.source, [domain], attached.tokenizer, settings.trainer)
            rows, self._validation[position] = found.training[domain], found.validation
            self._batches[position] = training_batches(
                rows,
                [self.names.index(domain)] * len(rows),
                settings.trainer,
                pad_token_id=attached.tokenizer.pad_token_id,
                # Of the domains that there are, not of those that the sequence has by now.
                seed=settings.seed * len(self.names) + position,
                signal_tokens=attached.method.signal_tokens,
            )
        return self._batches[position]

    # Scoring

    @contextmanager
    def scorer(self) -> Iterator[SequenceScorer | None]:
        """What scores the method as it is by now, on rank 0; None elsewhere, where ranks wait."""
        if ranks.is_main():
            with self._attached(training=False) as attached:
                attached.model.eval()
                yield SequenceScorer(self, attached)
        else:
            yield None
        ranks.barrier()


class SequenceScorer:
    """Scores of a method after a domain.

    Attributes:
        scorer: of the tasks in force.
    """

    def __init__(self, trainer: SequenceTrainer, attached: Attached) -> None:
        self.attached, self.names, self.source = attached, trainer.names, trainer.source
        self.settings = trainer.settings
        self.scorer = Scorer(
            self.source, attached.model, attached.tokenizer, self.settings.evaluation
        )

    def targets(self) -> dict[str, Score]:
        """The domains' scores, under the intervention if there is one."""
        intervention = self.settings.intervention
        if intervention.name == "none":
            return self.scorer.targets()
        found = {}
        for name in self.names:
            with evaluate.intervened(self.attached.method, intervention, name):
                found |= self.scorer.targets([name])
        return found

    def written(self) -> dict[str, Score]:
        """The domains' scores with the answers written out, if their tasks are; under no
        intervention."""
        return self.scorer.written() if self.settings.intervention.name == "none" else {}

    def drift(self) -> float | None:
        """Squared change of general features over their squares, at the monitor site, if there is
        one."""
        if self.attached.monitor is None:
            return None
        changed = kept = 0.0
        model, tokenizer = self.attached.model, self.attached.tokenizer
        for name in self.names:
            rows = read_rows(self.source / f"heldout/{name}.jsonl")[:DRIFT_ROWS]
            encoded = encode_chats(tokenizer, rows, self.scorer.max_length)
            batch = collate(encoded, [-1] * len(encoded), tokenizer.pad_token_id)
            batch = batch.to(model.device)
            parts = self.attached.monitor.drift(batch.input_ids, batch.attention_mask)
            changed, kept = changed + float(parts[0]), kept + float(parts[1])
        return changed / max(kept, 1e-12)
