"""Stage ``export``: what a sequence left behind, to take elsewhere, whole or domain by domain."""

from __future__ import annotations

from dataclasses import dataclass

from steerlora.config import Config
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError
from steerlora.methods.config import MethodConfig
from steerlora.methods.saving import (
    bundle_sae,
    export_peft,
    load_adapter,
    save_adapter,
    trained_under,
)
from steerlora.stages import base, sequential_forgetting
from steerlora.stages.common import BASE, POINTER, WHERE, load_base
from steerlora.stages.method_training import sae_paths
from steerlora.stages.sequence_state import FOLDER

ADAPTER, PEFT_FOLDER = "adapter", "peft"


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Attributes: method: of the adapter; sequence: the domains in the order of learning; domains:
    those that stay; accelerator: where the model is."""

    method: MethodConfig
    sequence: tuple[str, ...]
    domains: tuple[str, ...]
    accelerator: str


def step(config: Config) -> Step:
    if unknown := sorted(set(config.stage.settings) - {"domains"}):
        raise UserError(f"stage.settings.{unknown[0]}: stage=export has domains alone")
    if not config.method.tells_domains:
        raise UserError(
            f"method={config.method.name} has no part for each domain to export: give one that "
            "routes by domain, such as the project's own (study.own_method)"
        )
    sequence = sequential_forgetting.step(config)
    settings = ExportSettings(
        method=config.method,
        sequence=sequence.config.sequence,
        domains=_kept(config.stage.settings.get("domains"), sequence.config.sequence),
        accelerator=config.trainer.accelerator,
    )
    inputs = {"base": base.step(config), "sequence": sequence}
    if "saes" in sequence.inputs:
        inputs["saes"] = sequence.inputs["saes"]
    return Step("export", settings, inputs, f"export {config.model.name} {config.method.name}")


def _kept(asked: object, sequence: tuple[str, ...]) -> tuple[str, ...]:
    """The domains that stay, in the order of learning.

    Raises:
        UserError: no list of the sequence's domains.
    """
    if asked is None:
        return sequence
    names = asked if isinstance(asked, list) else [asked]
    for name in names:
        if name not in sequence:
            raise UserError(
                f"stage.settings.domains: {name!r} is none of the sequence's domains "
                f"({', '.join(sequence)})"
            )
    if not names:
        raise UserError("stage.settings.domains=[] leaves no domain: name one, or null for all")
    return tuple(name for name in sequence if name in names)


@stage("export", 1, step=step, skip=WHERE)
def build(context: Context) -> dict:
    settings: ExportSettings = context.config
    given, sequence = context.inputs["base"], settings.sequence
    model, _ = load_base(given, accelerator=settings.accelerator)
    last = len(sequence) - 1
    learnt = context.inputs["sequence"] / FOLDER / f"{last}_{sequence[last]}"
    method = load_adapter(model, learnt)
    path = given.json(POINTER)["path"] or str(given / BASE)
    printed = {}
    # Specialists come in the order of learning.
    for specialist, domain in enumerate(sequence):
        if domain not in settings.domains:
            method.forget(specialist)
            continue
        folder = f"{PEFT_FOLDER}/{domain}"
        export_peft(method, context.directory / folder, base_path=path, specialist=specialist)
        printed[domain] = folder
    saes, folder = sae_paths(settings.method, context.inputs), context.directory / ADAPTER
    save_adapter(
        method,
        folder,
        base_fingerprint=given.json(POINTER)["fingerprint"],
        trained_under=trained_under(learnt),
    )
    if saes:
        bundle_sae(folder, saes)
    return {"adapter": ADAPTER, **printed}
