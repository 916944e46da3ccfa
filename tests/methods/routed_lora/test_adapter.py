"""The adapter in a model: one pass, slow references, caches, batches, several sites, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.tolerances import assert_close_in_float32
from torch import nn

from steerlora.data.batches import ChatBatch
from steerlora.lm.decoder import edited, residual_streams
from steerlora.methods.routed_lora.adapter import Adapter
from steerlora.methods.routed_lora.config import SIGNALS, RoutedLoRAConfig
from steerlora.training.language import next_token_loss


def loss_of(model, ids, mask) -> torch.Tensor:
    labels = ids.masked_fill(mask == 0, -100)
    return next_token_loss(model, ChatBatch(ids, mask, labels, torch.zeros(len(ids)), len(ids)))


# One pass


def test_stream_and_features_at_the_site_are_the_bases_bit_for_bit(
    make_model, make_adapter, tokens
):
    model = make_model()
    ids, mask = tokens([7, 4])
    base = residual_streams(model, ids, mask, [1, 2])
    before = model(ids, attention_mask=mask).logits
    adapter = make_adapter(model)
    seen = {}

    def look(site):
        return lambda stream: seen.setdefault(site, stream)

    with edited(model, {1: look(1), 2: look(2)}):
        loss_of(model, ids, mask).backward()
    sae = adapter.saes[1]
    assert torch.equal(seen[1], base[1])
    assert all(map(torch.equal, sae.encode(seen[1]), sae.encode(base[1])))
    # Nothing below the site takes part in the backward, and nothing of the base has a gradient.
    assert not seen[1].requires_grad
    assert seen[2].requires_grad
    assert not torch.allclose(seen[2], base[2])
    assert all(p.grad is None for name, p in model.named_parameters() if "low_rank" not in name)
    assert {name.split(":")[0] for name in adapter.layers} == {"1", "2"}
    trained = [name for name, p in adapter.named_parameters() if p.grad is not None]
    assert len(trained) == 2 * len(adapter.layers) + 2
    assert not torch.allclose(model(ids, attention_mask=mask).logits, before)


# Slow references


class SlowLinear(nn.Module):
    """The update with a loop over specialists and rank components, from the definitions."""

    def __init__(self, base, layer, config, routing) -> None:
        super().__init__()
        self.base, self.layer, self.config, self.routing = base, layer, config, routing

    def forward(self, x):
        E, R = self.config.specialists, self.config.rank
        y = self.base(x)
        gate, mask = self.routing()
        for e in range(E):
            for j in range(R):
                row, column = self.layer.A[e * R + j], self.layer.B[:, e * R + j]
                weight = gate[..., e] * mask[..., j] * self.config.alpha / R
                y = y + ((x @ row) * weight).unsqueeze(-1) * column
        return y


def slow_routing(adapter: Adapter, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate [B, S, E] and mask [B, S, R] of the first site, token by token."""
    config, site = adapter.config, min(adapter.config.sites)
    E, R = config.specialists, config.rank
    if config.signal == "none":
        return torch.ones(*stream.shape[:2], E).to(stream), torch.ones(*stream.shape[:2], R).to(
            stream
        )
    router = adapter.routers[str(site)]
    gates, masks = [], []
    for x in stream.reshape(-1, stream.shape[-1]):
        if config.signal == "dense":
            signal = x / (x.square().mean() + 1e-6).sqrt()
        else:
            sae = adapter.saes[site]
            scores = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
            kept = scores.topk(sae.k).indices
            signal = torch.zeros_like(scores)
            signal[kept] = scores[kept].relu() / adapter.scales[str(site)]
        logits = signal @ router.weight + router.bias
        exponentials = (logits[:E] / config.temperature).exp()
        softmax = exponentials / exponentials.sum()
        threshold = softmax.sort(descending=True).values[config.top_k - 1]
        kept_gate = softmax * (softmax >= threshold)
        gates.append(kept_gate / (kept_gate.sum() + 1e-8))
        mask, product = [], 1.0
        for j in range(R):
            if config.dynamic_rank:
                product = product * torch.sigmoid(logits[E + j]).clamp_min(1e-4)
            mask.append(product if config.dynamic_rank else torch.ones_like(x[0]))
        masks.append(torch.stack(mask))
    size = stream.shape[:2]
    return torch.stack(gates).view(*size, E), torch.stack(masks).view(*size, R)


@pytest.mark.parametrize(
    ("signal", "changes"),
    [
        ("none", {}),
        ("dense", {"dynamic_rank": False, "temperature": 0.7}),
        ("dense", {}),
        ("sae", {}),
        ("sae", {"top_k": 4, "temperature": 2.0}),
        ("sae", {"top_k": 1, "dynamic_rank": False}),
    ],
)
def test_model_and_gradients_equal_the_slow_loop(make_model, make_adapter, tokens, signal, changes):
    model = make_model(torch.float64)
    ids, mask = tokens([6, 4])
    adapter = make_adapter(model, signal, **changes)
    for sae in adapter.saes.values():
        sae.double()
    parameters = {n: p for n, p in adapter.named_parameters() if p.requires_grad}
    logits = model(ids, attention_mask=mask).logits
    loss = loss_of(model, ids, mask)
    ours = torch.autograd.grad(loss, parameters.values())

    adapter.remove()
    stream = residual_streams(model, ids, mask, [1])[1]
    decided = slow_routing(adapter, stream)
    for name, layer in adapter.layers.items():
        index, path = name.split(":")
        parent_path, child = path.replace("/", ".").rsplit(".", 1)
        parent = model.model.layers[int(index)].get_submodule(parent_path)
        linear = getattr(parent, child)
        setattr(parent, child, SlowLinear(linear, layer, adapter.config, lambda: decided))
    torch.testing.assert_close(
        logits[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()], atol=1e-10, rtol=0
    )
    slow_loss = loss_of(model, ids, mask)
    slow = torch.autograd.grad(slow_loss, parameters.values())
    for name, a, b in zip(parameters, ours, slow, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0, msg=name)


def test_a_consistent_relabelling_of_latents_is_no_control(make_model, make_adapter, tokens):
    model = make_model(torch.float64)
    ids, mask = tokens([7, 5])
    adapter = make_adapter(model)
    sae, router = adapter.saes[1].double(), adapter.routers["1"]
    before = model(ids, attention_mask=mask).logits
    with adapter.intervention("permute_latents"):
        permuted = model(ids, attention_mask=mask).logits
    assert (permuted - before).abs().max() > 1e-3
    order = torch.randperm(sae.latents, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_enc[:, order].clone())
        sae.b_enc.copy_(sae.b_enc[order].clone())
        sae.W_dec.copy_(sae.W_dec[order].clone())
        router.weight.copy_(router.weight[order].clone())
    relabelled = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(relabelled, before, atol=1e-12, rtol=0)


# Caches, padding and batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("signal", SIGNALS)
def test_generation_equals_uncached_unpadded_one_by_one(
    make_model, make_adapter, tokens, signal, dtype
):
    model = make_model(dtype)
    make_adapter(model, signal)
    right, mask = tokens([3, 9, 6])
    prompts = [row[:length] for row, length in zip(right, mask.sum(1).tolist(), strict=True)]
    left = torch.stack([F.pad(p, (9 - len(p), 0)) for p in prompts])
    left_mask = torch.stack([F.pad(torch.ones_like(p), (9 - len(p), 0)) for p in prompts])
    batch = model.generate(
        left,
        attention_mask=left_mask,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    for row, prompt in enumerate(prompts):
        ids = prompt
        for step in range(6):
            logits = model(ids[None], use_cache=False).logits[0, -1]
            assert_close_in_float32(batch.logits[step][row], logits.float())
            ids = torch.cat([ids, logits.argmax().view(1)])
        assert ids[len(prompt) :].tolist() == batch.sequences[row, 9:].tolist()


@pytest.mark.parametrize("signal", ["dense", "sae"])
def test_a_cached_step_routes_its_own_token(make_model, make_adapter, tokens, signal):
    """The published code averages z over the prompt when lengths differ."""
    model = make_model()
    adapter = make_adapter(model, signal)
    ids, mask = tokens([8, 8])
    model(ids, attention_mask=mask)
    whole = adapter.routing()[1]
    cache = model(ids[:, :5], use_cache=True).past_key_values
    for position in range(5, 8):
        model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        step = adapter.routing()[1]
        assert step.gate.shape == (2, 1, 4)
        for ours, full in zip(step, whole, strict=True):
            torch.testing.assert_close(ours[:, 0], full[:, position], atol=1e-5, rtol=0)


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_batch_mate_and_padding_change_nothing(make_model, make_adapter, tokens, signal):
    model = make_model()
    make_adapter(model, signal)
    ids, mask = tokens([6, 9])
    alone = model(ids[:1, :6]).logits
    together = model(ids, attention_mask=mask).logits[:1, :6]
    filled = ids.clone()
    filled[0, 6:] = 17
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    with_other_padding = model(filled, attention_mask=mask).logits[:1, :6]
    torch.testing.assert_close(with_other_padding, alone, atol=1e-5, rtol=0)


# Training


@pytest.mark.parametrize("signal", SIGNALS)
def test_gradient_checkpointing_changes_nothing(make_model, make_adapter, tokens, signal):
    model = make_model(torch.float64)
    adapter = make_adapter(model, signal, sites=(0,))
    ids, mask = tokens([7, 5])
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    model.train()
    plain = loss_of(model, ids, mask)
    expected = torch.autograd.grad(plain, parameters)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ran = []
    handle = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    checkpointed = loss_of(model, ids, mask)
    found = torch.autograd.grad(checkpointed, parameters)
    handle.remove()
    assert len(ran) == 2, "the layer was not recomputed"
    torch.testing.assert_close(checkpointed, plain, atol=1e-12, rtol=0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("signal", ["dense", "sae"])
def test_routing_sends_no_gradient_into_the_stream(make_model, make_adapter, signal):
    """A later site would otherwise train the layers of an earlier one to please its router."""
    site = make_adapter(make_model(), signal, sites=(0, 2)).sites[2]
    stream = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert site.edit(stream) is stream
    assert torch.autograd.grad(site.found.scales[0].sum(), stream, allow_unused=True) == (None,)


def test_bfloat16_base_with_float32_sae(make_model, make_sae, tokens):
    model = make_model(torch.bfloat16)
    sae = make_sae()
    exact = {name: p.clone() for name, p in sae.named_parameters()}
    adapter = Adapter(model, RoutedLoRAConfig(sites=[1], rank=3), {1: sae}).attach(model)
    seen = []
    encode = sae.encode
    sae.encode = lambda x: seen.append(encode(x)) or seen[-1]
    ids, mask = tokens([7, 5])
    loss = loss_of(model, ids, mask)
    loss.backward()
    assert torch.isfinite(loss)
    assert seen[0].values.dtype == torch.float32
    assert adapter.sites[1].found.scales[0].dtype == torch.bfloat16
    assert all(p.grad is not None for p in adapter.layers.parameters())
    # A change of the adapter's type leaves the features alone.
    adapter.to(torch.bfloat16)
    assert all(torch.equal(p, exact[name]) for name, p in sae.named_parameters())


def test_saes_are_frozen_and_no_part_of_the_state(make_model, make_adapter):
    adapter = make_adapter(make_model())
    assert not any(p.requires_grad for p in adapter.saes[1].parameters())
    names = {name.split(".")[0] for name in adapter.state_dict()}
    assert names == {"active", "layers", "routers", "scales"}


# Several sites


def test_each_site_controls_the_layers_up_to_the_next(make_model, make_adapter, tokens):
    model = make_model()
    ids, mask = tokens([7, 5])
    adapter = make_adapter(model, sites=(0, 2))
    layers = [getattr(layer, "layer", layer) for layer in model.model.layers]
    owners = [layer.mlp.up_proj.source.site for layer in layers]
    assert owners == [0, 0, 2]
    assert set(adapter.routers) == {"0", "2"}

    def streams():
        return model(ids, attention_mask=mask, output_hidden_states=True).hidden_states

    before = streams()
    with torch.no_grad():
        adapter.routers["2"].bias[0] += 5
    after = streams()
    assert torch.equal(after[2], before[2])
    assert not torch.allclose(after[3], before[3])
    # The second site reads the stream as the first has left it.
    encoded = adapter.saes[2].encode(before[2])
    assert not torch.equal(encoded.values, adapter.saes[2].encode(before[0]).values)
    assert set(adapter.routing()) == {0, 2}


# Attaching and refusing


@pytest.mark.parametrize("signal", SIGNALS)
def test_remove_gives_back_the_same_modules_and_logits(make_model, make_adapter, tokens, signal):
    model = make_model()
    ids, mask = tokens([7, 5])
    modules = dict(model.named_modules())
    before = model(ids, attention_mask=mask).logits
    adapter = make_adapter(model, signal)
    assert not torch.allclose(model(ids, attention_mask=mask).logits, before)
    adapter.remove()
    after = dict(model.named_modules())
    assert list(after) == list(modules)
    assert all(after[name] is module for name, module in modules.items())
    assert "forward" not in vars(model.model)
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    with pytest.raises(ValueError, match="not attached"):
        adapter.remove()
    adapter.attach(model)
    assert not torch.allclose(model(ids, attention_mask=mask).logits, before)


def test_an_untrained_adapter_is_the_base(make_model, make_sae, tokens):
    model = make_model()
    ids, mask = tokens([7, 5])
    before = model(ids, attention_mask=mask).logits
    Adapter(model, RoutedLoRAConfig(sites=[1]), {1: make_sae()}).attach(model)
    assert torch.equal(model(ids, attention_mask=mask).logits, before)


def test_a_second_adapter_is_refused_and_leaves_the_first_trainable(make_model, make_adapter):
    model = make_model()
    first = make_adapter(model)
    for again in (lambda: first.attach(model), lambda: make_adapter(model)):
        with pytest.raises(ValueError, match="already carries an adapter"):
            again()
    assert all(p.requires_grad for p in first.layers.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": [3]}, r"sites \[3\].*layers 0 to 2"),
        ({"sites": [1, 3]}, r"sites \[1, 3\].*layers 0 to 2"),
        ({"sites": [-1]}, r"sites\[0\]=-1: must be a whole number from 0"),
        ({"sites": []}, r"sites=\[\]: must be a list of whole numbers"),
        ({"sites": [1, 2]}, r"no SAE for control site 2; SAEs are given for \[1\]"),
        ({"signal": "sparse"}, "method.signal=sparse: did you mean 'sae'"),
        ({"signal": "hidden"}, "method.signal=hidden: choose from dense, none, sae"),
        ({"router": "lineal"}, "method.router=lineal: did you mean 'linear'"),
        ({"target_modules": ["query"]}, "named query.*q_proj"),
        ({"target_modules": ["q_proj", "v_prj"]}, "named v_prj;.*v_proj"),
        ({"target_modules": []}, "with at least one item"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(make_model, make_sae, changes, message):
    with pytest.raises(ValueError, match=message):
        Adapter(make_model(), RoutedLoRAConfig(**({"sites": [1]} | changes)), {1: make_sae()})


def test_an_sae_of_another_width_is_refused(make_model, make_sae):
    with pytest.raises(ValueError, match="site 1 reads width 16, the model has 32"):
        Adapter(make_model(), RoutedLoRAConfig(sites=[1]), {1: make_sae(width=16)})


def test_dense_routing_ignores_saes(make_model, make_sae):
    config = RoutedLoRAConfig(signal="dense", sites=[1])
    adapter = Adapter(make_model(), config, {1: make_sae()})
    assert adapter.routers["1"].weight.shape[0] == 32
    assert not adapter.saes


def test_parameters_of_the_three_methods_are_equal_within_five_percent(make_model):
    from steerlora.saes.topk import TopK

    counts = {}
    for signal, dynamic in (("none", False), ("dense", False), ("sae", True)):
        model = make_model(
            hidden_size=128, intermediate_size=384, num_hidden_layers=4, head_dim=32, vocab_size=239
        )
        config = RoutedLoRAConfig(signal=signal, sites=[1], dynamic_rank=dynamic)
        adapter = Adapter(model, config, {1: TopK(128, 512, k=16)})
        counts[signal] = adapter.parameter_count()
    assert counts["none"] == 3 * 64 * (2 * 256 + 2 * 192 + 3 * 512)
    assert max(counts.values()) / min(counts.values()) < 1.05, counts


def test_attention_masks_may_be_passed_by_position(make_model, make_adapter, tokens):
    model = make_model()
    adapter = make_adapter(model)
    ids, mask = tokens([7, 5])
    model.model(ids, mask)
    assert torch.equal(adapter.tokens_with_signal(torch.zeros(2, 7, 32)), mask.bool())
    assert torch.equal(adapter.tokens_with_signal(torch.zeros(2, 1, 32)), mask.bool()[:, -1:])
    model.model(ids)
    assert adapter.tokens_with_signal(torch.zeros(2, 7, 32)).all()
