"""The training loop: exact resume, broken checkpoints, non-finite losses, interrupts."""

from __future__ import annotations

import csv
import logging
import os
import random
import signal
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
import trainings
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from steerlora.config import TrainerConfig
from steerlora.engine import preemption
from steerlora.engine.progress import Closed, Opened, Progress
from steerlora.errors import Preempted, UserError
from steerlora.training.checkpoints import newest
from steerlora.training.loop import Watch, fit, rise_hold_fall, seed_all

STEPS = 12


class Recorder(Progress):
    def __init__(self) -> None:
        self.events = []

    def emit(self, event) -> None:
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


class Regression(lightning.LightningModule):
    """Losses by step are kept; ``at`` may raise or change the loss of a step (from 0)."""

    def __init__(self, at=None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.at, self.losses = at or {}, {}

    def training_step(self, batch, index):
        x, y = batch[:, :4], batch[:, 4:]
        loss = (self.net(x) - y).square().mean()
        self.losses[self.global_step] = loss.item()
        return self.at[self.global_step](loss) if self.global_step in self.at else loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rise_hold_fall(step, STEPS, 2, 6)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def batch(step: int) -> torch.Tensor:
    return torch.randn(16, 5, generator=torch.Generator().manual_seed(step))


def run(module, directory: Path, *, seconds: float = 1e-9, progress=None) -> dict[str, float]:
    return fit(
        module,
        batch,
        STEPS,
        trainer=TrainerConfig(checkpoint_seconds=seconds),
        checkpoints=directory,
        progress=progress or Recorder(),
        description="regression",
    )


def raising(error: BaseException):
    def change(loss):
        raise error

    return change


@pytest.fixture
def from_a_terminal():
    """A background job of a shell ignores the interrupt, and so would its tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def sending(number: signal.Signals):
    def change(loss):
        os.kill(os.getpid(), number)
        return loss

    return change


@pytest.fixture
def unbroken(tmp_path) -> Regression:
    module = Regression()
    run(module, tmp_path / "unbroken", seconds=1000.0)
    assert sorted(module.losses) == list(range(STEPS))
    return module


def assert_same_end(module: Regression, unbroken: Regression) -> None:
    assert all(
        torch.equal(a, b) for a, b in zip(module.parameters(), unbroken.parameters(), strict=True)
    )
    assert module.losses == {step: unbroken.losses[step] for step in module.losses}


def test_resume_is_bit_equal(tmp_path, unbroken):
    with pytest.raises(ZeroDivisionError):
        run(Regression({7: raising(ZeroDivisionError())}), tmp_path)
    resumed, progress = Regression(), Recorder()
    run(resumed, tmp_path, progress=progress)
    assert sorted(resumed.losses) == list(range(7, STEPS))
    assert_same_end(resumed, unbroken)
    assert progress.of(Opened)[0].done == 7


def test_of_a_finished_training_the_last_step_is_repeated(tmp_path, unbroken):
    """What follows a training happens inside it, and so has to be reached again."""
    run(Regression(), tmp_path)
    again = Regression()
    figures = run(again, tmp_path)
    assert list(again.losses) == [STEPS - 1]
    assert figures["tokens"] == 16
    assert_same_end(again, unbroken)


def test_two_checkpoints_are_kept_and_no_unfinished_one(tmp_path):
    run(Regression(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000010",
        "step-00000011",
    ]


def test_no_checkpoint_before_its_time(tmp_path):
    run(Regression(), tmp_path / "none", seconds=1000.0)
    assert not (tmp_path / "none").exists()


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a flipped byte of a weight": lambda path: flip_a_byte(path / "state.safetensors"),
    "a flipped byte of the tree": lambda path: flip_a_byte(path / "state.json"),
    "a cut file": lambda path: (path / "state.safetensors").write_bytes(b"PK"),
    "a file gone": lambda path: (path / "state.json").unlink(),
    "no marker": lambda path: (path / "complete.json").unlink(),
    "a broken marker": lambda path: (path / "complete.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, unbroken, caplog, damage):
    with pytest.raises(ZeroDivisionError):
        run(Regression({7: raising(ZeroDivisionError())}), tmp_path)
    damage(tmp_path / "step-00000007")
    resumed = Regression()
    with caplog.at_level(logging.WARNING):
        run(resumed, tmp_path)
    assert "step-00000007 is damaged" in caplog.text
    assert "passed over" in caplog.text
    assert min(resumed.losses) == 6
    assert_same_end(resumed, unbroken)


def test_with_every_checkpoint_broken_training_starts_anew(tmp_path, unbroken):
    tmp_path.joinpath("step-00000003").mkdir()
    tmp_path.joinpath("step-00000009.tmp").mkdir()
    assert newest(tmp_path) is None
    resumed = Regression()
    run(resumed, tmp_path)
    assert_same_end(resumed, unbroken)
    assert not list(tmp_path.glob("*.tmp"))  # what a killed process left is cleared


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good(tmp_path, unbroken, value):
    progress = Recorder()
    module = Regression({5: lambda loss: loss * value})
    with pytest.raises(UserError, match=r"regression: the loss is (nan|inf) at step 6;") as caught:
        run(module, tmp_path, progress=progress)
    assert "\n" not in str(caught.value)
    assert newest(tmp_path).name == "step-00000005"
    assert [event.finished for event in progress.of(Closed)] == [False]
    resumed = Regression()
    run(resumed, tmp_path)
    assert_same_end(resumed, unbroken)


def test_weights_spoilt_by_a_finite_loss_are_not_kept(tmp_path, unbroken):
    """sqrt at zero: the loss is finite, its gradient is not, and the weights become NaN."""

    class Spoiling(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    with pytest.raises(UserError, match="at step 7"):
        run(Regression({5: Spoiling.apply}), tmp_path)
    assert newest(tmp_path).name == "step-00000005"
    resumed = Regression()
    run(resumed, tmp_path)
    assert_same_end(resumed, unbroken)


def test_ctrl_c_is_a_keyboard_interrupt_and_resumable(tmp_path, unbroken):
    progress = Recorder()
    with pytest.raises(KeyboardInterrupt):
        run(Regression({4: raising(KeyboardInterrupt())}), tmp_path, progress=progress)
    assert [event.finished for event in progress.of(Closed)] == [False]
    resumed = Regression()
    run(resumed, tmp_path)
    assert min(resumed.losses) == 4
    assert_same_end(resumed, unbroken)


@pytest.mark.usefixtures("from_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_has_the_step_finished_and_saved(tmp_path, unbroken, number):
    module = Regression({4: sending(number)})
    with (
        pytest.raises((KeyboardInterrupt, Preempted), match="saved at step 5 of 12"),
        preemption.signals_handled(),
    ):
        run(module, tmp_path, seconds=1000.0)
    resumed = Regression()
    run(resumed, tmp_path, seconds=1000.0)
    assert sorted(module.losses) == list(range(5))
    assert sorted(resumed.losses) == list(range(5, STEPS))
    assert_same_end(resumed, unbroken)


@pytest.mark.usefixtures("from_a_terminal")
def test_a_second_interrupt_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "ECHO", -1.0)
    twice = Regression({4: lambda loss: sending(signal.SIGINT)(sending(signal.SIGINT)(loss))})
    with pytest.raises(KeyboardInterrupt) as caught, preemption.signals_handled():
        run(twice, tmp_path, seconds=1000.0)
    assert not str(caught.value)
    assert newest(tmp_path) is None


@pytest.mark.usefixtures("from_a_terminal")
def test_an_echo_of_an_interrupt_is_not_a_second_one(tmp_path):
    twice = Regression({4: lambda loss: sending(signal.SIGINT)(sending(signal.SIGINT)(loss))})
    with pytest.raises(KeyboardInterrupt, match="saved"), preemption.signals_handled():
        run(twice, tmp_path, seconds=1000.0)


@pytest.mark.usefixtures("from_a_terminal")
def test_what_has_trained_is_stored_before_a_signal_counts(tmp_path):
    """In the last step, and after it until the result is stored; from then on it counts at once."""
    with preemption.signals_handled():
        last = Regression({STEPS - 1: sending(signal.SIGINT)})
        run(last, tmp_path / "last", seconds=1000.0)
        assert sorted(last.losses) == list(range(STEPS))
        with pytest.raises(Preempted, match="all of it"):
            preemption.stop_if_requested("all of it")
    with preemption.signals_handled():
        run(Regression(), tmp_path / "after", seconds=1000.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested() == signal.SIGTERM
        preemption.stored()
        with pytest.raises(Preempted, match="nothing was lost"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_figures_count_tokens(tmp_path):
    figures = run(Regression(), tmp_path)
    assert figures["tokens"] == STEPS * 16
    assert figures["tokens_per_second"] > 0
    assert figures["peak_memory_bytes"] > 0


def test_rates_rise_hold_and_fall():
    factors = [rise_hold_fall(step, 10, 2, 4) for step in range(11)]
    assert factors == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert [rise_hold_fall(step, 4, 0, 0) for step in range(4)] == [1] * 4


def logged(folder: Path, module, batches, **options) -> list[dict[str, float]]:
    """What a training logs, a dictionary a row."""
    log = CSVLogger(folder, name="log", flush_logs_every_n_steps=1)
    fit(
        module,
        batches,
        STEPS,
        trainer=TrainerConfig(**options),
        checkpoints=folder / "checkpoints",
        progress=Recorder(),
        description="training",
        run_logger=log,
    )
    log.save()
    with Path(log.log_dir, "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_every_training_says_how_it_goes(tmp_path):
    rows = logged(tmp_path, Regression(), batch)
    (row,) = [row for row in rows if "throughput/tokens_per_second" in row]
    assert row["memory/peak_bytes"] > 2**20
    assert row["throughput/tokens_per_second"] > 0
    # Step 10 is done: the schedule has come to the eleventh factor.
    assert row["train/learning_rate"] == pytest.approx(1e-2 * rise_hold_fall(10, STEPS, 2, 6))
    assert row["train/gradient_norm"] > 0
    assert "throughput/mfu" not in row  # this module does not know its arithmetic


def test_tokens_are_counted_over_all_attempts(tmp_path):
    broken = Regression({7: raising(ZeroDivisionError())})
    with pytest.raises(ZeroDivisionError):
        logged(tmp_path, broken, batch, checkpoint_seconds=1e-9)
    rows = logged(tmp_path, Regression(), batch, checkpoint_seconds=1e-9)
    (row,) = [row for row in rows if "train/tokens" in row]
    assert row["train/tokens"] == 10 * 16


def test_the_gradient_norm_is_the_one_before_clipping(tmp_path):
    free, clipped = (
        logged(tmp_path / str(most), Regression(), batch, gradient_clip=most)[-1]
        for most in (1e9, 1e-9)
    )
    assert free["train/gradient_norm"] > 1e-3
    assert clipped["train/gradient_norm"] > 1e-3  # not 1e-9


@pytest.mark.parametrize(
    "training", ["adapter_training", "pretraining", "sae_training", "end_to_end_training"]
)
def test_utilisation_is_logged_by_every_kind_of_training(training, tmp_path, monkeypatch):
    seen = {}
    figures = Watch.figures

    def noted(self, device):
        seen.update(figures(self, device))
        return seen

    monkeypatch.setattr(Watch, "figures", noted)
    monkeypatch.setattr("steerlora.training.loop.peak_flops", lambda device, precision: 1e9)
    getattr(trainings, training)(tmp_path / "run", trainings.settings())
    assert seen["throughput/mfu"] > 0
    rate = seen["throughput/tokens_per_second"]
    flops = seen["throughput/mfu"] * 1e9 / rate
    assert 1e3 < flops < 1e6  # a token of so small a model


class Dropping(Regression):
    """Draws random numbers in its forward."""

    def __init__(self, at=None) -> None:
        super().__init__(at)
        self.net.insert(1, nn.Dropout(0.5))


def test_random_numbers_resume_with_the_training(tmp_path):
    unbroken = Dropping()
    run(unbroken, tmp_path / "unbroken", seconds=1000.0)
    with pytest.raises(ZeroDivisionError):
        run(Dropping({7: raising(ZeroDivisionError())}), tmp_path)
    torch.randn(17)  # whatever else happens to the generator
    resumed = Dropping()
    run(resumed, tmp_path)
    assert_same_end(resumed, unbroken)


def test_seeds_are_those_of_lightning():
    lightning.seed_everything(11, verbose=False)
    wanted = random.random(), np.random.rand(), torch.rand(3)
    seed_all(11)
    assert (random.random(), np.random.rand()) == wanted[:2]
    assert torch.equal(torch.rand(3), wanted[2])
