"""Names and groups of W&B runs, the axes of their metrics, and images."""

from __future__ import annotations

import pytest
from helpers.offline import read_runs
from PIL import Image

from steerlora.config import LoggerConfig
from steerlora.errors import UserError
from steerlora.reporting.runs import NO_EXPERIMENT, open_run, run_name
from steerlora.reporting.wandb_metrics import Counts, TrainingMetrics

SETTINGS = {
    "model.name": "micro_m",
    "method.name": "sc_lora",
    "sae.architecture": "topk",
    "order.name": "none",
    "method.rank": 8,
    "seed": 1,
}


@pytest.mark.parametrize(
    ("varied", "name"),
    [
        ([], "micro_m sc_lora seed 1"),
        (["method.rank"], "rank=8"),
        (["method.rank", "seed"], "rank=8 seed=1"),
        (["method", "sae", "method.rank"], "sc_lora topk rank=8"),
        # what varies has no bearing on this run
        (["order", "order.seed", "stage"], "micro_m sc_lora seed 1"),
    ],
)
def test_a_name_holds_just_what_varies(varied, name):
    assert run_name("evaluate micro_m sc_lora seed 1", SETTINGS, varied) == name


class Written(list):
    """Stands in for a run: the rows that are logged to it."""

    def log(self, row):
        self.append(row)


def test_steps_and_tokens_go_on_from_one_training_to_the_next():
    written, counts = Written(), Counts()
    for first in (None, None, 20):
        metrics = TrainingMetrics(written, counts, first)
        metrics.log_metrics({"train/loss": 1.0, "epoch": 0, "train/tokens": 50.0}, step=4)
        metrics.log_metrics({"heldout/loss": 2.0}, step=5)
        metrics.log_metrics({"train/loss": 1.0, "train/tokens": 100.0}, step=9)
    assert [row["step"] for row in written] == [4, 5, 9, 13, 14, 18, 24, 25, 29]
    assert [row["tokens"] for row in written] == [50, 50, 100, 150, 150, 200, 250, 250, 300]
    assert written[1] == {"heldout/loss": 2.0, "step": 5, "tokens": 50}


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    logger = LoggerConfig(dir=str(tmp_path / "file/runs"))
    with (
        pytest.raises(UserError, match=r"cannot be written to .*logger=none"),
        open_run(logger, job_type="x", name="x", config={}),
    ):
        pass


@pytest.mark.slow
def test_figures_are_images_and_a_failure_is_told(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "ablation.png")
    logger = LoggerConfig(dir=str(tmp_path), group=NO_EXPERIMENT, tags=["mine"])
    with open_run(logger, job_type="report", name="a report", config={"seed": 1}) as log:
        log.images([tmp_path / "ablation.png"])
        log.table("claims", ["claim"], [["C1"]])
    with (
        pytest.raises(ValueError, match="no luck"),
        open_run(logger, job_type="base", name="broken", config={}),
    ):
        raise ValueError("no luck")
    runs = {one.stage: one for one in read_runs(tmp_path)}
    written, broken = runs["report"], runs["base"]
    assert (written.name, written.group, written.code) == ("a report", "", 0)
    assert written.tags == {"mine", "report"}
    assert written.config["seed"] == 1
    assert Image.open(written.image("figures/ablation")).size == (3, 2)
    assert written.table("claims") == [{"claim": "C1"}]
    assert broken.code == 1
    assert broken.id != written.id


@pytest.mark.slow
def test_an_id_in_the_environment_is_that_of_the_run_that_is_asked_for(tmp_path, monkeypatch):
    """W&B reads its environment once a process: the id must not reach later runs either."""
    logger = LoggerConfig(dir=str(tmp_path))
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    for name, asked_for in {"base": False, "evaluate": True}.items():
        with open_run(logger, job_type=name, name=name, config={}, asked_for=asked_for):
            pass
    monkeypatch.delenv("WANDB_RUN_ID")
    with open_run(logger, job_type="later", name="later", config={}, asked_for=True):
        pass
    ids = {one.stage: one.id for one in read_runs(tmp_path)}
    assert ids["evaluate"] == "mine"
    assert len(set(ids.values())) == 3
