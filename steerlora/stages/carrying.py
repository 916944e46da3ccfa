"""One adapter carried through the domains: how it learns each, and what it is scored by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from steerlora.data.chat import ChatBatches, collate, encode_chats
from steerlora.data.packing import PackedBatches, training_batches
from steerlora.data.replay import ReplayBatches
from steerlora.distributed import ranks
from steerlora.engine.run import Context
from steerlora.evaluation.scores import Score
from steerlora.evaluation.scoring import Scorer
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.isolation import train_only
from steerlora.methods.routed_lora.monitor import Monitor
from steerlora.reporting.runs import RunLog
from steerlora.stages import adapting, evaluate
from steerlora.stages.carried import Carried
from steerlora.stages.common import load_base, read_rows, training_rows
from steerlora.training.loop import fit
from steerlora.training.module import AdapterModule

DRIFT_ROWS = 64
"""Held-out rows a domain on which the drift of general features is measured."""


class Adapted(NamedTuple):
    """A base with the adapter attached, and its monitor if it has one."""

    model: nn.Module
    tokenizer: object
    adapter: Adapter
    monitor: Monitor | None


class Carrier:
    """Trains the adapter on a domain at a time, on all ranks, and scores it, on rank 0.

    The same model serves both, except where training shards it over ranks: a sharded model answers
    no single rank, so it is given up after each domain, and opened whole to be scored.

    Args:
        context: the stage's.
        log: of the stage's run.
        done: what is behind; brought up to date by `learn`.
    """

    def __init__(self, context: Context, log: RunLog, done: Carried) -> None:
        self.context, self.log, self.done = context, log, done
        self.settings, self.source = context.config, context.inputs["domains"]
        self.names = self.source.json("domains.json")["names"]
        self._shards = self.settings.trainer.strategy == "zero3"
        self._open: Adapted | None = None
        self._batches: dict[int, ChatBatches | PackedBatches] = {}

    # The model

    @contextmanager
    def _adapted(self, *, training: bool) -> Iterator[Adapted]:
        """The base with the adapter as it is by now."""
        if self._open is None:
            self._open = self._opened(training)
        try:
            yield self._open
        finally:
            if self._shards:
                self._open = None  # the other use needs the memory
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def _opened(self, training: bool) -> Adapted:
        inputs, settings = self.context.inputs, self.settings
        if training or not self._shards:
            model, tokenizer = adapting.load_to_train(inputs["base"], settings.trainer)
        else:
            # A model that has to be sharded may need more than one GPU to be scored, too.
            accelerator = settings.trainer.accelerator
            several = accelerator != "cpu" and torch.cuda.device_count() > 1
            model, tokenizer = load_base(inputs["base"], accelerator=accelerator, spread=several)
        adapter, _ = adapting.new_adapter(
            model, settings.adapter, settings.control, inputs, settings.seed
        )
        if self.done.weights:
            adapter.load_state_dict(self.done.weights)
        monitor = adapting.open_monitor(model, adapter, settings.control, inputs)
        return Adapted(model, tokenizer, adapter, monitor)

    # Learning

    def learn(self, position: int) -> None:
        """Train on one domain, with an optimizer and a schedule of its own."""
        with self._adapted(training=True) as adapted:
            self._learn(position, adapted)
            self.done.weights = {
                name: tensor.detach().to("cpu", copy=True).contiguous()
                for name, tensor in adapted.adapter.state_dict().items()
            }
            adapted.model.eval()

    def _learn(self, position: int, adapted: Adapted) -> None:
        settings, continual, done = self.settings, self.settings.continual, self.done
        model, tokenizer, adapter, monitor = adapted
        domain, steps = settings.sequence[position], settings.steps_per_domain
        batches = self._batches_of(position, tokenizer)

        def meet() -> None:
            """Prototype routing knows general text from the start, a domain from its arrival on."""
            if settings.adapter.router != "prototype":
                return
            if position == 0:
                length = settings.trainer.max_length
                adapting.meet_general_text(model, adapter, self.source, tokenizer, length)
            adapting.meet(model, adapter, position, batches.rows, tokenizer.pad_token_id)

        def freeze() -> None:
            """Freeze the free specialist that carried the domain most; one always stays free."""
            free = [e for e in range(adapter.shape.specialists) if e not in done.frozen]
            if continual.specialists != "frozen" or len(free) < 2:
                return
            used = adapting.usage(model, adapter, batches.rows, tokenizer.pad_token_id).values()
            gate = sum(gate for gate, _ in used)
            done.frozen.append(max(free, key=lambda specialist: float(gate[specialist])))

        _, callbacks = adapting.callbacks(
            adapter,
            self.names,
            {domain: batches.rows},
            tokenizer.pad_token_id,
            # One domain at a time may well have one specialist: that is no collapse.
            replace(settings.routing, collapse="ignore"),
            settings.intervention,
        )
        # One policy a domain, which takes over what the one before knew.
        memory = adapting.memory_policy(adapter, continual, domain, settings.seed, done.frozen)
        if memory:
            before = settings.sequence[max(0, position - 1)]
            known = {"domain": before, "events": done.events, "tensors": done.memory}
            memory.load_state_dict(known)
            callbacks.append(memory)
        callbacks.append(adapting.around(meet, freeze))
        own = continual.specialists == "own"
        replayed = range(position) if continual.replay_ratio else ()
        with self._training(position, adapter):
            fit(
                AdapterModule(
                    model,
                    adapter,
                    config=settings.adapter,
                    trainer=settings.trainer,
                    total_steps=steps,
                    monitor=monitor,
                    current=position if own else None,
                    earlier=range(position) if own else (),
                ),
                ReplayBatches(
                    batches,
                    [self._batches_of(earlier, tokenizer) for earlier in replayed],
                    ratio=continual.replay_ratio,
                    kept=min(continual.replay_batches, steps),
                    seed=settings.seed,
                ),
                steps,
                trainer=settings.trainer,
                checkpoints=self.context.directory / "checkpoints" / f"{position}_{domain}",
                progress=self.context.progress,
                description=(
                    f"{self.context.label}: {domain} ({position + 1}/{len(settings.sequence)})"
                ),
                identity=f"{self.context.fingerprint}/{position}",
                run_logger=self.log.lightning(),
                callbacks=callbacks,
            )
        if memory:
            state = memory.state_dict()
            done.events, done.memory = state["events"], state["tensors"]

    def _batches_of(self, position: int, tokenizer) -> ChatBatches | PackedBatches:
        """A domain's own batches, a function of the step; replay asks for earlier ones again."""
        if position not in self._batches:
            settings = self.settings
            domain, length = settings.sequence[position], settings.trainer.max_length
            rows, owners = training_rows(self.source, [domain], tokenizer, length)
            self._batches[position] = training_batches(
                rows,
                owners,
                settings.trainer,
                pad_token_id=tokenizer.pad_token_id,
                seed=settings.seed * len(settings.sequence) + position,
            )
        return self._batches[position]

    def _training(self, position: int, adapter: Adapter) -> AbstractContextManager[None]:
        """Which specialists train."""
        kind, everyone = self.settings.continual.specialists, range(adapter.shape.specialists)
        if kind == "own":
            return train_only(adapter, [position])
        if kind == "frozen" and self.done.frozen:
            return train_only(adapter, set(everyone) - set(self.done.frozen))
        return nullcontext()

    # Scoring

    @contextmanager
    def judged(self) -> Iterator[Judge | None]:
        """What scores the adapter as it is by now, on rank 0; None elsewhere, where ranks wait."""
        if ranks.is_main():
            with self._adapted(training=False) as adapted:
                yield Judge(self, adapted)
        else:
            yield None
        ranks.barrier()


class Judge:
    """Scores of an adapter after a domain.

    Attributes:
        scorer: of the tasks in force.
    """

    def __init__(self, carrier: Carrier, adapted: Adapted) -> None:
        self.adapted, self.names, self.source = adapted, carrier.names, carrier.source
        self.settings = carrier.settings
        self.scorer = Scorer(
            self.source, adapted.model, adapted.tokenizer, self.settings.evaluation
        )

    def targets(self) -> dict[str, Score]:
        """The domains' scores, under the intervention if there is one."""
        intervention = self.settings.intervention
        if intervention.name == "none":
            return self.scorer.targets()
        found = {}
        for name in self.names:
            with evaluate.control(self.adapted.adapter, intervention, name):
                found |= self.scorer.targets([name])
        return found

    def drift(self) -> float:
        """Squared change of general features over their squares, at the monitor site."""
        changed = kept = 0.0
        for ids, mask in self._heldout():
            parts = self.adapted.monitor.drift(ids, mask)
            changed, kept = changed + float(parts[0]), kept + float(parts[1])
        return changed / max(kept, 1e-12)

    def _heldout(self) -> Iterator[tuple[Tensor, Tensor]]:
        model, tokenizer = self.adapted.model, self.adapted.tokenizer
        for name in self.names:
            rows = read_rows(self.source / f"heldout/{name}.jsonl")[:DRIFT_ROWS]
            encoded = encode_chats(tokenizer, rows, self.scorer.max_length)
            batch = collate(encoded, [-1] * len(encoded), tokenizer.pad_token_id)
            batch = batch.to(model.device)
            yield batch.input_ids, batch.attention_mask
