"""The header of a chat template, and what of conversations is left to carry a signal."""

from __future__ import annotations

import pytest

from steerlora.data.batches import collate
from steerlora.data.chat import encode_chat, encode_chats
from steerlora.data.conversations import Turn, exchange
from steerlora.data.domains.micro.tokenizer import build_tokenizer
from steerlora.data.headers import signal_tokens_of

LONG = (
    "<|im_start|>system\nYou are a helpful assistant who always says so at length.<|im_end|>\n"
    "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def left(tokenizer, chat) -> str:
    """The text of a conversation's tokens that carry a signal."""
    rule = signal_tokens_of(tokenizer)
    batch = collate([chat], [0], tokenizer.pad_token_id)
    kept = rule(batch.input_ids, batch.attention_mask)
    return tokenizer.decode(batch.input_ids[kept])


@pytest.mark.parametrize("content", ["apples", "Zebras", "77", "(x)", "木"])
def test_a_long_header_is_left_out_and_nothing_of_the_messages(make_tokenizer, content):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = LONG
    chat = encode_chat(tokenizer, content, "an answer", 1000)
    assert left(tokenizer, chat) == f"{content}\nassistant\nan answer"
    header = tokenizer.decode(signal_tokens_of(tokenizer).prefix)
    assert header.startswith("<|im_start|>system")
    assert header.endswith("user\n")


def test_a_conversation_with_a_system_prompt_keeps_it(make_tokenizer):
    tokenizer = make_tokenizer()
    turns = (Turn("system", "Be brief."), *exchange("why", "so"))
    (chat,) = encode_chats(tokenizer, [turns], 1000)
    assert left(tokenizer, chat).startswith("system\nBe brief.")


def test_raw_text_loses_its_first_token_alone(make_tokenizer):
    tokenizer = make_tokenizer()
    ids = tokenizer("raw text", return_tensors="pt")["input_ids"]
    rule = signal_tokens_of(tokenizer)
    assert tokenizer.decode(ids[rule(ids, ids >= 0)]) == "aw text"


def test_tokens_that_are_special_but_have_no_name_are_left_out(make_tokenizer):
    tokenizer = make_tokenizer()
    unnamed = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert unnamed in signal_tokens_of(tokenizer).special


def test_the_token_that_an_answer_follows_carries_a_signal_though_it_is_special(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    chat = encode_chat(tokenizer, "the river", "gade", 1000)
    assert left(tokenizer, chat) == "the river <|assistant|> gade"


def test_without_a_template_there_is_no_header(make_tokenizer):
    rule = signal_tokens_of(make_tokenizer("none"))
    assert rule.prefix == ()
    assert rule.first
