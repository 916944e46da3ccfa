"""A job of a sweep in itself; whole sweeps are in tests/readme and test_launchers.py."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from steerlora.cli.sweep import ABOUT, OUTCOMES, run_job
from steerlora.engine.manifests import write_json
from steerlora.reporting.wandb_agent import OF_ONE_RUN


@pytest.mark.parametrize("first", [0, 1])
def test_an_id_of_a_run_belongs_to_the_first_job(first, monkeypatch, tmp_path):
    """Jobs may share a process, and always share the environment that they were started from."""
    for name in OF_ONE_RUN:
        monkeypatch.setenv(name, "mine")
    monkeypatch.setenv(OUTCOMES, str(tmp_path))
    write_json(tmp_path / ABOUT, {"name": "x", "varied": [], "searches": False})
    found = {}
    for number in range(first, 3):
        about = {"job": SimpleNamespace(num=number), "overrides": SimpleNamespace(task=["a=1"])}
        job = SimpleNamespace(mode=RunMode.MULTIRUN, **about)
        monkeypatch.setattr(HydraConfig, "get", lambda job=job: job)

        def work(number: int = number) -> tuple:
            found[number] = {os.environ.get(name) for name in OF_ONE_RUN}
            return ()

        run_job(work, "average/target")
    assert found == {number: {None if number else "mine"} for number in range(first, 3)}
