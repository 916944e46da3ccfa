"""Configurations of the SAE architectures that come with the package; free of torch.

``SAES`` holds one configuration class an architecture: ``@sae("name")``.
"""

from __future__ import annotations

from dataclasses import dataclass

from steerlora.config.checks import positive
from steerlora.errors import UserError
from steerlora.registry import Registry

SAES: Registry[type[SAEConfig]] = Registry(
    "sae.architecture", "steerlora.saes.config", "steerlora.saes.*"
)
sae = SAES.register


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """A sparse autoencoder of a control site's activations: what every architecture has."""

    architecture: str = "topk"
    """Registered name of the architecture."""
    path: str | None = None
    """Trained SAEs to use: a folder in SAELens' layout, or a folder of such folders called by their
    hook names (``blocks.<site>.hook_resid_pre``); a Qwen-Scope folder or hub id, which has one for
    every site but 0. Null trains one a site."""
    latents: int = 512
    """N, from 1."""
    max_tokens: int = 200_000
    """Tokens of activations that are harvested, over all domains."""
    steps: int = 1000
    """Optimizer steps, from 1."""
    batch_size: int = 1024
    """Tokens a step, from 1."""
    learning_rate: float | None = None
    """Adam's peak rate; null: 2e-4 / sqrt(latents / 2**14)."""
    seed: int = 0
    """Of initialisation and token order."""

    def __post_init__(self) -> None:
        positive(
            "sae",
            latents=self.latents,
            max_tokens=self.max_tokens,
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
        )


@sae("topk")
@dataclass(frozen=True, kw_only=True)
class TopKConfig(SAEConfig):
    """TopK (Gao et al., arXiv 2406.04093): the k largest pre-activations of every token."""

    architecture: str = "topk"
    k: int = 16
    """Active latents of a token, from 1 to ``latents``."""
    auxiliary: float = 1 / 32
    """Weight of the auxiliary loss that revives dead latents, from 0 (off)."""
    dead_fraction: float = 0.1
    """A latent is dead that has not fired for this share of the training's tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("sae", k=self.k)
        if self.k > self.latents:
            raise UserError(
                f"sae.k={self.k} is more than sae.latents={self.latents}: "
                "a token cannot have more active latents than there are"
            )
