"""How features are sorted by use (stage ``features``)."""

from __future__ import annotations

from dataclasses import dataclass

from steerlora.config.checks import not_negative, one_of, positive, share

FREQUENCIES = ("domains", "general_text")
DRIFTS = ("mean", "token")
CONTROLS = ("none", "dense", "random", "shuffled_prototypes")


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """How features are sorted into general ones and domains' own (stage ``features``)."""

    frequency: str = "domains"
    """Text on which a general feature is frequent: "domains", where every domain counts alike, or
    "general_text", the base's pretraining text, as published."""
    general_quantile: float = 0.7
    """A general feature's frequency is at or above this quantile, from 0 to 1."""
    largest_variation: float = 0.8
    """A general feature's coefficient of variation over domains is at most this, from 0."""
    domain_quantile: float = 0.8
    """A domain's own feature stands out from the other domains at or above this quantile."""
    least: int = 64
    """Features of each sort at least, from 0; at most an eighth of ``sae.latents``."""
    instruct_model: str | None = None
    """Folder or hub id of an instruction-tuned version of the base; general features must then also
    drift little between the two. Null: no such condition."""
    drift: str = "mean"
    """A feature's drift: "mean", the change of its mean activation, or "token", the mean change of
    its activation at each token, as published."""
    drift_quantile: float = 0.7
    """A general feature's drift is at or below this quantile, from 0 to 1."""
    control: str = "none"
    """What stands in the place of the sorted features, as a control of what the sorting is worth:
    "none"; "dense", every feature is general and every domain's own; "random", as many of each
    sort, drawn by ``seed``; "shuffled_prototypes", every domain has the prototype of another."""
    seed: int = 0
    """Of ``control``."""
    shown: int = 8
    """Strongest features listed for each domain, from 1."""
    examples: int = 5
    """Tokens in context listed for each of them, from 1."""

    def __post_init__(self) -> None:
        share("features", self, "general_quantile domain_quantile drift_quantile")
        one_of("features.frequency", self.frequency, FREQUENCIES)
        one_of("features.drift", self.drift, DRIFTS)
        one_of("features.control", self.control, CONTROLS)
        positive("features", self, "shown examples")
        not_negative("features", self, "least largest_variation seed")
