"""Training of SAEs as stage ``sae_training`` runs it: on stored activations, or on streamed ones.

Shapes: T tokens, D model width, C columns of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from steerlora.config import TrainerConfig
from steerlora.data.activations import ActivationBatches
from steerlora.data.headers import signal_tokens_of
from steerlora.data.streaming import StreamedActivations
from steerlora.engine.manifests import CHECKPOINTS
from steerlora.engine.steps import Context
from steerlora.reporting.runs import RunLog
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.config import SAEConfig
from steerlora.saes.several import SeveralSAEs
from steerlora.saes.training import SAEModule, course, input_scale, start_on
from steerlora.stages import activations
from steerlora.stages.common import sae_rows, train
from steerlora.stages.sae_held_out import HeldOut
from steerlora.stages.sae_text import SAEText


class Trained(NamedTuple):
    """What came out of a training."""

    sae: SparseAutoencoder
    figures: dict[str, Any]
    """Of the training."""
    history: list[dict[str, float]]
    """Of held-out activations meanwhile; empty where there were none."""


def fit_stored(context: Context, log: RunLog, held_out: Tensor | None) -> Trained:
    """Train on the activations that the step reads.

    Args:
        context: of the step.
        log: of its run.
        held_out: [T, D], or [T, 2, D] for a transcoder, on rank 0.
    """
    config = context.config.sae
    batches = ActivationBatches(activations.stores_of(context), config.batch_size, config.seed)
    steps = config.steps_over(batches.tokens)
    return _alone(context, log, batches, steps, held_out)


def fit_streamed(
    contexts: Sequence[Context],
    log: RunLog,
    held_out: Sequence[Tensor | None],
    model: PreTrainedModel,
    tokenizer: Any,
) -> list[Trained]:
    """Train one SAE, or several that share every batch, on what the base computes meanwhile.

    Each comes out as it would alone. The checkpoints of several lie with the first.

    Args:
        contexts: of the steps, which differ in their sites and SAEs and in nothing else.
        log: of the first one's run, which has the curves of all.
        held_out: as for :func:`fit_stored`, of each.
        model, tokenizer: the base.
    """
    first, settings = contexts[0], contexts[0].config
    config, steps = settings.sae, settings.sae.steps_over(0)
    rows = sae_rows(first.inputs["domains"], settings.domains, tokenizer, settings.max_length)
    text = SAEText(rows, settings.corpus.path, tokenizer, settings.max_length, config.stream_seed)
    with StreamedActivations(
        model,
        text.again,
        [context.config.sae.streams(context.config.site) for context in contexts],
        batch_size=config.batch_size,
        buffer=config.stream_buffer,
        steps=steps,
        seed=config.stream_seed,
        signal_tokens=signal_tokens_of(tokenizer),
    ) as batches:
        if len(contexts) == 1:
            return [_alone(first, log, batches, steps, held_out[0])]
        start, parts = batches(0), []
        for context, columns in zip(contexts, batches.columns, strict=True):
            own = start[:, columns]
            parts.append(_module(context.config.sae, own if own.shape[1] > 1 else own[:, 0], steps))
        watches = [
            _watch(buffer, part, steps, number)
            for number, (part, buffer) in enumerate(zip(parts, held_out, strict=True))
        ]
        names = " ".join(context.fingerprint for context in contexts)
        identity = hashlib.sha256(names.encode()).hexdigest()[: len(first.fingerprint)]
        figures = train(
            first,
            SeveralSAEs(parts, batches.columns),
            batches,
            steps,
            log,
            trainer=in_full(first),
            callbacks=watches,
            identity=identity,
            checkpoints=first.directory / CHECKPOINTS / identity,
            description=", ".join(context.label for context in contexts),
        )
    return [_trained(*pair, figures) for pair in zip(parts, watches, strict=True)]


def in_full(context: Context) -> TrainerConfig:
    """In full precision, whole batches: accumulation and mixed precision are the adapter's."""
    return replace(context.config.trainer, precision="32-true", accumulate=1)


def _alone(
    context: Context,
    log: RunLog,
    batches: ActivationBatches | StreamedActivations,
    steps: int,
    held_out: Tensor | None,
) -> Trained:
    module = _module(context.config.sae, batches(0), steps)
    watch = _watch(held_out, module, steps)
    options = {"trainer": in_full(context), "callbacks": [watch]}
    figures = train(context, module, batches, steps, log, **options)
    return _trained(module, watch, figures)


def _module(config: SAEConfig, first: Tensor, steps: int) -> SAEModule:
    """What trains an SAE, begun on the first batch, [T, D] or [T, 2, D]."""
    first = first.cpu().float()
    sae, scale = config.build(first.shape[-1]), input_scale(config, first)
    start_on(sae, config, first / scale)
    schedule = course(config, steps, config.batch_size)
    return SAEModule(sae, lr=config.learning_rate, scale=scale, **schedule)


def _watch(
    held_out: Tensor | None, module: SAEModule, steps: int, number: int | None = None
) -> HeldOut:
    buffer = None if held_out is None else held_out.float() / module.scale
    return HeldOut(buffer, steps, number)


def _trained(module: SAEModule, watch: HeldOut, figures: dict[str, Any]) -> Trained:
    """The SAE in the activations' own units."""
    module.sae.rescale(module.scale)
    return Trained(module.sae, figures, watch.history)
