"""How ranks share a training: one device, data parallel, or DeepSpeed's ZeRO.

The arithmetic is one process's in every strategy, and what a checkpoint holds is the whole state,
gathered, whatever the sharding: a training may go on with another strategy, or on another number of
ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from steerlora.config import TrainerConfig
from steerlora.distributed import ranks, shards
from steerlora.distributed.deepspeed_private import check_version
from steerlora.distributed.placement import DataParallelStrategy, OneDeviceStrategy, StartedRanks
from steerlora.distributed.zero import ZeroStrategy
from steerlora.errors import UserError

ZERO_PRECISIONS = ("32-true", "bf16-mixed")


def check_hardware(trainer: TrainerConfig) -> None:
    """Refuse, before any work, what this machine or this number of ranks cannot run.

    Raises:
        UserError: no GPU for a preset that needs one; several ranks and a strategy for one; a
            precision that the strategy does not have; a DeepSpeed of another version.
    """
    world, strategy = ranks.current().world, trainer.strategy
    if trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={trainer.accelerator}: this machine has no GPU that torch can "
            "use; trainer=cpu runs anywhere, trainer.accelerator=auto takes what there is"
        )
    if trainer.accelerator == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            "trainer.accelerator=mps: this machine has no Apple GPU that torch can use; "
            "trainer=cpu runs anywhere, trainer.accelerator=auto takes what there is"
        )
    if strategy == "single" and world > 1:
        raise UserError(
            f"{world} ranks were started, and trainer.strategy=single uses one: "
            "choose trainer=ddp, zero2 or zero3"
        )
    if strategy.startswith("zero") and trainer.precision not in ZERO_PRECISIONS:
        raise UserError(
            f"trainer.precision={trainer.precision}: DeepSpeed here runs "
            f"{' or '.join(ZERO_PRECISIONS)}"
        )
    if strategy.startswith("zero"):
        check_version()


def check_divides(owner: str, batch_size: int, parts: int) -> None:
    """Refuse a batch that the ranks cannot share evenly.

    Raises:
        UserError: names the sizes that would do.
    """
    if batch_size % parts:
        below = batch_size // parts * parts
        near = f"{below} or {below + parts}" if below else f"{parts}"
        raise UserError(
            f"{owner}={batch_size}: {parts} equal parts ({ranks.current().world} ranks, each "
            f"{parts // ranks.current().world} in turn) cannot be made of it; use {near}"
        )


def engine(settings: TrainerConfig, **options: Any) -> L.Trainer:
    """Lightning's trainer for this process's rank.

    Args:
        settings: strategy, accelerator, precision, clipping, accumulation.
        options: of ``lightning.Trainer``.

    Raises:
        UserError: the accelerator is not there.
    """
    here = ranks.current()
    strategy, precision = _strategy(settings), settings.precision
    if isinstance(strategy, ZeroStrategy):
        # The strategy's own precision plugin runs autocast; Lightning must not ask for bfloat16.
        precision = None
    try:
        trainer = L.Trainer(
            accelerator=settings.accelerator,
            strategy=strategy,
            devices=1 if here.world == 1 else here.local_world,
            num_nodes=here.world // here.local_world,
            precision=precision,
            **options,
        )
    except MisconfigurationException as error:
        raise UserError(
            f"trainer.accelerator={settings.accelerator}: {str(error).splitlines()[0]}; "
            "trainer=cpu runs anywhere"
        ) from error
    # Signals are preemption's. Lightning's handler of SIGTERM ends a training that wants to save,
    # and talks to the other ranks from wherever it finds itself.
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


def _strategy(trainer: TrainerConfig) -> Strategy:
    if trainer.strategy.startswith("zero"):
        return ZeroStrategy(trainer)
    if ranks.current().world > 1:
        return DataParallelStrategy(
            cluster_environment=StartedRanks(),
            find_unused_parameters=False,
            gradient_as_bucket_view=True,
        )
    return OneDeviceStrategy(device=device_of_rank(trainer.accelerator))


def device_of_rank(accelerator: str) -> torch.device:
    """This rank's device under one of Lightning's accelerator names."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", ranks.current().local_rank)
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


@contextmanager
def editable(
    trainer: L.Trainer, parameters: Sequence[nn.Parameter], *, moments: bool = False
) -> Iterator[Mapping[nn.Parameter, dict[str, Tensor]]]:
    """Inside, trained weights are whole and may be changed in place, by every rank alike.

    Args:
        trainer: whose strategy may shard them.
        parameters: which.
        moments: the optimizer's state of them, which is yielded by weight, too.
    """
    if isinstance(trainer.strategy, ZeroStrategy):
        with shards.editing(parameters, trainer.strategy.zero, moments=moments) as states:
            yield states
    else:
        yield trainer.optimizers[0].state
