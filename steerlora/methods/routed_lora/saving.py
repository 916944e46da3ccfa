"""Adapters on disk: ``adapter_model.safetensors`` and ``adapter_config.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from steerlora.errors import UserError
from steerlora.lm.identity import model_fingerprint
from steerlora.methods.routed_lora.adapter import Adapter, AdapterShape
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.saelens import load_sae, sae_fingerprint

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMAT = "steerlora"


def save_adapter(
    adapter: Adapter,
    directory: Path | str,
    *,
    base_fingerprint: str,
    sae_paths: Mapping[int, Path] | None = None,
    written_for: Path | None = None,
    trained_under: str = "none",
) -> None:
    """Write an adapter; what it depends on goes in as fingerprints.

    Args:
        adapter: what to save.
        directory: where; made if absent.
        base_fingerprint: of the base model (:func:`model_fingerprint`).
        sae_paths: {site: folder of its SAE}; stored relative to the adapter's folder.
        written_for: the folder where the adapter will lie, if it is moved after writing.
        trained_under: the intervention of a retrained control; "none": it was trained intact.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    home = Path(written_for or directory).absolute()
    saes = [
        {
            "site": site,
            "fingerprint": sae_fingerprint(sae),
            "latents": sae.W_enc.shape[1],
            "path": os.path.relpath(Path(sae_paths[site]).absolute(), home)
            if sae_paths and site in sae_paths
            else None,
        }
        for site, sae in adapter.saes.items()
    ]
    config = {
        "format": FORMAT,
        "base_fingerprint": base_fingerprint,
        "shape": adapter.shape.as_dict(),
        "trained_under": trained_under,
        "saes": saes,
        "sites": {
            str(site): {
                "mean_rank": held.facts.mean_rank,
                "specialist_of_domain": held.facts.specialist_of_domain,
            }
            for site, held in adapter.sites.items()
            if held.facts is not None
        },
    }
    state = {name: tensor.detach().contiguous() for name, tensor in adapter.state_dict().items()}
    assert all(tensor.numel() for tensor in state.values()), "an adapter weight is empty"
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_adapter(
    model: nn.Module,
    path: Path | str,
    *,
    sae: SparseAutoencoder | Path | str | Mapping[int, SparseAutoencoder] | None = None,
) -> Adapter:
    """Attach a saved adapter to ``model``, in place.

    Args:
        model: a transformers causal language model: the base that the adapter was trained on.
        path: folder that :func:`save_adapter` wrote.
        sae: the SAE (or its folder, or {site: SAE}) where it is not found at the recorded place.

    Returns:
        The attached adapter; ``remove()`` gives the model back as it was.

    Raises:
        UserError: no adapter there, another base model, another SAE, files that cannot be read, or
            weights that do not fit.
    """
    path = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise UserError(
                f"{path} is no adapter: {name} is missing "
                "(steerlora stage=adapter_training makes one and prints its folder)"
            )
    config = _read_config(path / CONFIG)
    found = model_fingerprint(model)
    if found != config["base_fingerprint"]:
        raise UserError(
            f"adapter {path} was trained on another base model "
            f"(its base is {config['base_fingerprint']}, this model is {found})"
        )
    shape = {key: tuple(v) if isinstance(v, list) else v for key, v in config["shape"].items()}
    saes = {entry["site"]: _sae_for(entry, path, sae) for entry in config["saes"]}
    try:
        weights = load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path / WEIGHTS} cannot be read ({error}): copy or train the adapter again"
        ) from error
    try:
        adapter = Adapter(model, AdapterShape(**shape), saes)
        adapter.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"adapter {path} does not fit this model: {reason}") from error
    for site, facts in config["sites"].items():
        held = adapter.sites[int(site)].facts
        held.mean_rank = facts["mean_rank"]
        held.specialist_of_domain = facts["specialist_of_domain"]
    return adapter.attach(model)


def trained_under(path: Path | str) -> str:
    """The intervention that a saved adapter was trained under; "none" where there was none."""
    return _read_config(Path(path) / CONFIG).get("trained_under", "none")


def _read_config(path: Path) -> dict:
    """``adapter_config.json``, with everything that loading reads."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{path} is not a SteerLoRA adapter (no format: {FORMAT})")
    absent = [key for key in ("base_fingerprint", "shape", "saes", "sites") if key not in config]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}: copy or train the adapter again")
    return config


def _sae_for(entry: dict, path: Path, given) -> SparseAutoencoder:
    """The SAE of one recorded site, checked against its fingerprint."""
    site = entry["site"]
    if isinstance(given, Mapping):
        given = given.get(site)
    if given is None:
        if entry["path"] is None or not (path / entry["path"]).exists():
            raise UserError(
                f"adapter {path} needs the SAE of site {site} ({entry['fingerprint']}), which is "
                f"not at {entry['path']}: pass sae=<its folder>"
            )
        given = path / entry["path"]
    sae = given if isinstance(given, SparseAutoencoder) else load_sae(given)
    found = sae_fingerprint(sae)
    if found != entry["fingerprint"]:
        raise UserError(
            f"adapter {path} was trained on another SAE at site {site} "
            f"(its SAE is {entry['fingerprint']}, this one is {found})"
        )
    return sae
