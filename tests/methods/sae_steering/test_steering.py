"""Steering by latents and by a vector: what it adds, where, and what is refused.

B batch, S sequence, D model width.
"""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steerlora.errors import UserError
from steerlora.lm.decoder import edited
from steerlora.lm.identity import model_fingerprint
from steerlora.lm.signal_tokens import SignalTokens
from steerlora.methods.base import SiteSAE, Sources
from steerlora.methods.sae_steering.config import SAESteeringConfig
from steerlora.methods.saving import CONFIG, WEIGHTS, load_adapter, save_adapter
from steerlora.saes.saelens import save_sae
from steerlora.saes.skip_transcoder import SkipTranscoder

SPECIAL, LATENTS, STRENGTHS = 7, [3, 40], [9.0, -2.0]
RULE = SignalTokens(special=(SPECIAL,), first=True)
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(5))
ALONG = {
    "set": {"latents": LATENTS, "strengths": STRENGTHS},
    "add": {"latents": LATENTS, "strengths": STRENGTHS, "how": "add"},
    "vector": {"along": "vector", "strengths": [3.0]},
}


@pytest.fixture
def make_steered(make_sae):
    """``make_steered(model, "set", site=1, **config)``: attached."""

    def make(model, along: str, site: int = 1, **changes):
        config = SAESteeringConfig(name="steered", sites=[site], **{**ALONG[along], **changes})
        dtype = next(model.parameters()).dtype
        saes = {site: SiteSAE(make_sae(seed=site).to(dtype))}
        method = config.build(model, Sources(saes=saes, signal_tokens=RULE), 0).to(dtype)
        if along == "vector":
            with torch.no_grad():
                method.vector.copy_(VECTOR)
        return method

    return make


@pytest.fixture
def text(tokens) -> dict[str, Tensor]:
    ids, mask = tokens([9, 6, 4])
    ids[0, 3] = SPECIAL
    return {"input_ids": ids, "attention_mask": mask}


def by_hand(plain, method, text) -> Tensor:
    """Logits of the reference, token by token and latent by latent, [B, S, V]."""
    mask = text["attention_mask"]
    counted = mask.bool() & (mask.cumsum(1) > 1) & (text["input_ids"] != SPECIAL)

    def steer(stream: Tensor) -> Tensor:
        rows = stream.clone()
        for row, place in counted.nonzero().tolist():
            x = stream[row, place]
            if method.config.along == "vector":
                rows[row, place] = x + method.config.strengths[0] * method.vector
                continue
            sae = method.saes[method.site]
            scores = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
            active = scores.topk(sae.k).indices.tolist()
            for latent, strength in zip(LATENTS, method.strengths, strict=True):
                z = scores[latent].relu() if latent in active else torch.zeros(()).to(x)
                new = strength if method.config.how == "set" else (z + strength).relu()
                rows[row, place] += (new - z) * sae.W_dec[latent]
        return rows

    with edited(plain, {method.site: steer}):
        return plain(**text).logits


@pytest.mark.parametrize("site", [0, 2])
@pytest.mark.parametrize("along", ALONG)
def test_it_computes_what_a_slow_reference_does(along, site, make_model, make_steered, text):
    model = make_model(torch.float64)
    base = make_model(torch.float64)(**text).logits
    method = make_steered(model, along, site)
    real = text["attention_mask"].bool()
    found, expected = model(**text).logits, by_hand(make_model(torch.float64), method, text)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found[real], base[real], atol=1e-3)
    with method.disabled():
        assert torch.equal(model(**text).logits, base)
    method.remove()
    assert torch.equal(model(**text).logits, base)


@pytest.mark.parametrize("along", ALONG)
def test_a_forward_with_a_cache_goes_on_as_one_without(along, make_model, make_steered, text):
    model = make_model(torch.float64)
    make_steered(model, along)
    ids = text["input_ids"][:1]
    whole = model(input_ids=ids).logits
    cache, parts = None, []
    for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:]):
        output = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache, parts = output.past_key_values, [*parts, output.logits]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("along", ALONG)
def test_generation_is_the_same_in_any_company(along, make_model, make_steered):
    model = make_model(torch.float64)
    make_steered(model, along)
    rows = [[5, 9, 3, 17, 2], [8, SPECIAL, 4], [6, 6, 6, 1]]
    generate = partial(model.generate, max_new_tokens=6, do_sample=False, pad_token_id=0)
    alone = [generate(torch.tensor([row]))[0, len(row) :] for row in rows]
    width = max(map(len, rows))
    for order in ([0, 1, 2], [2, 0, 1]):
        ids = torch.tensor([[0] * (width - len(rows[i])) + rows[i] for i in order])
        mask = torch.tensor([[0] * (width - len(rows[i])) + [1] * len(rows[i]) for i in order])
        found = generate(ids, attention_mask=mask)[:, width:]
        for row, number in zip(found, order, strict=True):
            assert torch.equal(row, alone[number])


@pytest.mark.parametrize("along", ALONG)
def test_rows_may_be_pushed_unlike_far(along, make_model, make_steered, text):
    model = make_model(torch.float64)
    method = make_steered(model, along)
    method.factors = torch.tensor([0.5, 1.0, 3.0])
    together = model(**text).logits
    method.factors = None
    for row, factor in enumerate((0.5, 1.0, 3.0)):
        own = make_model(torch.float64)
        strengths = [factor * strength for strength in ALONG[along]["strengths"]]
        make_steered(own, along, strengths=strengths)
        real = text["attention_mask"][row].bool()
        expected = own(**{name: given[row : row + 1] for name, given in text.items()}).logits[0]
        torch.testing.assert_close(together[row][real], expected[real], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(**text).logits[1], together[1])


def test_a_model_of_half_precision_keeps_its_type(make_model, make_steered, text):
    model = make_model(torch.bfloat16)
    make_steered(model, "set")
    assert model(**text).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("along", ALONG)
def test_what_trains_has_a_gradient_and_the_rest_has_none(along, make_model, make_steered, text):
    model = make_model(torch.float64)
    method = make_steered(model, along)
    trained = [p for p in method.parameters() if p.requires_grad]
    assert method.parameter_count() == (32 if along == "vector" else 2)
    model(**text).logits.square().mean().backward()
    # A strength that holds its latent at 0 has none.
    assert all((p.grad != 0).any() if along == "add" else (p.grad != 0).all() for p in trained)
    assert all(p.grad is None for sae in method.saes.values() for p in sae.parameters())


@pytest.fixture
def saved(make_model, make_steered, make_sae, tmp_path):
    """``saved("set")``: the model's logits and the folder."""

    def save(along: str, text) -> tuple[Tensor, object]:
        model, folder = make_model(), tmp_path / along
        method = make_steered(model, along)
        save_sae(make_sae(seed=1), tmp_path / "sae", {})
        places = {1: tmp_path / "sae"} if method.saes else None
        logits = model(**text).logits
        method.remove()
        save_adapter(method, folder, base_fingerprint=model_fingerprint(model), sae_paths=places)
        return logits, folder

    return save


@pytest.mark.parametrize("along", ALONG)
def test_a_saved_one_is_small_and_steers_alike(along, saved, make_model, text):
    expected, folder = saved(along, text)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3000
    model = make_model()
    load_adapter(model, folder)
    assert torch.equal(model(**text).logits, expected)


def test_what_does_not_fit_is_refused(saved, make_model, make_sae, text):
    _, folder = saved("set", text)
    with pytest.raises(UserError, match="another base model"):
        load_adapter(make_model(seed=3), folder)
    with pytest.raises(UserError, match="another SAE at site 1"):
        load_adapter(make_model(), folder, sae=make_sae(seed=2))
    weights = load_file(folder / WEIGHTS)
    save_file({"strengths": weights["strengths"] / 0}, folder / WEIGHTS)
    model = make_model()
    with pytest.raises(UserError, match="strengths is not finite"):
        load_adapter(model, folder)
    assert torch.equal(model(**text).logits, make_model()(**text).logits)
    config = json.loads((folder / CONFIG).read_text())
    config["method"]["latents"] = [3, 64]
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="lacks latent 64: it has latents 0 to 63"):
        load_adapter(model, folder)


def test_an_sae_that_writes_another_stream_is_refused(make_model):
    sae = SkipTranscoder(32, 64, k=5, span=1)
    with pytest.raises(ValueError, match="writes the stream 1 layers above"):
        SAESteeringConfig(sites=[1]).build(make_model(), Sources(saes={1: SiteSAE(sae)}), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": [0, 1]}, "steers at one site"),
        ({"latents": [1, 2]}, "not one for each of method.latents"),
        ({"along": "vector", "strengths": [1, 2]}, "a vector has one strength"),
        ({"strengths": [float("nan")]}, "method.strengths"),
        ({"strengths": [float("inf")]}, "method.strengths"),
        ({"latents": [-1]}, "method.latents"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        SAESteeringConfig(**changes)
