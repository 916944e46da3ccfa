"""Two ranks under ZeRO hold in shards what one process holds whole.

The ranks are this file, run twice: each trains a small model under every kind of
sharding, and rank 0 writes what it gathered.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch
from runs import Starter
from torch import Tensor, nn

from steerlora.config import TrainerConfig
from steerlora.distributed import ranks, shards, strategies
from steerlora.distributed.zero import ZeroStrategy
from steerlora.errors import UserError

KINDS = {
    "zero2": {"strategy": "zero2"},
    "zero2 offload": {"strategy": "zero2", "offload": True},
    "zero3": {"strategy": "zero3", "persistent_elements": 0},
    "zero3 persistent": {"strategy": "zero3"},
    "zero3 offload": {"strategy": "zero3", "persistent_elements": 0, "offload": True},
}


class Model(nn.Module):
    """A frozen layer and an adapter, whose weights have two names and odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
        self.model[0].requires_grad_(False)
        self.model[1].register_buffer("scale", torch.ones(1))
        self.model[1].register_buffer("cache", torch.ones(1), persistent=False)
        self.adapter = nn.Module()
        self.adapter.layer = self.model[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).square().mean()


def adamw(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)


def batch(step: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))


@torch.no_grad()
def edit(weight: Tensor, moments: dict[str, Tensor]) -> None:
    """What a memory policy may do to a specialist."""
    weight[0] *= 3
    for value in moments.values():
        value[:, 1] = 0.5


# What the ranks run


def sharded_run(settings: TrainerConfig) -> dict:
    """Train, edit and train; then restore what was stored in between elsewhere, and train again."""
    import deepspeed

    def start() -> tuple:
        module = Model()
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=adamw(module),
            config={**ZeroStrategy(settings).config, "train_micro_batch_size_per_gpu": 1},
        )
        return engine, module, [p for p in module.parameters() if p.requires_grad]

    def steps(engine, *numbers: int) -> None:
        for number in numbers:
            engine.backward(engine(batch(number)))
            engine.step()

    def stored(engine, module, trained) -> dict:
        moments = shards.whole_moments(trained, engine.optimizer)
        return {"weights": shards.whole_state(module), "moments": moments}

    first = engine, module, trained = start()
    found = {"new": stored(*first)}
    steps(engine, 0, 1)
    found["trained"] = stored(*first)
    weight = trained[0]
    with shards.editing([weight], engine.optimizer, moments=True) as moments:
        edit(weight, moments[weight])
    found["edited"] = stored(*first)
    steps(engine, 2)
    found["gone on"] = stored(*first)

    engine, module, trained = second = start()
    adapter = {k: v for k, v in found["trained"]["weights"].items() if k.startswith("adapter.")}
    shards.restore_state(module, {**adapter, "adapter.layer.scale": torch.tensor([2.0])})
    shards.restore_moments(trained, engine.optimizer, found["trained"]["moments"])
    found["restored"] = stored(*second)
    steps(engine, 2)
    found["restored, gone on"] = stored(*second)

    wholes = shards.whole_weights(module)
    engine.destroy()
    shards.replace(module, wholes)
    assert module.adapter.layer.weight is module.model[1].weight
    found["plain"] = {"weights": {n: p.detach() for n, p in module.adapter.named_parameters()}}
    return found


def main(folder: Path) -> None:
    with ranks.joined({}):
        for kind, options in KINDS.items():
            found = sharded_run(TrainerConfig(**options))
            if ranks.is_main():
                torch.save(found, folder / f"{kind}.pt")


# What one process does


@pytest.fixture(scope="module")
def two(ask, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for rank in Starter(folder, ask).ranks(str(folder), script=Path(__file__)):
        rank.ends_well()
    return folder


@pytest.fixture(params=KINDS)
def found(request, two) -> dict:
    return torch.load(two / f"{request.param}.pt")


class Plain:
    """The same training without shards."""

    def __init__(self) -> None:
        self.module = Model()
        self.optimizer = adamw(self.module)

    def steps(self, *numbers: int) -> Plain:
        for number in numbers:
            self.optimizer.zero_grad()
            self.module(batch(number)).backward()
            self.optimizer.step()
        return self

    def edited(self) -> Plain:
        weight = self.module.model[1].weight
        state = self.optimizer.state[weight]
        edit(weight, {name: state[name] for name in shards.MOMENTS})
        return self

    def assert_same(self, found: dict) -> None:
        """Of frozen weights, ranks store what each of them has whole."""
        weights = self.module.state_dict()
        sharded = weights.keys() - found["weights"].keys()
        assert sharded in (set(), {"model.0.weight", "model.0.bias"})
        for name in weights.keys() - sharded:
            torch.testing.assert_close(found["weights"][name], weights[name], msg=name)
        assert found["weights"].keys() <= weights.keys()
        moments = self.optimizer.state_dict()
        assert found["moments"]["param_groups"] == moments["param_groups"]
        torch.testing.assert_close(found["moments"]["state"], moments["state"])


def test_what_is_gathered_is_the_state_of_one_process(found):
    Plain().assert_same(found["new"])
    Plain().steps(0, 1).assert_same(found["trained"])


def test_an_edit_reaches_weights_moments_and_the_next_step(found):
    Plain().steps(0, 1).edited().assert_same(found["edited"])
    Plain().steps(0, 1).edited().steps(2).assert_same(found["gone on"])


def test_a_new_engine_goes_on_from_what_was_stored(found):
    plain = Plain().steps(0, 1)
    plain.module.adapter.layer.scale.fill_(2)
    plain.assert_same(found["restored"])
    plain.steps(2).assert_same(found["restored, gone on"])


def test_weights_are_plain_once_the_engine_is_destroyed(found):
    for name, weight in Plain().steps(0, 1, 2).module.adapter.named_parameters():
        torch.testing.assert_close(found["plain"]["weights"][name], weight.detach())


def test_another_deepspeed_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.1")
    with pytest.raises(UserError) as refusal:
        strategies.check_hardware(TrainerConfig(strategy="zero2"))
    assert str(refusal.value) == (
        "DeepSpeed 0.20.1 is installed, and trainer.strategy=zero2 and zero3 need >=0.19,<0.20: "
        "pip install 'deepspeed>=0.19,<0.20', or choose trainer=ddp"
    )
    strategies.check_hardware(TrainerConfig(strategy="single"))


def test_an_accelerator_that_is_not_there_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("gpu", "cuda", "mps"):
        with pytest.raises(UserError, match=f"^trainer.accelerator={name}: this machine has no"):
            strategies.check_hardware(TrainerConfig(accelerator=name))
    strategies.check_hardware(TrainerConfig(accelerator="cpu"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
