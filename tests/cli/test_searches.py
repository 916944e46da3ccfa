"""Sweeps whose sweeper searches: Optuna's, where it is installed, and one of the test's own."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from helpers.artifacts import store_evaluation
from helpers.world import World
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from rich.console import Console

import hydra_plugins
import steerlora.__main__ as command
from steerlora.cli.launchers import Jobs
from steerlora.cli.overrides import samples_of
from steerlora.cli.sweep import Outcome
from steerlora.errors import UserError
from steerlora.evaluation.scores import Estimate


class Climber(Sweeper):
    """Tries both ends of one interval of ranks, then the middle of the better half."""

    __module__ = "hydra_plugins.of_a_test"  # Hydra takes plugins from this package alone

    def __init__(self, **_) -> None:
        self.values: list[float] = []

    def setup(self, *, hydra_context, task_function, config) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments) -> None:
        fixed = [text for text in arguments if "interval" not in text]
        ends = self.run([[*fixed, "method.rank=2"], [*fixed, "method.rank=8"]], 0)
        middle = 4 if ends[0] > ends[1] else 6
        self.run([[*fixed, f"method.rank={middle}"]], 2)

    def run(self, jobs, first) -> list[float]:
        returned = self.launcher.launch(jobs, initial_job_idx=first)
        self.values += (found := [float(job.return_value) for job in returned])
        return found


@pytest.fixture
def search(tmp_path, monkeypatch, capfd):
    """``search(*overrides)``: exit code, output, errors and the table of the sweep.

    Scores are of artifacts that no stage built: the best rank is 7.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["steerlora"])
    monkeypatch.setattr(command, "console", Console(soft_wrap=True, width=300))

    def execute(config, *_):
        if config.method.rank == 3:
            raise UserError("no such luck")
        score = 1 - abs(config.method.rank - 7) / 10
        record = World().evaluation("micro_m", "sc_lora", 0)
        record = replace(record, averages={"target": Estimate(score, 0.01)})
        name = store_evaluation(tmp_path / "artifacts", record, rank=config.method.rank)
        return (tmp_path / "artifacts/evaluate" / name,)

    monkeypatch.setattr(command, "execute", execute)
    module = ModuleType(Climber.__module__)
    module.Climber = Climber
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(hydra_plugins, "of_a_test", module, raising=False)
    Plugins.instance().register(Climber)
    node = {"_target_": f"{Climber.__module__}.{Climber.__name__}", "params": None}
    ConfigStore.instance().store(group="hydra/sweeper", name="climber", node=node)

    def run(*overrides):
        asked = [] if "experiment=smoke" in overrides else ["stage=evaluate"]
        with pytest.raises(SystemExit) as ended:
            command.main(["-m", *asked, "logger=none", *overrides])
        tables = list(Path("artifacts/sweeps").glob("*.csv"))
        table = pd.read_csv(tables[0]) if tables else None
        return (ended.value.code, *capfd.readouterr(), table)

    return run


def test_a_sweeper_is_given_what_jobs_measured_and_the_table_has_those_it_chose(search):
    code, out, err, table = search("hydra/sweeper=climber", "method.rank=int(interval(2,8))")
    assert (code, err) == (0, "")
    assert table["method.rank"].tolist() == [2, 8, 6]
    assert table["average/target"].tolist() == pytest.approx([0.5, 0.9, 0.9])
    assert out.count("│ done") == 3


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("hydra/sweeper=climber", "method.rank=int(interval(2,-8))"), "method.rank=-8"),
        (("hydra/sweeper=climber", "method=lora,sc_lorra"), "did you mean 'sc_lora'"),
        (("hydra/sweeper=climber", "method.rnk=2,4"), "did you mean 'method.rank'"),
        (("hydra/sweeper=climbr",), "did you mean 'climber'"),
        (("hydra/sweeper=climber", "hydra.sweeper.param=1"), "hydra.sweeper.param"),
        (
            ("hydra/sweeper=climber", "experiment=smoke"),
            "needs the figure of one stage",
        ),
        (("method.rank=interval(2,8)",), "an interval has no single values"),
    ],
)
def test_a_mistake_is_one_line_before_any_job(search, overrides, says):
    code, out, err, table = search(*overrides)
    (line,) = err.splitlines()
    assert (code, out, table) == (2, "", None)
    assert says in line


def test_a_figure_that_is_not_there_is_the_jobs_error(search):
    code, out, *_ = search(
        "hydra/sweeper=climber", "method.rank=int(interval(2,8))", "study.objective=average/tar"
    )
    assert code in (1, 2)
    assert "did you mean 'average/target'" in out


def test_optuna_finds_the_best_of_its_trials(search):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra: sweeps")
    code, _, err, table = search(
        *("hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=6"),
        *("hydra.sweeper.n_jobs=1", "hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=1"),
        *("method.rank=int(interval(2,8))", "hydra.sweeper.max_failure_rate=1"),
    )
    assert len(table) == 6
    done = table[table["outcome"] == "done"]
    assert code == (0 if len(done) == 6 else 2), err
    (found,) = Path("artifacts/sweeps").glob("*/optimization_results.yaml")
    best = done.sort_values("average/target").iloc[-1]
    assert f"method.rank: {int(best['method.rank'])}" in found.read_text()


def test_samples_have_every_value_once_and_no_product():
    jobs = samples_of(["a=1,2,3", "b=interval(0.5,4)", "c=x", "d=range(2)"])
    assert jobs[0] == ["a=1", "b=0.5", "c=x", "d=0"]
    assert len(jobs) == 1 + 2 + 1 + 0 + 1
    for value in ("a=3", "b=4.0", "d=1"):
        assert sum(value in job for job in jobs) == 1


def test_jobs_under_submitit_give_what_their_outcomes_say(tmp_path):
    jobs = Jobs()
    jobs.outcomes = str(tmp_path)
    Outcome(0, value=0.25).write(tmp_path)
    Outcome(1, code=1, error="gone").write(tmp_path)
    assert json.loads((tmp_path / "0.json").read_text())["value"] == 0.25
    assert [jobs._returned(number).return_value for number in (0, 1)] == [0.25, None]
