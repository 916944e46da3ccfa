"""Changes of single specialists in the middle of a training: weights and optimizer state.

D_in and D_out widths of an adapted layer, E specialists, R rank of each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from steerlora.methods.lowrank import LowRank
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.merging import merge_low_rank


@torch.no_grad()
def clear_specialist(
    adapter: Adapter,
    specialist: int,
    generator: torch.Generator,
    layers: Collection[LowRank] | None = None,
) -> None:
    """As at the beginning, a random A, and B zero; in these adapted layers, None: in all."""
    rows = adapter.config.rows_of(specialist)
    for layer in adapter.layers.values() if layers is None else layers:
        fresh = _fresh(layer, adapter.config.rank, generator)
        layer.A[rows] = fresh.A.to(layer.A)
        layer.B[:, rows] = 0


@torch.no_grad()
def merge_specialists(
    adapter: Adapter,
    first: int,
    second: int,
    shares: Sequence[float],
    generator: torch.Generator,
    layers: Collection[LowRank] | None = None,
) -> None:
    """Put shares[0] * first + shares[1] * second, approximated to rank R, into ``first``.

    Rank components that the two together do not fill start afresh. ``layers`` as above.
    """
    config = adapter.config
    rows, others, rank = config.rows_of(first), config.rows_of(second), config.rank
    for layer in adapter.layers.values() if layers is None else layers:
        A, B = layer.A, layer.B
        merged_A, merged_B = merge_low_rank(
            [A[rows], A[others]], [B[:, rows], B[:, others]], shares, rank
        )
        empty = ~merged_A.any(1, keepdim=True)
        A[rows] = torch.where(empty, _fresh(layer, rank, generator).A.to(A), merged_A)
        B[:, rows] = merged_B


@torch.no_grad()
def settle_moments(
    adapter: Adapter,
    states: Mapping[nn.Parameter, dict[str, Tensor]],
    changed: Collection[int],
    typical: Sequence[int],
    layers: Collection[LowRank] | None = None,
) -> None:
    """Make the Adam state of changed specialists that of a calm beginning.

    The first moment becomes zero. The second does not: the step count, which corrects the bias of
    young moments, is the whole parameter's and is old by now, so zeros would give steps several
    times the learning rate. It becomes the mean of the ``typical`` specialists' in its place.
    """
    layers = adapter.layers.values() if layers is None else layers
    for layer in layers if changed else ():
        for parameter, along in ((layer.A, 0), (layer.B, 1)):
            state = states.get(parameter, {})
            if "exp_avg" not in state:
                continue
            first, second = (
                state[name].movedim(along, 0).unflatten(0, (adapter.config.specialists, -1))
                for name in ("exp_avg", "exp_avg_sq")
            )  # views: [E, R, D_in or D_out]
            usual = second[list(typical)].mean((0, 1))
            for specialist in changed:
                first[specialist] = 0
                second[specialist] = usual


def _fresh(layer: LowRank, rank: int, generator: torch.Generator) -> LowRank:
    return LowRank(layer.A.shape[1], layer.B.shape[0], rank, generator)
