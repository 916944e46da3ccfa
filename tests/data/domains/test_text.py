"""Real text: reading, splitting, tokenizing."""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path

import pytest
from helpers.files import NO_FILES
from transformers import AutoTokenizer

from steerlora.cli import compose
from steerlora.data.chat import encode_chat, encode_chats
from steerlora.data.domains.text import writer
from steerlora.data.domains.text.tokenizer import build_tokenizer
from steerlora.data.jsonl import read_rows
from steerlora.errors import UserError
from steerlora.stages.domains import step as domains_step
from steerlora.text import for_terminal


def real_folder() -> Path:
    """The folder of real text, or a skip that says how to name it."""
    beside = next(Path(__file__).resolve().parents[4].glob("*/data/real"), None)
    folder = Path(os.environ.get("STEERLORA_TEXT_DIR", beside or "nowhere"))
    if not folder.is_dir():
        pytest.skip("set STEERLORA_TEXT_DIR to a folder of real text to run this test")
    return folder


def save(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def chats(domain: str, count: int, start: int = 0) -> list[dict]:
    return [
        {"prompt": f"{domain} question {i}?", "response": f"{domain} answer {i}."}
        for i in range(start, start + count)
    ]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Five small domains with the test files of lm-eval's own tasks."""
    folder = tmp_path / "source"
    folder.mkdir()
    for domain in ("instruction", "math", "code"):
        save(folder / f"{domain}_train.jsonl", chats(domain, 60))
    save(folder / "code_test.jsonl", chats("code", 20, start=100))
    for part, start in (("train", 0), ("test", 500)):
        save(
            folder / f"medicine_{part}.jsonl",
            [
                {"prompt": f"Study {i}. Answer yes or no.", "response": ("yes", "no")[i % 2]}
                for i in range(start, start + 40)
            ],
        )
        save(
            folder / f"law_{part}.jsonl",
            [
                {"task": task, "prompt": f"Clause {i} {task}.", "response": answer}
                for i in range(start, start + 30)
                for task, answer in (
                    ("is_hearsay", ("Yes", "No")[i % 2]),
                    ("define_term", f"term {i}"),
                )
            ],
        )
    save(
        folder / "gsm8k_test.jsonl",
        [{"question": f"{i} plus 1?", "answer": f"#### {i + 1}"} for i in range(30)],
    )
    save(
        folder / "ifeval_test.jsonl",
        [
            {
                "key": i,
                "prompt": f"Write {i} without commas.",
                "instruction_id_list": ["punctuation:no_comma"],
                "kwargs": [{}],
            }
            for i in range(10)
        ],
    )
    return folder


def keys(rows: list[dict]) -> set[str]:
    return {" ".join(row["prompt"].split()).casefold() for row in rows}


def test_packed_files_are_read_as_others_are(source: Path, tmp_path: Path) -> None:
    writer.write(tmp_path / "plain", source=source, seed=0, evaluation_items=12)
    for path in list(source.iterdir()):
        Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    writer.write(tmp_path / "packed", source=source, seed=0, evaluation_items=12)
    for path in tmp_path.glob("plain/*/*"):
        other = tmp_path / "packed" / path.relative_to(tmp_path / "plain")
        assert path.read_bytes() == other.read_bytes()


def test_writes_the_artifact(source: Path, tmp_path: Path) -> None:
    writer.write(tmp_path / "domains", source=source, seed=0, evaluation_items=12)
    description = json.loads((tmp_path / "domains" / "domains.json").read_text())
    assert description["kind"] == "text"
    assert description["names"] == list(writer.DOMAINS)
    assert description["extra_tasks"] == ["text_medicine", "text_law"]
    assert description["groups"]["gsm8k"] == ["text_gsm8k"]
    assert description["groups"]["instruction_following"] == ["text_ifeval"]
    scored = {*description["target_tasks"].values(), *description["extra_tasks"]}
    assert scored | {"text_gsm8k", "text_ifeval"} == set(description["metrics"])
    assert description["target_tasks"]["law"] == "text_law_likelihood"
    assert description["metrics"]["text_law_likelihood"] == "likelihood"
    assert description["higher_is_better"] == dict.fromkeys(description["metrics"], True)
    for name, count in description["counts"].items():
        rows = load(tmp_path / "domains" / "heldout" / f"{name}.jsonl")
        assert len(rows) == count["heldout"] == 12
        assert set(rows[0]) == {"prompt", "response"}
        assert len(load(tmp_path / "domains" / "train" / f"{name}.jsonl")) == count["adaptation"]
    assert load(tmp_path / "domains" / "heldout" / "math.jsonl")[0]["response"].startswith("####")
    pretrained = sum(count["pretraining"] for count in description["counts"].values())
    assert len(load(tmp_path / "domains" / "pretrain.jsonl")) == pretrained


def test_the_three_sets_are_disjoint_and_lose_nothing(source: Path, tmp_path: Path) -> None:
    writer.write(tmp_path, source=source, seed=1, evaluation_items=10)
    counts = json.loads((tmp_path / "domains.json").read_text())["counts"]
    pretraining = keys(load(tmp_path / "pretrain.jsonl"))
    assert pretraining
    heldout = set().union(*(keys(load(path)) for path in (tmp_path / "heldout").iterdir()))
    for name, count in counts.items():
        adaptation = keys(load(tmp_path / "train" / f"{name}.jsonl"))
        assert adaptation
        assert not adaptation & pretraining
        assert not adaptation & heldout
        rows = len(load(source / f"{name}_train.jsonl"))
        assert rows == sum(
            count[key] for key in ("pretraining", "adaptation", "held_out_prompt", "repeated")
        )
    assert not pretraining & heldout
    assert counts["instruction"]["held_out_prompt"] == counts["instruction"]["heldout"]


def test_training_drops_test_prompts_of_any_domain_up_to_case_and_space(
    source: Path, tmp_path: Path
) -> None:
    leaks = [
        {"prompt": "  CODE   question 105? ", "response": "x"},  # in code_test
        {"prompt": "7 PLUS 1?", "response": "x"},  # in gsm8k_test
        {"prompt": "write 3 without\ncommas.", "response": "x"},  # in ifeval_test
    ]
    repeats = [{"prompt": "Math question  1?", "response": "again"}]
    save(source / "math_train.jsonl", [*chats("math", 60), *leaks, *repeats])
    writer.write(tmp_path, source=source, seed=0, evaluation_items=5)
    count = json.loads((tmp_path / "domains.json").read_text())["counts"]["math"]
    assert count["held_out_prompt"] == 3
    assert count["repeated"] == 1
    seen = keys(load(tmp_path / "train" / "math.jsonl") + load(tmp_path / "pretrain.jsonl"))
    assert not seen & keys(leaks)


def test_same_arguments_same_bytes_and_the_seed_matters(source: Path, tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        writer.write(tmp_path / folder, source=source, seed=seed, evaluation_items=5)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.json*")]
    assert len(files) == 16
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    changed = [
        f for f in files if (tmp_path / "a" / f).read_bytes() != (tmp_path / "c" / f).read_bytes()
    ]
    assert Path("pretrain.jsonl") in changed
    assert Path("heldout/instruction.jsonl") in changed


def test_fractions(source: Path, tmp_path: Path, monkeypatch) -> None:
    arguments = {"source": source, "seed": 0, "names": ("math",)}
    monkeypatch.setattr(writer, "PRETRAINING_SHARE", 0.0)
    writer.write(tmp_path / "none", **arguments)
    assert load(tmp_path / "none" / "pretrain.jsonl") == []
    save(source / "math_train.jsonl", chats("math", 2000))
    monkeypatch.setattr(writer, "PRETRAINING_SHARE", 0.8)
    writer.write(tmp_path / "most", **arguments)
    assert 1540 < len(load(tmp_path / "most" / "pretrain.jsonl")) < 1660
    (source / "gsm8k_test.jsonl").unlink()
    monkeypatch.setattr(writer, "HELDOUT_SHARE", 0.01)
    writer.write(tmp_path / "tenth", **arguments)
    assert len(load(tmp_path / "tenth" / "heldout" / "math.jsonl")) == 20


def test_long_prompts_keep_both_ends_where_a_limit_is_asked_for(
    source: Path, tmp_path: Path, caplog
) -> None:
    row = {"prompt": "START " + "filler " * 500 + "Question: THE END?", "response": "yes"}
    save(source / "medicine_test.jsonl", [row])
    writer.write(tmp_path, source=source, seed=0)
    assert load(tmp_path / "heldout" / "medicine.jsonl") == [row]
    assert "lost their middle" not in caplog.text
    writer.write(tmp_path, source=source, seed=0, prompt_characters=100)
    assert "domains.prompt_characters=100 lost their middle: 1 medicine rows" in caplog.text
    counts = json.loads((tmp_path / "domains.json").read_text())["counts"]
    assert {name: count["shortened"] for name, count in counts.items()} == {
        **dict.fromkeys(writer.DOMAINS, 0),
        "medicine": 1,
    }
    prompt = load(tmp_path / "heldout" / "medicine.jsonl")[0]["prompt"]
    assert len(prompt) == 100
    assert prompt.startswith("START")
    assert prompt.endswith("Question: THE END?")


def test_multiple_choice_items_offer_the_answers_of_the_row_s_task(
    source: Path, tmp_path: Path
) -> None:
    save(
        source / "law_test.jsonl",
        [
            {"task": "is_hearsay", "prompt": "A", "response": "No"},
            {"task": "is_hearsay", "prompt": "B", "response": "Perhaps"},  # unseen in training
            {"task": "define_term", "prompt": "C", "response": "term 3"},  # open answers
            {"task": "unheard_of", "prompt": "D", "response": "Yes"},
        ],
    )
    writer.write(tmp_path, source=source, seed=0)
    assert load(tmp_path / "evaluation" / "text_law.jsonl") == [
        {"prompt": "Task: is hearsay\n\nA", "choices": ["No", "Yes"], "answer": 0}
    ]
    medicine = load(tmp_path / "evaluation" / "text_medicine.jsonl")
    heldout = load(tmp_path / "heldout" / "medicine.jsonl")
    assert [row["choices"][row["answer"]] for row in medicine] == [r["response"] for r in heldout]


def test_a_users_own_domains(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    save(folder / "physics_train.jsonl", chats("physics", 40))
    save(folder / "biology_train.jsonl", chats("biology", 40))
    writer.write(tmp_path / "a", source=folder, seed=0, names=("biology", "physics"))
    description = json.loads((tmp_path / "a" / "domains.json").read_text())
    assert description["names"] == ["biology", "physics"]
    assert description["extra_tasks"] == description["groups"]["gsm8k"] == []
    writer.write(tmp_path / "b", source=folder, seed=0, names=("physics",))
    assert json.loads((tmp_path / "b" / "domains.json").read_text())["names"] == ["physics"]
    assert not (tmp_path / "b" / "train" / "biology.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"prompt": "a", "answer": "b"}',
            r"math_train.jsonl:3: the row has no 'response' .*answer, prompt",
        ),
        (
            '{"prompt": "a", "response": 3}',
            r"math_train.jsonl:3: 'response' must be text, .* a number",
        ),
        (
            '{"prompt": null, "response": "b"}',
            r"math_train.jsonl:3: 'prompt' must be text, .* null",
        ),
        ('{"prompt": "a", ', r"math_train.jsonl:3: not valid JSON"),
        ('["prompt"]', r"math_train.jsonl:3: a row is a JSON object, this is a list"),
        (r'{"prompt": "\ud800", "response": "b"}', r"math_train.jsonl:3: 'prompt' has half a surr"),
        (b'{"prompt": "\xff", "response": "b"}', r"math_train.jsonl:3: not UTF-8"),
    ],
)
def test_bad_lines_are_named(source: Path, tmp_path: Path, line: str | bytes, message: str) -> None:
    with (source / "math_train.jsonl").open("wb") as file:
        file.write(b'{"prompt": "fine", "response": "fine"}\n\n')
        file.write(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(UserError, match=message) as raised:
        writer.write(tmp_path / "out", source=source, seed=0)
    assert "\n" not in str(raised.value)


def talk(number: int, **changes) -> dict:
    """A row of a conversation of four turns, with a system's and parts."""
    parts = [{"type": "text", "text": "Talk "}, {"type": "text", "text": f"{number}?"}]
    turns = [
        {"role": "system", "content": "Obey."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": f"Said {number}. "},
        {"role": "user", "content": "More?"},
        {"role": "assistant", "content": "No."},
    ]
    return {"messages": turns} | changes


def test_conversations_are_read_whole(source: Path, tmp_path: Path) -> None:
    rows = [talk(i, task="small_talk", prompt="unread") for i in range(40)]
    last = {"role": "user", "content": "Are you there?"}
    rows += [{"messages": [*talk(40)["messages"], last]}]
    save(source / "math_train.jsonl", rows)
    (source / "gsm8k_test.jsonl").unlink()
    out = tmp_path / "out"
    writer.write(out, source=source, seed=0, names=("math",), prompt_characters=12)
    written = [load(path) for path in (*out.glob("*/math.jsonl"), out / "pretrain.jsonl")]
    conversations = [row["messages"] for rows in written for row in rows]
    assert len(conversations) == 41
    for turns in conversations:
        number = turns[2]["content"].removeprefix("Said ").removesuffix(".")
        task = "" if number == "40" else "Task: small talk\n\n"
        assert [(turn["role"], turn["content"]) for turn in turns] == [
            ("system", "Obey."),
            ("user", f"{task}Talk {number}?"),
            ("assistant", f"Said {number}."),
            ("user", "More?"),
            ("assistant", "No."),
        ]
    # A tokenizer is made of all that is said, and reads it.
    tokenizer = build_tokenizer(out, vocabulary=300)
    (chat,) = encode_chats(tokenizer, read_rows(out / "train/math.jsonl")[:1], 1000)
    assert len(chat.answers) == 2
    assert tokenizer.decode(chat.input_ids).startswith("<|system|>Obey.<|end|><|user|>")


def test_what_has_no_answer_or_a_blank_turn_is_counted(source: Path, tmp_path: Path) -> None:
    turns = talk(0)["messages"]
    blank = {"role": "assistant", "content": None}
    rows = [
        {"messages": []},
        {"messages": turns[:2]},
        {"messages": [turns[0], turns[2]]},
        {"messages": [*turns[:2], blank, *turns[3:]]},
        {"prompt": " ", "response": "x"},
    ]
    save(source / "math_train.jsonl", [*chats("math", 60), *rows])
    writer.write(tmp_path, source=source, seed=0, names=("math",))
    assert json.loads((tmp_path / "domains.json").read_text())["counts"]["math"]["blank"] == 5


def test_no_turn_of_a_training_conversation_is_a_held_out_prompt(
    source: Path, tmp_path: Path
) -> None:
    turns = talk(0)["messages"]
    turns[3] = {"role": "user", "content": "code QUESTION 105?"}  # in code_test
    save(source / "math_train.jsonl", [*chats("math", 60), {"messages": turns}])
    writer.write(tmp_path, source=source, seed=0)
    count = json.loads((tmp_path / "domains.json").read_text())["counts"]["math"]
    assert count["held_out_prompt"] == 1


def with_turn(turn: object) -> str:
    return json.dumps({"messages": [talk(0)["messages"][0], turn]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            json.dumps({"messages": "hi"}),
            "'messages' must be a list of turns with role and content",
        ),
        (with_turn({"role": "user"}), "'messages' must be a list of turns with role and content"),
        (
            with_turn({"role": "tool", "content": "3"}),
            "turn 2 has the role 'tool'; roles are system, user, assistant",
        ),
        (
            with_turn({"role": "user", "content": [{"type": "image", "url": "x"}]}),
            "turn 2 has a part of type image; models here read parts of type text",
        ),
        (
            with_turn({"role": "user", "content": ["x"]}),
            "turn 2 has a part of type text; models here read parts of type text",
        ),
        (
            with_turn({"role": "user", "content": 3}),
            "turn 2: 'content' must be text, this is a num",
        ),
    ],
)
def test_turns_that_cannot_be_read_are_named_by_their_line(
    source: Path, tmp_path: Path, row: str, message: str
) -> None:
    (source / "math_train.jsonl").write_text(f"{json.dumps(talk(0))}\n\n{row}\n")
    with pytest.raises(UserError) as raised:
        writer.write(tmp_path / "out", source=source, seed=0, names=("math",))
    assert f"math_train.jsonl:3: {message}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_and_empty_files_are_named(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (source / "law_train.jsonl").rename(source / "tort_train.jsonl")
    with pytest.raises(UserError, match=r"law_train.jsonl is missing .*tort.*domains.names="):
        writer.write(out, source=source, seed=0)
    with pytest.raises(UserError, match=r"chess_train.jsonl is missing"):
        writer.write(out, source=source, seed=0, names=("math", "chess"))
    (source / "law_train.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match=r"law_train.jsonl has no row with a prompt"):
        writer.write(out, source=source, seed=0)
    save(source / "law_train.jsonl", load(source / "law_test.jsonl"))
    with pytest.raises(UserError, match=r"law_train.jsonl leaves no rows .* 60 with a held-out"):
        writer.write(out, source=source, seed=0)
    with pytest.raises(UserError, match="is not a folder"):
        writer.write(out, source=source / "nowhere", seed=0)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="domains found there: none"):
        writer.write(out, source=tmp_path / "bare", seed=0)


def test_lines_survive_characters_that_end_lines(source: Path, tmp_path: Path) -> None:
    odd = "one\u2028two\x85three\x0cfour"
    save(source / "code_test.jsonl", [{"prompt": odd, "response": odd}])
    writer.write(tmp_path, source=source, seed=0)
    assert load(tmp_path / "heldout" / "code.jsonl") == [{"prompt": odd, "response": odd}]


@pytest.fixture
def domains(source: Path, tmp_path: Path) -> Path:
    writer.write(tmp_path / "domains", source=source, seed=0)
    return tmp_path / "domains"


def test_tokenizer_round_trips_any_text(domains: Path, tmp_path: Path) -> None:
    build_tokenizer(domains, vocabulary=400).save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) <= 400
    assert tokenizer.padding_side == "left"
    for sample in ("Naïve 漢字 \n\n\t  x==1;  e.g. 'Don’t' .", "medicine answer 12."):
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
    assert len(tokenizer("1234")["input_ids"]) == 4


def test_tokenizer_chat_template(domains: Path, tmp_path: Path) -> None:
    build_tokenizer(domains, vocabulary=400).save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    user = [{"role": "user", "content": "hi"}]
    opening = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    assert opening == "<|user|>hi<|end|><|assistant|>"
    chat = encode_chat(tokenizer, "hi", "yes", 100)
    tokens = tokenizer.convert_ids_to_tokens(chat.input_ids)
    assert tokens[0] == "<|user|>"
    assert tokens[chat.response_start - 1] == "<|assistant|>"
    assert chat.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(chat.input_ids[chat.response_start :]) == "yes<|end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_tokenizer_is_deterministic_and_checks_its_size(domains: Path) -> None:
    first, second = (build_tokenizer(domains, vocabulary=350) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    with pytest.raises(UserError, match="vocabulary of 200 is too small"):
        build_tokenizer(domains, vocabulary=200)


def test_real_folder(tmp_path: Path) -> None:
    source = real_folder()
    most = compose.load(["experiment=text", f"domains.dir={source}"]).domains.prompt_characters
    writer.write(tmp_path, source=source, seed=0, prompt_characters=most)
    description = json.loads((tmp_path / "domains.json").read_text())
    assert description["counts"]["law"]["held_out_prompt"] > 0  # the source does repeat prompts
    training = keys(load(tmp_path / "pretrain.jsonl"))
    for name in description["names"]:
        heldout = keys(load(tmp_path / "heldout" / f"{name}.jsonl"))
        adaptation = keys(load(tmp_path / "train" / f"{name}.jsonl"))
        assert len(heldout) >= 80
        assert not heldout & (training | adaptation)
        assert not training & adaptation
    tokenizer = build_tokenizer(tmp_path)
    questions = load(tmp_path / "heldout" / "medicine.jsonl")
    lengths = [len(encode_chat(tokenizer, **row, max_length=10_000).input_ids) for row in questions]
    assert max(lengths) <= 256  # a small context sees the whole question and the answer


def test_train_items_caps_what_adapters_see_and_nothing_else(source: Path, tmp_path: Path) -> None:
    whole, capped = tmp_path / "whole", tmp_path / "capped"
    writer.write(whole, source=source, seed=0)
    writer.write(capped, source=source, seed=0, train_items=3)
    assert load(capped / "train/math.jsonl") == load(whole / "train/math.jsonl")[:3]
    for name in ("pretrain.jsonl", "heldout/math.jsonl"):
        assert (capped / name).read_bytes() == (whole / name).read_bytes()


def test_pretrain_items_takes_as_many_of_each_domain(source: Path, tmp_path: Path) -> None:
    whole, capped = tmp_path / "whole", tmp_path / "capped"
    writer.write(whole, source=source, seed=0)
    writer.write(capped, source=source, seed=0, pretrain_items=9)
    counts = json.loads((capped / "domains.json").read_text())["counts"]
    assert {count["pretraining"] for count in counts.values()} == {math.ceil(9 / len(counts))}
    for name in ("train/math.jsonl", "heldout/math.jsonl"):
        assert (capped / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["law_train.jsonl", "math_test.jsonl", "ifeval_test.jsonl"])
def test_what_is_no_file_is_one_line(source: Path, tmp_path: Path, name: str, kind: str) -> None:
    """A pipe would be waited for; a link to nothing is not as if there were nothing."""
    (source / name).unlink(missing_ok=True)
    path, says = NO_FILES[kind](source / name)
    with pytest.raises(UserError, match=says) as error:
        writer.write(tmp_path / "out", source=source, seed=0)
    assert str(error.value).startswith(str(path))


def test_a_row_s_keys_reach_a_terminal_as_they_are_written(source: Path, tmp_path: Path) -> None:
    save(source / "law_train.jsonl", [{"\x1b[2Jprompt": "a"}])
    with pytest.raises(UserError) as error:
        writer.write(tmp_path, source=source, seed=0)
    assert r"\x1b[2Jprompt" in for_terminal(error.value)


# What the artifact depends on


def fingerprint(source: Path, names: str) -> str:
    config = compose.load(["domains=text", f"domains.dir={source}", f"domains.names=[{names}]"])
    return domains_step(config).fingerprint


@pytest.mark.parametrize(
    "name",
    [
        *(f"{domain}_{part}" for domain in writer.DOMAINS for part in ("train", "test")),
        *("gsm8k_test", "ifeval_test"),
        *("history_train", "history_test", "notes"),
    ],
)
def test_a_file_counts_if_and_only_if_it_is_read(name, source, tmp_path):
    """Of five domains in the folder three are asked for."""
    names = "instruction,math,medicine"

    def written(folder: str) -> dict[str, str]:
        writer.write(tmp_path / folder, source=source, seed=0, names=tuple(names.split(",")))
        files = (path for path in (tmp_path / folder).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / folder)): path.read_text() for path in files}

    before = fingerprint(source, names), written("before")
    path = source / f"{name}.jsonl"
    rows = load(path) if path.exists() else chats("history", 40)
    asked = "question" if name == "gsm8k_test" else "prompt"
    save(path, [{**row, asked: f"{row[asked]} Really?"} for row in rows])
    after = fingerprint(source, names), written("after")
    assert (after[0] == before[0]) == (after[1] == before[1])
    assert (after[0] == before[0]) == (name.split("_")[0] in ("code", "law", "history", "notes"))


def test_a_base_that_is_trained_already_leaves_all_rows_to_adaptation(tmp_path, source):
    writer.write(tmp_path / "half", source=source, seed=0, evaluation_items=12)
    writer.write(tmp_path / "all", source=source, seed=0, evaluation_items=12, pretraining=False)
    assert load(tmp_path / "all/pretrain.jsonl") == []
    pretraining = load(tmp_path / "half/pretrain.jsonl")
    halves = [row for name in writer.DOMAINS for row in load(tmp_path / f"half/train/{name}.jsonl")]
    whole = [row for name in writer.DOMAINS for row in load(tmp_path / f"all/train/{name}.jsonl")]
    assert pretraining
    assert sorted(map(str, whole)) == sorted(map(str, [*halves, *pretraining]))
    assert [load(tmp_path / f"{folder}/heldout/law.jsonl") for folder in ("half", "all")] == [
        load(tmp_path / "half/heldout/law.jsonl")
    ] * 2
