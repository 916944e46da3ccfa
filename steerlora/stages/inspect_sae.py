"""Stage ``inspect_sae``: what a given SAE is, and whether it fits the model, before it is used."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from steerlora.config import Config
from steerlora.data.headers import signal_tokens_of
from steerlora.data.jsonl import read_objects
from steerlora.engine.content import absolute, identity_of, open_file
from steerlora.engine.manifests import write_json
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError
from steerlora.stages import base
from steerlora.stages.common import POINTER, WHERE, load_base
from steerlora.stages.given_saes import identity_of_saes, open_given
from steerlora.stages.sae_quality import (
    TextBatch,
    held_out_batches,
    implausible,
    quality,
    streams_of,
)

INSPECTION = "inspection.json"
BATCH_ROWS = 16
MOST_ROWS = 512
"""Of a text that is given; what follows is not read."""


@dataclass(frozen=True, kw_only=True)
class InspectionSettings:
    """Attributes: path: of the SAE; site: the stream that it should read; text: the text's path,
    None for the domains' held-out rows; max_length: tokens of a row; identity: of the SAE's files
    and the text's; accelerator and spread: where the model runs."""

    path: str
    site: int
    text: str | None
    max_length: int
    identity: str
    accelerator: str
    spread: bool


def requested(config: Config) -> tuple[Step, ...]:
    """One step a control site."""
    path, text = config.sae.path, config.stage.settings.get("text")
    if unknown := sorted(set(config.stage.settings) - {"text"}):
        raise UserError(f"stage.settings.{unknown[0]}: stage=inspect_sae has text alone")
    if not path:
        raise UserError(
            "stage=inspect_sae needs sae.path=<file, folder or hub id>; of an SAE that is trained "
            "here, stage=sae_training reports the same"
        )
    if text is not None:
        text = absolute(str(text))
        of_text = identity_of({"text": Path(text)}, config.artifacts.root)
    return tuple(
        Step(
            "inspect_sae",
            InspectionSettings(
                path=path,
                site=site,
                text=text,
                max_length=config.trainer.max_length,
                identity=identity_of_saes(config, path, site) + (f" {of_text}" if text else ""),
                accelerator=config.trainer.accelerator,
                spread=config.evaluation.spread,
            ),
            base.inputs(config),
            f"inspect_sae {path} site {site}",
        )
        for site in config.method.streams
    )


# The place of given files does not matter, their content does.
@stage("inspect_sae", 3, step=requested, skip=WHERE | {"path", "text"})
def build(context: Context) -> dict:
    settings: InspectionSettings = context.config
    model, tokenizer = load_base(
        context.inputs["base"], accelerator=settings.accelerator, spread=settings.spread
    )
    if settings.text is None:
        source = context.inputs["domains"]
        batches = held_out_batches(source, tokenizer, settings.max_length)
    else:
        batches = _text_batches(Path(settings.text), tokenizer, settings.max_length)
    rule = signal_tokens_of(tokenizer)
    streams = cache(lambda: streams_of(model, batches, [settings.site], rule).rows[:, 0])
    pointer = context.inputs["base"].json(POINTER)
    sae = open_given(settings.path, settings.site, pointer, streams).to(model.device)
    figures = quality(model, sae, settings.site, batches, rule)
    if wrong := implausible(figures, sae.latents):
        raise UserError(
            f"sae.path={settings.path}: on the stream entering layer {settings.site}, {wrong}: it "
            "was made for another model, layer or scale of activations, or its matrices are "
            "transposed"
        )
    shapes = {name: str(list(value.shape)) for name, value in sae.state_dict().items()}
    report = {"architecture": sae.architecture, **sae.settings(), **shapes, **figures}
    write_json(context.directory / INSPECTION, report)
    return report


def _text_batches(path: Path, tokenizer, max_length: int) -> list[TextBatch]:
    """The rows of a text: ``text`` of a ``.jsonl`` file's, else paragraphs of plain text.

    Raises:
        UserError: a row without ``text``, text that is not UTF-8, or no row of two tokens.
    """
    rows = []
    for place, text in _paragraphs(path):
        if not isinstance(text, str):
            raise UserError(f"{place}: no text: a row of stage.settings.text has a key text")
        ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        rows += [torch.tensor(ids)] if len(ids) > 1 else []  # the first token does not count
        if len(rows) == MOST_ROWS:
            break
    if not rows:
        raise UserError(f"stage.settings.text={path} has no row of two tokens or more")
    rows.sort(key=len)
    return [
        TextBatch(
            pad_sequence(part, batch_first=True, padding_value=tokenizer.pad_token_id),
            pad_sequence([torch.ones_like(row) for row in part], batch_first=True),
        )
        for part in (rows[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS))
    ]


def _paragraphs(path: Path):
    if path.suffix == ".jsonl":
        for place, row in read_objects(path):
            yield place, row.get("text")
        return
    with open_file(path) as file:
        try:
            text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text; save the file as UTF-8") from None
    for paragraph in text.split("\n\n"):
        yield path, paragraph.strip()
