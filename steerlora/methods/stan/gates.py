"""Which units act, where that is not the k of the token itself: controls of sparse adaptation.

T tokens, M units, K units that act on a token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def redrawn(
    code: Tensor, outputs: Tensor, real: Tensor, generator: torch.Generator, *, how: str
) -> Tensor:
    """A code in which other units act, with the norm that each token's own has, [T, M].

    Args:
        code: [T, M], zero where a unit does not act.
        outputs: [T, M], what every unit gives where it acts.
        real: [T] bool; padding enters no draw and stays as it is.
        generator: of the draws.
        how: "random", as many units as act on the token; "shuffled", another real token's.
    """
    active = code != 0
    if how == "random":
        draws = torch.rand(code.shape, generator=generator, device=code.device)
        order = draws.argsort(-1).argsort(-1)
        chosen = order < active.sum(-1, keepdim=True)
    else:
        places = real.nonzero().flatten()
        turned = torch.randperm(len(places), generator=generator, device=code.device)
        chosen = active.clone()
        chosen[places] = active[places[turned]]
    changed = torch.where(chosen, outputs, 0)
    own, found = (part.detach().norm(dim=-1, keepdim=True) for part in (code, changed))
    changed = changed * (own / found.clamp_min(1e-12))
    return torch.where(real[:, None], changed, code)


def threshold_for(scores: Tensor, real: Tensor, k: int) -> Tensor:
    """The t >= 0 above which k scores of the mean real token lie: [T, M], [T] -> [1]."""
    found = scores.detach()[real].flatten().float()
    count = min(len(found), int(real.sum()) * k)
    if not count:
        return scores.new_zeros(1, dtype=torch.float32)
    return found.topk(count, sorted=False).values.min().clamp_min(0).reshape(1)


def most_active(fired: Tensor, k: int) -> Tensor:
    """The k units that acted most, [M] bool, of how often each did, [M]."""
    return torch.zeros_like(fired, dtype=torch.bool).index_fill(0, fired.topk(k).indices, True)
