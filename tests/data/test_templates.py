"""Chat templates of several families: nothing of a conversation is lost, each answer is learnt."""

from __future__ import annotations

import pytest

from steerlora.data.batches import IGNORED, collate
from steerlora.data.chat import EncodedChat, encode_chats
from steerlora.data.conversations import Turn, exchange
from steerlora.data.templates import end_of_turn, render
from steerlora.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "<|begin|>{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (  # has no place for a system prompt, and does not say so
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
WORDS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n### End\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
OPEN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FAMILIES = {  # {name: (template, what ends a turn)}
    "chatml": (CHATML, "<|im_end|>"),
    "llama": (LLAMA, "<|eot_id|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "phi": (PHI, "<|end|>"),
    "mistral": (MISTRAL, "</s>"),
    "words": (WORDS, "\n### End"),
    "never ends a turn": (OPEN, "<eos>"),
}
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot_id|>", "<bos>"),
    *("<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    *("<s>", "</s>", "\n\n", "<turn>"),
]

ANSWERS = ("yes", " two\n\nlines ", "assistant", "a", "user: <b>", "été ✓", "(3)", "same", "same")


def conversation(count: int, *, system: bool = True) -> tuple[Turn, ...]:
    """So many questions and answers, some of which say what a template says."""
    turns = [Turn("system", "Obey the user.")] if system else []
    for number in range(count):
        answer = ANSWERS[number % len(ANSWERS)]
        turns += exchange(f"{answer}? question {number} assistant\n", answer)
    return tuple(turns)


@pytest.fixture(params=FAMILIES)
def family(request, make_tokenizer):
    """(tokenizer, what ends a turn)"""
    template, end = FAMILIES[request.param]
    tokenizer = make_tokenizer(eos="<eos>")
    tokenizer.add_tokens(SPECIAL)
    tokenizer.chat_template = template
    return tokenizer, end


def learnt(tokenizer, chat: EncodedChat) -> list[str]:
    """The text of each answer that the loss counts."""
    labels = collate([chat], [0], 0).labels[0].tolist()
    found = [tokenizer.decode(chat.input_ids[first:stop]) for first, stop in chat.answers]
    counted = [id_ for id_ in labels if id_ != IGNORED]
    assert tokenizer.decode(counted) == "".join(found)
    return found


def test_the_end_of_a_turn_is_the_templates_own(family):
    tokenizer, end = family
    assert end_of_turn(tokenizer).strip(" ") == end


@pytest.mark.parametrize("count", [1, 2, len(ANSWERS)])
@pytest.mark.parametrize("system", [True, False])
def test_nothing_is_lost_and_every_answer_is_learnt_with_its_end(family, count, system):
    tokenizer, end = family
    turns = conversation(count, system=system)
    (chat,) = encode_chats(tokenizer, [turns], 10_000)
    text, position = tokenizer.decode(chat.input_ids), 0
    for turn in turns:
        position = text.index(turn.content.strip(), position)
    answers = [turn.content for turn in turns if turn.role == "assistant"]
    for number, (said, answer) in enumerate(zip(learnt(tokenizer, chat), answers, strict=True), 1):
        # Between turns, what the template never writes is not there.
        ends = "" if end == "<eos>" and number < count else end
        assert said.removesuffix(ends).strip() == answer.strip()
        assert said.endswith(ends)
    assert not chat.prompt_cut
    assert not chat.response_cut


def test_all_before_the_last_answer_is_as_at_generation(family):
    tokenizer, _ = family
    turns = conversation(3, system=False)
    (chat,) = encode_chats(tokenizer, [turns], 10_000)
    asked = [turn._asdict() for turn in turns[:-1]]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert chat.input_ids[: chat.response_start] == ids


def test_only_the_last_answer_is_learnt_where_that_is_asked_for(family):
    tokenizer, _ = family
    turns = conversation(3)
    (all_of_them,), (last,) = (
        encode_chats(tokenizer, [turns], 10_000, last_only=only) for only in (False, True)
    )
    assert last.earlier == ()
    assert last == all_of_them._replace(earlier=())


def test_rows_do_not_depend_on_their_company(family):
    tokenizer, _ = family
    rows = [conversation(count, system=count % 2 == 0) for count in (1, 3, 2, 1)]
    together = encode_chats(tokenizer, rows, 10_000)
    assert together == [encode_chats(tokenizer, [turns], 10_000)[0] for turns in rows]


def test_the_end_of_a_turn_is_learnt_where_the_answer_is_whole_only(family):
    tokenizer, end = family
    turns = exchange("ask", "an answer of some length")
    (whole,) = encode_chats(tokenizer, [turns], 10_000)
    for length in range(2, len(whole.input_ids) + 2):
        (chat,) = encode_chats(tokenizer, [turns], length)
        answer = learnt(tokenizer, chat)[-1]
        assert len(chat.input_ids) <= length
        assert chat.response_cut == (not answer.endswith(end))
        assert tokenizer.decode(whole.input_ids[whole.response_start :]).startswith(answer)
        assert chat.prompt_cut == (chat.response_start < whole.response_start)
    assert chat == whole


def test_an_earlier_answer_that_lost_its_beginning_is_not_learnt(family):
    tokenizer, _ = family
    turns = conversation(3)
    (whole,) = encode_chats(tokenizer, [turns], 10_000)
    for length in range(len(whole.input_ids), 2, -7):
        (chat,) = encode_chats(tokenizer, [turns], length)
        lost = whole.response_start - chat.response_start
        kept = [(a - lost, b - lost) for a, b in whole.earlier if a > lost]
        assert list(chat.earlier) == kept
        said = learnt(tokenizer, chat)[:-1]
        assert said == learnt(tokenizer, whole)[:-1][len(whole.earlier) - len(kept) :]


def test_a_system_prompt_without_a_place_goes_before_the_next_question(make_tokenizer):
    tokenizer = make_tokenizer(eos="<eos>")
    tokenizer.chat_template = GEMMA
    late = (*exchange("one", "1"), Turn("system", "Be brief."), *exchange("two", "2"))
    rows = [conversation(1), late]
    first, second = (row.opening for row in render(tokenizer, rows))
    assert "user\nObey the user.\n\nyes? question 0" in first
    assert "user\nBe brief.\n\ntwo<end_of_turn>" in second


def test_a_conversation_that_the_template_refuses_is_named(make_tokenizer):
    tokenizer = make_tokenizer(eos="<eos>")
    tokenizer.chat_template = GEMMA
    rows = [conversation(1), (Turn("user", "Hello\nthere"), *exchange("again", "yes"))]
    with pytest.raises(UserError) as caught:
        render(tokenizer, rows)
    assert str(caught.value) == (
        "the model's chat template refuses conversation 2 (user, user: 'Hello there'): roles must "
        "alternate"
    )


def test_a_template_that_hides_an_answer_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(eos="<eos>")
    tokenizer.chat_template = CHATML.replace("for m in messages", "for m in messages[-2:]")
    with pytest.raises(
        UserError, match=r"not show every answer of conversation 1 .* of one answer each"
    ):
        render(tokenizer, [conversation(3)])
    assert len(render(tokenizer, [conversation(3)], last_only=True)) == 1
