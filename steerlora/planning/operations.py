"""Floating-point operations of real code, by the type that they are in."""

from __future__ import annotations

import torch
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

FORMULAS = flop_counter.flop_registry | {
    aten.addmm_: flop_counter.flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: (
        flop_counter.flop_registry[aten._scaled_dot_product_flash_attention]
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        flop_counter.flop_registry[aten._scaled_dot_product_flash_attention_backward]
    ),
}
"""torch's own, of matrix products and attention, and the same under two names that it lacks."""


class Operations(TorchDispatchMode):
    """Counts inside this context.

    Attributes:
        half, single: in the trainer's half precision, and in float32.
        again: of these, what a backward computes again (activation checkpointing).
        backward: set while a backward runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.half = self.single = self.again = 0
        self.backward = False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.prim.device.default:
            return args[0].fake_device
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        formula = FORMULAS.get(operation._overloadpacket)
        if formula is not None:
            count = formula(*args, **kwargs, out_val=result)
            if args[0].dtype == torch.float32:
                self.single += count
            else:
                self.half += count
            # A backward records nothing for gradients, unless it runs a forward again.
            self.again += count * (self.backward and torch.is_grad_enabled())
        return result
