"""Stage ``adapter_training``: one adapter on all domains together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from steerlora.artifacts import Artifact
from steerlora.config import AdapterConfig, Config, ControlConfig, LoggerConfig, TrainerConfig
from steerlora.data.chat import ChatBatches, EncodedChat, collate
from steerlora.errors import UserError
from steerlora.formats.adapter import save_adapter
from steerlora.formats.peft import export_peft
from steerlora.formats.sae import load_sae, sae_metadata
from steerlora.models.adapter import Adapter, AdapterShape
from steerlora.models.decoder import decoder_of
from steerlora.pipeline import Context, Stage, Step, register
from steerlora.stages import base, domains, sae_training
from steerlora.stages.common import BASE, NOT_IDENTITY, POINTER, load_base, run_log, training_rows
from steerlora.training.adapter import AdapterModule
from steerlora.training.loop import fit

FOLDER = "adapter"
"""Folder of the artifact that holds the adapter."""
PEFT_FOLDER = "peft"
"""Folder that holds plain LoRA in PEFT's format as well."""
FACT_ROWS = 64
"""Training rows a domain over which mean rank and the domains' specialists are recorded."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Attributes: as in the configuration; domains: that it trains on."""

    adapter: AdapterConfig
    control: ControlConfig
    trainer: TrainerConfig
    domains: tuple[str, ...]
    seed: int
    logger: LoggerConfig


def step(config: Config) -> Step:
    settings = AdapterSettings(
        adapter=config.adapter,
        control=config.control,
        trainer=config.trainer,
        domains=tuple(config.domains.names),
        seed=config.seed,
        logger=config.logger,
    )
    label = f"adapter_training {config.model.name} {config.adapter.name} seed {config.seed}"
    cost = config.trainer.max_steps * config.model.layers * 0.02
    return Step("adapter_training", settings, inputs(config), label, cost=cost)


def inputs(config: Config) -> dict[str, Step | tuple[Step, ...]]:
    """What any training of an adapter reads."""
    found: dict[str, Step | tuple[Step, ...]] = {
        "domains": domains.step(config),
        "base": base.step(config),
    }
    if config.adapter.routing == "sae":
        found["saes"] = sae_training.steps(config)
    return found


def new_adapter(
    model, config: AdapterConfig, control: ControlConfig, saes: tuple[Artifact, ...], seed: int
) -> tuple[Adapter, dict[int, Path]]:
    """An attached, untrained adapter and where its SAEs lie.

    Raises:
        UserError: what is asked for does not fit the model.
    """
    paths = {
        site: artifact / sae_training.FOLDER
        for site, artifact in zip(control.sites, saes, strict=False)
    }
    shape = AdapterShape(
        routing=config.routing,
        sites=tuple(control.sites),
        specialists=config.specialists,
        rank=config.rank,
        alpha=config.alpha,
        top_k=config.top_k,
        temperature=config.temperature,
        dynamic_rank=config.dynamic_rank,
        initial_rank=config.initial_rank,
        context=control.context,
        decay=control.decay,
        target_modules=tuple(config.target_modules),
    )
    try:
        adapter = Adapter(
            model,
            shape,
            {site: load_sae(path) for site, path in paths.items()},
            feature_scales={
                site: sae_metadata(path)["mean_feature_norm"] for site, path in paths.items()
            },
            seed=seed,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    return adapter.attach(model), paths


def build(context: Context) -> dict:
    settings: AdapterSettings = context.config
    source, base_artifact = context.inputs["domains"], context.inputs["base"]
    model, tokenizer = load_base(base_artifact)
    adapter, sae_paths = new_adapter(
        model, settings.adapter, settings.control, context.inputs.get("saes", ()), settings.seed
    )
    rows, owners = training_rows(
        source, list(settings.domains), tokenizer, settings.trainer.max_length
    )
    with run_log(context, settings.logger) as log:
        figures = fit(
            AdapterModule(
                model,
                adapter,
                config=settings.adapter,
                trainer=settings.trainer,
                total_steps=settings.trainer.max_steps,
            ),
            ChatBatches(
                rows,
                owners,
                batch_size=settings.trainer.batch_size,
                pad_token_id=tokenizer.pad_token_id,
                seed=settings.seed,
            ),
            settings.trainer.max_steps,
            trainer=settings.trainer,
            checkpoints=context.directory / "checkpoints",
            progress=context.progress,
            description=context.label,
            run_logger=log.lightning(),
        )
        record_facts(model, adapter, rows, owners, list(settings.domains), tokenizer.pad_token_id)
        figures |= {"parameters": adapter.parameter_count()}
        log.summary(figures)
    save_adapter(
        adapter,
        context.directory / FOLDER,
        base_fingerprint=base_artifact.json(POINTER)["fingerprint"],
        sae_paths=sae_paths,
        written_for=context.home / FOLDER,
    )
    if settings.adapter.routing == "none":
        pointer = base_artifact.json(POINTER)["path"]
        path = pointer or str(base_artifact / BASE)
        export_peft(adapter, context.directory / PEFT_FOLDER, base_path=path)
    return figures


@torch.no_grad()
def record_facts(
    model,
    adapter: Adapter,
    rows: list[EncodedChat],
    owners: list[int],
    names: list[str],
    pad_token_id: int,
) -> None:
    """Record, over training rows, what interventions need: mean rank, each domain's specialist."""
    model.eval()
    usage: dict[int, dict[str, torch.Tensor]] = {layer: {} for layer in adapter.sites}
    ranks: dict[int, list[torch.Tensor]] = {layer: [] for layer in adapter.sites}
    for owner in sorted(set(owners)):
        chosen = [row for row, o in zip(rows, owners, strict=True) if o == owner][:FACT_ROWS]
        batch = collate(chosen, [owner] * len(chosen), pad_token_id).to(model.device)
        decoder_of(model)(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
        real = batch.attention_mask.bool()
        for layer, routing in adapter.routing().items():
            usage[layer][names[owner]] = routing.gate[real].mean(0)
            ranks[layer].append(routing.mask[real].sum(-1))
    for layer, site in adapter.sites.items():
        if site.facts is not None:
            site.facts.mean_rank = float(torch.cat(ranks[layer]).mean())
            site.facts.specialist_of_domain = {
                name: int(gate.argmax()) for name, gate in usage[layer].items()
            }


STAGE = register(Stage("adapter_training", 1, build, skip=NOT_IDENTITY | {"adapter.name"}))
