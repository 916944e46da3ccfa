"""What methods of other kinds need of the interface, each with the smallest method that uses it.

B batch, S sequence, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from helpers.training import learner_of
from torch import Tensor, nn

from steerlora.data.batches import collate
from steerlora.data.chat import EncodedChat
from steerlora.lm.decoder import edited
from steerlora.lm.targets import ReplacedLinear
from steerlora.methods.base import Learner, Method, SiteSAE, Sources
from steerlora.methods.config import MethodConfig

SITES = [1, 2]


@dataclass(frozen=True, kw_only=True)
class SplicedConfig(MethodConfig):
    """A scale a site for an SAE's reconstruction, which takes the place of the stream."""

    kind: str = "toy_spliced"
    sites: list[int] = field(default_factory=lambda: list(SITES))
    reads_features: ClassVar[bool] = True

    def build(self, model, sources, seed):
        return Spliced(self, model, sources).attach(model)

    def learner(self, method, **settings):
        return DistilledLearner(method=method, **settings)


class Spliced(Method):
    """x -> a_c SAE_c(x) at every site c, the first token of a sequence excepted."""

    def __init__(self, config, model, sources):
        super().__init__(config, model, {site: given.sae for site, given in sources.saes.items()})
        self.gains = nn.ParameterDict(
            {str(site): nn.Parameter(torch.ones(())) for site in config.sites}
        )

    def edits(self):
        return {site: partial(self.splice, site) for site in self.config.sites}

    def splice(self, site: int, stream: Tensor) -> Tensor:
        rebuilt = self.gains[str(site)] * self.saes[site](stream)
        if self.forward_state.continuing:
            return rebuilt
        return torch.cat([stream[:, :1], rebuilt[:, 1:]], 1)


class DistilledLearner(Learner):
    """KL(base || method) on real tokens, in place of the next token's loss."""

    def losses(self, batch):
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        with torch.no_grad(), self.method.disabled():
            teacher = self.model(**inputs).logits.log_softmax(-1)
        student = self.model(**inputs).logits.log_softmax(-1)
        each = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
        return {"kl": (1.0, each[batch.attention_mask.bool()].mean())}


def batch_of(ids: Tensor, mask: Tensor):
    rows = [EncodedChat(row[: int(real.sum())].tolist(), 1) for row, real in zip(ids, mask)]  # noqa: B905
    return collate(rows, [0] * len(rows), 0)


@pytest.fixture
def spliced(make_model, make_sae):
    model = make_model()
    sources = Sources(saes={site: SiteSAE(make_sae(seed=site)) for site in SITES})
    return model, SplicedConfig().build(model, sources, 0)


def test_streams_are_replaced_by_reconstructions_at_several_sites(spliced, make_model, tokens):
    model, method = spliced
    ids, mask = tokens([6, 6])

    def by_hand(sae, stream):
        return torch.cat([stream[:, :1], sae(stream)[:, 1:]], 1)

    plain = make_model()
    with edited(plain, {site: partial(by_hand, sae) for site, sae in method.saes.items()}):
        expected = plain(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected)
    with method.disabled():
        base = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(base, make_model()(input_ids=ids, attention_mask=mask).logits)
    method.remove()
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, base)


def dense_reconstruction(sae, x: Tensor) -> Tensor:
    """The SAE's output with every latent written out, [B, S, D] -> [B, S, D]."""
    scores = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    kept = torch.zeros_like(scores).scatter(-1, scores.topk(sae.k, dim=-1).indices, 1.0)
    return (scores.relu() * kept) @ sae.W_dec + sae.b_dec


def test_gradient_passes_through_a_reconstruction_to_the_site_below(spliced, make_model, tokens):
    model, method = spliced
    ids, mask = tokens([5, 4])
    plain = make_model().requires_grad_(False)
    gains = {site: torch.ones((), requires_grad=True) for site in SITES}

    def by_hand(site: int, stream: Tensor) -> Tensor:
        rebuilt = gains[site] * dense_reconstruction(method.saes[site], stream)
        return torch.cat([stream[:, :1], rebuilt[:, 1:]], 1)

    with edited(plain, {site: partial(by_hand, site) for site in SITES}):
        plain(input_ids=ids, attention_mask=mask).logits.square().mean().backward()
    model(input_ids=ids, attention_mask=mask).logits.square().mean().backward()
    for site in SITES:
        found = method.gains[str(site)].grad
        torch.testing.assert_close(found, gains[site].grad, rtol=1e-4, atol=1e-6)
        assert found != 0


def test_a_spliced_model_decodes_with_a_cache_as_without(spliced, tokens):
    model, _ = spliced
    ids, mask = tokens([5])
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, whole = (
        model.generate(input_ids=ids, attention_mask=mask, use_cache=use, **settings)
        for use in (True, False)
    )
    assert torch.equal(cached, whole)


def test_a_loss_may_be_another_than_the_next_tokens(spliced, tokens):
    model, method = spliced
    learner = learner_of(model, method)
    ids, mask = tokens([6, 4])
    terms = learner.losses(batch_of(ids, mask))
    assert list(terms) == ["kl"]
    assert terms["kl"][1] > 0
    terms["kl"][1].backward()
    assert all(gain.grad.abs() > 0 for gain in method.gains.values())
    for site in SITES:  # what rebuilds nothing loses nothing
        method.saes[site] = nn.Identity()
    assert float(learner.losses(batch_of(ids, mask))["kl"][1].detach()) == pytest.approx(
        0, abs=1e-6
    )


@dataclass(frozen=True, kw_only=True)
class ScaledConfig(MethodConfig):
    """A factor for every output of every adapted layer (Liu et al., arXiv 2205.05638)."""

    kind: str = "toy_scaled"

    def build(self, model, sources, seed):
        return ScaledOutputs(self, model).attach(model)


class ScaledLinear(ReplacedLinear):
    """y = l * (W x), with a vector l [D_out]; no low-rank pair."""

    def __init__(self, base, factors, state):
        super().__init__(base)
        self.factors, self.state = factors, state

    def forward(self, x):
        y = self.base(x)
        return y if self.state.disabled else y * self.factors


class ScaledOutputs(Method):
    def __init__(self, config, model):
        super().__init__(config, model)
        self.factors = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(torch.ones(target.linear.out_features))
                for name, target in self.targets(model).items()
            }
        )

    def replacements(self, model):
        return {
            name: ScaledLinear(target.linear, self.factors[name], self.running)
            for name, target in self.targets(model).items()
        }


def test_a_layer_may_be_replaced_by_what_is_no_low_rank_pair(make_model, tokens):
    ids, mask = tokens([6, 5])
    expected = make_model()(input_ids=ids, attention_mask=mask).logits
    model = make_model()
    modules = dict(model.named_modules())
    method = ScaledConfig(sites=[1], target_modules=["v_proj", "mlp.*"]).build(model, Sources(), 0)
    assert len(method.factors) == 2 * 4  # two layers, four modules each
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    for factors in method.factors.values():
        nn.init.constant_(factors, 0.5)
    changed = model(input_ids=ids, attention_mask=mask).logits
    assert not torch.allclose(changed, expected)
    with method.disabled():
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    loss = learner_of(model, method).losses(batch_of(ids, mask))["task"][1]
    loss.backward()
    assert all(factors.grad.abs().sum() > 0 for factors in method.factors.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    method.remove()
    assert dict(model.named_modules()) == modules


@dataclass(frozen=True, kw_only=True)
class SteeredConfig(MethodConfig):
    """A direction that is added to the stream."""

    kind: str = "toy_steered"

    def build(self, model, sources, seed):
        return Steered(self, model).attach(model)


class Steered(Method):
    """x -> x + v on every token, those of the prompt and those that are generated."""

    def __init__(self, config, model):
        super().__init__(config, model)
        width = model.config.hidden_size
        self.direction = nn.Parameter(torch.zeros(width))
        self.seen = 0

    def edits(self):
        return {min(self.config.sites): self.steer}

    def steer(self, stream):
        self.seen += stream.shape[1]
        return stream + self.direction


def test_a_signal_is_added_to_the_stream_at_generation(make_model, tokens):
    ids, mask = tokens([5])
    model = make_model()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    base = model.generate(input_ids=ids, attention_mask=mask, **settings)
    method = SteeredConfig(sites=[1]).build(model, Sources(), 0)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **settings), base)
    assert method.seen == 5 + 5  # the prompt, and every generated token that is read again
    nn.init.normal_(method.direction, std=3.0, generator=torch.Generator().manual_seed(0))
    steered = model.generate(input_ids=ids, attention_mask=mask, **settings)
    assert not torch.equal(steered, base)
    whole = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(steered, whole)
    with method.disabled():
        assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **settings), base)


def test_a_method_without_a_control_signal_refuses_interventions(make_model):
    method = SteeredConfig(sites=[1], name="steered").build(make_model(), Sources(), 0)
    with pytest.raises(ValueError, match=r"intervention shuffle acts on .*, and steered has none"):
        method.intervention("shuffle")


def test_two_methods_do_not_share_a_model(make_model):
    model = make_model()
    method = ScaledConfig(sites=[1]).build(model, Sources(), 0)
    with pytest.raises(ValueError, match="already carries an adapter"):
        ScaledConfig(sites=[1]).build(model, Sources(), 0)
    method.remove()
    with pytest.raises(ValueError, match="not attached"):
        method.remove()
