"""Running real code on tensors without storage: shapes, types and lifetimes, and no arithmetic.

Floating-point numbers are torch's fake tensors. Integers and booleans that come from a batch alone
(ids, masks, labels) are real, because code asks for their values: which tokens are labelled,
whether a row is padded. Where a fake tensor's values are asked for, the answer is the one that
takes most memory: no entry is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.initialization import no_init_weights

aten = torch.ops.aten

REAL_ENTRIES = 2**22
"""Entries of the largest tensor that has values: a mask of all pairs of tokens may have none."""
_ASKING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Marks of operations that ask for values."""


class NoValues(Exception):
    """Numbers were asked for, as an array, that a dry run does not have."""


class DryRun(TorchDispatchMode):
    """Inside, tensors are made as this module says, on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation is torch.ops.prim.device.default:
            return args[0].fake_device
        if FakeTensor not in types:
            return self._of_values(operation, args, kwargs)
        if operation is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if operation is aten.nonzero.default:
            return self._numbers(args[0].numel(), args[0].dim())
        if operation._overloadpacket in (aten.index, aten.index_put, aten.index_put_) or (
            operation is aten._index_put_impl_.default
        ):
            args = (args[0], self._positions(args[1]), *args[2:])
        with self._fake:
            return operation(*args, **kwargs)

    def _of_values(self, operation, args, kwargs):
        """Real, unless what comes out is a floating-point number or large."""
        if not _ASKING.isdisjoint(operation.tags):
            return operation(*args, **kwargs)
        with self._fake:
            found = operation(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        if any(t.is_floating_point() or t.numel() > REAL_ENTRIES for t in made):
            return found
        return operation(*args, **kwargs)

    def _positions(self, indices):
        """Masks as the numbers of their entries, which is what indexing makes of them."""
        found = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                found.append(index)
            elif isinstance(index, FakeTensor):
                found += [self._numbers(index.numel()) for _ in range(index.dim())]
            else:
                found += index.nonzero().unbind(1)
        return found

    def _numbers(self, *shape: int) -> Tensor:
        with self._fake:
            return torch.empty(shape, dtype=torch.long)


@contextmanager
def running(dry_run: DryRun) -> Iterator[None]:
    """Modules are built and run without storage inside; those of one dry run go on in it only.

    Weights are not initialised, and stay on the device and in the type in which they are made.
    """
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _stay))
        stack.enter_context(mock.patch.object(FakeTensor, "numpy", _no_values))
        stack.enter_context(no_init_weights())
        stack.enter_context(dry_run)
        yield


def _stay(module: nn.Module, function, recurse: bool = True) -> nn.Module:
    return module


def _no_values(tensor: Tensor, **options):
    raise NoValues
