"""What the units of a sparse adapter stand for: domains, by information and by switching them off.

R rows of text, U units of all layers in one row of numbers, D domains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from steerlora.evaluation.records import OfOneRun

OWN_SHARE = 0.02
"""Share of all units that are called a domain's own; at least one is."""
OFTEN_SHARE = 0.1
"""Share of all units, those that act most often on a domain, that two domains' overlap is of."""
PERMUTATIONS = 200
"""Of the labels, for the null of the mutual information."""
NEAREST = 10
"""Units that are most like an own one in rate and norm, of which a control draws one."""


class Activity(NamedTuple):
    """How often units act on rows of known domains."""

    fired: np.ndarray
    """[R, U], on how many tokens of the row each unit acts."""
    tokens: np.ndarray
    """[R], of the row."""
    domain: np.ndarray
    """[R], number of its domain."""

    def rates(self, domains: int) -> np.ndarray:
        """Share of each domain's tokens on which each unit acts, [D, U]."""
        return _of_domains(self.fired, self.domain, domains) / np.maximum(
            _of_domains(self.tokens[:, None], self.domain, domains), 1
        )

    def half(self, which: int) -> Activity:
        """Every other row, from row 0 or 1."""
        return Activity(*(part[which::2] for part in self))


class Information(NamedTuple):
    """Mutual information of "acts on this token" and the token's domain, in nats, over units that
    act at all."""

    mean: float
    null: float
    """Its mean with the rows' domains permuted."""
    above_null: float
    """Share of the units above the 0.95 quantile of their own permutations; 0.05 by chance."""


class Load(NamedTuple):
    """How evenly units act."""

    alive: float
    """Share of the units that act on any token."""
    cv2: float
    """Squared coefficient of variation of the units' rates."""
    largest: float
    """The largest share of tokens on which one unit acts."""


@dataclass(frozen=True, kw_only=True)
class SwitchedOff:
    """What switching off a domain's own units does, and what their controls do."""

    domain: str
    units: int
    own: dict[str, float]
    """{domain: rise of its cross-entropy, nats a token}."""
    control: dict[str, float]
    """The same of units with the same rate on the domain and the same norm, mean over draws."""

    def selectivity(self, rise: dict[str, float]) -> float:
        """Rise on the domain less the mean rise on the others."""
        others = [value for name, value in rise.items() if name != self.domain]
        return rise[self.domain] - sum(others) / max(1, len(others))


@dataclass(frozen=True, kw_only=True)
class UnitsRecord(OfOneRun):
    """What the units of one trained adapter stand for."""

    training: str
    """"joint", or "sequence": the adapter that a sequence of domains ends with."""
    figures: dict[str, float]
    """Of all domains: ``information/...`` (`Information`), ``load/...`` (`Load`),
    ``overlap/jaccard`` and ``overlap/chance`` (`overlap`), ``switched_off/own`` and
    ``switched_off/control`` (mean selectivity)."""
    intact: dict[str, float]
    """{domain: cross-entropy with all units, nats a token}."""
    switched_off: tuple[SwitchedOff, ...]
    """One a domain."""
    load_by_layer: dict[str, dict[str, float]]
    """{layer: `Load`}."""


def _of_domains(rows: np.ndarray, domain: np.ndarray, domains: int) -> np.ndarray:
    """Sums over each domain's rows: [R, X] -> [D, X]."""
    return np.eye(domains)[domain].T @ rows


def mutual_information(activity: Activity, domains: int) -> np.ndarray:
    """I(acts; domain) of tokens in nats, [U]; 0 of a unit that never acts, or always."""
    on = _of_domains(activity.fired, activity.domain, domains)
    tokens = _of_domains(activity.tokens[:, None], activity.domain, domains)
    total = tokens.sum()
    found = np.zeros(on.shape[1])
    for part in (on, tokens - on):
        joint = part / total
        apart = joint.sum(0) * (tokens / total)
        with np.errstate(divide="ignore", invalid="ignore"):
            found += np.where(joint > 0, joint * np.log(joint / apart), 0).sum(0)
    return found


def information(activity: Activity, domains: int, seed: int) -> Information:
    """Beside its null: whole rows change their domain, since tokens of one row are alike."""
    alive = activity.fired.any(0)
    if not alive.any():
        return Information(0.0, 0.0, 0.0)
    activity = activity._replace(fired=activity.fired[:, alive])
    found, draws = mutual_information(activity, domains), np.random.default_rng(seed)
    null = np.stack(
        [
            mutual_information(
                activity._replace(domain=draws.permutation(activity.domain)), domains
            )
            for _ in range(PERMUTATIONS)
        ]
    )
    above = found > np.quantile(null, 0.95, axis=0)
    return Information(float(found.mean()), float(null.mean()), float(above.mean()))


def load(activity: Activity) -> Load:
    """Over all tokens."""
    rates = activity.fired.sum(0) / activity.tokens.sum()
    mean = rates.mean()
    cv2 = rates.var() / mean**2 if mean else 0.0
    return Load(float((rates > 0).mean()), float(cv2), float(rates.max()))


def own_units(rates: np.ndarray, domain: int) -> np.ndarray:
    """Numbers of the units that act most on a domain above the mean of the others, of rates
    [D, U]: as many as ``OWN_SHARE`` says."""
    others = np.delete(rates, domain, 0).mean(0)
    count = max(1, round(OWN_SHARE * rates.shape[1]))
    return np.argsort(others - rates[domain], kind="stable")[:count]


def matched_units(
    rates: np.ndarray, norms: np.ndarray, own: np.ndarray, draws: np.random.Generator
) -> np.ndarray:
    """For each own unit another, drawn from those most like it that are nobody's so far.

    Args:
        rates: on the domain, [U].
        norms: of what units write, [U].
        own: numbers of the own units; none of them is drawn.

    Returns:
        as many numbers, each once; fewer where there are fewer others.
    """
    standard = [
        (values - values.mean()) / max(values.std(), 1e-12) for values in (rates, np.log1p(norms))
    ]
    free = np.ones(len(rates), dtype=bool)
    free[own] = False
    chosen = []
    for unit in own:
        distance = sum((values - values[unit]) ** 2 for values in standard)
        distance = np.where(free, distance, np.inf)
        nearest = np.argsort(distance, kind="stable")[: min(NEAREST, int(free.sum()))]
        if not len(nearest):
            break
        chosen.append(int(draws.choice(nearest)))
        free[chosen[-1]] = False
    return np.array(chosen, dtype=int)


def overlap(rates: np.ndarray) -> tuple[float, float]:
    """Mean Jaccard index over pairs of domains of the units that act most often on each, of rates
    [D, U], and what sets of as many random units have."""
    count = max(1, round(OFTEN_SHARE * rates.shape[1]))
    sets = [set(np.argsort(-row, kind="stable")[:count].tolist()) for row in rates]
    pairs = [(a, b) for i, a in enumerate(sets) for b in sets[i + 1 :]]
    share = count / rates.shape[1]
    found = [len(a & b) / len(a | b) for a, b in pairs]
    return (sum(found) / len(found) if found else 1.0), share / (2 - share)
