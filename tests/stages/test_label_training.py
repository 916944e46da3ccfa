"""What is found on labelled texts, and what learns to write them, on a model in which a label is
planted.

B batch, S sequence, D model width.
"""

from __future__ import annotations

import pytest
import torch

from steerlora.config import TrainerConfig
from steerlora.data.batches import collate
from steerlora.data.chat import EncodedChat
from steerlora.lm.decoder import edited, residual_streams
from steerlora.lm.signal_tokens import NOT_FIRST
from steerlora.methods.base import Sources
from steerlora.methods.sae_steering.config import SAESteeringConfig
from steerlora.saes.label_scores import auroc
from steerlora.stages import labelled_streams as streams
from steerlora.stages.label_training import drawn_batches, learn, reft_vector
from steerlora.training.language import next_token_loss

SITE, WORD = 1, 7


@pytest.fixture
def data(make_model, make_sae):
    """Twelve rows of two labels; those of label 0 answer with one word."""
    generator = torch.Generator().manual_seed(0)
    rows, labels = [], []
    for number in range(24):
        has = number % 4 < 2
        ids = torch.randint(1, 61, (5 + number % 3,), generator=generator).tolist()
        rows.append(EncodedChat([*ids, *([WORD] * 6 if has else ids[:5])], len(ids)))
        labels.append([has, not has])
    model = make_model()
    model.requires_grad_(False)
    saes = {"sae": make_sae()}
    return streams.read_texts(model, SITE, NOT_FIRST, 0, rows, torch.tensor(labels), saes)


def test_texts_are_read_in_their_order(data):
    for number in (0, 5, 23):
        ids = torch.tensor([data.rows[number].input_ids])
        stream = residual_streams(data.model, ids, torch.ones_like(ids), [SITE])[SITE][0, 1:]
        scores = data.scores["sae"]
        assert torch.allclose(scores.stream[number], stream.mean(0), atol=1e-5)
        fired = (data.saes["sae"].encode(stream).dense(64) > 0).float()
        assert torch.allclose(scores.frequency[number], fired.mean(0), atol=1e-6)
    assert data.l0["sae"] <= 5
    assert data.scale == {"sae": 1.0}


def test_directions_are_of_the_texts_that_choose(data):
    found = streams.difference_of_means(data, "sae", 0)
    tokens = {True: [], False: []}
    for number in data.choosing.tolist():
        ids = torch.tensor([data.rows[number].input_ids])
        stream = residual_streams(data.model, ids, torch.ones_like(ids), [SITE])[SITE][0, 1:]
        tokens[bool(data.labels[number, 0])].append(stream)
    expected = torch.cat(tokens[True]).mean(0) - torch.cat(tokens[False]).mean(0)
    assert torch.allclose(found.float(), expected, atol=1e-5)
    aims = streams.directions(
        data, "sae", lambda label: streams.difference_of_means(data, "sae", label)
    )
    telling = torch.arange(1, 24, 2)
    scores = data.scores["sae"].stream[telling] @ expected
    has = data.labels[telling, 0]
    assert aims[0].auroc == pytest.approx(float(auroc(scores[:, None], has)), abs=0.03)
    assert aims[0].auroc > 0.6
    probe = streams.probe_direction(data, "sae", 0)
    assert torch.cosine_similarity(probe.float(), expected, dim=0) > 0.3


def test_a_control_latent_fires_about_as_often(data):
    aims = streams.latents(data, "sae")
    others = streams.like_latents(data, "sae", aims, seed=0)
    rate = data.scores["sae"].frequency.mean(0)
    for aim, other in zip(aims, others, strict=True):
        assert other.candidate != aim.candidate
        distance = (rate - rate[aim.candidate]).abs()
        assert (distance < distance[other.candidate]).sum() <= streams.NEAREST
    assert streams.like_latents(data, "sae", aims, seed=0) == others


def test_labels_that_choose_may_be_others(data):
    told = streams.latents(data, "sae")
    swapped = streams.latents(data, "sae", labels=data.labels.flip(1))
    assert [one.candidate for one in swapped] == [one.candidate for one in told][::-1]
    allowed = torch.ones(64, dtype=torch.bool)
    allowed[told[0].candidate] = False
    assert streams.latents(data, "sae", allowed=allowed)[0].candidate != told[0].candidate


def answers_loss(data, vector: torch.Tensor | None) -> float:
    rows = streams.positives(data, 0)
    batch = collate(rows, [-1] * len(rows), 0)
    push = {SITE: lambda x: x if vector is None else x + 3 * vector}
    with torch.no_grad(), edited(data.model, push):
        return float(next_token_loss(data.model, batch))


def test_the_vector_of_reft_is_a_unit_vector_that_brings_the_answers(data):
    rows = streams.positives(data, 0)
    vector, again = (reft_vector(data.model, SITE, NOT_FIRST, rows, 0, seed=1) for _ in range(2))
    assert float(vector.norm()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(vector, again)
    start = torch.nn.functional.normalize(
        torch.randn(32, generator=torch.Generator().manual_seed(1)), dim=0
    )
    assert answers_loss(data, vector) < answers_loss(data, start)


def test_a_method_learns_the_answers_and_the_base_stays(data):
    before = {name: value.clone() for name, value in data.model.named_parameters()}
    config = SAESteeringConfig(sites=[SITE], along="vector")
    method = config.build(data.model, Sources(signal_tokens=NOT_FIRST), 0)
    first = answers_loss(data, None)
    trainer = TrainerConfig(max_steps=30, batch_size=99, learning_rate=0.1)
    learn(method, streams.positives(data, 0), trainer, 0, seed=0)
    assert answers_loss(data, None) < 0.8 * first
    method.remove()
    assert answers_loss(data, None) == pytest.approx(first)
    assert all(torch.equal(v, before[n]) for n, v in data.model.named_parameters())


def test_every_row_comes_once_an_epoch():
    rows = [EncodedChat([1, number], 1) for number in range(2, 8)]
    drawn = list(drawn_batches(rows, 3, 4, 0, seed=0))
    epochs = [[int(i) for batch in drawn[k : k + 2] for i in batch.input_ids[:, 1]] for k in (0, 2)]
    assert [sorted(one) for one in epochs] == [[2, 3, 4, 5, 6, 7]] * 2
    assert epochs[0] != epochs[1]
