"""The control signal of texts: what prototype routing knows a domain by.

B batch, S sequence, W width of the signal (N latents or D).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steerlora.data.batches import collate
from steerlora.data.chat import EncodedChat
from steerlora.lm.decoder import residual_streams
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.prototypes import pooled

BATCH_SIZE = 64


@torch.no_grad()
def prompt_signals(
    model, adapter: Adapter, rows: Sequence[EncodedChat], pad_token_id: int
) -> dict[int, Tensor]:
    """{site: [rows, W]}: the signal as routing reads it where each row's response begins.

    It is the base model's, averaged over the prompt as ``context`` says; the adapter has no say.
    Tokens that carry no signal are passed over: of "token", it is the last one's that does. A
    prompt without any has the signal zero.

    Args:
        model: with ``adapter`` attached.
        rows: training text.
        pad_token_id: fills batches.
    """
    sites = list(adapter.sites)
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
            streams = residual_streams(model, batch.input_ids, batch.attention_mask, sites)
        for site, stream in streams.items():
            width = adapter.routers[str(site)].prototypes.shape[1]
            signal = adapter.sites[site].signal(stream, counted)
            for part in pooled(signal, width, counted, adapter.config):
                position = ends - part.start
                here = (position >= 0) & (position < part.values.shape[1])
                found[site].append(part.values[here, position[here]])
    return {site: torch.cat(parts) for site, parts in found.items()}
