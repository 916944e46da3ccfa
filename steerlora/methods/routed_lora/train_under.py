"""Training under an intervention: the retrained controls.

B batch, E specialists.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import lightning as L
from lightning.pytorch.callbacks import Callback

from steerlora.config import InterventionConfig
from steerlora.data.batches import ChatBatch
from steerlora.methods.interventions import INTERVENTIONS, check_phase
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.interventions import Intervention


class TrainUnder(Callback):
    """Holds an intervention open from the first training step to the last.

    Before every step it tells the control the step, of which its draws are then a function (a
    resumed training draws the same), and every row's true domain.

    ``oracle_domain`` needs to know each domain's specialist before any is trained; where the
    adapter does not say, the domains are dealt to the active specialists in turn.

    Args:
        adapter: what trains.
        config: of the intervention.
        domain_names: the names that ``ChatBatch.domains`` counts in; -1 there is no domain.

    Raises:
        ValueError: a control that means nothing in training; on the first step, whatever
            ``Adapter.intervention`` refuses.
    """

    def __init__(
        self,
        adapter: Adapter,
        config: InterventionConfig,
        domain_names: Sequence[str],
    ) -> None:
        check_phase(config.name, "training")
        self.adapter, self.config, self.domain_names = adapter, config, tuple(domain_names)
        self._context = ExitStack()
        self._control: Intervention | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: ChatBatch, batch_idx: int
    ) -> None:
        # Opened here, not at the start: a training that resumes at its end has no step to control.
        if self._control is None:
            if INTERVENTIONS[self.config.name].needs_domain:
                self._deal_domains()
            opened = self.adapter.intervention(
                self.config.name,
                seed=self.config.seed,
                strength=self.config.strength,
                sites=self.config.sites,
                domains=self.config.domains,
            )
            self._control = self._context.enter_context(opened)
        self.begin(trainer.global_step, batch)

    def begin(self, step: int, batch: ChatBatch) -> None:
        """Tell the control of the forward that comes: the step, of which its draws are a function,
        and every row's domain."""
        owners = batch.domains.tolist()
        self._control.begin(
            step, [self.domain_names[owner] if owner >= 0 else None for owner in owners]
        )

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._control = None
        self._context.close()

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        self._control = None
        self._context.__exit__(type(exception), exception, exception.__traceback__)

    def _deal_domains(self) -> None:
        active = self.adapter.available().nonzero().flatten().tolist()
        dealt = {d: active[i % len(active)] for i, d in enumerate(self.domain_names)}
        for site in self.adapter.sites.values():
            if site.facts is not None and not site.facts.specialist_of_domain:
                site.facts.specialist_of_domain = dict(dealt)
