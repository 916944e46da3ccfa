"""Preemption: a signal asks this process to save and to make room.

SLURM sends SIGUSR1 ahead of a time limit (``--signal=USR1@120``), SIGTERM when it takes nodes away;
submitit sends SIGUSR2. A training that runs saves at the end of its step and ends; all else ends
at once, since what is finished is stored. The process then exits with `REQUEUE`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from steerlora.errors import Preempted

REQUEUE = 75
"""Exit code of a preempted run (sysexits' EX_TEMPFAIL): the same command goes on where it was."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

_training = 0  # how many trainings are under way that will look at `asked`
_asked = False


def asked() -> bool:
    """Whether a signal has come that nothing has given way to."""
    return _asked


@contextmanager
def heeded() -> Iterator[None]:
    """Inside, the signals ask for an orderly end.

    A handler that a launcher had set before, such as submitit's, is called after it: it requeues.

    Raises:
        Preempted: a signal came.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked = False
    before = {number: signal.signal(number, _note) for number in SIGNALS}
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
    """Inside, a signal is noted and nothing interrupted: the training asks at every step's end."""
    global _training
    _training += 1
    try:
        yield
    finally:
        _training -= 1


def _note(number: int, frame: object) -> None:
    global _asked, _number
    _asked, _number = True, number
    if not _training:
        raise Preempted(number, "nothing was lost")


_number = signal.SIGTERM


def give_way(where: str) -> None:
    """End because a signal came, here or at another rank.

    Raises:
        Preempted: always.
    """
    raise Preempted(_number, where)
