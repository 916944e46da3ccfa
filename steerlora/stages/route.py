"""Stage ``route``: which domain a text goes to in an adapter that a sequence left behind."""

from __future__ import annotations

import math
from dataclasses import dataclass

from steerlora.config import Config
from steerlora.data.chat import encode_chat
from steerlora.engine.manifests import write_json
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError
from steerlora.methods.saving import load_adapter
from steerlora.stages import base, sequential_forgetting
from steerlora.stages.common import WHERE, load_base
from steerlora.stages.sequence_state import FOLDER

ROUTE = "route.json"
GENERAL = "general text"
NEAREST = 3
"""Domains that are printed."""


@dataclass(frozen=True, kw_only=True)
class RouteSettings:
    """Attributes: text: what a user would say; sequence: the domains in the order of learning;
    max_length: tokens of the text, of a longer one the last; accelerator: where the model runs."""

    text: str
    sequence: tuple[str, ...]
    max_length: int
    accelerator: str


def step(config: Config) -> Step:
    text = config.stage.settings.get("text")
    if unknown := sorted(set(config.stage.settings) - {"text"}):
        raise UserError(f"stage.settings.{unknown[0]}: stage=route has text alone")
    if not isinstance(text, str) or not text.strip():
        raise UserError("stage=route needs a text: stage.settings.text='...'")
    if not config.method.tells_domains:
        raise UserError(
            f"method={config.method.name} does not route by domain: give one that does, such as "
            "the project's own (study.own_method)"
        )
    sequence = sequential_forgetting.step(config)
    settings = RouteSettings(
        text=text,
        sequence=sequence.config.sequence,
        max_length=config.trainer.max_length,
        accelerator=config.trainer.accelerator,
    )
    inputs = base.inputs(config) | {"sequence": sequence}
    return Step("route", settings, inputs, f"route {config.model.name} {config.method.name}")


@stage("route", 1, step=step, skip=WHERE)
def build(context: Context) -> dict:
    settings: RouteSettings = context.config
    model, tokenizer = load_base(context.inputs["base"], accelerator=settings.accelerator)
    last = len(settings.sequence) - 1
    folder = context.inputs["sequence"] / FOLDER / f"{last}_{settings.sequence[last]}"
    method = load_adapter(model, folder)
    row = encode_chat(tokenizer, settings.text, "?", settings.max_length)
    found, printed = {}, {}
    for site, nearness in method.nearness([row], tokenizer.pad_token_id).items():
        # Specialists come in the order of learning, and may be more; the last is general text.
        *specialists, general = nearness[0].tolist()
        values = (*specialists[: last + 1], general)
        named = zip((*settings.sequence, GENERAL), values, strict=True)
        known = sorted((pair for pair in named if pair[1] > -math.inf), key=lambda pair: -pair[1])
        margin = known[0][1] - known[1][1] if len(known) > 1 else None
        found[site] = {"domain": known[0][0], "margin": margin, "nearness": dict(known)}
        nearest = ", ".join(f"{name} {value:.3f}" for name, value in known[:NEAREST])
        by = "" if margin is None else f", margin {margin:.3f}"
        printed[f"site {site}"] = f"{known[0][0]}{by} (nearest: {nearest})"
    write_json(context.directory / ROUTE, found)
    return printed
