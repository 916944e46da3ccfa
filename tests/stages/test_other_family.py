"""A model of another family, from a folder of the user's own, through the whole command line."""

from __future__ import annotations

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from steerlora.__main__ import main
from steerlora.evaluation.records import Evaluation, read_record
from steerlora.lm.pretrained import open_model, shape_of
from steerlora.methods.saving import load_adapter

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


def test_a_gemma_of_the_user_s_is_adapted_and_scored(make_tokenizer, tmp_path):
    folder, root = tmp_path / "gemma", tmp_path / "artifacts"
    tokenizer = make_tokenizer("plain", eos="<eos>")
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
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
    shape = [f"model.{key}={value}" for key, value in shape_of(config).items()]
    main([*TINY, *shape, "model.name=mine", f"model.path={folder}", f"artifacts.root={root}"])
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
