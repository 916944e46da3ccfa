"""Stage ``activations``: the streams at control and monitor sites, over all domains' text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

from torch import Tensor

from steerlora.config import Config
from steerlora.data.activations import HARVEST_ROWS, harvest
from steerlora.data.batches import ChatBatches
from steerlora.data.headers import signal_tokens_of
from steerlora.engine.steps import Context, Step, stage
from steerlora.stages import base
from steerlora.stages.common import WHERE, load_base, sae_rows


@dataclass(frozen=True, kw_only=True)
class ActivationSettings:
    """Attributes: sites: streams that control sites read, and those that their SAEs write; monitor:
    a site beside them, None where there is no other; max_tokens: over all text; max_length: of a
    row; seed: of the order of rows; accelerator and spread: where the model runs."""

    sites: tuple[int, ...]
    monitor: int | None
    domains: tuple[str, ...]
    max_tokens: int
    max_length: int
    seed: int
    accelerator: str
    spread: bool


def step(config: Config) -> Step:
    method, monitor = config.method, config.method.monitor
    trained = [*method.streams, *([] if monitor is None else [monitor])]
    beside = [stream for site in trained for stream in config.sae.streams(site)[1:]]
    sites = tuple(dict.fromkeys([*method.streams, *beside]))
    settings = ActivationSettings(
        sites=sites,
        monitor=None if monitor in sites else monitor,
        domains=tuple(config.domains.names),
        max_tokens=config.sae.max_tokens,
        max_length=config.trainer.max_length,
        seed=config.sae.seed,
        accelerator=config.trainer.accelerator,
        spread=config.evaluation.spread,
    )
    return Step(
        "activations", settings, base.inputs(config), f"activations {config.model.name}", cost=10
    )


@stage("activations", 2, step=step, skip=WHERE)
def build(context: Context) -> dict:
    settings: ActivationSettings = context.config
    model, tokenizer = load_base(
        context.inputs["base"], accelerator=settings.accelerator, spread=settings.spread
    )
    source = context.inputs["domains"]
    rows = sae_rows(source, settings.domains, tokenizer, settings.max_length)
    with context.progress.task(context.label, settings.max_tokens, unit="token") as task:
        store = harvest(
            model,
            _one_epoch(rows, tokenizer.pad_token_id, settings.seed),
            settings.sites if settings.monitor is None else (*settings.sites, settings.monitor),
            context.directory / "activations",
            max_tokens=settings.max_tokens,
            signal_tokens=signal_tokens_of(tokenizer),
            progress=lambda tokens: task.advance(tokens, tokens=tokens),
        )
    return {"tokens": store.tokens(settings.sites[0]), "width": store.width}


def _one_epoch(rows: list, pad_token_id: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    batches = ChatBatches(
        rows, [-1] * len(rows), batch_size=HARVEST_ROWS, pad_token_id=pad_token_id, seed=seed
    )
    for batch in map(batches, islice(count(), len(rows) // batches.batch_size)):
        yield batch.input_ids, batch.attention_mask
