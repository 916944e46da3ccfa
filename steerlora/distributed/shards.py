"""Tensors that DeepSpeed's ZeRO shards over the ranks: whole ones from shards, and back.

ZeRO has every weight that trains twice: as the parameter that forwards use, which ZeRO-3 shards,
and as the float32 shards that the optimizer steps, with their moments. Both are read and written by
DeepSpeed's public functions. Everything here is collective: every rank calls it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from steerlora.distributed.deepspeed_private import begin_moments

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's and AdamW's."""


def sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 shards it: its own data may be empty between uses.

    DeepSpeed then gives it ``ds_id``, ``ds_numel`` and ``ds_shape``, which transformers and PEFT
    read as well.
    """
    return hasattr(parameter, "ds_id")


def elements(parameter: Tensor) -> int:
    """Values of the whole parameter."""
    return parameter.ds_numel if sharded(parameter) else parameter.numel()


def whole_weights(module: nn.Module) -> dict[nn.Parameter, Tensor]:
    """The float32 values of every parameter that trains."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {p: safe_get_full_fp32_param(p) for p in module.parameters() if p.requires_grad}


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict with whole weights, without frozen ones that ZeRO-3 shards."""
    trained = {parameter: whole.cpu() for parameter, whole in whole_weights(module).items()}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {
        name: trained.get(parameters.get(name), value)
        for name, value in module.state_dict().items()
        if parameters.get(name) in trained or not sharded(parameters.get(name))
    }


@torch.no_grad()
def restore_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put stored buffers and weights in place.

    Args:
        module: what trains.
        state: a state dict of it; of a weight with several names, one is enough.
    """
    import deepspeed

    for name, buffer in module.named_buffers(remove_duplicate=False):
        if name in state:
            buffer.copy_(state[name])
    stored = {
        parameter: state[name]
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if name in state and parameter.requires_grad
    }
    assert len(stored) == sum(p.requires_grad for p in module.parameters()), "weights are missing"
    for parameter, value in stored.items():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
        _write(parameter, value)


def whole_moments(trained: Sequence[nn.Parameter], zero: Any) -> dict[str, Any]:
    """The optimizer's state dict as torch's optimizer has it in one process.

    Args:
        trained: the optimizer's parameters, in their order.
        zero: DeepSpeed's optimizer.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    begun = _begun(zero)
    state: dict[int, dict[str, Tensor]] = {}
    for number, parameter in enumerate(trained) if begun else ():
        whole = {name: safe_get_full_optimizer_state(parameter, name).cpu() for name in MOMENTS}
        state[number] = {"step": begun[0]["step"].detach().clone(), **whole}
    settings = {k: v for k, v in zero.param_groups[0].items() if k != "params"}
    return {"state": state, "param_groups": [{**settings, "params": [*range(len(trained))]}]}


@torch.no_grad()
def restore_moments(trained: Sequence[nn.Parameter], zero: Any, stored: Mapping[str, Any]) -> None:
    """Put a stored state dict of one process's optimizer into the shards.

    Args:
        trained: the optimizer's parameters, in their order.
        zero: DeepSpeed's optimizer.
        stored: what `whole_moments` or torch's optimizer gave.
    """
    settings = stored["param_groups"][0]
    for group in zero.param_groups:
        group.update({k: v for k, v in settings.items() if k != "params"})
    if not stored["state"]:
        return
    if not _begun(zero):
        begin_moments(zero)
    for state in _begun(zero):
        state["step"].copy_(stored["state"][0]["step"])
    for number, parameter in enumerate(trained):
        for name in MOMENTS:
            _write(parameter, stored["state"][number][name], name)


@contextmanager
def editing(
    parameters: Sequence[nn.Parameter], zero: Any, *, moments: bool
) -> Iterator[dict[nn.Parameter, dict[str, Tensor]]]:
    """Inside, trained weights are whole and may be changed in place, by every rank alike.

    Args:
        parameters: which.
        zero: DeepSpeed's optimizer.
        moments: the optimizer's state too; what is yielded has it by weight, else it is empty.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_optimizer_state

    wholes = {
        parameter: {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
        for parameter in (parameters if moments and _begun(zero) else ())
    }
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield wholes
        for parameter in parameters:
            _write(parameter, parameter.detach())
    for parameter, held in wholes.items():
        for name, value in held.items():
            _write(parameter, value, name)


def replace(module: nn.Module, weights: Mapping[nn.Parameter, Tensor]) -> None:
    """Make plain parameters of whole weights, in place of what a destroyed engine leaves behind.

    Frozen weights that ZeRO-3 shards stay so: no rank could hold them.
    """
    fresh = {parameter: nn.Parameter(value) for parameter, value in weights.items()}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if parameter in fresh:  # tied weights have several names
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner).register_parameter(leaf, fresh[parameter])


def _begun(zero: Any) -> list[dict[str, Tensor]]:
    """The optimizer's states that have moments; none before its first step."""
    return [state for state in zero.state.values() if MOMENTS[0] in state]


def _write(parameter: nn.Parameter, value: Tensor, moment: str = "") -> None:
    """Put a whole tensor into the optimizer's shards of a weight, or of one of its moments."""
    from deepspeed import utils

    if not sharded(parameter):
        if moment:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
        else:
            utils.safe_set_full_fp32_param(parameter, value)
        return
    # Shards are equal, the last one padded, which ZeRO-3's own safe_set_full functions forget.
    size = utils.safe_get_local_fp32_param(parameter).numel()
    padded = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    own = padded[size * dist.get_rank() :][:size]
    if moment:
        utils.safe_set_local_optimizer_state(parameter, own, moment)
    else:
        utils.safe_set_local_fp32_param(parameter, own)
