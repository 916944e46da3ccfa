"""Stage ``model_defaults``: what suits a base model and the domains' text, as measured.

Where the configuration says null of ``model.control_sites`` or ``model.context_length``, this is
measured before anything else is planned, on the model's streams and the rows' lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from transformers import PreTrainedModel

from steerlora.config import Config
from steerlora.data.batches import evenly_spaced
from steerlora.data.chat import EncodedChat, encode_chats
from steerlora.data.jsonl import read_rows
from steerlora.engine.manifests import write_json
from steerlora.engine.steps import Context, Step, stage
from steerlora.lm.decoder import layers_of, residual_streams
from steerlora.lm.suited import QUANTILE, SHADOW, context_length, control_site, quantile
from steerlora.stages import base
from steerlora.stages.common import WHERE, load_base

FACTS = "facts.json"
"""File of the artifact with all that was measured."""
ROWS = 200
"""Training rows a domain whose lengths are read."""
SINK_ROWS = 2
"""Rows a domain whose streams are read."""
SINK_TOKENS = 256
"""Tokens of each of them at most."""
WHOLE = 10**9
"""Tokens that every row fits into."""


@dataclass(frozen=True, kw_only=True)
class DefaultsSettings:
    """Attributes: names: of the domains; accelerator: what the model runs on."""

    names: tuple[str, ...]
    accelerator: str = "cpu"


def step(config: Config) -> Step:
    settings = DefaultsSettings(
        names=tuple(config.domains.names), accelerator=config.trainer.accelerator
    )
    label = f"model_defaults {config.model.name}"
    return Step("model_defaults", settings, base.inputs(config), label, cost=10)


@stage("model_defaults", 1, step=step, skip=WHERE)
def build(context: Context) -> dict:
    settings: DefaultsSettings = context.config
    model, tokenizer = load_base(context.inputs["base"], accelerator=settings.accelerator)
    rows: dict[str, list[EncodedChat]] = {}
    for name in settings.names:
        found = read_rows(context.inputs["domains"] / f"train/{name}.jsonl")
        rows[name] = encode_chats(tokenizer, evenly_spaced(found, ROWS), WHOLE)
    lengths = {name: [len(row.input_ids) for row in own] for name, own in rows.items()}
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = context_length(list(lengths.values()), limit)
    ratios = sink_ratios(model, [row for own in rows.values() for row in islice(own, SINK_ROWS)])
    site = control_site(len(ratios), ratios)
    facts = {
        "control_sites": [site],
        "context_length": length,
        "sink_ratios": ratios,
        "row_tokens": {
            name: {
                "median": quantile(own, 0.5),
                f"quantile_{QUANTILE}": quantile(own, QUANTILE),
                "longest": max(own),
                "share_that_fits": sum(tokens <= length for tokens in own) / len(own),
            }
            for name, own in lengths.items()
        },
    }
    write_json(context.directory / FACTS, facts)
    shadowed = [layer for layer, ratio in enumerate(ratios) if layer and ratio >= SHADOW]
    return {
        "control_sites": facts["control_sites"],
        "context_length": length,
        "layers_in_a_sinks_shadow": shadowed,
        **{
            f"rows_of_{name}_that_fit": found["share_that_fits"]
            for name, found in facts["row_tokens"].items()
        },
    }


def sink_ratios(model: PreTrainedModel, rows: list[EncodedChat]) -> list[float]:
    """How far the first token's stream is longer than others', for the stream entering each layer.

    Args:
        model: any decoder.
        rows: conversations of two tokens at least, of which the beginnings are read.

    Returns:
        One ratio a layer, the mean over rows of the first token's norm over the median norm of the
        row's other tokens.
    """
    layers, ratios = range(len(layers_of(model))), []
    for row in rows:
        ids = torch.tensor([row.input_ids[:SINK_TOKENS]], device=model.device)
        streams = residual_streams(model, ids, torch.ones_like(ids), layers)
        norms = torch.stack([streams[layer][0].float().norm(dim=-1) for layer in layers])  # [L, S]
        ratios.append(norms[:, 0] / norms[:, 1:].median(dim=1).values)
    return torch.stack(ratios).mean(0).tolist()
