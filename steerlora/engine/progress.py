"""Progress of long work: bars on a terminal, a line now and then elsewhere.

A `Task` counts steps and tokens, and reports them a few times a second as events. The `Progress`
that it belongs to shows the events or passes them on. Events are small and picklable, so that a
parent can show its workers' progress: `QueueProgress` sends them, and the parent emits them again.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from steerlora.text import for_terminal

EVENT_INTERVAL = 0.2  # seconds between two reports of one task
LINE_INTERVAL = 10.0  # seconds between two plain lines of one task
RATE_WINDOW = 15.0  # seconds over which tokens/s and time left are estimated


@dataclass(frozen=True)
class Opened:
    """A task began."""

    task: str
    """Identifier of the task, unique over processes."""

    description: str
    """What the reader sees."""

    total: int | None
    """Steps in all. None where that is unknown."""

    unit: str
    """What a step is, in the singular."""

    done: int
    """Steps that an interrupted run did before."""


@dataclass(frozen=True)
class Advanced:
    """A task went on."""

    task: str
    """Identifier of the task."""

    steps: int
    """Steps done since the last report."""

    tokens: int
    """Tokens processed since the last report."""

    note: str
    """How the work goes, such as its loss. Empty for nothing to say."""

    left: float | None = None
    """Seconds that the rest will take, where the work knows better than its pace."""


@dataclass(frozen=True)
class Closed:
    """A task ended."""

    task: str
    """Identifier of the task."""

    finished: bool
    """Whether it reached its end. False if an exception ended it."""


@dataclass(frozen=True)
class Message:
    """A line for the reader, above the bars."""

    text: str
    """The line."""


Event = Opened | Advanced | Closed | Message


class Progress(ABC):
    """Where long work reports to. A context manager; ``task`` and ``message`` are for the work."""

    @abstractmethod
    def emit(self, event: Event) -> None:
        """Show an event, or pass it on."""

    @contextmanager
    def task(
        self, description: str, total: int | None = None, unit: str = "step", done: int = 0
    ) -> Iterator[Task]:
        """A counted piece of work: ``with progress.task("SAE", 400) as task: task.advance()``.

        Args:
            description: what the reader sees.
            total: steps in all; ``None`` where that is unknown.
            unit: what a step is, in the singular.
            done: steps that an interrupted run did before.
        """
        task = Task(self, Opened(_new_id(), description, total, unit, done))
        try:
            yield task
        except BaseException:
            task.close(finished=False)
            raise
        task.close(finished=True)

    def message(self, text: str) -> None:
        """A line for the reader."""
        self.emit(Message(text))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class Task:
    """Counts steps and tokens; reports at most every `EVENT_INTERVAL` seconds."""

    def __init__(self, progress: Progress, opened: Opened) -> None:
        self._progress, self._id = progress, opened.task
        self._steps, self._tokens, self._note = 0, 0, ""
        self._left: float | None = None
        self._reported = time.monotonic()
        progress.emit(opened)

    def advance(
        self,
        steps: int = 1,
        *,
        tokens: int = 0,
        note: str | None = None,
        left: float | None = None,
    ) -> None:
        """Count ``steps`` done and ``tokens`` processed in them; ``note`` says how it goes.

        Args:
            left: seconds that the rest will take, of work whose steps are too unlike for its pace
                to say.
        """
        self._steps += steps
        self._tokens += tokens
        self._note = self._note if note is None else note
        self._left = left
        if left is not None or time.monotonic() - self._reported >= EVENT_INTERVAL:
            self._report()

    def close(self, finished: bool) -> None:
        self._report()
        self._progress.emit(Closed(self._id, finished))

    def _report(self) -> None:
        self._progress.emit(Advanced(self._id, self._steps, self._tokens, self._note, self._left))
        self._left = None
        self._steps, self._tokens, self._reported = 0, 0, time.monotonic()


class SilentProgress(Progress):
    """Shows nothing."""

    def emit(self, event: Event) -> None:
        pass


class QueueProgress(Progress):
    """Puts every event on a queue, or whatever else has ``put``, for another process to emit."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def emit(self, event: Event) -> None:
        self._target.put(event)


class ConsoleProgress(Progress):
    """Bars on a terminal; plain lines, without escape codes, on anything else.

    Args:
        console: where to write; standard output by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(emoji=False)
        self._meters: dict[str, Meter] = {}
        self._display = (_Bars if self._console.is_terminal else _Lines)(self._console)
        self._lock = threading.Lock()  # tasks may report from several threads

    def __enter__(self) -> ConsoleProgress:
        self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._display.stop()

    def emit(self, event: Event) -> None:
        with self._lock:
            match event:
                case Message(text):
                    _print_line(self._console, text)
                case Opened(task):
                    self._meters[task] = Meter(event)
                    self._display.opened(self._meters[task])
                case Advanced(task):
                    self._meters[task].update(event)
                    self._display.advanced(self._meters[task])
                case Closed(task, finished):
                    self._display.closed(self._meters.pop(task), finished)


class Meter:
    """The state of one task and the rates that follow from it."""

    def __init__(self, opened: Opened) -> None:
        self.opened, self.done, self.tokens, self.note = opened, opened.done, 0, ""
        self.began = time.monotonic()
        self._samples = deque([(self.began, self.done, self.tokens)])
        self._end: float | None = None  # when it is expected to be done
        self.shown = self.began  # when a line about it was last printed

    def update(self, event: Advanced) -> None:
        self.done += event.steps
        self.tokens += event.tokens
        self.note = event.note
        now = time.monotonic()
        if event.left is not None:
            self._end = now + event.left
        self._samples.append((now, self.done, self.tokens))
        while len(self._samples) > 2 and self._samples[1][0] < now - RATE_WINDOW:
            self._samples.popleft()

    @property
    def elapsed(self) -> float:
        """Seconds since the task was opened."""
        return time.monotonic() - self.began

    @property
    def rates(self) -> tuple[float, float]:
        """Steps and tokens a second over the last `RATE_WINDOW` seconds."""
        (then, done, tokens), (now, done_now, tokens_now) = self._samples[0], self._samples[-1]
        seconds = max(now - then, 1e-9)
        return (done_now - done) / seconds, (tokens_now - tokens) / seconds

    @property
    def remaining(self) -> float | None:
        """Seconds left, or ``None`` while they cannot be estimated."""
        if self._end is not None:
            left = self._end - time.monotonic()
            return left if left > 0 else None  # late: better to say nothing
        speed, _ = self.rates
        if self.opened.total is None or speed <= 0:
            return None
        return max(0, self.opened.total - self.done) / speed

    @property
    def counted(self) -> str:
        """``120/400 steps``."""
        total, unit = self.opened.total, self.opened.unit
        if total is None:
            return f"{self.done} {unit}{'' if self.done == 1 else 's'}"
        return f"{self.done}/{total} {unit}{'' if total == 1 else 's'}"

    def figures(self) -> list[str]:
        """``120/400 steps``, ``5,120 tokens/s``, ``0:32 left`` and the note, where known."""
        _, tokens = self.rates
        figures = [self.counted, f"{tokens:,.0f} tokens/s" if tokens > 0 else ""]
        figures.append("" if self.remaining is None else f"{clock_time(self.remaining)} left")
        return [figure for figure in [*figures, self.note] if figure]


def clock_time(seconds: float) -> str:
    """``0:07``, ``12:30``, ``1:02:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Lines:
    """A line when a task begins and ends, and every `LINE_INTERVAL` seconds between."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def opened(self, meter: Meter) -> None:
        done = f" at {meter.counted}" if meter.done else ""
        self._print(f"{meter.opened.description}: started{done}")

    def advanced(self, meter: Meter) -> None:
        if time.monotonic() - meter.shown >= LINE_INTERVAL:
            meter.shown = time.monotonic()
            self._print(f"{meter.opened.description}: {', '.join(meter.figures())}")

    def closed(self, meter: Meter, finished: bool) -> None:
        end = f"{'done,' if finished else 'stopped at'} {meter.counted} in"
        note = f", {meter.note}" if meter.note else ""
        self._print(f"{meter.opened.description}: {end} {clock_time(meter.elapsed)}{note}")

    def _print(self, line: str) -> None:
        _print_line(self._console, line)


class _Bars(Bars):
    """One bar a task, gone when the task ends."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            _Figures(),
            console=console,
            refresh_per_second=4,
        )
        self._ids: dict[str, TaskID] = {}

    def stop(self) -> None:
        for bar in self._ids.values():  # of a worker that could not close its own
            self.remove_task(bar)
        self._ids.clear()
        super().stop()

    def opened(self, meter: Meter) -> None:
        opened = meter.opened
        self._ids[opened.task] = self.add_task(
            for_terminal(opened.description), total=opened.total, completed=meter.done, meter=meter
        )

    def advanced(self, meter: Meter) -> None:
        self.update(self._ids[meter.opened.task], completed=meter.done)

    def closed(self, meter: Meter, finished: bool) -> None:
        self.remove_task(self._ids.pop(meter.opened.task))


class _Figures(ProgressColumn):
    def render(self, task: Any) -> Text:
        return Text(for_terminal(" · ".join(task.fields["meter"].figures())), style="cyan")


def _print_line(console: Console, line: str) -> None:
    console.print(for_terminal(line), markup=False, highlight=False, soft_wrap=True)


_counter = itertools.count()


def _new_id() -> str:
    """An identifier that no other process uses."""
    return f"{os.getpid()}.{next(_counter)}"
