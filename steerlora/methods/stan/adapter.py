"""The adapter: sparse units beside every linear layer that is adapted.

B batch, S sequence, D model width, M units, D_in and D_out widths of an adapted layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steerlora.lm.targets import size_of
from steerlora.methods.base import Method, Sources
from steerlora.methods.stan.config import StanConfig
from steerlora.methods.stan.forward import LayerForward, StanForward
from steerlora.methods.stan.units import StanLinear, Units
from steerlora.saes.sparse import SparseFeatures


class Stan(Method):
    """Units of a base model's layers, each chosen token by token.

    Parameter names, which are also the names in ``adapter_model.safetensors``:
    ``layers.<i>:<path>.encoder`` [M, D_in] and ``.decoder`` [M, D_out], of the module at ``<path>``
    inside decoder layer i, dots as "/"; and what its gate remembers (``Units``).
    ``scale_<site>`` is the mean norm of a site's features, where an SAE is the encoder.

    Args:
        model: the base model; it is frozen here, and attached to by :meth:`attach`.
        config: what to build.
        sources: the sites' SAEs, where these are the encoders.
        seed: of the initial weights, and of a gate's draws.

    Raises:
        ValueError: a site beyond the last layer, a missing SAE or one of another width, a name
            that no module has, a model that carries a method already or that keeps no keys and
            values.
    """

    forward_type = StanForward

    def __init__(
        self, model: nn.Module, config: StanConfig, sources: Sources, *, seed: int = 0
    ) -> None:
        super().__init__(config, model, {site: given.sae for site, given in sources.saes.items()})
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleDict(
            {
                name: Units(*size_of(target.linear), config, generator, self._latents(name))
                for name, target in self.targets(model).items()
            }
        )
        for site in self.saes:
            mean = torch.tensor(float(sources.saes[site].mean_norm))
            self.register_buffer(f"scale_{site}", mean)
        self._seed, self._step, self._forwards = seed, 0, 0
        self._off: Mapping[str, Tensor] = {}
        self._watched = False

    def _site_of(self, name: str) -> int:
        """The last site at or below a layer."""
        return max(site for site in self.config.sites if site <= int(name.split(":")[0]))

    def _latents(self, name: str) -> int | None:
        """Of the SAE that is a layer's encoder; None: it has one of its own."""
        return self.saes[self._site_of(name)].latents if self.saes else None

    def edits(self) -> dict[int, Callable[[Tensor], Tensor]]:
        """Sites are read where an SAE is the encoder; no stream is changed."""
        return {site: partial(self._read, site) for site in self.saes}

    def _read(self, site: int, stream: Tensor) -> Tensor:
        sae = self.saes[site]
        with torch.no_grad():
            found = sae.encode(stream.to(next(sae.parameters()).device))
            values = found.values / getattr(self, f"scale_{site}")
        self.forward_state.features[site] = SparseFeatures(values, found.indices)
        return stream

    def replacements(self, model: nn.Module) -> dict[str, StanLinear]:
        """Of a model that is spread over several devices each pair of matrices goes to its
        layer."""
        return {
            name: StanLinear(
                target.linear,
                self.layers[name].to(target.linear.weight.device),
                LayerForward(self.running, name, self._site_of(name)),
                self.config,
            )
            for name, target in self.targets(model).items()
        }

    def observe(self, model: nn.Module, given: dict[str, Any]) -> None:
        super().observe(model, given)
        forward = self.forward_state
        forward.gate, forward.off = self._gate(), self._off
        forward.draw = (self._seed, self._step, self._forwards)
        forward.active = {} if self._watched else None
        self._forwards += 1

    def _gate(self) -> str:
        """Which units act in a forward that begins; training is where gradients are recorded."""
        other = self.config.gate_in_evaluation
        if torch.is_grad_enabled() or other == "trained":
            return self.config.gate
        return other

    def begin_step(self, step: int) -> None:
        """Before a training step, from 0: its draws become a function of the seed and the step."""
        if step != self._step:
            self._step, self._forwards = step, 0

    def configure(self, *, gate_in_evaluation: str = "trained") -> None:
        """From now on, units act as a control has it where no gradient is recorded; "trained": as
        in training."""
        self.config = replace(self.config, gate_in_evaluation=gate_in_evaluation)
        self._step = self._forwards = 0

    def facts(self) -> dict[str, Any]:
        return {"seed": self._seed}

    def load_facts(self, stored: dict[str, Any]) -> None:
        self._seed = stored["seed"]

    def active_units(self) -> dict[str, Tensor]:
        """Which units acted in this thread's last forward, where it was watched."""
        return self.forward_state.active or {}

    def unit_norms(self) -> dict[str, Tensor]:
        """The norm of what each unit writes where it is one, |D_j|."""
        return {name: layer.decoder.detach().norm(dim=1) for name, layer in self.layers.items()}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, :meth:`active_units` says of every forward which units act."""
        self._watched = True
        try:
            yield
        finally:
            self._watched = False

    @contextmanager
    def switched_off(self, units: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, these units never act: {layer: their numbers}.

        Raises:
            ValueError: a layer that is not adapted.
        """
        unknown = [name for name in units if name not in self.layers]
        if unknown:
            raise ValueError(f"no adapted layer {unknown[0]}: there are {', '.join(self.layers)}")
        before, self._off = self._off, dict(units)
        try:
            yield
        finally:
            self._off = before
