"""How much a direction of the residual stream decides what a model writes next.

Shapes: C directions, D model width, V vocabulary, S tokens of the text before.

The output score of Arad, Mueller and Belinkov (arXiv 2505.20063): push the last token's stream
along the direction, and see whether the tokens that the direction itself speaks for come out. As
published it pushes by ten times the largest activation of any latent there, so that a latent's
score depends on unrelated ones; here each is pushed by a length of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steerlora.lm.decoder import edited
from steerlora.lm.logit_effects import logit_effects

TOP = 20
"""Tokens that a direction speaks for."""
_BATCH = 128


@torch.no_grad()
def output_scores(
    model: PreTrainedModel,
    site: int,
    directions: Tensor,
    lengths: Tensor,
    before: Sequence[int],
) -> Tensor:
    """max_t P(t) (1 - rank(t*) / V), over the ``TOP`` tokens t of each direction.

    P is the model's next-token distribution after the push, and rank(t*) the best rank, from 0, of
    one of these tokens in it.

    Args:
        model: the base.
        site: layer whose incoming stream is pushed.
        directions: [C, D].
        lengths: [C], what each direction is multiplied by.
        before: [S] token ids of the text.

    Returns:
        [C], from 0 to 1, on the CPU.
    """
    spoken = logit_effects(model, directions).topk(min(TOP, model.config.vocab_size), 1).indices
    ids = torch.tensor([list(before)], device=model.device)
    found = []
    for rows in torch.arange(len(directions)).split(_BATCH):
        push = (directions[rows] * lengths[rows, None]).to(model.device)

        def pushed(stream: Tensor, push: Tensor = push) -> Tensor:
            last = stream[:, -1] + push.to(stream)
            return torch.cat([stream[:, :-1], last[:, None]], 1)

        with edited(model, {site: pushed}):
            logits = model(input_ids=ids.expand(len(rows), -1), use_cache=False).logits[:, -1]
        chance = logits.float().softmax(-1).cpu()
        own = chance.gather(1, spoken[rows]).max(1).values
        rank = (chance > own[:, None]).sum(1)
        found.append(own * (1 - rank / chance.shape[1]))
    return torch.cat(found)
