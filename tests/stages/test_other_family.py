"""A model of another family, from a folder of the user's own, through the whole command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.sae_files import WIDTH, gemma_scope
from transformers import Gemma2Config, Gemma2ForCausalLM

from steerlora.__main__ import main
from steerlora.cli import compose
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.run import run
from steerlora.evaluation.records import Evaluation, read_record
from steerlora.lm.pretrained import open_model, shape_of
from steerlora.methods.saving import load_adapter
from steerlora.saes import places
from steerlora.saes.formats import hub_files, open_sae
from steerlora.saes.saelens import load_sae, sae_fingerprint
from steerlora.stages import sae_training

TINY = (
    "stage=evaluate",
    "method=sc_lora",
    "method.sites=[1,2]",
    "sae.latents=64",
    "sae.max_tokens=400",
    "sae.steps=2",
    "sae.batch_size=64",
    "domains.train_items=12",
    "domains.pretrain_items=100",
    "domains.evaluation_items=4",
    "trainer.max_steps=2",
    "trainer.batch_size=4",
    "trainer.max_length=96",
    "evaluation.limit=2",
    "evaluation.max_length=96",
    "evaluation.tasks=[micro_law,micro_mmlu]",
    "logger=none",
)


def gemma(folder: Path, tokenizer, **changes: int) -> list[str]:
    """A random Gemma 2 in a folder; the overrides that say its shape."""
    config = Gemma2Config(
        **{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4} | changes,
        vocab_size=len(tokenizer),
        intermediate_size=48,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [f"model.path={folder}", *(f"model.{k}={v}" for k, v in shape_of(config).items())]


def test_a_gemma_of_the_user_s_is_adapted_and_scored(make_tokenizer, tmp_path):
    folder, root = tmp_path / "gemma", tmp_path / "artifacts"
    shape = gemma(folder, make_tokenizer("plain", eos="<eos>"))
    main([*TINY, *shape, "model.name=mine", f"artifacts.root={root}"])
    scores = read_record(next((root / "evaluate").glob("*/scores.json")), Evaluation)
    assert scores.model == "mine"
    assert set(scores.tasks) == {"micro_law", "micro_mmlu"}
    assert set(scores.routing_by_site) == {1, 2}
    # The default target modules are this family's: every linear layer from the first site on.
    adapter = load_adapter(
        open_model(str(folder)), next((root / "adapter_training").glob("*/adapter"))
    )
    assert len(adapter.layers) == 2 * 7
    assert any(layer.B.abs().sum() > 0 for layer in adapter.layers.values())


@pytest.mark.parametrize("size", ["2b", "9b"])
def test_gemma_scope_s_sae_serves_gemma_by_itself(size, make_tokenizer, tmp_path, monkeypatch):
    """Of as many layers as it has, at its own site, from the repository that its option names; but
    narrow."""
    option, scope = compose.load([f"model=gemma2_{size}"]), tmp_path / "scope"
    (site,), layers = option.method.sites, option.model.layers
    _, (file,) = hub_files(option.sae.path, [site])
    gemma_scope(file).save(scope)
    asked = []

    def fetch(hub_id: str, name: str) -> str:
        asked.append((hub_id, name))
        return str(scope / name)

    monkeypatch.setattr(places, "hf_hub_download", fetch)
    tokenizer = make_tokenizer("plain", eos="<eos>")
    narrow = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": layers}
    shape = gemma(tmp_path / "gemma", tokenizer, **narrow)
    own = [change for change in TINY if "method.sites" not in change]
    steps = sae_training.steps(
        compose.load([*own, "method.rank=4", f"model=gemma2_{size}", *shape])
    )
    built = run(steps, ArtifactStore(tmp_path / "artifacts"))[steps[0]]
    assert set(asked) == {(f"google/gemma-scope-{size}-pt-res", file)}
    found, given = load_sae(built / "sae"), open_sae(str(scope), site).sae
    assert (found.architecture, sae_fingerprint(found)) == ("jumprelu", sae_fingerprint(given))
    assert built.json("quality.json")["l0"] > 0
