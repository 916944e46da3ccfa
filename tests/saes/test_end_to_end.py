"""End-to-end training: its loss and gradient, what passes as it is, and what is left alone.

B batch, S sequence, D model width.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from steerlora.config import TrainerConfig
from steerlora.data.batches import collate
from steerlora.data.chat import EncodedChat
from steerlora.engine.progress import SilentProgress
from steerlora.lm import divergence
from steerlora.lm.decoder import edited, layers_of
from steerlora.saes.config import SAES
from steerlora.saes.end_to_end.training import EndToEndModule, spliced
from steerlora.saes.topk import TopK
from steerlora.training.loop import fit

WIDTH, LATENTS, K, SITE = 32, 64, 5, 1
SPECIAL = 7
ARCHITECTURES = (
    *("topk", "batch_topk", "matryoshka_topk", "matryoshka_batch_topk", "skip_transcoder"),
    *("relu", "jumprelu", "gated"),
)


def but_first(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Every real token but a row's first and one kind of special token."""
    later = attention_mask.cumsum(1) > 1
    return attention_mask.bool() & later & (input_ids != SPECIAL)


@pytest.fixture
def text(tokens):
    ids, mask = tokens([9, 6, 4])
    ids[0, 3] = SPECIAL
    rows = [row[: int(real.sum())].tolist() for row, real in zip(ids, mask, strict=True)]
    return collate([EncodedChat(row, 1) for row in rows], [-1] * len(rows), 0)


def module_of(model, sae=None, site=SITE, mse_weight=1.0, **settings) -> EndToEndModule:
    sae = TopK(WIDTH, LATENTS, k=K, seed=2, auxiliary=0.0) if sae is None else sae
    settings = {"total_steps": 20, "lr": 3e-3, "replaced": but_first} | settings
    return EndToEndModule(sae, model, site, mse_weight=mse_weight, **settings)


def by_hand(sae, stream: Tensor, kept: Tensor) -> Tensor:
    """The stream with dense reconstructions of unit rows, [B, S, D]."""
    scores = (stream - sae.b_dec) @ sae.W_enc + sae.b_enc
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(sae.k, dim=-1).indices, 1.0)
    rebuilt = (scores.relu() * chosen) @ F.normalize(sae.W_dec, dim=1) + sae.b_dec
    return torch.where(kept[..., None], rebuilt, stream)


@pytest.mark.parametrize("mse_weight", [0.0, 0.5])
@pytest.mark.parametrize("site", [0, 1, 3])
def test_loss_and_gradient_are_those_of_a_dense_reference(site, mse_weight, make_model, text):
    """In float64; site 3 is the stream that leaves the last layer."""
    model = make_model(torch.float64).requires_grad_(False)
    kept, real = but_first(text.input_ids, text.attention_mask), text.attention_mask.bool()
    inputs = {"input_ids": text.input_ids, "attention_mask": text.attention_mask}
    sae = TopK(WIDTH, LATENTS, k=K, seed=2, auxiliary=0.0).double()
    sae.normalize_decoder()
    with torch.no_grad():
        sae.b_dec.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    seen = []

    def splice(stream: Tensor) -> Tensor:
        seen.append((stream[kept], by_hand(sae, stream, kept)))
        return seen[-1][1]

    teacher = model(**inputs).logits.log_softmax(-1)
    with edited(model, {site: splice}):
        student = model(**inputs).logits.log_softmax(-1)
    each = (teacher.exp() * (teacher - student)).sum(-1)
    kl = each[real].mean()
    ((x, rebuilt),) = seen
    fvu = (x - rebuilt[kept]).square().sum() / (x - x.mean(0)).square().sum()
    scale = (fvu / kl).detach() if mse_weight else 1.0
    (scale * kl + mse_weight * fvu).backward()
    expected = {name: value.grad.clone() for name, value in sae.named_parameters()}
    sae.zero_grad()

    losses, fired = module_of(model, sae, site, mse_weight).losses(text)
    losses.total.backward()
    torch.testing.assert_close(losses.kl, kl.detach())
    torch.testing.assert_close(losses.fvu, fvu.detach())
    assert fired.sum() <= K * kept.sum()
    for name, value in sae.named_parameters():
        torch.testing.assert_close(value.grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)
        assert value.grad.any(), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_spliced_as_its_training_selects(architecture, make_model, text):
    """KL is that of the model with what the training leaves as residual; every weight learns."""
    model = make_model().requires_grad_(False)
    config = SAES[architecture](latents=LATENTS, seed=1)
    sae = config.build(WIDTH)
    kept = but_first(text.input_ids, text.attention_mask)
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    found = spliced(model, sae, SITE, text.input_ids, text.attention_mask, kept, dead)
    rebuilt = (found.written - found.errors.residual).detach()

    def splice(stream: Tensor) -> Tensor:
        return stream.masked_scatter(kept[..., None], rebuilt)

    inputs = {"input_ids": text.input_ids, "attention_mask": text.attention_mask}
    teacher = model(**inputs).logits.log_softmax(-1)
    with edited(model, {SITE + sae.span: splice}):
        student = model(**inputs).logits.log_softmax(-1)
    each = (teacher.exp() * (teacher - student)).sum(-1)
    expected = each[text.attention_mask.bool()].sum()
    torch.testing.assert_close(found.kl, expected, rtol=1e-4, atol=1e-5)
    found.kl.backward()
    assert sae.W_dec.grad.any()
    assert sae.W_enc.grad.any()


def test_layers_below_run_once_and_tokens_without_a_reconstruction_pass(make_model, text):
    model, runs, passed = make_model(), [], []
    for number, layer in enumerate(layers_of(model)):
        layer.register_forward_pre_hook(
            lambda _, given, number=number: runs.append((number, given[0]))
        )
    module = module_of(model)
    losses, _ = module.losses(text)
    assert [number for number, _ in runs] == [0, 1, 2, 1, 2]
    (_, below), (_, base), (_, _), (_, student), (_, _) = runs
    passed = ~but_first(text.input_ids, text.attention_mask)
    assert torch.equal(student[passed], base[passed])
    assert not torch.isclose(student, base).all(-1)[~passed].any()
    assert not below.requires_grad
    assert losses.total.requires_grad


def test_what_reconstructs_exactly_diverges_by_nothing(make_model, text):
    model = make_model()
    sae = TopK(WIDTH, 2 * WIDTH, k=2 * WIDTH, auxiliary=0.0)
    with torch.no_grad():
        rows = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.t())
    losses, _ = module_of(model, sae).losses(text)
    assert losses.kl.detach() == pytest.approx(0, abs=1e-6)
    assert losses.total.isfinite()


def test_padding_and_batch_mates_change_no_divergence(make_model, text):
    model = make_model()
    module = module_of(model)
    whole = float(module.losses(text)[0].kl) * text.tokens
    alone = [text.row(index) for index in range(3)]
    parts = [float(module.losses(row)[0].kl) * row.tokens for row in alone]
    assert sum(parts) == pytest.approx(whole, rel=1e-5)


def test_a_head_in_parts_is_the_whole_head(make_model, text, monkeypatch):
    model, found = make_model(torch.float64), []
    for most in (divergence.MOST_LOGITS, 4 * model.config.vocab_size):
        monkeypatch.setattr(divergence, "MOST_LOGITS", most)
        module = module_of(model, TopK(WIDTH, LATENTS, k=K, seed=2).double())
        losses, _ = module.losses(text)
        losses.total.backward()
        found.append((losses.total.detach(), module.sae.W_dec.grad))
    torch.testing.assert_close(found[0], found[1])


def train(module, batches, folder) -> None:
    fit(
        module,
        batches,
        module.total_steps,
        trainer=TrainerConfig(checkpoint_seconds=1e-9),
        checkpoints=folder,
        progress=SilentProgress(),
        description="end to end",
    )


@pytest.mark.parametrize("mse_weight", [0.0, 1.0])
def test_training_lowers_the_divergence_and_leaves_the_base_alone(
    mse_weight, make_model, text, tmp_path
):
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module = module_of(model, mse_weight=mse_weight)
    first = float(module.losses(text)[0].kl)
    train(module, lambda step: text, tmp_path)
    assert float(module.losses(text)[0].kl) < 0.7 * first
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("layers" in name for name in module.state_dict())
    norms = module.sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(LATENTS))


def test_it_resumes_as_if_unbroken(make_model, text, tmp_path):
    def broken(step: int):
        if step == 12:
            raise ZeroDivisionError
        return text

    whole, cut, again = (module_of(make_model()) for _ in range(3))
    train(whole, lambda step: text, tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        train(cut, broken, tmp_path / "cut")
    train(again, lambda step: text, tmp_path / "cut")
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_was_saved_trains_on_as_what_it_was(architecture):
    config = SAES[architecture](latents=LATENTS)
    sae = config.build(WIDTH)
    x = torch.randn(2, 200, 2, WIDTH, generator=torch.Generator().manual_seed(0)).squeeze()
    x = x[0] if sae.span else x[0, :, 0]
    sae.initialize_thresholds(x)
    sae.training_errors(x, torch.zeros(LATENTS, dtype=torch.bool))  # thresholds that follow, do
    again = config.build(WIDTH)
    again.continue_from(sae.for_inference())
    for name, value in sae.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)
