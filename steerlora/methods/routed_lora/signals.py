"""The control signal of texts: what prototype routing knows a domain by.

B batch, S sequence, W width of the signal (N latents or D).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steerlora.data.batches import collate
from steerlora.data.chat import EncodedChat
from steerlora.lm.decoder import final_norm, layers_of, residual_streams
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.prototypes import pooled

BATCH_SIZE = 64


@torch.no_grad()
def prompt_signals(
    model, adapter: Adapter, rows: Sequence[EncodedChat], pad_token_id: int
) -> dict[int, Tensor]:
    """{site: [rows, W]}: the signal as routing reads it where each row's response begins, the rows
    with the shortest prompts first.

    It is the base model's, averaged over the prompt as ``context`` says; the adapter has no say.
    Tokens that carry no signal are passed over: of "token", it is the last one's that does. A
    prompt without any has the signal zero.

    Args:
        model: with ``adapter`` attached.
        rows: training text; of like prompts those that come first stay first.
        pad_token_id: fills batches.
    """
    sites = list(adapter.sites)
    streams_of = _last_hidden if adapter.config.source == "base_last" else residual_streams
    prompts = [EncodedChat(row.input_ids[: row.response_start], 0) for row in rows]
    prompts.sort(key=lambda row: len(row.input_ids))
    found: dict[int, list[Tensor]] = {site: [] for site in sites}
    for start in range(0, len(prompts), BATCH_SIZE):
        chosen = prompts[start : start + BATCH_SIZE]
        batch = collate(chosen, [-1] * len(chosen), pad_token_id).to(model.device)
        counted = adapter.with_signal(batch)
        places = torch.arange(counted.shape[1], device=counted.device)
        ends = (places * counted).amax(1)
        with adapter.disabled():
            streams = streams_of(model, batch.input_ids, batch.attention_mask, sites)
        for site, stream in streams.items():
            width = adapter.routers[str(site)].prototypes.shape[1]
            signal = adapter.sites[site].signal(stream, counted)
            own = None
            for part in pooled(signal, width, counted, adapter.config):
                position = ends - part.start
                here = (position >= 0) & (position < part.values.shape[1])
                own = part.values.new_zeros(len(chosen), width) if own is None else own
                own[here] = part.values[here, position[here]]
            found[site].append(own)
    return {site: torch.cat(parts) for site, parts in found.items()}


def _last_hidden(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, sites: Sequence[int]
) -> dict[int, Tensor]:
    """{site: final hidden state [B, S, D]}, after the norm: the same for every site."""
    last = len(layers_of(model))
    stream = residual_streams(model, input_ids, attention_mask, [last])[last]
    return dict.fromkeys(sites, final_norm(model)(stream))
