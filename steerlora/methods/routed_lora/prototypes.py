"""Routing by the nearest prototype: each domain so far is one mean signal, no gradient learns.

B batch, S sequence, C tokens of a chunk, W width of the signal (N latents or D), K active latents,
P prototypes, E specialists, R rank components, V directions of the covariance.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from steerlora.methods.routed_lora.config import RoutedLoRAConfig
from steerlora.methods.routed_lora.context import ContextState, average_so_far
from steerlora.methods.routed_lora.routing import PreciseBuffers, RouterState, Routing, router
from steerlora.saes.sparse import SparseFeatures

DENSE_ENTRIES = 2**24
"""Entries of the averaged signal held at once; longer sequences go chunk by chunk."""
COVARIANCE_RANK = 256
"""V: directions in which the covariance within domains is known; it is isotropic in the others."""
SHRINKAGE = 0.1
"""Share of the mean variance that is added to every direction's."""


def unit_rows(rows: Tensor) -> Tensor:
    """Every row at unit length; zero rows stay zero."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


class Pooled(NamedTuple):
    """A stretch of the averaged signal, dense.

    Attributes:
        start: its first token.
        values: [B, C, W].
        state: after its last token; None with context "token".
    """

    start: int
    values: Tensor
    state: ContextState | None


def pooled(
    signal: SparseFeatures | Tensor,
    width: int,
    counted: Tensor,
    config: RoutedLoRAConfig,
    state: ContextState | None = None,
    restarts: Tensor | None = None,
) -> Iterator[Pooled]:
    """The signal averaged over its context, chunk by chunk.

    A norm of the average needs it dense: C * W numbers at a time, where encoding the features cost
    D times as many multiplications.

    Args:
        signal: features, values and indices [B, S, K], or a dense signal [B, S, W].
        width: W.
        counted: [B, S], True on tokens that carry a signal.
        config: context and decay.
        state: of the same sequences, where these tokens continue them (a KV cache).
        restarts: [B, S], True where another sample begins in the same row (packing).
    """
    sparse = isinstance(signal, SparseFeatures)
    values = signal.values if sparse else signal
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    batch, length = values.shape[:2]
    step = max(1, DENSE_ENTRIES // (batch * width))
    for start in range(0, length, step):
        chunk = slice(start, start + step)
        part = values[:, chunk]
        if sparse:
            dense = part.new_zeros(*part.shape[:2], width)
            part = dense.scatter_add_(-1, signal.indices[:, chunk], part)
        again = None if restarts is None else restarts[:, chunk]
        averages, state = average_so_far(
            part, counted[:, chunk], config.context, config.decay, state, again
        )
        yield Pooled(start, averages, state)


class Metric(NamedTuple):
    """A linear map under which signals of one domain vary alike in all directions.

    x -> x - ((x U^T) * shrink) U, the symmetric root of an inverse covariance that is known in the
    directions U and isotropic in the others, up to a factor that no cosine sees.

    Attributes:
        basis: U, [V, W], orthonormal rows.
        shrink: [V], from 0 (as it is) towards 1 (taken out).
    """

    basis: Tensor
    shrink: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        basis = self.basis.to(rows.dtype)
        return rows - ((rows @ basis.t()) * self.shrink.to(rows.dtype)) @ basis


def cosines_so_far(
    signal: SparseFeatures | Tensor,
    prototypes: Tensor,
    centre: Tensor,
    counted: Tensor,
    config: RoutedLoRAConfig,
    state: ContextState | None = None,
    restarts: Tensor | None = None,
    metric: Metric | None = None,
) -> tuple[Tensor, ContextState | None]:
    """Cosine, under ``metric``, of the averaged signal and prototypes, both less ``centre``.

    Args:
        signal, counted, config, state, restarts: as for :func:`pooled`.
        prototypes: [P, W]; one that equals the centre has cosine zero.
        centre: [W].
        metric: None: the plain one.

    Returns:
        [B, S, P] in [-1, 1], zero where there is no signal, and the state after the last token, if
        there is one.
    """
    measure = metric or (lambda rows: rows)
    directions = unit_rows(measure(prototypes - centre)).t()
    found = []
    for part in pooled(signal, len(centre), counted, config, state, restarts):
        cosines = unit_rows(measure(part.values - centre)) @ directions
        found.append(cosines * part.values.any(-1, keepdim=True))
        state = part.state
    return torch.cat(found, 1), state


@router("prototype")
class PrototypeRouter(PreciseBuffers):
    """Each token goes to the specialist of the domain that its context looks most like.

    With c the mean of the prototypes known so far and s the signal's average over the context,

        cos_p = <M (s - c), M (p - c)> / (|M (s - c)| |M (p - c)|)

    - whitened: M makes the signal vary alike in all directions within the domains so far, as
      in linear discriminant analysis with a shared covariance, here kept as a stream of domains
      comes by (Hayes & Kanan 2020, arXiv 1909.01520); otherwise M is the identity;
    - hard gate: one at the nearest prototype's specialist; soft: softmax(cos / tau) over all known;
    - margin: no update for a token whose two nearest differ by less than ``config.margin``;
    - null specialist: general text has a prototype too, and its specialist is no update.

    Where there is no signal so far every cosine is zero, and the margin leaves the token as it is.
    A prototype that comes alone has nothing to be told apart from, and takes every token. Gradients
    do not pass through here.

    Attributes:
        prototypes: [E + 1, W]; row e is the domain of specialist e, the last is general text.
        known: [E + 1] bool, which of them exist.
        basis, variance: whitened: [V, W] orthonormal and [V]: the covariance within domains,
            leading directions first.
        samples, total_variance: likewise, scalars: signals seen, the trace of that covariance.
    """

    fitted = True

    def __init__(
        self,
        width: int,
        config: RoutedLoRAConfig,
        modules: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("prototypes", torch.zeros(config.specialists + 1, width))
        self.register_buffer("known", torch.zeros(config.specialists + 1, dtype=torch.bool))
        if config.whitened:
            directions = min(COVARIANCE_RANK, width)
            self.register_buffer("basis", torch.zeros(directions, width))
            self.register_buffer("variance", torch.zeros(directions))
            self.register_buffer("samples", torch.zeros(()))
            self.register_buffer("total_variance", torch.zeros(()))

    @torch.no_grad()
    def fit(
        self, specialist: int | None, signals: Tensor, answers: Sequence[Hashable] | None = None
    ) -> None:
        """Take a domain's signals [n, W], one a text; ``specialist`` None: general text. What the
        texts are answered by has no say.

        Raises:
            ValueError: not a matrix of this width, or no signal.
        """
        if signals.dim() != 2 or signals.shape[1] != self.prototypes.shape[1] or not len(signals):
            raise ValueError(
                f"signals must be [texts, {self.prototypes.shape[1]}]; got {list(signals.shape)}"
            )
        row = self.config.specialists if specialist is None else specialist
        signals = signals.double()
        mean = signals.mean(0)
        self.prototypes[row] = mean
        self.known[row] = True
        if self.config.whitened:
            self._add_scatter(signals - mean)

    @torch.no_grad()
    def forget(self, specialist: int) -> None:
        """Take a domain's prototype away; what it added to the covariance stays."""
        self.prototypes[specialist] = 0
        self.known[specialist] = False

    def _add_scatter(self, deviations: Tensor) -> None:
        """Add [n, W] deviations from a domain's mean to the covariance; its leading V stay."""
        before, after = self.samples.double(), self.samples.double() + len(deviations)
        known = (self.variance.double() * before).sqrt()[:, None] * self.basis.double()
        rows = torch.cat([known, deviations])
        # The eigenvectors of rows^T rows [W, W] by way of rows rows^T [V + n, V + n].
        squares, vectors = torch.linalg.eigh(rows @ rows.t())
        kept = len(self.basis)
        squares, vectors = squares.flip(0)[:kept].clamp_min(0), vectors.flip(1)[:, :kept]
        found = unit_rows(vectors.t() @ rows) * (squares > 1e-12 * squares[0])[:, None]
        self.basis[: len(found)] = found.to(self.basis)
        self.variance[: len(found)] = (squares / after).to(self.variance)
        trace = self.total_variance.double() * before + deviations.square().sum()
        self.total_variance.copy_(trace / after)
        self.samples.copy_(after)

    @property
    def leaves_out(self) -> bool:
        """Whole specialists can be expected to have no token of a batch."""
        return self.config.hard_gate

    @torch.no_grad()
    def nearness(self, signals: Tensor) -> Tensor:
        """Cosine of averaged signals [n, W] and every prototype, [n, E + 1]; of unknown ones minus
        infinity."""
        rows = self.known.nonzero().flatten()
        known = self.prototypes[rows]
        every = torch.ones(len(signals), 1, dtype=torch.bool, device=known.device)
        alone = replace(self.config, context="token")
        given = (signals.to(known).unsqueeze(1), known, known.mean(0), every, alone)
        cosines, _ = cosines_so_far(*given, metric=self.metric())
        found = signals.new_full((len(signals), len(self.known)), -torch.inf)
        found[:, rows] = cosines.squeeze(1).to(found)
        return found

    def available(self) -> Tensor:
        """[E] bool, the specialists whose domain is known."""
        return self.known[:-1]

    def metric(self) -> Metric | None:
        """M, of what is known so far; None: the identity."""
        if not self.config.whitened:
            return None
        floor = SHRINKAGE * self.total_variance / self.prototypes.shape[1]
        kept = floor / (self.variance + floor).clamp_min(torch.finfo(floor.dtype).tiny)
        return Metric(self.basis, 1 - kept.sqrt())

    @torch.no_grad()
    def forward(self, signal, counted, active, state=None, restarts=None):
        """As ``Router.forward``; ``active`` has no say."""
        config, rows = self.config, self.known.nonzero().flatten()
        if not len(rows):
            raise ValueError("prototype routing before any domain is known: call fit() first")
        known = self.prototypes[rows]
        known = known.to(torch.promote_types(known.dtype, torch.float32))
        cosines, summed = cosines_so_far(
            signal,
            known,
            known.mean(0),
            counted,
            config,
            state and state.signal,
            restarts,
            self.metric(),
        )
        if config.hard_gate:
            weights = torch.zeros_like(cosines).scatter_(-1, cosines.argmax(-1, keepdim=True), 1.0)
        else:
            weights = torch.softmax(cosines / config.temperature, dim=-1)
        if len(rows) > 1:
            best = cosines.topk(2, dim=-1).values
            weights = weights * (best[..., :1] - best[..., 1:] >= config.margin)
        gate = weights.new_zeros(*weights.shape[:-1], config.specialists + 1)
        gate[..., rows] = weights
        gate = gate[..., : config.specialists]
        mask = torch.ones_like(gate[..., :1]).expand(*gate.shape[:-1], config.rank)
        return Routing(gate, mask), RouterState(summed)
