"""SAE checkpoints in SAELens v6's layout: ``cfg.json`` beside ``sae_weights.safetensors``.

One folder may hold the SAEs of several sites, each in a folder called by its hook's name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from steerlora.errors import UserError, nearest
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.config import NORMALIZATIONS, SAES
from steerlora.saes.qwen_scope import is_qwen_scope, load_qwen_scope

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"

SAELENS_NAMES = {"relu": "standard"}
"""{architecture: SAELens's name of it}, where it is another."""


def save_sae(sae: SparseAutoencoder, directory: Path, metadata: dict[str, Any]) -> None:
    """Write an SAE that SAELens v6 and ``load_sae`` read.

    Args:
        sae: what to save.
        directory: created if needed; its files of the same names are replaced.
        metadata: JSON values for ``cfg.json``'s ``metadata``: SAELens's ``model_name``,
            ``hook_name`` (``blocks.<site>.hook_resid_pre``), ``context_size``; and ours.
    """
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
        "metadata": metadata,
        **sae.saelens_keys(),
    }
    save_file(_tensors(sae), directory / WEIGHTS_FILE)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_sae(path: str | Path, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Read an SAE, frozen and in evaluation mode.

    Args:
        path: a directory that holds a checkpoint, or its weights file.
        device: where the tensors go.

    Returns:
        The SAE in its stored type, without gradients. A SAELens checkpoint that rescales its
        activations by the decoder's norms comes with them folded in: same features, unit rows.

    Raises:
        UserError: no checkpoint there, or one that cannot be read here.
    """
    weights = _weights_file(Path(path))
    sae = _READERS[weights.name](weights)
    return sae.to(device).requires_grad_(False).eval()


def open_sae(path: str, site: int) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """The SAE of one site among those at ``path``, and the metadata saved with it.

    Args:
        path: what :func:`load_sae` reads; a folder of such folders, one a site, called
            ``blocks.<site>.hook_resid_pre`` or ``blocks.<site - 1>.hook_resid_post``; or
            Qwen-Scope's files (:mod:`steerlora.saes.qwen_scope`), which come without metadata.
        site: the stream entering this layer.

    Raises:
        UserError: no SAE of that site there, or one that cannot be read.
    """
    if is_qwen_scope(path):
        return load_qwen_scope(path, site), {}
    folder = Path(path).expanduser()
    for hook in (f"blocks.{site}.hook_resid_pre", f"blocks.{site - 1}.hook_resid_post"):
        if (folder / hook).is_dir():
            folder = folder / hook
            break
    else:
        hooks = sorted(found.name for found in folder.glob("blocks.*") if found.is_dir())
        if hooks:
            raise UserError(f"no SAE of site {site} in {path}: it has {', '.join(hooks)}")
    return load_sae(folder), sae_metadata(folder)


def sae_metadata(path: str | Path) -> dict[str, Any]:
    """The ``metadata`` saved with an SAE (SAELens layout); see ``load_sae`` for the arguments."""
    return _read_config(_weights_file(Path(path)).parent).get("metadata", {})


def sae_fingerprint(sae: SparseAutoencoder) -> str:
    """SHA-256 over whatever decides an SAE's features: settings, tensor types, shapes and bytes.

    Independent of device and memory layout.
    """
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
        for name in _READERS:
            if (path / name).is_file():
                return path / name
        raise UserError(f"no SAE in {path}: expected {' or '.join(_READERS)} beside its config")
    if not path.is_file():
        raise UserError(f"no SAE at {path}: there is no such file or directory")
    if path.name not in _READERS:
        raise UserError(f"{path} is not an SAE's weights file: {nearest(path.name, _READERS)}")
    return path


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"SAE in {directory} has no {CONFIG_FILE}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(config).__name__}")
    return config


def _read_saelens(weights: Path) -> SparseAutoencoder:
    """SAEs of SAELens v6 whose architecture is registered here."""
    path = weights.parent / CONFIG_FILE
    config = _read_config(weights.parent)
    absent = [key for key in ("architecture", "d_in", "d_sae") if key not in config]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}")
    architecture = str(config["architecture"])
    module = _module_called(architecture, path)
    absent = [key for key in module.own_settings if key not in config]
    if absent:
        raise UserError(f"{path}: an SAE of architecture {architecture} needs {', '.join(absent)}")
    normalize = config.get("normalize_activations", "none")
    if normalize not in NORMALIZATIONS:
        hint = nearest(normalize, NORMALIZATIONS)
        raise UserError(f"{path}: cannot read normalize_activations '{normalize}'; {hint}")
    if config.get("reshape_activations", "none") != "none":
        raise UserError(
            f"{path}: reshape_activations '{config['reshape_activations']}' reads attention heads, "
            "not the residual stream; use an SAE with 'none'"
        )
    try:
        sae = module(
            config["d_in"],
            config["d_sae"],
            normalize=normalize,
            apply_b_dec_to_input=config.get("apply_b_dec_to_input", True),
            **{name: config[name] for name in module.own_settings},
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    tensors = _read_tensors(weights, {name: p.shape for name, p in sae.state_dict().items()})
    if config.get("rescale_acts_by_decoder_norm", False):
        tensors = _fold_decoder_norm(tensors)
    sae.to(tensors["W_dec"].dtype).load_state_dict(tensors)
    return sae


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
        raise UserError(f"{weights} cannot be read ({error}); fetch or train it again") from error
    if set(tensors) != set(shapes):
        raise UserError(
            f"{weights} holds {sorted(tensors)}, but {CONFIG_FILE} asks {sorted(shapes)}"
        )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            found = list(tensors[name].shape)
            raise UserError(f"{weights}: {name} is {found}, but {CONFIG_FILE} says {list(shape)}")
    return tensors


def _fold_decoder_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """z |W_dec| selected and stored, z / |W_dec| decoded: the same features with unit rows."""
    norm = tensors["W_dec"].norm(dim=1)
    return tensors | {
        "W_enc": tensors["W_enc"] * norm,
        "b_enc": tensors["b_enc"] * norm,
        "W_dec": tensors["W_dec"] / norm[:, None],
    }


# Weights file -> its reader; another library's layout is one more line.
_READERS: dict[str, Callable[[Path], SparseAutoencoder]] = {WEIGHTS_FILE: _read_saelens}
