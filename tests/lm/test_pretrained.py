"""Base models from a folder or a hub id: what is opened, in which type, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RevisionNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, T5Config

from steerlora.data.chat import encode_chat
from steerlora.errors import UserError
from steerlora.lm import pretrained, weight_files
from steerlora.lm.identity import model_fingerprint
from steerlora.lm.pretrained import describe, open_model, open_tokenizer
from steerlora.lm.weight_files import commit_of, model_files
from steerlora.stages.common import device_of

ANSWER = "<think>\n\n</think>\n\nfour<|im_end|>"


@pytest.fixture
def folder(make_model, make_tokenizer, tmp_path) -> Path:
    """A tiny model and its tokenizer, in bfloat16 as most are."""
    make_model(torch.bfloat16).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# Thinking


@pytest.mark.parametrize(
    ("thinking", "opening", "response"),
    [
        (False, "assistant\n<think>\n\n</think>\n\n", "four<|im_end|>"),
        (True, "assistant\n", ANSWER),
        (None, "assistant\n", ANSWER),
    ],
)
def test_training_text_follows_the_switch_for_thinking(folder, thinking, opening, response):
    tokenizer = open_tokenizer(str(folder), thinking=thinking)
    turns = [{"role": "user", "content": "2+2"}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt == f"<|im_start|>user\n2+2<|im_end|>\n<|im_start|>{opening}"
    row = encode_chat(tokenizer, "2+2", "four", 200)
    # A prompt exactly as at generation, then the rest of the turn, up to its end.
    assert tokenizer.decode(row.input_ids[: row.response_start]) == prompt
    assert tokenizer.decode(row.input_ids[row.response_start :]) == response


def test_evaluation_follows_the_switch_for_thinking(folder):
    from steerlora.evaluation.harness import SteerLoRALM

    tokenizer = open_tokenizer(str(folder), thinking=False)
    model = SteerLoRALM(open_model(str(folder)), tokenizer=tokenizer)
    prompt = model.apply_chat_template([{"role": "user", "content": "2+2"}])
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    # Another tokenizer of the same files has its own mind.
    other = SteerLoRALM(open_model(str(folder)), tokenizer=open_tokenizer(str(folder)))
    assert other.apply_chat_template([{"role": "user", "content": "2+2"}]).endswith("assistant\n")


def test_a_template_whose_end_of_turn_is_not_the_end_of_text(make_tokenizer, folder):
    make_tokenizer("plain", eos="<eos>").save_pretrained(folder)
    tokenizer = open_tokenizer(str(folder))
    row = encode_chat(tokenizer, "2+2", "four", 200)
    assert tokenizer.decode(row.input_ids[row.response_start :]) == "four<end_of_turn>"
    with pytest.raises(UserError, match=r"^model\.thinking=false: .* no enable_thinking switch"):
        open_tokenizer(str(folder), thinking=False)


# What is opened


def test_a_model_s_type_is_float32_on_the_cpu_unless_asked_for(folder):
    model = open_model(str(folder))
    assert model.dtype == torch.float32
    assert not model.training
    assert open_model(str(folder), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert open_model(str(folder), device="auto").dtype == torch.float32  # there is no GPU


def test_on_an_accelerator_it_is_the_files(folder, monkeypatch):
    asked = {}

    def load(path, **options):
        asked.update(options)
        return model, dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), ())

    model = open_model(str(folder))
    monkeypatch.setattr(pretrained.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    open_model(str(folder), device="cuda:1")
    assert (asked["device_map"], asked["dtype"]) == ("cuda:1", "auto")
    open_model(str(folder), device="auto", dtype=torch.float16)
    assert (asked["device_map"], asked["dtype"]) == ("auto", torch.float16)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    with pytest.raises(UserError, match="does not fit on the visible GPUs"):
        open_model(str(folder), device="auto")


@pytest.mark.parametrize(
    ("accelerator", "spread", "device"),
    [
        ("cpu", False, "cpu"),
        ("auto", False, "cuda:0"),
        ("gpu", False, "cuda:0"),
        ("cuda", True, "auto"),
    ],
)
def test_accelerators_are_devices(monkeypatch, accelerator, spread, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert device_of(accelerator, spread=spread) == device


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("accelerator", "spread", "says"),
    [
        ("gpu", False, "trainer.accelerator=gpu: there is none here; trainer.accelerator=cpu runs"),
        ("cpu", True, "evaluation.spread=true spreads the model over GPUs"),
    ],
)
def test_hardware_that_is_not_there_is_refused(accelerator, spread, says):
    with pytest.raises(UserError) as error:
        device_of(accelerator, spread=spread)
    assert says in one_line(error)


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_described_without_being_loaded(make_model, tmp_path, tied, max_shard_size):
    model = make_model(torch.bfloat16, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    facts = describe(str(tmp_path))
    for dtype in (torch.float32, torch.bfloat16):
        assert facts.fingerprint == model_fingerprint(open_model(str(tmp_path), dtype=dtype))
    assert facts.parameters == sum(weight.numel() for weight in model.parameters())
    assert facts.shape == {
        "layers": 3,
        "width": 32,
        "heads": 4,
        "kv_heads": 2,
        "head_width": 8,
        "ffn_width": 48,
        "vocabulary": 61,
        "tied": tied,
    }


def test_experts_that_are_fused_on_loading_are_described_all_the_same(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 11}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = MixtralConfig(**sizes, **heads, num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert describe(str(tmp_path)).fingerprint == model_fingerprint(open_model(str(tmp_path)))


def test_weights_without_the_base_model_s_prefix_are_known(make_model, tmp_path):
    """As in GPT-2's own files, which were saved from the model without a head."""
    model = make_model()
    model.save_pretrained(tmp_path)
    model.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["Qwen3ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert describe(str(tmp_path)).fingerprint == model_fingerprint(model)


# What is refused


def refused(path: Path | str, revision: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        open_model(str(path), revision)
    return one_line(error)


def test_a_folder_without_config_or_weights(folder, tmp_path):
    assert "there is no such folder" in refused("/nowhere/at/all")
    assert "holds no config.json" in refused(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()
    assert "expected model.safetensors" in refused(folder)
    assert "pickled weights" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "cannot be loaded" in refused(folder)


def test_a_folder_whose_files_are_not_all_there(make_model, tmp_path):
    make_model().save_pretrained(tmp_path, max_shard_size="20KB")
    part = sorted(tmp_path.glob("model-*.safetensors"))[1]
    part.unlink()
    assert f"lacks {part.name}, which model.safetensors.index.json names" in refused(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    assert "is not an index of weights" in refused(tmp_path)


@pytest.mark.parametrize("place", ["../model.safetensors", "/model.safetensors", "..", ""])
def test_an_index_names_no_files_outside_its_folder(folder, place):
    index = {"weight_map": {"model.norm.weight": place}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names files outside its folder" in refused(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers(folder, make_model, value):
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, -1] = value
    model.save_pretrained(folder)
    said = _refused_by_description(folder)
    assert "model.layers.1.mlp.up_proj.weight holds NaN or infinite values" in said


def test_weights_of_another_model(folder, make_model):
    make_model(num_hidden_layers=2, hidden_size=64).save_pretrained(folder.parent / "other")
    shutil.copy(folder.parent / "other/model.safetensors", folder)
    for said in (refused(folder), _refused_by_description(folder)):
        assert "not of the model that its config.json describes: they lack model.layers.2." in said
        assert "and 7 more" in said
        assert "in another shape" in said
    (folder / "model.safetensors").write_bytes(b"not weights")
    assert "cannot be" in refused(folder)
    assert "fetch it again" in _refused_by_description(folder)


def _refused_by_description(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        describe(str(folder))
    return one_line(error)


def test_models_that_are_no_decoders(tmp_path):
    T5Config().save_pretrained(tmp_path)
    assert "is a t5, not a decoder-only causal language model" in refused(tmp_path)
    AutoConfig.for_model("bert", architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    assert "is a BertForMaskedLM, not a decoder-only" in refused(tmp_path)


def test_a_tokenizer_without_padding_and_end_is_refused(folder, make_tokenizer):
    tokenizer = make_tokenizer("none")
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="neither a padding token nor an end of text"):
        open_tokenizer(str(folder))


def test_tokenizers_that_will_not_do(folder, make_tokenizer):
    make_tokenizer("none").save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no chat template: use a chat model"):
        open_tokenizer(str(folder))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        open_tokenizer(str(folder))


def test_a_hub_id_that_cannot_be_reached_says_how_to_fetch_it(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refused("nobody/nothing", "v1")
    assert "model.path=nobody/nothing cannot be loaded" in said
    assert "at revision v1" in said
    assert "`python scripts/download.py model=<option>` and run with HF_HUB_OFFLINE=1" in said
    assert "or give model.path=<folder>" in said


def test_a_revision_that_does_not_exist(monkeypatch):
    class Response:
        status_code, headers, request = 404, {}, None

    def missing(*_, **__):
        raise RevisionNotFoundError("404", response=Response())

    monkeypatch.setattr(weight_files, "snapshot_download", missing)
    assert refused("some/model", "v9") == "model.revision=v9: some/model has no such revision"


def test_a_hub_id_s_revision_is_a_commit_once_it_is_read(folder, monkeypatch):
    commit = folder.rename(folder.parent / "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setattr(weight_files, "snapshot_download", lambda path, **_: str(commit))
    assert commit_of("some/model", "main") == commit.name
    assert commit_of(str(commit)) is None


def test_what_decides_a_model_is_in_its_folder_alone(folder):
    (folder / "README.md").touch()
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5/model.safetensors").touch()
    files = model_files(str(folder))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert not {name for name in files if "/" in name or name.endswith(".md")}
    assert model_files("some/model") == {}


def test_a_hub_id_s_files_come_from_the_local_cache(folder, monkeypatch):
    asked = []

    def cached(path, **options):
        asked.append((path, options["revision"], "*.safetensors" in options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr(weight_files, "snapshot_download", cached)
    assert open_model("some/model", "v1").config.num_hidden_layers == 3
    assert open_tokenizer("some/model", "v1").chat_template
    assert asked == [("some/model", "v1", False), ("some/model", "v1", True), *asked[:1]]
