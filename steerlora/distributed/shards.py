"""Tensors that DeepSpeed's ZeRO shards over the ranks: whole ones from shards, and back.

ZeRO keeps the float32 weights that train, and the optimizer's moments, as one or more flat tensors
a rank; a weight is a range of them. Everything here is collective: every rank calls it, in the same
order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's and AdamW's."""


class Fragment(NamedTuple):
    """What this rank holds of a weight: flat[start : start + length], its part from offset on."""

    flat: Tensor
    start: int
    length: int
    offset: int


def sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has it: its own data may be empty between uses."""
    return hasattr(parameter, "ds_id")


def elements(parameter: Tensor) -> int:
    return parameter.ds_numel if sharded(parameter) else parameter.numel()


def shape(parameter: Tensor) -> torch.Size:
    return parameter.ds_shape if sharded(parameter) else parameter.shape


def _flats(zero: Any) -> list[Tensor]:
    """The flat tensors of this rank's optimizer."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


def _fragment(parameter: nn.Parameter, zero: Any) -> Fragment | None:
    """This rank's part of a weight; None where it has none."""
    if sharded(parameter):
        group, start, length = zero.grad_position[zero.get_param_id(parameter)]
        offset = zero._get_param_partition_rank(parameter) * length
        length = max(0, min(length, elements(parameter) - offset))  # the last part may be padded
        return Fragment(_flats(zero)[group], start, length, offset)
    held = parameter._hp_mapping
    if held is None:
        return None
    place = held.hp_fragment_address
    flat = _flats(zero)[held.param_group_index]
    return Fragment(flat, place.start, place.numel, held.lp_fragment_address.start)


def _whole(parameter: nn.Parameter, zero: Any, source: Callable[[Tensor], Tensor]) -> Tensor:
    """A whole tensor like ``parameter``, from what ``source`` gives of each rank's flat tensor."""
    found = _fragment(parameter, zero)
    device = _flats(zero)[0].device
    whole = torch.zeros(elements(parameter), device=device)
    if found is not None:
        part = source(found.flat)[found.start : found.start + found.length]
        whole[found.offset : found.offset + found.length] = part
    dist.all_reduce(whole)
    return whole.view(shape(parameter))


def _put(parameter: nn.Parameter, zero: Any, value: Tensor, target: Callable[[Tensor], Tensor]):
    """Write this rank's part of a whole tensor into what ``target`` gives of its flat tensor."""
    found = _fragment(parameter, zero)
    if found is not None:
        part = value.reshape(-1)[found.offset : found.offset + found.length]
        target(found.flat)[found.start : found.start + found.length] = part.to(found.flat)


def whole_state(module: nn.Module, zero: Any) -> dict[str, Tensor]:
    """Buffers, and every weight that trains in float32; of frozen weights, those that are whole.

    Under all its names, as in a state dict: an adapter's weight is also its model's.
    """
    wholes = whole_weights(module, zero)
    trained = {module.get_parameter(name): whole for name, whole in wholes.items()}
    weights = {
        name: trained.get(parameter, parameter.detach())
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter in trained or not sharded(parameter)
    }
    return {**weights, **dict(_stored_buffers(module))}


def _stored_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that belong to a state dict; a rotary embedding's frequencies, for one, do not."""
    for path, owner in module.named_modules(remove_duplicate=False):
        for leaf, buffer in owner.named_buffers(recurse=False):
            if leaf not in owner._non_persistent_buffers_set:
                yield f"{path}.{leaf}".lstrip("."), buffer


@torch.no_grad()
def restore_state(module: nn.Module, zero: Any, state: Mapping[str, Tensor]) -> None:
    """Put stored buffers and weights in place, in the shards and in what forwards use."""
    import deepspeed

    for name, buffer in _stored_buffers(module):
        if name in state:
            buffer.copy_(state[name])
    stored = {
        parameter: state[name]
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if name in state and parameter.requires_grad
    }
    assert len(stored) == sum(p.requires_grad for p in module.parameters()), "weights are missing"
    for parameter, value in stored.items():
        value = value.to(_flats(zero)[0].device)
        _put(parameter, zero, value, lambda flat: flat.detach())
        if sharded(parameter):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if dist.get_rank() == 0:
                    parameter.copy_(value)
        else:
            parameter.copy_(value)


def whole_moments(trained: Sequence[nn.Parameter], zero: Any) -> dict[str, Any]:
    """The optimizer's state dict as torch's optimizer has it in one process."""
    states = zero.optimizer.state
    begun = [states[flat] for flat in _flats(zero) if MOMENTS[0] in states.get(flat, {})]
    kept: dict[int, dict[str, Tensor]] = {}
    for number, parameter in enumerate(trained) if begun else ():
        kept[number] = {"step": begun[0]["step"].detach().clone()}
        for name in MOMENTS:
            whole = _whole(parameter, zero, lambda flat, name=name: states[flat][name])
            kept[number][name] = whole
    settings = {k: v for k, v in zero.optimizer.param_groups[0].items() if k != "params"}
    return {"state": kept, "param_groups": [{**settings, "params": [*range(len(trained))]}]}


@torch.no_grad()
def restore_moments(trained: Sequence[nn.Parameter], zero: Any, stored: Mapping[str, Any]) -> None:
    """Put a stored state dict of one process's optimizer into the shards."""
    states, settings = zero.optimizer.state, stored["param_groups"][0]
    for group in zero.optimizer.param_groups:
        group.update({k: v for k, v in settings.items() if k != "params"})
    if not stored["state"]:
        return
    for flat in _flats(zero):
        step = stored["state"][0]["step"].to(flat.device, torch.float32).clone()
        states[flat] = {"step": step, **{name: torch.zeros_like(flat) for name in MOMENTS}}
    for number, parameter in enumerate(trained):
        for name in MOMENTS:
            value = stored["state"][number][name]
            _put(parameter, zero, value, lambda flat, name=name: states[flat][name])
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def whole_weights(module: nn.Module, zero: Any) -> dict[str, Tensor]:
    """{name: float32} of every weight that trains."""
    return {
        name: _whole(parameter, zero, lambda flat: flat.detach())
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


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

    states = zero.optimizer.state
    known = moments and any(MOMENTS[0] in states.get(flat, {}) for flat in _flats(zero))
    wholes = {
        parameter: {
            name: _whole(parameter, zero, lambda flat, name=name: states[flat][name])
            for name in MOMENTS
        }
        for parameter in (parameters if known else ())
    }
    gathered = [parameter for parameter in parameters if sharded(parameter)]
    with deepspeed.zero.GatheredParameters(gathered, modifier_rank=0):
        yield wholes
        for parameter in parameters:
            _put(parameter, zero, parameter.detach(), lambda flat: flat.detach())
    for parameter, held in wholes.items():
        for name, value in held.items():
            _put(parameter, zero, value, lambda flat, name=name: states[flat][name])


def replace(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make plain parameters of whole weights, in place of what a closed engine leaves behind.

    Frozen weights that ZeRO-3 sharded stay so: no rank could hold them.
    """
    fresh = {module.get_parameter(name): nn.Parameter(value) for name, value in weights.items()}
    for owner in module.modules():
        for leaf, parameter in list(owner._parameters.items()):
            if parameter in fresh:  # tied weights have several owners
                owner.register_parameter(leaf, fresh[parameter])
