"""Streamed activations against stored ones of the same text, and what bounds them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from steerlora.data import streaming
from steerlora.data.harvest import harvest
from steerlora.data.streaming import StreamedActivations
from steerlora.errors import UserError
from steerlora.lm.signal_tokens import NOT_FIRST, SignalTokens

WIDTH, BUFFER, SIZE, STEPS = 16, 30, 8, 20
PASSES = 4
"""Over 57 tokens that carry a signal, of which 160 are read."""


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4000,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Qwen3ForCausalLM(config).eval()


def text(number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A pass of 3 batches of 4 x 7 tokens, of which 19 carry a signal; another one every pass."""
    generator = torch.Generator().manual_seed(number)
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[1, :3] = 0
    mask[2, 5:] = 0
    for _ in range(3):
        yield torch.randint(0, 4000, (4, 7), generator=generator), mask


def streamed(model, *sites: int, seed: int = 0, **options) -> StreamedActivations:
    """One reader of these sites, or those in ``readers``."""
    settings = {"batch_size": SIZE, "buffer": BUFFER, "steps": STEPS, "signal_tokens": NOT_FIRST}
    settings |= {"readers": [sites]} | options
    return StreamedActivations(model, text, seed=seed, **settings)


@pytest.fixture(scope="module")
def stored(model, tmp_path_factory) -> torch.Tensor:
    """The same tokens in the order of the text, [T, 2, D] at sites 1 and 2."""
    folder = tmp_path_factory.mktemp("stored")
    batches = [batch for number in range(PASSES) for batch in text(number)]
    stores = harvest(model, batches, {site: folder / str(site) for site in (1, 2)})
    return torch.stack([s.rows(torch.arange(s.tokens)) for s in stores.values()], 1)


def places(rows: torch.Tensor, among: torch.Tensor) -> list[int]:
    """Where rows [t, D] stand among others [T, D], each once."""
    return (rows[:, None] - among[None]).abs().sum(-1).argmin(1).tolist()


def test_every_chunk_is_a_shuffle_of_the_next_tokens_of_the_text(model, stored):
    with streamed(model, 1, 2) as batches:
        rows = torch.cat([batches(step) for step in range(STEPS)])
    order = places(rows[:, 0], stored[:, 0])
    torch.testing.assert_close(rows, stored[order])
    chunks = [order[start : start + BUFFER] for start in range(0, STEPS * SIZE, BUFFER)]
    for number, chunk in enumerate(chunks[:-1]):
        assert sorted(chunk) == list(range(number * BUFFER, (number + 1) * BUFFER))
        assert chunk != sorted(chunk)
    shifted = [[place - number * BUFFER for place in c] for number, c in enumerate(chunks)]
    assert shifted[0] != shifted[1]


def test_the_order_is_a_function_of_seed_and_step(model):
    with streamed(model, 1) as batches:
        whole = [batches(step) for step in range(STEPS)]
        assert torch.equal(batches(2), whole[2])  # from the beginning again
    with streamed(model, 1) as resumed:
        assert torch.equal(resumed(0), whole[0])
        for step in range(13, STEPS):
            assert torch.equal(resumed(step), whole[step])
        parts = [resumed.part(15, index, 2) for index in range(2)]
        assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole[15])
    with streamed(model, 1, seed=1) as other:
        assert not torch.equal(other(0), whole[0])


def test_batches_larger_than_the_buffer_span_several_chunks(model, stored):
    with streamed(model, 1, batch_size=80, steps=2) as batches:
        order = places(batches(1), stored[:, 0])
    assert sorted(order[-40:-10]) == list(range(120, 150))


def test_no_more_than_two_chunks_and_the_next_one_meanwhile(model, monkeypatch):
    filled, real = [], StreamedActivations._fill

    def fill(self, number):
        chunk = real(self, number)
        filled.append((number, threading.current_thread() is threading.main_thread()))
        return chunk

    monkeypatch.setattr(StreamedActivations, "_fill", fill)
    with streamed(model, 1) as batches:
        batches(0)
        batches._futures[1].result()
        assert filled == [(0, False), (1, False)]
        for step in range(STEPS):
            batches(step)
            assert len(batches._futures) <= 2
    # 160 tokens reach the sixth chunk, and no further.
    assert [number for number, _ in filled] == [0, 1, 2, 3, 4, 5]


def test_a_resumed_stream_runs_no_text_before_its_chunk(model, monkeypatch):
    ran, real = [], streaming.residual_streams
    monkeypatch.setattr(streaming, "residual_streams", lambda *a: ran.append(1) or real(*a))
    with streamed(model, 1, steps=4 * BUFFER // SIZE) as batches:
        batches(3 * BUFFER // SIZE + 1)  # of chunk 3, the last: tokens 90 to 119
    assert len(ran) == 3  # batches of 19 tokens: 76 to 94, ..., 114 to 132


def test_readers_together_read_what_each_reads_alone(model, monkeypatch):
    real = streaming.residual_streams

    def streams(model, ids, mask, sites):
        found = real(model, ids, mask, sites)
        if 2 in sites:
            found[2][0, 3] *= 100
        return found

    monkeypatch.setattr(streaming, "residual_streams", streams)
    readers = [(1,), (2,), (2, 1), (1,)]
    with streamed(model, readers=readers) as batches:
        assert batches.columns == [slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 5)]
        together = [batches(step) for step in range(5)]
    for columns, sites in zip(batches.columns, readers, strict=True):
        with streamed(model, *sites) as alone:
            for step, rows in enumerate(together):
                expected = alone(step).view(SIZE, len(sites), WIDTH)
                assert torch.equal(rows[:, columns], expected)


def test_outliers_are_replaced_by_others_of_the_chunk(model, monkeypatch):
    real = streaming.residual_streams

    def streams(model, ids, mask, sites):
        found = real(model, ids, mask, sites)
        for site in sites:
            found[site][0, 3] *= 100  # of every batch of text, one token
        return found

    monkeypatch.setattr(streaming, "residual_streams", streams)
    with streamed(model, 1) as batches:
        norms = torch.cat([batches(step) for step in range(STEPS)]).norm(dim=1)
    assert norms.max() < 20 * norms.median()


def test_errors_of_the_thread_are_raised_where_it_is_waited_for(model, monkeypatch):
    nothing = SignalTokens(special=tuple(range(4000)))
    says = "no token that carries a signal"
    with streamed(model, 1, signal_tokens=nothing) as found, pytest.raises(UserError, match=says):
        found(0)

    def streams(model, ids, mask, sites):
        return {site: torch.full((*ids.shape, WIDTH), torch.nan) for site in sites}

    monkeypatch.setattr(streaming, "residual_streams", streams)
    says = "that are not finite"
    with streamed(model, 1) as found, pytest.raises(UserError, match=says):
        found(0)


def test_the_model_s_own_type_can_be_trained_on(model):
    with streamed(model, 1) as batches:
        rows = batches(0)
    weight = torch.zeros(WIDTH, requires_grad=True)
    ((rows @ weight) ** 2).sum().backward()  # not a tensor of inference mode
    assert rows.dtype == torch.float32
