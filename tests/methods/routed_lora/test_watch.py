"""The watch on routing: what it measures, that it survives a resume, and what collapse does."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn

from steerlora.data.batches import ChatBatch, ChatBatches
from steerlora.data.chat import EncodedChat
from steerlora.errors import UserError
from steerlora.methods.routed_lora.config import HealthConfig, RoutedLoRAConfig
from steerlora.methods.routed_lora.health import RoutingHealth
from steerlora.methods.routed_lora.prototypes import PrototypeRouter
from steerlora.methods.routed_lora.routing import Routing
from steerlora.methods.routed_lora.watch import RoutingWatch
from steerlora.training.language import next_token_loss
from steerlora.training.loop import StepBatches

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")
NAMES = ["a", "b"]
MEASURED = {
    "usage_entropy",
    "token_entropy",
    "load_cv2",
    "dead_specialists",
    "max_load",
    "mean_rank",
}


class Training(L.LightningModule):
    """The task's loss alone; what is logged is kept."""

    def __init__(self, model, adapter) -> None:
        super().__init__()
        self.model, self.adapter, self.logged = model, adapter, []

    def training_step(self, batch, index):
        return next_token_loss(self.model, batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.adapter.parameters(), lr=1e-2)

    def log_dict(self, values, **kwargs):
        self.logged.append(values)


def batches() -> ChatBatches:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(24):
        filler = torch.randint(10, 60, (3 + index % 8,), generator=generator).tolist()
        rows.append(EncodedChat([1 + index % 2, *filler, 5], len(filler)))
    return ChatBatches(rows, [i % 2 for i in range(24)], batch_size=5, pad_token_id=0, seed=0)


def train(make_model, make_adapter, watch_of, *, steps=6, first=0, checkpoint=None, **shape):
    """Train from step ``first``; the module, the watch and the trainer."""
    model = make_model()
    module = Training(model, make_adapter(model, **shape))
    watch = watch_of(module.adapter)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    source = StepBatches(batches(), steps, lambda: first)
    trainer.fit(module, source, ckpt_path=checkpoint, weights_only=True)
    return module, watch, trainer


def watch_with(log_every=2, collapse="ignore", collapse_below=0.3):
    config = HealthConfig(log_every=log_every, collapse=collapse, collapse_below=collapse_below)
    return lambda adapter: RoutingWatch(adapter, NAMES, batches()(7), config)


@pytest.mark.parametrize("shape", [{}, {"per_module": True}, {"signal": "dense"}, {"active": 2}])
def test_history_holds_the_health_of_the_real_tokens(make_model, make_adapter, shape):
    module, watch, _ = train(make_model, make_adapter, watch_with(), **shape)
    assert [entry["step"] for entry in watch.history] == [2, 4, 6]
    assert all(set(entry) == MEASURED | {"step"} for entry in watch.history)
    assert module.logged == [
        {f"routing/{name}": entry[name] for name in MEASURED} for entry in watch.history
    ]
    # The last step's routing is still there: measured by hand, over real tokens alone.
    batch, routing = batches()(7), module.adapter.sites[1].routing
    real = batch.attention_mask.bool()
    assert not real.all()
    gates, ranks = routing.gate[real].detach(), routing.mask[real].detach().sum(-1)
    if shape.get("per_module"):
        gates, ranks = gates.mean(1), ranks.mean(1)
    usage = gates.double().mean(0)[: shape.get("active", 4)]
    entropy = -(usage * usage.log()).sum() / torch.log(torch.tensor(float(len(usage))))
    assert watch.history[-1]["usage_entropy"] == pytest.approx(entropy.item(), abs=1e-6)
    assert watch.history[-1]["mean_rank"] == pytest.approx(ranks.mean().item(), abs=1e-5)


def test_history_survives_a_resume(make_model, make_adapter, tmp_path):
    _, unbroken, _ = train(make_model, make_adapter, watch_with())
    _, watch, trainer = train(make_model, make_adapter, watch_with(), steps=3)
    assert [entry["step"] for entry in watch.history] == [2]
    trainer.save_checkpoint(tmp_path / "step.ckpt")
    _, resumed, _ = train(
        make_model, make_adapter, watch_with(), first=3, checkpoint=tmp_path / "step.ckpt"
    )
    assert resumed.history == unbroken.history


def test_no_router_no_history(make_model, make_adapter):
    module, watch, _ = train(make_model, make_adapter, watch_with(), signal="none")
    assert watch.history == []
    assert module.logged == []


class Still(nn.Module):
    """A model whose forward changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.config = nn.ModuleList(), SimpleNamespace(num_hidden_layers=0)

    def forward(self, **inputs) -> None:
        pass


def still(gate, *, active=None, known=None, collapse="warn", below=0.3):
    """A watch on an adapter whose routing [B, S, E] stands still; one call is one step."""
    specialists = gate.shape[-1]
    available = torch.ones(specialists, dtype=torch.bool) if active is None else active
    config = RoutedLoRAConfig(router="prototype", specialists=specialists, dynamic_rank=False)
    if known is not None:
        router = PrototypeRouter(3, config)
        router.known[known] = True
        available = router.available()
    adapter = SimpleNamespace(
        sites={1: SimpleNamespace(routing=Routing(gate, torch.ones(*gate.shape[:2], 3)))},
        available=lambda: available,
        config=config,
        unchanged=nullcontext,
        with_signal=lambda batch: batch.attention_mask.bool(),
    )
    ones = torch.ones(gate.shape[:2], dtype=torch.long)
    probe = ChatBatch(ones, ones, ones, torch.tensor([0, -1]), ones.numel())
    when = HealthConfig(log_every=10, collapse=collapse, collapse_below=below)
    watch = RoutingWatch(adapter, NAMES, probe, when)
    module = SimpleNamespace(log_dict=lambda values: None, model=Still(), device="cpu")

    def end_step(step):
        watch.on_train_batch_end(SimpleNamespace(global_step=step), module, None, None, 0)

    return watch, end_step


def gates(*row):
    return torch.tensor(row).expand(2, 5, -1).clone()


def test_collapse_warns_once_a_run(caplog):
    watch, end_step = still(gates(0.98, 0.02))
    with caplog.at_level(logging.WARNING):
        for step in (5, 10, 20):
            end_step(step)
    assert [entry["step"] for entry in watch.history] == [10, 20]
    (record,) = caplog.records
    for part in (
        "step 10",
        "0.141",
        "method.health.collapse_below=0.3",
        "method.losses.load_balance",
    ):
        assert part in record.getMessage()
    resumed, end_step = still(gates(0.98, 0.02))
    resumed.load_state_dict(watch.state_dict())
    with caplog.at_level(logging.WARNING):
        end_step(30)
    assert len(caplog.records) == 1
    assert [entry["step"] for entry in resumed.history] == [10, 20, 30]


def test_collapse_stops_with_the_fix_named():
    watch, end_step = still(gates(1.0, 0.0), collapse="stop")
    with pytest.raises(
        UserError, match=r"step 10.*0\.000.*load_balance.*method\.health\.collapse=warn"
    ):
        end_step(10)
    assert watch.history  # it was measured all the same


def test_no_collapse_no_warning(caplog):
    with caplog.at_level(logging.WARNING):
        still(gates(1.0, 0.0), collapse="ignore")[1](10)
        still(gates(0.9, 0.1), collapse="stop")[1](10)  # entropy 0.47
        # Collapse is of active specialists: one alone cannot, two of four are even.
        still(gates(1.0, 0.0), active=torch.tensor([True, False]), collapse="stop")[1](10)
        still(gates(0.5, 0.5, 0.0, 0.0), active=torch.arange(4) < 2, below=0.9)[1](10)
        # With prototypes, those whose domain is known; general text has none.
        watch, end_step = still(gates(1.0, 0.0), known=[0, 2], collapse="stop")
        end_step(10)
        assert watch.history[0]["dead_specialists"] == 0
    assert not caplog.records


def test_tokens_without_an_update_do_not_count():
    gate = gates(0.5, 0.5)
    gate[0] = 0.0  # a null specialist took the first text
    watch, end_step = still(gate)
    end_step(10)
    meter = RoutingHealth(NAMES, 2)
    meter.update(gate[1], torch.full((5,), 3.0), torch.zeros(5))
    # Of two texts of three rank components, one uses none.
    assert watch.history == [{"step": 10} | meter.summary() | {"mean_rank": 1.5}]


def test_state_can_be_read_without_unpickling_anything(tmp_path):
    watch, end_step = still(gates(0.98, 0.02))
    end_step(10)
    torch.save(watch.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == watch.state_dict()
