"""A tiny model with LoRA around random SAEs, as after some training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from steerlora.data.batches import ChatBatch, collate
from steerlora.data.chat import EncodedChat
from steerlora.lm.signal_tokens import SignalTokens
from steerlora.methods.base import SiteSAE, Sources
from steerlora.methods.spliced_lora.adapter import SplicedLoRA
from steerlora.methods.spliced_lora.config import SplicedLoRAConfig

SPECIAL = 7
RULE = SignalTokens(special=(SPECIAL,), first=True)


@pytest.fixture
def make_spliced(make_sae) -> Callable[..., SplicedLoRA]:
    """``make_spliced(model, sites=(1,), seed=0, **config)``: attached, B and maps random."""

    def make(model, sites=(1,), seed=0, **changes) -> SplicedLoRA:
        config = SplicedLoRAConfig(
            name="spliced", sites=list(sites), **{"rank": 3, "alpha": 6.0, **changes}
        )
        dtype = next(model.parameters()).dtype
        saes = {site: SiteSAE(make_sae(seed=site).to(dtype)) for site in sites}
        method = config.build(model, Sources(saes=saes, signal_tokens=RULE), seed).to(dtype)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, value in method.named_parameters():
                if not name.endswith(".A"):
                    value.normal_(0, 0.2, generator=generator)
        return method

    return make


@pytest.fixture
def text(tokens) -> ChatBatch:
    """Rows of unlike length, one with a special token in the middle."""
    ids, mask = tokens([9, 6, 4])
    ids[0, 3] = SPECIAL
    rows = [row[: int(real.sum())].tolist() for row, real in zip(ids, mask, strict=True)]
    chats = [EncodedChat(row, 1) for row in rows]
    return collate(chats, [0, 1, 0], 0, signal_tokens=RULE)
