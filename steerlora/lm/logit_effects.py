"""What directions of the residual stream do to the logits by themselves.

Shapes: C directions, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steerlora.lm.decoder import final_norm


@torch.no_grad()
def logit_effects(model: PreTrainedModel, directions: Tensor) -> Tensor:
    """Logits [C, V] of streams that are directions [C, D] alone, less what any stream gets.

    The final norm scales a direction to the size that streams have there, and its gain counts;
    what norm and head add to every stream cancels between a direction and its opposite.

    Raises:
        ValueError: the model has no final norm that is known by name.
    """
    norm, head = final_norm(model), model.get_output_embeddings()
    where = head.weight

    def logits(streams: Tensor) -> Tensor:
        normed = norm(streams.to(next(norm.parameters(), where)))
        return head(normed.to(where)).float()

    return ((logits(directions) - logits(-directions)) / 2).cpu()
