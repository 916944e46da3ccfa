"""Peak memory of one device, part by part, of each training that a configuration asks for.

What a step takes is measured without storage (``trials.py``); what a rank has of weights, gradients
and optimizer follows from their sizes and the strategy (``sharding.py``). A plan is of the moment
at which memory is highest, and says which it is. Bytes throughout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from steerlora.config import Config
from steerlora.data.harvest import HARVEST_ROWS
from steerlora.planning.live import GRADIENTS, SPACE, Parts
from steerlora.planning.sharding import Held, held, sizes
from steerlora.planning.trials import FIXED, IN_STEP, Measured, Trials
from steerlora.planning.work import harvested_sites, trained_sites

BASE, WATCHING = "weights of the base", "SAEs and prototypes"
BESIDE, OTHERS = "base and buffers of a stream", "SAEs of the other sites"


@dataclass(frozen=True)
class Memory:
    """Attributes: parts: {what it is for: bytes} at the peak; moment: when that is; host: bytes
    that are offloaded to the CPU's memory."""

    parts: Mapping[str, float]
    moment: str
    host: float = 0

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(self.parts.values())


def method_training(config: Config, trials: Trials) -> Memory:
    """Of a step of the method's training on one rank."""
    on_rank = _method_held(config, trials)
    return _highest(config, on_rank, {WATCHING: trials.frozen}, trials.step(config))


def method_at_least(config: Config, trials: Trials) -> float:
    """What one rank of it has whatever the batch."""
    on_rank = _method_held(config, trials)
    return trials.frozen + on_rank.weights + on_rank.adapter + on_rank.optimizer + on_rank.buffers


def _method_held(config: Config, trials: Trials) -> Held:
    base, trained = trials.base.values(), trials.trained.values()
    return held(config.trainer, config.plan.gpus, sizes(base), sizes(trained))


def sae_training(config: Config, trials: Trials) -> Memory:
    """Of a step of one SAE's training on one rank, all of it float32; with ``sae.stream`` of those
    of all sites together, and of the base and two buffers beside them."""
    ranks, trainer = config.plan.gpus, replace(config.trainer, precision="32-true")
    on_rank = held(trainer, ranks, {}, sizes(trials.new_sae().parameters()))
    beside = {}
    if config.sae.stream:
        weight, sites = next(iter(trials.base.values())), trained_sites(config)
        token = len(harvested_sites(config)) * trials.new_sae().width * weight.itemsize
        beside[BESIDE] = sum(p.nbytes for p in trials.base.values())
        beside[BESIDE] += 2 * config.sae.stream_buffer * token
        each = on_rank.weights + on_rank.adapter + on_rank.gradients + on_rank.optimizer
        beside[OTHERS] = (len(sites) - 1) * each
    step = trials.sae_step(math.ceil(config.sae.batch_size / ranks))
    return _highest(config, on_rank, beside, step)


def end_to_end(config: Config, trials: Trials, sites: tuple[int, ...]) -> Memory:
    """Of a step of one SAE's training in the place of its stream, on one rank: the SAE in float32
    beside the frozen base, which runs on from the lowest of these sites."""
    ranks, trainer = config.plan.gpus, replace(config.trainer, precision="32-true")
    on_rank = held(trainer, ranks, {}, sizes(trials.new_sae().parameters()))
    base = {BASE: sum(p.nbytes for p in trials.base.values())}
    rows = math.ceil(config.sae.end_to_end.batch_size / ranks)
    return _highest(config, on_rank, base, trials.end_to_end_step(min(sites), rows))


def harvesting(config: Config, trials: Trials, sites: tuple[int, ...]) -> Memory:
    """Of a forward of the frozen base that stores the streams of these sites, in one process; its
    layers lie on all GPUs with ``evaluation.spread``, else on one."""
    weights = sum(p.nbytes for p in trials.base.values())
    weights /= config.plan.gpus if config.evaluation.spread else 1
    return _highest(config, Held(weights, 0, 0, 0), {}, trials.harvest(sites, HARVEST_ROWS))


def _highest(config: Config, on_rank: Held, others: Parts, measured: Measured) -> Memory:
    """The moment of most memory."""
    fixed = {
        BASE: on_rank.weights,
        "weights of what trains": on_rank.adapter,
        GRADIENTS: on_rank.gradients,
        "optimizer": on_rank.optimizer,
        "buckets and gathered weights": on_rank.buffers,
        **others,
    }
    # Alone, a rank has the gradients that there are; others have a place for all of them.
    alone = config.trainer.strategy == "single"
    found = []
    for moment, parts in (measured.peaks if alone else measured.ungraded).items():
        own = {name: size for name, size in parts.items() if name != FIXED}
        if not alone:
            own.pop(GRADIENTS, None)
        if moment == IN_STEP:
            own[SPACE] = own.get(SPACE, 0) + on_rank.stepping
        found.append(Memory({**fixed, **own}, moment, on_rank.host))
    return max(found, key=lambda memory: memory.total)
