"""What a training goes on from: the newest checkpoint that is whole, its own, whosever ranks'."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from runs import (
    ADAPTER,
    MEMORY,
    assert_close,
    assert_same,
    checkpoints,
    reached,
    trained,
    until,
    weights,
)


def test_two_are_kept_and_nothing_unfinished(begun):
    found = checkpoints(begun)
    assert len(found) == 2
    assert sorted(found[0].parent.iterdir()) == found
    assert all((path / "complete.json").is_file() for path in found)


def test_a_flipped_byte_sends_it_to_the_one_before(start, begun, unbroken):
    before, newest = checkpoints(begun)
    file = newest / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run = start(ADAPTER, f"artifacts.root={begun}").ends_well()
    assert re.search(
        rf"checkpoint {newest} is damaged \(state.safetensors has changed .*\): passed over",
        run.out,
    )
    assert f"resuming from {before.name}" in run.out
    assert_same(weights(begun), unbroken)


def test_another_trainings_checkpoint_is_refused(start, begun):
    """Copied to where a training of other settings looks."""
    (theirs,) = {path.parent for path in checkpoints(begun)}
    other = (ADAPTER, "seed=1", f"artifacts.root={begun}")
    run = start(*other)
    until(lambda: len({path.parent for path in checkpoints(begun)}) == 2)
    run.kill()
    run.wait()
    (ours,) = {path.parent for path in checkpoints(begun)} - {theirs}
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    before = sorted(path.name for path in ours.iterdir())
    line = start(*other).mistake
    assert f"checkpoint {ours}/{before[-1]} is of another configuration" in line
    assert f"remove the folder {ours} to begin anew" in line
    assert sorted(path.name for path in ours.iterdir()) == before


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 12 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("to mount a small disk takes root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_keeps_the_checkpoint_before(start, upstream, unbroken, small_disk):
    root = Path(shutil.copytree(upstream, small_disk / "artifacts"))
    run = start(ADAPTER, f"artifacts.root={root}")
    until(reached(root, 5))
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while run.poll() is None:
            try:
                file.write(bytes(4096))
            except OSError:
                continue
    line = run.mistake
    assert f"no space left on the disk of {root}" in line
    assert "free some" in line
    left = checkpoints(root)
    assert not list(left[-1].parent.glob("*.tmp"))
    ballast.unlink()
    again = start(ADAPTER, f"artifacts.root={root}").ends_well()
    assert f"resuming from {left[-1].name}" in again.out
    assert_same(weights(root), unbroken)


HANDED_ON = {
    "adapter": (
        (ADAPTER, *MEMORY),
        ("trainer.strategy=zero2",),
        ("trainer.strategy=zero3", "trainer.persistent_elements=0", "trainer.offload=true"),
    ),
    "sae": (("stage=sae_training", "sae.steps=40"), ("trainer.strategy=zero3",)),
    "base": (("stage=base", "model.steps=40"), ("trainer.strategy=zero2",)),
}


@pytest.mark.parametrize("kind", HANDED_ON)
def test_checkpoints_belong_to_no_strategy(kind, start, root, tmp_path):
    """From two ranks to two others, at last to one process, it ends as what that one would do.

    One rank alone is signalled, as may happen under SLURM: all save, at the same step.
    """
    training, *strategies = HANDED_ON[kind]
    stage = training[0].removeprefix("stage=")
    aside = Path(shutil.copytree(root, tmp_path / "aside"))
    reference = start(*training, f"artifacts.root={aside}")
    for number, options in enumerate(strategies, 1):
        pair = start.ranks(*training, *options, f"artifacts.root={root}")
        until(reached(root, 4 * number, stage))
        pair[1].send(signal.SIGUSR1)
        assert [run.wait() for run in pair] == [75, 75], pair[0].err
        assert number == 1 or "resuming from step-" in pair[0].out
        assert re.search(r"preempted: saved at step \d+ of 40", pair[0].line)
        assert "preempted" not in pair[1].err
    last = start(*training, f"artifacts.root={root}").ends_well()
    assert "resuming from step-" in last.out
    reference.ends_well()
    assert_close(weights(root, stage), weights(aside, stage))
    if kind == "adapter":
        assert events(root) == events(aside) != []


def events(root: Path) -> list[tuple]:
    """What the memory policy did, and when."""
    (manifest,) = trained(root)
    found = json.loads((manifest.parent / "training.json").read_text())["events"]
    return [(event["step"], event["event"], event["specialists"]) for event in found]
