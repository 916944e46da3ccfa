"""Stage ``adapter_training``: one adapter on all domains together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress

from steerlora.config import (
    AdapterConfig,
    Config,
    ContinualConfig,
    ControlConfig,
    InterventionConfig,
    LoggerConfig,
    RoutingConfig,
    TrainerConfig,
)
from steerlora.data.packing import training_batches
from steerlora.distributed import ranks
from steerlora.engine.artifacts import write_json
from steerlora.engine.run import Context, Stage, Step, register
from steerlora.methods.routed_lora.peft import export_peft
from steerlora.methods.routed_lora.saving import save_adapter
from steerlora.stages import adapting
from steerlora.stages.common import BASE, NOT_IDENTITY, POINTER, run_log, training_rows
from steerlora.training.loop import fit
from steerlora.training.module import AdapterModule

FOLDER = "adapter"
"""Folder of the artifact that holds the adapter."""
PEFT_FOLDER = "peft"
"""Folder that holds plain LoRA in PEFT's format as well."""
HISTORY = "training.json"
"""Routing health over the training, and what the memory policy did."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Attributes: as in the configuration; memory: None where it is off; domains: that it trains
    on; intervention: that it trains under."""

    adapter: AdapterConfig
    control: ControlConfig
    routing: RoutingConfig
    memory: ContinualConfig | None
    intervention: InterventionConfig
    trainer: TrainerConfig
    domains: tuple[str, ...]
    seed: int
    logger: LoggerConfig


def step(config: Config) -> Step:
    retrained = config.intervention.name != "none" and config.intervention.phase == "training"
    if retrained:
        adapting.check_intervention(config)
    settings = AdapterSettings(
        adapter=config.adapter,
        control=config.control,
        routing=config.routing,
        memory=config.continual if config.continual.memory else None,
        intervention=config.intervention if retrained else InterventionConfig(),
        trainer=config.trainer,
        domains=tuple(config.domains.names),
        seed=config.seed,
        logger=config.logger,
    )
    under = f" under {config.intervention.name}" if retrained else ""
    label = f"adapter_training {config.model.name} {config.adapter.name} seed {config.seed}{under}"
    cost = config.trainer.max_steps * config.model.layers * 0.02
    inputs = adapting.inputs(config, monitored=config.adapter.monitored)
    return Step("adapter_training", settings, inputs, label, cost=cost)


def build(context: Context) -> dict:
    settings: AdapterSettings = context.config
    source, base_artifact = context.inputs["domains"], context.inputs["base"]
    model, tokenizer = adapting.load_to_train(base_artifact, settings.trainer)
    adapter, sae_paths = adapting.new_adapter(
        model, settings.adapter, settings.control, context.inputs, settings.seed
    )
    names, max_length = list(settings.domains), settings.trainer.max_length
    rows, owners = training_rows(source, names, tokenizer, max_length)
    by_domain = {
        name: list(compress(rows, (owner == number for owner in owners)))
        for number, name in enumerate(names)
    }

    def meet() -> None:
        if settings.adapter.router == "prototype":
            adapting.meet_general_text(model, adapter, source, tokenizer, max_length)
            for specialist, own in enumerate(by_domain.values()):
                adapting.meet(model, adapter, specialist, own, tokenizer.pad_token_id)

    def record() -> None:
        trained_under = settings.intervention.name
        adapting.record_facts(model, adapter, by_domain, tokenizer.pad_token_id, trained_under)

    watch, callbacks = adapting.callbacks(
        adapter,
        names,
        by_domain,
        tokenizer.pad_token_id,
        settings.routing,
        settings.intervention,
    )
    memory = None
    if settings.memory:
        memory = adapting.memory_policy(adapter, settings.memory, "all", settings.seed)
        callbacks.append(memory)
    callbacks.append(adapting.around(meet, record))
    with run_log(context, settings.logger) as log:
        figures = fit(
            AdapterModule(
                model,
                adapter,
                config=settings.adapter,
                trainer=settings.trainer,
                total_steps=settings.trainer.max_steps,
                monitor=adapting.open_monitor(model, adapter, settings.control, context.inputs),
            ),
            training_batches(
                rows,
                owners,
                settings.trainer,
                pad_token_id=tokenizer.pad_token_id,
                seed=settings.seed,
            ),
            settings.trainer.max_steps,
            trainer=settings.trainer,
            checkpoints=context.directory / "checkpoints",
            progress=context.progress,
            description=context.label,
            identity=context.fingerprint,
            run_logger=log.lightning(),
            callbacks=callbacks,
        )
        figures |= {"parameters": adapter.parameter_count()}
        log.summary(figures)
    if not ranks.is_main():
        return {}
    save_adapter(
        adapter,
        context.directory / FOLDER,
        base_fingerprint=base_artifact.json(POINTER)["fingerprint"],
        sae_paths=sae_paths,
        written_for=context.home / FOLDER,
        trained_under=settings.intervention.name,
    )
    write_json(
        context.directory / HISTORY,
        {"routing": watch.history, "events": memory.events if memory else []},
    )
    if settings.adapter.routing == "none":
        pointer = base_artifact.json(POINTER)["path"]
        path = pointer or str(base_artifact / BASE)
        export_peft(adapter, context.directory / PEFT_FOLDER, base_path=path)
    return figures


STAGE = register(
    Stage(
        "adapter_training",
        3,
        build,
        skip=NOT_IDENTITY
        | {"adapter.name", "adapter.hard_rank", "routing.collapse", "routing.collapse_below"},
        shared=True,
        check=lambda settings: adapting.check_shares(settings.trainer),
    )
)
