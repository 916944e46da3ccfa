"""What joint and sequential training of a method share: inputs, the model, the method, hooks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from torch import Tensor, nn

from steerlora.config import Config, InterventionConfig, LoggerConfig, TrainerConfig
from steerlora.data.batches import ChatBatch, batches_by_length
from steerlora.data.chat import EncodedChat
from steerlora.data.headers import signal_tokens_of
from steerlora.distributed import ranks
from steerlora.distributed.strategies import check_divides
from steerlora.distributed.zero import sharding_settings
from steerlora.engine.artifacts import Artifact
from steerlora.engine.steps import Context, Step
from steerlora.errors import UserError
from steerlora.lm.pretrained import open_model, open_tokenizer
from steerlora.methods.base import Learner, Method, SiteSAE, Sources, Task
from steerlora.methods.config import MethodConfig
from steerlora.methods.interventions import check_phase
from steerlora.methods.module import MethodModule
from steerlora.methods.monitor import Monitor
from steerlora.methods.saving import bundle_sae, save_adapter
from steerlora.reporting.runs import RunLog
from steerlora.saes.saelens import load_sae, sae_metadata
from steerlora.stages import base, features, sae_training
from steerlora.stages.common import (
    POINTER,
    device_of,
    general_text,
    place_of,
    train,
)
from steerlora.training.validation import Validation

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What any training of a method depends on; as in the configuration."""

    method: MethodConfig
    intervention: InterventionConfig
    """That it trains under."""
    trainer: TrainerConfig
    seed: int
    logger: LoggerConfig

    @classmethod
    def of(cls, config: Config, intervention: InterventionConfig, **more: Any) -> Self:
        """Of a configuration; ``more``: a subclass's own."""
        return cls(
            method=config.method,
            intervention=intervention,
            trainer=config.trainer,
            seed=config.seed,
            logger=config.logger,
            **more,
        )


Inputs = dict[str, Artifact | tuple[Artifact, ...]]
"""A stage's input artifacts by name."""


def inputs(config: Config, *, monitored: bool) -> dict[str, Step | tuple[Step, ...]]:
    """The steps whose artifacts any training of the method reads.

    Args:
        config: the run's.
        monitored: with the monitor site's SAE and features.

    Raises:
        UserError: the method names what is not registered.
    """
    config.method.check_names()
    found: dict[str, Step | tuple[Step, ...]] = base.inputs(config)
    if config.method.reads_features:
        found["saes"] = sae_training.steps(config)
    if config.method.reads_taxonomy:
        found["features"] = features.steps(config)
    if monitored:
        found["monitor_sae"] = sae_training.monitor_step(config)
        found["monitor_features"] = features.monitor_step(config)
    return found


def not_identity(config: Config, *, sequence: bool = False) -> frozenset[str]:
    """Keys of a stage's settings, beside the stage's own, that do not change what training writes.

    Args:
        config: the run's.
        sequence: of a sequence of domains, which is evaluated as it goes and says the name.
    """
    method = config.method
    if sequence:
        keys = method.not_trained - {"name", *method.only_in_evaluation}
    else:
        keys = method.not_trained | method.only_in_sequences
    if not method.reads_features:
        keys |= {"bundle_sae"}  # there is none
    idle = set() if config.trainer.validation.rows else {"trainer.validation"}
    return frozenset({f"method.{key}" for key in keys} | idle)


def check_intervention(config: Config) -> None:
    """Refuse an intervention that does not exist, or that this method or phase gives no meaning.

    Raises:
        UserError: says what would be right.
    """
    name = config.intervention.name
    if name == "none":
        return
    check_phase(name, config.intervention.phase)
    if not config.method.has_control_signal:
        raise UserError(
            f"intervention={name} acts on a control signal of SAE features, and "
            f"method={config.method.name} has none"
        )


def check_shares(trainer: TrainerConfig) -> None:
    """Refuse a batch that the ranks cannot share evenly."""
    parts = ranks.current().world * trainer.accumulate
    check_divides("trainer.batch_size", trainer.batch_size, parts)


def load_to_train(artifact: Artifact, trainer: TrainerConfig) -> tuple[nn.Module, Any]:
    """The base model as this rank holds it in training, and its tokenizer."""
    place = place_of(artifact)
    model = open_to_train(place.path, place.revision, trainer)
    return model, open_tokenizer(**place._asdict())


def open_to_train(path: str, revision: str | None, trainer: TrainerConfig) -> nn.Module:
    """A base model to train a method on: on this rank's device, in the type that suits it.

    Under ZeRO-3 it is spread over the ranks as it is read, and never whole on any.
    """
    device = device_of(trainer.accelerator)
    half = torch.float16 if trainer.precision == "16-mixed" else torch.bfloat16
    # A frozen base has nothing to gain from more bits than autocast leaves of it. On the CPU, where
    # half precision is slow and for trying things out, it keeps them.
    full = trainer.precision == "32-true" or device == "cpu"
    dtype = torch.float32 if full else half
    if trainer.strategy == "zero3":
        return open_model(path, revision, dtype=dtype, sharding=sharding_settings(trainer))
    return open_model(path, revision, device=device, dtype=dtype)


class Attached(NamedTuple):
    """A base with the method attached, and what trains the method."""

    model: nn.Module
    tokenizer: Any
    sources: Sources
    method: Method
    monitor: Monitor | None
    learner: Learner


def attach(
    context: Context,
    model: nn.Module,
    tokenizer: Any,
    *,
    domains: Sequence[str],
    weights: Mapping[str, Tensor] | None = None,
) -> Attached:
    """Attach the method that the stage's settings describe, to be trained.

    Args:
        context: of a stage whose inputs are those of :func:`inputs`.
        model, tokenizer: the base.
        domains: that it trains on.
        weights: what it has learnt so far, a state dict; None: nothing.

    Raises:
        UserError: what is asked for does not fit the model.
    """
    settings, source = context.config, context.inputs["domains"]
    sources = _open_sources(settings.method, context.inputs, tokenizer)
    try:
        method = settings.method.build(model, sources, settings.seed)
    except ValueError as error:
        raise UserError(str(error)) from error
    if weights:
        method.load_state_dict(weights)
    monitor = None
    if "monitor_sae" in context.inputs:
        sae = load_sae(context.inputs["monitor_sae"] / sae_training.FOLDER)
        taxonomy = features.load_taxonomy(context.inputs["monitor_features"])
        monitor = Monitor(model, method, sae, settings.method.monitor, taxonomy)
    learner = method.config.learner(
        method,
        model=model,
        domains=domains,
        pad_token_id=tokenizer.pad_token_id,
        seed=settings.seed,
        intervention=settings.intervention,
        monitor=monitor,
        general_text=partial(general_text, source, tokenizer, settings.trainer.max_length),
    )
    return Attached(model, tokenizer, sources, method, monitor, learner)


def save(context: Context, attached: Attached, folder: Path, *, written_for: str) -> None:
    """Write the trained method, so that ``load_adapter`` reads it.

    Args:
        context: of the stage that trained it.
        attached: the method, and where its SAEs come from.
        folder: where to write.
        written_for: name of the folder in the artifact where it will lie.
    """
    settings = context.config
    under = settings.intervention
    save_adapter(
        attached.method,
        folder,
        base_fingerprint=context.inputs["base"].json(POINTER)["fingerprint"],
        sae_paths=sae_paths(settings.method, context.inputs),
        written_for=context.home / written_for,
        trained_under=under.name if under.retrained else "none",
    )
    if settings.method.bundle_sae:
        bundle_sae(folder, sae_paths(settings.method, context.inputs))


def sae_paths(method: MethodConfig, inputs: Inputs) -> dict[int, Path]:
    """{control site: folder of its SAE}, as far as they are among the inputs."""
    folders = [artifact / sae_training.FOLDER for artifact in inputs.get("saes", ())]
    return dict(zip(method.sites, folders, strict=False))


def _open_sources(method: MethodConfig, inputs: Inputs, tokenizer: Any) -> Sources:
    """The SAEs and features of the control sites, as far as they are among the inputs."""
    return Sources(
        saes={
            site: SiteSAE(load_sae(path), sae_metadata(path)["mean_feature_norm"], path)
            for site, path in sae_paths(method, inputs).items()
        },
        taxonomies={
            site: features.load_taxonomy(artifact)
            for site, artifact in zip(method.sites, inputs.get("features", ()), strict=False)
        },
        signal_tokens=signal_tokens_of(tokenizer),
    )


def train_task(
    context: Context,
    learner: Learner,
    task: Task,
    batches: Callable[[int], ChatBatch],
    steps: int,
    log: RunLog,
    *,
    validation: Mapping[str, list[EncodedChat]],
    **options: Any,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Train the method on a task, with a schedule of its own.

    Args:
        validation: {domain: conversations that the training is followed on}; none: it is not.
        context, batches, steps, log, options: as for :func:`steerlora.stages.common.train`.

    Returns:
        The figures of the training, and `Validation`'s history.
    """

    def begin() -> None:
        learner.begin(task)
        for note in learner.notes(task) if ranks.is_main() else ():
            _log.warning("%s", note)

    trainer = context.config.trainer
    hooks = around(begin, lambda: learner.end(task))
    module = MethodModule(learner, trainer=trainer, total_steps=steps)
    size = max(1, trainer.batch_size // (ranks.current().world * trainer.accumulate))
    held = {
        name: [*batches_by_length(rows, size, learner.pad_token_id, learner.domains.index(name))]
        for name, rows in validation.items()
    }
    label = options.get("description", context.label)
    followed = Validation(held, trainer.validation, label)
    # What it keeps of the weights is in place before the hooks run the method.
    callbacks = [*learner.callbacks(task), *([followed] if held else []), hooks]
    with learner.training(task):
        figures = train(context, module, batches, steps, log, callbacks=callbacks, **options)
    return figures | (followed.figures() if held else {}), followed.history


def around(before: Callable[[], None], after: Callable[[], None]) -> Callback:
    """What runs the model just before the first step and after the last, on every rank alike.

    Inside the training, since a model that is sharded runs nowhere else. What ``before`` leaves in
    the method is in every checkpoint, so a training that resumes does not repeat it.
    """

    def begin(trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            before()

    return LambdaCallback(on_train_start=begin, on_train_end=lambda trainer, module: after())
