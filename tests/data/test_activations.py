"""Harvesting against the model's own hidden states, and the store's shuffled reading."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from steerlora.data import activations
from steerlora.data.activations import ActivationBatches, ActivationStore, harvest
from steerlora.errors import UserError
from steerlora.lm.signal_tokens import SignalTokens

WIDTH, LAYERS = 16, 3


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Qwen3ForCausalLM(config)


def make_batches(count: int = 3, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of 4 x 7 tokens: two rows whole, one padded on the left, one on the right."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[1, :3] = 0
    mask[2, 5:] = 0
    return [(torch.randint(0, 40, (4, 7), generator=generator), mask) for _ in range(count)]


def expected_rows(model, batches, site: int, drop_first: bool) -> torch.Tensor:
    rows = []
    for ids, mask in batches:
        with torch.no_grad():
            stream = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[site]
        for row, real in zip(stream, mask, strict=True):
            rows.append(row[real.bool()][drop_first:])
    return torch.cat(rows)


@pytest.mark.parametrize("drop_first", [True, False])
def test_stored_rows_are_the_real_tokens_of_the_model_s_hidden_states(model, drop_first, tmp_path):
    batches = make_batches()
    seen = []
    model.train()
    store = harvest(
        model,
        batches,
        [2, 0],
        tmp_path,
        signal_tokens=SignalTokens(first=drop_first),
        outlier_ratio=1e9,
        progress=seen.append,
    )
    assert model.training
    model.eval()
    assert store.sites == (0, 2)
    assert store.width == WIDTH
    for site in (0, 2):
        expected = expected_rows(model, batches, site, drop_first)
        assert store.tokens(site) == len(expected) == sum(seen)
        torch.testing.assert_close(store.rows(site, torch.arange(len(expected))), expected)
    assert store.contents.without_signal == (12 if drop_first else 0)


def test_the_forward_stops_at_the_last_site(model, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a layer above the last site ran")

    for part in (model.model.layers[1], model.model.layers[2], model.lm_head):
        monkeypatch.setattr(part, "forward", never)
    assert harvest(model, make_batches(), [1], tmp_path).tokens(1) > 0


def test_outliers_at_any_site_are_left_out_at_all_of_them(model, tmp_path, monkeypatch):
    def streams(model, ids, mask, sites):
        out = {site: torch.ones(*ids.shape, WIDTH) * (1 + site) for site in sites}
        out[0][0, 2] *= 11  # an outlier at site 0 alone
        out[2][3, 4] *= 10.5  # and another at site 2 alone
        out[2][3, 5] *= 9.5  # large, but within the ratio
        return out

    monkeypatch.setattr(activations, "residual_streams", streams)
    store = harvest(model, make_batches(1), [0, 2], tmp_path, signal_tokens=SignalTokens())
    assert store.contents.outliers_dropped == 2
    assert store.tokens(0) == store.tokens(2) == 23 - 2
    rows = store.rows(2, torch.arange(21))
    assert rows.max() == 3 * 9.5


def test_shards_are_bounded_and_read_as_one(model, tmp_path, monkeypatch):
    batches = make_batches()
    whole = harvest(model, batches, [1], tmp_path / "whole")
    monkeypatch.setattr(activations, "_SHARD_BYTES", 13 * WIDTH * 4)
    monkeypatch.setattr(activations, "_MEMORY_BYTES", 0)
    parts = harvest(model, batches, [1], tmp_path / "parts")
    count = whole.tokens(1)
    assert whole.contents.shard_tokens == (count,)
    assert parts.contents.shard_tokens == (13,) * (count // 13) + (count % 13,)
    order = torch.randperm(count)
    assert torch.equal(whole.rows(1, order), parts.rows(1, order))


def test_max_tokens_and_dtype(model, tmp_path):
    store = harvest(model, make_batches(), [1], tmp_path, max_tokens=25, dtype=torch.bfloat16)
    assert store.tokens(1) == 25
    assert store.rows(1, torch.arange(3)).dtype == torch.bfloat16
    assert store.contents.dtype == "bfloat16"


def test_each_pass_is_a_permutation_of_all_tokens(model, tmp_path):
    store = harvest(model, make_batches(), [1], tmp_path)
    count = store.tokens(1)
    everything = store.rows(1, torch.arange(count))
    passes, size = 3, count // 3 + 1  # batches that straddle the passes
    steps = -(-passes * count // size)
    stream = torch.cat([store.batch(1, size, seed=4, step=step) for step in range(steps)])
    orders = []
    for index in range(passes):
        rows = stream[index * count : (index + 1) * count]
        match = (rows[:, None] == everything[None]).all(-1).int()
        assert torch.equal(match.sum(0), torch.ones(count, dtype=torch.long))
        orders.append(match.argmax(1))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], torch.arange(count))


def test_batches_depend_on_seed_and_step_alone(model, tmp_path):
    store = harvest(model, make_batches(), [1], tmp_path)
    whole = [store.batch(1, 8, seed=4, step=step) for step in range(20)]
    again = ActivationStore(tmp_path)
    resumed = [again.batch(1, 8, seed=4, step=step) for step in range(13, 20)]
    assert len(resumed) == 7
    for ours, theirs in zip(resumed, whole[13:], strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(store.batch(1, 8, seed=5, step=0), whole[0])
    assert not torch.equal(store.batch(1, 8, seed=5, step=0), store.batch(1, 8, seed=4, step=1))


def test_what_is_missing_is_named(model, tmp_path):
    with pytest.raises(UserError, match=r"store\.json is missing"):
        ActivationStore(tmp_path)
    store = harvest(model, make_batches(), [1, 2], tmp_path)
    with pytest.raises(UserError, match="no activations of site 3"):
        store.tokens(3)
    single = torch.ones(2, 1, dtype=torch.long)
    with pytest.raises(UserError, match="no token that carries a signal"):
        harvest(model, [(single, single)], [1], tmp_path / "empty")


def test_a_store_is_complete_only_with_its_last_file(model, tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(activations, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        harvest(model, make_batches(), [1], tmp_path)
    assert not (tmp_path / "store.json").exists()
    monkeypatch.undo()
    harvest(model, make_batches(), [1], tmp_path)
    assert json.loads((tmp_path / "store.json").read_text())["sites"] == [1]


def test_two_sites_side_by_side_are_of_the_same_tokens(model, tmp_path):
    store = harvest(model, make_batches(), [1, 2], tmp_path)
    both = ActivationBatches(store, 2, 8, 5, beside=1)
    alone = [ActivationBatches(store, site, 8, 5) for site in (2, 1)]
    assert torch.equal(both(3), torch.stack([batches(3) for batches in alone], 1))
    part = torch.stack([batches.part(3, 1, 2) for batches in alone], 1)
    assert torch.equal(both.part(3, 1, 2), part)
