from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from steerlora.methods.base import Method
from steerlora.methods.config import MethodConfig, method


@method("stream_bias")
@dataclass(frozen=True, kw_only=True)
class StreamBiasConfig(MethodConfig):
    """One trained vector a site, added to the stream of every token."""

    kind: str = "stream_bias"
    scale: float = 1.0
    """The vectors are multiplied by this."""

    def build(self, model, sources, seed):
        return StreamBias(self, model).attach(model)


class StreamBias(Method):
    def __init__(self, config, model):
        super().__init__(config, model)
        width = model.config.hidden_size
        self.vectors = nn.ParameterDict(
            {str(site): nn.Parameter(torch.zeros(width)) for site in config.sites}
        )

    def edits(self):
        return {site: partial(self.add, self.vectors[str(site)]) for site in self.config.sites}

    def add(self, vector, stream):  # [D], [B, S, D] -> [B, S, D]
        return stream + self.config.scale * vector
