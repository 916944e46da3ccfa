"""Stage ``adapter_training``: one method on all domains together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from steerlora.config import Config, InterventionConfig
from steerlora.data.packing import training_batches
from steerlora.distributed import ranks
from steerlora.engine.manifests import write_json
from steerlora.engine.steps import Context, Step, stage
from steerlora.methods.base import Task
from steerlora.methods.saving import export_peft, save_adapter
from steerlora.stages import method_training
from steerlora.stages.common import BASE, NOT_IDENTITY, POINTER, domain_names, run_log

FOLDER = "adapter"
"""Folder of the artifact that holds the trained method."""
PEFT_FOLDER = "peft"
"""Folder that holds it in PEFT's format as well, where PEFT has one for it."""
HISTORY = "training.json"
"""What the method kept of its training, such as the health of its routing."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(method_training.TrainingSettings):
    """What joint training depends on."""

    domains: tuple[str, ...]
    """That it trains on."""


def step(config: Config) -> Step:
    retrained = config.intervention.retrained
    if retrained:
        method_training.check_intervention(config)
    settings = AdapterSettings.of(
        config,
        config.intervention if retrained else InterventionConfig(),
        domains=tuple(config.domains.names),
    )
    under = f" under {config.intervention.name}" if retrained else ""
    return Step(
        "adapter_training",
        settings,
        method_training.inputs(config, monitored=config.method.compares_with_base),
        f"adapter_training {config.model.name} {config.method.name} seed {config.seed}{under}",
        cost=config.trainer.max_steps * config.model.layers * 0.02,
        skip=method_training.not_identity(config.method),
    )


@stage(
    "adapter_training",
    4,
    step=step,
    skip=NOT_IDENTITY,
    shared=True,
    check=lambda settings: method_training.check_shares(settings.trainer),
)
def build(context: Context) -> dict:
    settings: AdapterSettings = context.config
    source, base_artifact = context.inputs["domains"], context.inputs["base"]
    model, tokenizer = method_training.load_to_train(base_artifact, settings.trainer)
    attached = method_training.attach(context, model, tokenizer, domains=settings.domains)
    learner, method = attached.learner, attached.method
    rows, cuts = method_training.rows_to_learn(
        source, settings.domains, tokenizer, settings.trainer
    )
    order = domain_names(source)
    batches = training_batches(
        list(chain.from_iterable(rows.values())),
        [order.index(name) for name, own in rows.items() for _ in own],
        settings.trainer,
        pad_token_id=tokenizer.pad_token_id,
        seed=settings.seed,
    )
    with run_log(context, settings.logger) as log:
        figures = method_training.train_task(
            context, learner, Task(rows), batches, settings.trainer.max_steps, log
        )
        figures |= {"parameters": method.parameter_count(), **cuts}
        log.results(figures)
    if not ranks.is_main():
        return {}
    pointer = base_artifact.json(POINTER)
    save_adapter(
        method,
        context.directory / FOLDER,
        base_fingerprint=pointer["fingerprint"],
        sae_paths={site: given.path for site, given in attached.sources.saes.items()},
        written_for=context.home / FOLDER,
        trained_under=settings.intervention.name,
    )
    write_json(context.directory / HISTORY, learner.history())
    if settings.method.exports_to_peft:
        path = pointer["path"] or str(base_artifact / BASE)
        export_peft(method, context.directory / PEFT_FOLDER, base_path=path)
    return figures
