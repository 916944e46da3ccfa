"""From another library's files to an SAE of ours: reading, checking shapes, building.

Shapes: D model width, N latents.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from steerlora.errors import UserError
from steerlora.saes.base import SparseAutoencoder


def read_tensors(file: Path) -> dict[str, Any]:
    """What a file of weights holds by name: ``.safetensors``, ``.npz``, or ``.pt`` without objects.

    Raises:
        UserError: it cannot be read, or holds no names.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays}
        held = torch.load(file, map_location="cpu", weights_only=True)
    except (
        OSError,
        RuntimeError,
        EOFError,
        TypeError,
        ValueError,
        SafetensorError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)}): fetch it again") from error
    if not isinstance(held, dict):
        raise UserError(f"{file} is no SAE: it holds {type(held).__name__}, not tensors by name")
    return held


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise UserError(f"SAE in {file.parent} has no {file.name}")
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise UserError(f"{file} should hold a JSON object, not a {type(said).__name__}")
    return said


def whole_number(file: Path, said: Mapping[str, Any], key: str, least: int = 1) -> int:
    """The number under a key of a configuration.

    Raises:
        UserError: there is none, or it is not whole, or less than ``least``.
    """
    value = said.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{file}: {key} is {json.dumps(value)}: a whole number from {least}")
    return value


def assembled(
    file: Path,
    held: Mapping[str, Any],
    names: Mapping[str, str],
    architecture: type[SparseAutoencoder],
    **settings: Any,
) -> SparseAutoencoder:
    """An SAE of another library's tensors, in their type, frozen and in evaluation mode.

    Args:
        file: for messages.
        held: the tensors under the library's names.
        names: {our parameter: the library's tensor}; one that ends in ``.T`` is transposed. A
            number stands for as many equal ones as the parameter has.
        architecture, settings: the class of the SAE and its keyword arguments.

    Raises:
        UserError: a tensor is absent, or not as large as the others ask, or holds what is no
            number; or the settings do not fit.
    """
    stored = {ours: name.removesuffix(".T") for ours, name in names.items()}
    if absent := [name for name in stored.values() if name not in held]:
        raise UserError(
            f"{file} lacks {', '.join(absent)}: it holds {', '.join(map(str, held))}, not "
            f"{', '.join(stored.values())}"
        )
    found = {ours: held[name] for ours, name in stored.items()}
    if not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{file} is no SAE: it holds more than tensors")
    width = found["b_dec"].numel()
    latents = found["b_enc" if "b_enc" in found else "b_gate"].numel()
    shapes = {"W_enc": (width, latents), "W_dec": (latents, width)}
    shapes |= {"W_skip": (width, width), "b_dec": (width,)}
    for ours, tensor in found.items():
        shape = shapes.get(ours, (latents,))
        flipped = names[ours].endswith(".T")
        asked = shape[::-1] if flipped else shape
        if tensor.ndim == 0 and len(shape) == 1:
            tensor = tensor.expand(shape)
        if tuple(tensor.shape) != asked:
            raise UserError(
                f"{file}: {stored[ours]} is {list(tensor.shape)}, which does not go with {latents} "
                f"latents of width {width}: it must be {list(asked)}"
            )
        found[ours] = tensor.t() if flipped else tensor
    refuse_unusable(file, {stored[ours]: tensor for ours, tensor in found.items()})
    try:
        sae = architecture(width, latents, **settings)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    sae.to(found["W_dec"].dtype).load_state_dict(found)
    return sae.requires_grad_(False).eval()


def decoder_norm_folded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """z |W_dec| selected and stored, z / |W_dec| decoded: the same features with unit rows.

    Args:
        tensors: of our names and shapes; all others than ``W_enc``, ``b_enc`` and ``W_dec`` stay.
    """
    norm = tensors["W_dec"].norm(dim=1)
    return dict(tensors) | {
        "W_enc": tensors["W_enc"] * norm,
        "b_enc": tensors["b_enc"] * norm,
        "W_dec": tensors["W_dec"] / norm[:, None],
    }


def input_scale_folded(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights that do to x what these do to ``scale`` x, and undo the scale: same features.

    Args:
        tensors: of our names and shapes; biases and thresholds of latents stay.
        scale: sqrt(D) over the mean norm of the activations.
    """
    return dict(tensors) | {
        "W_enc": tensors["W_enc"] * scale,
        "W_dec": tensors["W_dec"] / scale,
        "b_dec": tensors["b_dec"] / scale,
    }


def refuse_unusable(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """UserError, naming the tensor, unless all hold finite floating-point numbers."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{file}: {name} is {tensor.dtype}, not floating-point: fetch it again")
        if wrong := int((~tensor.isfinite()).sum()):
            raise UserError(
                f"{file}: {wrong} of the {tensor.numel()} values of {name} are NaN or infinite: "
                "fetch or train it again"
            )


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
