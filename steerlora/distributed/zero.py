"""DeepSpeed's ZeRO under Lightning, on whatever accelerator there is.

Weights that train are float32. Mixed precision is torch's autocast: DeepSpeed's own bfloat16 mode
would cast the router and every trained weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch import Tensor, nn

from steerlora.config import TrainerConfig
from steerlora.distributed import ranks, shards
from steerlora.distributed.deepspeed_private import disable_shared_memory
from steerlora.distributed.placement import StartedRanks, StaysInPlace

FOREVER = timedelta(days=1)


def sharding_settings(trainer: TrainerConfig) -> dict[str, Any]:
    """DeepSpeed's configuration under which a model is opened sharded, in a process group."""
    ranks.ensure_process_group()
    return ZeroStrategy(trainer).config


class AutocastPrecision(DeepSpeedPrecision):
    """Full precision under DeepSpeed, with torch's autocast around the forward where asked for."""

    def __init__(self, precision: str) -> None:
        super().__init__("32-true")
        self._autocast = precision == "bf16-mixed"

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def forward_context(self) -> AbstractContextManager:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self._autocast)


class ZeroStrategy(StaysInPlace, DeepSpeedStrategy):
    """DeepSpeed's ZeRO on whatever accelerator there is, CPU ranks over gloo among them.

    Args:
        trainer: which stage, whether it offloads, precision.
    """

    def __init__(self, trainer: TrainerConfig) -> None:
        super().__init__(
            cluster_environment=StartedRanks(),
            stage=int(trainer.strategy[-1]),
            offload_optimizer=trainer.offload,
            offload_parameters=trainer.offload and trainer.strategy == "zero3",
            overlap_comm=torch.cuda.is_available(),
            pin_memory=torch.cuda.is_available(),
            process_group_backend="nccl" if torch.cuda.is_available() else "gloo",
            timeout=FOREVER,
            precision_plugin=AutocastPrecision(trainer.precision),
        )
        self._wholes: dict[nn.Parameter, Tensor] = {}
        disable_shared_memory()
        self.config["zero_force_ds_cpu_optimizer"] = False
        zero = self.config["zero_optimization"]
        if trainer.strategy == "zero3":
            zero["stage3_param_persistence_threshold"] = trainer.persistent_elements
            zero["stage3_model_persistence_threshold"] = max(trainer.persistent_elements, 1) * 10**6

    def setup_environment(self) -> None:
        ranks.ensure_process_group()
        super(DeepSpeedStrategy, self).setup_environment()  # DeepSpeedStrategy's refuses a CPU

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        device = self.parallel_devices[self.local_rank]
        # DeepSpeed compares the index with the local rank, and a CPU has none.
        return torch.device("cpu", self.local_rank) if device.type == "cpu" else device

    def setup(self, trainer: L.Trainer) -> None:
        # What zero.Init sharded is placed; adapters, SAEs and buffers are not.
        self.model.to(self.root_device)
        for parameter in self.model.parameters():  # DeepSpeed sends weights as bytes, row by row
            parameter.data = parameter.data.contiguous()
        super().setup(trainer)

    def _init_optimizers(self):
        optimizer, schedule = super()._init_optimizers()
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        return optimizer, schedule

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimizer, which holds the shards."""
        return self.deepspeed_engine.optimizer

    @property
    def gradient_norm(self) -> float:
        """Of the last step, before clipping."""
        return float(self.deepspeed_engine.get_global_grad_norm() or 0.0)

    # Checkpoints: the whole state on rank 0, in the form that one process would write

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        return shards.whole_state(self.lightning_module)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return shards.whole_moments(self.trained, self.zero)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath, storage_options=None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path, weights_only=None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        shards.restore_state(self.lightning_module, checkpoint["state_dict"])

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        shards.restore_moments(self.trained, self.zero, checkpoint["optimizer_states"][0])

    # What trained becomes plain, whole parameters again when a fit ends

    def on_train_end(self) -> None:
        self._wholes = shards.whole_weights(self.lightning_module)

    def teardown(self) -> None:
        module, engine = self.lightning_module, self.model
        if engine is not None and engine is not module:
            engine.destroy()
            shards.replace(module, self._wholes)
        super().teardown()
