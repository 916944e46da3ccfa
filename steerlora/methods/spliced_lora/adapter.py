"""LoRA around frozen SAEs: the model goes on from their reconstructions, and LoRA makes up for it.

B batch, S sequence, T tokens, D model width, R rank.

At every site c, on every token that carries a signal,

    x_c  ->  M_c(SAE_c(x_c)),        M_c(y) = y + B_c A_c y + b_c  where there is a map, else y

and in the adapted layers y = W x + (alpha / R) B A x. Chen, Engels and Tegmark, "Low-Rank Adapting
Models for Sparse Autoencoders" (arXiv 2501.19406); the map after the SAE is a rival of Karvonen's
(arXiv 2503.17272). Special tokens and a sequence's first pass as they are: their streams are so
long that they would be most of what the SAE costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerlora.lm.decoder import decoder_of
from steerlora.lm.targets import size_of
from steerlora.methods.attached import ForwardState, Running
from steerlora.methods.base import Method, Sources
from steerlora.methods.lowrank import AdaptedLinear, LowRank
from steerlora.methods.spliced_lora.config import SplicedLoRAConfig
from steerlora.saes.base import SparseAutoencoder

SAES, ADAPTER = PARTS = ("saes", "adapter")
"""The parts of :meth:`SplicedLoRA.only`."""


@dataclass
class SplicedForward(ForwardState):
    """What is known of one forward."""

    begun: bool = False
    """It begins with the stream that has been replaced at the first site."""


class Constant:
    """The scale source of plain LoRA (``methods/lowrank.py``).

    Args:
        running: the method's forwards.
    """

    scale = columns = None

    def __init__(self, running: Running) -> None:
        self.running = running

    @property
    def disabled(self) -> bool:
        return self.running.disabled or self.running.intervention == SAES


class LinearMap(nn.Module):
    """y + B A y + b of what an SAE writes, [T, D]; nothing at first.

    Attributes:
        update: A [R, D] and B [D, R].
        bias: [D].
    """

    def __init__(self, width: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.update = LowRank(width, width, rank, generator)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, y: Tensor) -> Tensor:
        A, B, bias = (part.to(y) for part in (self.update.A, self.update.B, self.bias))
        return y + F.linear(F.linear(y, A), B, bias)


class SplicedLoRA(Method):
    """LoRA and maps around the SAEs of the sites.

    Parameter names: ``layers.<i>:<path>.A`` [R, D_in] and ``.B`` [D_out, R] of every adapted linear
    layer; ``maps.<site>.update.A``, ``.B`` and ``.bias``.

    Args:
        model: the base model; it is frozen here, and attached to by :meth:`attach`.
        config: what to build.
        saes: {site: SAE}. Frozen; they keep their own type.
        seed: of the initial weights, and of untrained SAEs.

    Raises:
        ValueError: as a `Method`; an SAE that writes another stream than it reads, a name that no
            module has.
    """

    forward_type = SplicedForward

    def __init__(
        self,
        model: nn.Module,
        config: SplicedLoRAConfig,
        saes: Mapping[int, SparseAutoencoder],
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(config, model, saes)
        for site, sae in self.saes.items():
            if sae.span:
                raise ValueError(
                    f"the SAE at site {site} writes the stream {sae.span} layers above the one "
                    "that it reads: give one that reconstructs what it reads"
                )
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleDict(
            {
                name: LowRank(*size_of(target.linear), config.rank, generator)
                for name, target in self.targets(model).items()
            }
        )
        width, self.maps = decoder_of(model).config.hidden_size, nn.ModuleDict()
        for site in config.sites if config.map_rank else ():
            self.maps[str(site)] = LinearMap(width, config.map_rank, generator)
        self._seed_dictionaries(seed)

    def _seed_dictionaries(self, seed: int) -> None:
        self.seed, self._dictionaries = seed, dict(self.saes)
        if self.config.dictionary == "random":
            self._dictionaries = {site: sae.untrained_like(seed) for site, sae in self.saes.items()}

    @classmethod
    def of(
        cls, model: nn.Module, config: SplicedLoRAConfig, sources: Sources, seed: int
    ) -> SplicedLoRA:
        """A new one around the SAEs of ``sources``, attached."""
        saes = {site: given.sae for site, given in sources.saes.items()}
        method = cls(model, config, saes, seed=seed)
        method.signal_tokens = sources.signal_tokens
        return method.attach(model)

    # What it changes of a model

    @property
    def first_layer(self) -> int:
        return 0 if self.config.adapted == "all" else super().first_layer

    def targets(self, model: nn.Module) -> dict:
        return {} if self.config.adapted == "none" else super().targets(model)

    def edits(self) -> dict[int, Callable[[Tensor], Tensor]]:
        return {site: partial(self._edit, site) for site in self.config.sites}

    def replacements(self, model: nn.Module) -> dict[str, AdaptedLinear]:
        scale, source = self.config.alpha / self.config.rank, Constant(self.running)
        return {
            name: AdaptedLinear(
                target.linear,
                self.layers[name].to(target.linear.weight.device),
                source,
                scale,
                self.config.dropout,
            )
            for name, target in self.targets(model).items()
        }

    def _edit(self, site: int, stream: Tensor) -> Tensor:
        if not self.config.spliced or self.running.intervention == ADAPTER:
            return stream
        if self.forward_state.begun and site == self.config.sites[0]:
            return stream
        return self.mapped(site, self.rebuilt(site, stream))

    def replaced(self, stream: Tensor) -> Tensor:
        """The tokens of this thread's last forward that are reconstructed, [B, S] bool."""
        return self.forward_state.signal_tokens(stream, self.signal_tokens)

    def rebuilt(self, site: int, stream: Tensor) -> Tensor:
        """The stream with its reconstructions in place, without any map, [B, S, D]."""
        where = self.replaced(stream)
        if not where.any():
            return stream
        sae = self._dictionaries[site]
        x = stream[where].to(sae.W_dec.device)
        y = sae(x)
        if self.config.dictionary == "noise":
            direction = F.normalize(torch.randn_like(y), dim=-1)
            y = x + direction * (x - y).norm(dim=-1, keepdim=True)
        return stream.index_put(where.nonzero(as_tuple=True), y.to(stream))

    def mapped(self, site: int, stream: Tensor) -> Tensor:
        """The stream with the site's map of what the SAE has written, [B, S, D]."""
        if str(site) not in self.maps or self.running.intervention == SAES:
            return stream
        where = self.replaced(stream)
        y = self.maps[str(site)](stream[where])
        return stream.index_put(where.nonzero(as_tuple=True), y.to(stream))

    # What a user asks of it

    @contextmanager
    def only(self, part: str) -> Iterator[None]:
        assert part in PARTS, part
        before, self.running.intervention = self.running.intervention, part
        try:
            yield
        finally:
            self.running.intervention = before

    def configure(self, *, spliced: bool = True) -> None:
        """From now on, with the SAEs in place, or without."""
        self.config = replace(self.config, spliced=spliced)

    def facts(self) -> dict:
        return {"seed": self.seed}

    def load_facts(self, stored: dict) -> None:
        self._seed_dictionaries(stored["seed"])

    def _apply(self, function, *args, **kwargs):
        super()._apply(function, *args, **kwargs)
        for site, sae in self._dictionaries.items():
            sae.to(self.saes[site].W_dec.device)
        return self
