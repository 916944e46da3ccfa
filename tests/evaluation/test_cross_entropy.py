"""Held-out cross-entropy against a one-by-one loop in float64."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from steerlora.data.chat import encode_chats
from steerlora.data.conversations import Conversation, exchange
from steerlora.evaluation.cross_entropy import heldout_cross_entropy, summarise

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] }}"
    "{{ ' <|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WORDS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", *"abcdefghij"]
ROWS = [
    exchange("a b c d e f g", "h"),
    exchange("a", "b c d e f g h i j"),
    exchange("j i h", "g f"),
    exchange("c c", "d d d d"),
    exchange("b", "a"),
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<|pad|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=WORDS[2:4],
        chat_template=TEMPLATE,
    )


@pytest.fixture
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        attention_dropout=0.5,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)  # far from uniform predictions
    return model.train()


def one_by_one(
    model: nn.Module, tokenizer, max_length: int, rows: list[Conversation] = ROWS
) -> list[tuple[float, int]]:
    """The definition: minus the log-probability of every token of an answer after the first."""
    items = []
    model.eval()
    for chat in encode_chats(tokenizer, rows, max_length):
        with torch.no_grad():
            logits = model(torch.tensor([chat.input_ids])).logits[0]
        chances = logits.log_softmax(-1)
        places = [p for first, stop in chat.answers for p in range(max(first, 1), stop)]
        nats = -sum(chances[place - 1, chat.input_ids[place]].item() for place in places)
        items.append((nats, len(places)))
    return items


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_equals_one_by_one(model, tokenizer, batch_size: int) -> None:
    got = heldout_cross_entropy(model, tokenizer, ROWS, batch_size=batch_size, max_length=64)
    assert model.training  # left as it was; dropout did not take part
    assert len(got.per_item) == len(ROWS)
    assert [count for _, count in got.per_item] == [2, 10, 3, 5, 2]  # end of turn included
    want = one_by_one(model, tokenizer, 64)
    # RMSNorm of transformers works in float32 whatever the model's type.
    assert got.per_item == [(pytest.approx(n, rel=1e-6), count) for n, count in want]
    assert got.value == pytest.approx(sum(n for n, _ in want) / 22, rel=1e-6)
    assert got.value == pytest.approx(sum(n for n, _ in got.per_item) / 22, rel=1e-14)


def test_cut_rows_equal_one_by_one(model, tokenizer) -> None:
    got = heldout_cross_entropy(model, tokenizer, ROWS, batch_size=3, max_length=6)
    assert got.cut == 4  # the last row has five tokens with its roles and ends of turns
    want = one_by_one(model, tokenizer, 6)
    assert got.per_item == [(pytest.approx(n, rel=1e-6), count) for n, count in want]
    assert all(count <= 6 for _, count in got.per_item)


def test_every_answer_of_a_conversation_is_scored(model, tokenizer) -> None:
    rows = [ROWS[0], (*exchange("a", "b c"), *exchange("d", "e"), *exchange("f g", "h i j"))]
    got = heldout_cross_entropy(model, tokenizer, rows, batch_size=2, max_length=64)
    assert [count for _, count in got.per_item] == [2, 3 + 2 + 4]
    want = one_by_one(model, tokenizer, 64, rows)
    assert got.per_item == [(pytest.approx(n, rel=1e-6), count) for n, count in want]
    assert got.cut == 0


def test_models_that_change_their_logits_are_asked_for_logits(model, tokenizer) -> None:
    plain = heldout_cross_entropy(model, tokenizer, ROWS, batch_size=2, max_length=64)

    class Wrapped(nn.Module):
        """Not one of transformers' classes, and its logits are not those of ``lm_head``."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids, **inputs):
            output = self.inner(input_ids=input_ids, **inputs)
            output.logits = output.logits / 2
            return output

    wrapped = Wrapped()
    got = heldout_cross_entropy(wrapped, tokenizer, ROWS, batch_size=2, max_length=64)
    assert abs(got.value - plain.value) > 0.1
    want = one_by_one(wrapped, tokenizer, 64)
    assert got.per_item == [(pytest.approx(n, rel=1e-6), count) for n, count in want]


def test_prompt_logits_are_not_computed(model, tokenizer) -> None:
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    heldout_cross_entropy(model, tokenizer, ROWS, batch_size=5, max_length=64)
    assert seen == [22]


def test_summary_of_items() -> None:
    same = summarise([(2.0, 1), (4.0, 2), (20.0, 10)])
    assert same.value == 2.0
    assert same.stderr == pytest.approx(0.0, abs=1e-12)
    equal = summarise([(1.0, 2), (3.0, 2), (8.0, 2)])  # equal lengths: the usual standard error
    means = torch.tensor([0.5, 1.5, 4.0], dtype=torch.float64)
    assert equal.value == pytest.approx(means.mean().item())
    assert equal.stderr == pytest.approx((means.std() / math.sqrt(3)).item())
    assert math.isnan(summarise([(1.0, 1)]).stderr)
