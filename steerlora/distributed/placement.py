"""Where a training runs: on a device that its model keeps, among ranks that are there already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from steerlora.distributed import ranks


class StaysInPlace:
    """Lightning moves a model to the CPU when a fit ends; ours is used on, where it is."""

    def teardown(self) -> None:
        module, self._lightning_module = self._lightning_module, None
        super().teardown()
        self._lightning_module = module


class LaysOutAlike:
    """The optimizer's state comes back from a checkpoint laid out in memory as its weights are.

    Fused optimizers read both as they lie: of a transposed weight, such as an SAE's encoder, the
    moments of one element would be taken for another's.
    """

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        for optimizer in self.optimizers:
            for weight, state in optimizer.state.items():
                for name, value in state.items():
                    if value.shape == weight.shape and value.stride() != weight.stride():
                        state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


class OneDeviceStrategy(LaysOutAlike, StaysInPlace, SingleDeviceStrategy):
    """One process on one device."""


class StartedRanks(ClusterEnvironment):
    """The ranks as torchrun or srun started them: Lightning starts none."""

    def __init__(self) -> None:
        super().__init__()
        self._ranks = ranks.current()

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self._ranks.address

    @property
    def main_port(self) -> int:
        return self._ranks.port

    @staticmethod
    def detect() -> bool:
        return ranks.current().world > 1

    def world_size(self) -> int:
        return self._ranks.world

    def global_rank(self) -> int:
        return self._ranks.rank

    def local_rank(self) -> int:
        return self._ranks.local_rank

    def node_rank(self) -> int:
        return self._ranks.rank // self._ranks.local_world

    def set_world_size(self, size: int) -> None:
        assert size == self._ranks.world, (size, self._ranks)

    def set_global_rank(self, rank: int) -> None:
        assert rank == self._ranks.rank, (rank, self._ranks)


class DataParallelStrategy(LaysOutAlike, StaysInPlace, DDPStrategy):
    """DistributedDataParallel over the ranks that are there."""

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu") if device.type == "cpu" else device
