"""The inside of a worker process: one piece of work after another, until its parent ends.

The signal handler raises `KeyboardInterrupt` in the work exactly once, whether the signal came from
the terminal (to all processes at once), from the pool, or from both, so that work that saves its
state is not interrupted in doing so.
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
    label: str
    function: Callable[[Any, Progress], Any]
    argument: Any


@dataclass(frozen=True)
class Done:
    result: Any


@dataclass(frozen=True)
class Failed:
    error: BaseException


@dataclass(frozen=True)
class Interrupted:
    pass


def serve(connection: Connection, grace: float) -> None:
    """Do one piece of work after another until the pipe ends, or a signal has ended one."""
    interrupted = threading.Event()

    def interrupt(*_: object) -> None:
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt

    outbox = _Outbox(connection)
    progress = QueueProgress(outbox)
    logging.getLogger().addHandler(_Forward(progress))
    threading.Thread(target=_follow_parent, args=(grace,), daemon=True).start()
    with suppress(KeyboardInterrupt, Preempted, EOFError, OSError), preemption.heeded():
        signal.signal(signal.SIGINT, interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while not interrupted.is_set() and not preemption.asked():
            outbox.put(_answer(connection.recv(), progress, interrupted))


def _answer(
    work: Work, progress: Progress, interrupted: threading.Event
) -> Done | Failed | Interrupted:
    try:
        return Done(work.function(work.argument, progress))
    except BaseException as error:
        if interrupted.is_set():  # whatever came of the interruption on its way up
            return Interrupted()
        trace = "".join(traceback.format_exception(error))
        return Failed(sendable(error, f"in the worker process of '{work.label}':\n{trace}"))


def sendable(error: BaseException, note: str) -> BaseException:
    """``error`` if it survives pickling, else its type and message in words."""
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    return error


def _follow_parent(grace: float) -> None:
    """End with the parent, however it ends: interrupt the work, and leave after ``grace``."""
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
        with interrupts_held(), self._lock, suppress(OSError):  # a dead parent reads nothing
            self._connection.send(item)


class _Forward(logging.Handler):
    """Warnings go the way of the progress, where they do not tear the bars."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.message(self.format(record))


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Keep Ctrl-C pending in this thread, and in the processes that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
