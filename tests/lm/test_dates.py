"""A chat template that prints the date prints the one of the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerlora.config import ModelConfig
from steerlora.errors import UserError
from steerlora.lm.dates import pin_date
from steerlora.lm.pretrained import open_tokenizer

ASKING = {
    "llama": '{%- if strftime_now is defined %}{%- set d = strftime_now("%d %b %Y") %}{% endif %}'
    "Today Date: {{ d }}",
    "mistral": "Today is {{ strftime_now('%Y-%m-%d') }}, a {{ strftime_now( '%A' ) }}",
}
PRINTS = {"llama": "Today Date: 03 Feb 2021", "mistral": "Today is 2021-02-03, a Wednesday"}


@pytest.mark.parametrize("kind", ASKING)
def test_a_template_prints_the_day_that_it_is_told(kind, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ASKING[kind]
    turns = [{"role": "user", "content": "?"}]
    today = tokenizer.apply_chat_template(turns, tokenize=False)
    pin_date(tokenizer, "2021-02-03")
    assert tokenizer.apply_chat_template(turns, tokenize=False) == PRINTS[kind] != today


def test_templates_without_a_date_stay_as_they_are(make_tokenizer):
    for name in ("thinking", "plain", "none"):
        tokenizer = make_tokenizer(name)
        before = tokenizer.chat_template
        pin_date(tokenizer, "2021-02-03")
        assert tokenizer.chat_template == before


def test_each_of_several_templates_is_pinned(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": ASKING["llama"], "tool_use": ASKING["mistral"]}
    pin_date(tokenizer, "2021-02-03")
    assert all("strftime_now(" not in text for text in tokenizer.chat_template.values())


def test_a_date_that_cannot_be_pinned_is_refused(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% set f = '%Y' %}{{ strftime_now(f) }}"
    with pytest.raises(UserError, match=r"cannot be pinned to model\.date=2021-02-03"):
        pin_date(tokenizer, "2021-02-03")


def test_training_and_evaluation_print_the_date_of_the_configuration(make_tokenizer, tmp_path):
    made = make_tokenizer()
    made.chat_template = ASKING["llama"]
    made.save_pretrained(tmp_path)
    turns = [{"role": "user", "content": "?"}]
    for date, printed in (("2021-02-03", "03 Feb 2021"), (ModelConfig.date, "26 Jul 2024")):
        tokenizer = open_tokenizer(str(tmp_path), date=date)
        assert tokenizer.apply_chat_template(turns, tokenize=False).endswith(printed)


def test_lm_evals_own_command_prints_it_too(make_model, make_tokenizer, tmp_path):
    from steerlora.evaluation.harness import SteerLoRALM

    folder: Path = tmp_path / "model"
    made = make_tokenizer()
    made.chat_template = ASKING["llama"]
    make_model().save_pretrained(folder)
    made.save_pretrained(folder)
    model = SteerLoRALM(str(folder), date="2021-02-03", device="cpu")
    asked = model.apply_chat_template([{"role": "user", "content": "?"}])
    assert asked == PRINTS["llama"]


@pytest.mark.parametrize("date", ["yesterday", "2024-13-01", "26 Jul 2024"])
def test_a_date_that_is_none_is_refused(date):
    with pytest.raises(UserError, match=rf"^model\.date={date}: must be a day as year-month-day"):
        ModelConfig(name="any", date=date)
