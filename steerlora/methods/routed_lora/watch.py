"""Routing health over the course of a training, and what to do when routing collapses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from steerlora.data.batches import ChatBatch
from steerlora.errors import UserError
from steerlora.lm.decoder import decoder_of
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.config import HealthConfig
from steerlora.methods.routed_lora.health import RoutingHealth, on_tokens

logger = logging.getLogger(__name__)


class RoutingWatch(Callback):
    """Measures the first control site's routing on the same text, every ``log_every`` steps.

    Training batches are of rows of like length, and so of few domains: their routing would say more
    of the batch than of the router. A control that the adapter trains under has no part in it.

    Each measurement is logged as ``routing/<name>`` and kept in ``history``: the step and
    `RoutingHealth.summary`. The history is part of the checkpoint; for it to hold the step of the
    checkpoint, this callback must come before the one that writes checkpoints. An adapter without
    a router has none.

    Args:
        adapter: the attached adapter in training.
        domain_names: what the domain ids of ``probe`` stand for.
        probe: rows of every domain that is trained on.
        config: when to measure, and what to do where the usage entropy over active specialists says
            that routing has collapsed (a warning is logged once a training).
    """

    def __init__(
        self,
        adapter: Adapter,
        domain_names: Sequence[str],
        probe: ChatBatch,
        config: HealthConfig,
    ) -> None:
        self.adapter, self.domain_names, self.probe = adapter, tuple(domain_names), probe
        self.config = config
        self.history: list[dict[str, float | int]] = []
        self.warned = False

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: ChatBatch,
        batch_idx: int,
    ) -> None:
        """Measure and log, and see whether routing has collapsed.

        Raises:
            UserError: routing has collapsed and ``collapse`` is "stop".
        """
        step = trainer.global_step
        if not self.adapter.sites or step % self.config.log_every:
            return
        measured = self._measure(module)
        self.history.append({"step": step, **measured})
        module.log_dict({f"routing/{name}": float(value) for name, value in measured.items()})
        if measured["usage_entropy"] < self.config.collapse_below:
            self._collapsed(step, measured["usage_entropy"])

    @torch.no_grad()
    def _measure(self, module: L.LightningModule) -> dict[str, float | int]:
        adapter, probe = self.adapter, self.probe.to(module.device)
        with adapter.unchanged():
            decoder_of(module.model)(
                input_ids=probe.input_ids, attention_mask=probe.attention_mask, use_cache=False
            )
        routing = adapter.sites[min(adapter.sites)].routing
        counted = adapter.with_signal(probe)
        health = RoutingHealth(
            self.domain_names, adapter.config.specialists, active=adapter.available()
        )
        gates, ranks = on_tokens(routing.gate, routing.mask, counted)
        health.update(gates, ranks, probe.domains[:, None].expand_as(counted)[counted])
        return health.summary()

    def _collapsed(self, step: int, entropy: float) -> None:
        found = (
            f"step {step}: routing has collapsed, usage entropy {entropy:.3f} of 1 is below "
            f"method.health.collapse_below={self.config.collapse_below}"
        )
        if self.config.collapse == "stop":
            raise UserError(
                f"{found}: raise method.losses.load_balance, or go on with "
                "method.health.collapse=warn"
            )
        if self.config.collapse == "warn" and not self.warned:
            self.warned = True
            logger.warning(
                "%s: raise method.losses.load_balance, or set method.health.collapse=stop", found
            )

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "warned": self.warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.warned = list(state_dict["history"]), state_dict["warned"]
