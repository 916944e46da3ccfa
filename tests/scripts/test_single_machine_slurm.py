"""What the script refuses; that it works is shown by tests/cli/test_slurm.py's running at all."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = (Path(__file__).parents[2] / "scripts" / "single_machine_slurm.sh").read_text()
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to get past the first check")


def run(*arguments: str, script: str = SCRIPT, **options) -> subprocess.CompletedProcess:
    """From standard input: another user may not be able to read this folder."""
    return subprocess.run(
        ["bash", "-s", *arguments], input=script, capture_output=True, text=True, cwd="/", **options
    )


@pytest.mark.parametrize("verb", ["start", "stop"])
def test_whoever_is_not_root_is_told_to_be(verb):
    ended = run(verb, **({"user": "nobody"} if os.geteuid() == 0 else {}))
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert "only root can" in line
    assert f"sudo bash {verb}" in line


@root_only
@pytest.mark.parametrize("verb", ["start", "stop"])
def test_a_slurm_of_the_machines_own_is_left_alone(tmp_path, verb):
    own = tmp_path / "slurm.conf"
    own.write_text("ClusterName=ours\n")
    ended = run(verb, script=SCRIPT.replace("conf=/etc/slurm/slurm.conf", f"conf={own}"))
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert "of its own" in line or "left as it is" in line
    assert own.read_text() == "ClusterName=ours\n"
    assert list(tmp_path.iterdir()) == [own]


@root_only
def test_without_apt_it_says_what_to_install(tmp_path):
    found = tmp_path / "bin"
    found.mkdir()
    for program in ("bash", "grep"):
        (found / program).symlink_to(f"/usr/bin/{program}")
    script = SCRIPT.replace("conf=/etc/slurm/slurm.conf", f"conf={tmp_path}/slurm.conf")
    ended = run("start", script=script, env={"PATH": str(found)})
    assert ended.returncode == 2
    assert "no apt-get here to install munged slurmctld slurmd srun" in ended.stderr
    assert not (tmp_path / "slurm.conf").exists()


def test_a_machine_without_slurm_is_not_up(tmp_path):
    (tmp_path / "timeout").symlink_to("/usr/bin/timeout")
    (tmp_path / "bash").symlink_to("/usr/bin/bash")
    ended = run("status", env={"PATH": str(tmp_path)})
    assert ended.returncode == 1
    assert "SLURM is not up: sudo" in ended.stdout


def test_any_other_verb_is_refused():
    ended = run("restart")
    assert ended.returncode == 2
    assert "say start, stop or status" in ended.stderr
