"""Preemption: a signal asks this process to save its state and stop.

SLURM sends SIGUSR1 ahead of a time limit (``--signal=USR1@120``), SIGTERM when it takes nodes away;
submitit sends SIGUSR2; Ctrl-C is SIGINT. A training in progress saves at the end of its step and
stops, what has trained is stored first, and anything else stops at once, since every finished
artifact is stored. The process then exits with `REQUEUE`, or with 130 after Ctrl-C; a second Ctrl-C
stops at once, whatever is lost.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from steerlora.distributed import ranks
from steerlora.errors import Preempted

REQUEUE = 75
"""Exit code of a preempted run (sysexits' EX_TEMPFAIL): the same command resumes the run."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
ECHO = 0.3
"""Seconds in which a second SIGINT is the same Ctrl-C, passed on by a wrapper."""

_training = 0  # number of trainings in progress, which look at `requested` after every step
_unstored = False  # whether a training has ended whose result is not stored yet
_requested = 0  # number of the signal that came, 0: none
_interrupted = float("-inf")  # when the last Ctrl-C came, on the monotonic clock


def requested() -> int:
    """The signal that has asked this process to stop; 0 where none has."""
    return _requested


@contextmanager
def signals_handled() -> Iterator[None]:
    """Inside, the signals lead to an orderly stop.

    A handler that a launcher had set before, such as submitit's, is called afterwards: it requeues.

    Raises:
        Preempted: a signal came.
        KeyboardInterrupt: Ctrl-C; its text says what was saved, where a training has saved.
    """
    global _requested, _unstored, _interrupted
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = dict.fromkeys(SIGNALS, _on_signal)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # of a shell's background job it is
        handlers[signal.SIGINT] = _on_interrupt
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    except Preempted as preempted:
        if preempted.signal == signal.SIGINT:
            raise KeyboardInterrupt(str(preempted)) from preempted
        launcher = before.get(preempted.signal)
        if callable(launcher):
            signal.signal(preempted.signal, launcher)
            launcher(preempted.signal, None)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _requested, _unstored, _interrupted = 0, False, float("-inf")


@contextmanager
def training() -> Iterator[None]:
    """Inside, a signal interrupts nothing: the training looks at `requested` after every step.

    Nor does it after a training that came to its end, until what has trained is `stored`.
    """
    global _training, _unstored
    _training += 1
    try:
        yield
        _unstored = True
    finally:
        _training -= 1


def stored() -> None:
    """What has trained is stored: from here on a signal may interrupt again."""
    global _unstored
    _unstored = False


def request(number: int) -> bool:
    """Ask a training to save and stop; False where none is in progress, nor one to be stored."""
    global _requested
    _requested = number
    return bool(_training or _unstored)


def _on_signal(number: int, frame: object) -> None:
    if not request(number):
        raise Preempted(number, "nothing was lost")


def _on_interrupt(number: int, frame: object) -> None:
    global _interrupted
    before, _interrupted = _interrupted, time.monotonic()
    if _interrupted < before + ECHO:
        return
    again = _requested == number
    if not request(number) or again:
        raise KeyboardInterrupt
    if ranks.is_main():
        # Not printed: a handler may run in the middle of a print.
        os.write(2, b"saving at the end of this step (Ctrl-C again: stop at once)\n")


def stop(number: int, where: str) -> NoReturn:
    """Stop because a signal came, here or at another rank.

    Args:
        number: the signal's.
        where: what was saved, for the message.

    Raises:
        Preempted: always.
    """
    raise Preempted(number, where)


def stop_if_requested(where: str) -> None:
    """Between two pieces of work, on every rank alike: stop if a signal came to rank 0 meanwhile.

    Args:
        where: what was saved, for the message.

    Raises:
        Preempted: it did.
    """
    if number := ranks.broadcast(requested()):
        stop(number, where)
