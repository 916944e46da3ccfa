"""What does not fit into the context is counted in the scores and warned about, and in no other way
does counting change a score."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import Qwen3Config, Qwen3ForCausalLM

from steerlora.config import EvaluationConfig
from steerlora.data.domains.text import writer
from steerlora.data.domains.text.tokenizer import build_tokenizer
from steerlora.evaluation.harness import SteerLoRALM
from steerlora.evaluation.scoring import Scorer

LONG = "filler " * 60
TASKS = ["text_medicine", "text_medicine_likelihood", "text_gsm8k"]


def save(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def domains(tmp_path: Path) -> Path:
    """Six held-out rows, of which two are long, and four problems, of which one is."""
    source = tmp_path / "source"
    source.mkdir()
    for part, start in (("train", 0), ("test", 100)):
        rows = [
            {"prompt": f"Drug {i}?{LONG * (i % 3 == 1)}", "response": ("yes", "no")[i % 2]}
            for i in range(start, start + 6)
        ]
        save(source / f"medicine_{part}.jsonl", rows)
    save(
        source / "gsm8k_test.jsonl",
        [{"question": f"{i} + 1?{LONG * (i == 2)}", "answer": f"#### {i + 1}"} for i in range(4)],
    )
    writer.write(tmp_path / "domains", source=source, seed=0, names=("medicine",))
    return tmp_path / "domains"


@pytest.fixture
def model(domains) -> tuple[Qwen3ForCausalLM, object]:
    tokenizer = build_tokenizer(domains, vocabulary=300)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).eval(), tokenizer


def warnings_of(caplog) -> list[str]:
    """What this project warned about: libraries say things too, at a level that others chose."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("steerlora") and record.levelno >= logging.WARNING
    ]


def scorer(domains: Path, model, **changes) -> Scorer:
    return Scorer(SimpleNamespace(path=domains), *model, EvaluationConfig(batch_size=4, **changes))


def test_the_models_own_context_is_the_limit_and_nothing_is_cut(domains, model, caplog):
    found = scorer(domains, model, max_generated_tokens=2)
    assert found.max_length == 1024
    assert {name: score.cut for name, score in found.tasks(TASKS).items()} == dict.fromkeys(
        TASKS, 0
    )
    assert warnings_of(caplog) == []


def test_what_does_not_fit_is_counted_and_warned_about_once(domains, model, caplog):
    found = scorer(domains, model, max_generated_tokens=2, max_length=100)
    for _ in range(2):
        scores = found.tasks(TASKS)
        assert {name: (score.cut, score.items) for name, score in scores.items()} == {
            "text_medicine": (2, 6),
            "text_medicine_likelihood": (2, 6),
            "text_gsm8k": (1, 4),
        }
    assert [message.split(" items")[0] for message in warnings_of(caplog)] == [
        "text_medicine: 2 of 6",
        "text_gsm8k: 1 of 4",
        "text_medicine_likelihood: 2 of 6",
    ]
    assert all(
        "100 tokens" in message and "evaluation.max_length" in message
        for message in warnings_of(caplog)
    )


def requests(kind: str, second) -> list[Instance]:
    prompts = [f"<|user|>Drug {i}?{LONG * (i % 2)}<|end|><|assistant|>" for i in range(5)]
    return [
        Instance(kind, {}, (prompt, second), 0, metadata=("task", i, 1))
        for i, prompt in enumerate(prompts)
    ]


def test_counting_leaves_lm_evals_answers_as_they_are(model):
    live, tokenizer = model
    ours, theirs = (
        kind(pretrained=live, tokenizer=tokenizer, batch_size=2, max_length=100)
        for kind in (SteerLoRALM, HFLM)
    )
    told = {"until": ["<|end|>"], "max_gen_toks": 5, "do_sample": False}
    generations = requests("generate_until", told)
    assert ours.generate_until(generations) == theirs.generate_until(generations, disable_tqdm=True)
    assert ours.cut == {("task", 1), ("task", 3)}
    ours.cut.clear()
    asked = requests("loglikelihood", "no")
    assert ours.loglikelihood(asked) == theirs.loglikelihood(asked, disable_tqdm=True)
    assert ours.cut == {("task", 1), ("task", 3)}
