"""Harvesting against the model's own hidden states, and the stores' shuffled reading."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from steerlora.data import activations, harvest
from steerlora.data.activations import ActivationBatches, ActivationStore, shard_path
from steerlora.errors import UserError
from steerlora.lm.outliers import largest_usual_norm, usual_tokens
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


def harvested(model, batches, folder, *sites: int, **options) -> list[ActivationStore]:
    stores = harvest.harvest(model, batches, {c: folder / str(c) for c in sites}, **options)
    return [stores[site] for site in sites]


def everything(store: ActivationStore) -> torch.Tensor:
    return store.rows(torch.arange(store.tokens))


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
    batches, seen = make_batches(), []
    model.train()
    rule = SignalTokens(first=drop_first)
    stores = harvested(model, batches, tmp_path, 2, 0, signal_tokens=rule, progress=seen.append)
    assert model.training
    model.eval()
    for site, store in zip((2, 0), stores, strict=True):
        expected = expected_rows(model, batches, site, drop_first)
        assert (store.contents.site, store.width) == (site, WIDTH)
        assert store.tokens == len(expected) == sum(seen)
        torch.testing.assert_close(everything(store), expected)
        assert store.contents.without_signal == (12 if drop_first else 0)


def test_the_forward_stops_at_the_last_site(model, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a layer above the last site ran")

    for part in (model.model.layers[1], model.model.layers[2], model.lm_head):
        monkeypatch.setattr(part, "forward", never)
    (store,) = harvested(model, make_batches(), tmp_path, 1)
    assert store.tokens > 0


def test_sites_harvested_together_or_apart_hold_the_same(model, tmp_path):
    together = harvested(model, make_batches(), tmp_path / "together", 1, 2)
    for site, store in zip((1, 2), together, strict=True):
        (apart,) = harvested(model, make_batches(), tmp_path / "apart", site)
        assert torch.equal(everything(store), everything(apart))


def test_the_rule_of_outliers_is_by_the_median_of_the_site():
    norms = torch.tensor([1.0, 2.0, 3.0, 19.0, 20.0, 21.0, 2.0])
    assert largest_usual_norm(norms[:3]) == 20
    assert usual_tokens(norms[:6], 2.0).tolist() == [True, True, True, False, False, False]
    assert usual_tokens(torch.full((5,), 3.0)).all()
    assert usual_tokens(torch.zeros(2)).all()


def with_outliers(model, ids, mask, sites):
    out = {site: torch.ones(*ids.shape, WIDTH) * (1 + site) for site in sites}
    if 0 in sites:
        out[0][0, 2] *= 11  # an outlier at site 0 alone
    if 2 in sites:
        out[2][3, 4] *= 10.5  # and another at site 2 alone
        out[2][3, 5] *= 9.5  # large, but within the ratio
    return out


def test_outliers_are_left_out_where_they_are(model, tmp_path, monkeypatch):
    monkeypatch.setattr(harvest, "residual_streams", with_outliers)
    options = {"signal_tokens": SignalTokens()}
    zero, two = harvested(model, make_batches(1), tmp_path, 0, 2, **options)
    # Every token has its place at every site, so that a token is the same one at both.
    assert zero.tokens == two.tokens == 23
    alone = ActivationBatches([two], 22, 0)
    assert alone.tokens == 22
    assert alone(0).max() == 3 * 9.5
    both = ActivationBatches([zero, two], 21, 0)
    assert both.tokens == 21
    rows = both(0)
    assert rows[:, 0].max() == 1
    assert rows[:, 1].max() == 3 * 9.5


def test_shards_are_bounded_and_read_as_one(model, tmp_path, monkeypatch):
    batches = make_batches()
    (whole,) = harvested(model, batches, tmp_path / "whole", 1)
    monkeypatch.setattr(harvest, "_SHARD_BYTES", 13 * WIDTH * 4)
    monkeypatch.setattr(activations, "_MEMORY_BYTES", 0)
    (parts,) = harvested(model, batches, tmp_path / "parts", 1)
    count = whole.tokens
    assert whole.contents.shard_tokens == (count,)
    assert parts.contents.shard_tokens == (13,) * (count // 13) + (count % 13,)
    order = torch.randperm(count)
    assert torch.equal(whole.rows(order), parts.rows(order))
    assert torch.equal(whole.usual(), parts.usual())


def test_the_model_s_own_type_is_stored_and_no_more_than_asked(model, tmp_path):
    half = copy.deepcopy(model).to(torch.bfloat16)
    (store,) = harvested(half, make_batches(), tmp_path, 1, max_tokens=25)
    assert store.tokens == 25
    assert everything(store).dtype == torch.bfloat16
    assert store.contents.dtype == "bfloat16"


def stopped_after(shards: int, monkeypatch) -> None:
    """The disk is full after so many shards."""
    real, written = harvest.save_file, []

    def save(*arguments):
        if len(written) == shards:
            raise OSError(28, "No space left on device")
        written.append(real(*arguments))

    monkeypatch.setattr(harvest, "save_file", save)


@pytest.mark.parametrize("shards", [0, 3, 4])
def test_an_interrupted_harvest_goes_on_after_its_last_whole_shard(
    model, tmp_path, monkeypatch, shards
):
    batches = make_batches(4)
    monkeypatch.setattr(harvest, "_SHARD_BYTES", 13 * WIDTH * 4)
    expected = harvested(model, batches, tmp_path / "whole", 1, 2)
    with monkeypatch.context() as patch:
        stopped_after(shards, patch)
        with pytest.raises(OSError, match="No space left"):
            harvested(model, batches, tmp_path / "cut", 1, 2)
    assert not list(tmp_path.glob("cut/*/store.json"))

    ran, real = [], harvest.residual_streams
    monkeypatch.setattr(harvest, "residual_streams", lambda *a: ran.append(1) or real(*a))
    found = harvested(model, batches, tmp_path / "cut", 1, 2)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.contents == theirs.contents
        assert torch.equal(everything(ours), everything(theirs))
    # Two shards at both sites are 26 tokens: one batch of 19 need not run, but for its width.
    assert len(ran) == 4
    ran.clear()
    harvested(model, batches, tmp_path / "cut", 1, 2)
    assert len(ran) < 4


def test_a_truncated_shard_is_harvested_again(model, tmp_path, monkeypatch):
    monkeypatch.setattr(harvest, "_SHARD_BYTES", 13 * WIDTH * 4)
    (store,) = harvested(model, make_batches(), tmp_path, 1)
    expected = everything(store).clone()
    (tmp_path / "1" / "store.json").unlink()
    path = shard_path(tmp_path / "1", 1)
    path.write_bytes(path.read_bytes()[:-7])
    (again,) = harvested(model, make_batches(), tmp_path, 1)
    assert torch.equal(everything(again), expected)


def test_each_pass_is_a_permutation_of_all_tokens(model, tmp_path):
    (store,) = harvested(model, make_batches(), tmp_path, 1)
    count, rows = store.tokens, everything(store)
    passes, size = 3, count // 3 + 1  # batches that straddle the passes
    steps = -(-passes * count // size)
    batches = ActivationBatches([store], size, 4)
    stream = torch.cat([batches(step) for step in range(steps)])
    orders = []
    for index in range(passes):
        match = (stream[index * count : (index + 1) * count][:, None] == rows[None]).all(-1).int()
        assert torch.equal(match.sum(0), torch.ones(count, dtype=torch.long))
        orders.append(match.argmax(1))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], torch.arange(count))


def test_batches_depend_on_seed_and_step_alone(model, tmp_path):
    (store,) = harvested(model, make_batches(), tmp_path, 1)
    batches = ActivationBatches([store], 8, 4)
    whole = [batches(step) for step in range(20)]
    again = ActivationBatches([ActivationStore(tmp_path / "1")], 8, 4)
    for step in (13, 19, 14):
        assert torch.equal(again(step), whole[step])
    other = ActivationBatches([store], 8, 5)
    assert not torch.equal(other(0), whole[0])
    assert not torch.equal(other(0), whole[1])


def test_two_sites_side_by_side_are_of_the_same_tokens(model, tmp_path):
    stores = harvested(model, make_batches(), tmp_path, 2, 1)
    both = ActivationBatches(stores, 8, 5)
    alone = [ActivationBatches([store], 8, 5) for store in stores]
    assert torch.equal(both(3), torch.stack([batches(3) for batches in alone], 1))
    part = torch.stack([batches.part(3, 1, 2) for batches in alone], 1)
    assert torch.equal(both.part(3, 1, 2), part)


def test_what_is_missing_or_wrong_is_named(model, tmp_path):
    with pytest.raises(UserError, match=r"store\.json is missing"):
        ActivationStore(tmp_path)
    single = torch.ones(2, 1, dtype=torch.long)
    with pytest.raises(UserError, match="no token that carries a signal"):
        harvested(model, [(single, single)], tmp_path / "empty", 1)
    (long,) = harvested(model, make_batches(), tmp_path / "long", 1)
    (short,) = harvested(model, make_batches(2), tmp_path / "short", 2)
    with pytest.raises(UserError, match="activations of different texts"):
        ActivationBatches([long, short], 8, 0)


def test_a_stream_that_is_not_finite_is_refused(model, tmp_path, monkeypatch):
    def streams(model, ids, mask, sites):
        return {site: torch.full((*ids.shape, WIDTH), torch.nan) for site in sites}

    monkeypatch.setattr(harvest, "residual_streams", streams)
    with pytest.raises(UserError, match="the stream entering layer 1 holds numbers that are not"):
        harvested(model, make_batches(), tmp_path, 1)
