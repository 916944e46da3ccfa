"""Real runs of the command line, to be killed, signalled and started again.

A start costs seconds of imports. Runs are therefore forked from a process that has imported
already (``zygote.py``): each is a process of its own, in a session of its own, and does what
``python -m steerlora`` does. Those under torchrun start cold.
"""

from __future__ import annotations

import glob
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

PATIENCE = 120.0
"""Seconds after which what should have happened counts as never to happen."""
MINUTE = 60.0
"""What the end of a rank may take to end the others."""
TINY = (
    "experiment=smoke",
    "model.steps=3",
    "model.batch_size=8",
    "domains.train_items=20",
    "domains.pretrain_items=100",
    "domains.evaluation_items=6",
    "sae.max_tokens=800",
    "sae.steps=3",
    "sae.batch_size=64",
    "trainer.max_steps=40",
    "trainer.batch_size=4",
    "trainer.learning_rate=4e-3",  # what rounding moves a weight by grows with it: assert_close
    "trainer.checkpoint_seconds=1e-9",
    "method.rank=2",
    "evaluation.limit=1",
    "order.steps_per_domain=2",
    "logger=none",
)
"""The smoke experiment, smaller still; a checkpoint after every step."""
ADAPTER = "stage=adapter_training"
MEMORY = (
    "method.active=2",
    "method.memory.enabled=true",
    "method.memory.every=3",
    "method.memory.spawn_confidence=1",
    "method.memory.spawn_similarity=1",
)
"""A memory policy that finds something to do."""
TRAININGS = {
    "base": ("stage=base", "model.steps=40"),
    "sae_training": ("stage=sae_training", "sae.steps=40"),
    "adapter_training": (ADAPTER, *MEMORY),
    "sequential_forgetting": (
        "stage=sequential_forgetting",
        "order.steps_per_domain=8",
        "method.replay.ratio=0.5",
        *MEMORY,
    ),
}
"""{stage: options of a training of 40 steps}, of five domains of eight in a sequence."""
ALONE = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("SLURM_", "TORCHELASTIC_")) and name not in ("RANK", "WORLD_SIZE")
} | {
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    # The command sets it, too late for a process that was forked with torch imported.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""The environment of one process on its own."""


def until(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    """Wait for something to happen."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Run:
    """A process under way, the leader of its session; what it says goes to files."""

    def __init__(self, number: int, poll: Callable[[], int | None], out: Path, err: Path) -> None:
        self.number, self.poll, self._out, self._err = number, poll, out, err

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait(self, patience: float = PATIENCE) -> int:
        """Its exit code, below zero where a signal ended it."""
        deadline = time.monotonic() + patience
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"hangs:\n{self.out}\n{self.err}"
            time.sleep(0.01)
        return code

    def ends_well(self, patience: float = PATIENCE) -> Run:
        assert self.wait(patience) == 0, self.out + self.err
        return self

    @property
    def line(self) -> str:
        """The line that says why it ended; fails where there is more than one, or a traceback."""
        assert "Traceback" not in self.out + self.err, self.err
        (line,) = re.findall(r"^(?:error|preempted|interrupted): .*$", self.err, re.M)
        return line

    @property
    def mistake(self) -> str:
        """The line, of a run that refuses something that its user can mend."""
        assert self.wait() == 2, self.err
        return self.line

    def send(self, number: signal.Signals) -> None:
        assert self.poll() is None, f"ended already:\n{self.out}\n{self.err}"
        os.kill(self.number, number)

    def kill(self) -> None:
        """End it and what it started, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.number, signal.SIGKILL)


class Starter:
    """Starts runs in a folder, and ends those that a test leaves behind.

    Args:
        folder: of what they say.
        ask: sends a request to the zygote.
    """

    def __init__(self, folder: Path, ask: Callable[..., int | None]) -> None:
        self._folder, self._ask = folder, ask
        self._runs: list[Run] = []

    def _files(self) -> tuple[Path, Path]:
        files = [self._folder / f"{name}{len(self._runs)}" for name in ("out", "err")]
        for file in files:
            file.touch()
        return files[0], files[1]

    def __call__(
        self,
        *arguments: str,
        script: Path | None = None,
        first: str = "",
        slow_end: bool = False,
        **environment: str,
    ) -> Run:
        """``steerlora`` with these arguments, in the tiny experiment, forked.

        Args:
            script: to run in its place.
            first: what Python runs before, as it would a sitecustomize.
            slow_end: whether the interpreter takes itself apart at the end, as after a script.
        """
        out, err = self._files()
        before = out.with_name(f"{out.name}.py")
        before.write_text(first)
        number = self._ask(
            script=script and str(script),
            arguments=arguments if script else [*TINY, *arguments],
            environment=ALONE | environment,
            folder=str(self._folder),
            out=str(out),
            err=str(err),
            first=first and str(before),
            slow_end=slow_end,
        )
        known: list[int] = []

        def poll() -> int | None:
            if not known:
                known.extend(code for code in [self._ask(poll=number)] if code is not None)
            return known[0] if known else None

        self._runs.append(Run(number, poll, out, err))
        return self._runs[-1]

    def ranks(
        self,
        *arguments: str,
        each: tuple[tuple[str, ...], ...] = ((), ()),
        machines: bool = False,
        **more: Any,
    ) -> list[Run]:
        """The ranks of one run, without torchrun: rank 0 hosts the rendezvous store.

        Args:
            each: a rank's own arguments.
            machines: one a machine.
            more: what a single run takes.
        """
        shared = {
            "WORLD_SIZE": str(len(each)),
            "LOCAL_WORLD_SIZE": "1" if machines else str(len(each)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        found = []
        for rank, own in enumerate(each):
            its = {"RANK": str(rank), "LOCAL_RANK": "0" if machines else str(rank)}
            found.append(self(*arguments, *own, **shared, **its, **more))
        return found

    def torchrun(self, options: str, *arguments: str) -> Run:
        """``torchrun <options> -m steerlora`` with these arguments, from a cold start."""
        out, err = self._files()
        command = [str(Path(sys.executable).with_name("torchrun")), *options.split()]
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(
                [*command, "-m", "steerlora", *TINY, *arguments],
                env={k: v for k, v in ALONE.items() if k != "TORCH_CPP_LOG_LEVEL"},
                cwd=self._folder,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        self._runs.append(Run(process.pid, process.poll, out, err))
        return self._runs[-1]

    def close(self) -> None:
        for run in self._runs:
            run.kill()


def zygote() -> Iterator[Callable[..., int | None]]:
    """What starts and polls processes, while it lasts."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("zygote.py"))],
        env=ALONE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    turn = threading.Lock()  # tests have threads

    def ask(**request) -> int | None:
        with turn:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.wait()


# What runs leave behind


def seen(root: Path, pattern: str) -> list[Path]:
    """What a pattern finds while a run is at work there."""
    # Not Path's glob, which raises where a folder vanishes.
    found = glob.glob(pattern, root_dir=root, recursive=True)  # noqa: PTH207
    return [root / name for name in found]


def checkpoints(root: Path, stage: str = "adapter_training") -> list[Path]:
    """Whole checkpoints of a stage's unfinished trainings, oldest first."""
    return sorted(seen(root, f"{stage}/*.partial/checkpoints/**/step-????????"))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def reached(root: Path, step: int, stage: str = "adapter_training") -> Callable[[], bool]:
    """Whether a stage's training has come to a step."""
    return lambda: any(step_of(found) >= step for found in checkpoints(root, stage))


def weights(root: Path, stage: str = "adapter_training") -> dict[str, torch.Tensor]:
    """All tensors of the one artifact that was trained in a root."""
    (artifact,) = (path.parent for path in trained(root, stage))
    found = {}
    for file in sorted(artifact.rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found[f"{file.relative_to(artifact)}: {name}"] = tensor
    assert found
    return found


def trained(root: Path, stage: str = "adapter_training") -> list[Path]:
    """Manifests of the stage's whole artifacts, other than those that came with the root."""
    given = (root / "given.txt").read_text().split()
    found = root.glob(f"{stage}/*/manifest.json")
    return [path for path in found if path.parent.name not in given and path.parent.suffix == ""]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-4, absolute, but for one weight in a thousand: sums over ranks have another order.

    AdamW divides a gradient by its own size: where it is near zero, its last digits alone can move
    a weight by a share of the rate (4e-3). Other data would move every weight by about the rate.
    """
    assert found.keys() == expected.keys()
    apart = {
        name: (found[name].double() - tensor.double()).abs() for name, tensor in expected.items()
    }
    for name, difference in apart.items():
        assert difference.max() <= 4e-3, f"{name}: {difference.max():.1e}"
    far = torch.cat([difference.flatten() > 1e-4 for difference in apart.values()])
    assert far.float().mean() <= 1e-3, f"{far.sum()} of {len(far)} weights"
