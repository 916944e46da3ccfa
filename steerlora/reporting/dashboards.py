"""What latents of an SAE respond to and do to the model's output: records, and a page of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steerlora.reporting.html_page import render

BINS = 20
"""Of a histogram."""


@dataclass(frozen=True, kw_only=True)
class ContextShown:
    """Where a latent is active most: a token, and tokens around it."""

    value: float
    """Activation at the token."""
    source: str
    """The domain that the text is of."""
    tokens: tuple[str, ...]
    """Their text in order, spaces included."""
    activations: tuple[float, ...]
    """Of the latent at each of them; 0 where it is not active or does not count."""
    marked: int
    """Which of them the token is."""


@dataclass(frozen=True, kw_only=True)
class LogitEffect:
    """What a latent does to a token's logit."""

    token: str
    effect: float
    """Change of the logit, of a stream that is the latent's direction alone at the scale that the
    final norm gives it."""


@dataclass(frozen=True, kw_only=True)
class LatentShown:
    """One latent on one page."""

    latent: int
    """Its number."""
    domain: str
    """Whose own it is by the taxonomy; empty where it was asked for by number."""
    density: float
    """Share of the tokens on which it is active."""
    density_by_domain: dict[str, float]
    """The same of every domain's tokens."""
    largest: float
    """Its largest activation; 0 where it was never active."""
    histogram: tuple[int, ...]
    """Active tokens by activation, in `BINS` bins of equal width from 0 to ``largest``."""
    contexts: tuple[ContextShown, ...]
    """The strongest first, each of another row of text."""
    promoted: tuple[LogitEffect, ...]
    """The largest effects on logits, the largest first."""
    suppressed: tuple[LogitEffect, ...]
    """The smallest, the smallest first."""


def dashboard_page(latents: Sequence[LatentShown], *, title: str, tokens: int) -> str:
    """One page of HTML without anything to fetch.

    Args:
        latents: in the order of the page.
        title: of the page.
        tokens: on how many all was measured.
    """
    return render(
        "sae_dashboard.html",
        title=title,
        parts={},
        latents=latents,
        tokens=tokens,
        bars=[_bars(latent.histogram) for latent in latents],
        shades=[[_shades(context) for context in latent.contexts] for latent in latents],
    )


def _bars(histogram: Sequence[int]) -> list[float]:
    """Heights of a histogram's bars, in percent of the highest."""
    highest = max(histogram, default=0)
    return [100 * count / highest if highest else 0.0 for count in histogram]


def _shades(context: ContextShown) -> list[int]:
    """How strongly each token is coloured, in percent of the marked one's activation."""
    return [round(100 * min(1.0, value / context.value)) for value in context.activations]
