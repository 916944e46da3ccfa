"""How LoRA around SAEs trains: its losses beside slow references, and what runs for them.

B batch, S sequence.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.training import learner_of, train
from torch import Tensor

from steerlora.config import TrainerConfig
from steerlora.data.chat import EncodedChat
from steerlora.data.packing import PackedBatches
from steerlora.lm.decoder import layers_of
from steerlora.methods.module import MethodModule

KINDS = {
    "after": {},
    "all": {"adapted": "all"},
    "two sites": {"sites": (1, 2), "map_rank": 2},
    "a map alone": {"adapted": "none", "map_rank": 2},
    "random": {"dictionary": "random"},
}


def log_probabilities(model, batch) -> Tensor:
    found = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return found.log_softmax(-1)


def gradients(method) -> dict[str, Tensor]:
    found = {name: value.grad.clone() for name, value in method.named_parameters()}
    method.zero_grad()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_and_its_gradients_are_those_of_whole_forwards(
    kind, make_model, make_spliced, text
):
    """The learner runs the upper layers apart; in float64."""
    model = make_model(torch.float64)
    method = make_spliced(model, **KINDS[kind])
    teacher = log_probabilities(make_model(torch.float64), text)
    student = log_probabilities(model, text)
    each = (teacher.exp() * (teacher - student)).sum(-1)
    expected = each[text.attention_mask.bool()].mean()
    expected.backward()
    wanted = gradients(method)
    ((weight, loss),) = learner_of(model, method).losses(text).values()
    (weight * loss).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    for name, value in gradients(method).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-7, atol=1e-11, msg=name)
        assert value.any(), name


@pytest.mark.parametrize("adapted", ["after", "all"])
def test_gradients_are_those_of_finite_differences(adapted, make_model, make_spliced, text):
    """As far as the model's norms, which compute in float32, let the differences tell."""
    model = make_model(torch.float64)
    method = make_spliced(model, adapted=adapted, map_rank=2)
    learner, step = learner_of(model, method), 1e-3

    def loss() -> Tensor:
        return learner.losses(text)["kl"][1]

    loss().backward()
    for name in ("layers.1:self_attn/q_proj.B", "layers.2:mlp/down_proj.A", "maps.1.update.B"):
        value = method.get_parameter(name)
        place = divmod(int(value.grad.abs().argmax()), value.shape[1])
        found = []
        for change in (step, -2 * step, step):
            with torch.no_grad():
                value[place] += change
                found.append(float(loss()))
        expected = (found[0] - found[1]) / (2 * step)
        assert float(value.grad[place]) == pytest.approx(expected, rel=0.02, abs=5e-4), name


def test_cross_entropy_is_of_the_adapter_without_the_saes(make_model, make_spliced, text):
    model = make_model(torch.float64)
    method = make_spliced(model, objective="cross_entropy")
    with method.only("adapter"):
        scores = log_probabilities(model, text)
    real = text.attention_mask.bool()
    expected = 0.0
    for row in range(3):
        for place in range(int(real[row].sum()) - 1):
            expected -= float(scores[row, place, text.input_ids[row, place + 1]])
    ((_, loss),) = learner_of(model, method).losses(text).values()
    assert float(loss.detach()) == pytest.approx(expected / int(real.sum()), rel=1e-9)


def test_a_shuffled_teacher_is_the_row_before(make_model, make_spliced, text):
    model = make_model(torch.float64)
    method = make_spliced(model, teacher="shuffled")
    with method.disabled():
        teacher = log_probabilities(model, text)
    student = log_probabilities(model, text)
    real = text.attention_mask.bool()
    found = []
    for row in range(3):
        for place in range(int(real[row].sum())):
            if real[row - 1, place]:
                p, q = teacher[row - 1, place], student[row, place]
                found.append(F.kl_div(q, p, log_target=True, reduction="sum"))
    ((_, loss),) = learner_of(model, method).losses(text).values()
    torch.testing.assert_close(loss, torch.stack(found).mean())
    with pytest.raises(ValueError, match="takes another row of a part"):
        learner_of(model, method).losses(text.row(0))


@pytest.mark.parametrize("kind", [{}, {"adapted": "all"}, {"objective": "cross_entropy"}])
def test_parts_of_a_batch_add_up_to_the_whole(kind, make_model, make_spliced, text):
    model = make_model(torch.float64)
    learner = learner_of(model, make_spliced(model, **kind))
    whole = learner.losses(text)
    parts = [learner.losses(text.part(index, 3)) for index in range(3)]
    for name, (_, value) in whole.items():
        torch.testing.assert_close(sum(part[name][1] for part in parts) / 3, value)


def test_packed_rows_are_the_rows_alone(make_model, make_spliced, text):
    model = make_model(torch.float64)
    learner = learner_of(model, make_spliced(model))
    chats = [
        EncodedChat(row[: int(mask.sum())].tolist(), 1)
        for row, mask in zip(text.input_ids, text.attention_mask, strict=True)
    ]
    settings = {"batch_size": 1, "pad_token_id": 0, "seed": 0}
    packed = PackedBatches(chats, [0, 0, 0], length=24, **settings)(0)
    assert len(packed.input_ids) == 1
    expected = learner.losses(text)["kl"][1]
    torch.testing.assert_close(learner.losses(packed)["kl"][1], expected)


def runs_of(model) -> list[int]:
    """The numbers of the layers that run, as they do."""
    found: list[int] = []
    for number, layer in enumerate(layers_of(model)):
        layer.register_forward_pre_hook(lambda *_, number=number: found.append(number))
    return found


def test_layers_below_run_once_and_not_again_where_they_are_kept(make_model, make_spliced, text):
    model = make_model()
    method = make_spliced(model, cached_tokens=100)
    ran = runs_of(model.base_model)
    learner = learner_of(model, method)
    first = learner.losses(text)["kl"][1]
    assert ran == [0, 1, 2, 1, 2]
    ran.clear()
    again = learner.losses(text)["kl"][1]
    assert ran == [1, 2]
    torch.testing.assert_close(again, first)
    other = replace(
        text, input_ids=text.input_ids.flip(0), attention_mask=text.attention_mask.flip(0)
    )
    torch.testing.assert_close(learner.losses(other)["kl"][1], first)
    assert ran == [1, 2, 1, 2]  # the same rows, in another order
    changed = replace(text, input_ids=text.input_ids.masked_fill(text.input_ids == 40, 41))
    learner.losses(changed)
    assert ran[4:] == [0, 1, 2, 1, 2]


def test_no_more_tokens_are_kept_than_asked_for(make_model, make_spliced, text):
    model = make_model()
    learner = learner_of(model, make_spliced(model, cached_tokens=15))
    ran = runs_of(model.base_model)
    for _ in range(2):
        learner.losses(text)  # 19 tokens
    assert ran == 2 * [0, 1, 2, 1, 2]
    ran.clear()
    learner.losses(text.row(1))
    assert ran == [1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_divergence_and_leaves_the_base_alone(
    kind, make_model, make_spliced, text, tmp_path
):
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method = make_spliced(model, **KINDS[kind])
    learner = learner_of(model, method)
    first = float(learner.losses(text)["kl"][1])
    trainer = TrainerConfig(learning_rate=1e-2, checkpoint_seconds=1e9)
    module = MethodModule(learner, trainer=trainer, total_steps=20)
    assert module.flops_per_token(text) > 0
    train(module, lambda step: text, tmp_path, 20)
    assert float(learner.losses(text)["kl"][1]) < 0.7 * first
    method.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
