"""How features are sorted by use (stage ``features``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from steerlora.config.checks import Section
from steerlora.config.ranges import Count, Location, NotNegative, OneOf, Seed, Share

FREQUENCIES = ("domains", "general_text")
DRIFTS = ("mean", "token")
CONTROLS = ("none", "dense", "random", "shuffled_prototypes")


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(Section, key="features"):
    """How features are sorted into general ones and domains' own (stage ``features``)."""

    frequency: Annotated[str, OneOf(FREQUENCIES)] = "domains"
    """Text on which a general feature is frequent: "domains", where every domain counts alike, or
    "general_text", the base's pretraining text, as published."""
    general_quantile: Share = 0.7
    """A general feature's frequency is at or above this quantile, from 0 to 1."""
    largest_variation: NotNegative = 0.8
    """A general feature's coefficient of variation over domains is at most this, from 0."""
    domain_quantile: Share = 0.8
    """A domain's own feature stands out from the other domains at or above this quantile."""
    least: Annotated[int, Interval(ge=0, le=10**9)] = 64
    """Features of each sort at least, from 0; at most an eighth of ``sae.latents``."""
    instruct_model: Location | None = None
    """Folder or hub id of an instruction-tuned version of the base; general features must then also
    drift little between the two. Null: no such condition."""
    drift: Annotated[str, OneOf(DRIFTS)] = "mean"
    """A feature's drift: "mean", the change of its mean activation, or "token", the mean change of
    its activation at each token, as published."""
    drift_quantile: Share = 0.7
    """A general feature's drift is at or below this quantile, from 0 to 1."""
    control: Annotated[str, OneOf(CONTROLS)] = "none"
    """What stands in the place of the sorted features, as a control of what the sorting is worth:
    "none"; "dense", every feature is general and every domain's own; "random", as many of each
    sort, drawn by ``seed``; "shuffled_prototypes", every domain has the prototype of another."""
    seed: Seed = 0
    """Of ``control``."""
    shown: Count = 8
    """Strongest features listed for each domain, from 1."""
    examples: Count = 5
    """Tokens in context listed for each of them, from 1."""
