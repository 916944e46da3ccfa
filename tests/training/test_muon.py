"""Muon: near orthogonal updates, as torch's own; AdamW for the rest, as torch's own."""

import copy

import pytest
import torch
from torch import nn

from steerlora.training.muon import Muon, orthogonalised

SHAPES = [(6, 6), (6, 6), (12, 5), (5, 12)]


def parameters(shapes=SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]


def give_gradients(found: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in found:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(
            parameter.dtype
        )


@pytest.mark.parametrize("shape", [(8, 8), (4, 20), (20, 4)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    update = orthogonalised(x)
    values = torch.linalg.svdvals(update)
    assert update.shape == x.shape
    assert values.min() > 0.3
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    turned = left.mT @ update @ right.mT  # diagonal, where the vectors are the same
    off_diagonal = turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 1e-9


def test_matrices_of_one_shape_are_as_those_taken_one_by_one():
    together, alone = parameters(), parameters()
    one = Muon(together, [], matrix_lr=0.1, lr=0.0)
    each = [Muon([p], [], matrix_lr=0.1, lr=0.0) for p in alone]
    for step in range(3):
        give_gradients(together, step)
        give_gradients(alone, step)
        one.step()
        for optimizer in each:
            optimizer.step()
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_it_is_torchs_muon_but_for_bfloat16():
    """Ours in float64 and torch's, which rounds to bfloat16's 8 bits, differ by that alone."""
    ours, theirs = parameters(), parameters()
    began = [p.detach().clone() for p in ours]
    own = Muon(ours, [], matrix_lr=0.1, lr=0.0)
    torchs = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0, momentum=0.95)
    for step in range(2):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        own.step()
        torchs.step()
    for a, b, start in zip(ours, theirs, began, strict=True):
        moved = (b - start).norm()
        assert moved > 0.1
        assert (a - b).norm() < 0.05 * moved


def test_the_others_train_by_adamw():
    ours, theirs = parameters([(7,), (5, 3)]), parameters([(7,), (5, 3)])
    own = Muon([], ours, matrix_lr=1.0, lr=0.01)
    adamw = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        own.step()
        adamw.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_it_goes_on_from_its_state():
    """Also a parameter without a gradient stays as it is."""
    found, others = parameters(), parameters([(4,)])
    optimizer = Muon(found, others, matrix_lr=0.1, lr=0.01)
    give_gradients([*found, *others], 0)
    found[0].grad = None
    untouched = found[0].detach().clone()
    optimizer.step()
    assert torch.equal(found[0], untouched)

    again, more = copy.deepcopy(found), copy.deepcopy(others)
    resumed = Muon(again, more, matrix_lr=9.0, lr=9.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in (1, 2):
        give_gradients([*found, *others], step)
        give_gradients([*again, *more], step)
        optimizer.step()
        resumed.step()
    for a, b in zip([*found, *others], [*again, *more], strict=True):
        assert torch.equal(a, b)
