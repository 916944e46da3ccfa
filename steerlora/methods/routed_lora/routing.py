"""What routers hand on: to the adapted layers, and to the next tokens of a KV cache.

E specialists, R rank components, M modules that have a router of their own.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from steerlora.methods.routed_lora.context import ContextState
from steerlora.registry import Registry

ROUTERS: Registry[type[nn.Module]] = Registry(
    "method.router",
    "steerlora.methods.routed_lora.routers",
    "steerlora.methods.routed_lora.prototypes",
    "steerlora.methods.routed_lora.task_routers",
)
"""Routers by name. Each is made with the signal's width, the configuration, the number of modules
that have a router of their own, and a random generator."""
router = ROUTERS.register


class Routing(NamedTuple):
    """What a router decides for every token.

    Attributes:
        gate: [..., E] weights over specialists; they sum to one, or to less where a token is left
            without an update (prototype routing).
        mask: [..., R] non-increasing weights over rank components, in (0, 1]; ones where the
            adapter has no dynamic rank.

    With a router of its own for every module both have a dimension M before the last.
    """

    gate: Tensor
    mask: Tensor


class RouterState(NamedTuple):
    """What the tokens so far leave behind for the next ones of a KV cache.

    Attributes:
        signal: of the signal's average, as the router keeps it; None where it keeps none.
        similarity: of the average that is compared with prototypes; None where none are.
    """

    signal: ContextState | None
    similarity: ContextState | None = None


class PreciseBuffers(nn.Module):
    """A module whose buffers go to other devices, but to no shorter type: in one, small variances
    would be lost beside large, and inverses would lose their meaning."""

    def _apply(self, function, recurse=True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(function, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.element_size() < buffer.element_size():
                setattr(self, name, buffer.to(after.device))
        return self
