"""Stage ``sae_training``: one sparse autoencoder a site, with proof of its quality."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from steerlora.config import Config, LoggerConfig, TrainerConfig
from steerlora.data.activations import ActivationBatches, ActivationStore
from steerlora.data.chat import batches_by_length, encode_chats
from steerlora.distributed import ranks
from steerlora.distributed.strategies import check_divides
from steerlora.engine.artifacts import Artifact
from steerlora.engine.content import identity_of
from steerlora.engine.manifests import write_json
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError
from steerlora.lm.decoder import first_real_token, residual_streams
from steerlora.reporting.runs import RunLog
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.config import SAEConfig
from steerlora.saes.metrics import ce_recovered, sae_metrics
from steerlora.saes.qwen_scope import is_qwen_scope
from steerlora.saes.saelens import open_sae, sae_files, sae_fingerprint, save_sae
from steerlora.saes.training import SAEModule
from steerlora.stages import activations, base
from steerlora.stages.common import (
    ADAPTER_ONLY,
    NOT_IDENTITY,
    POINTER,
    WHERE,
    domain_names,
    load_base,
    read_rows,
    run_log,
    train,
)

FOLDER = "sae"
"""Folder of the artifact that holds the SAE, in SAELens' layout."""
PROOF_ROWS = 64
"""Held-out rows a domain on which quality is measured."""


@dataclass(frozen=True, kw_only=True)
class SAESettings:
    """Attributes: site: the layer whose incoming stream it reads, the number of layers for the
    stream that leaves the last; max_length: of a row; identity: of the files behind ``sae.path``,
    empty where none are given; spread: the base over all GPUs, when quality is measured."""

    sae: SAEConfig
    site: int
    max_length: int
    identity: str
    spread: bool
    trainer: TrainerConfig
    logger: LoggerConfig


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
    if sae.path is None:
        inputs["activations"] = activations.step(config)
    settings = SAESettings(
        sae=sae,
        site=site,
        max_length=config.trainer.max_length,
        identity=_identity(config, sae, site),
        spread=config.evaluation.spread,
        trainer=config.trainer,
        logger=config.logger,
    )
    label = f"sae_training {config.model.name} site {site}"
    return Step("sae_training", settings, inputs, label, cost=20)


def _identity(config: Config, sae: SAEConfig, site: int) -> str:
    """What is read for a site of ``sae.path``: the files' content, or a hub id; else nothing."""
    if not sae.path:
        return ""
    files = sae_files(sae.path, site)
    return identity_of(files, config.artifacts.root) if files else sae.path


def _check(settings: SAESettings) -> None:
    if not settings.sae.path:
        check_divides("sae.batch_size", settings.sae.batch_size, ranks.current().world)


@stage(
    "sae_training",
    2,
    step=requested,
    # The place of given files does not matter, their content does.
    skip=NOT_IDENTITY | ADAPTER_ONLY | WHERE | {"sae.max_tokens", "sae.path"},
    shared=True,
    check=_check,
)
def build(context: Context) -> dict:
    settings: SAESettings = context.config
    pointer = context.inputs["base"].json(POINTER)
    with run_log(context, settings.logger) as log:
        if settings.sae.path:
            (sae, said), figures = open_sae(settings.sae.path, settings.site), {}
            _check_fit(settings, sae, said, pointer)
        else:
            sae, figures = _train(context, settings, log)
        if not ranks.is_main():
            return {}
        model, tokenizer = load_base(
            context.inputs["base"], accelerator=settings.trainer.accelerator, spread=settings.spread
        )
        sae.to(model.device)
        quality = _quality(context.inputs["domains"], settings, model, tokenizer, sae)
        log.results({**figures, **quality})
    save_sae(
        sae,
        context.directory / FOLDER,
        metadata={
            "model_name": str(pointer["path"]),
            "hook_name": _hook_name(settings.site, pointer["layers"]),
            "context_size": settings.max_length,
            "prepend_bos": False,
            "site": settings.site,
            "base_fingerprint": pointer["fingerprint"],
            "mean_feature_norm": quality["mean_feature_norm"],
        },
    )
    write_json(context.directory / "quality.json", quality)
    return {**figures, **quality, "fingerprint": sae_fingerprint(sae)}


def _hook_name(site: int, layers: int) -> str:
    """TransformerLens' name of a stream; the one that leaves the last layer enters no other."""
    return (
        f"blocks.{site}.hook_resid_pre" if site < layers else f"blocks.{site - 1}.hook_resid_post"
    )


def _check_fit(settings: SAESettings, sae: SparseAutoencoder, said: dict, base: dict) -> None:
    """Refuse an SAE of the user's that was made for another width, site or base."""
    path, width = settings.sae.path, base["width"]
    if sae.width != width:
        raise UserError(f"sae.path={path} reads width {sae.width}; the model has {width}")
    if not is_qwen_scope(path):  # its files are named by the layer
        _check_hook(settings, said, base["layers"])
    wanted = base["fingerprint"]
    if said.get("base_fingerprint", wanted) != wanted:
        raise UserError(f"sae.path={path} was trained on another base model")


def _check_hook(settings: SAESettings, said: dict, layers: int) -> None:
    """Refuse an SAE that reads anything but the stream of this site."""
    path, wanted = settings.sae.path, _hook_name(settings.site, layers)
    name = said.get("hook_name")
    if not name:
        raise UserError(
            f"sae.path={path} does not say what it reads: set metadata.hook_name in its cfg.json "
            f"to {wanted}, if it was trained on the stream entering layer {settings.site}"
        )
    hook = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", str(name))
    if not hook:
        raise UserError(
            f"sae.path={path} reads {name}, not {wanted}: give an SAE of the stream entering layer "
            f"{settings.site}"
        )
    site = int(hook[1]) + (hook[2] == "post")
    if site != settings.site:
        raise UserError(
            f"sae.path={path} reads the stream entering layer {site} ({name}), not {wanted}: "
            f"method.sites={[settings.site]}"
        )


def _train(context: Context, settings: SAESettings, log: RunLog) -> tuple[SparseAutoencoder, dict]:
    config, store = settings.sae, ActivationStore(context.inputs["activations"] / "activations")
    streams = config.streams(settings.site)
    batches = ActivationBatches(store, settings.site, config.batch_size, config.seed, *streams[1:])
    steps = config.steps_over(store.tokens(settings.site))
    sae = config.build(store.width)
    first = batches(0)
    if config.median_start:
        sae.center_on(first)
    sae.initialize_thresholds(first)
    module = SAEModule(
        sae,
        lr=config.learning_rate,
        total_steps=steps,
        warmup_steps=int(config.warmup_fraction * steps),
        decay_fraction=config.decay_fraction,
        dead_after_tokens=round(config.dead_fraction * steps * config.batch_size),
    )
    # In full precision, whole batches: accumulation and mixed precision are the adapter's.
    trainer = replace(settings.trainer, precision="32-true", accumulate=1)
    return sae, train(context, module, batches, steps, log, trainer=trainer)


@torch.no_grad()
def _quality(
    source: Artifact, settings: SAESettings, model, tokenizer, sae: SparseAutoencoder
) -> dict[str, float]:
    """Reconstruction, sparsity and cross-entropy recovered, on held-out rows of every domain.

    Cross-entropy is recovered by splicing into a layer's input: no figure of it where the stream
    leaves the last layer and enters none.
    """
    rows = []
    for name in domain_names(source):
        rows += read_rows(source / f"heldout/{name}.jsonl")[:PROOF_ROWS]
    encoded = encode_chats(tokenizer, rows, settings.max_length)
    batches = [
        (batch.input_ids.to(model.device), batch.attention_mask.to(model.device))
        for batch in batches_by_length(encoded, PROOF_ROWS, tokenizer.pad_token_id)
    ]
    sites = [settings.site, settings.site + sae.span] if sae.span else [settings.site]
    streams = []
    for ids, mask in batches:
        found = residual_streams(model, ids, mask, sites)
        kept = mask.bool() & ~first_real_token(mask)
        tokens = [found[site][kept] for site in sites]
        streams.append(torch.stack(tokens, 1) if sae.span else tokens[0])
    activations = torch.cat(streams)
    norms = sae.encode(sae.read(activations)).values.norm(dim=-1)
    return {
        **sae_metrics(sae, activations),
        **ce_recovered(model, sae, settings.site, batches, span=sae.span),
        "mean_feature_norm": float(norms.mean()),
        "tokens": len(activations),
    }
