"""Packed rows: what is in them, how full they are, and batches as a function of the step."""

from __future__ import annotations

import logging

import pytest
import torch

from steerlora.config import TrainerConfig
from steerlora.data import packing
from steerlora.data.batches import IGNORED, ChatBatches
from steerlora.data.chat import EncodedChat
from steerlora.data.packing import PackedBatches, collate_packed, training_batches


def chats(count: int, longest: int, seed: int = 0) -> list[EncodedChat]:
    """Conversations of random length, each of tokens of its own."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (count,), generator=generator).tolist()
    return [
        EncodedChat(list(range(1000 * index + 1, 1000 * index + 1 + size)), size // 2)
        for index, size in enumerate(lengths)
    ]


def packed(rows, domains, batch_size: int = 3, length: int = 50, seed: int = 0) -> PackedBatches:
    return PackedBatches(
        rows, domains, batch_size=batch_size, length=length, pad_token_id=0, seed=seed
    )


@pytest.fixture
def mixed() -> PackedBatches:
    rows = chats(200, 40)
    return packed(rows, [index % 3 for index in range(len(rows))])


def test_every_conversation_is_packed_once_and_whole_beside_its_own_domain_only(mixed):
    assert sorted(index for row in mixed.contents for index in row) == list(range(200))
    for row in mixed.contents:
        assert sum(len(mixed.rows[index].input_ids) for index in row) <= 50
        assert len({mixed.domains[index] for index in row}) == 1
    assert len(mixed.contents) < 200 / 1.8


def test_rows_are_all_but_full(monkeypatch):
    rows = chats(2000, 40)
    batches = packed(rows, [0] * len(rows))
    tokens = sum(len(row.input_ids) for row in rows)
    assert batches.fill == tokens / (50 * len(batches.contents)) > 0.97
    monkeypatch.setattr(packing, "WINDOW", 64)
    assert 0.9 < packed(rows, [0] * len(rows)).fill < batches.fill


def test_rows_are_no_longer_than_the_fullest():
    batches = packed(chats(5, 10), [0] * 5, length=4096)
    assert batches.length == sum(len(row.input_ids) for row in batches.rows)
    assert batches.fill == 1
    assert batches.batch_size == 1


def test_an_epoch_has_every_row_once_and_the_next_another_order(mixed):
    steps = len(mixed.contents) // mixed.batch_size
    seen = [
        [tuple(ids.tolist()) for step in range(steps) for ids in mixed(e * steps + step).input_ids]
        for e in (0, 1)
    ]
    assert len(set(seen[0])) == steps * mixed.batch_size
    assert seen[0] != seen[1]


def test_a_batch_depends_on_the_seed_and_the_step_alone(mixed):
    again = packed(mixed.rows, mixed.domains)
    for step in (70, 3, 0):
        for name, one in vars(mixed(step)).items():
            other = getattr(again(step), name)
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    other = packed(mixed.rows, mixed.domains, seed=1)
    assert not torch.equal(mixed(3).input_ids, other(3).input_ids)


def test_a_part_of_a_batch_is_some_of_its_rows(mixed):
    """What ranks and accumulation ask for."""
    whole, parts = mixed(5), [mixed.part(5, index, 3) for index in range(3)]
    for index, part in enumerate(parts):
        width = part.input_ids.shape[1]
        assert torch.equal(part.input_ids, whole.input_ids[index : index + 1, :width])
        assert torch.equal(part.position_ids, whole.position_ids[index : index + 1, :width])
        assert part.position_ids[0, -1] >= 0
        assert not whole.attention_mask[index, width:].any()
    assert sum(part.tokens for part in parts) == whole.tokens


def test_every_answer_of_a_packed_conversation_is_a_label():
    several = EncodedChat([5, 6, 7, 8, 9, 10], 5, earlier=((1, 2), (3, 4)))
    batch = collate_packed([[EncodedChat([3, 4], 1), several]], [0], 0, 9)
    no = IGNORED
    assert batch.labels.tolist() == [[no, 4, no, 6, no, 8, no, 10, no]]


def test_what_a_packed_batch_holds():
    rows = [
        [EncodedChat([5, 6, 7, 8], 2), EncodedChat([9, 10], 0)],
        [EncodedChat([11, 12, 13], 1)],
    ]
    batch = collate_packed(rows, [4, 2], 0, 8)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 0, 0], [11, 12, 13] + [0] * 5]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, -1, -1], [0, 1, 2] + [-1] * 5]
    no = IGNORED
    # Token 9 begins a conversation: token 8 is no prediction of it, whatever the response is.
    assert batch.labels.tolist() == [[no, no, 7, 8, no, 10, no, no], [no, 12, 13] + [no] * 5]
    assert torch.equal(batch.attention_mask, (batch.position_ids >= 0).long())
    assert batch.domains.tolist() == [4, 2]
    assert batch.tokens == 9
    moved = batch.to("cpu")
    assert torch.equal(moved.position_ids, batch.position_ids)
    assert moved.weights is None


def test_the_option_chooses(caplog):
    rows = chats(20, 40)
    settings = {"pad_token_id": 0, "seed": 0}
    plain = training_batches(rows, [0] * 20, TrainerConfig(batch_size=2, max_length=64), **settings)
    assert isinstance(plain, ChatBatches)
    trainer = TrainerConfig(batch_size=2, max_length=64, packing=True)
    with caplog.at_level(logging.INFO):
        full = training_batches(rows, [0] * 20, trainer, **settings)
    assert isinstance(full, PackedBatches)
    assert (full.batch_size, full(0).input_ids.shape) == (2, (2, full.length))
    assert f"20 conversations in {len(full.contents)} rows" in caplog.text
    assert f"{100 * full.fill:.1f} % full" in caplog.text
