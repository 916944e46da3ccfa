"""Massive activations: the few tokens whose stream is far longer than all others'.

T tokens, D model width. A *site* is the stream entering a layer.

Some tokens collect the attention that has nowhere else to go, and their norm is orders above the
others' from some layer on (Sun et al. 2024, arXiv 2402.17762; Xiao et al. 2023, arXiv 2309.17453).
Most of them are left out by place already (``signal_tokens.py``); of the rest, one would outweigh a
thousand others in a sum of squares.
"""

from __future__ import annotations

from torch import Tensor

OUTLIER_RATIO = 10.0
"""How many times the median norm a token may have."""


def largest_usual_norm(norms: Tensor, ratio: float = OUTLIER_RATIO) -> float:
    """The rule of a site: a token is an outlier there if its norm is above this, so many times the
    median norm of the text's tokens there.

    No more than half of the tokens can be outliers. Where the norms of text are of one order, as
    they are at most sites of most models, none is.

    Args:
        norms: [T], of the text's tokens that carry a signal, at one site; at least one.
        ratio: above 1.
    """
    return ratio * float(norms.float().median())


def usual_tokens(norms: Tensor, ratio: float = OUTLIER_RATIO) -> Tensor:
    """[T] bool, tokens that are no outliers by :func:`largest_usual_norm`, by their norms [T]."""
    return norms <= largest_usual_norm(norms, ratio)
