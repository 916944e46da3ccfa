"""Stage ``features``: which features are general, which a domain's own, and what they mean.

Only training text is read (and where asked for, general text), one batch at a time, and
of it the tokens that carry a signal.
Where an instruction-tuned version of the base is given, general features are those besides that
drift little from the one to the other.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from steerlora.config import Config, FeaturesConfig, LoggerConfig
from steerlora.data.batches import batches_by_length
from steerlora.data.headers import signal_tokens_of
from steerlora.engine.artifacts import Artifact
from steerlora.engine.manifests import write_json
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError
from steerlora.lm.pretrained import open_model, open_tokenizer, shape_of
from steerlora.reporting.tables import Cell, markdown_grid
from steerlora.saes.saelens import load_sae
from steerlora.saes.sparse import SparseFeatures
from steerlora.saes.taxonomy import (
    CONTROLS,
    FeatureStatistics,
    Taxonomy,
    absolute_change,
    classify,
)
from steerlora.stages import base, sae_training
from steerlora.stages.common import (
    WHERE,
    device_of,
    domain_names,
    general_text,
    identity_of_model,
    load_base,
    run_log,
    training_rows,
)
from steerlora.stages.signal_streams import signal_streams

WEIGHTS, LISTING, TABLE = "features.safetensors", "features.json", "features.md"
BATCH_SIZE = 64
GENERAL = "general_text"
"""Name of the rows of general text beside those of the domains."""
WINDOW = 6
"""Tokens of context shown before the token at which a feature is active."""


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Attributes: site: of the stream; max_length: of a row; identity: of the files behind
    ``features.instruct_model``, empty where none are given; accelerator and spread: where the
    models run."""

    features: FeaturesConfig
    site: int
    max_length: int
    identity: str
    accelerator: str
    spread: bool
    logger: LoggerConfig


class _Tokens(NamedTuple):
    """Features of a batch's tokens [T, K], where they stand ([T] row and position), and the ids."""

    features: SparseFeatures
    row: torch.Tensor
    position: torch.Tensor
    input_ids: torch.Tensor


def steps(config: Config) -> tuple[Step, ...]:
    """One step a control site."""
    return tuple(
        _step(config, stream, sae)
        for stream, sae in zip(config.method.streams, sae_training.steps(config), strict=True)
    )


def monitor_step(config: Config) -> Step | None:
    """The features of the monitor site."""
    sae = sae_training.monitor_step(config)
    return None if sae is None else _step(config, config.method.monitor, sae)


def requested(config: Config) -> tuple[Step, ...]:
    """The features of the control sites, and of the monitor site."""
    monitor = monitor_step(config)
    return (*steps(config), *([monitor] if monitor else []))


def _step(config: Config, site: int, sae: Step) -> Step:
    instruct = config.features.instruct_model
    settings = FeatureSettings(
        features=config.features,
        site=site,
        max_length=config.trainer.max_length,
        identity=identity_of_model(instruct, config.artifacts.root) if instruct else "",
        accelerator=config.trainer.accelerator,
        spread=config.evaluation.spread,
        logger=config.logger,
    )
    inputs = base.inputs(config) | {"sae": sae}
    return Step("features", settings, inputs, f"features {config.model.name} site {site}", cost=10)


def load_taxonomy(artifact: Artifact) -> Taxonomy:
    """The taxonomy of this stage's artifact; its domains are in the order of ``domains.names``."""
    stored = load_file(artifact / WEIGHTS)
    return Taxonomy(**{name: stored[name] for name in Taxonomy._fields})


# The place of the instruct model does not matter, its content does.
@stage("features", 2, step=requested, skip=WHERE | {"logger", "features.instruct_model"})
def build(context: Context) -> dict:
    settings: FeatureSettings = context.config
    source = context.inputs["domains"]
    names = domain_names(source)
    if len(names) < 2:
        raise UserError(f"stage=features compares domains: domains.names={names} has only one")
    model, tokenizer = load_base(
        context.inputs["base"], accelerator=settings.accelerator, spread=settings.spread
    )
    sae = load_sae(context.inputs["sae"] / sae_training.FOLDER, model.device)
    rows = training_rows(source, names, tokenizer, settings.max_length)
    rule = signal_tokens_of(tokenizer)
    if settings.features.frequency == GENERAL:
        most = max(map(len, rows.values()))
        rows[GENERAL] = general_text(source, tokenizer, settings.max_length, most)
        if not rows[GENERAL]:
            raise UserError(
                "features.frequency=general_text: no text is set aside beside the domains'; set "
                "domains.pretraining=true, or features.frequency=domains"
            )

    @torch.no_grad()
    def tokens(reader: PreTrainedModel, name: str) -> Iterator[_Tokens]:
        """The features of every token that carries a signal."""
        batches = batches_by_length(rows[name], BATCH_SIZE, tokenizer.pad_token_id)
        for stream, row, position, batch in signal_streams(reader, batches, settings.site, rule):
            yield _Tokens(sae.encode(stream), row, position, batch.input_ids)

    # The base, and its instruction-tuned version where one is given.
    readers = [model]
    if settings.features.instruct_model:
        readers.append(_instruct_model(settings, model, tokenizer))
    counts = [FeatureStatistics(len(names), sae.latents) for _ in readers]
    rounds = (len(readers) + 1) * len(names)
    with context.progress.task(context.label, rounds, unit="domain") as task:
        for reader, statistics in zip(readers, counts, strict=True):
            for number, name in enumerate(names):
                for found in tokens(reader, name):
                    statistics.update(found.features, number)
                task.advance(note=f"{name} counted")
        statistics, *instruct = counts
        frequency = drift = None
        if GENERAL in rows:
            general = FeatureStatistics(1, sae.latents)
            for found in tokens(model, GENERAL):
                general.update(found.features, 0)
            frequency = general.frequency()[0]
        # Every domain weighs alike, as in the frequency.
        if instruct and settings.features.drift == "token":
            drift = torch.stack(
                [_token_drift(tokens, readers, name, sae.latents) for name in names]
            ).mean(0)
        elif instruct:
            drift = (instruct[0].mean() - statistics.mean()).mean(0).abs()
        taxonomy = classify(
            statistics,
            general_quantile=settings.features.general_quantile,
            largest_variation=settings.features.largest_variation,
            domain_quantile=settings.features.domain_quantile,
            least=settings.features.least,
            frequency=frequency,
            drift=drift,
            drift_quantile=settings.features.drift_quantile,
        )
        control = CONTROLS[settings.features.control]
        taxonomy = control(taxonomy, statistics.mean(), settings.features.seed)
        listing = {}
        for number, name in enumerate(names):
            chosen = strongest(taxonomy, number, settings.features.shown)
            shown = _examples(tokens(model, name), chosen, tokenizer, settings.features.examples)
            listing[name] = [
                {
                    "feature": latent,
                    "selectivity": float(taxonomy.selectivity[number, latent]),
                    "frequency": float(statistics.frequency()[number, latent]),
                    "examples": shown[latent],
                }
                for latent in chosen
            ]
            task.advance(note=f"{name} shown")
    tensors = {
        **{name: value.contiguous() for name, value in taxonomy._asdict().items()},
        "frequency": statistics.frequency(),
        "mean": statistics.mean(),
        **({} if drift is None else {"drift": drift}),
        **({} if frequency is None else {"general_frequency": frequency}),
    }
    save_file(tensors, context.directory / WEIGHTS, metadata={"domains": ",".join(names)})
    write_json(context.directory / LISTING, listing)
    (context.directory / TABLE).write_text(_table(listing), encoding="utf-8")
    sizes = {"general": int(taxonomy.general.sum())}
    sizes |= {name: int(own.sum()) for name, own in zip(names, taxonomy.domain, strict=True)}
    with run_log(context, settings.logger) as log:
        log.results(sizes)
        columns = ["domain", "feature", "selectivity", "frequency", "tokens"]
        log.table("features", columns, [row[:5] for row in _rows(listing)])
    return {**sizes, "tokens": int(statistics.tokens.sum()), **asdict(settings.features)}


def _instruct_model(settings: FeatureSettings, base: PreTrainedModel, tokenizer) -> PreTrainedModel:
    """The instruction-tuned version of the base, refused where the SAE could not read it."""
    path = settings.features.instruct_model
    try:
        own_tokenizer = open_tokenizer(path)
        device = device_of(settings.accelerator, spread=settings.spread)
        model = open_model(path, device=device)
    except UserError as error:
        raise UserError(str(error).replace("model.path=", "features.instruct_model=")) from error
    found, wanted = shape_of(model.config), shape_of(base.config)
    if found["width"] != wanted["width"]:
        raise UserError(
            f"features.instruct_model={path} has width {found['width']}; the base has "
            f"{wanted['width']}"
        )
    if settings.site > found["layers"]:
        raise UserError(
            f"features.instruct_model={path} has {found['layers']} layers; the SAE reads site "
            f"{settings.site}"
        )
    fewer = found["vocabulary"] < wanted["vocabulary"]
    if fewer or _ordinary_tokens(own_tokenizer) != _ordinary_tokens(tokenizer):
        raise UserError(
            f"features.instruct_model={path} has another vocabulary than the base: give an "
            "instruction-tuned version of the same model"
        )
    return model


def _ordinary_tokens(tokenizer) -> set[tuple[str, int]]:
    """Tokens and their ids, less those added for chat, which versions of a model may not share."""
    return tokenizer.get_vocab().items() - tokenizer.get_added_vocab().items()


def _token_drift(
    tokens: Callable[[PreTrainedModel, str], Iterator[_Tokens]],
    readers: list[PreTrainedModel],
    name: str,
    latents: int,
) -> torch.Tensor:
    """Mean over a domain's tokens of |z_instruct - z_base|, [N]."""
    total, count = torch.zeros(latents, dtype=torch.float64), 0
    for before, after in zip(*(tokens(reader, name) for reader in readers), strict=True):
        total += absolute_change(before.features, after.features, latents)
        count += len(before.row)
    return total / max(count, 1)


def strongest(taxonomy: Taxonomy, domain: int, count: int) -> list[int]:
    """The domain's own features that set it apart most."""
    own = taxonomy.domain[domain]
    ranked = torch.where(own, taxonomy.selectivity[domain], -torch.inf).argsort(descending=True)
    return ranked[: min(count, int(own.sum()))].tolist()


def _examples(
    batches: Iterator[_Tokens], chosen: list[int], tokenizer, count: int
) -> dict[int, list[dict]]:
    """The strongest activations of each chosen feature, at different tokens in different words:
    value, token, and the words before it as context."""
    best: dict[int, dict[tuple[str, str], float]] = {latent: {} for latent in chosen}
    for tokens in batches:
        for latent in chosen:
            hit = (tokens.features.indices == latent) & (tokens.features.values > 0)
            where = hit.any(-1).nonzero().flatten()
            if not len(where):
                continue
            values = (tokens.features.values * hit).sum(-1)[where]
            for index in values.topk(min(count, len(values))).indices.tolist():
                row, end = tokens.row[where[index]], int(tokens.position[where[index]])
                ids = tokens.input_ids[row, max(0, end - WINDOW) : end + 1].tolist()
                words = (tokenizer.decode(ids[-1:]).strip(), tokenizer.decode(ids[:-1]).strip())
                best[latent][words] = max(float(values[index]), best[latent].get(words, 0.0))
        best = {
            latent: dict(heapq.nlargest(count, found.items(), key=lambda item: item[1]))
            for latent, found in best.items()
        }
    return {
        latent: [
            {"value": value, "token": token, "context": before}
            for (token, before), value in found.items()
        ]
        for latent, found in best.items()
    }


def _rows(listing: dict[str, list[dict]]) -> list[list]:
    """One row a feature: domain, feature, selectivity, frequency, tokens, strongest context."""
    return [
        [
            name,
            feature["feature"],
            feature["selectivity"],
            feature["frequency"],
            ", ".join(dict.fromkeys(example["token"] for example in feature["examples"])),
            " ".join([feature["examples"][0][part] for part in ("context", "token")])
            if feature["examples"]
            else "",
        ]
        for name, features in listing.items()
        for feature in features
    ]


def _table(listing: dict[str, list[dict]]) -> str:
    """The strongest features of each domain as Markdown."""
    columns = ("Domain", "Feature", "Selectivity", "Frequency", "Tokens", "Strongest context")
    rows = []
    for name, feature, selectivity, frequency, tokens, strongest in _rows(listing):
        cells = [name, str(feature), f"{selectivity:.3f}", f"{frequency:.3f}", tokens, strongest]
        rows.append([Cell(" ".join(cell.split())) for cell in cells])  # a row is one line
    return markdown_grid(columns, rows) + "\n"
