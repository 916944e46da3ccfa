"""What runs in a worker process: one piece of work after another, until its parent ends.

Ctrl-C counts once, whether the signal came from the terminal (to all processes at once), from the
pool, or from both: a training saves at the end of its step, other work has a `KeyboardInterrupt`
raised in it, and neither is interrupted in saving its state. The pool stops at once by killing.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from steerlora.engine import preemption
from steerlora.engine.progress import Progress, QueueProgress
from steerlora.errors import Preempted


@dataclass(frozen=True)
class Work:
    """A call for a worker to make, ``function(argument, progress)``. All of it is picklable."""

    label: str
    """What messages call it."""

    function: Callable[[Any, Progress], Any]
    """What to call."""

    argument: Any
    """Its first argument."""


@dataclass(frozen=True)
class Done:
    """The answer of a call that returned."""

    result: Any
    """What it returned."""


@dataclass(frozen=True)
class Failed:
    """The answer of a call that raised."""

    error: BaseException
    """What it raised, with the worker's traceback as a note."""


@dataclass(frozen=True)
class Interrupted:
    """The answer of a call that Ctrl-C ended."""


def serve(connection: Connection, grace: float) -> None:
    """Do one piece of work after another until the pipe ends, or a signal has ended one."""
    interrupted = threading.Event()

    def interrupt(*_: object) -> None:
        if not interrupted.is_set():
            interrupted.set()
            if not preemption.request(signal.SIGINT):
                raise KeyboardInterrupt

    outbox = _Outbox(connection)
    progress = QueueProgress(outbox)
    logging.getLogger().addHandler(_Forward(progress))
    threading.Thread(target=_end_with_parent, args=(grace,), daemon=True).start()
    with suppress(KeyboardInterrupt, Preempted, EOFError, OSError), preemption.signals_handled():
        signal.signal(signal.SIGINT, interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while not interrupted.is_set() and not preemption.requested():
            outbox.put(_answer(connection.recv(), progress, interrupted))


def _answer(
    work: Work, progress: Progress, interrupted: threading.Event
) -> Done | Failed | Interrupted:
    try:
        return Done(work.function(work.argument, progress))
    except BaseException as error:
        if interrupted.is_set():  # whatever error the interruption became
            return Interrupted()
        trace = "".join(traceback.format_exception(error))
        return Failed(sendable(error, f"in the worker process of '{work.label}':\n{trace}"))


def sendable(error: BaseException, note: str) -> BaseException:
    """``error`` with a note; a `RuntimeError` of the same text where it cannot be pickled."""
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    return error


def _end_with_parent(grace: float) -> None:
    """When the parent ends, interrupt the work, and exit ``grace`` seconds later."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(grace)
    os._exit(1)


class _Outbox:
    """Sends whole messages: one thread at a time, and no signal in the middle."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def put(self, item: Any) -> None:
        with interrupts_blocked(), self._lock, suppress(OSError):  # a dead parent reads nothing
            self._connection.send(item)


class _Forward(logging.Handler):
    """Sends warnings as progress messages, so that they do not break the progress bars."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.message(self.format(record))


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Block SIGINT in this thread and in the processes that it starts; it is delivered after."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
