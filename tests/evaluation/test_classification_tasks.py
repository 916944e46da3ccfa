"""Labels ranked by likelihood and written out, by lm-eval, against a plain reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from steerlora.config import EvaluationConfig
from steerlora.data.domains.classification import writer
from steerlora.data.domains.text.tokenizer import build_tokenizer
from steerlora.engine.artifacts import Artifact
from steerlora.evaluation.scoring import Scorer
from steerlora.evaluation.tasks.classification.local import exact_match

LABELS = ("bad", "very bad", "good")


@pytest.fixture
def domains(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    rows = [
        {"prompt": f"Number {i}?", "response": LABELS[i % 3], "choices": list(LABELS)}
        for i in range(40)
    ]
    for path in (source / "sst-2_train.jsonl", source / "talk.jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    general = source / "talk.jsonl"
    writer.write(tmp_path / "domains", source=source, seed=0, names=["sst-2"], general=general)
    return tmp_path / "domains"


@torch.no_grad()
def log_likelihood(model, tokenizer, prompt: str, answer: str) -> float:
    """Of an answer after a prompt through the chat template, token by token."""
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids, own = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, answer))
    logits = model(torch.tensor([ids + own])).logits[0].log_softmax(-1)
    return sum(float(logits[len(ids) - 1 + at, token]) for at, token in enumerate(own))


def test_the_likeliest_label_counts_and_the_written_one(domains, make_model):
    tokenizer = build_tokenizer(domains, vocabulary=300)
    model = make_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, seed=3)
    scorer = Scorer(
        Artifact("domains", "0", domains, {}), model, tokenizer, EvaluationConfig(batch_size=4)
    )
    items = [
        json.loads(line)
        for line in (domains / "evaluation/classification_sst-2.jsonl").read_text().splitlines()
    ]
    expected = []
    for item in items:
        found = [log_likelihood(model, tokenizer, item["prompt"], c) for c in item["choices"]]
        expected.append(float(max(range(3), key=found.__getitem__) == item["answer"]))
    ranked = scorer.targets()["sst-2"]
    assert ranked.per_item == expected
    assert 0 < sum(expected) < len(expected)
    written = scorer.written()["sst-2"]
    assert written.metric == "exact_match,none"
    assert written.items == len(items)


@pytest.mark.parametrize(
    ("answer", "score"), [("Very bad", 1), ("  very BAD\n", 1), ("bad", 0), ("very bad.", 0)]
)
def test_a_written_answer_is_the_label_up_to_case_and_white_space(answer, score):
    assert exact_match({"response": "very bad"}, [answer]) == {"exact_match": score}
