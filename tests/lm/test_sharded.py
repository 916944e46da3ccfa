"""Loading under ZeRO-3 by two ranks on the CPU: exact, and never whole on one of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import Starter
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from steerlora.lm.sharded import open_sharded

SCRIPT = Path(__file__).parent / "load_sharded.py"
TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LARGE = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
"""121 MB of float32, no weight of them above 4 MiB."""


def write_models(root: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Rotary frequencies, scaled embeddings and soft caps: what no file holds.
        Gemma2ForCausalLM(Gemma2Config(**TINY)).save_pretrained(root / "tied")
        untied = Qwen3ForCausalLM(Qwen3Config(**TINY, tie_word_embeddings=False))
        untied.bfloat16().save_pretrained(root / "several_files", max_shard_size="20KB")
        large = Qwen3ForCausalLM(Qwen3Config(**LARGE, tie_word_embeddings=True))
        large.save_pretrained(root / "large")
    broken(root, "lacking", lambda weights: weights.pop("model.norm.weight"))
    broken(root, "other", lambda weights: weights.update({"model.extra": torch.zeros(2)}))
    broken(root, "misshapen", lambda weights: weights.update({"model.norm.weight": torch.ones(1)}))
    shutil.copytree(root / "tied", root / "empty")
    (root / "empty/model.safetensors").unlink()


def broken(root: Path, name: str, change) -> None:
    folder = shutil.copytree(root / "tied", root / name)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def ranks(ask, tmp_path_factory) -> list[dict]:
    """What each of the two ranks found."""
    root = tmp_path_factory.mktemp("models")
    write_models(root)
    folder = tmp_path_factory.mktemp("said")
    for rank in Starter(folder, ask).ranks(str(root), script=SCRIPT):
        rank.ends_well()
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_no_rank_ever_holds_the_whole_model(ranks):
    for found in ranks:
        memory = found["memory"]
        assert memory["model"] > 120e6
        # Half of it is its shard; a weight or two besides, and what DeepSpeed itself takes.
        assert 0.45 * memory["model"] < memory["grew"] < 0.75 * memory["model"]


@pytest.mark.parametrize(("name", "tied"), [("tied", True), ("several_files", False)])
def test_weights_buffers_and_logits_are_those_of_the_whole_model(ranks, name, tied):
    for found in ranks:
        assert found[name] == {
            "weights": True,
            "names": True,
            "buffers": True,
            "logits": True,
            "tied": tied,
            "training": False,
        }


def test_other_weights_than_the_model_s_are_refused_on_every_rank(ranks):
    for found in ranks:
        lacking, other, misshapen, empty = found["errors"]
        assert "they lack model.norm.weight; fetch" in lacking
        assert "they hold model.extra, which it has not; fetch" in other
        assert "they hold model.norm.weight in another shape; fetch" in misshapen
        assert "holds no weights: expected model.safetensors" in empty
        assert not any("\n" in error for error in found["errors"])


def test_a_model_opened_afterwards_is_whole(ranks):
    assert all(found["whole_again"] for found in ranks)
    assert not any(found["transformers_knows"] for found in ranks)


def test_another_stage_is_a_mistake():
    with pytest.raises(ValueError, match="ZeRO stage 3"):
        open_sharded(Qwen3Config(**TINY), Path, {"zero_optimization": {"stage": 2}})
