"""What a function makes, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def largest_tensor_made(function: Callable[[], Any]) -> int:
    """Entries of the largest tensor that any operation inside returns."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            nonlocal largest
            found = operation(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(found) if torch.is_tensor(leaf)]
            largest = max([largest, *sizes])
            return found

    with Watch():
        function()
    return largest
