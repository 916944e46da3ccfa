"""Stage ``detection``: how well latents and directions tell which texts have a concept.

As in AxBench (Wu et al. 2025, arXiv 2501.17148): the AUROC, on held-out texts and hard negatives,
of a score's largest value on the tokens of an answer. No text is generated.

R texts, T tokens, D model width, N latents, M directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from steerlora.config import Config, LoggerConfig
from steerlora.data.batches import by_length, collate
from steerlora.data.chat import EncodedChat, encode_chats
from steerlora.data.concept_rows import ConceptRow, ConceptText, concept_files, read_concepts
from steerlora.data.conversations import exchange
from steerlora.data.headers import signal_tokens_of
from steerlora.engine.content import absolute, identity_of
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError
from steerlora.lm.signal_tokens import SignalTokens
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.label_scores import TextScores, auroc, calibrated_f1, text_scores
from steerlora.saes.probing import fit_probe
from steerlora.saes.saelens import load_sae
from steerlora.stages import base, sae_training
from steerlora.stages.common import WHERE, load_base, run_log
from steerlora.stages.label_training import reft_vector
from steerlora.stages.signal_streams import signal_streams

TABLE = "detection.csv"
BATCH_SIZE = 16
SEED = 0
"""Of ReFT-r1, of the untrained SAE, and of permuted labels."""
DIRECTIONS = ("difference of means", "probe", "ReFT-r1")


@dataclass(frozen=True, kw_only=True)
class DetectionSettings:
    """Attributes: site: of the stream; text: the folder; max_length: tokens of a row; identity: of
    the text's files; accelerator and spread: where the base runs."""

    site: int
    text: str
    max_length: int
    identity: str
    accelerator: str
    spread: bool
    logger: LoggerConfig


def requested(config: Config) -> tuple[Step, ...]:
    """One step a control site."""
    given = {"text": None} | config.stage.settings
    if unknown := sorted(set(given) - {"text"}):
        raise UserError(f"stage.settings.{unknown[0]}: stage=detection has text alone")
    if given["text"] is None:
        raise UserError(
            "stage=detection reads tables of concepts: give stage.settings.text=<folder>"
        )
    text = absolute(str(given["text"]))
    files = {
        f"{name} {part}": file
        for name, pair in concept_files(Path(text)).items()
        for part, file in zip(("train", "test"), pair, strict=True)
    }
    settings = {
        "text": text,
        "max_length": config.trainer.max_length,
        "identity": identity_of(files, config.artifacts.root),
        "accelerator": config.trainer.accelerator,
        "spread": config.evaluation.spread,
        "logger": config.logger,
    }
    return tuple(
        Step(
            "detection",
            DetectionSettings(site=site, **settings),
            base.inputs(config) | {"sae": sae},
            f"detection {config.model.name} site {site}",
            cost=20,
        )
        for site, sae in zip(config.method.streams, sae_training.steps(config), strict=True)
    )


class _Reader:
    """Answers through the base as far as the site."""

    def __init__(self, context: Context) -> None:
        settings: DetectionSettings = context.config
        self.model, self.tokenizer = load_base(
            context.inputs["base"], accelerator=settings.accelerator, spread=settings.spread
        )
        self.site, self.max_length = settings.site, settings.max_length
        self.rule: SignalTokens = signal_tokens_of(self.tokenizer)
        self.sae = load_sae(context.inputs["sae"] / sae_training.FOLDER, self.model.device)

    def encode(self, rows: Sequence[ConceptRow]) -> list[EncodedChat]:
        pairs = [exchange(row.prompt, row.response) for row in rows]
        return encode_chats(self.tokenizer, pairs, self.max_length)

    def answers(self, rows: Sequence[EncodedChat]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """(numbers of the rows, streams [T, D] of their answers' tokens, row among them [T])"""
        for numbers in by_length(rows, BATCH_SIZE):
            own = [rows[number] for number in numbers]
            batch = collate(own, [-1] * len(own), self.tokenizer.pad_token_id)
            (found,) = signal_streams(self.model, [batch], self.site, self.rule)
            starts = torch.tensor([row.response_start for row in own], device=found.row.device)
            kept = found.position >= starts[found.row]
            yield numbers, found.stream[kept], found.row[kept]

    def scores(self, rows: Sequence[EncodedChat], sae: SparseAutoencoder) -> TextScores:
        """Of every row, in order."""
        parts, order = [], []
        for numbers, stream, row in self.answers(rows):
            parts.append(text_scores(sae, stream, row, len(numbers)))
            order += numbers
        back = torch.tensor(order).argsort()
        return TextScores(*(torch.cat(part)[back] for part in zip(*parts, strict=True)))

    def peaks(self, rows: Sequence[EncodedChat], directions: Tensor) -> Tensor:
        """The largest projection on a token of each row, [M, D] -> [R, M]; a row without any
        token has the lowest there is."""
        found = torch.full((len(rows), len(directions)), -torch.inf)
        for numbers, stream, row in self.answers(rows):
            along = (stream.float() @ directions.to(stream.device).float().t()).cpu()
            index = torch.tensor(numbers)[row.cpu()][:, None].expand_as(along)
            found.scatter_reduce_(0, index, along, "amax")
        lowest = found[found.isfinite()].min() if found.isfinite().any() else 0.0
        return found.clamp_min(float(lowest))


# The place of the text does not matter, its content does.
@stage("detection", 1, step=requested, skip=WHERE | {"logger", "text"})
def build(context: Context) -> dict:
    settings: DetectionSettings = context.config
    reader, rows = _Reader(context), []
    tables = concept_files(Path(settings.text))
    with context.progress.task(context.label, len(tables), unit="table") as task:
        for name, files in tables.items():
            rows += _detected(reader, read_concepts(name, files))
            task.advance(note=name)
    table = pd.DataFrame(rows)
    table.to_csv(context.directory / TABLE, index=False)
    figures = {name: float(value) for name, value in table.groupby("method").auroc.mean().items()}
    with run_log(context, settings.logger) as log:
        log.results(figures)
    return figures


def _detected(reader: _Reader, text: ConceptText) -> list[dict[str, Any]]:
    """A row a concept and method."""
    train, test = reader.encode(text.train), reader.encode(text.test)
    saes = {"": reader.sae, "untrained SAE, ": reader.sae.untrained_like(SEED)}
    fitted = {name: reader.scores(train, sae) for name, sae in saes.items()}
    tested = {name: reader.scores(test, sae) for name, sae in saes.items()}
    directions = torch.cat(
        [_directions(reader, text, concept, train, fitted[""]) for concept in text.concepts]
    )
    along = reader.peaks(test, directions).view(len(test), -1, len(DIRECTIONS))
    found = []
    for place, (concept, about) in enumerate(text.concepts.items()):
        own, others = text.training(concept)
        there = torch.arange(len(own) + len(others)) < len(own)
        index = torch.tensor([*own, *others])
        positive, negative = text.testing(concept)
        here = torch.arange(len(positive) + len(negative)) < len(positive)
        told = torch.tensor([*positive, *negative])
        scores: dict[str, Tensor] = {
            name: along[told, place, number] for number, name in enumerate(DIRECTIONS)
        }
        shuffled = there[torch.randperm(len(there), generator=torch.Generator().manual_seed(SEED))]
        for name, before in fitted.items():
            before, after = before.rows(index), tested[name].rows(told)
            best = auroc(before.peak, there).argmax()
            scores[f"{name}latent by AUROC (SAE-A)"] = after.peak[:, best]
            labels = {"latent by calibrated F1": there, "latent by permuted labels": shuffled}
            for how, given in labels.items():
                latent = calibrated_f1(before.frequency, given[:, None]).value[0].argmax()
                scores[name + how] = after.peak[:, latent]
        scores["bag of words"] = _bag_of_words(text, index, told, there)
        found += [
            {"table": text.name, "concept": concept, "about": about, "method": name}
            | {"auroc": float(auroc(score[:, None], here))}
            for name, score in scores.items()
        ]
    return found


def _directions(
    reader: _Reader,
    text: ConceptText,
    concept: int,
    rows: Sequence[EncodedChat],
    scores: TextScores,
) -> Tensor:
    """A unit vector for each of `DIRECTIONS`, [M, D]."""
    own, others = text.training(concept)
    parts = [scores.rows(torch.tensor(part)) for part in (own, others)]
    means = [
        (part.stream.double() * part.tokens[:, None]).sum(0) / part.tokens.sum() for part in parts
    ]
    streams = torch.cat([part.stream for part in parts])
    probe = fit_probe(streams, torch.arange(len(streams)) < len(own)).weight
    learnt = reft_vector(
        reader.model,
        reader.site,
        reader.rule,
        [rows[index] for index in own],
        reader.tokenizer.pad_token_id,
        SEED,
    )
    vectors = [means[0] - means[1], probe, learnt]
    return F.normalize(torch.stack([vector.float() for vector in vectors]), dim=1)


def _bag_of_words(text: ConceptText, index: Tensor, told: Tensor, labels: Tensor) -> Tensor:
    """Log-odds of a logistic regression on how often words come in an answer, [R]."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    words = CountVectorizer(token_pattern=r"\S+")
    rows = words.fit_transform([text.train[i].response for i in index.tolist()])
    fitted = LogisticRegression(max_iter=1000).fit(rows, labels.numpy())
    asked = words.transform([text.test[i].response for i in told.tolist()])
    return torch.from_numpy(fitted.decision_function(asked))
