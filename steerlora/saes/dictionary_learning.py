"""SAEs of dictionary_learning: ``ae.pt`` beside ``config.json``, as its ``trainSAE`` writes them.

The configuration's ``trainer`` says ``dict_class`` and ``layer``, its ``buffer`` whether the
layer's input or output was read (``io``). Each class names and transposes its tensors in its own
way (dictionary_learning 0.1, ``dictionary.py``, ``trainers/``):

- AutoEncoder: ReLU, and features are those of a decoder with unit columns, which it makes so when
  it is loaded; AutoEncoderNew: ReLU, with nothing subtracted from the input;
- AutoEncoderTopK; BatchTopKSAE and MatryoshkaBatchTopKSAE: ReLU(s) where it exceeds one threshold;
- GatedAutoEncoder; JumpReluAutoEncoder, with nothing subtracted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from steerlora.errors import UserError, nearest
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.gated import Gated
from steerlora.saes.jumprelu import JumpReLU
from steerlora.saes.places import Format, Opened, Stored
from steerlora.saes.relu import ReLU
from steerlora.saes.topk import TopK
from steerlora.saes.weights import (
    assembled,
    decoder_norm_folded,
    read_object,
    read_tensors,
    whole_number,
)


class _Class(NamedTuple):
    architecture: type[SparseAutoencoder]
    names: dict[str, str]
    """{our parameter: theirs}, as :func:`assembled` takes them."""
    subtracts: bool = True
    """``b_dec`` from the input."""


_LINEAR = {"W_enc": "encoder.weight.T", "W_dec": "decoder.weight.T"}
_BIASED = _LINEAR | {"b_enc": "encoder.bias", "b_dec": "b_dec"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
_GATES = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag", "b_dec": "decoder_bias"}
CLASSES = {
    "AutoEncoder": _Class(ReLU, _BIASED | {"b_dec": "bias"}),
    "AutoEncoderNew": _Class(ReLU, _BIASED | {"b_dec": "decoder.bias"}, subtracts=False),
    "AutoEncoderTopK": _Class(TopK, _BIASED),
    "BatchTopKSAE": _Class(JumpReLU, _BIASED | {"threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": _Class(JumpReLU, _PLAIN),
    "GatedAutoEncoder": _Class(Gated, _LINEAR | _GATES),
    "JumpReluAutoEncoder": _Class(JumpReLU, _PLAIN, subtracts=False),
}
"""{``dict_class``: how its files are read}."""


def _hook(where: str) -> str | None:
    """By the folders that its own scripts make: ``resid_post_layer_8/trainer_0``."""
    found = re.search(r"resid_(pre|post)_layer_(\d+)", where)
    return f"blocks.{found[2]}.hook_resid_{found[1]}" if found else None


def _read(stored: Stored) -> Opened:
    config = read_object(stored.config)
    said, buffer = config.get("trainer"), config.get("buffer") or {}
    if not isinstance(said, dict) or not isinstance(buffer, dict):
        raise UserError(f"{stored.config}: trainer and buffer should be JSON objects")
    name = str(said.get("dict_class"))
    if name not in CLASSES:
        hint = nearest(name, CLASSES)
        raise UserError(f"{stored.config}: cannot read dict_class '{name}'; {hint}")
    kind, held = CLASSES[name], read_tensors(stored.weights)
    if "ae" in held and "optimizer" in held:
        raise UserError(
            f"{stored.weights} is the backup of a training that has not ended, in the units of its "
            "normalised activations: finish it, and take what it then writes"
        )
    settings: dict[str, Any] = {"apply_b_dec_to_input": kind.subtracts}
    if kind.architecture is TopK:
        settings["k"] = whole_number(stored.config, said, "k")
        # Newer files hold it too.
        if isinstance(k := held.get("k"), Tensor) and k.item() != settings["k"]:
            raise UserError(
                f"{stored.weights}: k is {k.item()}, but {settings['k']} in {stored.config.name}"
            )
    sae = assembled(stored.weights, held, kind.names, kind.architecture, **settings)
    _agree(stored, said, sae)
    if name == "AutoEncoder":
        sae.load_state_dict(decoder_norm_folded(sae.state_dict()))
    about = {"hook_name": _stream(stored, said, buffer)}
    if said.get("lm_name"):
        about["model_name"] = said["lm_name"]
    return Opened(sae, about)


def _agree(stored: Stored, said: Mapping[str, Any], sae: SparseAutoencoder) -> None:
    """UserError where the configuration's sizes are not those of the weights."""
    for key, found in {"activation_dim": sae.width, "dict_size": sae.latents}.items():
        if said.get(key, found) != found:
            raise UserError(
                f"{stored.weights} has {key} {found}, but {stored.config.name} says {said[key]}"
            )


def _stream(stored: Stored, said: Mapping[str, Any], buffer: Mapping[str, Any]) -> str:
    layer = whole_number(stored.config, said, "layer", least=0)
    module = str(said.get("submodule_name") or f"resid_post_layer_{layer}")
    if "resid_mid" in module or not re.search(r"resid|^layer|layers?\.\d+$", module):
        return f"{module} of layer {layer}"
    before = "resid_pre" in module or buffer.get("io") == "in"
    return f"blocks.{layer}.hook_resid_{'pre' if before else 'post'}"


FORMAT = Format(
    title="ae.pt (dictionary_learning)",
    weights=r"ae\.pt",
    config="config.json",
    hook=_hook,
    read=_read,
)
