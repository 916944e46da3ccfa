"""The update against a loop over tokens and units, in both of its ways."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from steerlora.methods.stan import units
from steerlora.methods.stan.config import StanConfig
from steerlora.methods.stan.forward import StanForward
from steerlora.methods.stan.gates import most_active, threshold_for
from steerlora.methods.stan.units import StanLinear, Units

M, K, D_IN, D_OUT = 12, 4, 10, 7


def known(gate: str = "token", *, disabled: bool = False) -> SimpleNamespace:
    """What a layer knows of a forward, in which the last two tokens are padding."""
    state = StanForward(gate=gate)
    return SimpleNamespace(
        name="layer",
        disabled=disabled,
        state=state,
        real=lambda x: torch.arange(x[..., 0].numel()) < x[..., 0].numel() - 2,
        generator=lambda device: torch.Generator().manual_seed(3),
    )


WAYS = pytest.mark.parametrize("gathers", [False, True])
SELECTS = pytest.mark.parametrize("select", ["value", "absolute"])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def config(select: str = "value", **changes) -> StanConfig:
    return StanConfig(**({"units": M, "k": K, "select": select} | changes))


def layer(
    select: str = "value", *, gathers: bool = False, bias: bool = True, gate: str = "token"
) -> StanLinear:
    chosen = config(select, gate=gate)
    own = Units(D_IN, D_OUT, chosen, torch.Generator().manual_seed(2)).double()
    own.encoder.data, own.decoder.data = random(M, D_IN, seed=4), random(M, D_OUT, seed=5)
    base = nn.Linear(D_IN, D_OUT, bias=bias).double().requires_grad_(False)
    made = StanLinear(base, own, known(gate), chosen)
    made.gathers = lambda x: gathers
    return made


def slow(made: StanLinear, x: torch.Tensor) -> torch.Tensor:
    """One token and one unit at a time."""
    E, D = made.units.encoder, made.units.decoder
    rows = []
    for token in x.reshape(-1, D_IN):
        y = made.base(token)
        scores = (E.detach() @ token.detach()).tolist()
        sizes = scores if made.config.select == "value" else [abs(score) for score in scores]
        for unit in sorted(range(M), key=sizes.__getitem__, reverse=True)[:K]:
            if made.config.select == "absolute" or scores[unit] > 0:
                y = y + 0.25 * (E[unit] @ token) * D[unit]
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], D_OUT)


@WAYS
@SELECTS
@pytest.mark.parametrize("bias", [True, False])
def test_update_and_every_gradient_equal_the_loop(select, gathers, bias):
    made = layer(select, gathers=gathers, bias=bias)
    x = random(5, 2, D_IN, seed=1).transpose(0, 1).requires_grad_()
    weight = random(2, 5, D_OUT, seed=3)
    found, expected = made(x), slow(made, x)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    inputs = [x, made.units.encoder, made.units.decoder]
    ours = torch.autograd.grad((found * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@WAYS
@SELECTS
def test_gradients_are_those_of_finite_differences(select, gathers):
    made = layer(select, gathers=gathers)
    x = random(3, D_IN, seed=1).requires_grad_()
    E, D = made.units.encoder, made.units.decoder
    assert torch.autograd.gradcheck(lambda *_: made(x), (x, E, D))


@WAYS
def test_it_starts_as_the_base_layer_and_is_it_while_disabled(gathers):
    made = layer(gathers=gathers)
    x = random(2, 5, D_IN)
    assert not torch.equal(made(x), made.base(x))
    made.known = known(disabled=True)
    assert torch.equal(made(x), made.base(x))
    made.known, made.units = known(), Units(D_IN, D_OUT, config()).double()
    assert torch.equal(made(x), made.base(x))


def test_with_every_unit_of_either_sign_it_is_lora_of_rank_m():
    made = layer("absolute")
    made.config = config("absolute", k=M, scale="alpha/k", alpha=6)
    x = random(5, D_IN, seed=1)
    lora = made.base(x) + 0.5 * x @ made.units.encoder.t() @ made.units.decoder
    torch.testing.assert_close(made(x), lora, atol=1e-10, rtol=0)


def test_fan_in_is_the_input_width():
    many = config(units=64)
    encoder = Units(400, 8, many, torch.Generator().manual_seed(0)).encoder
    one = torch.empty(64, 400)
    nn.init.kaiming_uniform_(one, a=5**0.5, generator=torch.Generator().manual_seed(1))
    assert encoder.abs().max() <= 1 / 400**0.5
    assert encoder.std().item() == pytest.approx(one.std().item(), rel=0.02)


@WAYS
@SELECTS
def test_types_of_the_base_are_kept(select, gathers):
    made = layer(select, gathers=gathers)
    made.base.to(torch.bfloat16)
    made.units.float()
    out = made(torch.randn(2, 5, D_IN, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert made.units.encoder.grad.dtype == made.units.decoder.grad.dtype == torch.float32
    made.base.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert made(torch.randn(2, 5, D_IN)).dtype == torch.bfloat16


def test_the_cheaper_way_is_chosen_by_size(monkeypatch):
    made, x = layer(), random(64, D_IN)
    del made.gathers  # the class's own
    ways = {}
    for count in (8, 64):
        for k in (1, 4):
            made.config = config(units=count, k=k)
            made.units = Units(D_IN, D_OUT, made.config).double()
            ways[count, k] = made.gathers(x)
    assert ways == {(8, 1): False, (8, 4): False, (64, 1): True, (64, 4): False}
    made.config = config(units=64, k=1)
    assert not made.gathers(x[:63])  # as in cached decoding
    made.known.state.off = {"layer": torch.tensor([1])}
    assert not made.gathers(x)  # which units act is not known by numbers alone
    made.known.state.off = {}
    monkeypatch.setitem(units.GATHERED_FROM, "cpu", 100)
    assert not made.gathers(x)


def code(made: StanLinear, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return made._gated_code(x, x.reshape(-1, D_IN))


@SELECTS
def test_a_static_gate_has_the_same_k_units_for_every_token(select):
    made, x = layer(select, gate="static"), random(30, D_IN, seed=1)
    assert made.units.kept.sum() == K
    outputs = x @ made.units.encoder.t()
    outputs = outputs.relu() if select == "value" else outputs
    torch.testing.assert_close(code(made, x), outputs * made.units.kept)


def test_a_chosen_gate_is_the_tokens_own_until_it_chooses():
    made, x = layer(gate="chosen"), random(30, D_IN, seed=1)
    own = code(layer(), x)
    assert torch.equal(code(made, x), own)
    made(x)  # with a gradient, as in training: the last two tokens are padding
    assert made.known.state.noted["layer"].equal((own[:-2] != 0).sum(0))
    made.units.kept.copy_(most_active(torch.arange(M).float(), K))
    assert made.units.kept.nonzero().flatten().tolist() == [8, 9, 10, 11]
    assert (code(made, x)[:, :8] == 0).all()


def test_a_threshold_lets_k_units_act_on_the_mean_token():
    made, x = layer(gate="threshold"), random(30, D_IN, seed=1)
    assert (code(made, x)[:-2] != 0).sum(-1).double().mean() > K
    made(x)
    made.units.threshold.copy_(made.known.state.noted["layer"])
    count = (code(made, x)[:-2] != 0).sum()
    assert K * 28 - 1 <= count <= K * 28  # the least of them is the threshold itself
    scores = x @ made.units.encoder.t()
    torch.testing.assert_close(code(made, x), (scores - made.units.threshold).relu())
    assert threshold_for(scores, torch.zeros(30, dtype=torch.bool), K).equal(torch.zeros(1))


@SELECTS
@pytest.mark.parametrize("gate", ["random", "shuffled"])
def test_redrawn_units_have_the_norm_of_the_tokens_own(gate, select):
    made, x = layer(select, gate=gate), random(30, D_IN, seed=1)
    own, found = code(layer(select), x), code(made, x)
    assert torch.equal(found, code(made, x))  # the same where a layer is computed again
    assert torch.equal(found[-2:], own[-2:])  # padding
    assert not torch.equal(found[:-2] != 0, own[:-2] != 0)
    acting = found.norm(dim=-1) > 0
    torch.testing.assert_close(found.norm(dim=-1)[acting], own.norm(dim=-1)[acting])
    outputs = x @ made.units.encoder.t()
    outputs = outputs.relu() if select == "value" else outputs
    ratio = found / outputs
    for row, kept in zip(ratio[:-2], (found != 0)[:-2], strict=True):
        torch.testing.assert_close(row[kept], row[kept][:1].expand(int(kept.sum())))
    if gate == "shuffled" and select == "absolute":
        sets = sorted(map(tuple, (own[:-2] != 0).tolist()))
        assert sorted(map(tuple, (found[:-2] != 0).tolist())) == sets


def test_redrawn_codes_have_a_gradient():
    made, x = layer("absolute", gate="random"), random(6, D_IN, seed=1)
    made(x).sum().backward()
    assert made.units.encoder.grad.abs().sum() > 0
    assert made.units.decoder.grad.abs().sum() > 0


def test_units_that_are_switched_off_never_act():
    made, x = layer(), random(30, D_IN, seed=1)
    own = code(made, x)
    made.known.state.off, made.known.state.active = {"layer": torch.tensor([0, 5])}, {}
    found = code(made, x)
    assert (found[:, [0, 5]] == 0).all()
    rest = [unit for unit in range(M) if unit not in (0, 5)]
    assert torch.equal(found[:, rest], own[:, rest])
    assert torch.equal(made.known.state.active["layer"], found != 0)


def test_a_frozen_encoder_is_no_parameter():
    frozen = Units(D_IN, D_OUT, config(encoder="frozen"))
    assert list(dict(frozen.named_parameters())) == ["decoder"]
    assert set(frozen.state_dict()) == {"encoder", "decoder"}
