"""Gemma Scope (arXiv 2408.05147): JumpReLU SAEs of Gemma 2, one ``params.npz`` a folder.

``layer_<n>/width_<N>/average_l0_<L0>/params.npz`` holds W_enc [D, N], W_dec [N, D], b_enc [N],
b_dec [D] and threshold [N]: features are s 1[s > threshold], s = x W_enc + b_enc, with nothing
subtracted and no scaling. The repository's name says which stream of the layer they read:
``-res`` that which leaves it.
"""

from __future__ import annotations

import re
from pathlib import PurePath

from steerlora.errors import UserError
from steerlora.saes.jumprelu import JumpReLU
from steerlora.saes.places import Format, Opened, Stored
from steerlora.saes.weights import assembled, read_tensors

CANONICAL = {
    # sae-lens 6.54, pretrained_saes.yaml, releases gemma-scope-{2b,9b}-pt-res-canonical, width_16k.
    "google/gemma-scope-2b-pt-res": (
        *(105, 102, 141, 59, 124, 68, 70, 69, 71, 73, 77, 80, 82),
        *(84, 84, 78, 78, 77, 74, 73, 71, 70, 72, 75, 73, 116),
    ),
    "google/gemma-scope-9b-pt-res": (
        *(129, 69, 67, 90, 91, 77, 93, 92, 99, 100, 113, 118, 130, 132),
        *(67, 131, 75, 73, 71, 132, 68, 129, 123, 120, 114, 114, 116, 118),
        *(119, 119, 120, 114, 111, 114, 114, 120, 120, 124, 128, 131, 125, 113),
    ),
}
"""{repository: the L0 in the folder's name of every layer's SAE that is taken for the repository
alone, of 16k latents}: those that are called canonical."""
_STREAMS = {"mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoders": "hook_mlp_in"}
_NAMES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}


def _hook(where: str) -> str | None:
    folders = PurePath(where).parts[-4:-1]
    if "embedding" in folders:
        return "hook_embed"
    layer = re.search(r"layer_(\d+)", "/".join(folders))
    kind = re.search(r"gemma-scope-\w+-\w+-(res|mlp|att|transcoders)\b", where)
    stream = _STREAMS.get(kind[1] if kind else "res", "hook_resid_post")
    return f"blocks.{layer[1]}.{stream}" if layer else None


def _read(stored: Stored) -> Opened:
    hook = _hook(stored.where)
    if hook is None:
        raise UserError(
            f"{stored.where} does not say what it reads: one of its folders should be called "
            "layer_<n>, as in Gemma Scope's repositories"
        )
    held = read_tensors(stored.weights)
    if "scaling_factor" in held and bool((held["scaling_factor"] != 1).any()):
        raise UserError(f"{stored.weights}: scaling_factor is not 1: it scales features")
    sae = assembled(stored.weights, held, _NAMES, JumpReLU, apply_b_dec_to_input=False)
    return Opened(sae, {"hook_name": hook})


def _published(hub_id: str) -> tuple[str, ...]:
    active = CANONICAL.get(hub_id, ())
    return tuple(
        f"layer_{layer}/width_16k/average_l0_{l0}/params.npz" for layer, l0 in enumerate(active)
    )


FORMAT = Format(
    title="params.npz (Gemma Scope)",
    weights=r"params\.npz",
    config="config.json",
    hook=_hook,
    read=_read,
    published=_published,
)
