"""Stage ``activations``: the stream at a control or monitor site, over all domains' text.

One artifact a site. It depends on the text and the base alone: another seed, architecture or number
of active latents, or a further site, harvests nothing again. Sites that are missing in a run are
harvested together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

from torch import Tensor

from steerlora.config import Config
from steerlora.data.activations import ActivationStore
from steerlora.data.batches import ChatBatches
from steerlora.data.harvest import HARVEST_ROWS, harvest
from steerlora.data.headers import signal_tokens_of
from steerlora.engine.steps import Context, Step, stage
from steerlora.stages import base
from steerlora.stages.common import WHERE, load_base, sae_rows

FOLDER = "activations"
"""Folder of the artifact that holds the store."""
ORDER = 0
"""Seed of the order of rows, and so of the choice of text where there is more than is asked for."""


@dataclass(frozen=True, kw_only=True)
class ActivationSettings:
    """Attributes: site: whose stream; domains: whose text; max_tokens: over all of it; max_length:
    of a row; accelerator and spread: where the model runs."""

    site: int
    domains: tuple[str, ...]
    max_tokens: int
    max_length: int
    accelerator: str
    spread: bool


def step(config: Config, site: int) -> Step:
    """The step of one site."""
    settings = ActivationSettings(
        site=site,
        domains=tuple(config.domains.names),
        max_tokens=config.sae.tokens_to_harvest,
        max_length=config.trainer.max_length,
        accelerator=config.trainer.accelerator,
        spread=config.evaluation.spread,
    )
    label = f"activations {config.model.name} site {site}"
    return Step("activations", settings, base.inputs(config), label, cost=10)


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


@stage("activations", 3, step=requested, skip=WHERE, together="site")
def build(contexts: Sequence[Context]) -> list[dict]:
    first = contexts[0]
    settings: ActivationSettings = first.config  # but for the site, the others' too
    model, tokenizer = load_base(
        first.inputs["base"], accelerator=settings.accelerator, spread=settings.spread
    )
    rows = sae_rows(first.inputs["domains"], settings.domains, tokenizer, settings.max_length)
    label = ", ".join(context.label for context in contexts)
    with first.progress.task(label, settings.max_tokens, unit="token") as task:
        stores = harvest(
            model,
            _one_epoch(rows, tokenizer.pad_token_id),
            {context.config.site: context.directory / FOLDER for context in contexts},
            max_tokens=settings.max_tokens,
            signal_tokens=signal_tokens_of(tokenizer),
            progress=lambda tokens: task.advance(tokens, tokens=tokens),
        )
    return [_summary(stores[context.config.site]) for context in contexts]


def _summary(store: ActivationStore) -> dict:
    outliers = int((~store.usual()).sum())
    return {"tokens": store.tokens, "outliers": outliers, "width": store.width}


def _one_epoch(rows: list, pad_token_id: int) -> Iterator[tuple[Tensor, Tensor]]:
    batches = ChatBatches(
        rows, [-1] * len(rows), batch_size=HARVEST_ROWS, pad_token_id=pad_token_id, seed=ORDER
    )
    for batch in map(batches, islice(count(), len(rows) // batches.batch_size)):
        yield batch.input_ids, batch.attention_mask
