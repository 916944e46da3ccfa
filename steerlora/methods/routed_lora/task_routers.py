"""Routers that tell which domain a text is of, each from its paper, and learn nothing by gradient.

B batch, S sequence, C tokens of a chunk, W width of the signal (D, or N latents), E specialists,
R rank components, K classes a domain, P expanded features, n texts.

Both papers pool the state of a whole input, and an encoder or a first pass may. Here, as for every
router of this project, a token is routed by the text up to it (``method.context``), which is what a
causal model with a KV cache knows; at the answer that is the whole prompt. While a domain trains,
its rows have its specialist (``RoutedLoRAConfig.assigns``), as in both papers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from steerlora.methods.routed_lora.config import AnalyticLoRAConfig, RoutedLoRAConfig
from steerlora.methods.routed_lora.prototypes import SHRINKAGE, pooled
from steerlora.methods.routed_lora.routing import PreciseBuffers, RouterState, Routing, router

CLASSES = 16
"""K: a domain with more different answers than this is one class."""
SCORED = 4096
"""Tokens whose expanded features are held at once."""


class TaskRouter(PreciseBuffers):
    """Every token goes to the specialist of the domain whose score of the text so far is highest.

    Where there is no signal yet, a token has no update.

    Attributes:
        prototypes: [E, W], mean signal of every domain that has come.
        known: [E] bool, which of them have.
    """

    fitted = True
    leaves_out = True

    def __init__(self, width: int, config: RoutedLoRAConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("prototypes", torch.zeros(config.specialists, width))
        self.register_buffer("known", torch.zeros(config.specialists, dtype=torch.bool))

    def fit(
        self, specialist: int | None, signals: Tensor, answers: Sequence[Hashable] | None = None
    ) -> None:
        """Take a domain's signals [n, W], one a text, and what each text is answered by.

        Raises:
            ValueError: not a matrix of this width, no signal, or general text, which such a router
                does not know.
        """
        if specialist is None:
            raise ValueError("a router of domains knows no general text")
        if signals.dim() != 2 or signals.shape[1] != self.prototypes.shape[1] or not len(signals):
            raise ValueError(
                f"signals must be [texts, {self.prototypes.shape[1]}]; got {list(signals.shape)}"
            )
        signals = signals.double()
        self.prototypes[specialist] = signals.mean(0)
        self.known[specialist] = True
        self._learn(specialist, signals, list(answers) if answers else [None] * len(signals))

    @torch.no_grad()
    def forget(self, specialist: int) -> None:
        """Never choose a domain again; what it added to statistics that all share stays."""
        self.prototypes[specialist] = 0
        self.known[specialist] = False

    def _learn(self, specialist: int, signals: Tensor, answers: Sequence[Hashable]) -> None:
        """Take the signals [n, W] of a domain, float64, and their answers."""
        raise NotImplementedError

    def scores(self, pooled_signal: Tensor) -> Tensor:
        """[..., W] -> [..., E]; what is not known has any."""
        raise NotImplementedError

    @torch.no_grad()
    def nearness(self, signals: Tensor) -> Tensor:
        """Scores of averaged signals [n, W], [n, E + 1]; of general text minus infinity."""
        scores = self.scores(signals).masked_fill(~self.known, -torch.inf)
        return F.pad(scores, (0, 1), value=-torch.inf)

    def available(self) -> Tensor:
        """[E] bool, the specialists whose domain is known."""
        return self.known

    @torch.no_grad()
    def forward(self, signal, counted, active, state=None, restarts=None):
        """As ``Router.forward``; ``active`` has no say."""
        config, width = self.config, self.prototypes.shape[1]
        if not self.known.any():
            raise ValueError("routing before any domain is known: call fit() first")
        summed, gates = state and state.signal, []
        for part in pooled(signal, width, counted, config, summed, restarts):
            scores = self.scores(part.values).masked_fill(~self.known, -torch.inf)
            gate = F.one_hot(scores.argmax(-1), config.specialists).to(part.values.dtype)
            gates.append(gate * part.values.any(-1, keepdim=True))
            summed = part.state
        gate = torch.cat(gates, 1)
        mask = torch.ones_like(gate[..., :1]).expand(*gate.shape[:-1], config.rank)
        return Routing(gate, mask), RouterState(summed)


@router("mahalanobis")
class MahalanobisRouter(TaskRouter):
    """EPI: the domain of the nearest class mean, in the metric of a covariance that all share.

        score_e(s) = max_k -1/2 (s - mu_ek)^T C^-1 (s - mu_ek),   C = 1/T sum_t 1/K_t sum_k C_tk

    Wang et al. 2023, Rehearsal-free Continual Language Learning via Efficient Parameter Isolation
    (ACL 2023), section 4: a Gaussian a class, the covariance accumulated over the T domains so far;
    the inverse is a pseudo-inverse. The classes of a domain are its different answers where there
    are at most ``CLASSES`` of at least two texts each, otherwise the domain is one class. A
    covariance of fewer texts than dimensions says nothing of most directions, along which all
    domains would be equally near: it is shrunk towards an isotropic one first (``shrunk``).

    Attributes:
        means: [E, K, W]; classes: [E, K] bool, which of them exist.
        covariance: [W, W], C.
        weight, bias: [E * K, W] and [E * K]: C^-1 mu and -1/2 mu^T C^-1 mu, by which classes are
            compared (what the squared distances of all classes have in common is left out).
        samples: scalar, texts seen.
    """

    def __init__(self, width, config, modules=1, generator=None):
        super().__init__(width, config)
        experts = config.specialists
        self.register_buffer("means", torch.zeros(experts, CLASSES, width))
        self.register_buffer("classes", torch.zeros(experts, CLASSES, dtype=torch.bool))
        self.register_buffer("covariance", torch.zeros(width, width))
        self.register_buffer("weight", torch.zeros(experts * CLASSES, width))
        self.register_buffer("bias", torch.zeros(experts * CLASSES))
        self.register_buffer("samples", torch.zeros(()))

    @property
    def shrunk(self) -> bool:
        """Whether so few texts have been seen that the covariance is shrunk."""
        return bool(self.samples < len(self.covariance))

    @torch.no_grad()
    def _learn(self, specialist, signals, answers):
        groups = [signals[rows] for rows in _classes(answers)]
        covariance = torch.stack([_covariance(group) for group in groups]).mean(0)
        domains = int(self.known.sum())  # this one among them
        self.covariance.lerp_(covariance.to(self.covariance), 1 / domains)
        self.samples += len(signals)
        for place, group in enumerate(groups):
            self.means[specialist, place] = group.mean(0)
            self.classes[specialist, place] = True
        shared = self.covariance.double()
        if self.shrunk:
            isotropic = torch.eye(len(shared), dtype=shared.dtype, device=shared.device)
            isotropic *= shared.trace() / len(shared)
            shared = torch.lerp(shared, isotropic, SHRINKAGE)
        precision = torch.linalg.pinv(shared, hermitian=True)
        means = self.means.double().flatten(0, 1)
        weight = means @ precision
        self.weight.copy_(weight)
        self.bias.copy_(-(weight * means).sum(1) / 2)

    def scores(self, pooled_signal):
        weight, bias = (part.to(pooled_signal.dtype) for part in (self.weight, self.bias))
        scores = (pooled_signal @ weight.t() + bias).unflatten(-1, self.classes.shape)
        return scores.masked_fill(~self.classes, -torch.inf).amax(-1)


def _classes(answers: Sequence[Hashable]) -> list[list[int]]:
    """The rows of every class, at least two rows each; one class where that makes none of some."""
    counts = Counter(answers)
    if len(counts) > CLASSES or min(counts.values()) < 2:
        return [list(range(len(answers)))]
    return [[row for row, own in enumerate(answers) if own == answer] for answer in counts]


def _covariance(signals: Tensor) -> Tensor:
    """Of [n, W] signals, [W, W], with n - 1 in the denominator (1 where n is 1)."""
    deviations = signals - signals.mean(0)
    return deviations.t() @ deviations / max(len(signals) - 1, 1)


@router("least_squares")
class LeastSquaresRouter(TaskRouter):
    """Any-SSR: ridge regression from expanded features to domains, updated domain by domain.

        score(s) = phi(s) V,   phi(s) = relu(s F),   V = (sum Phi^T Phi + gamma I)^-1 sum Phi^T Y

    Tong et al. 2025, Analytic Subspace Routing (arXiv 2503.13575): F is random and fixed, Y
    one-hot. With R the inverse above, a domain's n texts change it by Woodbury's identity,

        R <- R - R Phi^T (I + Phi R Phi^T)^-1 Phi R,   V <- V + R Phi^T (Y - Phi V),

    which is what all texts together would give: nothing of earlier ones is kept or forgotten. The
    relu is that of the analytic learning it builds on (Zhuang et al. 2022, arXiv 2205.14922); the
    authors' own script has none.

    Attributes:
        expansion: F, [W, P].
        inverse: R, [P, P].
        weight: V, [P, E].
    """

    def __init__(self, width, config: AnalyticLoRAConfig, modules=1, generator=None):
        super().__init__(width, config)
        features = config.expansion
        expansion = torch.empty(width, features).normal_(0, width**-0.5, generator=generator)
        self.register_buffer("expansion", expansion)
        self.register_buffer("inverse", torch.eye(features) / config.ridge)
        self.register_buffer("weight", torch.zeros(features, config.specialists))

    def expanded(self, pooled_signal: Tensor) -> Tensor:
        """phi, [..., W] -> [..., P]."""
        return F.relu(pooled_signal @ self.expansion.to(pooled_signal.dtype))

    @torch.no_grad()
    def _learn(self, specialist, signals, answers):
        features, inverse = self.expanded(signals), self.inverse.double()  # [n, P]
        targets = torch.zeros_like(features[:, : self.config.specialists])
        targets[:, specialist] = 1
        seen = features @ inverse  # [n, P]
        gain = seen @ features.t()
        gain.diagonal().add_(1)
        inverse = inverse - seen.t() @ torch.linalg.solve(gain, seen)
        weight = self.weight.double()
        weight = weight + inverse @ (features.t() @ (targets - features @ weight))
        self.inverse.copy_(inverse)
        self.weight.copy_(weight)

    def scores(self, pooled_signal):
        flat = pooled_signal.reshape(-1, pooled_signal.shape[-1])
        weight = self.weight.to(flat.dtype)
        found = torch.cat([self.expanded(part) @ weight for part in flat.split(SCORED)])
        return found.view(*pooled_signal.shape[:-1], -1)
