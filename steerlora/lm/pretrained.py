"""Base models and tokenizers as Hugging Face stores them: a folder, or a hub id.

Every mistake that a user can make here is one line that says what would be right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from jinja2.exceptions import TemplateError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from steerlora.config.model import DATE
from steerlora.errors import UserError
from steerlora.lm.dates import pin_date
from steerlora.lm.identity import fingerprint_of
from steerlora.lm.weight_files import (
    local_folder,
    on_meta,
    read_weight,
    refuse_other_weights,
    sources,
    weight_files,
)

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*")
"""Files of which a tokenizer has one; without, transformers makes up an empty one."""
THINKING = "enable_thinking"
"""The variable by which Qwen3's chat template turns thinking on and off."""


def open_tokenizer(
    path: str,
    revision: str | None = None,
    *,
    thinking: bool | None = None,
    date: str = DATE,
    chat_template: str | None = None,
) -> Any:
    """A tokenizer with a chat template and a padding token.

    Args:
        path: a folder or a hub id.
        revision: of a hub id.
        thinking: what the chat template is told whenever this tokenizer applies it, by us or by
            lm-eval. False: Qwen3's template closes an empty ``<think></think>`` block in the
            generation prompt, so that a response is the answer alone, in training too. True: the
            response begins with the block. None: the template's own default.

        date: the day that the template is told is today.
        chat_template: in place of the tokenizer's own.

    Raises:
        UserError: there is none, it has no chat template, one that is no Jinja, or one without a
            switch for thinking.
    """
    folder = local_folder(path, revision, weights=False)
    if not any(found for pattern in VOCABULARIES for found in folder.glob(pattern)):
        raise UserError(f"model.path={path} has no tokenizer: expected {VOCABULARIES[0]}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer of {path} cannot be loaded: {_line(error)}") from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        except TemplateError as error:
            raise UserError(
                f"model.chat_template: the file is no chat template ({_line(error)})"
            ) from error
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {path} has no chat template: use a chat model, or give a template, "
            "model.chat_template=<Jinja file>"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"the tokenizer of {path} has neither a padding token nor an end of text: name one "
                "in its tokenizer_config.json, pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    pin_date(tokenizer, date)
    if thinking is not None:
        if THINKING not in str(tokenizer.chat_template):
            raise UserError(
                f"model.thinking={str(thinking).lower()}: the chat template of {path} has no "
                f"{THINKING} switch: set model.thinking=null"
            )
        apply = tokenizer.apply_chat_template
        tokenizer.apply_chat_template = partial(apply, **{THINKING: thinking})
    return tokenizer


def open_model(
    path: str,
    revision: str | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    sharding: dict | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode.

    Args:
        path: a folder or a hub id; its weights are safetensors.
        revision: of a hub id.
        device: "cpu", "cuda:<n>", "mps", or "auto": spread over all visible GPUs, as accelerate's
            ``device_map`` does it.
        dtype: of the weights; None: what the files say on an accelerator, float32 on the CPU.
        sharding: a DeepSpeed configuration with ZeRO stage 3: the model is spread over the ranks of
            torch.distributed and never whole on any; ``device`` is then DeepSpeed's own, and
            ``dtype`` None is what the configuration trains in. All ranks call together.

    Raises:
        UserError: no such model, not a decoder, other weights than its config asks for, or more
            than the GPUs hold.
    """
    config = read_config(path, revision)
    if sharding is not None:
        from steerlora.lm.sharded import open_sharded

        return open_sharded(config, partial(local_folder, path, revision), sharding, dtype)
    folder = local_folder(path, revision)
    weight_files(folder)  # says what is missing in our words
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or (torch.float32 if on_cpu else "auto"),
            device_map=None if on_cpu else device,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported, and refused here
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.path={path} cannot be loaded: {_line(error)}") from error
    refuse_other_weights(
        folder,
        loading["missing_keys"],
        loading["unexpected_keys"],
        (name for name, *_ in loading["mismatched_keys"]),
    )
    beside = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if not on_cpu and beside & {"cpu", "disk"}:
        raise UserError(
            f"model.path={path} does not fit on the visible GPUs: use more of them, or a smaller "
            "model"
        )
    return model.eval()


def read_config(path: str, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a decoder-only causal language model.

    Raises:
        UserError: there is none, or it is of another kind of model.
    """
    folder = local_folder(path, revision, weights=False)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model.path={path} cannot be loaded: it holds no config.json: give the folder of a "
            "Hugging Face model"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.path={path} cannot be loaded: {_line(error)}") from error
    said = config.architectures or []
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    causal = config.model_type in known and (not said or set(said) & set(known.values()))
    if not causal or config.is_encoder_decoder:
        raise UserError(
            f"model.path={path} is a {', '.join(said) or config.model_type}, not a decoder-only "
            "causal language model: give one such as Qwen3, Llama or Gemma"
        )
    return config


class PretrainedFacts(NamedTuple):
    """What is known of a model without loading it.

    Attributes:
        fingerprint: as :func:`steerlora.lm.identity.model_fingerprint` of the loaded model.
        parameters: how many.
        shape: {layers, width, heads, kv_heads, head_width, ffn_width, vocabulary, tied}, as the
            keys of ``model.*`` are called; what a family does not have is absent.
    """

    fingerprint: str
    parameters: int
    shape: dict[str, int | bool]


def describe(path: str, revision: str | None = None) -> PretrainedFacts:
    """Read a model's facts from its files, one weight at a time.

    Raises:
        UserError: as :func:`open_model`; or a weight is not finite.
    """
    config = read_config(path, revision)
    folder = local_folder(path, revision)
    try:
        model = on_meta(AutoModelForCausalLM, config)
        found = sources(model, folder)
        weights = ((name, read_weight(found[name])) for name, _ in model.named_parameters())
        fingerprint = fingerprint_of(_finite(path, weights))
    except NotImplementedError:  # experts that transformers fuses as it loads them
        model = open_model(path, revision)
        fingerprint = fingerprint_of(_finite(path, model.named_parameters()))
    parameters = sum(weight.numel() for weight in model.parameters())
    return PretrainedFacts(fingerprint, parameters, shape_of(config))


def _finite(path: str, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The weights, as long as all their values are numbers."""
    for name, weight in weights:
        # A sum takes no memory beside the weight; it may overflow, which the values then deny.
        if not weight.sum(dtype=torch.float32).isfinite() and not weight.isfinite().all():
            raise UserError(
                f"model.path={path}: {name} holds NaN or infinite values: fetch it again"
            )
        yield name, weight


def shape_of(config: PretrainedConfig) -> dict[str, int | bool]:
    """A model's shape under our names (see :class:`PretrainedFacts`)."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    shape = {
        "layers": text.num_hidden_layers,
        "width": text.hidden_size,
        "heads": heads,
        "kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_width": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "ffn_width": getattr(text, "intermediate_size", None),
        "vocabulary": text.vocab_size,
        "tied": config.tie_word_embeddings,
    }
    return {name: value for name, value in shape.items() if isinstance(value, int)}


def qwen3_config(shape: Any, **more: Any) -> Qwen3Config:
    """The inverse of :func:`shape_of`, for a Qwen3.

    Args:
        shape: has our names as attributes: a ``ModelConfig``, a ``DecoderShape``.
        more: of transformers' names; they take precedence.
    """
    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "tie_word_embeddings": shape.tied,
    }
    return Qwen3Config(**sizes | more)


def _line(error: Exception) -> str:
    """The beginning of a library's message, as one line."""
    return " ".join(str(error).split())[:200]
