"""What a configuration would take, and whether the GPUs it names can give it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from steerlora.config import Config
from steerlora.distributed.devices import GPUS, gpu
from steerlora.errors import UserError
from steerlora.lm.shapes import DecoderShape, model_shape
from steerlora.planning import memory
from steerlora.planning.memory import Memory
from steerlora.planning.sharding import FLOAT
from steerlora.planning.trials import Trials
from steerlora.planning.work import (
    ADAPTER,
    END_TO_END,
    HARVEST,
    SAE,
    Work,
    end_to_end_sites,
    harvested_sites,
    trained_sites,
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
        trials: what was built and run without storage.
        base: parameters of the base.
        trained: {part of the method: parameters}, of what trains.
        sae: parameters of each SAE.
        saes: how many there are.
        memories: {training: peak memory of one GPU}.
        works: what there is to compute.
        disk: bytes of stored activations.
    """

    config: Config
    shape: DecoderShape
    trials: Trials
    base: int
    trained: dict[str, int]
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
    check_ranks(config)
    trials, method, sites = Trials(config), config.method, harvested_sites(config)
    read = [*method.streams] * method.reads_features + [method.monitor] * method.compares_with_base
    return Plan(
        config=config,
        shape=shape,
        trials=trials,
        base=sum(p.numel() for p in trials.base.values()),
        trained=trained_parameters(trials),
        sae=sum(p.numel() for p in trials.new_sae().parameters()),
        saes=len({*read}),
        memories=dict(memories(config, trials)),
        works=works(config, shape, trials),
        disk=0 if config.sae.stream else len(sites) * _stored_bytes(config, shape, trials),
    )


def _stored_bytes(config: Config, shape: DecoderShape, trials: Trials) -> int:
    """Of one site's activations, in the model's type, and of their norms."""
    weight = next(iter(trials.base.values()))
    return config.sae.tokens_to_harvest * (weight.itemsize * shape.width + FLOAT)


def memories(config: Config, trials: Trials) -> Iterator[tuple[str, Memory]]:
    """Peak memory of one GPU, of what the configuration trains; what is soon known comes first."""
    if sites := harvested_sites(config):
        yield HARVEST, memory.harvesting(config, trials, sites)
    if trained_sites(config):
        yield SAE, memory.sae_training(config, trials)
    if sites := end_to_end_sites(config):
        yield END_TO_END, memory.end_to_end(config, trials, sites)
    yield ADAPTER, memory.method_training(config, trials)


def fits(config: Config, trials: Trials) -> bool:
    """Whether a GPU of the configured kind holds everything."""
    room = GPUS[config.plan.gpu].memory - RESERVED
    if memory.method_at_least(config, trials) > room:  # which no step need be run for
        return False
    return all(found.total <= room for _, found in memories(config, trials))


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
    if trained_sites(config) and config.sae.batch_size % ranks:
        raise UserError(
            f"sae.batch_size={config.sae.batch_size} does not divide over plan.gpus={ranks}: make "
            f"it a multiple of {ranks}"
        )
    rows = config.sae.end_to_end.batch_size
    if end_to_end_sites(config) and rows % ranks:
        raise UserError(
            f"sae.end_to_end.batch_size={rows} does not divide over plan.gpus={ranks}: make it a "
            f"multiple of {ranks}"
        )


def trained_parameters(trials: Trials) -> dict[str, int]:
    """{part of the method: parameters that train}; the parts are named as its module has them."""
    found: Counter[str] = Counter()
    for name, parameter in trials.trained.items():
        owner, part, *_ = name.split(".")
        found["in the layers" if owner == "model" else part] += parameter.numel()
    return found
