"""How a run ends before its time: one line without escape codes, and the exit code for it."""

from __future__ import annotations

import pytest

from steerlora.__main__ import ENDS, _end
from steerlora.errors import Preempted, RankGone, UserError, WorkerDied

CODES = {UserError: 2, KeyboardInterrupt: 130, RankGone: 1, WorkerDied: 1}


@pytest.mark.parametrize("kind", [*CODES, Preempted])
def test_an_end_is_one_line(kind, capsys):
    words = "a row's key \x1b[2J\nand more"
    error = Preempted(15, words) if kind is Preempted else kind(words)
    with pytest.raises(SystemExit) as ended:
        _end(error)
    assert ended.value.code == CODES.get(kind, 75)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()


def test_every_end_has_its_line():
    assert {*CODES, Preempted} == set(ENDS)
