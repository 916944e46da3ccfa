"""What a layer with units knows of the forward that runs.

B batch, S sequence, T tokens, M units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from steerlora.methods.attached import ForwardState, Running
from steerlora.saes.sparse import SparseFeatures


@dataclass
class StanForward(ForwardState):
    """One forward of a model with units."""

    gate: str = "token"
    """Which units act (``StanConfig.gate``)."""
    draw: tuple[int, ...] = (0,)
    """Seed, step and number of the forward, of which its draws are a function."""
    off: Mapping[str, Tensor] = field(default_factory=dict)
    """{layer: numbers of units that are switched off}."""
    active: dict[str, Tensor] | None = None
    """{layer: which units act on each token, [B, S, M] bool}; None: nobody asks."""
    noted: dict[str, Tensor] = field(default_factory=dict)
    """{layer: what its gate is set by after the step}, of a forward that is trained on."""
    features: dict[int, SparseFeatures] = field(default_factory=dict)
    """{site: its SAE's features of the stream, [B, S, K]}."""


class LayerForward:
    """One layer's view of the forward that runs.

    Args:
        running: the adapter's forwards.
        name: of the layer.
        site: that controls it.
    """

    def __init__(self, running: Running, name: str, site: int) -> None:
        self.running, self.name, self.site = running, name, site

    @property
    def disabled(self) -> bool:
        """The layer is the base's own for now."""
        return self.running.disabled

    @property
    def state(self) -> StanForward:
        return self.running.forward

    @property
    def features(self) -> SparseFeatures:
        """The site's features of every token, [T, K]."""
        values, indices = self.state.features[self.site]
        return SparseFeatures(values.flatten(0, 1), indices.flatten(0, 1))

    def real(self, x: Tensor) -> Tensor:
        """True on the real ones of the tokens x [B, S, D_in], [T]."""
        return self.state.real_tokens(x).reshape(-1).to(x.device)

    def generator(self, device: torch.device) -> torch.Generator:
        """Of this layer's draws in this forward: the same where a layer is computed again."""
        state = np.random.SeedSequence([*self.state.draw, crc32(self.name.encode())])
        return torch.Generator(device).manual_seed(int(state.generate_state(1)[0]))
