"""Qwen-Scope's public SAEs for Qwen3: one file a layer, on the hub or in a folder.

``layer<n>.sae.pt`` holds W_enc [N, D] and W_dec [D, N], each the transpose of ours, b_enc [N] and
b_dec [D]; features are TopK(x W_enc^T + b_enc), with no b_dec subtracted, of the stream that leaves
layer n and so enters layer n + 1 (the repositories ``Qwen/SAE-Res-Qwen3-*``).
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor

from steerlora.errors import UserError
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.topk import TopK
from steerlora.saes.weights import refuse_unusable

FILE = "layer{}.sae.pt"
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")


def is_qwen_scope(path: str) -> bool:
    """Whether ``path`` is a folder of such files, or called like one of the hub's repositories."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return any(folder.glob(FILE.format("*")))
    return bool(re.fullmatch(r"[\w.-]+/SAE-Res-.*-L0_\d+", path))


def load_qwen_scope(path: str, site: int) -> SparseAutoencoder:
    """The SAE of the stream entering layer ``site``, frozen and in evaluation mode.

    Args:
        path: a folder or a hub id; its name ends in ``L0_<k>``.
        site: from 1: Qwen-Scope reads what leaves a layer.

    Raises:
        UserError: no SAE of that site there, one that cannot be read or fetched, or no k in the
            name.
    """
    k = _active(path)
    tensors = _read(_file(path, site))
    sae = TopK(
        tensors["b_dec"].numel(),
        tensors["b_enc"].numel(),
        k=k,
        apply_b_dec_to_input=False,
    )
    tensors |= {name: tensors[name].t() for name in ("W_enc", "W_dec")}
    sae.to(tensors["W_dec"].dtype).load_state_dict(tensors)
    return sae.requires_grad_(False).eval()


def qwen_scope_files(path: str, site: int) -> dict[str, Path]:
    """{what it is: the file} of a site in a folder, with the k of its name; empty for a hub id.

    Raises:
        UserError: no SAE of that site there, or no k in the name.
    """
    if not Path(path).expanduser().is_dir():
        return {}
    return {f"L0_{_active(path)}": _file(path, site)}


def _active(path: str) -> int:
    """K, which only the name says."""
    found = re.search(r"L0_(\d+)$", Path(path).name)
    if not found:
        raise UserError(
            f"sae.path={path}: how many latents are active is in the name, which must end in "
            "L0_<k>, such as SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
        )
    return int(found[1])


def _file(path: str, site: int) -> Path:
    """The file of a site, in the folder or fetched from the hub."""
    if site == 0:
        raise UserError(
            f"sae.path={path} has no SAE of the stream entering layer 0: Qwen-Scope reads what "
            "leaves a layer: set method.sites to layers from 1"
        )
    folder, name = Path(path).expanduser(), FILE.format(site - 1)
    if folder.is_dir():
        if not (folder / name).is_file():
            numbers = (re.search(r"layer(\d+)", file.name)[1] for file in folder.glob("layer*"))
            sites = sorted(int(number) + 1 for number in numbers)
            raise UserError(
                f"sae.path={path} has no {name}, which site {site} needs; it has those of sites "
                f"{', '.join(map(str, sites))}"
            )
        return folder / name
    try:
        return Path(hf_hub_download(path, name))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"sae.path={path}: {name} is not in the local cache and the hub cannot be reached; "
            "fetch it first with `python scripts/download.py model=<option>` and run with "
            "HF_HUB_OFFLINE=1, or give sae.path=<folder>"
        ) from error
    except EntryNotFoundError as error:
        raise UserError(
            f"sae.path={path} has no {name}, which site {site} needs: its model has fewer layers"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"sae.path={path}: the hub does not give {name}: {_line(error)}") from error


def _read(file: Path) -> dict[str, Tensor]:
    """The four tensors, of shapes that fit together."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{file} cannot be read ({_line(error)}): fetch it again") from error
    if not isinstance(tensors, dict) or not set(TENSORS) <= set(tensors):
        held = ", ".join(map(str, tensors)) if isinstance(tensors, dict) else type(tensors).__name__
        raise UserError(
            f"{file} is no SAE of Qwen-Scope: it holds {held}, not {', '.join(TENSORS)}"
        )
    tensors = {name: tensors[name] for name in TENSORS}
    if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{file} is no SAE of Qwen-Scope: it holds more than tensors")
    latents, width = tensors["b_enc"].numel(), tensors["b_dec"].numel()
    for name, shape in {"W_enc": (latents, width), "W_dec": (width, latents)}.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{file}: {name} is {list(tensors[name].shape)}, which does not go with {latents} "
                f"latents of width {width}: it must be {list(shape)}"
            )
    refuse_unusable(file, tensors)
    return tensors


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
