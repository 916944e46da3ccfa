"""Base models in GGUF files: what they become, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.gguf_files import SIZES, SPECIAL, TEMPLATE, write_gguf
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from steerlora.cli.compose import load
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.run import run
from steerlora.errors import UserError
from steerlora.lm.gguf import check_header, convert
from steerlora.lm.pretrained import describe, open_model, open_tokenizer
from steerlora.stages import base
from steerlora.stages.common import load_base


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture(scope="module")
def folder(file) -> Path:
    convert(file, file.parent / "converted")
    return file.parent / "converted"


def test_weights_are_those_that_the_blocks_stand_for(folder, tmp_path):
    held = write_gguf(tmp_path / "same.gguf")
    model = open_model(str(folder))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    names = {
        "token_embd": "embed_tokens",
        "blk.0.attn_v": "layers.0.self_attn.v_proj",
        "blk.1.ffn_down": "layers.1.mlp.down_proj",
        "output_norm": "norm",
    }
    for theirs, ours in names.items():
        weight = model.get_parameter(f"model.{ours}.weight")
        assert torch.equal(weight, torch.from_numpy(held[f"{theirs}.weight"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight  # there is no output.weight


def test_logits_are_those_of_plain_transformers(file, folder):
    plain = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(open_model(str(folder))(ids).logits, plain.eval()(ids).logits)


def test_the_tokenizer_is_the_one_of_the_file_s_metadata(folder):
    tokenizer = open_tokenizer(str(folder))
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == SPECIAL
    turns = [{"role": "user", "content": "he"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text)["input_ids"]
    assert [token for token in ids if token < len(SPECIAL)] == [1, 2, 1]  # nothing is put in front
    assert tokenizer.decode(ids) == text
    assert "he" in tokenizer.convert_ids_to_tokens(ids)  # merged
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [2]


def test_the_base_stage_keeps_what_it_dequantised(file, tmp_path):
    def step(*options: str):
        root = f"artifacts.root={tmp_path / 'artifacts'}"
        return base.step(load([root, "logger=none", "model=micro_m", *SIZES, *options]))

    given = step(f"model.path={file}")
    store = ArtifactStore(tmp_path / "artifacts")
    artifact = run([given], store)[given]
    model, tokenizer = load_base(artifact)
    assert tokenizer.eos_token == "<|im_end|>"
    assert (
        describe(str(artifact / "model")).fingerprint == artifact.json("base.json")["fingerprint"]
    )
    # The content counts, not the place nor how it is named.
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "renamed.gguf").write_bytes(file.read_bytes())
    same = step(f"model.path={other}", "model.gguf_file=renamed.gguf")
    assert same.fingerprint == given.fingerprint
    (other / "renamed.gguf").unlink()
    assert load_base(artifact)[0].num_parameters() == model.num_parameters()
    write_gguf(other / "renamed.gguf", blocks="Q8_0")
    changed = step(f"model.path={other}", "model.gguf_file=renamed.gguf")
    assert changed.fingerprint != given.fingerprint


@pytest.mark.parametrize("left", [0, 3, 10, 500, 9000, -40_000, -1])
def test_a_file_that_is_cut_short_is_one_line(file, tmp_path, left):
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:left])
    with pytest.raises(UserError, match=r"cut\.gguf is (cut short|not a GGUF).*fetch it again$"):
        check_header(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"architecture": "mamba9"}, "cannot open a GGUF file of architecture mamba9: "),
        ({"blocks": "Q5_0"}, "holds tensors of ggml type 6, .* Supported quantized types: Q4_0"),
    ],
)
def test_what_transformers_cannot_read_is_one_line(tmp_path, options, reason):
    write_gguf(tmp_path / "other.gguf", **options)
    with pytest.raises(UserError, match=rf"model\.path=.*other\.gguf.*{reason}") as error:
        convert(tmp_path / "other.gguf", tmp_path / "converted")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["model=smollm2_135m_q4"], "no such file; `python .*download.* model=smollm2_135m is "),
        (["model.path=absent.gguf"], "model.path=absent.gguf: there is no such file$"),
        (["model.path=/absent", "model.gguf_file=a.gguf"], "is a file of the folder model.path"),
        (["model.gguf_file=a.gguf"], "is a file of the folder model.path: give"),
        (["model.path={file}", f"model.sha256='{'0' * 64}'"], "another file than model.sha256=000"),
    ],
)
def test_a_file_that_is_not_there_or_another_is_refused(file, tmp_path, options, reason):
    options = [option.format(file=file) for option in options]
    with pytest.raises(UserError, match=reason) as error:
        base.step(load([f"artifacts.root={tmp_path}", *options]))
    assert "\n" not in str(error.value)


def test_a_hub_that_cannot_be_reached_has_an_alternative(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    step = base.step(load([f"artifacts.root={tmp_path}", "model=smollm2_135m", "logger=none"]))
    with pytest.raises(UserError, match="model=smollm2_135m_q4 is the same model from elsewhere"):
        run([step], ArtifactStore(tmp_path))
