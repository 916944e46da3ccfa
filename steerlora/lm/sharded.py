"""A pretrained model under ZeRO-3: sharded as it is built, filled weight by weight from its files.

transformers' own way reads all files into one dictionary on the first rank. Here no rank ever holds
more than its shard and one weight besides.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import prevent_arange_dtype_change

from steerlora.errors import UserError
from steerlora.lm.weight_files import Source, read_weight, sources

T = TypeVar("T")


def open_sharded(
    config: PretrainedConfig,
    folder: Callable[[], Path],
    sharding: dict,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """A causal language model whose weights are spread over the ranks, in evaluation mode.

    Called on all ranks together, with torch.distributed initialised.

    Args:
        config: of the model.
        folder: gives the folder of its weights; asked on the first rank only.
        sharding: a DeepSpeed configuration with ZeRO stage 3.
        dtype: of the weights; None: what ``sharding`` trains in.

    Raises:
        UserError: on all ranks, where the first finds weights missing, unexpected or unreadable.
    """
    settings = _settings(sharding, dtype)
    model = _empty(config, settings)
    try:
        found = _agreed(lambda: sources(model, folder()))
    except NotImplementedError as error:
        raise UserError(
            f"{type(model).__name__} cannot be loaded sharded: {error}; use a trainer that keeps "
            "it whole on each rank, such as trainer=zero2"
        ) from error
    for name, source in found.items():
        _fill(model, name, source)
    _compute_buffers(model)
    return model.eval()


def _settings(sharding: dict, dtype: torch.dtype | None) -> dict:
    """What ``zero.Init`` reads of a DeepSpeed configuration, with the type that is asked for."""
    if sharding.get("zero_optimization", {}).get("stage") != 3:
        raise ValueError("sharding must be a DeepSpeed configuration with ZeRO stage 3")
    # Batches mean nothing here, but DeepSpeed reads no configuration without any.
    settings = {"train_micro_batch_size_per_gpu": 1, **sharding}
    settings = {name: value for name, value in settings.items() if name != "train_batch_size"}
    if dtype is not None:
        settings["bf16"] = {"enabled": dtype == torch.bfloat16}
        settings["fp16"] = {"enabled": dtype == torch.float16}
    return settings


def _type_of(settings: dict) -> torch.dtype:
    if settings.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    return torch.float16 if settings.get("fp16", {}).get("enabled") else torch.float32


def _empty(config: PretrainedConfig, settings: dict) -> PreTrainedModel:
    """The architecture, each weight sharded as soon as it is there, none of them initialised."""
    import deepspeed

    with ExitStack() as building:
        building.enter_context(no_init_weights())
        building.enter_context(prevent_arange_dtype_change())
        building.enter_context(deepspeed.zero.Init(config_dict_or_path=settings))
        model = AutoModelForCausalLM.from_config(config, dtype=_type_of(settings))
    model.tie_weights()
    return model


def _agreed(work: Callable[[], T]) -> T:
    """What ``work`` gives on the first rank, or the error it raises there, on every rank."""
    answer: list = [None]
    if dist.get_rank() == 0:
        try:
            answer = [work()]
        except (UserError, NotImplementedError) as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


@torch.no_grad()
def _fill(model: PreTrainedModel, name: str, source: Source) -> None:
    """Read one weight on the first rank, and give every rank its part."""
    import deepspeed

    weight = model.get_parameter_or_buffer(name)
    reads = dist.get_rank() == 0
    if not isinstance(weight, nn.Parameter):  # buffers are whole on every rank
        if reads:
            weight.copy_(read_weight(source))
        dist.broadcast(weight, src=0)
        return
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        if reads:
            weight.copy_(read_weight(source))
    weight._is_hf_initialized = True


@torch.no_grad()
def _compute_buffers(model: PreTrainedModel) -> None:
    """Rotary frequencies and the like, which no file holds, in the types that transformers uses."""
    for module in model.modules():
        if any(module._non_persistent_buffers_set):
            model._init_weights(module)
