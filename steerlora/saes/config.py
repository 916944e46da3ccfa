"""Configurations of the SAE architectures that come with the package; free of torch.

``SAES`` holds one configuration class an architecture: ``@sae("name")``. A file of this package, or
a module of the user's (``plugins``), may hold a configuration and its module together.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from steerlora.config.checks import not_negative, one_of, positive, share
from steerlora.errors import UserError
from steerlora.registry import Registry

if TYPE_CHECKING:
    from steerlora.saes.base import SparseAutoencoder

SAES: Registry[type[SAEConfig]] = Registry(
    "sae.architecture", "steerlora.saes.config", "steerlora.saes.*"
)
sae = SAES.register

NORMALIZATIONS = ("none", "layer_norm")


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """A sparse autoencoder of a control site's activations: what every architecture has.

    An architecture is a subclass that adds the fields that its module takes as keyword arguments,
    and says by :meth:`module` which class that is.
    """

    architecture: str = "topk"
    """Registered name of the architecture."""
    path: str | None = None
    """Trained SAEs to use: a folder in SAELens' layout, or a folder of such folders called by their
    hook names (``blocks.<site>.hook_resid_pre``); a Qwen-Scope folder or hub id, which has one for
    every site but 0. Their files say what they are, and no other key counts. Null trains one a
    site."""
    latents: int = 512
    """N, from 1."""
    normalize: str = "none"
    """What is done to every activation before it is encoded, and undone after decoding: "none", or
    "layer_norm" (zero mean, unit deviation)."""
    max_tokens: int = 200_000
    """Tokens of activations that are harvested, over all domains."""
    steps: int | None = 1000
    """Optimizer steps, from 1; null where ``epochs`` is given."""
    epochs: int | None = None
    """Passes over the harvested tokens, from 1, which then decide the number of steps; null where
    ``steps`` is given."""
    batch_size: int = 1024
    """Tokens a step, from 1."""
    learning_rate: float | None = None
    """Adam's peak rate; null: 2e-4 / sqrt(latents / 2**14)."""
    dead_fraction: float = 0.1
    """A latent is dead that has not fired for this share of the training's tokens."""
    seed: int = 0
    """Of initialisation and token order."""

    def __post_init__(self) -> None:
        positive(
            "sae", self, "latents max_tokens steps epochs batch_size learning_rate dead_fraction"
        )
        share("sae", self, "dead_fraction")
        one_of("sae.normalize", self.normalize, NORMALIZATIONS)
        if (self.steps is None) == (self.epochs is None):
            raise UserError(
                f"sae.steps={self.steps} and sae.epochs={self.epochs}: give one of them, and null "
                "for the other"
            )

    @classmethod
    def module(cls) -> type[SparseAutoencoder]:
        """The class of the SAE, imported here: composing a configuration needs no torch."""
        raise NotImplementedError

    def build(self, width: int) -> SparseAutoencoder:
        """The SAE, untrained, of activations of this width."""
        common = {field.name for field in fields(SAEConfig)}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in common}
        return self.module()(width, self.latents, normalize=self.normalize, seed=self.seed, **own)

    def steps_over(self, tokens: int) -> int:
        """Optimizer steps of a training on so many harvested tokens."""
        if self.epochs is None:
            return self.steps
        return max(1, self.epochs * tokens // self.batch_size)


@sae("topk")
@dataclass(frozen=True, kw_only=True)
class TopKConfig(SAEConfig):
    """TopK (Gao et al., arXiv 2406.04093): the k largest pre-activations of every token."""

    architecture: str = "topk"
    k: int = 16
    """Active latents of a token, from 1 to ``latents``."""
    auxiliary: float = 1 / 32
    """Weight of the auxiliary loss that revives dead latents, from 0 (off)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("sae", self, "k")
        not_negative("sae", self, "auxiliary")
        if self.k > self.latents:
            raise UserError(
                f"sae.k={self.k} is more than sae.latents={self.latents}: "
                "a token cannot have more active latents than there are"
            )

    @classmethod
    def module(cls) -> type[SparseAutoencoder]:
        from steerlora.saes.topk import TopK

        return TopK


@sae("relu")
@dataclass(frozen=True, kw_only=True)
class ReLUConfig(SAEConfig):
    """ReLU with an L1 penalty (Cunningham et al., arXiv 2309.08600): every positive latent."""

    architecture: str = "relu"
    l1: float = 1e-3
    """Weight of the L1 norm of a token's features beside the fraction of variance unexplained, from
    0 (off)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("sae", self, "l1")

    @classmethod
    def module(cls) -> type[SparseAutoencoder]:
        from steerlora.saes.relu import ReLU

        return ReLU
