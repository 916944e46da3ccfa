"""What a configuration would take, and whether the GPUs it names can give it."""

from __future__ import annotations

from dataclasses import dataclass

from steerlora.config import Config
from steerlora.distributed.devices import GPUS, gpu
from steerlora.errors import UserError
from steerlora.lm.shapes import DecoderShape, model_shape
from steerlora.planning import memory
from steerlora.planning.activations import Part
from steerlora.planning.memory import Memory
from steerlora.planning.parameters import (
    AdapterParameters,
    BaseParameters,
    adapted,
    adapter_parameters,
    base_parameters,
    path_of,
    sae_parameters,
)
from steerlora.planning.sharding import precision
from steerlora.planning.work import (
    ADAPTER,
    HARVEST,
    SAE,
    Work,
    activation_bytes,
    harvested_sites,
    trained_saes,
    works,
)

RESERVED = 1e9
"""Bytes of a GPU that are not for tensors: an allowance for the CUDA context, the libraries' work
spaces and the allocator's gaps."""


@dataclass(frozen=True)
class Plan:
    """All that is known before a GPU is.

    Attributes:
        config: what was planned.
        shape: of the base.
        base, adapter: parameters.
        sae: parameters of each SAE.
        saes: how many there are.
        memories: {training: peak memory of one GPU}.
        works: what there is to compute.
        disk: bytes of stored activations.
    """

    config: Config
    shape: DecoderShape
    base: BaseParameters
    adapter: AdapterParameters
    sae: int
    saes: int
    memories: dict[str, Memory]
    works: tuple[Work, ...]
    disk: float

    def fits(self, name: str) -> bool:
        """Whether every training fits the named GPU."""
        return needed(self.memories) <= GPUS[name].memory

    def seconds(self, name: str) -> dict[str, float]:
        """{work: time} on as many of the named GPU as are planned."""
        told, of = self.config.plan, self.config.trainer.precision
        return {work.name: work.seconds(GPUS[name], told.gpus, of, told.mfu) for work in self.works}


def needed(memories: dict[str, Memory]) -> float:
    """Bytes of a GPU's memory that all these need, one after the other, with the allowance."""
    return RESERVED + max(found.total for found in memories.values())


def make(config: Config) -> Plan:
    """Reckon with a configuration; loads nothing and computes nothing large.

    Raises:
        UserError: no such GPU, a batch that the ranks cannot share, ranks that the strategy does
            not have, sites that the model does not have.
    """
    gpu(config.plan.gpu)
    shape = model_shape(config.model)
    check_places(config, shape)
    check_ranks(config)
    adapter, sae = config.adapter, config.sae
    monitors = adapter.monitored and config.control.monitor not in config.control.sites
    return Plan(
        config=config,
        shape=shape,
        base=base_parameters(shape),
        adapter=adapter_parameters(shape, adapter, config.control, sae.latents),
        sae=sae_parameters(shape.width, sae.latents),
        saes=len(config.control.sites) * (adapter.routing == "sae") + monitors,
        memories=memories(config, shape),
        works=works(config, shape),
        disk=activation_bytes(config, shape),
    )


def memories(config: Config, shape: DecoderShape) -> dict[str, Memory]:
    """{training: peak memory of one GPU}, of what the configuration trains."""
    scores, ranks = memory.SCORES_ON_ACCELERATOR, config.plan.gpus
    found = {}
    if harvested_sites(config):
        found[HARVEST] = memory.harvesting(config, shape, harvested_sites(config), ranks)
    if trained_saes(config):
        found[SAE] = memory.sae_training(config, shape.width, ranks, scores=scores)
    found[ADAPTER] = memory.adapter_training(config, shape, part_of(config), ranks, scores=scores)
    return found


def part_of(config: Config) -> Part:
    """What goes through the model at once on one rank: its share of the batch, or a part of it."""
    trainer, kinds = config.trainer, precision(config.trainer)
    return Part(
        rows=trainer.batch_size // (config.plan.gpus * trainer.accumulate),
        sequence=trainer.max_length,
        labelled=config.plan.labelled,
        element=kinds.compute,
        copied=kinds.trained != kinds.compute,
    )


def check_ranks(config: Config) -> None:
    """UserError where the batch or the strategy does not go with the number of GPUs."""
    trainer, ranks = config.trainer, config.plan.gpus
    if trainer.strategy == "single" and ranks > 1:
        raise UserError(
            f"plan.gpus={ranks}: trainer.strategy=single is one rank: use trainer=ddp, zero2 or "
            "zero3"
        )
    if trainer.batch_size % (ranks * trainer.accumulate):
        raise UserError(
            f"trainer.batch_size={trainer.batch_size} does not divide over plan.gpus={ranks} and "
            f"trainer.accumulate={trainer.accumulate}: make it a multiple of "
            f"{ranks * trainer.accumulate}"
        )
    if trained_saes(config) and config.sae.batch_size % ranks:
        raise UserError(
            f"sae.batch_size={config.sae.batch_size} does not divide over plan.gpus={ranks}: make "
            f"it a multiple of {ranks}"
        )


def check_places(config: Config, shape: DecoderShape) -> None:
    """UserError where a site lies beyond the model's last layer, or no module is adapted."""
    sites, monitor = config.control.sites, config.control.monitor or 0
    if max(sites) >= shape.layers or monitor > shape.layers:
        raise UserError(
            f"control.sites={sites}, control.monitor={config.control.monitor}: {config.model.name} "
            f"has layers 0 to {shape.layers - 1}"
        )
    if not adapted(shape, config.adapter):
        raise UserError(
            f"adapter.target_modules={config.adapter.target_modules}: a layer has "
            f"{', '.join(map(path_of, shape.linears))}"
        )
