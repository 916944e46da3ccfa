"""The README's sweeps run."""

from __future__ import annotations

import pytest
from helpers.readme import ROOT, SWEEPS, runs


@pytest.mark.parametrize("command", SWEEPS)
def test_it_runs(command, text_folder, root, pretrained, capsys):
    assert runs(command, text_folder, root, pretrained)
    assert "error:" not in capsys.readouterr().err


def test_no_command_leaves_folders_behind():
    for name in ("multirun", "lightning_logs"):
        assert not (ROOT / name).exists()
