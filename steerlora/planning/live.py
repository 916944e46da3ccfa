"""Which storages are alive, operation by operation, and when they take most.

Allocations inside one kernel are not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS, GRADIENTS, LOGITS, SPACE = "activations", "gradients", "logits", "working space"
AT_THE_LOSS = "at the loss"

Parts = Counter[str]
"""{kind: bytes}."""


@dataclass
class _Storage:
    kind: str
    size: int


class LiveMemory(TorchDispatchMode):
    """Bytes of the storages made inside this context, and of those told to it, by what they are.

    Args:
        vocabulary: what has so many columns is logits, or their gradient; None: nothing is. While
            there are any, the moment is :data:`AT_THE_LOSS`.

    Attributes:
        now: {kind: bytes} alive.
        kind: of storages made from now on.
        moment: what is going on.
        peaks: {moment: ``now`` when it was most}.
        ungraded: likewise, when it was most but for gradients.
    """

    def __init__(self, vocabulary: int | None = None) -> None:
        super().__init__()
        self.vocabulary, self.kind, self.moment = vocabulary, ACTIVATIONS, ""
        self.now: Parts = Counter()
        self.peaks: dict[str, Parts] = {}
        self.ungraded: dict[str, Parts] = {}
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, _Storage] = (
            weakref.WeakKeyDictionary()
        )

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.prim.device.default:
            return args[0].fake_device
        result = operation(*args, **(kwargs or {}))
        new = False
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in self._known:
                logits = leaf.dim() > 0 and leaf.shape[-1] == self.vocabulary
                self._add(leaf.untyped_storage(), LOGITS if logits else self.kind)
                new = True
        if new:
            self._look()
        return result

    def tell(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """These tensors, known or not, are of this kind."""
        for tensor in tensors:
            found = self._known.get(tensor.untyped_storage())
            if found is None:
                self._add(tensor.untyped_storage(), kind)
            else:
                self.now[found.kind] -= found.size
                self.now[kind] += found.size
                found.kind = kind

    def _add(self, storage: torch.UntypedStorage, kind: str) -> None:
        self._known[storage] = found = _Storage(kind, storage.nbytes())
        self.now[kind] += found.size
        weakref.finalize(storage, self._freed, found)

    def _freed(self, storage: _Storage) -> None:
        self.now[storage.kind] -= storage.size

    def _look(self) -> None:
        moment = AT_THE_LOSS if self.now[LOGITS] else self.moment
        for peaks, left_out in ((self.peaks, 0), (self.ungraded, 1)):
            highest, now = peaks.get(moment, Counter()), self.now
            if (
                now.total() - left_out * now[GRADIENTS]
                > highest.total() - left_out * highest[GRADIENTS]
            ):
                peaks[moment] = Counter(now)
