"""The order of the domains in a sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

from steerlora.config.checks import not_negative, one_of, positive


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """The order in which an adapter is trained on the domains, one after the other."""

    name: str = "broad_first"
    """The order's name in tables and labels."""

    kind: str = "broad_first"
    """How the order is found: "broad_first" and "broad_last" put ``domains.broad`` first or last
    and keep the others as listed, "random" shuffles by ``seed``, "permutation" takes number
    ``index`` of all orders, "given" takes ``sequence``."""

    sequence: list[str] = field(default_factory=list)
    """The domains in order, of ``domains.names``, each at most once and at least one. One that is
    longer than a stored one by its last domains goes on from there. Read by kind "given" only."""

    seed: int = 0
    """Seed of kind "random". At least 0."""

    index: int = 0
    """Number of the order for kind "permutation", among all orders of ``domains.names`` in
    lexicographic order of position. From 0 to the factorial of the number of domains, less 1."""

    steps_per_domain: int = 100
    """Optimizer steps of training on each domain. At least 1."""

    def __post_init__(self) -> None:
        one_of(
            "order.kind",
            self.kind,
            ("broad_first", "broad_last", "random", "permutation", "given"),
        )
        positive("order", self, "steps_per_domain")
        not_negative("order", self, "index")
