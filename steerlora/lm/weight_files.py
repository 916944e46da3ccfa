"""The weight files of a Hugging Face model: found, matched to a model's names, read one by one.

Nothing here holds more than one tensor. Files are safetensors, one or several with an index.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from steerlora.errors import UserError
from steerlora.text import is_plain_name

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
"""Configuration and tokenizer of a model on the hub."""
IDENTITY = [*SMALL_FILES, "vocab.*", "additional_chat_templates/*.jinja", "*.safetensors"]
"""What decides which model a folder holds: whatever transformers reads of it."""
SHOWN = 4
"""Names of weights listed in an error."""


class Source(NamedTuple):
    """Where a weight lies: a safetensors file, and the tensor's name in it."""

    file: Path
    name: str


def local_folder(path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a model: ``path`` itself, or a hub id's in the local cache, fetched if absent.

    Args:
        path: a folder or a hub id.
        revision: of a hub id.
        weights: its weights too, not only configuration and tokenizer.

    Raises:
        UserError: there is no such folder, or the hub does not give it.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    wanted = [*SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        return Path(
            snapshot_download(
                path,
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=["original/*", "consolidated*"],  # second copies of the weights
            )
        )
    except HFValidationError as error:
        raise UserError(
            f"model.path={path} cannot be loaded: there is no such folder, nor can a hub id be "
            "called so"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"model.revision={revision}: {path} has no such revision") from error
    except (OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"model.path={path} cannot be loaded: no such folder, and the hub cannot be reached or "
            f"has no such model{at}; fetch it first with `python scripts/download.py "
            "model=<option>` and run with HF_HUB_OFFLINE=1, or give model.path=<folder>"
        ) from error


def commit_of(path: str, revision: str | None = None) -> str | None:
    """The commit that a hub id's revision means now; None for a folder, which has none."""
    folder = local_folder(path, revision, weights=False)
    return None if Path(path).expanduser().is_dir() else folder.name


def model_files(path: str) -> dict[str, Path]:
    """{name: file} of all that decides a local model and its tokenizer; empty for a hub id."""
    folder = Path(path).expanduser()
    found = {file for pattern in IDENTITY for file in folder.glob(pattern) if file.is_file()}
    return {file.relative_to(folder).as_posix(): file for file in sorted(found)}


def weight_files(folder: Path) -> dict[str, Path]:
    """{name of a tensor: its file}, of all that the folder's weight files hold.

    Raises:
        UserError: no weights there, or an index that cannot be read or names files that are gone.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise UserError(
                f"{folder} holds no weights: expected {SINGLE}, or {INDEX} and its files "
                "(pickled weights, .bin or .pth, are not read)"
            )
        return dict.fromkeys(_names_in(folder / SINGLE), folder / SINGLE)
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        plain = all(map(is_plain_name, listed.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is not an index of weights: fetch it again") from error
    if not plain:
        raise UserError(f"{index} names files outside its folder: fetch it again")
    gone = sorted({name for name in listed.values() if not (folder / name).is_file()})
    if gone:
        raise UserError(f"{folder} lacks {_some(gone)}, which {INDEX} names: fetch it again")
    return {name: folder / file for name, file in listed.items()}


def sources(model: PreTrainedModel, folder: Path) -> dict[str, Source]:
    """{weight of the model: where it lies}, of every parameter and persistent buffer.

    Older files' names are translated as transformers does; tied weights are listed once.

    Args:
        model: built from the folder's configuration; its weights may be on the meta device.
        folder: of the weight files.

    Raises:
        UserError: weights that the model has and the files do not, or the other way round, or in
            another shape.
        NotImplementedError: weights that transformers computes from several of the files' tensors.
    """
    kept = model.state_dict(keep_vars=True)
    tied = model.all_tied_weights_keys  # {name: the name that has its weight}
    renamings, converters = [], []
    for transform in get_model_conversion_mapping(model):
        (converters if isinstance(transform, WeightConverter) else renamings).append(transform)
    found: dict[str, Source] = {}
    unexpected = []
    for name, file in weight_files(folder).items():
        known, converted = rename_source_key(
            name, renamings, converters, model.base_model_prefix, kept
        )
        if converted is not None:
            raise NotImplementedError(f"{name} is one of several tensors that make {known}")
        if known in kept:
            found.setdefault(tied.get(known, known), Source(file, name))
        elif not _ignored(name, model._keys_to_ignore_on_load_unexpected):
            unexpected.append(name)
    missing = [
        name
        for name in kept
        if tied.get(name, name) not in found
        and not _ignored(name, model._keys_to_ignore_on_load_missing)
    ]
    shapes = _shapes(found.values())
    other = [name for name, source in found.items() if shapes[source] != _shape_of(kept[name])]
    refuse_other_weights(folder, missing, unexpected, other)
    return found


def refuse_other_weights(
    folder: Path, missing: Iterable[str], unexpected: Iterable[str], other_shape: Iterable[str]
) -> None:
    """UserError unless the weight files hold exactly what the model has."""
    missing, unexpected, other_shape = sorted(missing), sorted(unexpected), sorted(other_shape)
    wrong = []
    if missing:
        wrong.append(f"lack {_some(missing)}")
    if unexpected:
        wrong.append(f"hold {_some(unexpected)}, which it has not")
    if other_shape:
        wrong.append(f"hold {_some(other_shape)} in another shape")
    if wrong:
        raise UserError(
            f"the weights in {folder} are not of the model that its config.json describes: they "
            f"{' and '.join(wrong)}; fetch the model again"
        )


def read_weight(source: Source) -> Tensor:
    """One tensor on the CPU, in the type of its file.

    Raises:
        UserError: the file cannot be read.
    """
    # Opened anew for each: a file that stays open stays mapped, and counts as memory.
    with _opened(source.file) as file:
        return file.get_tensor(source.name)


def on_meta(model_class: type, config) -> PreTrainedModel:
    """The architecture without any memory for its weights."""
    with torch.device("meta"):
        return model_class.from_config(config)


def _shape_of(weight: Tensor) -> tuple[int, ...]:
    """Of the whole weight, where ZeRO-3 has sharded it."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def _shapes(found: Iterable[Source]) -> dict[Source, tuple[int, ...]]:
    """The shape of every tensor, read from the files' headers."""
    shapes = {}
    for file, group in groupby(sorted(found), key=lambda source: source.file):
        with _opened(file) as opened:
            for source in group:
                shapes[source] = tuple(opened.get_slice(source.name).get_shape())
    return shapes


def _names_in(file: Path) -> list[str]:
    with _opened(file) as opened:
        return list(opened.keys())


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    """A file of weights; UserError where it cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}): fetch it again") from error


def _ignored(name: str, patterns: list[str] | None) -> bool:
    # Files of some years ago hold rotary frequencies, which are computed today.
    return any(re.search(pattern, name) for pattern in [*(patterns or []), r"rotary_emb\.inv_freq"])


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
