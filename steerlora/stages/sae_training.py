"""Stage ``sae_training``: one sparse autoencoder a site, with proof of its quality."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from itertools import product
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from steerlora.config import Config, LoggerConfig, TrainerConfig
from steerlora.data.headers import signal_tokens_of
from steerlora.distributed import ranks
from steerlora.distributed.strategies import check_divides
from steerlora.engine.manifests import write_json
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError, nearest, shown
from steerlora.reporting.runs import RunLog
from steerlora.saes.config import SAEConfig
from steerlora.saes.end_to_end.config import EndToEndConfig
from steerlora.saes.saelens import sae_fingerprint, save_sae
from steerlora.stages import activations, base
from steerlora.stages.common import (
    ADAPTER_ONLY,
    NOT_IDENTITY,
    POINTER,
    WHERE,
    load_base,
    run_log,
    train,
)
from steerlora.stages.end_to_end import (
    end_to_end_module,
    starting_sae,
    text_batches,
)
from steerlora.stages.given_saes import hook_name, identity_of_saes, open_given
from steerlora.stages.sae_fitting import Trained, fit_stored, fit_streamed, in_full
from steerlora.stages.sae_held_out import buffer_of
from steerlora.stages.sae_quality import (
    TextBatch,
    held_out_batches,
    implausible,
    quality,
    streams_of,
)
from steerlora.stages.sae_text import Corpus

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
    end; corpus: text beside it where activations are streamed or training is end to end;
    max_length: of a row; identity: of the files behind ``sae.path``, empty where none are given;
    spread: the base over all GPUs, when quality is measured or activations are streamed."""

    sae: SAEConfig
    site: int
    domains: tuple[str, ...]
    corpus: Corpus
    max_length: int
    identity: str
    spread: bool
    trainer: TrainerConfig
    logger: LoggerConfig


SHARED = {"stream", "stream_buffer", "stream_seed", "steps", "epochs", "batch_size", "corpus"}
"""Keys of an SAE that those have in common which share a stream."""


def steps(config: Config) -> tuple[Step, ...]:
    """One step a control site."""
    return tuple(_step(config, config.sae, site) for site in config.method.streams)


def monitor_step(config: Config) -> Step | None:
    """The SAE of the monitor site, trained even where ``sae.path`` gives a control site's."""
    site = config.method.monitor
    return None if site is None else _step(config, replace(config.sae, path=None), site)


def of_sites(config: Config) -> tuple[Step, ...]:
    """The SAEs of the control sites, and of the monitor site."""
    monitor = monitor_step(config)
    return (*steps(config), *([monitor] if monitor else []))


def requested(config: Config, variant: Callable[..., Config]) -> tuple[Step, ...]:
    """Those; with lists in ``stage.settings``, such as ``{k: [16, 32], seed: [0, 1]}``, of every
    combination of these keys of ``sae``.

    Raises:
        UserError: a key that the SAE does not have, or no list.
    """
    lists = config.stage.settings
    known = [field.name for field in fields(config.sae)]
    for name, values in lists.items():
        if name not in known:
            raise UserError(f"stage.settings.{name}: no key of sae; {nearest(name, known)}")
        if not isinstance(values, list) or not values:
            raise UserError(
                f"stage.settings.{name}={shown(values)}: must be a list of values of sae.{name}, "
                "an SAE for each"
            )
    found = []
    for values in product(*lists.values()):
        changes = [f"{name}={shown(value)}" for name, value in zip(lists, values, strict=True)]
        own = of_sites(variant(*(f"sae.{one}" for one in changes)) if lists else config)
        found += [replace(step, label=" ".join([step.label, *changes])) for step in own]
    return tuple({step.fingerprint: step for step in found}.values())


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
        corpus=Corpus.of(config) if own.steps or (trained and sae.stream) else Corpus(),
        max_length=config.trainer.max_length,
        identity=identity_of_saes(config, sae.path, site),
        spread=config.evaluation.spread,
        trainer=config.trainer,
        logger=config.logger,
    )
    label = f"sae_training {config.model.name} site {site}"
    label += " end to end" if own.steps else ""
    if not sae.stream:
        unread = frozenset({"sae.stream_buffer", "sae.stream_seed"})
        return Step("sae_training", settings, inputs, label, cost=20, skip=unread)
    # DeepSpeed clips the gradients of all parameters together.
    alone = not trained or config.trainer.strategy.startswith("zero")
    together = frozenset() if alone else _differing(sae)
    return Step("sae_training", settings, inputs, label, cost=20, together=together)


def _differing(sae: SAEConfig) -> frozenset[str]:
    """Keys in which the steps of SAEs that share a stream may differ. The latents decide the number
    of steps, where it is not given."""
    own = {field.name for field in fields(sae)} - SHARED - ({"latents"} if not sae.steps else set())
    return frozenset({"site", *(f"sae.{name}" for name in own)})


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
    steps=requested,
    # The place of given files does not matter, their content does.
    skip=NOT_IDENTITY
    | ADAPTER_ONLY
    | WHERE
    | {"sae.max_tokens", "sae.corpus", "sae.path", "corpus.path"},
    shared=True,
    together=True,
    check=_check,
)
def build(contexts: Sequence[Context]) -> list[dict]:
    first = contexts[0]
    settings: SAESettings = first.config

    @cache
    def loaded() -> tuple:
        return load_base(
            first.inputs["base"], accelerator=settings.trainer.accelerator, spread=settings.spread
        )

    @cache
    def batches() -> list[TextBatch]:
        return held_out_batches(first.inputs["domains"], loaded()[1], settings.max_length)

    def streams(*sites: int) -> Tensor:
        """Of held-out rows, [T, D], or [T, sites, D] of several sites."""
        model, tokenizer = loaded()
        found = streams_of(model, batches(), sites, signal_tokens_of(tokenizer)).rows
        return found if len(sites) > 1 else found[:, 0]

    def buffer(own: SAESettings) -> Tensor | None:
        """Held-out activations, for rank 0."""
        if not ranks.is_main():
            return None
        return buffer_of(streams(*own.sae.streams(own.site)).cpu(), own.sae.batch_size)

    with run_log(first, settings.logger) as log:
        if settings.sae.end_to_end.steps:
            trained = [_train_end_to_end(first, settings, *loaded(), log)]
        elif settings.sae.path:
            base_facts, own = first.inputs["base"].json(POINTER), partial(streams, settings.site)
            sae = open_given(settings.sae.path, settings.site, base_facts, own)
            trained = [Trained(sae, {}, [])]
        elif settings.sae.stream:
            held_out = [buffer(context.config) for context in contexts]
            trained = fit_streamed(contexts, log, held_out, *loaded())
        else:
            held_out = buffer(settings)
            loaded.cache_clear()  # the base is let go until the training is over
            trained = [fit_stored(first, log, held_out)]
        if not ranks.is_main():
            return [{} for _ in contexts]
        summaries = [_store(first, trained[0], log, *loaded(), batches())]
    for context, one in zip(contexts[1:], trained[1:], strict=True):
        with run_log(context, context.config.logger) as log:
            summaries.append(_store(context, one, log, *loaded(), batches()))
    return summaries


def _store(
    context: Context,
    trained: Trained,
    log: RunLog,
    model: PreTrainedModel,
    tokenizer: Any,
    batches: list[TextBatch],
) -> dict:
    """Measure an SAE and write the files of its artifact; the summary."""
    settings, (sae, figures, history) = context.config, trained
    pointer = context.inputs["base"].json(POINTER)
    sae.to(model.device)
    measured = quality(model, sae, settings.site, batches, signal_tokens_of(tokenizer))
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


def _train_end_to_end(
    context: Context, settings: SAESettings, model: PreTrainedModel, tokenizer, log: RunLog
) -> Trained:
    """Some of the figures are those of the SAE that was fine-tuned."""
    own, start = settings.sae.end_to_end, context.inputs.get("sae")
    sae = starting_sae(settings.sae, start and start / FOLDER, model.config.hidden_size)
    batches = text_batches(
        settings.sae,
        context.inputs["domains"],
        settings.domains,
        settings.corpus.path,
        tokenizer,
        settings.max_length,
    )
    replaced = signal_tokens_of(tokenizer)
    module = end_to_end_module(settings.sae, sae, model, settings.site, batches, replaced)
    figures = train(context, module, batches, own.steps, log, trainer=in_full(context))
    before = start.json(QUALITY) if start else {}
    figures |= {f"{name}_before": before[name] for name in COMPARED if before}
    return Trained(sae, figures, [])
