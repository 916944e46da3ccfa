"""Replay: evenly spread, nothing of the current domain left out, a function of the step alone."""

from __future__ import annotations

from collections import Counter

import pytest

from steerlora.data.batches import ChatBatches, collate
from steerlora.data.chat import EncodedChat
from steerlora.data.replay import ReplayBatches, ReplayRows


def named(name: str):
    return lambda step: (name, step)


def batches(ratio=0.2, kept=4, seed=0, earlier="abc") -> ReplayBatches:
    return ReplayBatches(
        named("now"), [named(name) for name in earlier], ratio=ratio, kept=kept, seed=seed
    )


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.29, 0.5, 0.7, 0.9])
def test_the_share_is_right_and_evenly_spread(ratio):
    made = batches(ratio)
    replays = [made(step)[0] != "now" for step in range(1000)]
    for end in (100, 200, 1000):
        assert sum(replays[:end]) == round(end * ratio)
    for start in range(900):  # any hundred steps hold as many, give or take one
        assert abs(sum(replays[start : start + 100]) - 100 * ratio) <= 1


def test_the_published_ratio_replays_every_fifth_step():
    replays = [step for step in range(20) if batches()(step)[0] != "now"]
    assert replays == [4, 9, 14, 19]


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.75])
def test_the_current_domain_comes_whole_and_in_order(ratio):
    made = batches(ratio)
    current = [step for name, step in map(made, range(400)) if name == "now"]
    assert current == list(range(len(current)))


@pytest.mark.parametrize("made", [batches(ratio=0.0), batches(earlier="")])
def test_without_replay_it_is_the_current_domain(made):
    assert [made(step) for step in range(50)] == [("now", step) for step in range(50)]


def test_replays_come_from_every_domains_kept_batches_alike():
    made = batches(ratio=0.5)
    drawn = Counter(made(step) for step in range(2400) if made(step)[0] != "now")
    assert set(drawn) == {(name, step) for name in "abc" for step in range(4)}
    assert min(drawn.values()) > 60  # 100 expected of each
    assert max(drawn.values()) < 140


def test_a_batch_depends_on_step_and_seed_alone():
    forward, backward = batches(ratio=0.5), batches(ratio=0.5)
    ahead = {step: forward(step) for step in range(200)}
    assert {step: backward(step) for step in reversed(range(200))} == ahead
    other = batches(ratio=0.5, seed=1)
    assert any(other(step) != ahead[step] for step in range(20))


def test_it_carries_real_batches():
    def domain(first: int, owner: int) -> ChatBatches:
        rows = [EncodedChat([first + i, 1, 2], 1) for i in range(6)]
        return ChatBatches(rows, [owner] * 6, batch_size=2, pad_token_id=0, seed=0)

    made = ReplayBatches(domain(100, 1), [domain(50, 0)], ratio=0.5, kept=2, seed=0)
    owners = [made(step).domains.tolist() for step in range(4)]
    assert owners == [[1, 1], [0, 0], [1, 1], [0, 0]]
    kept = {tuple(domain(50, 0)(step).input_ids[:, 0].tolist()) for step in range(2)}
    replayed = {tuple(made(step).input_ids[:, 0].tolist()) for step in range(1, 40, 2)}
    assert replayed == kept


@pytest.mark.parametrize(
    ("ratio", "kept", "message"), [(1.0, 4, "ratio 1.0"), (-0.1, 4, "-0.1"), (0.2, 0, "0 replay")]
)
def test_misuse_is_refused(ratio, kept, message):
    with pytest.raises(ValueError, match=message):
        batches(ratio, kept)


def domain_of(owner: int, size: int = 32) -> ChatBatches:
    """Rows of unequal lengths whose first token says which they are."""
    rows = [EncodedChat([100 * owner + i, *range(1, 2 + (i + owner) % 5)], 1) for i in range(64)]
    return ChatBatches(rows, [owner] * 64, batch_size=size, pad_token_id=0, seed=owner)


def with_rows(earlier=(1, 2), ratio=0.2, kept=2, seed=0, size: int = 32) -> ReplayRows:
    return ReplayRows(
        domain_of(3, size),
        [domain_of(owner, size) for owner in earlier],
        ratio=ratio,
        kept=kept,
        seed=seed,
        pad_token_id=0,
    )


@pytest.mark.parametrize(("ratio", "size", "added"), [(0.2, 32, 6), (0.29, 32, 9), (0.5, 7, 3)])
def test_every_batch_keeps_its_own_rows_and_gains_a_share(ratio, size, added):
    made, own = with_rows(ratio=ratio, size=size), domain_of(3, size)
    for step in range(9):
        found, mine = made(step), own(step)
        assert len(found.input_ids) == size + added
        width = mine.input_ids.shape[1]
        assert found.input_ids[:size, :width].equal(mine.input_ids)
        assert not found.attention_mask[:size, width:].any()
        assert found.tokens == found.attention_mask.sum()
        assert found.domains[:size].tolist() == [3] * size
        assert (found.attention_mask > 0).equal(found.input_ids > 0)
        assert (found.labels[found.attention_mask == 0] == -100).all()


def test_rows_are_replayed_from_all_domains_so_far_the_current_one_included():
    made, drawn = with_rows(), Counter()
    assert set(made(0).domains[32:].tolist()) <= {1, 2}
    for step in range(1, 300):
        drawn.update(made(step).domains[32:].tolist())
    assert set(drawn) == {1, 2, 3}
    assert min(drawn.values()) > 0.8 * 299 * 6 / 3


def test_replayed_rows_are_those_of_batches_that_have_trained():
    made = with_rows(kept=1, size=8)
    rows = {
        owner: {tuple(row) for row in domain_of(owner, 8)(0).input_ids[:, :1].tolist()}
        for owner in (1, 2, 3)
    }
    for step in range(1, 40):
        found = made(step)
        for owner, row in zip(found.domains[8:].tolist(), found.input_ids[8:, :1], strict=True):
            assert tuple(row.tolist()) in rows[owner]


def test_the_first_domain_replays_its_own_past_and_its_first_step_nothing():
    made = with_rows(earlier=())
    assert len(made(0).input_ids) == 32
    assert made(5).domains.tolist() == [3] * 38


def test_rows_depend_on_step_and_seed_alone():
    forward, backward, other = with_rows(), with_rows(), with_rows(seed=1)
    ahead = {step: forward(step).input_ids for step in range(12)}
    for step in reversed(range(12)):
        assert backward(step).input_ids.equal(ahead[step])
    assert any(other(step).domains.tolist() != forward(step).domains.tolist() for step in range(9))


def test_parts_of_a_batch_with_added_rows_are_the_whole():
    made = with_rows()
    whole = made(4)
    parts = [made.part(4, index, 2) for index in range(2)]
    assert sum(part.tokens for part in parts) == whole.tokens
    assert sum(len(part.input_ids) for part in parts) == 38


def test_batches_with_and_without_weights_are_not_joined():
    row = EncodedChat([1, 2, 3], 1)
    plain, weighted = collate([row], [0], 0), collate([row], [0], 0, prompt_weight=0.5)
    assert weighted.with_rows([weighted], 0).weights.tolist() == [[0.5, 1, 1]] * 2
    with pytest.raises(ValueError, match="some of the batches have weights"):
        plain.with_rows([weighted], 0)
