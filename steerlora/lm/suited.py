"""Settings that suit a language model: what its size, its streams and the text's lengths say.

Rules of thumb for a model of which nobody has said better; a configuration that says null asks for
them (``stage=model_defaults``). Free of torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SHADOW = 10.0
"""A site is in the shadow of an attention sink where the first token's stream is this many times as
long as the median token's. In SmolLM2-135M the ratio jumps from 1 to 171 between two layers."""
QUANTILE = 0.95
"""Share of a domain's rows that has to fit whole into the context length."""
STEP = 64
"""Context lengths are multiples of this many tokens."""
LONGEST = 1024
"""Context lengths beyond this many tokens are not chosen for anyone."""
LATENTS_A_DIMENSION = 8
"""SAE latents for each dimension of the stream, as the shipped models' own SAEs have them."""
LEAST_ACTIVE = 16
"""Active latents a token at least."""


def control_site(layers: int, sink_ratios: Sequence[float] = ()) -> int:
    """The layer at 3/8 of the depth, or the nearest one that is in no sink's shadow.

    Args:
        layers: number of decoder layers.
        sink_ratios: of the stream entering each layer, its length at a sequence's first token over
            the median one's; empty: not known.

    Returns:
        Of two that are equally near, the lower. Where all layers above the first are in a shadow,
        3/8 of the depth all the same: tokens that carry no signal are left out there
        (``lm/signal_tokens.py``).
    """
    wanted = max(1, layers * 3 // 8) if layers > 1 else 0
    free = [site for site, ratio in enumerate(sink_ratios) if site and ratio < SHADOW]
    return min(free, key=lambda site: (abs(site - wanted), site), default=wanted)


def latents(width: int) -> int:
    """Number of SAE latents for a stream of this width."""
    return LATENTS_A_DIMENSION * width


def active_latents(width: int) -> int:
    """k of a TopK SAE: the power of two nearest to the square root of the width, at least 16.

    That is 32 for 576 and 1024 dimensions and 64 from 2048 to 5120, about what published SAEs of
    such models have (Qwen-Scope's L0 is 50 at 2048 and at 4096 dimensions).
    """
    return min(width, max(LEAST_ACTIVE, 2 ** round(math.log2(width) / 2)))


def adapter_learning_rate(width: int) -> float:
    """Peak learning rate of AdamW for low-rank adapters, rounded to two digits.

    ``5e-4 (2000 / width)^0.781``: ten times the rate of full fine-tuning, falling with the width
    as it was fitted to Llama models by Thinking Machines (Schulman et al. 2025, "LoRA Without
    Regret").
    """
    return float(f"{5e-4 * (2000 / width) ** 0.781:.1e}")


def context_length(lengths: Sequence[Sequence[int]], limit: int | None = None) -> int:
    """The shortest context length into which `QUANTILE` of each domain's rows fit whole.

    Args:
        lengths: tokens of each row, a sequence for each domain.
        limit: positions that the model has; None: not known.

    Returns:
        A multiple of `STEP`, at most `LONGEST` and ``limit``.
    """
    needed = max(quantile(rows, QUANTILE) for rows in lengths)
    return min(STEP * math.ceil(needed / STEP), LONGEST, limit or LONGEST)


def quantile(values: Sequence[int], share: float) -> int:
    """The smallest value that this share of the values does not exceed."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]
