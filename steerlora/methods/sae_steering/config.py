"""Configuration of steering by features; free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval, MinLen

from steerlora.config.ranges import Distinct, OneOf
from steerlora.errors import UserError
from steerlora.methods.config import MethodConfig, method

if TYPE_CHECKING:
    from torch import nn

    from steerlora.config import Config
    from steerlora.methods.base import Method, Sources

ALONG = ("latents", "vector")
HOW = ("set", "add")
Latent = Annotated[int, Interval(ge=0, le=2**31)]
Strength = Annotated[float, Interval(ge=-1e9, le=1e9)]


@method("sae_steering")
@dataclass(frozen=True, kw_only=True)
class SAESteeringConfig(MethodConfig):
    """The stream of one site is pushed, at every token that carries a signal: in the code of its
    SAE, or along a vector."""

    kind: str = "sae_steering"
    """Registered name of the kind."""
    along: Annotated[str, OneOf(ALONG)] = "latents"
    """What it pushes along: "latents" of the site's SAE, whose strengths are trained; or a
    "vector", which is trained, or given by who builds the method, and needs no SAE."""
    how: Annotated[str, OneOf(HOW)] = "set"
    """What a strength does to a latent: "set", it is the latent's activation; "add", it is added to
    that, down to 0. What the SAE does not reconstruct stays as it is."""
    latents: Annotated[list[Latent], MinLen(1), Distinct()] = field(default_factory=lambda: [0])
    """Latents that are changed, from 0."""
    strengths: Annotated[list[Strength], MinLen(1)] = field(default_factory=lambda: [1.0])
    """Of each latent, in the SAE's units, at the start of training; of a vector, the one number
    that it is multiplied by."""

    @property
    def reads_features(self) -> bool:
        return self.along == "latents"

    @property
    def steers_along(self) -> str:
        return self.along

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.sites) != 1:
            raise UserError(f"method.sites={self.sites}: method={self.name} steers at one site")
        if self.along == "vector" and len(self.strengths) != 1:
            raise UserError(
                f"method.strengths={self.strengths}: a vector has one strength, as in "
                "method.strengths=[1]"
            )
        if self.along == "latents" and len(self.strengths) != len(self.latents):
            raise UserError(
                f"method.strengths={self.strengths} are not one for each of method.latents="
                f"{self.latents}"
            )

    def check(self, config: Config) -> None:
        super().check(config)
        if not self.reads_features:
            return
        if len(config.sae.streams(0)) > 1:
            raise UserError(
                f"sae.architecture={config.sae.architecture} writes another stream than it reads: "
                f"method={self.name} needs an SAE that reconstructs what it reads"
            )
        if config.sae.path is None and max(self.latents) >= config.sae.latents:
            raise UserError(
                f"method.latents={self.latents}: the SAE has latents 0 to {config.sae.latents - 1}"
            )

    def build(self, model: nn.Module, sources: Sources, seed: int) -> Method:
        from steerlora.methods.sae_steering.steering import Steering

        saes = {site: given.sae for site, given in sources.saes.items()}
        method = Steering(self, model, saes)
        method.signal_tokens = sources.signal_tokens
        return method.attach(model)
