"""Trained methods on disk: ``adapter_model.safetensors`` and ``adapter_config.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from steerlora.errors import UserError
from steerlora.lm.identity import model_fingerprint
from steerlora.lm.signal_tokens import SignalTokens
from steerlora.methods.base import Method, SiteSAE, Sources
from steerlora.methods.config import METHODS
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.saelens import load_sae, sae_fingerprint, sae_metadata, save_sae

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMAT = "steerlora"
FORMAT_VERSION = 3
"""Raised when ``adapter_config.json`` means something else; files of another one are refused."""


def save_adapter(
    method: Method,
    directory: Path | str,
    *,
    base_fingerprint: str,
    sae_paths: Mapping[int, Path] | None = None,
    written_for: Path | None = None,
    trained_under: str = "none",
) -> None:
    """Write a method; what it depends on goes in as fingerprints.

    Args:
        method: what to save.
        directory: where; made if absent.
        base_fingerprint: of the base model (:func:`model_fingerprint`).
        sae_paths: {site: folder of its SAE}; stored relative to the method's folder.
        written_for: the folder where it will lie, if it is moved after writing.
        trained_under: the intervention of a retrained control; "none": it was trained intact.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    home = Path(written_for or directory).absolute()
    saes = [
        {
            "site": site,
            "fingerprint": sae_fingerprint(sae),
            "latents": sae.latents,
            "path": os.path.relpath(Path(sae_paths[site]).absolute(), home)
            if sae_paths and site in sae_paths
            else None,
        }
        for site, sae in method.saes.items()
    ]
    stored = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "base_fingerprint": base_fingerprint,
        "method": asdict(method.config),
        "trained_under": trained_under,
        "saes": saes,
        "facts": method.facts(),
        "signal_tokens": asdict(method.signal_tokens),
    }
    state = {name: tensor.detach().contiguous() for name, tensor in method.state_dict().items()}
    assert all(tensor.numel() for tensor in state.values()), "an adapter weight is empty"
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
    _write_config(directory, stored)


def bundle_sae(directory: Path, sae_paths: Mapping[int, Path]) -> None:
    """Write the SAEs of a saved method into its folder, which then loads wherever it is moved.

    Args:
        directory: the method's folder, outside any artifact: those do not change.
        sae_paths: {site: folder of its SAE}.

    Raises:
        UserError: no method there, or another SAE.
    """
    stored = _read_config(directory / CONFIG)
    for entry in stored["saes"]:
        given, own = sae_paths[entry["site"]], f"sae_{entry['site']}"
        save_sae(_sae_for(entry, directory, given), directory / own, sae_metadata(given))
        entry["path"] = own
    stored["method"]["bundle_sae"] = True
    _write_config(directory, stored)


def load_adapter(
    model: nn.Module,
    path: Path | str,
    *,
    sae: SparseAutoencoder | Path | str | Mapping[int, SparseAutoencoder] | None = None,
) -> Method:
    """Attach a saved method to ``model``, in place.

    Args:
        model: a transformers causal language model: the base that the method was trained on.
        path: folder that :func:`save_adapter` wrote.
        sae: the SAE (or its folder, or {site: SAE}) where it is not found at the recorded place.

    Returns:
        The attached method; ``remove()`` gives the model back as it was.

    Raises:
        UserError: no method there, another base model, another SAE, files that cannot be read, or
            weights that do not fit.
    """
    path = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise UserError(
                f"{path} is no adapter: {name} is missing "
                "(steerlora stage=adapter_training makes one and prints its folder)"
            )
    stored = _read_config(path / CONFIG)
    found = model_fingerprint(model)
    if found != stored["base_fingerprint"]:
        raise UserError(
            f"adapter {path} was trained on another base model "
            f"(its base is {stored['base_fingerprint']}, this model is {found})"
        )
    saes = {entry["site"]: SiteSAE(_sae_for(entry, path, sae)) for entry in stored["saes"]}
    try:
        weights = load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path / WEIGHTS} cannot be read ({error}): copy or train the adapter again"
        ) from error
    method = None
    try:
        config = _grown(METHODS[stored["method"]["kind"]], stored["method"])
        sources = Sources(saes=saes, signal_tokens=_signal_tokens(stored["signal_tokens"]))
        method = config.build(model, sources, seed=0)
        method.load_state_dict(weights)
        method.load_facts(stored["facts"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if method is not None:
            method.remove()
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"adapter {path} does not fit this model: {reason}") from error
    return method


def export_peft(
    method: Method, directory: Path | str, *, base_path: str, specialist: int | None = None
) -> None:
    """Write a method in PEFT's format, so that ``peft.PeftModel.from_pretrained`` reads it.

    Args:
        method: what to write.
        directory: where; made if absent.
        base_path: folder or hub id of the base model.
        specialist: of a method that routes by domain, the one to write: by itself it is plain LoRA.

    Raises:
        UserError: PEFT has no format for it.
    """
    alone = specialist is not None and method.config.tells_domains
    if not method.config.exports_to_peft and not alone:
        name = method.config.name or method.config.kind
        raise UserError(f"PEFT has no format for {name}: it is not plain LoRA")
    method.export_peft(Path(directory), base_path=base_path, specialist=specialist)


def trained_under(path: Path | str) -> str:
    """The intervention that a saved method was trained under; "none" where there was none."""
    return _read_config(Path(path) / CONFIG).get("trained_under", "none")


def _grown(schema: type, stored: Mapping[str, Any]) -> Any:
    """A configuration from the mapping that ``asdict`` gave, its nested ones too."""
    hints = get_type_hints(schema)
    unknown = set(stored) - {field.name for field in fields(schema)}
    if unknown:
        raise ValueError(f"its configuration has {', '.join(sorted(unknown))}, unknown here")
    return schema(
        **{
            name: _grown(hints[name], value) if is_dataclass(hints[name]) else value
            for name, value in stored.items()
        }
    )


def _signal_tokens(stored: Any) -> SignalTokens:
    """The rule that was written; ValueError: it is none."""
    held = stored if isinstance(stored, dict) else {}
    ids = {name: held.get(name) for name in ("prefix", "special")}
    numbers = [isinstance(v, list) and all(type(i) is int for i in v) for v in ids.values()]
    if not all(numbers) or not isinstance(held.get("first"), bool):
        raise ValueError("its signal_tokens are not lists of token ids")
    return SignalTokens(
        prefix=tuple(ids["prefix"]), special=tuple(ids["special"]), first=held["first"]
    )


def _write_config(directory: Path, stored: dict) -> None:
    (directory / CONFIG).write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")


def _read_config(path: Path) -> dict:
    """``adapter_config.json``, with everything that loading reads."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{path} is not a SteerLoRA adapter (no format: {FORMAT})")
    if config.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {config.get('version')}, this code reads {FORMAT_VERSION}: "
            "train the adapter again"
        )
    absent = [
        key
        for key in ("base_fingerprint", "method", "saes", "facts", "signal_tokens")
        if key not in config
    ]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}: copy or train the adapter again")
    entries = config["saes"]
    if not isinstance(entries, list) or not all(map(_names_an_sae, entries)):
        raise UserError(f"{path} does not say which SAEs it reads: copy or train the adapter again")
    return config


def _names_an_sae(entry: Any) -> bool:
    """Whether an entry has the form that `save_adapter` writes."""
    forms = {"site": int, "fingerprint": str, "path": str | None}
    return isinstance(entry, dict) and all(
        key in entry and isinstance(entry[key], form) for key, form in forms.items()
    )


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
