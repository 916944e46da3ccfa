"""Runs under W&B's agents, and the shipped sweep for them; nothing is sent anywhere."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import pytest
import wandb
import yaml
from helpers.experiments import TINY
from helpers.offline import read_runs
from helpers.world import World
from wandb.apis.public import sweeps as server
from wandb.sdk.launch.sweeps import utils as sweeps
from wandb.wandb_agent import Agent as WandbAgent

from steerlora.cli import compose
from steerlora.cli.sections import config_directory
from steerlora.config import LoggerConfig
from steerlora.errors import Preempted
from steerlora.reporting.run_figures import figures_of
from steerlora.reporting.runs import open_run
from steerlora.reporting.wandb_agent import OF_ONE_RUN, Agent

SWEEP = yaml.safe_load((config_directory().parent / "scripts/wandb_sweep.yaml").read_text())


@pytest.fixture
def as_agent(tmp_path, monkeypatch):
    """The environment of a command that an agent starts, which W&B has not read yet."""
    wandb.teardown()
    file = tmp_path / "config-mine.yaml"
    chosen = {"method": {"value": "lora"}, "method.rank": {"value": 8}}
    file.write_text(yaml.safe_dump({"wandb_version": 1, **chosen}))
    for name, value in zip(OF_ONE_RUN, ("mine", "asweep", str(file)), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_ENTITY", "them")
    yield
    wandb.teardown()


@pytest.mark.slow
def test_the_agents_id_and_sweep_are_those_of_the_run_that_is_asked_for(as_agent, tmp_path):
    logger = LoggerConfig(dir=str(tmp_path))
    for stage in ("base", "evaluate", "later"):
        config = {"method.rank": 8, "method.name": "lora"}
        asked = stage == "evaluate"
        with open_run(logger, job_type=stage, name=stage, config=config, asked_for=asked):
            pass
    runs = {one.stage: one for one in read_runs(tmp_path)}
    assert (runs["evaluate"].id, runs["evaluate"].sweep) == ("mine", "asweep")
    assert runs["evaluate"].config["method"] == "lora"
    for stage in ("base", "later"):
        assert runs[stage].sweep == ""
        assert "method" not in runs[stage].config
    assert len({one.id for one in runs.values()}) == 3
    assert {(one.project, one.entity) for one in runs.values()} == {("theirs", "them")}


def test_a_project_in_the_environment_alone_changes_nothing(monkeypatch):
    for name in OF_ONE_RUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert Agent.of_environment() == Agent(None, None, None, None, {})
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert Agent.of_environment() == Agent("mine", None, None, None, {})


@pytest.mark.slow
def test_a_preempted_run_says_so_and_goes_on_under_its_id(tmp_path):
    logger, file = LoggerConfig(dir=str(tmp_path)), tmp_path / "checkpoints/wandb_run_id"
    about = {"job_type": "adapter_training", "name": "a training", "config": {}}
    with pytest.raises(Preempted), open_run(logger, **about, id_file=file):
        raise Preempted(15, "saved")
    with open_run(logger, **about, id_file=file):
        pass
    first, second = read_runs(tmp_path)
    assert (first.preempting, first.code) == (True, 1)
    assert (second.preempting, second.code) == (False, 0)
    assert first.id == second.id


@pytest.mark.long
def test_wandbs_own_agent_runs_the_command_line(tmp_path, monkeypatch):
    """W&B's agent, whole, and the process that it starts; its server's three answers are ours."""
    wandb.teardown()
    for name, value in zip(OF_ONE_RUN, ("", "asweep", ""), strict=True):
        monkeypatch.setenv(name, value)  # the agent sets the others
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    tiny = [text for text in TINY if text != "logger=none"]
    places = [f"artifacts.root={tmp_path / 'artifacts'}", f"logger.dir={tmp_path / 'runs'}"]
    words = [*tiny, *places, "model=micro_xs", "evaluation.limit=2", "logger.mode=offline"]
    ours = [word for word in SWEEP["command"] if not word.startswith(("steerlora", "${"))]
    program = [sys.executable, "-m", "steerlora"]
    command = [*program, *ours, *words, "${args_no_hyphens}"]
    order = {
        "type": "run",
        "run_id": "mine",
        "program": SWEEP["program"],
        "args": {"method": {"value": "lora"}, "method.rank": {"value": 4}},
    }
    orders = [[order]]
    monkeypatch.setattr(
        server, "_sweep_with_runs", lambda *_: {"config": yaml.safe_dump({"command": command})}
    )
    monkeypatch.setattr(server, "_register_agent", lambda *_, **__: {"id": "agent"})
    monkeypatch.setattr(server, "_agent_heartbeat", lambda *_: orders.pop() if orders else [])
    monkeypatch.setattr(wandb, "Api", lambda: None)
    monkeypatch.setattr(WandbAgent, "POLL_INTERVAL", 0.1)
    agent = WandbAgent(None, multiprocessing.Queue(), sweep_id="asweep", count=1)
    agent.run()
    assert (agent._finished, agent._failed) == (1, 0)
    runs = {one.stage: one for one in read_runs(tmp_path / "runs")}
    assert {"base", "adapter_training", "evaluate"} <= {*runs}
    assert [one.stage for one in runs.values() if one.id == "mine" or one.sweep] == ["evaluate"]
    found = runs["evaluate"]
    assert (found.id, found.sweep, found.project, found.code) == ("mine", "asweep", "theirs", 0)
    assert (found.config["method"], found.config["method.rank"]) == ("lora", 4)
    assert SWEEP["metric"]["name"] in found.summary


def commands() -> list[list[str]]:
    """What an agent runs: each differs from the first in one parameter; limits as they are."""
    values = {
        name: given.get("values") or [given["min"], given["max"]]
        for name, given in SWEEP["parameters"].items()
    }
    first = {name: found[0] for name, found in values.items()}
    chosen = [first, *({**first, k: v} for k, found in values.items() for v in found[1:])]
    found = []
    for parameters in chosen:
        args = {name: {"value": value} for name, value in parameters.items()}
        filled = sweeps.create_sweep_command_args({"args": args})
        words = []
        for word in sweeps.create_sweep_command(SWEEP["command"]):
            named = word.removeprefix("${").removesuffix("}")
            words += filled[named] if word.startswith("${") else [word]
        found.append(words)
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_of_the_shipped_sweep_is_one_of_ours(command):
    program, *overrides = command
    assert program == "steerlora"
    config = compose.load(overrides)
    assert (config.stage.name, config.logger.mode) == ("evaluate", "online")
    assert set(SWEEP["parameters"]) == {text.partition("=")[0] for text in overrides[3:]}


def test_the_shipped_sweep_looks_for_a_figure_of_its_stage():
    figures = figures_of("evaluate", {}, World().evaluation("micro_m", "lora", 0))
    assert SWEEP["metric"]["name"] in figures
    assert SWEEP["metric"]["goal"] == "maximize"
    assert Path(SWEEP["program"]).name == "steerlora"
