"""Which parts methods have in a report, and how they look in its tables and figures.

A report names no method: the experiment says which method's claims are measured, against which
others, and in which order all are shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from steerlora.evaluation.records import BASE
from steerlora.reporting.labels import in_order

OWN_COLOUR, UNKNOWN_COLOUR = "#D55E00", "#000000"
COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#888888", "#F0E442"),
    *("#332288", "#882255", "#117733"),
)
MARKERS = "vsD<>h^"
WHITE_EDGE = {"markeredgecolor": "white", "markeredgewidth": 0.5}


@dataclass(frozen=True, kw_only=True)
class Methods:
    """The methods of an experiment, by the names that records have them under."""

    paper: str
    """The paper's method: what the claims are about."""
    baseline: str
    """Plain LoRA: what forgetting is compared with."""
    dense: str
    """The paper's method with hidden states in place of SAE features (claim C8)."""
    own: str
    """The project's own method."""
    variants: dict[str, str] = field(default_factory=dict)
    """{a method that is ``own`` with one thing changed: what is changed}."""
    order: tuple[str, ...] = ()
    """How tables and figures order methods; others follow as they come."""
    colours: dict[str, str] = field(default_factory=dict)
    """{method: its colour, in every report}; other methods have what is left of `COLOURS`."""

    def sorted(self, names: Iterable[str]) -> list[str]:
        """The distinct names, the base model's first."""
        return in_order(names, (BASE, *self.order))

    def label(self, name: str) -> str:
        """What a table calls a method."""
        return "base" if name == BASE else name

    def long_label(self, name: str) -> str:
        """The same, a variant by what is changed in ``own``."""
        return f"{self.own}: {self.variants[name]}" if name in self.variants else name

    def short_label(self, name: str) -> str:
        """What a figure, which shows ``own`` above its variants, calls a method."""
        return f"… {self.variants[name]}" if name in self.variants else name

    def colour(self, name: str) -> str:
        """The same in every figure; ``own`` shares its colour with its variants."""
        if name == self.own or name in self.variants:
            return OWN_COLOUR
        if name in self.colours:
            return self.colours[name]
        known = {self.own, *self.variants, *self.colours}
        others = [one for one in self.order if one not in known]
        if name not in others:
            return UNKNOWN_COLOUR
        free = [colour for colour in COLOURS if colour not in self.colours.values()] or COLOURS
        return free[others.index(name) % len(free)]

    def marker(self, name: str) -> dict[str, Any]:
        """Arguments of matplotlib: filled dots, and hollow shapes for variants of ``own``."""
        colour = self.colour(name)
        if name not in self.variants:
            return {"marker": "o", "color": colour, "markersize": 7} | WHITE_EDGE
        shape = MARKERS[list(self.variants).index(name) % len(MARKERS)]
        return {"marker": shape, "color": colour, "markerfacecolor": "white", "markersize": 6}
