"""Stage ``sae_probing``: what an SAE's latents tell of labelled text, beside an untrained SAE's.

Sparse probing, targeted probe perturbation and spurious correlation removal, as SAEBench defines
them (`steerlora.saes.probing`, `steerlora.saes.perturbation`), on text that is on this machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerlora.config import Config, LoggerConfig
from steerlora.data.batches import batches_by_length, by_length, evenly_spaced
from steerlora.data.chat import EncodedChat, encode_chats
from steerlora.data.headers import signal_tokens_of
from steerlora.data.labelled import FEWEST, LabelledRow, labelled_files, read_labelled
from steerlora.engine.content import absolute, identity_of
from steerlora.engine.manifests import write_json
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError
from steerlora.lm.signal_tokens import SignalTokens
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.perturbation import spurious_correlation_removal, targeted_probe_perturbation
from steerlora.saes.probing import Pooled, pool, sparse_probing
from steerlora.saes.saelens import load_sae
from steerlora.stages import base, sae_training
from steerlora.stages.common import (
    WHERE,
    domain_names,
    load_base,
    read_rows,
    run_log,
    training_rows,
)
from steerlora.stages.signal_streams import signal_streams

PROBING = "probing.json"
BATCH_SIZE = 32
SEED = 0
"""Of the choice of texts and of the untrained SAE."""
TRAINED, UNTRAINED = "trained", "untrained"


@dataclass(frozen=True, kw_only=True)
class ProbingSettings:
    """Attributes: site: of the stream; text: the folder, None for the domains' own rows; rows: of a
    class, in training and in the test; max_length: tokens of a row; identity: of the text's files;
    accelerator and spread: where the base runs."""

    site: int
    text: str | None
    rows: int
    max_length: int
    identity: str
    accelerator: str
    spread: bool
    logger: LoggerConfig


@dataclass(frozen=True, kw_only=True)
class Probing:
    """Scores of one data set, or of two that share labels, in SAEBench's names."""

    name: str
    """The data set's; of two, both with a plus between."""
    classes: tuple[str, ...]
    rows: int
    """In the test."""
    trained: dict[str, float] = field(default_factory=dict)
    """{score: value} of the SAE; a score that has no value is not there."""
    untrained: dict[str, float] = field(default_factory=dict)
    """The same of a randomly initialised SAE of its shape: what the architecture gives alone."""


@dataclass(frozen=True)
class _Part:
    """Training or test rows of one data set, for each SAE."""

    labels: Tensor
    """[R] number of each row's class."""
    pooled: dict[str, Pooled]


@dataclass(frozen=True)
class _DataSet:
    name: str
    classes: tuple[str, ...]
    train: _Part
    test: _Part


def requested(config: Config) -> tuple[Step, ...]:
    """One step a control site."""
    given = {"text": None, "rows": 100} | config.stage.settings
    if unknown := sorted(set(given) - {"text", "rows"}):
        raise UserError(f"stage.settings.{unknown[0]}: stage=sae_probing has text and rows alone")
    text, rows = given["text"], given["rows"]
    if type(rows) is not int or rows < FEWEST:
        raise UserError(f"stage.settings.rows={rows}: a number of rows from {FEWEST}")
    identity = ""
    if text is not None:
        text = absolute(str(text))
        identity = identity_of(labelled_files(Path(text)), config.artifacts.root)
    settings = {
        "text": text,
        "rows": rows,
        "max_length": config.trainer.max_length,
        "identity": identity,
        "accelerator": config.trainer.accelerator,
        "spread": config.evaluation.spread,
        "logger": config.logger,
    }
    return tuple(
        Step(
            "sae_probing",
            ProbingSettings(site=site, **settings),
            base.inputs(config) | {"sae": sae},
            f"sae_probing {config.model.name} site {site}",
            cost=10,
        )
        for site, sae in zip(config.method.streams, sae_training.steps(config), strict=True)
    )


# The place of the text does not matter, its content does.
@stage("sae_probing", 1, step=requested, skip=WHERE | {"logger", "text"})
def build(context: Context) -> dict:
    settings: ProbingSettings = context.config
    model, tokenizer = load_base(
        context.inputs["base"], accelerator=settings.accelerator, spread=settings.spread
    )
    sae = load_sae(context.inputs["sae"] / sae_training.FOLDER, model.device)
    saes = {TRAINED: sae, UNTRAINED: sae.untrained_like(SEED)}
    rule = signal_tokens_of(tokenizer)
    texts = list(_texts(context, settings, tokenizer))

    def part(rows: Sequence[EncodedChat], labels: Sequence[int]) -> _Part:
        pooled = _pooled(model, saes, settings.site, rows, tokenizer.pad_token_id, rule)
        return _Part(torch.tensor(labels), pooled)

    found, seen = [], []
    with context.progress.task(context.label, len(texts), unit="data set") as task:
        for name, classes, train, test in texts:
            data = _DataSet(name, classes, part(*train), part(*test))
            found.append(_probed(data, saes))
            found += [pair for one in seen if (pair := _pair(one, data, saes))]
            seen.append(data)
            task.advance(note=name)
    write_json(context.directory / PROBING, [vars(one) for one in found])
    summary = _means(found)
    with run_log(context, settings.logger) as log:
        log.results(summary)
    return summary


def _means(found: Sequence[Probing]) -> dict[str, float]:
    """Each score's mean over the data sets that have it; the untrained SAE's named so."""
    means: dict[str, list[float]] = {}
    for one in found:
        for scores, before in ((one.trained, ""), (one.untrained, f"{UNTRAINED}_")):
            for name, value in scores.items():
                means.setdefault(before + name, []).append(value)
    return {name: sum(values) / len(values) for name, values in means.items()}


_Rows = tuple[list[EncodedChat], list[int]]
"""Rows and the class of each."""


def _texts(
    context: Context, settings: ProbingSettings, tokenizer: Any
) -> Iterator[tuple[str, tuple[str, ...], _Rows, _Rows]]:
    """(name, classes, training rows, test rows) of each data set."""
    if settings.text is None:
        source = context.inputs["domains"]
        names = domain_names(source)
        if len(names) < 2:
            raise UserError(f"stage=sae_probing tells domains apart: {names} is only one")
        train = training_rows(source, names, tokenizer, settings.max_length)
        test = {
            name: encode_chats(
                tokenizer, read_rows(source / f"heldout/{name}.jsonl"), settings.max_length
            )
            for name in names
        }
        yield "domains", tuple(names), *(_cut(part, settings.rows) for part in (train, test))
        return
    for data in read_labelled(Path(settings.text), settings.rows):

        def encoded(rows: Sequence[LabelledRow], labels: tuple[str, ...] = data.labels) -> _Rows:
            ids = tokenizer(
                [row.text for row in rows], truncation=True, max_length=settings.max_length
            )["input_ids"]
            # A row's first token does not count.
            kept = [(i, row.label) for i, row in zip(ids, rows, strict=True) if len(i) > 1]
            chats = [EncodedChat(one, len(one)) for one, _ in kept]
            return chats, [labels.index(label) for _, label in kept]

        yield data.name, data.labels, encoded(data.train), encoded(data.test)


def _cut(rows: dict[str, list[EncodedChat]], most: int) -> _Rows:
    """So many rows of each class at most, and their classes."""
    chats, classes = [], []
    for number, own in enumerate(rows.values()):
        own = evenly_spaced(own, most)
        chats += own
        classes += [number] * len(own)
    return chats, classes


def _pooled(
    model: Any,
    saes: dict[str, SparseAutoencoder],
    site: int,
    rows: Sequence[EncodedChat],
    pad_token_id: int,
    rule: SignalTokens,
) -> dict[str, Pooled]:
    """{SAE: the rows in their own order}, over the tokens that carry a signal."""
    parts: dict[str, list[Pooled]] = {name: [] for name in saes}
    batches = batches_by_length(rows, BATCH_SIZE, pad_token_id)
    for stream, row, _, batch in signal_streams(model, batches, site, rule):
        for name, sae in saes.items():
            parts[name].append(pool(sae, stream, row, len(batch.input_ids)))
    # They are read by length.
    order = [index for group in by_length(rows, BATCH_SIZE) for index in group]
    back = torch.tensor(order).argsort()
    return {
        name: Pooled(*(torch.cat(part)[back] for part in zip(*found, strict=True)))
        for name, found in parts.items()
    }


def _probed(data: _DataSet, saes: dict[str, SparseAutoencoder]) -> Probing:
    """Sparse probing, and of an SAE that writes what it reads, targeted perturbation."""
    scores = {}
    for name, sae in saes.items():
        given = (data.train.pooled[name], data.test.pooled[name])
        labels = (data.train.labels, data.test.labels)
        scores[name] = sparse_probing(*given, *labels, SEED)
        if not sae.span:
            rows = sae.W_dec.detach().cpu()
            scores[name] |= targeted_probe_perturbation(*given, *labels, rows, SEED)
    return Probing(name=data.name, classes=data.classes, rows=len(data.test.labels), **scores)


def _pair(one: _DataSet, other: _DataSet, saes: dict[str, SparseAutoencoder]) -> Probing | None:
    """Spurious correlation removal where two data sets share labels: of the first two that they
    share, and of which data set a text is from. None where they do not, or too few rows."""
    shared = [label for label in one.classes if label in other.classes][:2]
    if len(shared) < 2 or any(sae.span for sae in saes.values()):
        return None
    sides = []
    for kind in ("train", "test"):
        labels, pooled = [], {name: [] for name in saes}
        for source, data in enumerate((one, other)):
            part: _Part = getattr(data, kind)
            numbers = [data.classes.index(label) for label in shared]
            kept = torch.isin(part.labels, torch.tensor(numbers)).nonzero().flatten()
            first = part.labels[kept] == numbers[0]
            labels.append(torch.stack([first, torch.full_like(first, source == 0)], 1))
            for name, texts in part.pooled.items():
                pooled[name].append(texts.rows(kept))
        sides.append(
            (
                torch.cat(labels),
                {name: Pooled(*map(torch.cat, zip(*p, strict=True))) for name, p in pooled.items()},
            )
        )
    (train_labels, train), (test_labels, test) = sides
    scores = {}
    for name, sae in saes.items():
        found = spurious_correlation_removal(
            train[name], test[name], train_labels, test_labels, sae.W_dec.detach().cpu(), SEED
        )
        scores[name] = {key: value for key, value in found.items() if math.isfinite(value)}
    return Probing(
        name=f"{one.name}+{other.name}", classes=tuple(shared), rows=len(test_labels), **scores
    )
