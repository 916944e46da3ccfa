"""SAEs of the user's own or of a publisher, as they serve a site of the base model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from steerlora.config import Config
from steerlora.engine.content import identity_of
from steerlora.errors import UserError
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.formats import open_sae, sae_files, site_of


def identity_of_saes(config: Config, path: str | None, site: int) -> str:
    """What is read for a site of ``sae.path``: the files' content, or a hub id; else nothing."""
    if not path:
        return ""
    files = sae_files(path, site)
    return identity_of(files, config.artifacts.root) if files else path


def open_given(
    path: str, site: int, base: dict, streams: Callable[[], Tensor]
) -> SparseAutoencoder:
    """The SAE of a site.

    Args:
        path: ``sae.path``.
        site: the stream entering this layer.
        base: of the base artifact: its width, layers and fingerprint.
        streams: gives activations of the site, [T, D], which an SAE may need to know the scale of.

    Raises:
        UserError: there is none, or it was made for another width, site or base.
    """
    sae, said = open_sae(path, site, lambda: float(streams().float().norm(dim=-1).mean()))
    if sae.width != base["width"]:
        raise UserError(f"sae.path={path} reads width {sae.width}; the model has {base['width']}")
    _check_hook(path, said, site, base["layers"])
    wanted = base["fingerprint"]
    if said.get("base_fingerprint", wanted) != wanted:
        raise UserError(f"sae.path={path} was trained on another base model")
    return sae


def hook_name(site: int, layers: int) -> str:
    """TransformerLens' name of a stream; the one that leaves the last layer enters no other."""
    return (
        f"blocks.{site}.hook_resid_pre" if site < layers else f"blocks.{site - 1}.hook_resid_post"
    )


def _check_hook(path: str, said: dict, site: int, layers: int) -> None:
    """Refuse an SAE that reads anything but the stream of this site."""
    wanted, name = hook_name(site, layers), said.get("hook_name")
    if not name:
        raise UserError(
            f"sae.path={path} does not say what it reads: set metadata.hook_name in its cfg.json "
            f"to {wanted}, if it was trained on the stream entering layer {site}"
        )
    read = site_of(str(name))
    if read is None:
        raise UserError(
            f"sae.path={path} reads {name}, not {wanted}: give an SAE of the stream entering layer "
            f"{site}"
        )
    if read != site:
        raise UserError(
            f"sae.path={path} reads the stream entering layer {read} ({name}), not {wanted}: "
            f"method.sites={[site]}"
        )
