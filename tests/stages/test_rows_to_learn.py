"""Which conversations a method trains on, and what is said of those that do not fit."""

from __future__ import annotations

import pytest

from steerlora.config import TrainerConfig
from steerlora.data.conversations import Turn, exchange, to_row
from steerlora.data.jsonl import write_objects
from steerlora.errors import UserError
from steerlora.stages.rows_to_learn import rows_to_learn

SHORT, LONG = exchange("ask", "say"), exchange("ask", "say " * 60)
ASKING = exchange("ask " * 60, "say")
TALK = (Turn("system", "Obey."), *exchange("one", "1"), *exchange("two", "2"))


@pytest.fixture
def learn(tmp_path, make_tokenizer):
    """``learn({"law": [...]}, max_length=80)``: as of a domains artifact with these rows."""

    def rows(domains: dict, **trainer):
        for name, own in domains.items():
            write_objects(tmp_path / f"train/{name}.jsonl", map(to_row, own))
        config = TrainerConfig(**trainer)
        return rows_to_learn(tmp_path, list(domains), make_tokenizer(), config)

    return rows


def test_cut_answers_are_counted_and_kept_unless_they_are_to_be_dropped(learn, caplog):
    domains = {"law": [SHORT, LONG, SHORT], "math": [SHORT]}
    kept, _, figures = learn(domains, max_length=120)
    dropped, _, same = learn(domains, max_length=120, drop_cut=True)
    assert figures == same == {"cut_prompts": 0, "cut_responses": 1}
    assert [len(rows) for rows in kept.values()] == [3, 1]
    assert dropped["law"] == [kept["law"][0], kept["law"][2]]
    assert all("law 1 and 0 of 3" in record.getMessage() for record in caplog.records)
    assert len(caplog.records) == 2


def test_a_cut_prompt_is_dropped_like_a_cut_answer(learn):
    kept, _, figures = learn({"law": [ASKING, SHORT]}, max_length=120)
    assert figures == {"cut_prompts": 1, "cut_responses": 0}
    dropped, *_ = learn({"law": [ASKING, SHORT]}, max_length=120, drop_cut=True)
    assert dropped["law"] == kept["law"][1:]


def test_a_domain_of_which_nothing_fits_is_refused(learn):
    says = r"trainer\.drop_cut=true leaves nothing of law: .* trainer\.max_length=120; set a larger"
    with pytest.raises(UserError, match=says):
        learn({"math": [SHORT], "law": [LONG]}, max_length=120, drop_cut=True)


def test_every_answer_is_learnt_unless_only_the_last_is_to_be(learn):
    every, last = (
        learn({"law": [TALK]}, max_length=500, last_turn_only=only)[0]["law"][0]
        for only in (False, True)
    )
    assert every.input_ids == last.input_ids
    assert (len(every.answers), len(last.answers)) == (2, 1)
