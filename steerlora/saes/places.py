"""Where SAEs lie, in a folder here or in a repository of the hub; and what a format of them is."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError

from steerlora.errors import UserError
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.weights import one_line

MeanNorm = Callable[[], float]
"""Gives the mean norm of the activations that an SAE is to read."""


class Stored(NamedTuple):
    """One SAE's files, on this machine."""

    weights: Path
    where: str
    """Path of the weights that says most: absolute, or below the repository's id."""
    config: Path
    """Where its configuration is, if there is one."""
    mean_norm: MeanNorm | None
    """None where there are no activations to ask."""


class Opened(NamedTuple):
    """An SAE, frozen and in evaluation mode, and what is said of it."""

    sae: SparseAutoencoder
    said: dict[str, Any]
    """SAELens's ``metadata``: above all ``hook_name``, the stream that it reads, in
    TransformerLens's words where there are some."""


class Format(NamedTuple):
    """How one library or publisher stores SAEs."""

    title: str
    """What lies there, and whose format it is, for messages."""
    weights: str
    """Regular expression of the path of a weights file, from its end."""
    config: str
    """Path of the configuration from the weights' folder, for those that have one."""
    hook: Callable[[str], str | None]
    """The stream that an SAE reads, as far as the path of its weights says it."""
    read: Callable[[Stored], Opened]
    """Reads one SAE. Raises UserError."""
    key: Callable[[str], str] = lambda where: Path(where).name
    """What a file of weights at a path is called, with all of the path that decides features."""
    published: Callable[[str], tuple[str, ...]] = lambda hub_id: ()
    """Weights files that a repository of the hub is known to have; none: it has to be asked."""


class Place(NamedTuple):
    """A folder of files, or one file."""

    where: str
    """An absolute path, or a repository's id, with the folder in it."""
    names: tuple[str, ...]
    """Paths of the files from there."""
    fetch: Callable[[str], Path]
    """The file of a name on this machine. Raises UserError."""


def is_on_hub(path: str) -> bool:
    """Whether a path that is no local one has the form of a repository's id, or a folder in one."""
    local = Path(path).expanduser()
    return not local.exists() and bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)+", path))


def repository(path: str) -> tuple[str, str]:
    """A hub path as the repository's id and the folder in it, ``""`` for the whole."""
    owner, name, *folders = path.split("/")
    return f"{owner}/{name}", "/".join(folders)


def local_place(path: str) -> Place:
    """What lies at a path on this machine.

    Raises:
        UserError: nothing.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(f"no SAE at {path}: there is no such file or directory")
    found = found.absolute()
    if found.is_file():
        return Place(str(found.parent), (found.name,), found.parent.joinpath)
    files = (file for file in found.rglob("*") if file.is_file())
    names = sorted(file.relative_to(found).as_posix() for file in files)
    return Place(str(found), tuple(names), found.joinpath)


def hub_place(path: str, published: tuple[str, ...]) -> Place:
    """What lies at a path on the hub, or in the local cache of it where the hub does not answer.

    Args:
        path: a repository's id, or a folder in it.
        published: weights files that it is known to have, so that nothing need be asked.

    Raises:
        UserError: there is nothing, or neither hub nor cache can be read.
    """
    hub_id, folder = repository(path)
    prefix = f"{folder}/" if folder else ""
    names = published or _listed(path, hub_id)
    names = tuple(sorted(name[len(prefix) :] for name in names if name.startswith(prefix)))
    if not names:
        raise UserError(f"sae.path={path}: {hub_id} has no folder {folder}")
    return Place(path, names, partial(_fetched, path, hub_id, prefix))


def _listed(path: str, hub_id: str) -> list[str]:
    try:
        return HfApi().list_repo_files(hub_id)
    except (OSError, ValueError, HTTPError) as error:
        try:
            cached = Path(snapshot_download(hub_id, local_files_only=True))
        except (OSError, ValueError):
            raise UserError(
                f"sae.path={path} is neither a folder here nor in the local cache, and the hub "
                f"does not tell of it ({one_line(error)}); {FETCH_FIRST}"
            ) from error
        return [file.relative_to(cached).as_posix() for file in cached.rglob("*") if file.is_file()]


def _fetched(path: str, hub_id: str, prefix: str, name: str) -> Path:
    try:
        return Path(hf_hub_download(hub_id, prefix + name))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"sae.path={path}: {name} is not in the local cache and the hub cannot be reached; "
            f"{FETCH_FIRST}"
        ) from error
    except EntryNotFoundError as error:
        raise UserError(f"sae.path={path} has no {name}") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"sae.path={path}: the hub does not give {name}: {one_line(error)}"
        ) from error


FETCH_FIRST = (
    "fetch it first with `python scripts/download.py model=<option>` and run with "
    "HF_HUB_OFFLINE=1, or give sae.path=<folder>"
)
