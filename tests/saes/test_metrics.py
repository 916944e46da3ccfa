"""SAE metrics against their formulas, and spliced losses against a model run by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from steerlora.lm.decoder import residual_streams
from steerlora.lm.signal_tokens import SignalTokens
from steerlora.saes.base import SparseAutoencoder
from steerlora.saes.metrics import ce_recovered, sae_metrics
from steerlora.saes.relu import ReLU
from steerlora.saes.skip_transcoder import SkipTranscoder
from steerlora.saes.topk import TopK

WIDTH, LATENTS, K = 16, 48, 4


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
    )
    return Qwen3ForCausalLM(config).eval()


def make_sae(architecture: type = TopK, **settings) -> SparseAutoencoder:
    settings = ({"k": K} if architecture is TopK else {}) | settings
    sae = architecture(WIDTH, LATENTS, **settings).double()
    with torch.no_grad():
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(2))
    return sae


@pytest.mark.parametrize(
    "settings", [{}, {"normalize": "layer_norm"}, {"architecture": ReLU}], ids=str
)
def test_every_metric_equals_its_formula(settings):
    sae = make_sae(**settings)
    x = 5 + torch.randn(300, WIDTH, dtype=torch.float64)
    y = sae(x).detach()
    features = sae.encode(x)
    fvu = (x - y).square().sum() / (x - x.mean(0)).square().sum()
    fired = features.indices[features.values > 0].unique()
    expected = {
        "explained_variance": 1 - fvu,
        "fvu": fvu,
        "mse": F.mse_loss(y, x),
        "cossim": F.cosine_similarity(x, y).mean(),
        "l2_norm_in": x.norm(dim=1).mean(),
        "l2_norm_out": y.norm(dim=1).mean(),
        "l2_ratio": (y.norm(dim=1) / x.norm(dim=1)).mean(),
        "relative_reconstruction_bias": y.square().sum() / (x * y).sum(),
        "l0": (features.values > 0).sum() / 300,
        "l1": features.values.sum() / 300,
        "frac_alive": len(fired) / LATENTS,
    }
    found = sae_metrics(sae, x, batch_size=77)
    assert found == pytest.approx(
        {name: torch.as_tensor(value).item() for name, value in expected.items()}
    )
    assert sae_metrics(sae, x.split(50)) == pytest.approx(found)


def test_a_perfect_autoencoder_scores_perfectly():
    sae = ReLU(4, 8).double()
    identity = torch.eye(4, dtype=torch.float64)
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([identity, -identity]))
        sae.W_enc.copy_(sae.W_dec.t())
    found = sae_metrics(sae, torch.randn(50, 4, dtype=torch.float64))
    assert found["fvu"] == pytest.approx(0)
    assert found["l0"] == 4
    for name in ("explained_variance", "cossim", "l2_ratio", "relative_reconstruction_bias"):
        assert found[name] == pytest.approx(1)


def batch(padding: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, : 3 if padding == "left" else 0] = 0
    mask[2, 9 if padding == "left" else 4 :] = 0
    return ids, mask


def loss_by_hand(model, ids, site: int, replace, drop_first: bool) -> tuple[float, torch.Tensor]:
    """Summed loss and log-probabilities of one unpadded row, through a forward pre-hook."""

    def hook(_, args, kwargs):
        stream = args[0] if args else kwargs["hidden_states"]
        out = stream.clone()
        out[:, int(drop_first) :] = replace(stream[:, int(drop_first) :])
        return ((out, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": out})

    handle = model.model.layers[site].register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        scores = model(ids[None]).logits[0, :-1].log_softmax(-1)
    handle.remove()
    return float(F.nll_loss(scores, ids[1:], reduction="sum")), scores


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("drop_first", [True, False])
def test_spliced_losses_equal_unpadded_rows_run_by_hand(model, padding, drop_first):
    sae, site = make_sae().float(), 1
    ids, mask = batch(padding)
    replacements = {
        "without_sae": lambda x: x,
        "with_sae": sae,
        "with_ablation": torch.zeros_like,
    }
    loss, kl, tokens = dict.fromkeys(replacements, 0.0), dict.fromkeys(replacements, 0.0), 0
    intact = None
    for row, real in zip(ids, mask.bool(), strict=True):
        tokens += int(real.sum()) - 1
        for name, replace in replacements.items():
            total, scores = loss_by_hand(model, row[real], site, replace, drop_first)
            intact = scores if name == "without_sae" else intact
            loss[name] += total
            kl[name] += float(F.kl_div(scores, intact, log_target=True, reduction="sum"))
    loss = {name: value / tokens for name, value in loss.items()}
    ablated = loss["with_ablation"]

    halves = [(ids[:1], mask[:1]), (ids[1:], mask[1:])]
    found = ce_recovered(model, sae, site, halves, signal_tokens=SignalTokens(first=drop_first))
    expected = {f"ce_loss_{name}": value for name, value in loss.items()} | {
        "ce_loss_score": (ablated - loss["with_sae"]) / (ablated - loss["without_sae"]),
        "kl_div_with_sae": kl["with_sae"] / tokens,
        "kl_div_with_ablation": kl["with_ablation"] / tokens,
        "kl_div_score": 1 - kl["with_sae"] / kl["with_ablation"],
    }
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert loss["with_sae"] != pytest.approx(loss["without_sae"], rel=1e-3)


def test_a_perfect_reconstruction_recovers_everything(model):
    class Identity(torch.nn.Module):
        def forward(self, x):
            return x

    found = ce_recovered(model, Identity(), 2, [batch("left")])
    assert found["ce_loss_score"] == found["kl_div_score"] == 1
    assert found["kl_div_with_sae"] == 0


def test_what_writes_a_later_stream_is_spliced_in_there(model):
    """A layer's own output in place of what would approximate it."""
    ids, mask = batch("left")
    streams = residual_streams(model, ids, mask, [1, 2])

    class Layer(torch.nn.Module):
        def forward(self, x):
            assert torch.equal(x, streams[1])
            return streams[2]

    found = ce_recovered(model, Layer(), 1, [(ids, mask)], span=1)
    assert found["ce_loss_score"] == found["kl_div_score"] == 1
    assert found["ce_loss_with_ablation"] != found["ce_loss_without_sae"]


def test_a_transcoder_is_measured_on_the_stream_that_it_writes():
    sae = make_sae(SkipTranscoder, k=K)
    with torch.no_grad():
        sae.W_skip.normal_(generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(3)
    read, written = torch.randn(2, 50, WIDTH, generator=generator, dtype=torch.float64)
    found = sae_metrics(sae, torch.stack([read, written], 1), batch_size=20)
    error = (written - sae(read)).square().sum()
    fvu = error / (written - written.mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(fvu.item())
    assert found["l0"] == (sae.encode(read).values > 0).sum(1).double().mean()


def test_a_score_without_meaning_is_not_a_number(model):
    """One token a sequence and the first one kept: ablation touches nothing that is counted."""
    ids = torch.tensor([[3, 4]])
    found = ce_recovered(model, make_sae().float(), 2, [(ids, torch.ones_like(ids))])
    assert math.isnan(found["ce_loss_score"])
    assert found["ce_loss_with_sae"] == found["ce_loss_without_sae"]
