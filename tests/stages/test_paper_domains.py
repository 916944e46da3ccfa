"""The way from datasets of the hub to an adapter, on small files with the same columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from steerlora.cli import compose
from steerlora.config import Config
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.run import run
from steerlora.evaluation.records import DomainSequence, read_record
from steerlora.stages import adapter_training, base, sequential_forgetting

ROWS = {
    "instruction": lambda i: {
        "id": f"row_{i}",
        "messages": [
            {"role": "user", "content": f"Write the number {i} in a sentence of its own."},
            {"role": "assistant", "content": f"Here it is, in a sentence: {i}."},
        ],
        "source": "made up",
    },
    "math": lambda i: {"question": f"What is {i} and {i}?", "answer": f"Twice {i}.\n#### {2 * i}"},
    "code": lambda i: {"lang": "python", "problem": f"Return {i}.", "solution": f"return {i}"},
    "medicine": lambda i: {"input": f"Ward {i}?", "output": f"It is ward {i}.", "instruction": "."},
    "law": lambda i: {
        "question": f"Who keeps section {i}?",
        "answer": "The keeper.",
        "source": {"text": f"Section {i} is kept by its keeper.", "url": "none"},
    },
}
"""Columns as on the dataset cards that ``conf/domains/paper.yaml`` cites."""
TINY = (
    "domains=paper",
    "domains.train_items=24",
    "domains.pretrain_items=100",
    "domains.evaluation_items=4",
    "model=text_s",
    "model.layers=2",
    "model.width=32",
    "model.heads=2",
    "model.kv_heads=1",
    "model.head_width=16",
    "model.ffn_width=48",
    "model.vocabulary=300",
    "model.steps=3",
    "model.batch_size=8",
    "model.control_sites=[1]",
    "sae.latents=64",
    "sae.k=4",
    "sae.max_tokens=800",
    "sae.steps=3",
    "sae.batch_size=64",
    "trainer.max_steps=3",
    "trainer.batch_size=4",
    "trainer.max_length=128",
    "trainer.packing=true",
    "method.rank=2",
    "order.steps_per_domain=1",
    "evaluation.max_length=128",
    "logger=none",
)


@pytest.fixture
def config(tmp_path: Path):
    """``config("method=lora")``: with local files in place of every source."""
    places = []
    for name, row in ROWS.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(80)))
        places.append(f"domains.sources.{name}.path={path}")

    def make(*changes: str) -> Config:
        return compose.load([*TINY, *places, f"artifacts.root={tmp_path / 'artifacts'}", *changes])

    return make


def test_an_adapter_is_trained_on_packed_rows_of_every_source(config):
    made = config("method=sc_lora", "method.context=causal_mean", "trainer.accumulate=2")
    step = adapter_training.step(made)
    found = run([step], ArtifactStore(made.artifacts.root))[step]
    figures = found.manifest["summary"]
    # Four rows a step, all but full: unpacked they would hold one conversation each.
    assert 0.8 * 128 * 4 * 3 < figures["tokens"] <= 128 * 4 * 3
    assert (found / "adapter/adapter_model.safetensors").is_file()


def test_packing_leaves_the_base_as_it_is(config):
    packed, plain = config(), config("trainer.packing=false")
    assert base.step(packed).fingerprint == base.step(plain).fingerprint
    steps = [adapter_training.step(made).fingerprint for made in (packed, plain)]
    assert steps[0] != steps[1]


def test_a_sequence_of_domains_is_learnt_on_packed_rows_and_scored(config):
    made = config("method=lora", "domains.names=[instruction,law]", "method.replay.ratio=0.5")
    step = sequential_forgetting.step(made)
    artifact = run([step], ArtifactStore(made.artifacts.root))[step]
    record = read_record(artifact / sequential_forgetting.RESULT, DomainSequence)
    matrix = torch.tensor(record.matrix)
    assert matrix.shape == (3, 2)
    assert ((matrix > 0) & (matrix < 1)).all()  # likelihoods of held-out responses
    assert record.items == 4
