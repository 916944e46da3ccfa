"""The order of the domains in a sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Interval

from steerlora.config.checks import Section
from steerlora.config.ranges import Count, Distinct, Name, NotEmpty, OneOf, Seed

KINDS = ("broad_first", "broad_last", "random", "permutation", "given", "listed")


@dataclass(frozen=True, kw_only=True)
class OrderConfig(Section, key="order"):
    """The order in which an adapter is trained on the domains, one after the other."""

    name: Name = "broad_first"
    """The order's name in tables and labels."""

    kind: Annotated[str, OneOf(KINDS)] = "broad_first"
    """How the order is found: "broad_first" and "broad_last" put ``domains.broad`` first or last
    and keep the others as listed, "random" shuffles by ``seed``, "permutation" takes number
    ``index`` of all orders, "given" takes ``sequence``, "listed" takes the one that
    ``domains.dir`` lists under the name ``listed`` in its ``orders.json``."""

    sequence: Annotated[list[Name], Distinct()] = field(default_factory=list)
    """The domains in order, of ``domains.names``, each at most once and at least one. One that is
    longer than a stored one by its last domains goes on from there. Read by kind "given" only."""

    seed: Seed = 0
    """Seed of kind "random". At least 0."""

    index: Annotated[int, Interval(ge=0)] = 0
    """Number of the order for kind "permutation", among all orders of ``domains.names`` in
    lexicographic order of position. From 0 to the factorial of the number of domains, less 1."""

    listed: NotEmpty = "1"
    """Name of the order for kind "listed"."""

    steps_per_domain: Count = 100
    """Optimizer steps of training on each domain. At least 1."""
