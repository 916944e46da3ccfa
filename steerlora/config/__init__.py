"""The typed configuration: what every key means, its unit, and what it may be.

Hydra composes YAML; ``steerlora.cli.compose`` turns the result into these dataclasses once, at the
door. Everything behind it sees plain frozen dataclasses. A file a theme; what concerns several
sections is checked here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from steerlora.config.checks import one_of
from steerlora.config.course import ContinualConfig
from steerlora.config.domains import DomainsConfig, SourceConfig
from steerlora.config.evaluation import EvaluationConfig
from steerlora.config.method import (
    QWEN3_LINEAR,
    AdapterConfig,
    ControlConfig,
    FeaturesConfig,
    InterventionConfig,
    RoutingConfig,
    SAEConfig,
)
from steerlora.config.model import ModelConfig
from steerlora.config.order import OrderConfig
from steerlora.config.run import (
    STAGES,
    ArtifactsConfig,
    LoggerConfig,
    PlanConfig,
    ResultsConfig,
    StageConfig,
    StudyConfig,
)
from steerlora.config.trainer import TrainerConfig
from steerlora.errors import UserError

__all__ = [
    "GROUPS",
    "QWEN3_LINEAR",
    "STAGES",
    "AdapterConfig",
    "ArtifactsConfig",
    "Config",
    "ContinualConfig",
    "ControlConfig",
    "DomainsConfig",
    "EvaluationConfig",
    "FeaturesConfig",
    "InterventionConfig",
    "LoggerConfig",
    "ModelConfig",
    "OrderConfig",
    "PlanConfig",
    "ResultsConfig",
    "RoutingConfig",
    "SAEConfig",
    "SourceConfig",
    "StageConfig",
    "StudyConfig",
    "TrainerConfig",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, whole.

    Attributes:
        stage: the stage to run; null with an experiment.
        seed: of adapters, their data order and the interventions' draws. Domains, base and SAE have
            seeds of their own, so that a sweep over this one trains them once.
    """

    stage: StageConfig | None = None
    model: ModelConfig
    domains: DomainsConfig
    sae: SAEConfig
    control: ControlConfig
    features: FeaturesConfig
    adapter: AdapterConfig
    routing: RoutingConfig
    intervention: InterventionConfig
    order: OrderConfig
    continual: ContinualConfig
    trainer: TrainerConfig
    evaluation: EvaluationConfig
    plan: PlanConfig
    logger: LoggerConfig
    study: StudyConfig
    artifacts: ArtifactsConfig
    results: ResultsConfig
    seed: int = 0

    def __post_init__(self) -> None:
        if max(self.control.sites) >= self.model.layers:
            raise UserError(
                f"control.sites={self.control.sites}: {self.model.name} has layers 0 to "
                f"{self.model.layers - 1}"
            )
        if (self.control.monitor or 0) > self.model.layers:
            raise UserError(
                f"control.monitor={self.control.monitor}: {self.model.name} has "
                f"{self.model.layers} layers; {self.model.layers} is the stream that leaves them"
            )
        self._check_method()
        if self.model.path is None:
            for name in self.adapter.target_modules or ():
                if name.isidentifier():  # else a path or a pattern, which the model itself judges
                    one_of("adapter.target_modules", name, QWEN3_LINEAR)
        if self.domains.kind == "text" and not self.domains.dir:
            raise UserError("domains.dir is not set: domains.dir=<folder of <domain>_train.jsonl>")
        if self.order.kind == "given" and sorted(self.order.sequence) != sorted(self.domains.names):
            raise UserError(
                f"order.sequence={self.order.sequence}: name each domain once, of "
                f"{', '.join(self.domains.names)}"
            )
        orders = math.factorial(len(self.domains.names))
        if self.order.kind == "permutation" and self.order.index >= orders:
            raise UserError(
                f"order.index={self.order.index}: {len(self.domains.names)} domains have "
                f"{orders} orders, 0 to {orders - 1}"
            )
        for name in self.intervention.domains:
            one_of("intervention.domains", name, self.domains.names)
        for site in self.intervention.sites:
            if site not in self.control.sites:
                raise UserError(
                    f"intervention.sites={self.intervention.sites}: the control sites are "
                    f"{self.control.sites}"
                )

    def _check_method(self) -> None:
        """Settings of several sections that make no method together."""
        adapter, continual, domains = self.adapter, self.continual, len(self.domains.names)
        if adapter.monitored and self.control.monitor is None:
            raise UserError(
                "adapter.preservation and adapter.steering compare features at a monitor site: "
                "set control.monitor=<layer>, such as the number of layers"
            )
        if self.control.source == "base_last" and adapter.routing == "sae":
            raise UserError(
                "control.source=base_last reads hidden states: set adapter.routing=dense"
            )
        if self.control.source == "base_last" and adapter.router == "prototype":
            raise UserError(
                "adapter.router=prototype reads the streams at its sites: set "
                "control.source=inline or base"
            )
        if continual.specialists == "frozen" and adapter.routing == "none":
            raise UserError(
                "continual.specialists=frozen freezes what routing chose most, and "
                f"adapter={adapter.name} has no routing: set it to free or own"
            )
        if adapter.router == "prototype" and adapter.specialists < domains:
            raise UserError(
                f"adapter.router=prototype has a specialist a domain: set adapter.specialists "
                f"to at least {domains}"
            )
        if continual.specialists == "own" and adapter.specialists < domains:
            raise UserError(
                f"continual.specialists=own needs a specialist a domain: set adapter.specialists "
                f"to at least {domains}"
            )
        if continual.specialists != "free" and self.trainer.weight_decay:
            raise UserError(
                f"continual.specialists={continual.specialists}: weight decay would shrink the "
                "frozen ones: set trainer.weight_decay=0"
            )
        if continual.memory and (adapter.routing != "sae" or adapter.router == "prototype"):
            raise UserError(
                "continual.memory=true needs a learnt router of SAE features: set "
                "adapter.routing=sae and adapter.router=linear or mlp"
            )
        if adapter.orthogonality and continual.specialists != "own":
            raise UserError(
                "adapter.orthogonality keeps an arriving domain's specialist apart from the "
                "others: set continual.specialists=own"
            )


GROUPS: dict[str, type] = {
    "stage": StageConfig,
    "model": ModelConfig,
    "domains": DomainsConfig,
    "sae": SAEConfig,
    "control": ControlConfig,
    "features": FeaturesConfig,
    "adapter": AdapterConfig,
    "routing": RoutingConfig,
    "intervention": InterventionConfig,
    "order": OrderConfig,
    "continual": ContinualConfig,
    "trainer": TrainerConfig,
    "evaluation": EvaluationConfig,
    "plan": PlanConfig,
    "logger": LoggerConfig,
    "study": StudyConfig,
    "artifacts": ArtifactsConfig,
    "results": ResultsConfig,
}
"""The sections of a configuration and their types."""
