from __future__ import annotations

import io
import pickle
import queue
import time

import pytest
from rich.console import Console

from steerlora.engine import progress as module
from steerlora.engine.progress import (
    Advanced,
    Closed,
    ConsoleProgress,
    Message,
    Opened,
    QueueProgress,
    SilentProgress,
    clock_time,
)


class Clock:
    """A clock that the test sets; stands in for `time.monotonic` everywhere in the module."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=40)


def test_plain_lines_are_sparse_and_clean(clock: Clock):
    console = plain_console()
    with (
        ConsoleProgress(console) as progress,
        progress.task("adapter [lora] seed 1", total=60, unit="step") as task,
    ):
        for step in range(60):
            clock.now += 0.5
            task.advance(1, tokens=512, note=f"loss {step / 10:.2f}")
    lines = console.file.getvalue().splitlines()
    assert lines == [
        "adapter [lora] seed 1: started",
        "adapter [lora] seed 1: 20/60 steps, 1,024 tokens/s, 0:20 left, loss 1.90",
        "adapter [lora] seed 1: 40/60 steps, 1,024 tokens/s, 0:10 left, loss 3.90",
        "adapter [lora] seed 1: 60/60 steps, 1,024 tokens/s, 0:00 left, loss 5.90",
        "adapter [lora] seed 1: done, 60/60 steps in 0:30, loss 5.90",
    ]
    assert "\x1b" not in console.file.getvalue()


def test_plain_lines_of_an_interrupted_and_of_a_resumed_task(clock: Clock):
    console = plain_console()

    def work(done: int) -> None:
        with progress.task("base", total=100, done=done) as task:
            clock.now += 4
            task.advance(30)
            raise KeyboardInterrupt

    with ConsoleProgress(console) as progress:
        for done in (0, 30):
            with pytest.raises(KeyboardInterrupt):
                work(done)
        with progress.task("items", unit="item") as task:
            task.advance()
        progress.message("[bold] is not markup")
    assert console.file.getvalue().splitlines() == [
        "base: started",
        "base: stopped at 30/100 steps in 0:04",
        "base: started at 30/100 steps",
        "base: stopped at 60/100 steps in 0:04",
        "items: started",
        "items: done, 1 item in 0:00",
        "[bold] is not markup",
    ]


def test_steps_done_before_do_not_count_as_speed(clock: Clock):
    meter = module.Meter(Opened("1", "base", 400, "step", 300))
    assert meter.remaining is None
    clock.now += 10
    meter.update(Advanced("1", 10, 0, ""))
    assert meter.rates == (1.0, 0.0)
    assert meter.remaining == 90
    for _ in range(40):  # ten times as fast now: the old pace is forgotten
        clock.now += 1
        meter.update(Advanced("1", 2, 0, ""))
    assert meter.rates[0] == pytest.approx(2.0)


def test_what_the_work_expects_counts_for_more_than_its_pace(clock: Clock):
    meter = module.Meter(Opened("1", "all steps", 4, "step", 0))
    meter.update(Advanced("1", 0, 0, "", left=600.0))
    assert meter.remaining == 600
    clock.now += 60
    assert meter.remaining == 540
    meter.update(Advanced("1", 3, 0, ""))  # a pace that would say 20 seconds
    assert meter.remaining == 540
    meter.update(Advanced("1", 0, 0, "", left=30.0))
    clock.now += 31
    assert meter.remaining is None  # late: nothing is known any more
    assert not any("left" in figure for figure in meter.figures())


def test_what_is_left_is_reported_at_once(clock: Clock):
    target: queue.Queue = queue.Queue()
    with QueueProgress(target).task("all steps", 2) as task:
        task.advance(0, left=7.0)
        task.advance()
    events = [target.get() for _ in range(target.qsize())]
    assert [e.left for e in events if isinstance(e, Advanced)] == [7.0, None]


def test_bars_on_a_terminal():
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    with ConsoleProgress(console) as progress:
        with progress.task("sae [k=16]", total=4) as sae, progress.task("base", total=3) as base:
            time.sleep(0.25)
            sae.advance(2, tokens=512, note="fvu 0.05")
            base.advance(1)
            progress._display.refresh()
            shown = console.file.getvalue()
            progress.message("a message")
        progress._display.refresh()
        assert not progress._display.tasks  # a finished bar makes room
    for expected in ("sae [k=16]", "2/4 steps", "tokens/s", "left", "fvu 0.05", "base"):
        assert expected in shown
    assert "a message" in console.file.getvalue()


def test_queue_carries_few_picklable_events_and_all_counts(clock: Clock):
    target: queue.Queue = queue.Queue()
    progress = QueueProgress(target)
    with progress.task("sae", total=1000, unit="batch", done=5) as task:
        for _ in range(1000):
            clock.now += 0.003
            task.advance(1, tokens=7, note="fvu 0.1")
    progress.message("hello")
    events = [pickle.loads(pickle.dumps(target.get())) for _ in range(target.qsize())]
    opened, *advanced, closed, message = events
    assert opened == Opened(opened.task, "sae", 1000, "batch", 5)
    assert closed == Closed(opened.task, finished=True)
    assert message == Message("hello")
    assert 10 <= len(advanced) <= 16  # 3 seconds, 5 a second
    assert sum(event.steps for event in advanced) == 1000
    assert sum(event.tokens for event in advanced) == 7000
    assert {event.note for event in advanced} == {"fvu 0.1"}


def test_events_of_a_queue_shown_elsewhere(clock: Clock):
    target: queue.Queue = queue.Queue()

    def work() -> None:
        with QueueProgress(target).task("sae", 2) as task:
            task.advance()
            raise ValueError("not finite")

    with pytest.raises(ValueError, match="not finite"):
        work()
    console = plain_console()
    progress = ConsoleProgress(console)
    while not target.empty():
        progress.emit(target.get())
    assert console.file.getvalue().splitlines() == [
        "sae: started",
        "sae: stopped at 1/2 steps in 0:00",
    ]


def test_silent(capsys):
    with SilentProgress() as progress, progress.task("x", 1) as task:
        task.advance(tokens=1, note="n")
        progress.message("y")
    assert capsys.readouterr() == ("", "")


def test_clock_time():
    assert [clock_time(s) for s in (0, 7.4, 59.6, 750, 3723)] == [
        "0:00",
        "0:07",
        "1:00",
        "12:30",
        "1:02:03",
    ]
