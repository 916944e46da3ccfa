"""A model with units: attached, counted, decoded, padded, saved and trained as any method."""

from __future__ import annotations

import pytest
import torch
from helpers.tolerances import assert_close_in_float32
from helpers.training import learner_of

from steerlora.data.batches import collate
from steerlora.data.chat import EncodedChat
from steerlora.errors import UserError
from steerlora.lm.identity import model_fingerprint
from steerlora.methods.saving import load_adapter, save_adapter
from steerlora.methods.stan.config import StanConfig

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=["value", "absolute"])
def attached(request, make_model, make_stan):
    model = make_model()
    return model, make_stan(model, select=request.param)


def test_attached_disabled_and_removed(attached, make_model, tokens):
    model, method = attached
    ids, mask = tokens([6, 4])
    plain = make_model()
    base = plain(input_ids=ids, attention_mask=mask).logits
    assert not torch.allclose(model(input_ids=ids, attention_mask=mask).logits, base)
    with method.disabled():
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, base)
    assert len(method.layers) == 2 * 7  # layers 1 and 2
    method.remove()
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, base)
    assert list(dict(model.named_modules())) == list(dict(plain.named_modules()))


def test_a_new_one_changes_nothing(make_model, make_stan, tokens):
    ids, mask = tokens([6, 4])
    model = make_model()
    base = model(input_ids=ids, attention_mask=mask).logits
    method = make_stan(model)
    for layer in method.layers.values():
        layer.decoder.data.zero_()
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, base)


def test_it_has_the_parameters_of_lora_of_rank_m(make_model, make_stan, make_adapter):
    method = make_stan(make_model(), units=12)
    lora = make_adapter(make_model(), "none", specialists=4, rank=3)
    assert method.parameter_count() == lora.parameter_count()


def test_padding_and_the_order_of_the_batch_change_nothing(attached, tokens):
    model, _ = attached
    ids, mask = tokens([7, 4, 5])
    together = model(input_ids=ids, attention_mask=mask).logits
    for row, length in enumerate([7, 4, 5]):
        alone = model(input_ids=ids[row : row + 1, :length]).logits[0]
        assert_close_in_float32(together[row, :length], alone)
    turned = model(input_ids=ids.flip(0), attention_mask=mask.flip(0)).logits.flip(0)
    assert_close_in_float32(turned[mask.bool()], together[mask.bool()])


def test_it_decodes_with_a_cache_as_without(make_model, make_stan, tokens):
    model = make_model(torch.float64)
    make_stan(model)
    ids, mask = tokens([6, 6])
    cached, whole = (
        model.generate(input_ids=ids, attention_mask=mask, use_cache=use, **GREEDY)
        for use in (True, False)
    )
    assert torch.equal(cached, whole)


def test_saved_and_loaded_it_is_the_same(attached, make_model, tokens, tmp_path):
    model, method = attached
    ids, mask = tokens([6, 4])
    expected = model(input_ids=ids, attention_mask=mask).logits
    save_adapter(method, tmp_path, base_fingerprint=model_fingerprint(make_model()))
    other = make_model()
    loaded = load_adapter(other, tmp_path)
    assert loaded.config == method.config
    assert torch.equal(other(input_ids=ids, attention_mask=mask).logits, expected)


def test_it_learns_the_next_token(make_model, make_stan):
    model = make_model()
    method = make_stan(model)
    rows = [EncodedChat(list(range(1 + shift, 9 + shift)), 3) for shift in range(4)]
    batch = collate(rows, [0] * 4, 0)
    learner = learner_of(model, method)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 0.02)
    found = []
    for _ in range(30):
        ((_, loss),) = learner.losses(batch).values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[-1] < found[0] / 2


def test_the_same_seed_makes_the_same_units(make_model):
    from steerlora.methods.base import Sources

    def encoder(seed: int) -> torch.Tensor:
        method = StanConfig(units=6, k=2).build(make_model(), Sources(), seed)
        return next(iter(method.layers.values())).encoder

    assert torch.equal(encoder(0), encoder(0))
    assert not torch.equal(encoder(0), encoder(1))


def test_the_factor_is_one_or_alpha_over_k():
    assert StanConfig(k=4).factor == 1 / 4
    assert StanConfig(k=4, scale="alpha/k", alpha=8).factor == 2


def test_more_units_that_act_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"method\.k=9 is more than method\.units=8: choose k"):
        StanConfig(units=8, k=9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, r"method\.k=0: must be a whole number from 1"),
        ({"units": 0}, r"method\.units=0: must be a whole number from 1"),
        ({"select": "valu"}, "did you mean 'value'"),
        ({"scale": "1/m"}, r"1/k"),
        ({"scale": "alpha/k", "alpha": 0}, r"method\.alpha=0: must be a number above 0"),
    ],
)
def test_a_wrong_setting_is_one_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        StanConfig(**changes)
    assert "\n" not in str(caught.value)
