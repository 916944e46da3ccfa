"""Qwen-Scope's public SAEs for Qwen3: one file a layer, on the hub or in a folder.

``layer<n>.sae.pt`` holds W_enc [N, D] and W_dec [D, N], each the transpose of ours, b_enc [N] and
b_dec [D]; features are TopK(x W_enc^T + b_enc), with no b_dec subtracted, of the stream that leaves
layer n and so enters layer n + 1 (the repositories ``Qwen/SAE-Res-Qwen3-*``).
"""

from __future__ import annotations

import re
from pathlib import PurePath

from steerlora.errors import UserError
from steerlora.saes.places import Format, Opened, Stored
from steerlora.saes.topk import TopK
from steerlora.saes.weights import assembled, read_tensors

_NAMES = {"W_enc": "W_enc.T", "b_enc": "b_enc", "W_dec": "W_dec.T", "b_dec": "b_dec"}
_MOST_LAYERS = 128
"""More than a model has that these SAEs are of: the hub says which it has."""


def _active(where: str) -> int:
    """K, which only the folder's name says."""
    found = re.search(r"L0_(\d+)$", PurePath(where).parent.name)
    if not found:
        raise UserError(
            f"{where}: how many latents are active is in the name of the folder, which must end in "
            "L0_<k>, such as SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
        )
    return int(found[1])


def _hook(where: str) -> str:
    layer = re.search(r"layer(\d+)", PurePath(where).name)[1]
    return f"blocks.{layer}.hook_resid_post"


def _read(stored: Stored) -> Opened:
    k = _active(stored.where)
    held = read_tensors(stored.weights)
    sae = assembled(stored.weights, held, _NAMES, TopK, k=k, apply_b_dec_to_input=False)
    return Opened(sae, {"hook_name": _hook(stored.where)})


def _published(hub_id: str) -> tuple[str, ...]:
    if not re.fullmatch(r"[\w.-]+/SAE-Res-.*-L0_\d+", hub_id):
        return ()
    return tuple(f"layer{layer}.sae.pt" for layer in range(_MOST_LAYERS))


FORMAT = Format(
    title="layer<n>.sae.pt (Qwen-Scope)",
    weights=r"layer\d+\.sae\.pt",
    config="config.json",
    hook=_hook,
    read=_read,
    key=lambda where: f"L0_{_active(where)}",
    published=_published,
)
