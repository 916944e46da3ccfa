"""What to change where a plan does not fit: the first that does, cheapest first."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from steerlora.config import Config
from steerlora.distributed.devices import GPUS
from steerlora.errors import UserError
from steerlora.planning.plan import Plan, fits, needed
from steerlora.planning.trials import Trials

Change = dict[str, Any]
"""{key: value}, as in overrides."""
MOST_GPUS = 1024
RECOMPUTED: Change = {"trainer.activation_checkpointing": True}
SHARDED: Change = {"trainer.strategy": "zero3"} | RECOMPUTED
SPREAD: Change = SHARDED | {"evaluation.spread": True}
"""Where no GPU holds the base, harvests and evaluation need it spread too."""


def refuse(plan: Plan) -> None:
    """UserError where the plan fits no GPU of the kind that it names, saying what would."""
    name = plan.config.plan.gpu
    if plan.fits(name):
        return
    training, worst = max(plan.memories.items(), key=lambda item: item[1].total)
    raise UserError(
        f"{training} needs {needed(plan.memories) / 1e9:.1f} GB {worst.moment} on each of "
        f"{plan.config.plan.gpus} x {name}, which has {GPUS[name].memory / 1e9:.0f} GB: "
        f"{_advice(plan)}"
    )


def _advice(plan: Plan) -> str:
    """The cheapest changes after which everything fits, as one would write them."""
    config, trials = plan.config, plan.trials
    here = _first(config, trials, _on_these_gpus(config))
    if here:
        return f"set {here}"
    more = _first(config, trials, _on_more_gpus(config))
    offloaded = _first(config, trials, [_in_parts(config, SHARDED | {"trainer.offload": True})])
    found = [change for change in (more, offloaded) if change]
    if not found:
        found = filter(None, [_first(config, trials, _on_larger_gpus(config))])
    return " or ".join(f"set {change}" for change in found) or (
        "no number of parts or GPUs is enough: shorten trainer.max_length or lower sae.latents"
    )


def _first(config: Config, trials: Trials, ladders: Iterable[Sequence[Change]]) -> str:
    """The first change under which everything fits; empty where none does.

    Args:
        ladders: changes that take less and less memory.
    """

    def enough(change: Change) -> bool:
        return fits(changed(config, change), trials)

    for ladder in ladders:
        if enough(ladder[0]):  # often measured already
            change = ladder[0]
        elif enough(ladder[-1]):
            change = ladder[bisect_left(ladder, True, key=enough)]
        else:
            continue
        return " ".join(f"{key}={str(value).lower()}" for key, value in change.items())
    return ""


def _in_parts(config: Config, change: Change) -> list[Change]:
    """The change, then with the batch in more and more parts, one after the other: these cost
    little while a part has some thousand tokens."""
    rows = config.trainer.batch_size // change.get("plan.gpus", config.plan.gpus)
    parts = (n for n in range(config.trainer.accumulate + 1, rows + 1) if rows % n == 0)
    return [change, *(change | {"trainer.accumulate": n} for n in parts)]


def _on_these_gpus(config: Config) -> Iterator[list[Change]]:
    """Parts; recomputation, which costs a third of the forward again; shards."""
    yield _in_parts(config, {})
    if not config.trainer.activation_checkpointing:
        yield _in_parts(config, RECOMPUTED)
    if config.plan.gpus > 1:
        for spread in (SHARDED, SPREAD):
            yield _in_parts(config, spread)


def _on_more_gpus(config: Config) -> Iterator[list[Change]]:
    """Shards over twice as many, four times as many, ..."""
    gpus = 2 * config.plan.gpus
    while gpus <= MOST_GPUS and config.trainer.batch_size % gpus == 0:
        for spread in (SHARDED, SPREAD):
            yield _in_parts(config, {"plan.gpus": gpus} | spread)
        gpus *= 2


def _on_larger_gpus(config: Config) -> Iterator[list[Change]]:
    for name in sorted(GPUS, key=lambda name: GPUS[name].memory):
        if GPUS[name].memory > GPUS[config.plan.gpu].memory:
            yield _in_parts(config, {"plan.gpu": name} | RECOMPUTED)


def changed(config: Config, change: Change) -> Config:
    """The configuration with some keys of its sections set."""
    for key, value in change.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config
