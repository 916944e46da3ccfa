"""The lm-eval tasks of real text, run to the end without a network."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM

from steerlora.data.domains.text import writer
from steerlora.data.domains.text.tokenizer import build_tokenizer
from steerlora.errors import UserError
from steerlora.evaluation.punkt import ensure_punkt
from steerlora.evaluation.tasks.documents import documents
from steerlora.evaluation.tasks.text import local as text_local
from steerlora.evaluation.tasks.text.local import local_task_yamls

TASKS = Path(text_local.__file__).parent


def save(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def domains(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    for part, start in (("train", 0), ("test", 100)):
        span = range(start, start + 30)
        answers = ("yes", "no", "maybe")
        save(
            source / f"medicine_{part}.jsonl",
            [{"prompt": f"Does drug {i} help?", "response": answers[i % 3]} for i in span],
        )
        save(
            source / f"law_{part}.jsonl",
            [
                {"task": "hearsay", "prompt": f"Witness {i}.", "response": ("Yes", "No")[i % 2]}
                for i in span
            ],
        )
    save(
        source / "gsm8k_test.jsonl",
        [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(6)],
    )
    kinds = [
        ("punctuation:no_comma", {}),
        ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}),
    ]
    save(
        source / "ifeval_test.jsonl",
        [
            {
                "key": i,
                "prompt": f"Write {i}.",
                "instruction_id_list": [kinds[i % 2][0]],
                "kwargs": [kinds[i % 2][1]],
            }
            for i in range(6)
        ],
    )
    writer.write(
        tmp_path / "domains", source=source, seed=0, names=("medicine", "law"), evaluation_items=5
    )
    return tmp_path / "domains"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an evaluation on local files opened a connection")

    datasets_config = pytest.importorskip("datasets").config
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    nltk = pytest.importorskip("nltk")
    monkeypatch.setenv("NLTK_DATA", "")
    monkeypatch.setattr(nltk.data, "path", list(nltk.data.path))


def test_all_four_tasks_run_to_the_end(domains: Path, tmp_path: Path, offline: None) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    ensure_punkt(tmp_path / "nltk", ["Dr. Smith left. He slept."] * 20)
    tokenizer = build_tokenizer(domains, vocabulary=300)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    local = local_task_yamls(domains, tmp_path / "tasks", limit=3, max_generated_tokens=8)
    manager = TaskManager(
        include_path=str(TASKS),
        include_defaults=False,
        metadata={"domains_dir": str(domains)},
    )
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=Qwen3ForCausalLM(config).eval(), tokenizer=tokenizer, batch_size=5),
        tasks=["text_medicine", "text_law", *map(str, local)],
        task_manager=manager,
        apply_chat_template=True,
        bootstrap_iters=0,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    description = json.loads((domains / "domains.json").read_text())
    items = {"text_medicine": 5, "text_law": 5, "text_gsm8k": 3, "text_ifeval": 3}
    assert set(results["results"]) == set(items)
    for task, count in items.items():
        assert 0 <= results["results"][task][description["metrics"][task]] <= 1
        assert len({sample["doc_id"] for sample in results["samples"][task]}) == count
        assert results["n-shot"][task] == 0
    (prompt, answer), *_ = results["samples"]["text_law"][0]["arguments"]
    assert prompt.startswith("<|user|>Task: hearsay\n\nWitness 1")
    assert prompt.endswith("<|end|><|assistant|>")
    assert answer == "No"  # follows the role directly, as in training
    medicine = results["samples"]["text_medicine"][0]
    assert medicine["doc"]["choices"][medicine["target"]] in ("yes", "no", "maybe")
    assert results["versions"]["text_gsm8k"] == 3.0


def test_every_task_file_is_known_to_lm_eval() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    files = sorted(path.stem for path in TASKS.glob("*.yaml"))
    assert files == ["text_law", "text_medicine"] == sorted(manager.all_tasks)


def test_local_tasks_keep_what_lm_eval_says(domains: Path, tmp_path: Path) -> None:
    paths = local_task_yamls(domains, tmp_path / "out", limit=2, max_generated_tokens=32)
    assert [path.name for path in paths] == ["text_gsm8k.yaml", "text_ifeval.yaml"]
    gsm8k, ifeval = (yaml.safe_load(path.read_text()) for path in paths)
    assert Path(gsm8k["include"]).exists()
    assert "Question:" in gsm8k["generation_kwargs"]["until"]
    assert gsm8k["generation_kwargs"]["max_gen_toks"] == 32
    assert ifeval["generation_kwargs"]["until"] == []
    rows = Path(ifeval["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    assert len(rows) == 2
    assert {"key", "prompt", "instruction_id_list", "kwargs"} == set(json.loads(rows[0]))


def test_no_items_no_task_file(domains: Path, tmp_path: Path) -> None:
    (domains / "evaluation" / "text_ifeval.jsonl").unlink()
    paths = local_task_yamls(domains, tmp_path / "out")
    assert [path.stem for path in paths] == ["text_gsm8k"]


def test_missing_metadata_or_items_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"text_law needs its items: lm_eval --metadata"):
        documents(file="text_law")
    with pytest.raises(UserError, match=r"text_medicine.jsonl is missing"):
        documents(file="text_medicine", domains_dir=str(tmp_path))
