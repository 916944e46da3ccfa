"""One step of each training that a configuration asks for, run without storage and measured.

Nothing here knows a method: what it trains, holds and computes is seen as it runs.
"""

from __future__ import annotations

import gc
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from steerlora.config import Config
from steerlora.data import harvest
from steerlora.data.batches import ChatBatch
from steerlora.errors import UserError
from steerlora.lm.decoder import layers_of
from steerlora.lm.signal_tokens import ALL_TOKENS
from steerlora.methods.base import Task
from steerlora.planning.building import base_model, batch_of, build_for_planning, training_batch
from steerlora.planning.dry_run import DryRun, NoValues, running
from steerlora.planning.live import ACTIVATIONS, GRADIENTS, SPACE, LiveMemory, Parts
from steerlora.planning.operations import Operations
from steerlora.saes import sparse
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.end_to_end.training import EndToEndModule
from steerlora.saes.training import SAEModule
from steerlora.training.execution import LayerExecution

IN_FORWARD, IN_BACKWARD = "in the forward", "in the backward"
IN_STEP, BETWEEN = "in the optimizer's step", "between steps"
BEFORE, AFTER = "before the first step", "after the last step"
FIXED = "whatever the batch"
"""Weights, SAEs, the optimizer's state: of what trains, a rank has what its strategy leaves it."""


class Measured(NamedTuple):
    """What a step takes on top of what is there whatever the batch.

    Attributes:
        peaks: {moment: parts}, where it takes most in all.
        ungraded: likewise, where what is not gradients takes most.
        half, single, again: floating-point operations (see ``Operations``).
    """

    peaks: dict[str, Parts]
    ungraded: dict[str, Parts]
    half: int = 0
    single: int = 0
    again: int = 0


def rows_at_once(config: Config) -> int:
    """Rows that go through the model at once on a rank: its share of the batch, or a part of it."""
    return config.trainer.batch_size // (config.plan.gpus * config.trainer.accumulate)


class Trials:
    """The base and the method of a configuration, and what their steps take; each is run once.

    Args:
        config: of hardware, strategy and sizes of batches nothing counts here but the precision.
        accelerator: blocks are as large as on a GPU; else as on a CPU.

    Attributes:
        base: {name: parameter} of the base.
        layer: parameters of one of its layers.
        trained: {name: parameter} of what trains.
        frozen: bytes of what else there is whatever the batch: SAEs, prototypes.

    Raises:
        UserError: the method does not fit the model.
    """

    def __init__(self, config: Config, *, accelerator: bool = True) -> None:
        self.config, self.accelerator = config, accelerator
        self._mixed = config.trainer.precision != "32-true"
        self._dry_run, self._live = DryRun(), LiveMemory(config.model.vocabulary)
        self._found: dict[tuple, Measured] = {}
        with self._running(self._live, FIXED) as live:
            model = self._new_base()
            self.base = dict(model.named_parameters())
            self.layer = sum(p.numel() for p in layers_of(model)[0].parameters())
            try:
                self._built = build_for_planning(config, model)
            except ValueError as error:
                raise UserError(str(error)) from error
            module = self._built.module
            self.trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
            gc.collect()
            weights = sum(p.nbytes for p in (*self.base.values(), *self.trained.values()))
            self.frozen = live.now[FIXED] - weights
            live.moment, live.kind = BEFORE, SPACE
            live.peaks, live.ungraded = {}, {}
            self._built.learner.begin(self._built.task)
            self._beside = Measured(live.peaks, live.ungraded)
        self._seen_beside = False

    def step(self, config: Config) -> Measured:
        """A step of the method's training on the rows that go through the model at once, and what
        happens beside the steps.

        Args:
            config: this one, but for hardware, strategy, parts and recomputation.
        """
        trainer = config.trainer
        recompute, accumulated = trainer.activation_checkpointing, trainer.accumulate > 1
        key = (rows_at_once(config), recompute, accumulated)
        if key not in self._found:
            module, learner, task = self._built
            layers = LayerExecution(recompute=recompute, compile=False)

            def between(trainer: Any) -> None:
                for callback in learner.callbacks(task):
                    callback.on_train_batch_end(trainer, module, None, batch, 0)

            def after(trainer: Any) -> None:
                name, rows = next(iter(task.rows.items()))  # domain after domain, all alike
                learner.end(Task({name: rows}))

            with self._running(self._live, ACTIVATIONS) as live, learner.training(task):
                batch = training_batch(config, rows_at_once(config))
                layers.on_train_start(None, module)
                found = _step(
                    live,
                    module,
                    batch,
                    mixed=self._mixed,
                    accumulated=accumulated,
                    beside={} if self._seen_beside else {BETWEEN: between, AFTER: after},
                )
                layers.on_train_end(None, module)
            if not self._seen_beside:  # the rows of a step have no part in it
                self._seen_beside = True
                for moments, known in zip(found[:2], self._beside[:2], strict=True):
                    known |= {name: moments[name] for name in (BETWEEN, AFTER) if name in moments}
            peaks, ungraded = (
                known | moments for known, moments in zip(self._beside[:2], found[:2], strict=True)
            )
            self._found[key] = found._replace(peaks=peaks, ungraded=ungraded)
        return self._found[key]

    def sae_step(self, tokens: int) -> Measured:
        """A step of an SAE's training on so many tokens."""
        key = ("SAE", tokens)
        if key not in self._found:
            with self._running(LiveMemory(), ACTIVATIONS) as live:
                module = SAEModule(self.new_sae(), total_steps=2)
                streams = [2] if module.sae.span else []
                batch = torch.empty(tokens, *streams, module.sae.width)
                self._found[key] = _step(live, module, batch)
        return self._found[key]

    def end_to_end_step(self, site: int, rows: int) -> Measured:
        """A step of an SAE's training in the place of its stream, on so many rows."""
        key = ("end to end", site, rows)
        if key not in self._found:
            sae, own = self.new_sae(), self.config.sae.end_to_end
            with self._running(LiveMemory(self.config.model.vocabulary), FIXED) as live:
                model = self._new_base()
                settings = {"replaced": ALL_TOKENS, "mse_weight": own.mse_weight, "total_steps": 2}
                module = EndToEndModule(sae, model, site, **settings)
                self._found[key] = _step(live, module, batch_of(self.config, rows))
        return self._found[key]

    def harvest(self, sites: tuple[int, ...], rows: int) -> Measured:
        """Two batches of so many rows, whose streams at the sites are stored."""
        key = ("harvest", *sites, rows)
        if key not in self._found:
            with self._running(LiveMemory(), FIXED) as live:
                model = self._new_base()
                batch = batch_of(self.config, rows)
                live.kind, live.moment = ACTIVATIONS, IN_FORWARD
                # In inference mode, operations that are made of others reach us whole.
                run = inspect.unwrap(harvest.harvest)
                unwritten = mock.patch.object(harvest, "_ShardWriter", _Unwritten)
                with torch.no_grad(), unwritten, suppress(_Enough):
                    run(model, _twice(batch), dict.fromkeys(sites, Path()))
            self._found[key] = Measured(live.peaks, live.peaks)
        return self._found[key]

    def new_sae(self) -> SparseAutoencoder:
        """One of the SAEs that are trained."""
        with running(self._dry_run):
            return self.config.sae.build(self._built.module.model.config.hidden_size)

    def _new_base(self) -> nn.Module:
        return base_model(self.config, torch.bfloat16 if self._mixed else torch.float32)

    @contextmanager
    def _running(self, live: LiveMemory, kind: str) -> Iterator[LiveMemory]:
        """A dry run whose storages are followed."""
        live.kind = kind
        live.peaks, live.ungraded = {}, {}
        block = sparse._ACCELERATOR_BLOCK if self.accelerator else sparse._CPU_BLOCK
        assumed = {"_CPU_BLOCK": block, "_busiest": _busiest}
        with warnings.catch_warnings(), mock.patch.multiple(sparse, **assumed):
            warnings.simplefilter("ignore")
            with running(self._dry_run), live:
                yield live


def _busiest(scores: Tensor, floor: float | Tensor) -> int:
    """Latents of the token that has most of them, which no dry run knows: so many that with more
    they would be worked out as dense."""
    return max(1, int(sparse.DENSE_FROM * scores.shape[1]))


class _Unwritten:
    """In the place of a harvest's writer."""

    resumed = 0

    def __init__(self, stores: Mapping[int, Path], width: int, dtype: torch.dtype) -> None: ...

    def add(self, streams: Mapping[int, Tensor]) -> None: ...


class _Enough(Exception):
    """Of a harvest."""


def _twice(batch: ChatBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """What a harvest reads; nothing is to be written after it."""
    for _ in range(2):
        yield batch.input_ids, batch.attention_mask
    raise _Enough


def _step(
    live: LiveMemory,
    module: L.LightningModule,
    batch: Any,
    *,
    mixed: bool = False,
    accumulated: bool = False,
    beside: Mapping[str, Callable[[Any], None]] = MappingProxyType({}),
) -> Measured:
    """One step as Lightning takes it, after others.

    Args:
        live: follows the storages.
        module: what trains.
        batch: a part of a rank's part.
        mixed: in mixed precision.
        accumulated: there are gradients of other parts.
        beside: {moment: what happens after the step}, each until it asks for numbers; it is given
            a trainer.
    """
    found = module.configure_optimizers()
    optimizer = found["optimizer"] if isinstance(found, dict) else found[0][0]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    trainer = SimpleNamespace(
        strategy=None, optimizers=[optimizer], global_step=0, log_every_n_steps=1
    )
    module._trainer, module.optimizers = trainer, lambda: optimizer
    module.log = module.log_dict = lambda *args, **kwargs: None
    for parameter in trained:  # a step before this one has left gradients and moments
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    moments = [leaf for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor)]
    live.tell(FIXED, [*trained, *moments])
    live.tell(GRADIENTS, [p.grad for p in trained])
    live.peaks, live.ungraded = {}, {}
    operations = Operations()
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: live.tell(GRADIENTS, [p.grad]))
        for p in trained
    ]

    def closure() -> Tensor:
        live.moment, live.kind = IN_FORWARD, ACTIVATIONS
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = module.training_step(batch, 0)
        if not accumulated:
            optimizer.zero_grad()
        live.moment, live.kind, operations.backward = IN_BACKWARD, SPACE, True
        loss.backward()
        operations.backward = False
        live.moment = IN_STEP
        nn.utils.clip_grad_norm_(trained, 1.0)
        return loss

    with operations:
        module.optimizer_step(0, 0, optimizer, closure)
    for moment, happen in beside.items():
        live.moment = moment
        with suppress(NoValues):
            happen(trainer)
    for hook in hooks:
        hook.remove()
    optimizer.zero_grad()
    return Measured(live.peaks, live.ungraded, operations.half, operations.single, operations.again)
