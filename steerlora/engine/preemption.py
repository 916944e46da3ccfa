"""Preemption: a signal asks this process to save its state and stop.

SLURM sends SIGUSR1 ahead of a time limit (``--signal=USR1@120``), SIGTERM when it takes nodes away;
submitit sends SIGUSR2. A training in progress saves at the end of its step and stops; anything else
stops at once, since every finished artifact is stored. The process then exits with `REQUEUE`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from steerlora.errors import Preempted

REQUEUE = 75
"""Exit code of a preempted run (sysexits' EX_TEMPFAIL): the same command resumes the run."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

_training = 0  # number of trainings in progress, which look at `requested` after every step
_requested = False
_number = signal.SIGTERM


def requested() -> bool:
    """Whether a signal has asked this process to stop."""
    return _requested


@contextmanager
def signals_handled() -> Iterator[None]:
    """Inside, the signals lead to an orderly stop.

    A handler that a launcher had set before, such as submitit's, is called afterwards: it requeues.

    Raises:
        Preempted: a signal came.
    """
    global _requested
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _requested = False
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    try:
        yield
    except Preempted as preempted:
        launcher = before.get(preempted.signal)
        if callable(launcher):
            signal.signal(preempted.signal, launcher)
            launcher(preempted.signal, None)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def training() -> Iterator[None]:
    """Inside, a signal interrupts nothing: the training looks at `requested` after every step."""
    global _training
    _training += 1
    try:
        yield
    finally:
        _training -= 1


def _on_signal(number: int, frame: object) -> None:
    global _requested, _number
    _requested, _number = True, number
    if not _training:
        raise Preempted(number, "nothing was lost")


def stop(where: str) -> NoReturn:
    """Stop because a signal came, here or at another rank.

    Args:
        where: what was saved, for the message.

    Raises:
        Preempted: always.
    """
    raise Preempted(_number, where)
