"""The README's experiments run."""

from __future__ import annotations

import pytest
from helpers.readme import EXPERIMENTS, ROOT, runs


@pytest.mark.parametrize("command", EXPERIMENTS)
def test_it_runs(command, text_folder, root, pretrained, capsys):
    assert runs(command, text_folder, root, pretrained)
    assert "error:" not in capsys.readouterr().err


def test_no_command_leaves_folders_behind():
    for name in ("multirun", "lightning_logs"):
        assert not (ROOT / name).exists()
