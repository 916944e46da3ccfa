"""Plain LoRA in PEFT's format, read by PEFT itself."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import steerlora
from steerlora.errors import UserError

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("targets", [None, ("q_proj", "down_proj")])
def test_peft_gives_equal_logits(make_model, make_adapter, tokens, tmp_path, targets):
    model = make_model(torch.float64)
    ids, mask = tokens([7, 5])
    base = model(ids, attention_mask=mask).logits
    changes = {"target_modules": targets} if targets else {}
    adapter = make_adapter(model, "none", alpha=7.0, **changes)
    ours = model(ids, attention_mask=mask).logits
    assert not torch.allclose(ours, base)
    steerlora.export_peft(adapter, tmp_path / "peft", base_path="some/base")
    theirs = peft.PeftModel.from_pretrained(
        make_model(torch.float64), tmp_path / "peft", autocast_adapter_dtype=False
    )
    found = theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(found, ours, atol=1e-10, rtol=0)
    lora = [name for name, _ in theirs.named_parameters() if "lora_" in name]
    assert len(lora) == 2 * len(adapter.layers)


@pytest.mark.parametrize("router", ["prototype", "mahalanobis"])
def test_a_specialist_is_what_is_left_when_all_others_are_forgotten(
    router, make_model, make_adapter, tokens, tmp_path
):
    model = make_model(torch.float64)
    own = {"router": router, "dynamic_rank": False, "context": "causal_mean"}
    adapter = make_adapter(model, "dense", margin=0.0, null_specialist=False, **own)
    width, generator = model.config.hidden_size, torch.Generator().manual_seed(0)
    for specialist in range(adapter.config.specialists):
        drawn = torch.randn(20, width, generator=generator, dtype=torch.float64)
        adapter.routers["1"].fit(specialist, drawn + 4 * specialist)
    ids, mask = tokens([7, 5])
    all_known = model(ids, attention_mask=mask).logits
    for specialist in (0, 1, 3):
        adapter.forget(specialist)
    assert adapter.available().tolist() == [False, False, True, False]
    ours = model(ids, attention_mask=mask).logits
    assert not torch.allclose(ours, all_known)
    steerlora.export_peft(adapter, tmp_path / "peft", base_path="some/base", specialist=2)
    theirs = peft.PeftModel.from_pretrained(
        make_model(torch.float64), tmp_path / "peft", autocast_adapter_dtype=False
    )
    found = theirs(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], ours[mask.bool()], atol=1e-10, rtol=0)


def test_routed_adapters_cannot_be_exported(make_model, make_adapter, tmp_path):
    adapter = make_adapter(make_model(), "dense")
    with pytest.raises(UserError, match="PEFT has no format for routed_lora: it is not plain LoRA"):
        steerlora.export_peft(adapter, tmp_path / "peft", base_path="base")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("targets", [None, ("mlp.c_proj",)])
def test_another_family_s_names_are_peft_s_too(make_adapter, tokens, tmp_path, targets):
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 61}
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).double().eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = make_adapter(model, "none", target_modules=targets)
    ids, mask = tokens([7])
    ours = model(ids, attention_mask=mask).logits
    steerlora.export_peft(adapter, tmp_path, base_path="some/base")
    fresh = GPT2LMHeadModel(config).double().eval()
    fresh.load_state_dict(weights)
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(theirs(ids, attention_mask=mask).logits, ours, atol=1e-10, rtol=0)
    lora = [name for name, _ in theirs.named_parameters() if "lora_" in name]
    assert len(lora) == 2 * len(adapter.layers)
