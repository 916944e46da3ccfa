"""Why a run ends before its time, in one line: a user's mistake, a signal, another rank's end."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can mend: printed as one line, exit code 2, no traceback."""


class RankGone(Exception):
    """Another rank ended; the message says which."""


class WorkerDied(Exception):
    """A worker process ended in the middle of its work, most often killed for its memory."""


class Preempted(BaseException):
    """A signal asked this process to stop, and its work is saved: the same command resumes it.

    Not an ``Exception``: nothing that handles failures may take it for one.

    Args:
        signal: its number.
        where: what was saved.
    """

    def __init__(self, signal: int, where: str) -> None:
        super().__init__(signal, where)
        self.signal, self.where = signal, where

    def __str__(self) -> str:
        return self.where


SUGGESTED = 5
"""Names that a message lists at most."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The part of an error message that helps: the closest choices, or the first few.

    Args:
        name: what the user wrote.
        choices: what would have been right.

    Returns:
        ``did you mean 'a' or 'b'?`` where something is close, else ``choose from a, b, c``, with
        `SUGGESTED` names at most.
    """
    choices = sorted(map(str, choices))
    close = difflib.get_close_matches(name[:LONGEST_SHOWN], choices, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f"'{choice}'" for choice in close) + "?"
    if not choices:
        return "there is nothing to choose from"
    more = f" and {len(choices) - SUGGESTED} more" if len(choices) > SUGGESTED else ""
    return "choose from " + ", ".join(choices[:SUGGESTED]) + more


LONGEST_SHOWN = 100
"""Characters of a value that a message quotes at most."""


def shown(value: object) -> str:
    """A user's value in a message: on one line, as configurations spell it, not too long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = str(value)
    except ValueError:  # Python does not write out a number of so many digits
        text = f"a number of {value.bit_length()} bits"  # type: ignore[attr-defined]
    if not text.isprintable():
        text = repr(text)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
