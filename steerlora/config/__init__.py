"""The typed configuration: what every key means, its unit, and what it may be.

Hydra composes YAML; ``steerlora.cli.compose`` turns the result into these dataclasses once. All
code behind it sees plain frozen dataclasses. Sections that several rooms share are declared here, a
file a theme; what only a method or an SAE needs is declared beside its code. What concerns several
sections is checked here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steerlora.config.checks import fitted, one_of
from steerlora.config.domains import DomainsConfig, SourceConfig
from steerlora.config.evaluation import EvaluationConfig
from steerlora.config.features import FeaturesConfig
from steerlora.config.intervention import InterventionConfig
from steerlora.config.model import ModelConfig
from steerlora.config.order import OrderConfig
from steerlora.config.ranges import Name, NotEmpty, Seed
from steerlora.config.run import (
    ArtifactsConfig,
    LoggerConfig,
    PlanConfig,
    ResultsConfig,
    StageConfig,
    StudyConfig,
)
from steerlora.config.trainer import TrainerConfig
from steerlora.errors import UserError

if TYPE_CHECKING:
    from steerlora.methods.config import MethodConfig
    from steerlora.saes.config import SAEConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, whole."""

    stage: StageConfig | None = None
    """The stage to run; null with an experiment."""
    model: ModelConfig
    domains: DomainsConfig
    sae: SAEConfig
    features: FeaturesConfig
    method: MethodConfig
    intervention: InterventionConfig
    order: OrderConfig
    trainer: TrainerConfig
    evaluation: EvaluationConfig
    plan: PlanConfig
    logger: LoggerConfig
    study: StudyConfig
    artifacts: ArtifactsConfig
    results: ResultsConfig
    seed: Seed = 0
    """Of methods, their data order and the interventions' draws. Domains, base and SAE have seeds
    of their own, so that a sweep over this one trains them once."""
    plugins: tuple[Name, ...] = ()
    """Modules of the user's that register methods, SAEs, interventions, routers or stages."""
    runs: tuple[NotEmpty, ...] = ()
    """What ``stage=compare`` compares: fingerprints (their beginnings will do), folders of
    artifacts, and sweeps by the name or the file of their table."""

    def __post_init__(self) -> None:
        fitted("seed", self.seed, Seed)
        fitted("plugins", self.plugins, tuple[Name, ...])
        fitted("runs", self.runs, tuple[NotEmpty, ...])
        method, model = self.method, self.model
        if max(method.sites) >= model.layers:
            raise UserError(
                f"method.sites={method.sites}: {model.name} has layers 0 to {model.layers - 1}"
            )
        if (method.monitor or 0) > model.layers:
            raise UserError(
                f"method.monitor={method.monitor}: {model.name} has {model.layers} layers; "
                f"{model.layers} is the stream that leaves them"
            )
        for site in (*method.sites, method.monitor or 0):
            last = max(self.sae.streams(site))
            if last > model.layers:
                raise UserError(
                    f"sae.architecture={self.sae.architecture} of site {site} is trained on the "
                    f"stream entering layer {last} too: {model.name} has {model.layers} layers"
                )
        method.check(self)
        if self.domains.kind in ("text", "classification") and not self.domains.dir:
            raise UserError("domains.dir is not set: domains.dir=<folder of <domain>_train.jsonl>")
        given = self.order.sequence
        if self.order.kind == "given" and (
            not given or len(set(given)) < len(given) or set(given) - set(self.domains.names)
        ):
            raise UserError(
                f"order.sequence={given}: name some of {', '.join(self.domains.names)}, each once"
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
            if site not in method.sites:
                raise UserError(
                    f"intervention.sites={self.intervention.sites}: the control sites are "
                    f"{method.sites}"
                )


SECTIONS: dict[str, type] = {
    "stage": StageConfig,
    "model": ModelConfig,
    "domains": DomainsConfig,
    "features": FeaturesConfig,
    "intervention": InterventionConfig,
    "order": OrderConfig,
    "trainer": TrainerConfig,
    "evaluation": EvaluationConfig,
    "plan": PlanConfig,
    "logger": LoggerConfig,
    "study": StudyConfig,
    "artifacts": ArtifactsConfig,
    "results": ResultsConfig,
}
"""The sections that have one type. ``method`` and ``sae`` have that of the kind they name."""
