"""Is the router using its specialists, and do specialists follow domains?

Shapes: T tokens that carry a signal, S sequences, E specialists, D domains; B batch,
L positions, M modules, R rank components.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike

from steerlora.data.batches import ChatBatch

if TYPE_CHECKING:
    from steerlora.methods.routed_lora.adapter import Adapter

DEAD_SHARE = 0.1
"""A specialist is dead when its mean usage is below this part of the uniform share 1 / E."""

RESERVOIR = 4096
"""Sequences kept for the permutation null: the only memory that grows, and it stops here."""

PERMUTATIONS = 200
"""Label permutations drawn for the null."""


def on_tokens(
    gate: torch.Tensor, mask: torch.Tensor, counted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `RoutingHealth.update` takes, from the routing of a batch.

    Args:
        gate: [B, L, E], or [B, L, M, E] where every module has a router of its own.
        mask: [B, L, R] or [B, L, M, R].
        counted: [B, L] bool, True on tokens that carry a signal.

    Returns:
        Gates [T, E] and ranks [T] of those tokens, means over the M modules.
    """
    gates, ranks = gate[counted], mask[counted].sum(-1)
    return (gates.mean(1), ranks.mean(1)) if gates.dim() == 3 else (gates, ranks)


class RoutingHealth:
    """Streaming statistics of gates and ranks over tokens that carry a signal, in constant memory.

    With ``g`` the gates [T, E] and ``usage`` their sum over tokens [E], scaled to sum to 1,
    `summary` gives

    - ``usage_entropy``: ``H(usage) / log E``; 1 is an even load, 0 is collapse;
    - ``token_entropy``: ``mean_t H(g_t) / log E``; 0 is a hard choice for every token;
    - ``load_cv2``: ``Var(usage) / mean(usage)^2`` (Shazeer et al. 2017, eq. 6);
    - ``dead_specialists``: how many have ``usage < DEAD_SHARE / E``;
    - ``max_load``: ``max usage``; 1 / E at best, 1 at worst;
    - ``mean_rank``: ``mean_t sum_j m_tj``, in rank components;

    and `result` these, and

    - ``routed``: share of the tokens that have an update at all;
    - ``mutual_information``: ``2 I(D; E) / (H(D) + H(E))`` of the soft joint distribution
      ``P(d, e) = mean_t [d_t = d] g_te`` (normalisation by the arithmetic mean, as in
      scikit-learn); 1 when every domain has a specialist of its own;
    - ``mutual_information_null``: the same with domain labels permuted, mean over permutations;
      ``mutual_information_null_95``: its 95th percentile, which chance exceeds once in 20;
    - ``rank_by_domain``; ``gate_by_domain``: mean gate of every domain [E]; ``tokens``: how many
      were seen.

    E counts active specialists only. One alone cannot collapse: its usage entropy is 1, its token
    entropy 0. A token whose gates are all zero, one that a null specialist took, uses no
    specialist and no rank: it counts in ``mean_rank`` and in the means by domain, as 0, and in no
    entropy or load. Where no token is routed, no specialist is used: usage entropy 0, all dead.

    Labels are permuted over sequences, not tokens: tokens of one text share both its label and
    its features, so permuting tokens would make any router look specialised. The null needs every
    sequence's gate sum, E numbers; a uniform sample of at most `RESERVOIR` of them is kept. With
    more sequences than that the null is slightly too large, which is the careful side.

    Args:
        domains: the D domain names; a domain id is a position in it.
        specialists: how many the gates have, inactive ones included.
        active: [specialists] bool, those that may be used; None: all.
        seed: of the reservoir and of the permutations.

    Raises:
        ValueError: no specialist is active, or ``active`` has another length.
    """

    def __init__(
        self,
        domains: Sequence[str],
        specialists: int,
        *,
        active: torch.Tensor | ArrayLike | None = None,
        seed: int = 0,
    ) -> None:
        self.active = np.ones(specialists, bool) if active is None else _array(active) > 0
        if self.active.shape != (specialists,) or not self.active.any():
            raise ValueError(
                f"routing health needs an active one of {specialists} specialists; got {active}"
            )
        self.domains = tuple(domains)
        self.specialists = specialists
        self.seed = seed
        self._generator = np.random.default_rng(seed)
        # One row more, the last, for tokens of no domain: their domain id is -1.
        self._gates = np.zeros((len(self.domains) + 1, specialists))
        self._ranks = np.zeros(len(self.domains) + 1)
        self._tokens = np.zeros(len(self.domains) + 1, dtype=np.int64)
        self._entropy, self._routed = 0.0, 0
        self._keys = np.zeros(0)
        self._unit_gates = np.zeros((0, specialists))
        self._unit_domains = np.zeros(0, dtype=np.int64)

    def update(
        self,
        gates: torch.Tensor | ArrayLike,
        ranks: torch.Tensor | ArrayLike,
        domains: torch.Tensor | ArrayLike,
        sequences: torch.Tensor | ArrayLike | None = None,
    ) -> None:
        """Add tokens. Those that carry no signal must already be left out.

        Args:
            gates: [T, E], non-negative, every row summing to 1 (to 0 where no update applies).
            ranks: [T], sum_j m_tj, in rank components.
            domains: [T], positions in ``domains``; -1 for a token of none.
            sequences: [T], which sequence of this call a token is from (any integers; such as the
                row of the batch). None: every domain's tokens in this call are one sequence.

        Raises:
            ValueError: shapes that do not fit, an unknown domain id, or a gate that is not finite.
        """
        gates = _array(gates)
        ranks, domains = _array(ranks), _array(domains).astype(np.int64)
        sequences = domains if sequences is None else _array(sequences).astype(np.int64)
        tokens = len(gates)
        if gates.shape != (tokens, self.specialists):
            raise ValueError(f"gates must be [tokens, {self.specialists}]; got {gates.shape}")
        if not (ranks.shape == domains.shape == sequences.shape == (tokens,)):
            raise ValueError(
                f"ranks, domains and sequences must be [{tokens}]; got {ranks.shape}, "
                f"{domains.shape} and {sequences.shape}"
            )
        if tokens == 0:
            return
        if domains.min() < -1 or domains.max() >= len(self.domains):
            raise ValueError(f"domain ids must be in 0..{len(self.domains) - 1}, or -1 for none")
        if not (np.isfinite(gates).all() and np.isfinite(ranks).all()):
            raise ValueError("gates and ranks must be finite")

        totals = gates.sum(axis=1)
        routed = totals > 0
        np.add.at(self._gates, domains, gates)
        np.add.at(self._ranks, domains, np.where(routed, ranks, 0.0))
        np.add.at(self._tokens, domains, 1)
        self._entropy += float(_entropy(gates[routed] / totals[routed, None], axis=1).sum())
        self._routed += int(routed.sum())
        owned = domains >= 0
        self._remember(gates[owned], domains[owned], sequences[owned])

    def _remember(self, gates: np.ndarray, domains: np.ndarray, sequences: np.ndarray) -> None:
        """Sum the gates of every sequence and keep a uniform sample of them (random keys)."""
        _, first, unit = np.unique(sequences, return_index=True, return_inverse=True)
        sums = np.zeros((len(first), self.specialists))
        np.add.at(sums, unit, gates)
        keys = np.concatenate([self._keys, self._generator.random(len(first))])
        sums = np.concatenate([self._unit_gates, sums])
        labels = np.concatenate([self._unit_domains, domains[first]])
        kept = np.argsort(keys)[:RESERVOIR]
        self._keys, self._unit_gates, self._unit_domains = keys[kept], sums[kept], labels[kept]

    def summary(self) -> dict[str, float | int]:
        """The first six statistics of the class docstring: cheap, and without domains.

        Raises:
            ValueError: no token was seen.
        """
        total = int(self._tokens.sum())
        if total == 0:
            raise ValueError("routing health of no tokens: call update first")
        usage = self._gates.sum(axis=0)[self.active]
        usage = usage / max(usage.sum(), 1e-12)
        count = len(usage)
        scale = float(np.log(count)) if count > 1 else 1.0
        return {
            "usage_entropy": float(_entropy(usage)) / scale if count > 1 else 1.0,
            "token_entropy": self._entropy / max(self._routed, 1) / scale,
            "load_cv2": float(usage.var() / max(usage.mean(), 1e-12) ** 2),
            "dead_specialists": int((usage < DEAD_SHARE / count).sum()),
            "max_load": float(usage.max()),
            "mean_rank": float(self._ranks.sum() / total),
        }

    def result(self) -> dict:
        """All statistics of the class docstring, as plain numbers for JSON.

        Domains without a token are left out of ``gate_by_domain`` and ``rank_by_domain``.

        Raises:
            ValueError: no token was seen.
        """
        summary = self.summary()
        total = int(self._tokens.sum())
        null = self._permuted()
        seen = [index for index in range(len(self.domains)) if self._tokens[index]]
        return {
            **summary,
            "routed": self._routed / total,
            "mutual_information": normalised_mutual_information(self._gates[:-1]),
            "mutual_information_null": float(null.mean()),
            "mutual_information_null_95": float(np.quantile(null, 0.95)),
            "gate_by_domain": {
                self.domains[index]: (self._gates[index] / self._tokens[index]).tolist()
                for index in seen
            },
            "rank_by_domain": {
                self.domains[index]: float(self._ranks[index] / self._tokens[index])
                for index in seen
            },
            "tokens": total,
        }

    def _permuted(self) -> np.ndarray:
        """[PERMUTATIONS] mutual information with the labels of the kept sequences permuted."""
        # A generator of its own: calling `result` twice, or mid-way, must change nothing.
        generator = np.random.default_rng((self.seed, 1))
        values = np.empty(PERMUTATIONS)
        for index in range(PERMUTATIONS):
            joint = np.zeros_like(self._gates[:-1])
            np.add.at(joint, generator.permutation(self._unit_domains), self._unit_gates)
            values[index] = normalised_mutual_information(joint)
        return values


class SiteHealth:
    """`RoutingHealth` of every control site of an adapter.

    Args:
        adapter: attached.
        domains: the D domain names.
        seed: of the reservoirs and of the permutations.
    """

    def __init__(self, adapter: Adapter, domains: Sequence[str], seed: int) -> None:
        self.adapter, active = adapter, adapter.available()
        self.sites = {
            site: RoutingHealth(domains, adapter.config.specialists, active=active, seed=seed)
            for site in adapter.sites
        }

    def update(self, batch: ChatBatch, first: int) -> None:
        """Add the forward that has just been, of this batch, whose rows are numbered from first."""
        counted = self.adapter.with_signal(batch)
        owners = batch.domains[:, None].expand_as(counted)[counted]
        rows = torch.arange(len(counted), device=counted.device)
        rows = rows[:, None].expand_as(counted)[counted]
        for site, routing in self.adapter.routing().items():
            ranks = routing.mask[counted].sum(-1)
            self.sites[site].update(routing.gate[counted], ranks, owners, first + rows)

    def result(self) -> dict[str, dict]:
        """{site: all statistics}, as plain numbers for JSON."""
        return {str(site): seen.result() for site, seen in self.sites.items()}


def normalised_mutual_information(joint: np.ndarray) -> float:
    """``2 I / (H(rows) + H(columns))`` of a joint distribution given up to scale.

    Args:
        joint: [D, E], non-negative.

    Returns:
        In [0, 1]; 0 where a margin has no entropy, as under collapse.
    """
    joint = joint / max(joint.sum(), 1e-12)
    rows, columns = _entropy(joint.sum(axis=1)), _entropy(joint.sum(axis=0))
    if min(rows, columns) < 1e-12:
        return 0.0
    information = rows + columns - _entropy(joint.ravel())
    return float(np.clip(2 * information / (rows + columns), 0.0, 1.0))


def _entropy(probabilities: np.ndarray, axis: int = -1) -> np.ndarray:
    """Shannon entropy in nats, with 0 log 0 = 0."""
    logs = np.log(np.where(probabilities > 0, probabilities, 1.0))
    return -(probabilities * logs).sum(axis=axis)


def _array(values: torch.Tensor | ArrayLike) -> np.ndarray:
    return torch.as_tensor(values).detach().to("cpu", torch.float64).numpy()
