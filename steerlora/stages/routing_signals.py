"""Stage ``routing_signals``: which signal tells domains apart, and when, by one method's rule.

No adapter trains: text is read once by the base, and the rule is fitted to its signals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from steerlora.config import Config, LoggerConfig
from steerlora.data.domains.micro.alike import MOST_DOMAINS
from steerlora.engine.artifacts import Artifact
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError, nearest
from steerlora.evaluation.records import SCHEMA, read_record, write_record
from steerlora.evaluation.routing_signals import (
    CONDITIONS,
    DOMAINS,
    HIDDEN,
    NOISE,
    ROWS,
    SAE,
    SHARED,
    TOKENS,
    RoutingSignals,
)
from steerlora.methods.config import MethodConfig
from steerlora.reporting.report import Report
from steerlora.reporting.routing_signals import write_routing_signals
from steerlora.stages import base, sae_training
from steerlora.stages.common import WHERE, replicate, run_log
from steerlora.stages.routing_signals_study import Study

RESULT = "routing_signals.json"
DEFAULTS: dict[str, Any] = {
    "made": True,
    "domains": 8,
    "rows": 128,
    "test_rows": 64,
    "sentences": 3,
    "shared": 0.5,
    "levels": {},
}
RANGES = {DOMAINS: (2, 1000), ROWS: (2, 10**6), "test_rows": (1, 10**6), "sentences": (1, 100)}


@dataclass(frozen=True, kw_only=True)
class RoutingSignalsSettings:
    """Attributes: made: whether domains are made up (``data/domains/micro/alike.py``) in place of
    the configuration's; domains, rows, test_rows, sentences, shared: the reference, from which one
    condition departs at a time; levels: {condition: its levels}; names: of the domains; method:
    whose rule is fitted; site: of the SAE; max_length: tokens of a row; seed: of texts, noise and
    controls."""

    made: bool
    domains: int
    rows: int
    test_rows: int
    sentences: int
    shared: float
    levels: dict[str, tuple[float, ...]]
    names: tuple[str, ...]
    model: str
    method: MethodConfig
    site: int
    max_length: int
    seed: int
    accelerator: str
    spread: bool
    logger: LoggerConfig


def steps(config: Config, variant: Callable[..., Config]) -> tuple[Step, ...]:
    """One step; in an experiment, one a replicate."""
    given = _checked(config)
    if config.study.stage != "routing_signals":
        return (_step(config, given),)
    if len(config.study.seeds) > 1 and "adapter" not in config.study.vary:
        raise UserError(
            f"study.vary={config.study.vary}: stage=routing_signals draws its text by the "
            "adapter's seed: add adapter"
        )
    return tuple(_step(variant(*replicate(config, seed)), given) for seed in config.study.seeds)


def _checked(config: Config) -> dict[str, Any]:
    asked = config.stage.settings if config.stage else {}
    if unknown := sorted(set(asked) - set(DEFAULTS)):
        raise UserError(f"stage.settings.{unknown[0]}: {nearest(unknown[0], DEFAULTS)}")
    given = DEFAULTS | dict(asked)
    micro, names = config.domains.kind == "micro", config.domains.names
    if type(given["made"]) is not bool or (given["made"] and not micro):
        raise UserError(
            f"stage.settings.made={given['made']}: domains are made up (true) of the micro world's "
            "words; with other domains set it to false, and theirs are told apart"
        )
    if not given["made"]:
        given["domains"] = len(names)
    elif given["domains"] not in range(2, MOST_DOMAINS + 1):
        raise UserError(
            f"stage.settings.domains={given['domains']}: from 2 to {MOST_DOMAINS} are made up"
        )
    for name, (low, high) in RANGES.items():
        if type(given[name]) is not int or not low <= given[name] <= high:
            raise UserError(f"stage.settings.{name}={given[name]}: a whole number from {low}")
    _share("shared", given["shared"])
    given["levels"] = {
        name: _levels(name, values, given) for name, values in dict(given["levels"]).items()
    }
    if not config.method.tells_domains:
        raise UserError(
            f"method={config.method.name} does not route by domain: give one that does, such as "
            "the project's own (study.own_method)"
        )
    return given


def _share(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"stage.settings.{name}={value}: a number from 0 to 1")


def _levels(name: str, values: Any, given: dict[str, Any]) -> tuple[float, ...]:
    """The levels of a condition, checked."""
    key = f"levels.{name}"
    if name not in CONDITIONS:
        raise UserError(f"stage.settings.{key}: {nearest(name, CONDITIONS)}")
    if name == SHARED and not given["made"]:
        raise UserError(f"stage.settings.{key}: only made-up domains share sentences")
    if not isinstance(values, list | tuple) or len(values) < 2 or sorted({*values}) != [*values]:
        raise UserError(f"stage.settings.{key}={values}: two numbers or more, rising")
    if name in (SHARED, NOISE):
        for value in values:
            _share(key, value)
        return tuple(map(float, values))
    most = {DOMAINS: MOST_DOMAINS if given["made"] else given["domains"]}.get(name, 10**6)
    if {*map(type, values)} != {int} or min(values) < (1 if name == TOKENS else 2):
        raise UserError(f"stage.settings.{key}={values}: whole numbers, tokens from 1, others 2")
    if max(values) > most:
        raise UserError(f"stage.settings.{key}={values}: there are {most} domains at most")
    return tuple(values)


def _step(config: Config, given: dict[str, Any]) -> Step:
    settings = RoutingSignalsSettings(
        **given,
        names=() if given["made"] else tuple(config.domains.names),
        model=config.model.name,
        method=config.method,
        site=config.method.sites[0],
        max_length=config.trainer.max_length,
        seed=config.seed,
        accelerator=config.trainer.accelerator,
        spread=config.evaluation.spread,
        logger=config.logger,
    )
    inputs = base.inputs(config) | {"sae": sae_training.steps(config)[0]}
    label = f"routing_signals {config.model.name} seed {config.seed}"
    return Step("routing_signals", settings, inputs, label, cost=60)


def report(config: Config, artifacts: list[Artifact], provenance: dict[str, Any]) -> Report:
    """Claims, tables and a figure of the replicates."""
    records = [read_record(artifact / RESULT, RoutingSignals) for artifact in artifacts]
    return write_routing_signals(config, records, provenance)


@stage(
    "routing_signals",
    f"1.{SCHEMA}",
    steps=steps,
    report=report,
    # The rule reads nothing of the adapter that it would route to.
    skip=WHERE | {"logger", "method.rank", "method.alpha", "method.dropout"},
)
def build(context: Context) -> dict:
    settings: RoutingSignalsSettings = context.config
    study = Study(context)
    with context.progress.task(context.label, len(settings.levels) + 1, unit="condition") as task:
        record = study.record(task.advance)
    write_record(context.directory / RESULT, record)
    figures = {
        f"{name}/{level:g}/{signal}": found[signal][place]
        for name, found in record.accuracy.items()
        for place, level in enumerate(record.levels[name])
        for signal in (SAE, HIDDEN)
    }
    with run_log(context, settings.logger) as log:
        log.results(figures)
    return figures
