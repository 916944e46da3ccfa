"""A direction's output score is that of a forward in which the last token's stream is pushed."""

from __future__ import annotations

import pytest
import torch

from steerlora.lm.decoder import edited
from steerlora.lm.logit_effects import logit_effects
from steerlora.lm.output_scores import TOP, output_scores

BEFORE = [5, 9, 3, 17]


def test_it_is_what_the_definition_says(make_model):
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 32, generator=generator)
    lengths = torch.tensor([0.0, 2.0, 30.0])
    found = output_scores(model, 1, directions, lengths, BEFORE)
    for direction, length, score in zip(directions, lengths, found, strict=True):

        def push(stream, by=length * direction):
            return torch.stack([row + by * (i == 3) for i, row in enumerate(stream[0])])[None]

        with torch.no_grad(), edited(model, {1: push}):
            chance = model(input_ids=torch.tensor([BEFORE])).logits[0, -1].softmax(-1)
        spoken = logit_effects(model, direction[None])[0].argsort(descending=True)[:TOP].tolist()
        order = chance.argsort(descending=True).tolist()
        best = max(spoken, key=lambda token: chance[token])
        expected = float(chance[best]) * (1 - order.index(best) / len(order))
        assert float(score) == pytest.approx(expected, rel=1e-4)


def test_a_latents_score_does_not_depend_on_others(make_model):
    model = make_model()
    directions = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([1.0, 2.0, 3.0, 400.0])
    together = output_scores(model, 1, directions, lengths, BEFORE)
    alone = [
        output_scores(model, 1, directions[i : i + 1], lengths[i : i + 1], BEFORE) for i in range(4)
    ]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)


def test_a_push_towards_a_token_brings_it_out(make_model):
    """The stream that leaves the last layer, pushed along a row of the head."""
    model = make_model(tie_word_embeddings=False)
    row = model.lm_head.weight[7].detach()
    weak, strong = (
        output_scores(model, 3, row[None], torch.tensor([length]), BEFORE) for length in (0.1, 1e4)
    )
    assert float(strong) > max(0.5, float(weak))
