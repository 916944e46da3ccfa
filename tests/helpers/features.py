"""Features of a made-up SAE, sorted by use."""

from __future__ import annotations

import torch

from steerlora.saes.taxonomy import Taxonomy


def taxonomy(latents: int = 64) -> Taxonomy:
    """Of two domains: every other latent is general, and each domain has some of the rest."""
    number = torch.arange(latents)
    general = number % 2 == 0
    domain = torch.stack([~general & (number % 3 == position) for position in range(2)])
    prototypes = torch.rand(2, latents, generator=torch.Generator().manual_seed(3)) * domain
    return Taxonomy(general, domain, prototypes, prototypes, torch.zeros(latents))
