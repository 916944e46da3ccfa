"""The orders in which a sequence trains on the domains."""

from __future__ import annotations

import random
from itertools import islice, permutations
from pathlib import Path

from steerlora.config import DomainsConfig, OrderConfig
from steerlora.engine.manifests import read_json
from steerlora.errors import UserError, nearest

ORDERS = "orders.json"
"""File of a folder of domains that lists orders: {name: [domain, ...]}."""


def sequence_of(order: OrderConfig, domains: DomainsConfig) -> tuple[str, ...]:
    """The domains in the order that ``order`` says.

    Raises:
        UserError: there is no broad domain to put first or last, or no such order is listed.
    """
    if order.kind == "given":
        return tuple(order.sequence)
    if order.kind == "listed":
        return _listed(order.listed, domains)
    if order.kind == "permutation":
        return next(islice(permutations(domains.names), order.index, None))
    if order.kind == "random":
        shuffled = list(domains.names)
        random.Random(order.seed).shuffle(shuffled)
        return tuple(shuffled)
    if domains.broad is None:
        raise UserError(
            f"order={order.kind}: none of domains={domains.name} is the broad one: give "
            "domains.broad=<domain>, or another order"
        )
    narrow = [name for name in domains.names if name != domains.broad]
    first = order.kind == "broad_first"
    return (domains.broad, *narrow) if first else (*narrow, domains.broad)


def _listed(name: str, domains: DomainsConfig) -> tuple[str, ...]:
    """An order of the folder's own."""
    if domains.dir is None:
        raise UserError(
            f"order=listed: domains={domains.name} come from no folder that could list orders: "
            "give another order"
        )
    path = Path(domains.dir) / ORDERS
    orders = read_json(path)
    if not isinstance(orders, dict) or not all(
        isinstance(order, list) and order and all(isinstance(task, str) for task in order)
        for order in orders.values()
    ):
        raise UserError(f"{path} lists no orders: write {{name: [domain, ...]}}")
    if name not in orders:
        raise UserError(f"order.listed={name}: {path} has no such order: {nearest(name, orders)}")
    sequence = orders[name]
    twice = sorted({task for task in sequence if sequence.count(task) > 1})
    if twice:
        raise UserError(f"{path}: order {name} names {twice[0]} twice: name each domain once")
    for task in sequence:
        if task not in domains.names:
            raise UserError(
                f"{path}: order {name} names {task}, which domains.names does not: "
                f"{nearest(task, domains.names)} (or add it to domains.names)"
            )
    return tuple(sequence)
