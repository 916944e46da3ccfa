"""Stage ``activations``: the stream at a control or monitor site, over text of domains and others.

One artifact a site. It depends on the text and the base alone: another seed, architecture or number
of active latents, or a further site, harvests nothing again. Sites that are missing in a run are
harvested together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steerlora.config import Config
from steerlora.data.activations import ActivationStore
from steerlora.data.harvest import harvest
from steerlora.data.headers import signal_tokens_of
from steerlora.engine.steps import Context, Step, stage
from steerlora.stages import base
from steerlora.stages.common import WHERE, load_base, sae_rows
from steerlora.stages.sae_text import Corpus, SAEText

FOLDER = "activations"
"""Folder of the artifact that holds the store."""
ORDER = 0
"""Seed of the order of rows, and so of the choice of text where there is more than is asked for."""


@dataclass(frozen=True, kw_only=True)
class ActivationSettings:
    """Attributes: site: whose stream; domains: whose text; corpus: beside it; max_tokens: over all
    text; max_length: of a row; accelerator and spread: where the model runs."""

    site: int
    domains: tuple[str, ...]
    corpus: Corpus
    max_tokens: int
    max_length: int
    accelerator: str
    spread: bool


def step(config: Config, site: int) -> Step:
    """The step of one site."""
    settings = ActivationSettings(
        site=site,
        domains=tuple(config.domains.names),
        corpus=Corpus.of(config),
        max_tokens=config.sae.tokens_to_harvest,
        max_length=config.trainer.max_length,
        accelerator=config.trainer.accelerator,
        spread=config.evaluation.spread,
    )
    label = f"activations {config.model.name} site {site}"
    inputs = base.inputs(config)
    return Step("activations", settings, inputs, label, cost=10, together=frozenset({"site"}))


def steps_of(config: Config, site: int) -> tuple[Step, ...]:
    """Of the streams that the SAE of a site is trained on."""
    return tuple(step(config, stream) for stream in config.sae.streams(site))


def requested(config: Config) -> tuple[Step, ...]:
    """Of all sites whose SAEs may be trained."""
    method = config.method
    sites = [*method.streams, *([] if method.monitor is None else [method.monitor])]
    found = [one for site in sites for one in steps_of(config, site)]
    return tuple({one.fingerprint: one for one in found}.values())


def stores_of(context: Context) -> list[ActivationStore]:
    """What a stage reads whose input ``activations`` are some of these steps."""
    return [ActivationStore(one / FOLDER) for one in context.inputs["activations"]]


# The place of a corpus does not matter, its content does.
@stage("activations", 3, step=requested, skip=WHERE | {"corpus.path"}, together=True)
def build(contexts: Sequence[Context]) -> list[dict]:
    first = contexts[0]
    settings: ActivationSettings = first.config  # but for the site, the others' too
    model, tokenizer = load_base(
        first.inputs["base"], accelerator=settings.accelerator, spread=settings.spread
    )
    rows = sae_rows(first.inputs["domains"], settings.domains, tokenizer, settings.max_length)
    text = SAEText(rows, settings.corpus.path, tokenizer, settings.max_length, ORDER)
    label = ", ".join(context.label for context in contexts)
    with first.progress.task(label, settings.max_tokens, unit="token") as task:
        stores = harvest(
            model,
            text.once(settings.max_tokens),
            {context.config.site: context.directory / FOLDER for context in contexts},
            max_tokens=settings.max_tokens,
            signal_tokens=signal_tokens_of(tokenizer),
            progress=lambda tokens: task.advance(tokens, tokens=tokens),
        )
    found = stores[settings.site].tokens
    if found < settings.max_tokens:
        first.progress.message(
            f"{label}: the text holds {found:,} tokens that carry a signal, fewer than the "
            f"{settings.max_tokens:,} of sae.max_tokens"
        )
    return [_summary(stores[context.config.site]) for context in contexts]


def _summary(store: ActivationStore) -> dict:
    outliers = int((~store.usual()).sum())
    return {"tokens": store.tokens, "outliers": outliers, "width": store.width}
