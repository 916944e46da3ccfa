"""Ranks: the processes that one training is divided over.

They are started from outside, by torchrun or srun; nothing here ever starts a process. Besides
tensors, they exchange values through their `group.Group`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from steerlora.errors import RankGone

if TYPE_CHECKING:
    from steerlora.distributed.group import Group

_joined: Group | None = None


class Ranks(NamedTuple):
    """Which process this is.

    Attributes:
        rank, world: number of this process among all, and how many there are.
        local_rank, local_world: the same on this machine; the local rank is the GPU's number.
        address, port: of the rendezvous store, on the machine of rank 0.
        launcher: "torchrun", "srun", or "" for one process on its own.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    launcher: str = ""


def current() -> Ranks:
    """This process's rank, from the environment that torchrun or srun gives it."""
    env = os.environ
    # torchrun sets all of them; Lightning sets some in any process that it has trained in.
    if int(env.get("WORLD_SIZE", "1")) > 1 and {"RANK", "LOCAL_WORLD_SIZE"} <= {*env}:
        return Ranks(
            rank=int(env["RANK"]),
            world=int(env["WORLD_SIZE"]),
            local_rank=int(env.get("LOCAL_RANK", "0")),
            local_world=int(env.get("LOCAL_WORLD_SIZE", "1")),
            address=env.get("MASTER_ADDR", "127.0.0.1"),
            port=int(env.get("MASTER_PORT", "29500")),
            launcher="torchrun",
        )
    # Of the step, which only srun sets: a batch script has the job's SLURM_NTASKS, and is alone.
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env:
        tasks = env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"])
        return Ranks(
            rank=int(env["SLURM_PROCID"]),
            world=int(env["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(env["SLURM_LOCALID"]),
            local_world=int(tasks.split(",")[0].split("(")[0]),
            address=env.get("MASTER_ADDR") or _first_host(env["SLURM_STEP_NODELIST"]),
            port=int(env.get("MASTER_PORT") or _port_of_job(env)),
            launcher="srun",
        )
    return Ranks()


def _first_host(nodes: str) -> str:
    from lightning.fabric.plugins.environments import SLURMEnvironment

    return SLURMEnvironment.resolve_root_node_address(nodes)


def _port_of_job(env: Mapping[str, str]) -> int:
    """The same on every node, and another for every step: several jobs may share a machine."""
    return 15000 + (int(env["SLURM_JOB_ID"]) * 7 + int(env.get("SLURM_STEP_ID", "0"))) % 20000


def is_main() -> bool:
    """Whether this process is the one that writes, logs and prints."""
    return current().rank == 0


def reports(error: BaseException) -> bool:
    """Whether this process prints why it ends.

    An error of all ranks is printed by rank 0. Before they have joined, nobody knows whether it is
    an error of all, and the first rank of every machine prints it.
    """
    here = current()
    alone = here.world > 1 and _joined is None
    return here.rank == 0 or isinstance(error, RankGone) or (alone and here.local_rank == 0)


@contextmanager
def joined(description: Mapping[str, Any]) -> Iterator[None]:
    """Inside, this process is in the group of all ranks, which monitors that none of them ends.

    Args:
        description: the configuration in plain types, which has to be every rank's.

    Raises:
        UserError: a rank was started with another configuration, or does not join.
        RankGone: another rank ended, or sends no heartbeat, while this one is at work.
    """
    global _joined
    if current().world == 1:
        yield
        return
    from steerlora.distributed.group import Group

    _joined = _joined or Group(current())
    try:
        with _joined.monitoring():
            _joined.agree(description)
            yield
            _joined.barrier()
    except BaseException as error:
        _joined.fail(error)
        raise
    finally:
        _joined.leave()


def broadcast(value: Any = None) -> Any:
    """Rank 0's JSON value, on every rank; with one process, the value itself."""
    return value if _joined is None else _joined.broadcast(value)


def barrier() -> None:
    """Wait until every rank is here, however long the slowest takes."""
    if _joined is not None:
        _joined.barrier()


def ensure_process_group() -> None:
    """Give this process what DeepSpeed requires of any: LOCAL_RANK in its environment, which only
    torchrun sets, and a process group. Where there is none yet, it becomes a group of one."""
    import torch.distributed as dist

    os.environ["LOCAL_RANK"] = str(current().local_rank)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
