"""The orders in which a sequence trains on the domains."""

from __future__ import annotations

import random
from itertools import islice, permutations

from steerlora.config import DomainsConfig, OrderConfig


def sequence_of(order: OrderConfig, domains: DomainsConfig) -> tuple[str, ...]:
    """The domains in the order that ``order`` says."""
    narrow = [name for name in domains.names if name != domains.broad]
    if order.kind == "broad_first":
        return (domains.broad, *narrow)
    if order.kind == "broad_last":
        return (*narrow, domains.broad)
    if order.kind == "given":
        return tuple(order.sequence)
    if order.kind == "permutation":
        return next(islice(permutations(domains.names), order.index, None))
    shuffled = list(domains.names)
    random.Random(order.seed).shuffle(shuffled)
    return tuple(shuffled)
