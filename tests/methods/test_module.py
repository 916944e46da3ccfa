"""A method in training: losses over real tokens, with gradients; exact resume."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.features import taxonomy
from helpers.training import StopAt, Stopped, method_module, train
from lightning.pytorch.callbacks import Callback

from steerlora.config import TrainerConfig
from steerlora.data.batches import ChatBatch, ChatBatches
from steerlora.data.chat import EncodedChat
from steerlora.methods.base import Task
from steerlora.methods.config import OptimizerConfig
from steerlora.methods.module import MethodModule
from steerlora.methods.monitor import Monitor
from steerlora.training.language import next_token_loss

ROUTING = {"gate_sparsity": 0.5, "rank_budget": 0.25, "load_balance": 2.0}
WEIGHTS = {"diversity": 0.125, "orthogonality": 0.0625}
FEATURES = {"preservation": 3.0, "steering": 5.0}
ALL_ON = ROUTING | WEIGHTS | FEATURES
SETTINGS = TrainerConfig(max_steps=6, batch_size=4, learning_rate=1e-2, checkpoint_seconds=1e-9)


def batches() -> ChatBatches:
    """Two domains: b follows a in one, c follows a in the other, told apart by the first token."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(40):
        length = int(torch.randint(3, 9, (1,), generator=generator))
        filler = torch.randint(10, 60, (length,), generator=generator).tolist()
        rows.append(EncodedChat([1 + index % 2, *filler, 5, 6 + index % 2], length + 2))
    owners = [index % 2 for index in range(40)]
    return ChatBatches(rows, owners, batch_size=4, pad_token_id=0, seed=0)


@pytest.fixture
def make_module(make_model, make_adapter, make_sae):
    """``make_module(signal="sae", steps=6, shape={}, **losses)``; domain 1 in training."""

    def make(signal="sae", steps=6, shape=None, **losses) -> MethodModule:
        model = make_model()
        adapter = make_adapter(model, signal, **{"dynamic_rank": signal == "sae", **(shape or {})})
        return method_module(
            model,
            adapter,
            trainer=SETTINGS,
            steps=steps,
            monitor=Monitor(model, adapter, make_sae(seed=7), 3, taxonomy()),
            in_training=Task({"math": []}, 1),
            **losses,
        )

    return make


def forward(made: MethodModule, batch: ChatBatch) -> dict[str, tuple[float, torch.Tensor]]:
    learner = made.learner
    with learner.monitor.recording() if learner.config.compares_with_base else nullcontext():
        next_token_loss(made.model, batch)
    return learner.auxiliary(batch)


@pytest.mark.parametrize("name", ALL_ON)
def test_every_auxiliary_loss_reaches_what_it_should_train(make_module, name):
    """The published code computes them on detached gates, without gradient."""
    made = make_module(**ALL_ON)
    weight, value = forward(made, batches()(0))[name]
    assert weight == ALL_ON[name]
    value.backward()
    router = made.method.routers["1"].weight.grad
    layers = [p.grad for p in made.method.layers.parameters()]
    if name in ROUTING:
        part = router[:, 4:] if name == "rank_budget" else router[:, :4]
        assert part.abs().sum() > 0
        assert all(grad is None for grad in layers)
    elif name == "orthogonality":
        assert router is None
        for layer in made.method.layers.values():
            own = layer.A.grad.view(4, 3, -1).abs().sum((1, 2)) > 0
            assert own.tolist() == [False, True, False, False]
            assert layer.B.grad is None
    else:
        assert (router is None) == (name == "diversity")
        assert all(grad.abs().sum() > 0 for grad in layers)


@pytest.mark.parametrize("name", ALL_ON)
def test_a_loss_alone_falls_when_it_trains(make_module, name, tmp_path):
    """Through the whole training: the weight's sign, the optimizer and the schedule."""
    made = make_module(steps=25, task=0.0, **{name: 10.0})
    before = forward(made, batches()(0))[name][1].item()
    train(made, batches(), tmp_path, 25, checkpoint_seconds=1000.0)
    assert forward(made, batches()(0))[name][1].item() < 0.9 * before


def test_routers_of_every_module_are_trained(make_module):
    made = make_module(shape={"per_module": True}, **ROUTING)
    terms = forward(made, batches()(0))
    assert set(terms) == set(ROUTING)
    sum(value for _, value in terms.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in made.method.routers.parameters())


def test_only_active_specialists_are_balanced(make_module):
    made = make_module(shape={"active": 2}, load_balance=1.0)
    batch = batches()(0)
    found = forward(made, batch)["load_balance"][1]
    usage = made.method.sites[1].routing.gate[batch.attention_mask.bool()].mean(0)
    assert usage[2:].abs().sum() == 0
    torch.testing.assert_close(found, (usage[:2] - 0.5).square().sum())


def test_no_statistic_counts_padding(make_module):
    made = make_module(**ALL_ON)
    batch = batches()(0)
    before = {name: value.item() for name, (_, value) in forward(made, batch).items()}
    assert set(before) == set(ALL_ON)
    pad = torch.zeros(len(batch.input_ids), 7, dtype=torch.long)
    wider = replace(
        batch,
        input_ids=torch.cat([batch.input_ids, pad + 33], 1),
        attention_mask=torch.cat([batch.attention_mask, pad], 1),
        labels=torch.cat([batch.labels, pad - 100], 1),
    )
    after = {name: value.item() for name, (_, value) in forward(made, wider).items()}
    assert after == pytest.approx(before, abs=1e-6)
    counted = make_module(**ROUTING)
    forward(counted, wider)
    everything = replace(wider, attention_mask=torch.ones_like(wider.attention_mask))
    everywhere = counted.learner.auxiliary(everything)
    assert abs(everywhere["gate_sparsity"][1].item() - before["gate_sparsity"]) > 1e-4


def test_switched_off_and_meaningless_losses_are_absent(make_module):
    assert forward(make_module(), batches()(0)) == {}
    plain = make_module("none", **ALL_ON)
    assert set(forward(plain, batches()(0))) == {*FEATURES, "orthogonality"}
    for position in (0, None):  # no earlier domain, and no sequence
        plain.learner.training(Task({"law": []}, position))
        assert set(forward(plain, batches()(0))) == set(FEATURES)
    dense = make_module("dense", **ROUTING, diversity=1.0)
    assert set(forward(dense, batches()(0))) == {"gate_sparsity", "load_balance", "diversity"}


def test_losses_at_zero_weight_cost_nothing(make_module, monkeypatch):
    """No monitor, no features of it, and no base pass where only steering is on."""

    def refuse(*_):
        raise AssertionError("computed for nothing")

    batch = batches()(0)
    monkeypatch.setattr(Monitor, "base_features", refuse)
    assert set(forward(make_module(steering=1.0), batch)) == {"steering"}
    monkeypatch.setattr(Monitor, "features", refuse)
    monkeypatch.setattr(Monitor, "recording", refuse)
    assert set(forward(make_module(**ROUTING), batch)) == set(ROUTING)


def test_losses_on_features_need_a_monitor(make_module):
    made = make_module()
    for name in FEATURES:
        with pytest.raises(ValueError, match="give a monitor"):
            method_module(made.model, made.method, trainer=SETTINGS, steps=1, **{name: 1.0})


def test_steering_goes_by_each_row_s_domain(make_module):
    made = make_module(steering=1.0)
    batch = batches()(0)
    found = forward(made, batch)["steering"][1]
    monitor, real = made.learner.monitor, batch.attention_mask.bool()
    features = monitor.features()
    owners = [int(batch.domains[row]) for row, _ in real.nonzero().tolist()]
    dense = torch.zeros(len(owners), 64).scatter_add(1, features.indices, features.values)
    gap = (dense - monitor.prototypes[owners]) * monitor.domain[owners]
    torch.testing.assert_close(found, gap.square().mean())


def test_the_loss_is_the_weighted_sum(make_module, monkeypatch):
    made = make_module(task=0.5, **ALL_ON)
    batch = batches()(0)
    logged = {}
    made._trainer = SimpleNamespace(global_step=0, log_every_n_steps=1)
    monkeypatch.setattr(made, "log", lambda name, value, **_: logged.update({name: value}))
    monkeypatch.setattr(made, "log_dict", lambda values, **_: logged.update(values))
    loss = made.training_step(batch, 0)
    expected = 0.5 * next_token_loss(made.model, batch).item()
    expected += sum(w * value.item() for w, value in made.learner.auxiliary(batch).values())
    assert loss.item() == pytest.approx(expected)
    assert set(logged) == {"train/loss", "train/task", *(f"train/{name}" for name in ALL_ON)}
    made._trainer.log_every_n_steps, logged = 10, {}  # of the next ten steps the last one
    made.training_step(batch, 0)
    assert set(logged) == {"train/loss"}


@pytest.mark.parametrize("signal", ["none", "dense", "sae"])
def test_training_moves_the_adapter_and_nothing_else(make_module, tmp_path, signal):
    weights = {} if signal == "none" else {"load_balance": 0.01}
    made = make_module(signal, steps=40, **weights)
    frozen = {n: p.clone() for n, p in made.model.named_parameters() if ".low_rank." not in n}
    saes = {n: p.clone() for s in made.method.saes.values() for n, p in s.named_parameters()}
    start = {n: p.clone() for n, p in made.method.named_parameters()}
    first = next_token_loss(made.model, batches()(0)).item()
    train(made, batches(), tmp_path, 40, checkpoint_seconds=1000.0)
    assert next_token_loss(made.model, batches()(0)).item() < 0.7 * first
    parameters = dict(made.model.named_parameters())
    assert all(torch.equal(parameters[n], p) for n, p in frozen.items())
    for sae in made.method.saes.values():
        assert all(torch.equal(p, saes[n]) for n, p in sae.named_parameters())
    for name, parameter in made.method.named_parameters():
        assert torch.equal(parameter, start[name]) == name.startswith("scales."), name


def test_resumed_adapters_are_bit_equal(make_module, tmp_path):
    unbroken = make_module(**ALL_ON)
    train(unbroken, batches(), tmp_path / "a", 6)
    with pytest.raises(Stopped):
        train(make_module(**ALL_ON), batches(), tmp_path / "b", 6, [StopAt(3)])
    resumed = make_module(**ALL_ON)
    with torch.no_grad():  # what a new process builds does not matter
        resumed.method.layers["1:mlp/up_proj"].A.zero_()
    train(resumed, batches(), tmp_path / "b", 6)
    for name, weight in unbroken.method.state_dict().items():
        assert torch.equal(weight, resumed.method.state_dict()[name]), name


def test_lightning_mixed_precision_runs(make_module, tmp_path):
    made = make_module(**ALL_ON)
    train(made, batches(), tmp_path, 6, precision="bf16-mixed")
    assert all(p.isfinite().all() for p in made.method.parameters())


def published_optimizer(over_domains: bool = True) -> dict:
    return {"optimizer": OptimizerConfig(constant_rate=True, over_domains=over_domains)}


class Rates(Callback):
    """The learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer, *_) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("constant", [True, False])
def test_the_rate_may_be_constant(make_module, tmp_path, constant):
    made = make_module(shape={"optimizer": OptimizerConfig(constant_rate=constant)})
    rates = Rates()
    train(made, batches(), tmp_path, 6, [rates])
    assert (set(rates.seen) == {SETTINGS.learning_rate}) == constant


def test_one_optimizer_through_two_domains_is_one_training(make_module, tmp_path):
    """At a constant rate two trainings, the second after the first, equal one of their length."""
    whole, parted = (make_module(shape=published_optimizer()) for _ in range(2))
    train(whole, batches(), tmp_path / "whole", 6)
    train(parted, batches(), tmp_path / "first", 3)
    second = MethodModule(parted.learner, trainer=SETTINGS, total_steps=3)
    train(second, lambda step: batches()(3 + step), tmp_path / "second", 3)
    for name, weight in whole.method.state_dict().items():
        assert torch.equal(weight, parted.method.state_dict()[name]), name
    fresh = make_module(shape=published_optimizer(over_domains=False))
    train(fresh, batches(), tmp_path / "third", 3)
    assert fresh.learner.optimizer == {}


def test_a_domain_that_resumes_has_the_optimizer_of_the_one_before(make_module, tmp_path):
    def second(folder: str, *callbacks: Callback) -> dict[str, torch.Tensor]:
        made = make_module(shape=published_optimizer())
        train(made, batches(), tmp_path / folder / "first", 3)
        then = MethodModule(made.learner, trainer=SETTINGS, total_steps=3)
        try:
            train(then, batches(), tmp_path / folder / "second", 3, callbacks)
        except Stopped:
            return second(folder)
        return made.method.state_dict()

    unbroken, broken = second("a"), second("b", StopAt(2))
    for name, weight in unbroken.items():
        assert torch.equal(weight, broken[name]), name
