"""LoRA around SAEs: what it computes beside a slow reference, and what it leaves alone.

B batch, S sequence, D model width.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from steerlora.errors import UserError
from steerlora.lm.decoder import edited, layers_of
from steerlora.lm.identity import model_fingerprint
from steerlora.methods.base import SiteSAE, Sources
from steerlora.methods.saving import load_adapter, save_adapter
from steerlora.methods.spliced_lora.config import SplicedLoRAConfig
from steerlora.saes.saelens import save_sae
from steerlora.saes.skip_transcoder import SkipTranscoder


def replaced(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Real tokens but a row's first and special ones, [B, S] bool."""
    return attention_mask.bool() & (attention_mask.cumsum(1) > 1) & (input_ids != 7)


def reconstruction(sae, x: Tensor) -> Tensor:
    """The SAE's output with every latent written out, [..., D] -> [..., D]."""
    scores = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    kept = torch.zeros_like(scores).scatter(-1, scores.topk(sae.k, dim=-1).indices, 1.0)
    return (scores.relu() * kept) @ sae.W_dec + sae.b_dec


@torch.no_grad()
def add_updates(model, method) -> None:
    """W + (alpha / r) B A, in every adapted layer of a model of its own."""
    scale = method.config.alpha / method.config.rank
    for name, pair in method.layers.items():
        layer, path = name.split(":")
        linear = layers_of(model)[int(layer)].get_submodule(path.replace("/", "."))
        linear.weight += scale * pair.B @ pair.A


def by_hand(plain, method, batch, *, adapter=True, saes=True) -> Tensor:
    """Logits of the reference, [B, S, V]."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    where = replaced(**inputs)[..., None]

    def splice(site: int, stream: Tensor) -> Tensor:
        y = reconstruction(method.saes[site], stream)
        if adapter and method.config.map_rank:
            one = method.maps[str(site)]
            y = y + y @ one.update.A.T @ one.update.B.T + one.bias
        return torch.where(where, y, stream)

    if adapter:
        add_updates(plain, method)
    edits = {site: partial(splice, site) for site in method.config.sites if saes}
    with edited(plain, edits):
        return plain(**inputs).logits


def logits_of(model, batch) -> Tensor:
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


SHAPES = {
    "after": {},
    "all": {"adapted": "all"},
    "two sites": {"sites": (1, 2), "adapted": "all"},
    "the first layer": {"sites": (0,)},
    "with maps": {"sites": (1, 2), "map_rank": 4},
    "a map alone": {"adapted": "none", "map_rank": 4},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_it_computes_what_a_slow_reference_does(shape, make_model, make_spliced, text):
    model = make_model(torch.float64)
    base = logits_of(make_model(torch.float64), text)
    method = make_spliced(model, **SHAPES[shape])
    real = text.attention_mask.bool()
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)

    def reference(**parts) -> Tensor:
        return by_hand(make_model(torch.float64), method, text, **parts)[real]

    close(logits_of(model, text)[real], reference())
    with method.only("saes"):
        close(logits_of(model, text)[real], reference(adapter=False))
    alone = reference(saes=False) if "map" not in shape else base[real]
    if shape != "with maps":
        with method.only("adapter"):
            close(logits_of(model, text)[real], alone)
        method.configure(spliced=False)
        close(logits_of(model, text)[real], alone)
        method.configure(spliced=True)
    with method.disabled():
        assert torch.equal(logits_of(model, text), base)
    method.remove()
    assert torch.equal(logits_of(model, text), base)


def test_tokens_that_carry_no_signal_pass_as_they_are(make_model, make_spliced, text):
    model, streams = make_model(), []
    method = make_spliced(model)
    with edited(model, {1: lambda x: streams.append(x) or x}):
        logits_of(model, text)
    method.observe(model, {"input_ids": text.input_ids, "attention_mask": text.attention_mask})
    rebuilt = method.rebuilt(1, streams[0])
    passes = ~replaced(text.input_ids, text.attention_mask)
    assert torch.equal(rebuilt[passes], streams[0][passes])
    assert not torch.isclose(rebuilt, streams[0]).all(-1)[~passes].any()


def test_rows_are_the_same_in_any_company(make_model, make_spliced, text):
    model = make_model()
    make_spliced(model, sites=(1, 2), map_rank=2)
    whole = logits_of(model, text)
    for index in (2, 0, 1):
        length = int(text.attention_mask[index].sum())
        alone = model(input_ids=text.input_ids[index : index + 1, :length]).logits
        torch.testing.assert_close(alone[0], whole[index, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapted", ["after", "all"])
def test_it_decodes_with_a_cache_as_without(adapted, make_model, make_spliced, tokens):
    model = make_model()
    make_spliced(model, adapted=adapted, map_rank=2)
    ids, mask = tokens([5, 3])
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    inputs = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}  # padded on the left
    cached, whole = (model.generate(**inputs, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, whole)


def test_it_is_of_the_models_type(make_model, make_spliced, text):
    model = make_model(torch.bfloat16)
    make_spliced(model, map_rank=2)
    found = logits_of(model, text)
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()


def test_noise_has_the_length_of_the_saes_error(make_model, make_spliced, text):
    model = make_model(torch.float64)
    method = make_spliced(model, dictionary="noise")
    method.observe(model, {"input_ids": text.input_ids, "attention_mask": text.attention_mask})
    stream = torch.randn(*text.input_ids.shape, 32, dtype=torch.float64)
    once, again = (method.rebuilt(1, stream) for _ in range(2))
    where = replaced(text.input_ids, text.attention_mask)
    expected = (stream - reconstruction(method.saes[1], stream)).norm(dim=-1)
    for found in (once, again):
        torch.testing.assert_close((found - stream).norm(dim=-1)[where], expected[where])
    assert not torch.isclose(once, again).all(-1)[where].any()


@pytest.mark.parametrize("changes", [{}, {"dictionary": "random", "map_rank": 2}])
def test_a_saved_one_is_loaded(changes, make_model, make_spliced, text, tmp_path):
    model = make_model()
    method = make_spliced(model, seed=5, **changes)
    save_sae(method.saes[1], tmp_path / "sae", metadata={})
    expected = logits_of(model, text)
    fingerprint = model_fingerprint(make_model())
    folder = tmp_path / "adapter"
    save_adapter(method, folder, base_fingerprint=fingerprint, sae_paths={1: tmp_path / "sae"})
    again = make_model()
    loaded = load_adapter(again, folder)
    torch.testing.assert_close(logits_of(again, text), expected)
    assert loaded.config == method.config
    assert loaded.parameter_count() == method.parameter_count()
    with pytest.raises(UserError, match="trained on another base model"):
        load_adapter(make_model(seed=1), folder)


def test_parameters_are_those_of_the_low_rank_pairs(make_model, make_spliced):
    sizes = {"after": 2, "all": 3}
    per_layer = sum(3 * (a + b) for a, b in [(32, 32), (32, 16), (32, 16), (32, 32)])
    per_layer += sum(3 * (a + b) for a, b in [(32, 48), (32, 48), (48, 32)])
    for adapted, layers in sizes.items():
        method = make_spliced(make_model(), adapted=adapted)
        assert method.parameter_count() == layers * per_layer
    alone = make_spliced(make_model(), adapted="none", map_rank=4)
    assert alone.parameter_count() == 2 * 4 * 32 + 32


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank": 0}, "must be a whole number from 1"),
        ({"map_rank": 0}, "must be a whole number from 1"),
        ({"adapted": "none"}, "leaves nothing to train"),
        ({"adapted": "al"}, "did you mean 'all'"),
        ({"adapted": "all", "cached_tokens": 9}, "nothing of them can be kept"),
        ({"dictionary": "noise", "cached_tokens": 9}, "drawn anew in every step"),
        ({"objective": "cross_entropy", "cached_tokens": 9}, "no teacher to keep anything of"),
        ({"objective": "cross_entropy", "teacher": "shuffled"}, "has none; set it to base"),
    ],
)
def test_settings_that_make_no_method_are_refused(changes, says):
    with pytest.raises(UserError, match=says) as caught:
        SplicedLoRAConfig(**changes)
    assert "\n" not in str(caught.value)


def test_an_sae_of_another_width_site_or_kind_is_refused(make_model, make_sae):
    def built(**saes):
        given = {int(site[1:]): SiteSAE(sae) for site, sae in saes.items()}
        SplicedLoRAConfig(sites=[1]).build(make_model(), Sources(saes=given), 0)

    with pytest.raises(ValueError, match="reads width 16, the model has 32"):
        built(s1=make_sae(width=16))
    with pytest.raises(ValueError, match=r"no SAE for control site 1; SAEs are given for \[2\]"):
        built(s2=make_sae())
    with pytest.raises(ValueError, match="writes the stream 1 layers above"):
        built(s1=SkipTranscoder(32, 64, k=3))
