"""Adapter training: losses over real tokens, with gradients; checkpoints of the adapter alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steerlora.config import AdapterConfig, TrainerConfig
from steerlora.data.chat import ChatBatch, ChatBatches, EncodedChat
from steerlora.progress import SilentProgress
from steerlora.training.adapter import AdapterModule
from steerlora.training.language import next_token_loss
from steerlora.training.loop import fit

ALL_ON = {"gate_sparsity": 0.5, "rank_budget": 0.25, "load_balance": 2.0, "diversity": 0.125}
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


def module(make_model, make_adapter, routing="sae", steps=6, **weights) -> AdapterModule:
    model = make_model()
    adapter = make_adapter(model, routing, dynamic_rank=routing == "sae")
    config = AdapterConfig(routing=routing, rank=3, dynamic_rank=routing == "sae", **weights)
    return AdapterModule(model, adapter, config=config, trainer=SETTINGS, total_steps=steps)


def forward(made: AdapterModule, batch: ChatBatch):
    next_token_loss(made.model, batch)
    return made.auxiliary(batch.attention_mask.bool())


@pytest.mark.parametrize("name", ALL_ON)
def test_every_auxiliary_loss_reaches_what_it_should_train(make_model, make_adapter, name):
    """The published code computes them on detached gates, without gradient."""
    made = module(make_model, make_adapter, **ALL_ON)
    weight, value = forward(made, batches()(0))[name]
    assert weight == ALL_ON[name]
    value.backward()
    router = made.adapter.routers["1"].weight.grad
    if name == "diversity":
        assert router is None
        assert all(p.grad.abs().sum() > 0 for p in made.adapter.layers.parameters())
    else:
        part = router[:, 4:] if name == "rank_budget" else router[:, :4]
        assert part.abs().sum() > 0
        assert all(p.grad is None for p in made.adapter.layers.parameters())


def test_no_statistic_counts_padding(make_model, make_adapter):
    made = module(make_model, make_adapter, **ALL_ON)
    batch = batches()(0)
    before = {name: value.item() for name, (_, value) in forward(made, batch).items()}
    pad = torch.zeros(len(batch.input_ids), 7, dtype=torch.long)
    wider = replace(
        batch,
        input_ids=torch.cat([batch.input_ids, pad + 33], 1),
        attention_mask=torch.cat([batch.attention_mask, pad], 1),
        labels=torch.cat([batch.labels, pad - 100], 1),
    )
    after = {name: value.item() for name, (_, value) in forward(made, wider).items()}
    assert after == pytest.approx(before, abs=1e-6)
    everywhere = made.auxiliary(torch.ones_like(wider.input_ids, dtype=torch.bool))
    assert abs(everywhere["gate_sparsity"][1].item() - before["gate_sparsity"]) > 1e-4


def test_switched_off_and_meaningless_losses_are_absent(make_model, make_adapter):
    assert forward(module(make_model, make_adapter), batches()(0)) == {}
    plain = module(make_model, make_adapter, "none", **ALL_ON)
    assert forward(plain, batches()(0)) == {}
    dense = module(make_model, make_adapter, "dense", **ALL_ON)
    assert set(forward(dense, batches()(0))) == {"gate_sparsity", "load_balance", "diversity"}


def test_the_loss_is_the_weighted_sum(make_model, make_adapter, monkeypatch):
    made = module(make_model, make_adapter, **ALL_ON)
    batch = batches()(0)
    logged = {}
    monkeypatch.setattr(made, "log", lambda name, value: logged.update({name: value}))
    monkeypatch.setattr(made, "log_dict", lambda values: logged.update(values))
    loss = made.training_step(batch, 0)
    expected = next_token_loss(made.model, batch).item()
    expected += sum(
        w * value.item() for w, value in made.auxiliary(batch.attention_mask.bool()).values()
    )
    assert loss.item() == pytest.approx(expected)
    assert set(logged) == {"train/loss", "train/task", *(f"train/{name}" for name in ALL_ON)}


def run(made: AdapterModule, directory: Path, **changes) -> dict:
    settings = replace(SETTINGS, **changes)
    return fit(
        made,
        batches(),
        settings.max_steps,
        trainer=settings,
        checkpoints=directory,
        progress=SilentProgress(),
        description="test",
    )


def test_checkpoints_hold_the_adapter_only(make_model, make_adapter, tmp_path):
    made = module(make_model, make_adapter, **ALL_ON)
    run(made, tmp_path)
    newest = sorted(tmp_path.glob("*.ckpt"))[-1]
    checkpoint = torch.load(newest, weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"adapter.{n}" for n in made.adapter.state_dict()}
    # Weights and AdamW's two moments, in float32, and little else.
    trained = 4 * made.adapter.parameter_count()
    assert newest.stat().st_size < 3 * trained + 100_000


@pytest.mark.parametrize("routing", ["none", "dense", "sae"])
def test_training_moves_the_adapter_and_nothing_else(make_model, make_adapter, tmp_path, routing):
    weights = {} if routing == "none" else {"load_balance": 0.01}
    made = module(make_model, make_adapter, routing, steps=40, **weights)
    frozen = {n: p.clone() for n, p in made.model.named_parameters() if ".low_rank." not in n}
    saes = {n: p.clone() for s in made.adapter.saes.values() for n, p in s.named_parameters()}
    start = {n: p.clone() for n, p in made.adapter.named_parameters()}
    first = next_token_loss(made.model, batches()(0)).item()
    run(made, tmp_path, max_steps=40, checkpoint_seconds=1000.0)
    assert next_token_loss(made.model, batches()(0)).item() < 0.7 * first
    parameters = dict(made.model.named_parameters())
    assert all(torch.equal(parameters[n], p) for n, p in frozen.items())
    for sae in made.adapter.saes.values():
        assert all(torch.equal(p, saes[n]) for n, p in sae.named_parameters())
    for name, parameter in made.adapter.named_parameters():
        assert torch.equal(parameter, start[name]) == name.startswith("scales."), name


def test_resumed_adapters_are_bit_equal(make_model, make_adapter, tmp_path):
    unbroken = module(make_model, make_adapter, **ALL_ON)
    run(unbroken, tmp_path / "a")

    broken = module(make_model, make_adapter, **ALL_ON)
    broken.on_train_batch_start = _stop_at(3)
    with pytest.raises(_Stopped):
        run(broken, tmp_path / "b")
    resumed = module(make_model, make_adapter, **ALL_ON)
    with torch.no_grad():  # what a new process builds does not matter
        resumed.adapter.layers["1:mlp/up_proj"].A.zero_()
    run(resumed, tmp_path / "b")
    for name, weight in unbroken.adapter.state_dict().items():
        assert torch.equal(weight, resumed.adapter.state_dict()[name]), name


class _Stopped(Exception):
    pass


def _stop_at(step: int):
    def stop(batch, index):
        if index == step:
            raise _Stopped

    return stop


def test_lightning_mixed_precision_runs(make_model, make_adapter, tmp_path):
    made = module(make_model, make_adapter, **ALL_ON)
    run(made, tmp_path, precision="bf16-mixed")
    assert all(p.isfinite().all() for p in made.adapter.parameters())
