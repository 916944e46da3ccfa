"""Stage ``sae_training``: one sparse autoencoder a site, with proof of its quality."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from steerlora.config import Config, LoggerConfig, TrainerConfig
from steerlora.data.activations import ActivationBatches
from steerlora.data.headers import signal_tokens_of
from steerlora.data.streaming import StreamedActivations
from steerlora.distributed import ranks
from steerlora.distributed.strategies import check_divides
from steerlora.engine.manifests import write_json
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError
from steerlora.reporting.runs import RunLog
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.config import SAEConfig
from steerlora.saes.end_to_end.config import EndToEndConfig
from steerlora.saes.saelens import sae_fingerprint, save_sae
from steerlora.saes.training import SAEModule, course, input_scale, start_on
from steerlora.stages import activations, base
from steerlora.stages.common import (
    ADAPTER_ONLY,
    NOT_IDENTITY,
    POINTER,
    WHERE,
    load_base,
    run_log,
    sae_rows,
    train,
)
from steerlora.stages.end_to_end import (
    end_to_end_module,
    starting_sae,
    text_batches,
)
from steerlora.stages.given_saes import hook_name, identity_of_saes, open_given
from steerlora.stages.sae_held_out import HeldOut, buffer_of
from steerlora.stages.sae_quality import (
    TextBatch,
    held_out_batches,
    implausible,
    quality,
    streams_of,
)
from steerlora.stages.sae_text import Corpus, SAEText

FOLDER = "sae"
"""Folder of the artifact that holds the SAE, in SAELens' layout."""
HISTORY = "held_out.json"
"""File of the artifact with `HeldOut`'s history of the training."""
QUALITY = "quality.json"
"""File of the artifact with its figures on held-out rows."""
COMPARED = ("kl_div_with_sae", "ce_loss_with_sae", "fvu", "l0")
"""Figures that a fine-tuned SAE reports as they were before, too."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SAESettings:
    """Attributes: site: the layer whose incoming stream it reads, the number of layers for the
    stream that leaves the last; domains: whose text the activations are of, or the training end to
    end; corpus: text beside it where activations are streamed; max_length: of a row; identity: of
    the files behind ``sae.path``, empty where none are given; spread: the base over all GPUs, when
    quality is measured or activations are streamed."""

    sae: SAEConfig
    site: int
    domains: tuple[str, ...]
    corpus: Corpus
    max_length: int
    identity: str
    spread: bool
    trainer: TrainerConfig
    logger: LoggerConfig


class Activations(NamedTuple):
    """What an SAE trains on."""

    batches: ActivationBatches | StreamedActivations
    steps: int
    """Optimizer steps."""


def steps(config: Config) -> tuple[Step, ...]:
    """One step a control site."""
    return tuple(_step(config, config.sae, site) for site in config.method.streams)


def monitor_step(config: Config) -> Step | None:
    """The SAE of the monitor site, trained even where ``sae.path`` gives a control site's."""
    site = config.method.monitor
    return None if site is None else _step(config, replace(config.sae, path=None), site)


def requested(config: Config) -> tuple[Step, ...]:
    """The SAEs of the control sites, and of the monitor site."""
    monitor = monitor_step(config)
    return (*steps(config), *([monitor] if monitor else []))


def _step(config: Config, sae: SAEConfig, site: int) -> Step:
    inputs = base.inputs(config)
    own = sae.end_to_end
    if own.steps and own.start == "trained":
        inputs["sae"] = _step(config, replace(sae, end_to_end=EndToEndConfig()), site)
    trained = sae.path is None and not own.steps
    if trained and not sae.stream:
        inputs["activations"] = activations.steps_of(config, site)
    settings = SAESettings(
        sae=sae,
        site=site,
        domains=tuple(config.domains.names),
        corpus=Corpus.of(config) if trained and sae.stream else Corpus(),
        max_length=config.trainer.max_length,
        identity=identity_of_saes(config, sae.path, site),
        spread=config.evaluation.spread,
        trainer=config.trainer,
        logger=config.logger,
    )
    label = f"sae_training {config.model.name} site {site}"
    label += " end to end" if own.steps else ""
    unread = frozenset() if sae.stream else frozenset({"sae.stream_buffer"})
    return Step("sae_training", settings, inputs, label, cost=20, skip=unread)


def _check(settings: SAESettings) -> None:
    own, world = settings.sae.end_to_end, ranks.current().world
    if own.steps:
        if settings.spread:
            raise UserError(
                f"evaluation.spread=true with sae.end_to_end.steps={own.steps}: an SAE trains end "
                "to end in a model on one device; set evaluation.spread=false, and evaluate apart"
            )
        check_divides("sae.end_to_end.batch_size", own.batch_size, world)
    elif not settings.sae.path:
        check_divides("sae.batch_size", settings.sae.batch_size, world)


@stage(
    "sae_training",
    9,
    step=requested,
    # The place of given files does not matter, their content does.
    skip=NOT_IDENTITY
    | ADAPTER_ONLY
    | WHERE
    | {"sae.max_tokens", "sae.corpus", "sae.path", "corpus.path"},
    shared=True,
    check=_check,
)
def build(context: Context) -> dict:
    settings: SAESettings = context.config
    pointer = context.inputs["base"].json(POINTER)

    @cache
    def loaded() -> tuple:
        return load_base(
            context.inputs["base"], accelerator=settings.trainer.accelerator, spread=settings.spread
        )

    @cache
    def batches() -> list[TextBatch]:
        return held_out_batches(context.inputs["domains"], loaded()[1], settings.max_length)

    def streams(*sites: int) -> Tensor:
        """Of held-out rows, [T, D], or [T, sites, D] of several sites."""
        model, tokenizer = loaded()
        found = streams_of(model, batches(), sites, signal_tokens_of(tokenizer)).rows
        return found if len(sites) > 1 else found[:, 0]

    def buffer() -> Tensor | None:
        """Held-out activations, for rank 0; the base is let go until the training is over."""
        if not ranks.is_main():
            return None
        sites = settings.sae.streams(settings.site)
        found = streams(*sites).cpu()
        loaded.cache_clear()
        return buffer_of(found, settings.sae.batch_size)

    with run_log(context, settings.logger) as log:
        if settings.sae.end_to_end.steps:
            sae, figures = _train_end_to_end(context, settings, *loaded(), log)
            history = []
        elif settings.sae.path:
            own = partial(streams, settings.site)
            sae, figures = open_given(settings.sae.path, settings.site, pointer, own), {}
            history = []
        else:
            held_out = buffer()
            with _activations(context, settings, loaded) as source:
                sae, figures, history = _train(context, settings, log, source, held_out)
        if not ranks.is_main():
            return {}
        model, tokenizer = loaded()
        sae.to(model.device)
        measured = quality(model, sae, settings.site, batches(), signal_tokens_of(tokenizer))
        log.results({**figures, **measured})
    wrong = implausible(measured, sae.latents)
    if settings.sae.path and wrong:
        _log.warning("sae.path=%s: at site %d %s", settings.sae.path, settings.site, wrong)
    save_sae(
        sae,
        context.directory / FOLDER,
        metadata={
            "model_name": str(pointer["path"]),
            "hook_name": hook_name(settings.site, pointer["layers"]),
            "context_size": settings.max_length,
            "prepend_bos": False,
            "site": settings.site,
            "base_fingerprint": pointer["fingerprint"],
            "mean_feature_norm": measured["mean_feature_norm"],
        },
    )
    write_json(context.directory / QUALITY, measured)
    write_json(context.directory / HISTORY, history)
    return {**figures, **measured, "fingerprint": sae_fingerprint(sae)}


@contextmanager
def _activations(
    context: Context, settings: SAESettings, loaded: Callable[[], tuple]
) -> Iterator[Activations]:
    """Stored ones, or with ``sae.stream`` those that the base computes meanwhile."""
    config = settings.sae
    if not config.stream:
        batches = ActivationBatches(activations.stores_of(context), config.batch_size, config.seed)
        yield Activations(batches, config.steps_over(batches.tokens))
        return
    model, tokenizer = loaded()
    rows = sae_rows(context.inputs["domains"], settings.domains, tokenizer, settings.max_length)
    text = SAEText(rows, settings.corpus.path, tokenizer, settings.max_length, config.seed)
    steps = config.steps_over(0)
    with StreamedActivations(
        model,
        text.again,
        config.streams(settings.site),
        batch_size=config.batch_size,
        buffer=config.stream_buffer,
        steps=steps,
        seed=config.seed,
        signal_tokens=signal_tokens_of(tokenizer),
    ) as batches:
        yield Activations(batches, steps)


def _train(
    context: Context,
    settings: SAESettings,
    log: RunLog,
    source: Activations,
    held_out: Tensor | None,
) -> tuple[SparseAutoencoder, dict, list[dict[str, float]]]:
    """The SAE, figures of its training, and how it did on held-out activations meanwhile."""
    config, (batches, steps) = settings.sae, source
    first = batches(0).cpu().float()
    sae = config.build(first.shape[-1])
    scale = input_scale(config, first)
    start_on(sae, config, first / scale)
    schedule = course(config, steps, config.batch_size)
    module = SAEModule(sae, lr=config.learning_rate, scale=scale, **schedule)
    watch = HeldOut(None if held_out is None else held_out.float() / scale, steps)
    trainer = _in_full(settings)
    found = train(context, module, batches, steps, log, trainer=trainer, callbacks=[watch])
    sae.rescale(scale)
    return sae, found, watch.history


def _in_full(settings: SAESettings) -> TrainerConfig:
    """In full precision, whole batches: accumulation and mixed precision are the adapter's."""
    return replace(settings.trainer, precision="32-true", accumulate=1)


def _train_end_to_end(
    context: Context, settings: SAESettings, model: PreTrainedModel, tokenizer, log: RunLog
) -> tuple[SparseAutoencoder, dict]:
    """The SAE and its figures, of which some are those of the SAE that was fine-tuned."""
    own, start = settings.sae.end_to_end, context.inputs.get("sae")
    sae = starting_sae(settings.sae, start and start / FOLDER, model.config.hidden_size)
    batches = text_batches(
        settings.sae, context.inputs["domains"], settings.domains, tokenizer, settings.max_length
    )
    replaced = signal_tokens_of(tokenizer)
    module = end_to_end_module(settings.sae, sae, model, settings.site, batches, replaced)
    figures = train(context, module, batches, own.steps, log, trainer=_in_full(settings))
    before = start.json(QUALITY) if start else {}
    return sae, {**figures, **{f"{name}_before": before[name] for name in COMPARED if before}}
