"""Stage ``units``: what the units of a trained sparse adapter stand for (``evaluation/units.py``).

R rows of text, U units of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from steerlora.config import Config, LoggerConfig, StudyConfig
from steerlora.config.checks import one_of
from steerlora.config.run import PARTS
from steerlora.data.batches import batches_by_length
from steerlora.data.chat import encode_chats
from steerlora.data.jsonl import read_rows
from steerlora.engine.artifacts import Artifact
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError, nearest
from steerlora.evaluation import units
from steerlora.evaluation.cross_entropy import heldout_cross_entropy
from steerlora.evaluation.records import (
    SCHEMA,
    DomainSequence,
    Evaluation,
    read_record,
    write_record,
)
from steerlora.evaluation.units import Activity, SwitchedOff, UnitsRecord
from steerlora.lm.decoder import decoder_of
from steerlora.methods.saving import load_adapter
from steerlora.reporting.report import Report
from steerlora.reporting.units.report import write_units
from steerlora.reporting.units.study import ROLES, UnitStudy
from steerlora.stages import adapter_training, base, evaluate, sequential_forgetting
from steerlora.stages.common import WHERE, domain_names, load_base, run_log
from steerlora.stages.sequence_state import FOLDER

RESULT, TABLE = "units.json", "units.csv"
TRAININGS = ("joint", "sequence")
ROWS, BATCH_SIZE, DRAWS = 200, 32, 3
"""DRAWS: sets of control units a domain."""


@dataclass(frozen=True, kw_only=True)
class UnitsSettings:
    """What the figures depend on."""

    model: str
    method: str
    """Their names."""
    training: str
    """Whose adapter: "joint", or that which a "sequence" of domains ends with."""
    rows: int
    """Held-out rows a domain, at most."""
    max_length: int
    """Tokens of a row, at most."""
    seed: int
    """Of permutations and of controls."""
    accelerator: str
    spread: bool
    logger: LoggerConfig


def step(config: Config) -> Step:
    """Of one method: ``stage.settings`` says whose adapter, and how many rows."""
    given = {"training": "joint", "rows": ROWS} | config.stage.settings
    if unknown := sorted(set(given) - {"training", "rows"}):
        raise UserError(f"stage.settings.{unknown[0]}: stage=units has training and rows alone")
    one_of("stage.settings.training", given["training"], TRAININGS)
    return _step(config, given["training"], given["rows"])


def _step(config: Config, training: str, rows: Any) -> Step:
    if type(rows) is not int or rows < 4:
        raise UserError(f"stage.settings.rows={rows}: a number of rows from 4")
    config.method.check_trains()
    if not config.method.has_units:
        raise UserError(
            f"stage=units looks at units that act token by token, and method={config.method.name} "
            "has none: give another method=<option>"
        )
    trained = adapter_training if training == "joint" else sequential_forgetting
    settings = UnitsSettings(
        training=training,
        rows=rows,
        model=config.model.name,
        method=config.method.name,
        max_length=config.trainer.max_length,
        seed=config.seed,
        accelerator=config.trainer.accelerator,
        spread=config.evaluation.spread,
        logger=config.logger,
    )
    inputs = base.inputs(config) | {"adapter": trained.step(config)}
    label = f"units {config.model.name} {config.method.name} seed {config.seed}"
    return Step("units", settings, inputs, label, cost=5)


def steps(config: Config, variant: Callable[..., Config]) -> list[Step]:
    """Of one method; in an experiment about units, all that its report compares."""
    study = config.study
    if study.stage != "units":
        return [step(config)]
    settings = _study_settings(study)
    found = []
    for seed in study.seeds:
        replicate = [
            f"{key}={seed if part in study.vary else study.seeds[0]}"
            for part, key in zip(PARTS, ("model.seed", "sae.seed", "seed"), strict=True)
        ]

        def of(method: str, *options: str, replicate=tuple(replicate)) -> Config:
            rate = settings.learning_rates.get(method)
            chosen = [f"trainer.learning_rate={rate}"] if rate else []
            return variant(f"method={method}", *options, *chosen, *replicate)

        found.append(evaluate.step(variant(*replicate), adapted=False))
        sparse = settings.roles["sparse"]
        found += [evaluate.step(of(method)) for method in study.methods]
        found.append(_step(of(sparse), "joint", settings.rows))
        for method, order in product(study.sequential_methods, study.orders):
            own = of(method, f"order={order}")
            found.append(sequential_forgetting.step(own))
            if method == sparse:
                found.append(_step(own, "sequence", settings.rows))
    return list({one.fingerprint: one for one in found}.values())


class StudySettings(NamedTuple):
    """``study.settings`` of an experiment about units."""

    roles: dict[str, str]
    """{part in the claims: method}, of `ROLES`; "sparse" is the method that they are about."""
    learning_rates: dict[str, float]
    """{method: its own in place of ``trainer.learning_rate``}."""
    tuned: bool
    """Whether all were chosen on development text, from one grid."""
    rows: int
    """As ``stage.settings.rows``."""


def _study_settings(study: StudyConfig) -> StudySettings:
    given = {"roles": {}, "learning_rates": {}, "tuned": False, "rows": ROWS} | study.settings
    if unknown := sorted(set(given) - set(StudySettings._fields)):
        raise UserError(
            f"study.settings.{unknown[0]}: {nearest(unknown[0], StudySettings._fields)}"
        )
    for role in given["roles"]:
        one_of("study.settings.roles", role, ROLES)
    if "sparse" not in given["roles"]:
        raise UserError("study.settings.roles.sparse=<method>: name the method with units")
    return StudySettings(**given)


def report(config: Config, artifacts: Sequence[Artifact], provenance: dict[str, Any]) -> Report:
    """The report of an experiment about units, of those of its artifacts that are there."""

    def records(stage: str, name: str, kind: type) -> list:
        return [read_record(one / name, kind) for one in artifacts if one.stage == stage]

    study = UnitStudy(
        _study_settings(config.study).roles,
        records("evaluate", evaluate.SCORES, Evaluation),
        records("sequential_forgetting", sequential_forgetting.RESULT, DomainSequence),
        records("units", RESULT, UnitsRecord),
    )
    return write_units(config, study, provenance)


@stage("units", f"1.{SCHEMA}", steps=steps, skip=WHERE | {"logger"}, report=report)
def build(context: Context) -> dict:
    settings: UnitsSettings = context.config
    source, adapter = context.inputs["domains"], context.inputs["adapter"]
    model, tokenizer = load_base(
        context.inputs["base"], accelerator=settings.accelerator, spread=settings.spread
    )
    names = domain_names(source)
    folder = adapter / adapter_training.FOLDER
    if settings.training == "sequence":
        folder = sorted((adapter / FOLDER).iterdir())[-1]
    method = load_adapter(model, folder)
    method.configure()  # as trained: a control of the evaluation may have trained it first
    rows = {name: _halves(read_rows(source / f"heldout/{name}.jsonl"), settings) for name in names}
    layers = {name: len(norms) for name, norms in method.unit_norms().items()}
    norms = torch.cat(list(method.unit_norms().values())).float().cpu().numpy()
    activity = _activity(method, model, tokenizer, list(rows.values()), settings.max_length)
    chosen_on, told_on = activity.half(0), activity.half(1)
    rates = chosen_on.rates(len(names))
    draws = np.random.default_rng(settings.seed)

    def losses(off: np.ndarray) -> dict[str, float]:
        """Cross-entropy of each domain's other half of rows, with units switched off."""
        with method.switched_off(_by_layer(off, layers)):
            return {
                name: heldout_cross_entropy(
                    model,
                    tokenizer,
                    own[1::2],
                    batch_size=BATCH_SIZE,
                    max_length=settings.max_length,
                ).value
                for name, own in rows.items()
            }

    intact = losses(np.array([], dtype=int))
    found = []
    with context.progress.task(context.label, len(names), unit="domain") as task:
        for number, name in enumerate(names):
            own = units.own_units(rates, number)
            controls = [
                losses(units.matched_units(rates[number], norms, own, draws)) for _ in range(DRAWS)
            ]
            rise = {other: value - intact[other] for other, value in losses(own).items()}
            control = {o: sum(c[o] for c in controls) / DRAWS - intact[o] for o in names}
            found.append(SwitchedOff(domain=name, units=len(own), own=rise, control=control))
            task.advance(note=name)
    information = units.information(told_on, len(names), settings.seed)
    load, (jaccard, chance) = units.load(activity), units.overlap(activity.rates(len(names)))
    figures = {
        **{f"information/{key}": value for key, value in information._asdict().items()},
        **{f"load/{key}": value for key, value in load._asdict().items()},
        "overlap/jaccard": jaccard,
        "overlap/chance": chance,
        "switched_off/own": float(np.mean([one.selectivity(one.own) for one in found])),
        "switched_off/control": float(np.mean([one.selectivity(one.control) for one in found])),
    }
    record = UnitsRecord(
        model=settings.model,
        method=settings.method,
        seed=settings.seed,
        fingerprint=context.fingerprint,
        training=settings.training,
        figures=figures,
        intact=intact,
        switched_off=tuple(found),
        load_by_layer=dict(_loads(activity, layers)),
    )
    write_record(context.directory / RESULT, record)
    _table(found).to_csv(context.directory / TABLE, index=False)
    with run_log(context, settings.logger) as log:
        log.results(figures)
    return figures


def _halves(rows: list, settings: UnitsSettings) -> list:
    """As many rows as are asked for and there are, an even number: every other one is a half."""
    count = min(settings.rows, len(rows))
    return rows[: count - count % 2]


@torch.no_grad()
def _activity(method, model, tokenizer, rows: list, max_length: int) -> Activity:
    """On how many real tokens of each row each unit acts; rows of all domains, domain by domain."""
    fired, tokens, owners = [], [], []
    with method.watched():
        for owner, own in enumerate(rows):
            for encoded in encode_chats(tokenizer, own, max_length):
                (batch,) = batches_by_length([encoded], 1, tokenizer.pad_token_id, owner)
                batch = batch.to(model.device)
                decoder_of(model)(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
                )
                active = torch.cat([part[0].cpu() for part in method.active_units().values()], -1)
                fired.append(active.sum(0).numpy())
                tokens.append(len(active))
                owners.append(owner)
    return Activity(np.stack(fired), np.array(tokens), np.array(owners))


def _by_layer(numbers: np.ndarray, layers: dict[str, int]) -> dict[str, torch.Tensor]:
    """Numbers among all units, as {layer: numbers among its own}."""
    found, first = {}, 0
    for name, count in layers.items():
        own = numbers[(numbers >= first) & (numbers < first + count)] - first
        if len(own):
            found[name] = torch.from_numpy(own)
        first += count
    return found


def _loads(activity: Activity, layers: dict[str, int]) -> Iterator[tuple[str, dict[str, float]]]:
    """(layer, how evenly its units act)"""
    first = 0
    for name, count in layers.items():
        own = activity._replace(fired=activity.fired[:, first : first + count])
        yield name, units.load(own)._asdict()
        first += count


def _table(found: list[SwitchedOff]) -> pd.DataFrame:
    """A row for each domain whose units are switched off, and for what is switched off."""
    rows = [
        {"domain": one.domain, "units": one.units, "switched off": what, **rise}
        | {"selectivity": one.selectivity(rise)}
        for one in found
        for what, rise in (("own", one.own), ("control", one.control))
    ]
    return pd.DataFrame(rows)
