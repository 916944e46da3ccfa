"""Gemma Scope 2: JumpReLU SAEs of Gemma 3, ``params.safetensors`` beside ``config.json``.

``resid_post/layer_<n>_width_<N>_l0_<size>/params.safetensors`` holds w_enc [D, N], w_dec [N, D],
b_enc, b_dec and threshold, read as Gemma Scope's (:mod:`steerlora.saes.gemma_scope`);
``config.json``, which not all have, says ``architecture`` and ``hf_hook_point_in``. Transcoders
(``hf_hook_point_out``, ``affine_skip_connection``) write another stream than they read.
"""

from __future__ import annotations

import re
from pathlib import PurePath

from steerlora.errors import UserError
from steerlora.saes.jumprelu import JumpReLU
from steerlora.saes.places import Format, Opened, Stored
from steerlora.saes.weights import assembled, read_object, read_tensors

_NAMES = {
    "W_enc": "w_enc",
    "b_enc": "b_enc",
    "W_dec": "w_dec",
    "b_dec": "b_dec",
    "threshold": "threshold",
}


def _hook(where: str) -> str | None:
    folders = "/".join(PurePath(where).parts[-3:-1])
    layer = re.search(r"layer_(\d+)", folders)
    kind = re.search(r"(resid_post|attn_out|mlp_out|transcoder|clt)", folders)
    if not layer or not kind:
        return None
    return f"blocks.{layer[1]}.hook_{kind[1]}"


def _read(stored: Stored) -> Opened:
    said = read_object(stored.config) if stored.config.is_file() else {}
    if (architecture := said.get("architecture", "jump_relu")) != "jump_relu":
        raise UserError(f"{stored.config}: cannot read architecture '{architecture}': jump_relu")
    held = read_tensors(stored.weights)
    if said.get("hf_hook_point_out") or "affine_skip_connection" in held:
        raise UserError(
            f"{stored.weights} is a transcoder of a layer's MLP, not an SAE of a residual stream: "
            "take one of resid_post"
        )
    point = said.get("hf_hook_point_in")
    layer = re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d+)\.output", str(point))
    hook = f"blocks.{layer[1]}.hook_resid_post" if layer else point or _hook(stored.where)
    if hook is None:
        raise UserError(
            f"{stored.where} does not say what it reads: it needs a config.json with "
            "hf_hook_point_in, or the folders' names of Gemma Scope 2"
        )
    sae = assembled(stored.weights, held, _NAMES, JumpReLU, apply_b_dec_to_input=False)
    about = {"hook_name": hook}
    if said.get("model_name"):
        about["model_name"] = said["model_name"]
    return Opened(sae, about)


FORMAT = Format(
    title="params.safetensors (Gemma Scope 2)",
    weights=r"params\.safetensors",
    config="config.json",
    hook=_hook,
    read=_read,
)
