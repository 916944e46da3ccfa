"""Stage ``adapter_training``: one method on all domains together."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from itertools import chain, count

from steerlora.config import Config, InterventionConfig
from steerlora.data.packing import training_batches
from steerlora.distributed import ranks
from steerlora.engine.manifests import write_json
from steerlora.engine.steps import Context, Step, stage
from steerlora.methods.base import Task
from steerlora.methods.saving import bundle_sae, export_peft
from steerlora.stages import method_training
from steerlora.stages.common import (
    BASE,
    NOT_IDENTITY,
    POINTER,
    domain_names,
    run_log,
    sae_rows,
)
from steerlora.stages.rows_to_learn import rows_to_learn
from steerlora.training.validation import without

FOLDER = "adapter"
"""Folder of the artifact that holds the trained method."""
PEFT_FOLDER = "peft"
"""Folder that holds it in PEFT's format as well, where PEFT has one for it."""
NO_DOMAIN = ""
"""What text is named that is learnt whatever domain it is of."""
HISTORY = "training.json"
"""What was kept of the training: what the method has, such as the health of its routing, and under
``validation`` the losses on what was set aside for that."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(method_training.TrainingSettings):
    """What joint training depends on."""

    domains: tuple[str, ...]
    """That it trains on."""


def step(config: Config) -> Step:
    config.method.check_trains()
    retrained = config.intervention.retrained
    if retrained:
        method_training.check_intervention(config)
    settings = AdapterSettings.of(
        config,
        config.intervention if retrained else InterventionConfig(),
        domains=tuple(config.domains.names),
    )
    under = f" under {config.intervention.name}" if retrained else ""
    trained = Step(
        "adapter_training",
        settings,
        method_training.inputs(config, monitored=config.method.compares_with_base),
        f"adapter_training {config.model.name} {config.method.name} seed {config.seed}{under}",
        cost=config.trainer.max_steps * config.model.layers * 0.02,
        skip=method_training.not_identity(config),
    )
    if not (config.method.bundle_sae and config.method.reads_features):
        return trained
    alone = replace(settings, method=replace(config.method, bundle_sae=False))
    return replace(trained, earlier=(replace(trained, config=alone),))


@stage(
    "adapter_training",
    5,
    step=step,
    skip=NOT_IDENTITY,
    shared=True,
    check=lambda settings: method_training.check_shares(settings.trainer),
)
def build(context: Context) -> dict:
    settings: AdapterSettings = context.config
    if ranks.broadcast(context.earlier is not None):
        return _bundled(context) if ranks.is_main() else {}
    source, base_artifact = context.inputs["domains"], context.inputs["base"]
    model, tokenizer = method_training.load_to_train(base_artifact, settings.trainer)
    attached = method_training.attach(context, model, tokenizer, domains=settings.domains)
    learner, method = attached.learner, attached.method
    rows, validation, cuts = rows_to_learn(source, settings.domains, tokenizer, settings.trainer)
    if settings.method.learns_sae_text:
        text = sae_rows(source, settings.domains, tokenizer, settings.trainer.max_length)
        rows = {NO_DOMAIN: without(text, chain.from_iterable(validation.values()))}
    owners = dict(zip(domain_names(source), count(), strict=False)) | {NO_DOMAIN: -1}
    batches = training_batches(
        list(chain.from_iterable(rows.values())),
        [owners[name] for name, own in rows.items() for _ in own],
        settings.trainer,
        pad_token_id=tokenizer.pad_token_id,
        seed=settings.seed,
        signal_tokens=method.signal_tokens,
    )
    with run_log(context, settings.logger) as log:
        steps = settings.trainer.max_steps
        figures, followed = method_training.train_task(
            context, learner, Task(rows), batches, steps, log, validation=validation
        )
        figures |= {"parameters": method.parameter_count(), **cuts}
        log.results(figures)
    if not ranks.is_main():
        return {}
    method_training.save(context, attached, context.directory / FOLDER, written_for=FOLDER)
    history = learner.history() | ({"validation": followed} if followed else {})
    write_json(context.directory / HISTORY, history)
    if settings.method.exports_to_peft:
        path = base_artifact.json(POINTER)["path"] or str(base_artifact / BASE)
        export_peft(method, context.directory / PEFT_FOLDER, base_path=path)
    return figures


def _bundled(context: Context) -> dict:
    """The same adapter, which is stored without its SAEs, with them."""
    shutil.copytree(context.earlier / FOLDER, context.directory / FOLDER, dirs_exist_ok=True)
    shutil.copyfile(context.earlier / HISTORY, context.directory / HISTORY)
    paths = method_training.sae_paths(context.config.method, context.inputs)
    bundle_sae(context.directory / FOLDER, paths)
    return context.earlier.manifest["summary"]
