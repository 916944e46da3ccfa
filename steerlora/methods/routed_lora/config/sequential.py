"""Configuration of kinds of low-rank adaptation that are made for sequences of domains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval

from steerlora.config.ranges import Positive, Share
from steerlora.errors import UserError
from steerlora.methods.config import method
from steerlora.methods.routed_lora.config.routed import RoutedLoRAConfig

if TYPE_CHECKING:
    from steerlora.config import Config
    from steerlora.methods.base import Method
    from steerlora.methods.routed_lora.subspaces import SubspaceLearner


@method("analytic_lora")
@dataclass(frozen=True, kw_only=True)
class AnalyticLoRAConfig(RoutedLoRAConfig):
    """Specialists told apart by ridge regression (Any-SSR; ``task_routers.py``)."""

    kind: str = "analytic_lora"
    """Registered name of the kind."""
    expansion: Annotated[int, Interval(ge=1, le=2**16)] = 1024
    """Random features that the router's signal is expanded to, from 1. Published: 10,000, of a
    hidden width of 4,096."""
    ridge: Positive = 100.0
    """Weight of the ridge penalty, above 0; texts weigh 1 each. Published: 100."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router != "least_squares":
            raise UserError(
                f"method.router={self.router}: method.kind={self.kind} routes by least squares: "
                "set method.router=least_squares"
            )


@method("subspace_lora")
@dataclass(frozen=True, kw_only=True)
class SubspaceLoRAConfig(RoutedLoRAConfig):
    """LoRAs that are summed, each in a subspace that earlier domains leave free (InfLoRA;
    ``subspaces.py``)."""

    kind: str = "subspace_lora"
    """Registered name of the kind."""
    kept_first: Share = 0.95
    """Share of the variance of a domain's inputs that later domains must leave alone, as the first
    domain ends, from 0 to 1. Published: 0.95 to 0.99."""
    kept_last: Share = 1.0
    """The share that it rises towards, domain by domain, from 0 to 1. Published: 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.routed or self.isolation != "own":
            raise UserError(
                f"method.kind={self.kind} sums a LoRA a domain: set method.signal=none and "
                "method.isolation=own"
            )
        if self.kept_last < self.kept_first:
            raise UserError(
                f"method.kept_last={self.kept_last} is less than method.kept_first="
                f"{self.kept_first}"
            )

    def check(self, config: Config) -> None:
        super().check(config)
        if config.trainer.strategy.startswith("zero"):
            raise UserError(
                f"method.kind={self.kind} reads the inputs of every adapted layer on one rank: set "
                "trainer.strategy=single or ddp"
            )

    def learner(self, method: Method, **settings: Any) -> SubspaceLearner:
        from steerlora.methods.routed_lora.subspaces import SubspaceLearner

        return SubspaceLearner(method=method, **settings)
