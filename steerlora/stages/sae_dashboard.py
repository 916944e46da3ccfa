"""Stage ``sae_dashboard``: what chosen latents respond to and do, on one page of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from steerlora.config import Config
from steerlora.data.batches import batches_by_length, evenly_spaced
from steerlora.data.headers import signal_tokens_of
from steerlora.engine.manifests import write_json
from steerlora.engine.steps import Context, Step, stage
from steerlora.errors import UserError
from steerlora.lm.logit_effects import logit_effects
from steerlora.reporting.dashboards import dashboard_page
from steerlora.reporting.latent_activity import Batch, Seen
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.saelens import load_sae
from steerlora.stages import base, features, sae_training
from steerlora.stages.common import WHERE, domain_names, load_base, training_rows
from steerlora.stages.signal_streams import SignalStream, signal_streams

PAGE, LISTING = "dashboard.html", "dashboard.json"
BATCH_SIZE = 32
MOST = 1000
"""Latents on a page."""
GIVEN = {"latents": None, "rows": 200, "contexts": 10}


@dataclass(frozen=True, kw_only=True)
class DashboardSettings:
    """Attributes: site: of the stream; latents: by number, None for each domain's strongest; shown:
    how many of them a domain has; rows: of a domain; contexts: of a latent; max_length: tokens of a
    row; accelerator and spread: where the base runs."""

    site: int
    latents: tuple[int, ...] | None
    shown: int
    rows: int
    contexts: int
    max_length: int
    accelerator: str
    spread: bool


def requested(config: Config) -> tuple[Step, ...]:
    """One step a control site."""
    given = GIVEN | config.stage.settings
    if unknown := sorted(set(given) - set(GIVEN)):
        raise UserError(
            f"stage.settings.{unknown[0]}: stage=sae_dashboard has {', '.join(GIVEN)} alone"
        )
    for name in ("rows", "contexts"):
        if type(given[name]) is not int or given[name] < 1:
            raise UserError(f"stage.settings.{name}={given[name]}: a number from 1")
    latents = given["latents"]
    if latents is not None:
        numbers = isinstance(latents, list | tuple) and {*map(type, latents)} == {int}
        if not numbers or min(latents) < 0 or len(latents) > MOST:
            raise UserError(
                f"stage.settings.latents={latents}: numbers of up to {MOST} latents, such as "
                "[3,17], or null"
            )
        latents = tuple(dict.fromkeys(latents))
    sources = features.steps(config) if latents is None else sae_training.steps(config)
    return tuple(
        Step(
            "sae_dashboard",
            DashboardSettings(
                site=site,
                latents=latents,
                shown=config.features.shown,
                rows=given["rows"],
                contexts=given["contexts"],
                max_length=config.trainer.max_length,
                accelerator=config.trainer.accelerator,
                spread=config.evaluation.spread,
            ),
            base.inputs(config) | {"sae": sae} | ({"features": source} if latents is None else {}),
            f"sae_dashboard {config.model.name} site {site}",
            cost=10,
        )
        for site, sae, source in zip(
            config.method.streams, sae_training.steps(config), sources, strict=True
        )
    )


@stage("sae_dashboard", 1, step=requested, skip=WHERE)
def build(context: Context) -> dict:
    settings: DashboardSettings = context.config
    model, tokenizer = load_base(
        context.inputs["base"], accelerator=settings.accelerator, spread=settings.spread
    )
    sae = load_sae(context.inputs["sae"] / sae_training.FOLDER, model.device)
    source = context.inputs["domains"]
    names = domain_names(source)
    chosen = _chosen(context, settings, names, sae.latents)
    rows = training_rows(source, names, tokenizer, settings.max_length)
    rule = signal_tokens_of(tokenizer)
    seen = Seen(list(chosen), sae.latents, settings.contexts)
    with context.progress.task(context.label, len(names), unit="domain") as task:
        for name in names:
            own = evenly_spaced(rows[name], settings.rows)
            batches = batches_by_length(own, BATCH_SIZE, tokenizer.pad_token_id)
            for found in signal_streams(model, batches, settings.site, rule):
                seen.update(name, _with_features(found, sae))
            task.advance(note=name)
    effects = logit_effects(model, sae.W_dec.detach()[list(chosen)])
    shown = [
        seen.latent(number, domain, tokenizer, effects[place])
        for place, (number, domain) in enumerate(chosen.items())
    ]
    tokens = sum(seen.tokens.values())
    write_json(context.directory / LISTING, [asdict(one) for one in shown])
    page = dashboard_page(shown, title=context.label, tokens=tokens)
    (context.directory / PAGE).write_text(page, encoding="utf-8")
    return {"latents": len(shown), "tokens": tokens}


def _chosen(
    context: Context, settings: DashboardSettings, names: Sequence[str], latents: int
) -> dict[int, str]:
    """{latent: the domain whose own it is, or nothing}."""
    if settings.latents is None:
        taxonomy = features.load_taxonomy(context.inputs["features"])
        return {
            latent: name
            for number, name in enumerate(names)
            for latent in features.strongest(taxonomy, number, settings.shown)
        }
    if max(settings.latents) >= latents:
        raise UserError(
            f"stage.settings.latents: there is no latent {max(settings.latents)}: the SAE has "
            f"{latents}, from 0"
        )
    return dict.fromkeys(settings.latents, "")


@torch.no_grad()
def _with_features(found: SignalStream, sae: SparseAutoencoder) -> Batch:
    stream, row, position, batch = found
    lengths = batch.attention_mask.sum(1)
    return Batch(sae.encode(stream), row, position, batch.input_ids, lengths)
