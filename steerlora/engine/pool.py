"""Worker processes that can be interrupted to save their state, and that end when this one does.

``concurrent.futures`` cannot say which work a killed process had, nor interrupt one and wait for it
to save its state. So each worker has a pipe of its own, which brings its events and its results in
order.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import psutil

from steerlora.engine.preemption import ECHO
from steerlora.engine.progress import Event, Progress
from steerlora.engine.worker import Done, Failed, Interrupted, Work, interrupts_blocked, serve
from steerlora.errors import Preempted, WorkerDied

GRACE = 60.0  # seconds that an interrupted worker has to end its step and save its state
POLL_INTERVAL = 0.2  # seconds between two looks at the signals and at the workers' health


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    connection: Connection
    key: Any = None  # of the work in progress
    label: str | None = None  # None while idle


class WorkerPool:
    """Spawned processes, each given one piece of work at a time. Used as a context manager.

    Leaving it without an exception waits for idle workers to end. Leaving it with one interrupts
    the busy workers, gives them ``grace`` seconds, and kills what is left then; Ctrl-C during that
    time kills at once.

    Args:
        workers: number of processes.
        progress: emits the workers' events.
        environment: set before a worker starts, hence before it imports anything.
        grace: seconds that interrupted work has to save its state.
    """

    def __init__(
        self,
        workers: int,
        progress: Progress,
        environment: Mapping[str, str],
        grace: float = GRACE,
    ) -> None:
        self._size, self._progress, self._grace = workers, progress, grace
        self._environment = environment
        self._workers: list[_Worker] = []
        self._interrupts, self._interrupted = 0, float("-inf")

    def __enter__(self) -> WorkerPool:
        # The handler counts: raising in it could cut off a message that is being read.
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        if self._in_main_thread:
            self._handler = signal.signal(signal.SIGINT, self._count_interrupt)
        try:
            with _environment(self._environment), interrupts_blocked():
                for _ in range(self._size):
                    self._workers.append(_start_worker(self._grace))
        except BaseException:
            self._stop(signal.SIGINT)
            self._restore_handler()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # Preempted: SIGTERM lets the workers save at the end of their step.
            self._stop(signal.SIGTERM if kind is Preempted else signal.SIGINT)
        finally:
            self._restore_handler()
        if kind is None and self._interrupts:
            raise KeyboardInterrupt

    @property
    def idle(self) -> int:
        """Number of workers without work."""
        return sum(worker.label is None for worker in self._workers)

    def submit(
        self, key: Any, label: str, function: Callable[[Any, Progress], Any], argument: Any
    ) -> None:
        """Have an idle worker call ``function(argument, progress)``; all of it picklable.

        Args:
            key: comes back with the result.
            label: names the work in messages.
        """
        worker = next(worker for worker in self._workers if worker.label is None)
        worker.key, worker.label = key, label
        try:
            worker.connection.send(Work(label, function, argument))
        except OSError:
            raise self._died(worker) from None

    def wait(self) -> tuple[Any, Any]:
        """The key and the result of the next piece of work that is done.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            WorkerDied: a worker ended without an answer.
            BaseException: whatever the work raised.
        """
        while True:
            if self._interrupts:
                raise KeyboardInterrupt
            for worker, answer in self._receive():
                if isinstance(answer, Done):
                    key, worker.key, worker.label = worker.key, None, None
                    return key, answer.result
                if isinstance(answer, Failed):
                    raise answer.error
                raise KeyboardInterrupt
            for worker in self._workers:
                if worker.process.exitcode is not None and not worker.connection.poll():
                    raise self._died(worker)

    def _receive(self) -> Iterator[tuple[_Worker, Done | Failed | Interrupted]]:
        """At most a `POLL_INTERVAL` of messages: emits the events, yields the answers."""
        by_connection = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(by_connection), timeout=POLL_INTERVAL):
            worker = by_connection[connection]
            try:
                message = connection.recv()
            except (EOFError, OSError):
                raise self._died(worker) from None
            if isinstance(message, Event):
                self._progress.emit(message)
            else:
                yield worker, message

    def _died(self, worker: _Worker) -> BaseException:
        if self._interrupts:  # an idle worker ends by the same Ctrl-C
            return KeyboardInterrupt()
        worker.process.join(POLL_INTERVAL)
        code = worker.process.exitcode
        reason = f"exit code {code}"
        if code is not None and code < 0:
            reason = signal.Signals(-code).name
            if -code == signal.SIGKILL:
                reason += ", often for lack of memory: try fewer workers"
        return WorkerDied(
            f"the worker process of '{worker.label or 'no work'}' died ({reason}); "
            "what was finished is kept, and the same command resumes the rest"
        )

    def _stop(self, request: signal.Signals) -> None:
        """End every worker: the idle ones at once, the busy ones after a chance to save.

        Args:
            request: the signal that is sent to the busy ones.
        """
        deadline = time.monotonic() + self._grace
        enough = 2 if self._interrupts else 1  # the Ctrl-C that means "at once"
        if self._interrupts and self.idle < len(self._workers):
            self._progress.message("saving the work in progress (Ctrl-C again: stop at once)")
        for worker in self._workers:
            if worker.label is None:
                worker.connection.close()
            elif worker.process.is_alive():
                os.kill(worker.process.pid, request)
        listening = [worker.connection for worker in self._workers if worker.label is not None]
        while any(worker.process.is_alive() for worker in self._workers):
            if time.monotonic() > deadline or self._interrupts >= enough:
                break
            # Read on: a worker that saves its state must not wait for a full pipe.
            for connection in wait(listening, timeout=POLL_INTERVAL / 4) if listening else ():
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    listening.remove(connection)
                else:
                    if isinstance(message, Event):
                        self._progress.emit(message)
            if not listening:
                time.sleep(POLL_INTERVAL / 20)
        for worker in self._workers:
            _kill(worker.process)
            worker.connection.close()
        self._workers.clear()

    def _count_interrupt(self, *_: object) -> None:
        if time.monotonic() - self._interrupted >= ECHO:
            self._interrupts += 1
            self._interrupted = time.monotonic()

    def _restore_handler(self) -> None:
        if self._in_main_thread:
            signal.signal(signal.SIGINT, self._handler)


def _kill(process: BaseProcess) -> None:
    """Kill a process and those that it started, if it still runs."""
    if process.is_alive():
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
    process.join()


def _start_worker(grace: float) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, grace), name="steerlora-worker")
    process.start()
    theirs.close()  # so that the end of the worker is the end of the pipe
    return _Worker(process, ours)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
