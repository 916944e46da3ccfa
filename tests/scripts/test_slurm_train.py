"""What the batch script asks of srun, and refuses; tests/cli/test_slurm.py runs it for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm_train.sh"
BATCH = {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "16", "PYTHON": sys.executable}


@pytest.fixture
def train(tmp_path):
    """``train(SLURM_...=...)``: the script, with an srun that only says how it was called."""
    shown = "PYTHONUNBUFFERED OMP_NUM_THREADS SLURM_CPUS_PER_GPU HF_HUB_OFFLINE"
    (tmp_path / "srun").write_text(
        f'#!/bin/bash\necho "$*"\nfor name in {shown}; do echo "$name=${{!name-}}"; done\n'
    )
    (tmp_path / "srun").chmod(0o755)
    here = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    here.pop("OMP_NUM_THREADS", None)

    def run(**environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", SCRIPT, "stage=base", "logger=none"],
            env=here | {"PATH": f"{tmp_path}:{here['PATH']}"} | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return run


def test_one_task_a_gpu_with_the_nodes_cpus_shared_out(train):
    ended = train(
        **BATCH,
        SLURM_JOB_NUM_NODES="4",
        SLURM_TASKS_PER_NODE="1(x4)",
        SLURM_GPUS_ON_NODE="8",
        SLURM_CPUS_PER_GPU="2",
        HF_HUB_OFFLINE="1",
    )
    assert ended.returncode == 0, ended.stderr
    call, *environment = ended.stdout.splitlines()
    assert "--cpus-per-task=2 --ntasks-per-node=8 --ntasks=32 bash" in call
    assert "--export=ALL --label --kill-on-bad-exit=1" in call
    assert call.endswith(f"{sys.executable} -m steerlora stage=base logger=none")
    assert environment == [
        *("PYTHONUNBUFFERED=1", "OMP_NUM_THREADS=2", "SLURM_CPUS_PER_GPU=", "HF_HUB_OFFLINE=1")
    ]


def test_without_gpus_as_many_tasks_as_were_asked_for(train):
    ended = train(**BATCH, SLURM_TASKS_PER_NODE="2", OMP_NUM_THREADS="3")
    call, _, threads, *_ = ended.stdout.splitlines()
    assert "--cpus-per-task=8 bash" in call
    assert "--ntasks" not in call
    assert threads == "OMP_NUM_THREADS=3"


def test_gpus_without_cpus_run_and_say_what_to_ask_for(train):
    asked = {"SLURM_JOB_NUM_NODES": "1", "SLURM_TASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "8"}
    ended = train(**BATCH | asked | {"SLURM_CPUS_ON_NODE": "1"})
    assert "1 CPUs for 8 GPUs a node: ask for --cpus-per-gpu too" in ended.stderr
    assert "--cpus-per-task=1 --ntasks-per-node=8 --ntasks=8 --overcommit" in ended.stdout


@pytest.mark.parametrize("environment", [{}, BATCH | {"SLURM_STEP_ID": "0"}], ids=["shell", "srun"])
def test_outside_a_batch_job_it_says_how_to_submit(train, environment):
    ended = train(**environment)
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert "SLURM runs this: sbatch" in line


def test_a_python_without_steerlora_is_named(train, tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/bash\ncd /\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    ended = train(**BATCH | {"PYTHON": str(bare)}, SLURM_TASKS_PER_NODE="1")
    assert ended.returncode == 2
    assert f"{bare} has no steerlora: submit from its checkout" in ended.stderr
