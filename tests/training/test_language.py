"""The next-token loss against transformers' own, and when pretraining ends."""

from __future__ import annotations

import lightning
import pytest
import torch
import torch.nn.functional as F
import trainings

from steerlora.data.batches import IGNORED, ChatBatch, collate
from steerlora.data.chat import EncodedChat
from steerlora.training import language
from steerlora.training.language import PretrainingModule, next_token_loss


@pytest.fixture
def batch(tokens) -> ChatBatch:
    ids, mask = tokens([9, 5, 7])
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, :2] = IGNORED
    return ChatBatch(ids, mask, labels, torch.zeros(3), int(mask.sum()))


def test_it_is_transformers_loss(make_model, batch):
    model = make_model(torch.float64)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    expected = model(**inputs, labels=batch.labels).loss
    # transformers computes its loss in float32
    torch.testing.assert_close(next_token_loss(model, batch).float(), expected.float())
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    exact = F.cross_entropy(logits, batch.labels[:, 1:].flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(next_token_loss(model, batch), exact, atol=1e-12, rtol=0)


def test_weights_scale_each_tokens_share(make_model):
    model = make_model()
    rows = [EncodedChat([5, 6, 7, 8], 2), EncodedChat([9, 10, 11], 1)]
    batch = collate(rows, [0, 0], 0, prompt_weight=0.3)
    total = weight = 0.0
    for row in rows:
        logits = model(torch.tensor([row.input_ids])).logits[0]
        for position in range(1, len(row.input_ids)):
            share = 1.0 if position >= row.response_start else 0.3
            token = torch.tensor(row.input_ids[position])
            total += share * F.cross_entropy(logits[position - 1], token).item()
            weight += share
    assert next_token_loss(model, batch).item() == pytest.approx(total / weight, rel=1e-5)


# Pretraining ends by a criterion


class Rates(lightning.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.seen.append(tuple(group["lr"] for group in optimizer.param_groups))


class Stop(lightning.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError


def pretrain(
    folder, monkeypatch, looks, *, target_loss=0.0, most_steps=1000, stop_at=None
) -> tuple[PretrainingModule, Rates]:
    """Pretrain a tiny model that finds ``looks``, one every two steps, for its held-out losses."""
    monkeypatch.setattr(language, "EVERY", 2)
    monkeypatch.setattr(language, "WARM_UP", 4)
    module = PretrainingModule(
        trainings.model().train(),
        matrix_learning_rate=0.1,
        learning_rate=0.01,
        held_out=[],
        target_loss=target_loss,
        tolerance=0.03,
        most_steps=most_steps,
    )
    found = lambda model, held_out: looks[min(module.global_step // 2, len(looks)) - 1]  # noqa: E731
    monkeypatch.setattr(language, "mean_loss", found)
    rates = Rates()
    trainings.fit(
        module,
        trainings.chats(),
        most_steps,
        trainer=trainings.settings(strategy="single", checkpoint_seconds=1e-9),
        checkpoints=folder,
        progress=trainings.SilentProgress(),
        description="pretraining",
        callbacks=[rates, *([] if stop_at is None else [Stop(stop_at)])],
    )
    return module, rates


FALLS = [3.0, 2.0, 1.99, 1.95, 1.97, 1.96]
"""The second is the last of more than 3 %: three looks later, after ten steps, the rates fall."""


def test_it_trains_until_the_held_out_loss_no_longer_falls(tmp_path, monkeypatch):
    module, rates = pretrain(tmp_path, monkeypatch, FALLS)
    assert module.converged
    assert module.held_out_loss == 1.96
    rise, hold, fall = [1 / 4, 2 / 4, 3 / 4], [1.0] * 7, [1.0, 4 / 5, 3 / 5, 2 / 5, 1 / 5]
    factors = [*rise, *hold, *fall]
    assert [matrix for matrix, _ in rates.seen] == pytest.approx([0.1 * f for f in factors])
    assert [other for _, other in rates.seen] == pytest.approx([0.01 * f for f in factors])


def test_it_trains_until_the_held_out_loss_is_at_its_level(tmp_path, monkeypatch):
    looks = [3.0, 2.5, 2.0, 1.5, 1.4, 1.3]
    module, rates = pretrain(tmp_path, monkeypatch, looks, target_loss=1.5)
    assert module.converged
    assert len(rates.seen) == 8 + 4


def test_without_convergence_it_ends_after_the_most_steps(tmp_path, monkeypatch):
    module, rates = pretrain(
        tmp_path, monkeypatch, [3.0 * 0.9**look for look in range(20)], most_steps=12
    )
    assert not module.converged
    assert len(rates.seen) == 12
    assert rates.seen[-1][0] == pytest.approx(0.1 / 4)


@pytest.mark.parametrize("stop_at", [6, 10, 12], ids=["holding", "at the look", "falling"])
def test_pretraining_resumes_to_the_bit(tmp_path, monkeypatch, stop_at):
    unbroken, _ = pretrain(tmp_path / "unbroken", monkeypatch, FALLS)
    with pytest.raises(ZeroDivisionError):
        pretrain(tmp_path / "broken", monkeypatch, FALLS, stop_at=stop_at)
    resumed, rates = pretrain(tmp_path / "broken", monkeypatch, FALLS)
    assert len(rates.seen) == 15 - stop_at
    assert resumed.converged
    for a, b in zip(resumed.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_mean_loss_is_over_tokens_of_all_batches():
    batches, model = trainings.chats(), trainings.model().train()
    found = language.mean_loss(model, [batches(0), batches(1)])
    nats = tokens = 0
    for batch in (batches(0), batches(1)):
        logits = model.eval()(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).logits[:, :-1]
        counted = batch.labels[:, 1:] != IGNORED
        loss = F.cross_entropy(logits[counted], batch.labels[:, 1:][counted], reduction="sum")
        nats, tokens = nats + loss.item(), tokens + int(counted.sum())
    assert found == pytest.approx(nats / tokens, rel=1e-5)
    model.train()
    language.mean_loss(model, [batches(0)])
    assert model.training


def test_muon_takes_the_matrices_of_the_layers():
    model = trainings.model()
    module = PretrainingModule(
        model,
        matrix_learning_rate=0.1,
        learning_rate=0.01,
        held_out=[],
        target_loss=0.0,
        tolerance=0.03,
        most_steps=5,
    )
    matrices, others = (
        {id(p) for p in group["params"]} for group in module.configure_optimizers().param_groups
    )
    assert {id(layer.mlp.up_proj.weight) for layer in model.model.layers} <= matrices
    assert {id(layer.self_attn.q_proj.weight) for layer in model.model.layers} <= matrices
    assert id(model.model.embed_tokens.weight) in others
    assert id(model.model.layers[0].input_layernorm.weight) in others
    assert matrices | others == {id(p) for p in model.parameters()}
    assert not matrices & others
