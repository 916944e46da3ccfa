"""Stage ``units``: what the units of a trained sparse adapter stand for (``evaluation/units.py``).

R rows of text, U units of all layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch

from steerlora.config import Config, LoggerConfig
from steerlora.config.checks import one_of
from steerlora.data.batches import batches_by_length
from steerlora.data.chat import encode_chats
from steerlora.data.jsonl import read_rows
from steerlora.engine.manifests import write_json
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError
from steerlora.evaluation import units
from steerlora.evaluation.cross_entropy import heldout_cross_entropy
from steerlora.evaluation.units import Activity, SwitchedOff
from steerlora.lm.decoder import decoder_of
from steerlora.methods.saving import load_adapter
from steerlora.stages import adapter_training, base, sequential_forgetting
from steerlora.stages.common import WHERE, domain_names, load_base, run_log
from steerlora.stages.sequence_state import FOLDER

RESULT, TABLE = "units.json", "units.csv"
TRAININGS = ("joint", "sequence")
BATCH_SIZE, DRAWS = 32, 3
"""DRAWS: sets of control units a domain."""


@dataclass(frozen=True, kw_only=True)
class UnitsSettings:
    """What the figures depend on."""

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
    given = {"training": "joint", "rows": 200} | config.stage.settings
    if unknown := sorted(set(given) - {"training", "rows"}):
        raise UserError(f"stage.settings.{unknown[0]}: stage=units has training and rows alone")
    one_of("stage.settings.training", given["training"], TRAININGS)
    if type(given["rows"]) is not int or given["rows"] < 4:
        raise UserError(f"stage.settings.rows={given['rows']}: a number of rows from 4")
    config.method.check_trains()
    if not config.method.has_units:
        raise UserError(
            f"stage=units looks at units that act token by token, and method={config.method.name} "
            "has none: give another method=<option>"
        )
    trained = adapter_training if given["training"] == "joint" else sequential_forgetting
    settings = UnitsSettings(
        **given,
        max_length=config.trainer.max_length,
        seed=config.seed,
        accelerator=config.trainer.accelerator,
        spread=config.evaluation.spread,
        logger=config.logger,
    )
    inputs = base.inputs(config) | {"adapter": trained.step(config)}
    label = f"units {config.model.name} {config.method.name} seed {config.seed}"
    return Step("units", settings, inputs, label, cost=5)


@stage("units", 1, step=step, skip=WHERE | {"logger", "spread"})
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
    rows = {name: read_rows(source / f"heldout/{name}.jsonl")[: settings.rows] for name in names}
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
    write_json(
        context.directory / RESULT,
        {
            "figures": figures,
            "intact": intact,
            "switched_off": [asdict(one) for one in found],
            "load_by_layer": dict(_loads(activity, layers)),
        },
    )
    _table(found).to_csv(context.directory / TABLE, index=False)
    with run_log(context, settings.logger) as log:
        log.results(figures)
    return figures


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
