"""How well one rule tells domains apart by several signals, and when.

R rows of text, L levels of a condition.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from steerlora.evaluation.records import OfOneRun

SAE, UNTRAINED, PROJECTION, HIDDEN, LAST, WORDS = SIGNALS = (
    "sae",
    "untrained_sae",
    "projection",
    "hidden",
    "last_hidden",
    "words",
)
"""What a text is known by, as a mean over its tokens so far: features of the site's SAE; of an
untrained one of its shape; a random projection of the stream at the site to as many dimensions as
the SAE has latents; that stream; the final hidden states; the tokens' embeddings."""
TOKENS, SHARED, DOMAINS, NOISE, ROWS = CONDITIONS = (
    "tokens",
    "shared",
    "domains",
    "noise",
    "rows",
)
"""What varies: tokens of a text that have been seen; probability that a sentence is one that all
domains share; domains; share of the tokens that are random ones; training texts a domain."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two domains, told apart from each other."""

    domains: tuple[str, str]
    likeness: float
    """Cosine of how often either uses each token."""
    accuracy: dict[str, float]
    """{signal: share of the test rows that go to their own domain}."""


@dataclass(frozen=True, kw_only=True)
class RoutingSignals(OfOneRun):
    """Accuracy of the method's rule in every condition, the others at their reference."""

    site: int
    """Layer whose incoming stream the SAE reads."""
    levels: dict[str, list[float]]
    """{condition: its L levels, rising}."""
    accuracy: dict[str, dict[str, list[float]]]
    """{condition: {signal: [L] share of the test rows that go to their own domain}}."""
    chance: dict[str, list[float]]
    """{condition: [L] accuracy of a guess}."""
    best: dict[str, list[float]] = field(default_factory=dict)
    """{condition: [L] the most that can be reached}, where it is known."""
    pairs: tuple[Pair, ...] = ()
    """All pairs of the domains; none of made-up ones, which are alike by design."""
    items: int = 0
    """Test rows of the reference."""
