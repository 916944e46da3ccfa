"""The loss on conversations that are set aside: its value, what is kept by it, and resuming."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import trainings
from helpers.training import StopAt, Stopped, train
from torch import Tensor

from steerlora.config.trainer import ValidationConfig
from steerlora.data.batches import batches_by_length
from steerlora.data.chat import EncodedChat
from steerlora.errors import UserError
from steerlora.training.validation import Validation, split

STEPS, EVERY = 8, 2


def noise(count: int) -> list[EncodedChat]:
    """Conversations that training sooner or later makes less likely."""
    generator = torch.Generator().manual_seed(6)
    return [
        EncodedChat(torch.randint(1, 60, (4 + index,), generator=generator).tolist(), 2)
        for index in range(count)
    ]


ASIDE = {"a": trainings.chats().rows[:8:2], "b": noise(8)}


def trained(
    folder: Path, *, stop: int | None = None, follow: bool = True, **settings
) -> SimpleNamespace:
    """A training with dropout, after it or up to a step; every step has a checkpoint."""
    base = trainings.model()
    adapter = trainings.adapted(base, dropout=0.2)
    module = trainings.module_of(base, adapter, trainings.settings(learning_rate=0.06))
    held = {name: [*batches_by_length(rows, 2, 0)] for name, rows in ASIDE.items()}
    asked = ValidationConfig(rows=3, every_steps=EVERY, **settings)
    followed = Validation(held, asked, "training")
    seen: dict[int, dict[str, Tensor]] = {}

    def look(trainer, module):
        Validation._look(followed, trainer, module)
        state = adapter.state_dict()
        seen[trainer.global_step] = {name: tensor.clone() for name, tensor in state.items()}

    followed._look = look
    callbacks = [*([followed] if follow else []), *([] if stop is None else [StopAt(stop)])]
    found = SimpleNamespace(model=base, adapter=adapter, followed=followed, seen=seen, figures={})
    try:
        found.figures = train(
            module, trainings.chats(), folder, STEPS, callbacks, checkpoint_seconds=1e-9
        )
    except Stopped:
        assert stop is not None
    return found


@pytest.fixture(scope="module")
def last(tmp_path_factory) -> SimpleNamespace:
    return trained(tmp_path_factory.mktemp("last"))


@pytest.fixture(scope="module")
def best(tmp_path_factory) -> SimpleNamespace:
    return trained(tmp_path_factory.mktemp("best"), keep_best=True)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@torch.no_grad()
def loss_of(model, rows: list[EncodedChat]) -> tuple[float, int]:
    """Nats and tokens of answers, a conversation at a time."""
    nats = tokens = 0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        logits = model(input_ids=ids).logits[0]
        for start, stop in row.answers:
            mean = F.cross_entropy(logits[start - 1 : stop - 1], ids[0, start:stop])
            nats += float(mean) * (stop - start)
            tokens += stop - start
    return nats, tokens


def test_losses_are_means_over_the_tokens_of_answers(last):
    """At the end of the training, with the weights that there are then."""
    entry = last.followed.history[-1]
    found = {name: loss_of(last.model, rows) for name, rows in ASIDE.items()}
    for name, (nats, tokens) in found.items():
        assert entry["domains"][name] == pytest.approx(nats / tokens, rel=1e-5)
    nats, tokens = (sum(values) for values in zip(*found.values(), strict=True))
    assert entry["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert [one["step"] for one in last.followed.history] == [0, 2, 4, 6, 8]


def test_measuring_changes_nothing(last, tmp_path):
    assert_same(trained(tmp_path, follow=False).adapter.state_dict(), last.adapter.state_dict())


def test_the_best_weights_are_those_of_the_lowest_loss(last, best):
    losses = [one["loss"] for one in best.followed.history]
    assert losses == [one["loss"] for one in last.followed.history]
    step = best.followed.history[losses.index(min(losses))]["step"]
    assert 0 < step < STEPS  # neither the first weights nor the last
    assert_same(best.adapter.state_dict(), best.seen[step])
    told, other = best.followed.figures(), last.followed.figures()
    assert (told["validation_loss"], told["validation_step"]) == (min(losses), step)
    assert (other["validation_loss"], other["validation_step"]) == (losses[-1], STEPS)
    assert told["validation_loss_before"] == other["validation_loss_before"] == losses[0]


def test_patience_ends_a_training_that_no_longer_gains(last, tmp_path):
    losses = [one["loss"] for one in last.followed.history]
    lowest = losses.index(min(losses))
    early = trained(tmp_path, patience=1)
    assert [one["loss"] for one in early.followed.history] == losses[: lowest + 2]
    ended = (lowest + 1) * EVERY
    assert early.followed.figures()["steps"] == ended < STEPS
    assert_same(early.adapter.state_dict(), last.seen[ended])
    # Nothing of its last step is stored: a training that resumes ends as it did, too.
    assert_same(trained(tmp_path, patience=1).adapter.state_dict(), last.seen[ended])


@pytest.mark.parametrize("stop", [1, 5])
def test_a_training_that_resumes_keeps_what_an_unbroken_one_does(stop, best, tmp_path):
    trained(tmp_path, stop=stop, keep_best=True)
    resumed = trained(tmp_path, keep_best=True)
    assert resumed.followed.history == best.followed.history
    assert_same(resumed.adapter.state_dict(), best.adapter.state_dict())


def test_rows_that_are_set_aside_have_no_twin_among_the_others():
    rows = [EncodedChat([1, index // 2, 3], 1) for index in range(20)]
    found = split("law", rows, 3)
    assert len(found.validation) == 3
    assert len(found.training) == 14
    assert [row.input_ids[1] for row in found.validation] == [0, 3, 6]
    assert not {row.input_ids[1] for row in found.training} & {0, 3, 6}


def test_half_of_a_domain_stays_at_least():
    rows = [EncodedChat([1, index // 2, 3], 1) for index in range(20)]
    assert len(split("law", rows, 5).training) == 10
    says = r"rows=6 is more than half of law, which has 10 different .*: set aside at most 5"
    with pytest.raises(UserError, match=says):
        split("law", rows, 6)


@pytest.mark.parametrize("option", [{"keep_best": True}, {"patience": 2}])
def test_options_that_go_by_the_loss_need_rows(option):
    with pytest.raises(UserError, match=r"no loss to go by; set trainer\.validation\.rows=<"):
        ValidationConfig(**option)
