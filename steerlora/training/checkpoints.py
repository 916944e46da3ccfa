"""Checkpoints of unfinished training: safetensors and JSON, whatever sharded the training.

A checkpoint is a folder ``step-<number>``. It is filled beside its place and renamed into it, and
``complete.json``, written last, holds the SHA-256 of its files: one that was cut short, or whose
bytes changed since, is passed over for the one before.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors.torch import load_file, save_file
from torch import Tensor

from steerlora.distributed import ranks
from steerlora.engine.manifests import compare_files, describe_files, read_json, write_json
from steerlora.errors import UserError

TENSORS, TREE, MARKER = "state.safetensors", "state.json", "complete.json"
KEPT = 2

logger = logging.getLogger(__name__)


class Files(CheckpointIO):
    """Lightning's checkpoint, a tree of dicts, lists and tensors, as a folder of two files.

    Args:
        identity: of what trains; a checkpoint of another is refused.
    """

    def __init__(self, identity: str = "") -> None:
        self.identity = identity

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        path = Path(path)
        unfinished = path.with_suffix(".tmp")
        for stray in path.parent.glob("step-*.tmp"):  # of a process that was killed
            shutil.rmtree(stray)
        try:
            unfinished.mkdir(parents=True)
            write_tree(unfinished, checkpoint, self.identity)
        except BaseException:  # a full disk, most of all: leave it the room that this took
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
        for old in sorted(path.parent.glob("step-????????"))[:-KEPT]:
            shutil.rmtree(old)

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict[str, Any]:
        return read_tree(Path(path))

    def remove_checkpoint(self, path) -> None:
        shutil.rmtree(path, ignore_errors=True)


def write_tree(folder: Path, tree: dict[str, Any], identity: str = "") -> None:
    """Write a tree of dicts, lists and tensors into a folder, and last the marker that says that
    all of the folder's files are there."""
    tensors: dict[str, Tensor] = {}
    flattened = _flattened(tree, tensors)
    save_file(tensors, folder / TENSORS)
    (folder / TREE).write_text(json.dumps(flattened), encoding="utf-8")
    write_json(folder / MARKER, {"identity": identity, "files": describe_files(folder)})


def read_tree(folder: Path) -> dict[str, Any]:
    """What :func:`write_tree` wrote."""
    tree = json.loads((folder / TREE).read_text(encoding="utf-8"))
    return _grown(tree, load_file(folder / TENSORS))


def whole(folder: Path, identity: str = "") -> bool:
    """Whether all files are there that the marker lists; of a damaged folder, a warning says so.

    Raises:
        UserError: it is of another configuration.
    """
    try:
        marker = read_json(folder / MARKER)
        problem, found = compare_files(folder, marker["files"]), marker["identity"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{MARKER} cannot be read: {error}"
    if problem is not None:
        logger.warning("checkpoint %s is damaged (%s): passed over", folder, problem)
        return False
    if found != identity:
        raise UserError(
            f"checkpoint {folder} is of another configuration ({found}, this one is "
            f"{identity}): remove the folder {folder.parent} to begin anew"
        )
    return True


def place(directory: Path, step: int) -> Path:
    """Where the checkpoint after so many steps lies."""
    return directory / f"step-{step:08d}"


def newest(directory: Path, identity: str = "") -> Path | None:
    """The newest whole checkpoint; damaged ones are passed over with a warning.

    Raises:
        UserError: it is of another configuration.
    """
    found = sorted(directory.glob("step-????????"), reverse=True)
    return next((path for path in found if whole(path, identity)), None)


def agreed(directory: Path, identity: str = "") -> Path | None:
    """The `newest` that rank 0 finds, on every rank."""
    found = newest(directory, identity) if ranks.is_main() else None
    step = ranks.broadcast(found and int(found.name.removeprefix("step-")))
    return None if step is None else place(directory, int(step))


# A tree in JSON: tensors by name, and what JSON has no form for under keys of their own

_TENSOR, _PAIRS, _TUPLE = "__tensor__", "__pairs__", "__tuple__"


def _flattened(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A JSON form of ``value``; its tensors go into ``tensors``."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # On the CPU, and its own: safetensors stores neither views nor shared memory.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _flattened(item, tensors) for key, item in value.items()}
        pairs = [[_flattened(k, tensors), _flattened(v, tensors)] for k, v in value.items()]
        return {_PAIRS: pairs}
    if isinstance(value, tuple):
        return {_TUPLE: [_flattened(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_flattened(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values, not {type(value).__name__}")


def _grown(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_flattened`."""
    if isinstance(value, list):
        return [_grown(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _PAIRS in value:
        return {_grown(k, tensors): _grown(v, tensors) for k, v in value[_PAIRS]}
    if _TUPLE in value:
        return tuple(_grown(item, tensors) for item in value[_TUPLE])
    return {key: _grown(item, tensors) for key, item in value.items()}


def finite(module: torch.nn.Module) -> bool:
    """Whether everything that trains still is."""
    return all(bool(p.isfinite().all()) for p in module.parameters() if p.requires_grad)
