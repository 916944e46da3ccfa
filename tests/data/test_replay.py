"""Replay: evenly spread, nothing of the current domain left out, a function of the step alone."""

from __future__ import annotations

from collections import Counter

import pytest

from steerlora.data.chat import ChatBatches, EncodedChat
from steerlora.data.replay import ReplayBatches


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
