"""Which job of a sweep this is, and how long the others will take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from steerlora.engine.progress import clock_time
from steerlora.text import for_terminal


def job_started(folder: Path, number: int, jobs: Sequence[str]) -> str:
    """``job 2 of 6 (seed=1): started``, and a file that tells the other jobs so.

    Args:
        folder: where the sweep's jobs write how they ended.
        number: of the job, from 0.
        jobs: what each of them has of its own; empty where nobody knows how many there will be.
    """
    (folder / f"{number}.started").touch()
    return f"{_named(number, jobs)}: started"


def job_done(folder: Path, number: int, jobs: Sequence[str]) -> str:
    """``job 2 of 6 (seed=1): done in 0:32; 4 left, about 2:08``.

    The time left is that of a middling job that is done, for all that are left, shared among those
    that run at the same time. Jobs that failed do not count, unless all did.
    """
    ended = {int(path.stem): json.loads(path.read_text()) for path in folder.glob("[0-9]*.json")}
    own = ended[number]
    result = "failed" if own["code"] else "done"
    text = f"{_named(number, jobs)}: {result} in {clock_time(own['seconds'])}"
    left = len(jobs) - len(ended)
    if left <= 0:
        return text
    started = {int(path.stem) for path in folder.glob("*.started")}
    at_once = 1 + len(started - set(ended))
    times = [one["seconds"] for one in ended.values() if not one["code"]]
    middling = median(times or [one["seconds"] for one in ended.values()])
    return f"{text}; {left} left, about {clock_time(middling * max(1, left / at_once))}"


def _named(number: int, jobs: Sequence[str]) -> str:
    if not jobs:
        return f"job {number + 1}"
    varied = f" ({for_terminal(jobs[number])})" if jobs[number] else ""
    return f"job {number + 1} of {len(jobs)}{varied}"
