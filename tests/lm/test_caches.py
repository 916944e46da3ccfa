"""Layers of a KV cache that hold something else: each operation against the same on plain rows."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from steerlora.lm.caches import CacheLayer, TokensLayer, is_empty, mapped


class Rows(NamedTuple):
    values: Tensor
    absent: None
    flags: Tensor


def rows(batch: int, tokens: int, width: int = 3, start: int = 1) -> Rows:
    values = torch.arange(start, start + batch * tokens * width).view(batch, tokens, width)
    return Rows(values, None, values[..., 0] % 2 == 0)


def equal(found: Rows, expected: Rows) -> bool:
    return torch.equal(found.values, expected.values) and torch.equal(found.flags, expected.flags)


def filled(layers: int = 2) -> DynamicCache:
    """Two rows of four tokens, in ``layers`` layers."""
    cache = DynamicCache()
    for layer in range(layers):
        cache.update(torch.randn(2, 1, 4, 5), torch.randn(2, 1, 4, 5), layer)
    return cache


@pytest.fixture
def cache() -> DynamicCache:
    cache = filled()
    TokensLayer.at(cache, "mine").append(rows(2, 4), rows(2, 4).values.sum(1))
    CacheLayer.at(cache, "other").cache = filled(1)
    return cache


def test_nests_keep_their_form():
    doubled = mapped(lambda part: part * 2, rows(2, 4))
    assert torch.equal(doubled.values, rows(2, 4).values * 2)
    assert doubled.absent is None
    assert is_empty(None)
    assert is_empty(Rows(None, None, None))
    assert not is_empty(rows(1, 1))


def test_each_owner_has_one_layer_of_its_own(cache):
    assert len(cache.layers) == 4
    mine = TokensLayer.of(cache, "mine")
    assert TokensLayer.at(cache, "mine") is mine
    assert TokensLayer.of(cache, "other") is None
    assert CacheLayer.of(cache, "mine") is None
    assert TokensLayer.of(None, "mine") is None
    assert cache.get_seq_length() == mine.get_seq_length() == 4
    assert cache.is_croppable
    assert cache.get_max_length() == -1
    assert cache.is_dummy == [False, False, True, True]  # so that no prefetch waits for them


OPERATIONS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(3), [0, 0, 0, 1, 1, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "copy": (lambda cache: None, [0, 1]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_go_with_the_keys(name, cache):
    operation, order = OPERATIONS[name]
    changed = copy.deepcopy(cache)
    operation(changed)
    mine, before = TokensLayer.of(changed, "mine"), TokensLayer.of(cache, "mine")
    assert equal(mine.tokens, mapped(lambda part: part[order], before.tokens))
    assert torch.equal(mine.together, before.together[order])
    assert mine.get_seq_length() == 4
    keys, own = changed.layers[0].keys, CacheLayer.of(changed, "other").cache.layers[0].keys
    assert torch.equal(keys, cache.layers[0].keys[order])
    assert torch.equal(own, CacheLayer.of(cache, "other").cache.layers[0].keys[order])
    assert equal(before.tokens, rows(2, 4))  # and what was copied from is as it was


@pytest.mark.parametrize("removed", [0, 1, 4, 9])
def test_a_crop_takes_tokens_and_what_followed_from_them(removed, cache):
    cache.crop(-removed)
    mine, left = TokensLayer.of(cache, "mine"), max(0, 4 - removed)
    assert mine.get_seq_length() == left
    assert equal(mine.tokens, mapped(lambda part: part[:, :left], rows(2, 4)))
    assert (mine.together is None) == (removed > 0)
    assert CacheLayer.of(cache, "other").cache.layers[0].keys.shape[-2] == left


def test_a_positive_crop_is_refused_as_transformers_does(cache):
    with pytest.raises(ValueError, match=r"crop\(3\): give minus the number"):
        TokensLayer.of(cache, "mine").crop(3)


def test_a_reset_begins_anew(cache):
    cache.reset()
    mine, other = TokensLayer.of(cache, "mine"), CacheLayer.of(cache, "other")
    assert (mine.tokens, mine.together, mine.get_seq_length()) == (None, None, 0)
    assert (other.cache, other.get_seq_length()) == (None, 0)
    for operation, _ in OPERATIONS.values():
        operation(cache)
    cache.crop(-1)
    mine.append(rows(1, 2), None)
    assert equal(mine.tokens, rows(1, 2))


@pytest.mark.parametrize("widths", [(2, 3), (3, 2), (3, 3)])
def test_narrower_rows_are_filled_with_zeros(widths):
    layer = TokensLayer("mine")
    parts = [rows(2, 4, width) for width in widths]
    for part in parts:
        layer.append(part, None)
    assert layer.get_seq_length() == 8
    padded = [torch.zeros(2, 4, 3, dtype=torch.long) for _ in widths]
    for whole, part, width in zip(padded, parts, widths, strict=True):
        whole[..., :width] = part.values
    assert torch.equal(layer.tokens.values, torch.cat(padded, 1))
    assert torch.equal(layer.tokens.flags, torch.cat([part.flags for part in parts], 1))


def test_nothing_that_is_kept_has_a_gradient():
    layer = TokensLayer("mine")
    values = torch.ones(1, 2, 3, requires_grad=True)
    layer.append(values * 2, (values * 2).sum(1))
    assert not layer.tokens.requires_grad
    assert not layer.together.requires_grad
