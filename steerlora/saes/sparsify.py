"""SAEs of sparsify (EleutherAI, on PyPI as eai-sparsify): a folder a hookpoint.

``sae.safetensors`` holds encoder.weight [N, D], encoder.bias [N], W_dec [N, D], b_dec [D] and of a
transcoder with a skip connection W_skip [D, D]; ``cfg.json`` says ``d_in``, ``k``, ``num_latents``
(0: ``d_in`` times ``expansion_factor``). Features are TopK(ReLU((x - b_dec) W_enc + b_enc)); a
transcoder subtracts nothing, and reads what its hookpoint's module is given where an SAE reads what
the module returns (sparsify 1.3, ``sparse_coder.py`` and ``trainer.py``). The folder's name is the
module's: ``layers.8``, or ``layers.8.mlp``, which is no residual stream.
"""

from __future__ import annotations

import re
from pathlib import PurePath

import torch

from steerlora.errors import UserError
from steerlora.saes.places import Format, Opened, Stored
from steerlora.saes.skip_transcoder import SkipTranscoder
from steerlora.saes.topk import TopK
from steerlora.saes.weights import assembled, read_object, read_tensors, whole_number

NAMES = {
    "W_enc": "encoder.weight.T",
    "b_enc": "encoder.bias",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
}


def _hook(where: str, end: str = "post") -> str | None:
    folder = PurePath(where).parent.name
    module = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(\..+)?$", folder)
    if not module:
        return None
    return folder if module[2] else f"blocks.{module[1]}.hook_resid_{end}"


def _read(stored: Stored) -> Opened:
    said, held = read_object(stored.config), read_tensors(stored.weights)
    if (activation := said.get("activation", "topk")) != "topk" or said.get("signed"):
        kind = "signed" if said.get("signed") else activation
        raise UserError(f"{stored.config}: cannot read activation '{kind}', only topk")
    width, k = (whole_number(stored.config, said, key) for key in ("d_in", "k"))
    latents = said.get("num_latents")
    if not latents:
        latents = width * whole_number(stored.config, said, "expansion_factor")
    names, settings = dict(NAMES), {"k": k}
    if said.get("transcode"):
        kind, end, names["W_skip"] = SkipTranscoder, "pre", "W_skip"
        if not said.get("skip_connection"):
            held["W_skip"] = torch.zeros(width, width)
    elif said.get("skip_connection"):
        raise UserError(f"{stored.config}: a skip_connection goes with no SAE, only a transcoder")
    else:
        kind, end = TopK, "post"
        settings["apply_b_dec_to_input"] = True
    sae = assembled(stored.weights, held, names, kind, **settings)
    if (sae.width, sae.latents) != (width, latents):
        raise UserError(
            f"{stored.weights} has {sae.latents} latents of width {sae.width}, but "
            f"{stored.config.name} says {latents} of {width}"
        )
    hook = _hook(stored.where, end)
    if hook is None:
        raise UserError(
            f"{stored.where} does not say what it reads: its folder should be called as its "
            "hookpoint, such as layers.8"
        )
    return Opened(sae, {"hook_name": hook})


FORMAT = Format(
    title="sae.safetensors (sparsify)",
    weights=r"sae\.safetensors",
    config="cfg.json",
    hook=_hook,
    read=_read,
)
