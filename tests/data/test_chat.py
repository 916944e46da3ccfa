"""Conversations as token ids: truncation rules, masks, and batches as a function of the step."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steerlora.data.batches import IGNORED, ChatBatches, by_length, collate
from steerlora.data.chat import EncodedChat, encode_chat

PLAIN = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
WITH_NEWLINE = PLAIN.replace("'<end>'", "'<end>\n'")
TEMPLATES = {
    "plain": PLAIN,
    "newline after the end of turn": WITH_NEWLINE,
    "another opening in training": PLAIN.replace("[assistant]{%", "[assistant]!{%"),
}


@pytest.fixture(params=TEMPLATES)
def tokenizer(request) -> PreTrainedTokenizerFast:
    """One token a character; roles and the end of turn are single tokens."""
    special = ["<pad>", "<end>", "[user]", "[assistant]", "[UNK]"]
    vocabulary = [*special, *"abcdefghijklmnopqrstuvwxyz \n!"]
    made = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["[user]", "[assistant]"],
        chat_template=TEMPLATES[request.param],
    )


def text(tokenizer, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def test_prompt_is_as_at_generation_and_response_ends_its_turn(tokenizer):
    row = encode_chat(tokenizer, "what", "it is", 100)
    generation = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what"}], add_generation_prompt=True, return_dict=False
    )
    assert row.input_ids[: row.response_start] == generation
    assert text(tokenizer, row.input_ids[row.response_start :]) == "it is<end>"


def test_long_prompts_lose_their_beginning_and_long_responses_their_tail(tokenizer):
    def cut(prompt: str, response: str, length: int) -> tuple[str, str]:
        row = encode_chat(tokenizer, prompt, response, length)
        assert len(row.input_ids) <= length
        ids, start = row.input_ids, row.response_start
        return text(tokenizer, ids[:start]), text(tokenizer, ids[start:])

    whole_prompt, _ = cut("abcdefghij", "xyz", 100)
    prompt, response = cut("abcdefghij", "xyz", 12)
    assert response == "xyz<end>"
    assert prompt == _last(tokenizer, whole_prompt, 8)
    # Where both are long, half is left to the prompt, and the turn does not end.
    prompt, response = cut("abcdefghij", "klmnopqrstuv", 10)
    assert response == "klmno"
    assert prompt == _last(tokenizer, whole_prompt, 5)
    # A short prompt leaves its room to the response.
    short_prompt, _ = cut("a", "b", 100)
    prompt, response = cut("a", "klmnopqrstuv", 14)
    assert prompt == short_prompt
    assert "klmnopqrstuv".startswith(response)


def _last(tokenizer, rendered: str, count: int) -> str:
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return text(tokenizer, ids[-count:])


ROWS = [EncodedChat([5, 6, 7, 8], 2), EncodedChat([9, 10], 1), EncodedChat([11, 12, 13], 0)]


def test_collate_pads_on_the_right_and_labels_responses():
    batch = collate(ROWS, [0, 1, -1], pad_token_id=3)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 10, 3, 3], [11, 12, 13, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    ignored = IGNORED
    assert batch.labels.tolist() == [
        [ignored, ignored, 7, 8],
        [ignored, 10, ignored, ignored],
        [11, 12, 13, ignored],
    ]
    assert batch.domains.tolist() == [0, 1, -1]
    assert batch.weights is None
    assert batch.tokens == 9
    assert torch.equal(batch.to("cpu").labels, batch.labels)


def test_collate_weighs_prompts_and_never_padding():
    batch = collate(ROWS, [0, 0, 0], pad_token_id=3, prompt_weight=0.25)
    assert torch.equal(batch.labels != IGNORED, batch.attention_mask.bool())
    assert batch.weights[0].tolist() == [0.25, 0.25, 1, 1]
    assert batch.weights[1, :2].tolist() == [0.25, 1]
    assert batch.to("cpu").weights is not None


def test_collate_labels_every_answer():
    row = EncodedChat([5, 6, 7, 8, 9, 10], 5, earlier=((1, 2), (3, 4)))
    no = IGNORED
    assert collate([row], [0], 0).labels.tolist() == [[no, 6, no, 8, no, 10]]
    weighed = collate([row, ROWS[1]], [0, 0], 0, prompt_weight=0.25)
    assert weighed.labels[0].tolist() == row.input_ids
    assert weighed.weights[0].tolist() == [0.25, 1, 0.25, 1, 0.25, 1]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_batches_that_are_read_hold_every_row_once_and_few_long_ones(size, monkeypatch):
    monkeypatch.setattr("steerlora.data.batches.MOST_TOKENS", 40)
    rows = many(50)
    groups = list(by_length(rows, size))
    assert sorted(index for group in groups for index in group) == list(range(50))
    lengths = [[len(rows[index].input_ids) for index in group] for group in groups]
    assert all(len(group) <= size and len(group) * max(group) <= 40 for group in lengths)
    assert list(chain.from_iterable(lengths)) == sorted(len(row.input_ids) for row in rows)


def many(count: int = 203) -> list[EncodedChat]:
    """Rows of lengths 2 to 30, each known by its first token."""
    lengths = torch.randint(2, 31, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return [EncodedChat([1000 + i] + [1] * (n - 1), 1) for i, n in enumerate(lengths)]


def batches(seed: int = 0, size: int = 8) -> ChatBatches:
    rows = many()
    domains = [i % 5 for i in range(len(rows))]
    return ChatBatches(rows, domains, batch_size=size, pad_token_id=0, seed=seed)


def firsts(batch) -> list[int]:
    return batch.input_ids[:, 0].tolist()


def test_every_row_comes_once_an_epoch_bar_the_dropped_tail():
    made, per_epoch = batches(), 203 // 8
    for epoch in range(3):
        seen = Counter()
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            batch = made(step)
            assert batch.domains.tolist() == [(first - 1000) % 5 for first in firsts(batch)]
            seen.update(firsts(batch))
        assert len(seen) == per_epoch * 8
        assert set(seen.values()) == {1}


def test_a_batch_depends_on_step_and_seed_alone():
    forward, backward = batches(), batches()
    ahead = {step: firsts(forward(step)) for step in range(60)}
    assert {step: firsts(backward(step)) for step in reversed(range(60))} == ahead
    assert any(firsts(batches(seed=1)(step)) != ahead[step] for step in range(3))
    assert [ahead[step] for step in range(25)] != [ahead[step + 25] for step in range(25)]


def test_rows_of_like_length_share_a_batch_but_not_in_order():
    made = batches()
    padding = [1 - b.attention_mask.float().mean().item() for b in map(made, range(25))]
    assert sum(padding) / 25 < 0.15
    widths = [made(step).input_ids.shape[1] for step in range(25)]
    assert widths != sorted(widths)


def test_fewer_rows_than_a_batch_are_one_batch():
    made = ChatBatches(ROWS, [0, 0, 0], batch_size=8, pad_token_id=3, seed=0)
    assert sorted(firsts(made(0))) == sorted(firsts(made(5))) == [5, 9, 11]
