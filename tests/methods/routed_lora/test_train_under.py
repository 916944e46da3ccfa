"""Retrained controls: held open over every step, drawn from the step, closed whatever happens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.training import StopAt, Stopped, method_module, train
from lightning.pytorch.callbacks import Callback

from steerlora.config import InterventionConfig, TrainerConfig
from steerlora.data.batches import ChatBatch, ChatBatches
from steerlora.data.chat import EncodedChat
from steerlora.methods.module import MethodModule
from steerlora.methods.routed_lora.interventions import Intervention
from steerlora.methods.routed_lora.train_under import TrainUnder

SETTINGS = TrainerConfig(batch_size=4, learning_rate=1e-2, checkpoint_seconds=1e-9)
NAMES = ("law", "math")
STEPS = 6


def batch(step: int) -> ChatBatch:
    """Rows of two domains and of none."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        EncodedChat(torch.randint(1, 60, (6,), generator=generator).tolist(), 2) for _ in range(24)
    ]
    owners = [index % 3 - 1 for index in range(24)]
    return ChatBatches(rows, owners, batch_size=4, pad_token_id=0, seed=0)(step)


class Seen(Callback):
    """The intervention and the gates of every step."""

    def __init__(self) -> None:
        self.controls, self.gates, self.steps, self.rows = [], [], [], []

    def on_before_backward(self, trainer, module, loss) -> None:
        control = module.method.running.intervention
        self.controls.append(control)
        self.rows.append(control and list(control.rows(4)))
        self.gates.append(module.method.sites[1].routing.gate.detach())
        self.steps.append(trainer.global_step)


@pytest.fixture
def made(make_model, make_adapter):
    def make() -> MethodModule:
        model = make_model()
        return method_module(model, make_adapter(model), trainer=SETTINGS, steps=STEPS)

    return make


def under(module: MethodModule, name: str, **changes) -> TrainUnder:
    config = InterventionConfig(name=name, phase="training", **({"seed": 3} | changes))
    return TrainUnder(module.method, config, NAMES)


def run(module: MethodModule, directory: Path, *callbacks: Callback, steps: int = STEPS) -> None:
    train(module, batch, directory, steps, callbacks)


def weights(module: MethodModule) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.method.state_dict().items()}


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_it_is_held_open_over_every_step_and_told_each(made, tmp_path, monkeypatch):
    begin, begun = Intervention.begin, []

    def spied(control: Intervention, step: int, rows: list[str | None]) -> None:
        begun.append(step)
        begin(control, step, rows)

    monkeypatch.setattr(Intervention, "begin", spied)
    module, seen = made(), Seen()
    run(module, tmp_path, under(module, "invert", strength=0.5, sites=[1], domains=["law"]), seen)
    control = seen.controls[0]
    assert type(control).__name__ == "Invert"
    assert all(held is control for held in seen.controls)
    assert (control.strength, control.sites, control.domains) == (0.5, (1,), ("law",))
    assert begun == seen.steps == list(range(STEPS))
    names = [[None, *NAMES][owner + 1] for owner in batch(2).domains.tolist()]
    assert seen.rows[2] == names
    assert None in names
    assert module.method.running.intervention is None


@pytest.mark.parametrize("name", ["randomize", "shuffle", "replace_dense"])
def test_a_resumed_training_draws_what_an_unbroken_one_does(made, tmp_path, name):
    unbroken = made()
    run(unbroken, tmp_path / "a", under(unbroken, name))
    broken = made()
    with pytest.raises(Stopped):
        run(broken, tmp_path / "b", under(broken, name), StopAt(3))
    assert broken.method.running.intervention is None
    resumed = made()
    run(resumed, tmp_path / "b", under(resumed, name))
    assert equal(weights(unbroken), weights(resumed))
    intact = made()
    run(intact, tmp_path / "c")
    assert not equal(weights(unbroken), weights(intact))


def test_strength_zero_is_the_intact_training(made, tmp_path):
    intact, controlled = made(), made()
    run(intact, tmp_path / "a")
    run(controlled, tmp_path / "b", under(controlled, "randomize", strength=0.0))
    assert equal(weights(intact), weights(controlled))


def test_the_oracle_sends_each_row_to_its_domains_specialist(made, tmp_path):
    module, seen = made(), Seen()
    run(module, tmp_path, under(module, "oracle_domain", domains=NAMES), seen)
    owners = batch(5).domains
    chosen = seen.gates[5].argmax(-1)
    for owner in (0, 1):
        assert (chosen[owners == owner] == owner).all()
        assert (seen.gates[5][owners == owner].max(-1).values == 1).all()
    assert (seen.gates[5][owners == -1].max(-1).values < 1).any()


def test_the_oracle_deals_domains_to_active_specialists_and_keeps_what_is_known(made, tmp_path):
    module = made()
    module.method.active[0] = False
    run(module, tmp_path / "a", under(module, "oracle_domain", domains=NAMES), steps=1)
    facts = module.method.sites[1].facts
    assert facts.specialist_of_domain == {"law": 1, "math": 2}
    facts.specialist_of_domain = {"law": 3, "math": 2}
    run(module, tmp_path / "b", under(module, "oracle_domain", domains=NAMES), steps=1)
    assert facts.specialist_of_domain == {"law": 3, "math": 2}


def test_a_finished_training_that_resumes_has_nothing_to_control(made, tmp_path):
    module = made()
    run(module, tmp_path, under(module, "shuffle"))
    after, again = weights(module), made()
    run(again, tmp_path, under(again, "shuffle"))
    assert equal(after, weights(again))


def test_misuse_is_refused(made, tmp_path):
    module = made()
    with pytest.raises(ValueError, match="which is no control"):
        under(module, "permute_latents")
    with pytest.raises(ValueError, match="no control site 2"):
        run(module, tmp_path, under(module, "invert", sites=[2]))
