"""What joint and sequential training of an adapter share: its inputs, the adapter, one training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from torch import nn

from steerlora.config import (
    AdapterConfig,
    Config,
    ContinualConfig,
    ControlConfig,
    InterventionConfig,
    RoutingConfig,
    TrainerConfig,
)
from steerlora.data.chat import EncodedChat, collate, encode_chats
from steerlora.distributed import ranks
from steerlora.distributed.strategies import check_divides
from steerlora.distributed.zero import sharding_settings
from steerlora.engine.artifacts import Artifact
from steerlora.engine.run import Step
from steerlora.errors import UserError, nearest
from steerlora.lm.decoder import decoder_of
from steerlora.lm.pretrained import open_model, open_tokenizer
from steerlora.methods.routed_lora.adapter import Adapter, AdapterShape
from steerlora.methods.routed_lora.interventions import INTERVENTIONS, check_phase
from steerlora.methods.routed_lora.memory import MemoryPolicy
from steerlora.methods.routed_lora.monitor import Monitor
from steerlora.methods.routed_lora.signals import prompt_signals
from steerlora.methods.routed_lora.train_under import TrainUnder
from steerlora.methods.routed_lora.watch import RoutingWatch
from steerlora.saes.saelens import load_sae, sae_metadata
from steerlora.stages import base, domains, features, sae_training
from steerlora.stages.common import device_of, place_of, read_rows

FACT_ROWS = 64
"""Training rows a domain over which mean rank and the domains' specialists are recorded."""
PROBE_ROWS = 16
"""Training rows a domain on which the health of routing is followed."""
PROTOTYPE_ROWS = 512
"""Training rows a domain, and rows of general text, whose signals make a prototype."""


def inputs(config: Config, *, monitored: bool) -> dict[str, Step | tuple[Step, ...]]:
    """What any training of an adapter reads.

    Args:
        config: the run's.
        monitored: with the monitor site's SAE and features.
    """
    found: dict[str, Step | tuple[Step, ...]] = {
        "domains": domains.step(config),
        "base": base.step(config),
    }
    if config.adapter.routing == "sae":
        found["saes"] = sae_training.steps(config)
    if config.adapter.prototypes:
        found["features"] = features.steps(config)
    if monitored:
        found["monitor_sae"] = sae_training.monitor_step(config)
        found["monitor_features"] = features.monitor_step(config)
    return found


def check_intervention(config: Config) -> None:
    """Refuse a control that does not exist, or that this adapter or phase gives no meaning.

    Raises:
        UserError: says what would be right.
    """
    name = config.intervention.name
    if name == "none":
        return
    if name not in INTERVENTIONS:
        raise UserError(f"intervention.name={name}: {nearest(name, INTERVENTIONS)}")
    if config.adapter.routing != "sae":
        raise UserError(
            f"intervention={name} acts on SAE routing; adapter={config.adapter.name} has routing "
            f"{config.adapter.routing}"
        )
    try:
        check_phase(name, config.intervention.phase)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_shares(trainer: TrainerConfig) -> None:
    """Refuse a batch that the ranks cannot share evenly."""
    parts = ranks.current().world * trainer.accumulate
    check_divides("trainer.batch_size", trainer.batch_size, parts)


def load_to_train(artifact: Artifact, trainer: TrainerConfig) -> tuple[nn.Module, Any]:
    """The base model as this rank holds it in training, and its tokenizer."""
    place = place_of(artifact)
    model = open_to_train(place.path, place.revision, trainer)
    return model, open_tokenizer(place.path, place.revision, thinking=place.thinking)


def open_to_train(path: str, revision: str | None, trainer: TrainerConfig) -> nn.Module:
    """A base model to train an adapter on: on this rank's device, in the type that suits it.

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


def around(before: Callable[[], None], after: Callable[[], None]) -> Callback:
    """What runs the model just before the first step and after the last, on every rank alike.

    Inside the training, since a model that is sharded runs nowhere else. What ``before`` leaves in
    the adapter is in every checkpoint, so a training that resumes does not repeat it.
    """

    def begin(trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            before()

    return LambdaCallback(on_train_start=begin, on_train_end=lambda trainer, module: after())


def new_adapter(
    model,
    config: AdapterConfig,
    control: ControlConfig,
    inputs: dict[str, Artifact | tuple[Artifact, ...]],
    seed: int,
) -> tuple[Adapter, dict[int, Path]]:
    """An attached, untrained adapter and where its SAEs lie.

    Raises:
        UserError: what is asked for does not fit the model.
    """
    paths = {
        site: artifact / sae_training.FOLDER
        for site, artifact in zip(control.sites, inputs.get("saes", ()), strict=False)
    }
    try:
        adapter = Adapter(
            model,
            shape_of(config, control),
            {site: load_sae(path) for site, path in paths.items()},
            feature_scales={
                site: sae_metadata(path)["mean_feature_norm"] for site, path in paths.items()
            },
            seed=seed,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.prototypes:
        for site, artifact in zip(control.sites, inputs["features"], strict=True):
            prototypes = features.load_taxonomy(artifact).prototypes
            adapter.routers[str(site)].set_prototypes(prototypes)
    return adapter.attach(model), paths


def shape_of(config: AdapterConfig, control: ControlConfig) -> AdapterShape:
    """What a configuration says of an adapter's tensors."""
    chosen = {**vars(control), **vars(config)}
    return AdapterShape(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in chosen.items()
            if name in AdapterShape.__dataclass_fields__
        }
    )


def open_monitor(
    model,
    adapter: Adapter,
    control: ControlConfig,
    inputs: dict[str, Artifact | tuple[Artifact, ...]],
) -> Monitor | None:
    """The monitor of ``control.monitor``; None where no loss and no report asks for one."""
    if "monitor_sae" not in inputs:
        return None
    sae = load_sae(inputs["monitor_sae"] / sae_training.FOLDER)
    taxonomy = features.load_taxonomy(inputs["monitor_features"])
    return Monitor(model, adapter, sae, control.monitor, taxonomy)


def callbacks(
    adapter: Adapter,
    names: Sequence[str],
    rows: dict[str, list[EncodedChat]],
    pad_token_id: int,
    routing: RoutingConfig,
    intervention: InterventionConfig,
) -> tuple[RoutingWatch, list[Callback]]:
    """The watch over routing, and all that acts during a training besides the losses.

    Args:
        names: of all domains.
        rows: training rows of the domains that are trained on.
    """
    probe = [(row, names.index(name)) for name, own in rows.items() for row in own[:PROBE_ROWS]]
    watch = RoutingWatch(
        adapter,
        names,
        collate(*zip(*probe, strict=True), pad_token_id),
        routing.log_every,
        routing.collapse,
        routing.collapse_below,
    )
    found: list[Callback] = [watch]
    if intervention.name != "none" and intervention.phase == "training":
        found.append(
            TrainUnder(
                adapter,
                intervention.name,
                seed=intervention.seed,
                strength=intervention.strength,
                sites=intervention.sites,
                domains=intervention.domains,
                domain_names=names,
            )
        )
    return watch, found


def memory_policy(
    adapter: Adapter, config: ContinualConfig, domain: str, seed: int, protected: Iterable[int] = ()
) -> MemoryPolicy | None:
    """The memory policy of one training, where it is on."""
    if not config.memory:
        return None
    return MemoryPolicy(
        adapter,
        every=config.memory_every,
        spawn_confidence=config.spawn_confidence,
        spawn_similarity=config.spawn_similarity,
        merge_similarity=config.merge_similarity,
        prune_usage=config.prune_usage,
        domain=domain,
        protected=tuple(protected),
        seed=seed,
    )


def meet(
    model, adapter: Adapter, specialist: int | None, rows: list[EncodedChat], pad_token_id: int
) -> None:
    """Give prototype routers the signals of a domain's training rows.

    Args:
        specialist: the domain's; None: ``rows`` are general text, whose update is none.
    """
    spread = rows[:: max(1, len(rows) // PROTOTYPE_ROWS)][:PROTOTYPE_ROWS]
    for site, signals in prompt_signals(model, adapter, spread, pad_token_id).items():
        adapter.routers[str(site)].meet(specialist, signals)


def meet_general_text(
    model, adapter: Adapter, source: Artifact, tokenizer, max_length: int
) -> None:
    """Give prototype routers the signals of pretraining text, if they are to know general text."""
    if adapter.shape.null_specialist:
        rows = read_rows(source / "pretrain.jsonl")
        rows = rows[:: max(1, len(rows) // PROTOTYPE_ROWS)]
        encoded = encode_chats(tokenizer, rows, max_length)
        meet(model, adapter, None, encoded, tokenizer.pad_token_id)


@torch.no_grad()
def usage(
    model, adapter: Adapter, rows: list[EncodedChat], pad_token_id: int
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """{site: (mean gate [E], token ranks [T])} over the first training rows of one domain."""
    model.eval()
    chosen = rows[:FACT_ROWS]
    batch = collate(chosen, [-1] * len(chosen), pad_token_id).to(model.device)
    decoder_of(model)(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    )
    real = batch.attention_mask.bool()
    return {
        layer: (routing.gate[real].mean(0), routing.mask[real].sum(-1))
        for layer, routing in adapter.routing().items()
    }


def record_facts(
    model,
    adapter: Adapter,
    rows: dict[str, list[EncodedChat]],
    pad_token_id: int,
    trained_under: str,
) -> None:
    """Record, over training rows, what interventions need: mean rank, each domain's specialist.

    What an adapter was trained under (``oracle_domain``'s specialists, ``fixed_rank``'s rank) stays
    as it was during its training.
    """
    if not adapter.sites:
        return
    found = {name: usage(model, adapter, own, pad_token_id) for name, own in rows.items()}
    for layer, site in adapter.sites.items():
        if site.facts is not None:
            ranks = torch.cat([by_site[layer][1] for by_site in found.values()])
            if trained_under != "fixed_rank":
                site.facts.mean_rank = float(ranks.mean())
            if trained_under != "oracle_domain":
                site.facts.specialist_of_domain = {
                    name: int(by_site[layer][0].argmax()) for name, by_site in found.items()
                }
