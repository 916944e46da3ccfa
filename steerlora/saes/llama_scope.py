"""Llama Scope (arXiv 2410.20526): SAEs of Llama 3.1 8B, ``hyperparams.json`` above the weights.

``Llama3_1-8B-Base-L<n>R-8x/checkpoints/final.safetensors`` holds encoder.weight [N, D],
encoder.bias, decoder.weight [D, N] and decoder.bias. It works on u = c x of mean norm sqrt(D), with
c = sqrt(D) / ``dataset_average_activation_norm.in``: s = u W_enc + b_enc, features s 1[s > t], and
u is reconstructed. So c goes into the weights. The threshold t, ``jump_relu_threshold``, is one
number in the units of x, which sae-lens multiplies by c (6.54, ``pretrained_sae_loaders.py``).
"""

from __future__ import annotations

import math
import re
from numbers import Real

import torch

from steerlora.errors import UserError
from steerlora.saes.jumprelu import JumpReLU
from steerlora.saes.places import Format, Opened, Stored
from steerlora.saes.weights import (
    assembled,
    input_scale_folded,
    read_object,
    read_tensors,
    whole_number,
)

_NAMES = {
    "W_enc": "encoder.weight.T",
    "b_enc": "encoder.bias",
    "W_dec": "decoder.weight.T",
    "b_dec": "decoder.bias",
    "threshold": "threshold",
}
_STREAMS = {"R": "hook_resid_post", "M": "hook_mlp_out", "A": "hook_attn_out"}


def _hook(where: str) -> str | None:
    found = re.search(r"-L(\d+)(R|M|A|TC)-", where)
    return f"blocks.{found[1]}.{_STREAMS.get(found[2], 'hook_mlp_in')}" if found else None


def _read(stored: Stored) -> Opened:
    said, held = read_object(stored.config), read_tensors(stored.weights)
    hook, written = (said.get(f"hook_point_{end}") for end in ("in", "out"))
    if not isinstance(hook, str):
        raise UserError(f"{stored.config}: hook_point_in is {hook}: the name of a stream")
    if written not in (None, hook):
        raise UserError(
            f"{stored.config}: a transcoder from {hook} to {written}, not an SAE of one stream"
        )
    norms = said.get("dataset_average_activation_norm")
    norm = norms.get("in") if isinstance(norms, dict) else None
    mean_norm = _number(stored, "dataset_average_activation_norm.in", norm, least=1e-6)
    scale = math.sqrt(whole_number(stored.config, said, "d_model")) / mean_norm
    threshold = _number(stored, "jump_relu_threshold", said.get("jump_relu_threshold"), least=0)
    held["threshold"] = torch.tensor(threshold * scale)
    sae = assembled(stored.weights, held, _NAMES, JumpReLU, apply_b_dec_to_input=False)
    sizes = {"d_model": sae.width, "d_sae": sae.latents}
    if wrong := [key for key, size in sizes.items() if said.get(key, size) != size]:
        raise UserError(
            f"{stored.weights} has {sae.latents} latents of width {sae.width}, but "
            f"{stored.config.name} says {', '.join(f'{key} {said[key]}' for key in wrong)}"
        )
    sae.load_state_dict(input_scale_folded(sae.state_dict(), scale))
    return Opened(sae, {"hook_name": hook})


def _number(stored: Stored, name: str, value: object, least: float) -> float:
    """A finite number from ``least`` of the configuration, or UserError."""
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least:
        raise UserError(f"{stored.config}: {name} is {value}: a number from {least:g}")
    return float(value)


FORMAT = Format(
    title="checkpoints/final.safetensors (Llama Scope)",
    weights=r"checkpoints/final\.safetensors",
    config="../hyperparams.json",
    hook=_hook,
    read=_read,
)
