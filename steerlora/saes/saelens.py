"""SAE checkpoints in SAELens' layout: ``cfg.json`` beside ``sae_weights.safetensors``.

Version 6's is written; version 6's and earlier ones are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from numbers import Real
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from steerlora.engine.manifests import write_json
from steerlora.errors import UserError, nearest
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.config import NORMALIZATIONS, SAES
from steerlora.saes.places import Format, MeanNorm, Opened, Stored
from steerlora.saes.saelens_config import (
    CONFIG_FILE,
    SAELENS_NAMES,
    VERSION,
    read_config,
    refuse_unknown_keys,
)
from steerlora.saes.weights import decoder_norm_folded, input_scale_folded, refuse_unusable

WEIGHTS_FILE = "sae_weights.safetensors"
EXPECTED_NORM = "expected_average_only_in"
"""SAELens's word for weights that expect activations of mean norm sqrt(D)."""


def save_sae(sae: SparseAutoencoder, directory: Path, metadata: dict[str, Any]) -> None:
    """Write an SAE that SAELens v6 and ``load_sae`` read.

    Args:
        sae: what to save.
        directory: created if needed; its files of the same names are replaced.
        metadata: JSON values for ``cfg.json``'s ``metadata``: SAELens's ``model_name``,
            ``hook_name`` (``blocks.<site>.hook_resid_pre``), ``context_size``; and ours.
    """
    sae = sae.for_inference()
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": SAELENS_NAMES.get(sae.architecture, sae.architecture),
        "d_in": sae.width,
        "d_sae": sae.latents,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": sae.normalize,
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": VERSION, **metadata},
        **sae.saelens_keys(),
    }
    save_file(_tensors(sae), directory / WEIGHTS_FILE)
    write_json(directory / CONFIG_FILE, config)


def load_sae(
    path: str | Path, device: str | torch.device = "cpu", mean_norm: MeanNorm | None = None
) -> SparseAutoencoder:
    """Read an SAE in SAELens' layout, frozen and in evaluation mode.

    Args:
        path: a directory that holds a checkpoint, or its weights file.
        device: where the tensors go.
        mean_norm: of the activations that it is to read. It is asked of a checkpoint that was
            trained on activations of mean norm sqrt(D) (``expected_average_only_in``), had not that
            scale folded into its weights, and does not say it (``norm_scaling_factor``).

    Returns:
        The SAE in its stored type, without gradients. A SAELens checkpoint that rescales its
        activations by the decoder's norms comes with them folded in: same features, unit rows; and
        one that expects scaled activations with the scale folded in.

    Raises:
        UserError: no checkpoint there, or one that cannot be read here.
    """
    sae = _read_saelens(_weights_file(Path(path)), mean_norm)
    return sae.to(device).requires_grad_(False).eval()


def sae_metadata(path: str | Path) -> dict[str, Any]:
    """The ``metadata`` saved with an SAE (SAELens layout); see ``load_sae`` for the arguments."""
    return read_config(_weights_file(Path(path)).parent)["metadata"]


def sae_fingerprint(sae: SparseAutoencoder) -> str:
    """SHA-256 over whatever decides an SAE's features: settings, tensor types, shapes and bytes.

    Independent of device and memory layout; that of an SAE in training is its saved one's.
    """
    sae = sae.for_inference()
    digest = hashlib.sha256()
    settings = [sae.architecture, *sae.settings().values()]
    digest.update(json.dumps(settings).encode())
    for name, tensor in sorted(_tensors(sae).items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


def _tensors(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """The parameters, row-major on the CPU."""
    return {name: value.cpu().contiguous() for name, value in sae.state_dict().items()}


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        if (path / WEIGHTS_FILE).is_file():
            return path / WEIGHTS_FILE
        raise UserError(f"no SAE in {path}: expected {WEIGHTS_FILE} beside its config")
    if not path.is_file():
        raise UserError(f"no SAE at {path}: there is no such file or directory")
    if path.name != WEIGHTS_FILE:
        raise UserError(
            f"{path} is not an SAE's weights file: {nearest(path.name, [WEIGHTS_FILE])}"
        )
    return path


def _read_saelens(weights: Path, mean_norm: MeanNorm | None) -> SparseAutoencoder:
    """SAEs in SAELens' layout whose architecture is registered here."""
    path = weights.parent / CONFIG_FILE
    config = read_config(weights.parent)
    absent = [key for key in ("architecture", "d_in", "d_sae") if key not in config]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}")
    architecture = str(config["architecture"])
    module = _module_called(architecture, path)
    absent = [key for key in module.own_settings if key not in config]
    if absent:
        raise UserError(f"{path}: an SAE of architecture {architecture} needs {', '.join(absent)}")
    normalize, scaled = config.get("normalize_activations", "none"), False
    if normalize == EXPECTED_NORM:
        normalize, scaled = "none", True
    if normalize not in NORMALIZATIONS:
        hint = nearest(str(normalize), NORMALIZATIONS)
        raise UserError(f"{path}: cannot read normalize_activations '{normalize}'; {hint}")
    if config.get("reshape_activations", "none") != "none":
        raise UserError(
            f"{path}: reshape_activations '{config['reshape_activations']}' reads attention heads, "
            "not the residual stream; use an SAE with 'none'"
        )
    # Before it is built: a size that is no size would fill the memory.
    _check_sizes(weights, config)
    try:
        sae = module(
            config["d_in"],
            config["d_sae"],
            normalize=normalize,
            apply_b_dec_to_input=config.get("apply_b_dec_to_input", True),
            **{name: config[name] for name in module.own_settings},
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    refuse_unknown_keys(config, sae.saelens_keys(), path)
    tensors = _read_tensors(weights, {name: p.shape for name, p in sae.state_dict().items()})
    if scaled:
        tensors = input_scale_folded(tensors, _input_scale(path, config, mean_norm))
    if config.get("rescale_acts_by_decoder_norm", False):
        if other := sorted(set(tensors) - {"W_enc", "b_enc", "W_dec", "b_dec"}):
            raise UserError(
                f"{path}: rescale_acts_by_decoder_norm goes with no {architecture} SAE: what it "
                f"makes of {', '.join(other)} is not known"
            )
        tensors = decoder_norm_folded(tensors)
    sae.to(tensors["W_dec"].dtype).load_state_dict(tensors)
    return sae


def _check_sizes(weights: Path, config: dict[str, Any]) -> None:
    """UserError where the configuration's sizes are not those of the weights."""
    try:
        with safe_open(weights, framework="pt") as file:
            there = set(file.keys())
            width, latents = config["d_in"], config["d_sae"]
            sizes = {"b_dec": [width], "b_enc": [latents], "W_dec": [latents, width]}
            for name, size in sizes.items():
                shape = file.get_slice(name).get_shape() if name in there else size
                if shape != size:
                    raise UserError(f"{weights}: {name} is {shape}, but {CONFIG_FILE} says {size}")
    except (SafetensorError, OSError) as error:
        raise _unreadable(weights, error) from error


def _unreadable(weights: Path, error: Exception) -> UserError:
    return UserError(f"{weights} cannot be read ({error}); fetch or train it again")


def _module_called(architecture: str, path: Path) -> type[SparseAutoencoder]:
    """The SAE's class by SAELens's name of its architecture.

    Raises:
        UserError: there is none here.
    """
    ours = {theirs: ours for ours, theirs in SAELENS_NAMES.items()}
    name = ours.get(architecture, architecture)
    if architecture in SAELENS_NAMES or name not in SAES:
        hint = nearest(architecture, [SAELENS_NAMES.get(known, known) for known in SAES])
        raise UserError(f"{path}: cannot read architecture '{architecture}'; {hint}")
    return SAES[name].module()


def _read_tensors(weights: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise _unreadable(weights, error) from error
    if set(tensors) != set(shapes):
        raise UserError(
            f"{weights} holds {sorted(tensors)}, but {CONFIG_FILE} asks {sorted(shapes)}"
        )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            found = list(tensors[name].shape)
            raise UserError(f"{weights}: {name} is {found}, but {CONFIG_FILE} says {list(shape)}")
    refuse_unusable(weights, tensors)
    return tensors


def _input_scale(path: Path, config: dict[str, Any], mean_norm: MeanNorm | None) -> float:
    """sqrt(D) over the mean norm of the activations: as the file says, or by those there are."""
    said = config["metadata"].get("norm_scaling_factor")
    if said is None and mean_norm is None:
        raise UserError(
            f"{path}: normalize_activations is {EXPECTED_NORM}, so norm_scaling_factor is needed: "
            "sqrt(d_in) over the mean norm of the activations that it was trained on"
        )
    scale = math.sqrt(config["d_in"]) / mean_norm() if said is None else said
    if not isinstance(scale, Real) or not 0 < scale < math.inf:
        raise UserError(f"{path}: norm_scaling_factor is {scale}: a number above 0")
    return float(scale)


def _hook(where: str) -> str | None:
    folder = PurePath(where).parent.name
    return folder if folder.startswith("blocks.") else None


def _opened(stored: Stored) -> Opened:
    return Opened(
        load_sae(stored.weights, mean_norm=stored.mean_norm), sae_metadata(stored.weights)
    )


FORMAT = Format(
    title=f"{WEIGHTS_FILE} (SAELens)",
    weights=re.escape(WEIGHTS_FILE),
    config=CONFIG_FILE,
    hook=_hook,
    read=_opened,
)
