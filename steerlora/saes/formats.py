"""The formats of SAEs that can be read, and which SAE of a folder is a site's."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from steerlora.errors import UserError
from steerlora.saes import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    qwen_scope,
    saelens,
    sparsify,
)
from steerlora.saes.places import (
    Format,
    MeanNorm,
    Opened,
    Place,
    Stored,
    hub_place,
    is_on_hub,
    local_place,
    repository,
)

FORMATS: tuple[Format, ...] = (
    saelens.FORMAT,
    sparsify.FORMAT,
    dictionary_learning.FORMAT,
    gemma_scope.FORMAT,
    gemma_scope_2.FORMAT,
    llama_scope.FORMAT,
    qwen_scope.FORMAT,
)
"""A further one is a file that defines ``FORMAT``, and its line here."""


def open_sae(path: str, site: int, mean_norm: MeanNorm | None = None) -> Opened:
    """The SAE of one site among those at ``path``, and what is said of it.

    Args:
        path: a weights file, its folder, or a folder with the folders of several sites, which
            their paths tell apart; here or on the hub (``owner/name/folder``).
        site: the stream entering this layer. An SAE that is alone at ``path`` is opened whatever
            site it is of: its ``hook_name`` says.
        mean_norm: of the activations that it is to read, where its files may leave it out.

    Raises:
        UserError: no SAE of that site there, several, or one that cannot be read.
    """
    place = _place(path)
    one = _chosen(place, path, site)
    weights = place.fetch(one.name)
    config = posixpath.normpath(f"{posixpath.dirname(one.name)}/{one.format.config}").lstrip("/")
    file = place.fetch(config) if config in place.names else weights.parent / one.format.config
    return one.format.read(Stored(weights, f"{place.where}/{one.name}", file, mean_norm))


def sae_files(path: str, site: int) -> dict[str, Path]:
    """{what it is: the file} of all that :func:`open_sae` reads; empty where it has to be fetched.

    Raises:
        UserError: no SAE of that site there, or several.
    """
    if is_on_hub(path):
        return {}
    place = local_place(path)
    one = _chosen(place, path, site)
    weights = place.fetch(one.name)
    files = {one.format.key(f"{place.where}/{one.name}"): weights}
    config = weights.parent / one.format.config
    if config.is_file():
        files[config.name] = config
    return files


def hub_files(path: str, sites: Iterable[int]) -> tuple[str, tuple[str, ...]]:
    """The repository of a path on the hub, and patterns of the files that its sites need.

    Where it is not known what lies there, they are those of everything below the path.

    Raises:
        UserError: it is known, and a site has no SAE.
    """
    hub_id, folder = repository(path)
    if not _published(path):
        return hub_id, (f"{folder}/*" if folder else "*",)
    place = _place(path)
    return hub_id, tuple(_chosen(place, path, site).name for site in sorted(sites))


class _Candidate(NamedTuple):
    format: Format
    name: str
    hook: str | None


def site_of(hook: str | None) -> int | None:
    """The layer that a stream enters, by TransformerLens's name of it; None for what is none."""
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook or "")
    return int(found[1]) + (found[2] == "post") if found else None


def _published(path: str) -> tuple[str, ...]:
    return next((names for one in FORMATS if (names := one.published(path))), ())


def _place(path: str) -> Place:
    return hub_place(path, _published(path)) if is_on_hub(path) else local_place(path)


def _chosen(place: Place, path: str, site: int) -> _Candidate:
    """The SAE of a site: the only one there, or the one whose path says so."""
    found = [
        _Candidate(one, name, one.hook(f"{place.where}/{name}"))
        for name in place.names
        for one in FORMATS
        if re.search(rf"/{one.weights}$", f"{place.where}/{name}")
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        expected = ", ".join(one.title for one in FORMATS)
        raise UserError(f"no SAE in {path}: expected {expected}")
    ours = [one for one in found if site_of(one.hook) == site]
    ours = ours or [one for one in found if one.hook is None]
    if not ours:
        hooks = sorted(
            {str(one.hook) for one in found}, key=lambda hook: (site_of(hook) or 0, hook)
        )
        raise UserError(f"no SAE of site {site} in {path}: it has {_some(hooks)}")
    if len(ours) > 1:
        names = _some([one.name for one in ours])
        raise UserError(f"{path} has several SAEs of site {site}: give the path of one of {names}")
    return ours[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
