"""What is used of DeepSpeed beyond its public functions, and the versions in which it is there.

Weights and moments are read and written through public functions, in `shards.py`.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from packaging.specifiers import SpecifierSet

from steerlora.errors import UserError

SUPPORTED = ">=0.19,<0.20"


def check_version() -> None:
    """Refuse a DeepSpeed whose private parts nobody has looked at.

    Raises:
        UserError: another version is installed.
    """
    found = metadata.version("deepspeed")
    if found not in SpecifierSet(SUPPORTED):
        raise UserError(
            f"DeepSpeed {found} is installed, and trainer.strategy=zero2 and zero3 need "
            f"{SUPPORTED}: pip install 'deepspeed{SUPPORTED}', or choose trainer=ddp"
        )


def begin_moments(zero: Any) -> None:
    """Give Adam zeros as moments, and 0 as its step, before its first step.

    Private, because the public functions reach moments only once a step has made them: a checkpoint
    is restored before that. ZeRO's optimizer has the flat weights, of which Adam keeps the state,
    in a list of its own; ZeRO-2 besides finds the moments of single weights only after it has
    linked them.

    Args:
        zero: DeepSpeed's optimizer.
    """
    stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
    flats = zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups
    for flat in flats:
        step = torch.zeros((), device=flat.device)
        zero.state[flat] = {
            "step": step,
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    if not stage_3:
        zero._lazy_init_hp_params_optimizer_state()


def disable_shared_memory() -> None:
    """CPU ranks exchange tensors through gloo, not through DeepSpeed's own shared memory.

    Its kernel waits for a rank that has died while it holds Python's lock, so that nothing in this
    process can say which rank it was. Private, because no setting turns it off: DeepSpeed takes it
    wherever it can be compiled.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
