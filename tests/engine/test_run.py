from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from steerlora.engine import building
from steerlora.engine.artifacts import ArtifactStore
from steerlora.engine.manifests import read_json, write_json
from steerlora.engine.pool import WorkerDied
from steerlora.engine.progress import Advanced, Event, Message, Opened, Progress
from steerlora.engine.run import RunReport, run
from steerlora.engine.steps import STAGES, Context, Step, stage
from steerlora.engine.worker import sendable
from steerlora.errors import UserError

# ---------------------------------------------------------------- stages for the tests


@dataclass(frozen=True)
class Trainer:
    devices: int = 1
    max_steps: int = 10


@dataclass(frozen=True)
class Config:
    name: str
    log: str  # a file that receives a line for every build
    seconds: float = 0.0
    seed: int = 0
    trainer: Trainer = Trainer()
    logger: str = "none"


class PickyError(Exception):
    """An exception that pickles and does not unpickle."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def log(context: Context, word: str) -> None:
    with Path(context.config.log).open("a") as file:
        file.write(f"{word} {context.config.name} {os.environ.get('OMP_NUM_THREADS')}\n")


def make(context: Context) -> dict:
    log(context, "make")
    time.sleep(context.config.seconds)
    texts = {}
    for name, value in context.inputs.items():
        several = value if isinstance(value, tuple) else (value,)
        texts[name] = [artifact.json("value.json") for artifact in several]
    write_json(context.directory / "value.json", {context.config.name: texts})
    context.progress.message(f"made {context.config.name}")
    return {"pid": os.getpid()}


def train(context: Context) -> dict:
    """Counts to ``max_steps``, a tenth of a second each; saves where it is when interrupted."""
    checkpoint = context.directory / "checkpoints" / "last.json"
    checkpoint.parent.mkdir(exist_ok=True)
    first = step = read_json(checkpoint)["step"] if checkpoint.exists() else 0
    try:
        with context.progress.task(context.label, context.config.trainer.max_steps) as task:
            while step < context.config.trainer.max_steps:
                time.sleep(0.1)
                step += 1
                if step == first + 1:
                    log(context, "train")
                task.advance()
    except KeyboardInterrupt:
        time.sleep(0.3)  # saving takes a moment, and must not be interrupted by an echo
        write_json(checkpoint, {"step": step})
        log(context, "saved")
        sys.exit(1)  # what Lightning makes of a KeyboardInterrupt
    return {"first": first}


def stubborn(context: Context) -> None:
    begun = False
    while True:
        try:
            if not begun:
                begun = True
                log(context, "stubborn")
            time.sleep(1)
        except KeyboardInterrupt:
            log(context, "deaf")


def fail(context: Context) -> None:
    """Fails, once a `train` step is under way if it is told to wait for one."""
    if context.config.logger == "wait":
        wait_until(lambda: logged(Path(context.config.log), "train"))
    raise UserError(f"{context.config.name} is wrong: did you mean 'right'?")


def die(context: Context) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


SKIP = frozenset({"trainer.devices", "logger"})
for build in (make, train, stubborn, fail, die):
    stage(f"test_{build.__name__}", 1, skip=SKIP)(build)


def together(contexts: Sequence[Context]) -> list[dict]:
    log(contexts[0], "+".join(context.config.name for context in contexts))
    for context in contexts:
        write_json(context.directory / "value.json", context.config.name)
    return [{"name": context.config.name} for context in contexts]


stage("test_together", 1, skip=SKIP, together=True)(together)


# ---------------------------------------------------------------- helpers


class Recorder(Progress):
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    @property
    def messages(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Message)]


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    return tmp_path / "log"


def step(log_file: Path, name: str, stage: str = "test_make", *, cost=1.0, inputs=None, **config):
    return Step(stage, Config(name, str(log_file), **config), inputs or {}, f"{name}!", cost)


def diamond(log_file: Path, **config) -> dict[str, Step]:
    top = step(log_file, "top", **config)
    left = step(log_file, "left", inputs={"top": top}, **config)
    right = step(log_file, "right", inputs={"top": top}, **config)
    bottom = step(log_file, "bottom", inputs={"sides": (left, right), "top": top})
    return {"top": top, "left": left, "right": right, "bottom": bottom}


def build_all(steps, store, workers=1, progress=None) -> RunReport:
    return run(list(steps), store, workers=workers, progress=progress, plugins=[__name__])


def logged(log_file: Path, word: str = "make") -> list[str]:
    lines = log_file.read_text().splitlines() if log_file.exists() else []
    return [line.split()[1] for line in lines if line.split()[0] == word]


# ---------------------------------------------------------------- stages and steps


def test_unknown_stage():
    with pytest.raises(UserError, match="stage=test_mak: did you mean 'test_make'"):
        _ = STAGES["test_mak"]
    with pytest.raises(UserError, match="test_train"):
        _ = Step("test_trian", {}, {}, "x").fingerprint


def test_skipped_keys_and_labels_do_not_change_the_fingerprint(log_file: Path):
    steps = diamond(log_file)
    original = steps["top"]

    def variant(**changes) -> str:
        return replace(original, config=replace(original.config, **changes)).fingerprint

    assert variant(logger="wandb") == original.fingerprint
    assert variant(trainer=Trainer(devices=8)) == original.fingerprint
    assert replace(original, label="other", cost=9.0).fingerprint == original.fingerprint
    assert variant(trainer=Trainer(max_steps=11)) != original.fingerprint
    assert variant(seed=1) != original.fingerprint


def test_a_change_reaches_downstream_only(log_file: Path):
    before = diamond(log_file)
    left = step(log_file, "left", inputs={"top": before["top"]}, seed=1)
    bottom = replace(before["bottom"], inputs={"sides": (left, before["right"])})
    assert left.fingerprint != before["left"].fingerprint
    assert bottom.fingerprint != before["bottom"].fingerprint
    order = replace(
        before["bottom"],
        inputs={"sides": (before["right"], before["left"]), "top": before["top"]},
    )
    assert order.fingerprint != before["bottom"].fingerprint
    assert list(before["bottom"].input_fingerprints) == ["sides[0]", "sides[1]", "top"]


# ---------------------------------------------------------------- running


@pytest.mark.parametrize("workers", [1, 2])
def test_diamond_is_built_once_and_reused(
    store: ArtifactStore, log_file: Path, workers: int, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    steps = diamond(log_file, seconds=0.05)
    progress = Recorder()
    # Every step is asked for twice over, in an unhelpful order, from equal graphs.
    report = build_all(
        [steps["bottom"], *diamond(log_file, seconds=0.05).values()], store, workers, progress
    )
    made = logged(log_file)
    assert sorted(made) == ["bottom", "left", "right", "top"]
    assert (made[0], made[3]) == ("top", "bottom")
    assert report[steps["bottom"]].json("value.json") == {
        "bottom": {
            "sides": [{"left": {"top": [{"top": {}}]}}, {"right": {"top": [{"top": {}}]}}],
            "top": [{"top": {}}],
        }
    }
    manifest = report[steps["left"]].manifest
    assert manifest["config"]["trainer"] == {"devices": 1, "max_steps": 10}
    assert manifest["inputs"] == {"top": steps["top"].fingerprint}
    assert (manifest["seed"], manifest["version"], manifest["label"]) == (0, 1, "left!")
    in_this_process = {report[one].manifest["summary"]["pid"] for one in steps.values()}
    assert (in_this_process == {os.getpid()}) == (workers == 1)
    assert [time.reused for time in report.steps] == [False] * 4
    assert {time.label: time.stage for time in report.steps}["left!"] == "test_make"
    assert all(0.05 <= time.seconds < 30 for time in report.steps if time.label != "bottom!")
    assert report.peak_memory_bytes > 20e6
    assert "made left" in progress.messages
    if workers == 2:
        shares = {line.split()[2] for line in log_file.read_text().splitlines()}
        assert shares == {str(max(1, len(os.sched_getaffinity(0)) // 2))}

    again = build_all(steps.values(), store, workers)
    assert len(logged(log_file)) == 4
    assert [(time.reused, time.seconds) for time in again.steps] == [(True, 0.0)] * 4
    assert again.artifacts == report.artifacts
    assert again.seconds < 1


def test_damaged_input_is_rebuilt_and_deleted_one_is_not(store, log_file: Path, caplog):
    steps = diamond(log_file)
    report = build_all([steps["bottom"]], store)
    (report[steps["left"]] / "value.json").write_text("{}")
    shutil.rmtree(report[steps["top"]].path)
    # To rebuild "left", "top" is needed; "right" and "bottom" are as good as they were.
    build_all([steps["bottom"]], ArtifactStore(store.root))
    assert sorted(logged(log_file)[4:]) == ["left", "top"]
    (warning,) = (record.getMessage() for record in caplog.records)
    assert f"test_make/{steps['left'].fingerprint}" in warning
    assert "value.json" in warning
    shutil.rmtree(report[steps["top"]].path)
    report = build_all([steps["bottom"]], ArtifactStore(store.root))
    assert len(logged(log_file)) == 6
    assert steps["top"].fingerprint not in report.artifacts
    assert len(report.artifacts) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_steps_that_differ_in_one_key_are_built_by_one_call(store, log_file: Path, workers: int):
    one, two, three, other = (
        replace(step(log_file, name, "test_together", seed=seed), together=frozenset({"name"}))
        for name, seed in (("one", 0), ("two", 0), ("three", 0), ("one", 1))
    )
    build_all([one], store, workers)
    report = build_all([one, two, other, three], store, workers)
    built = sorted(line.split()[0] for line in log_file.read_text().splitlines())
    assert built == ["one", "one", "two+three"]  # what was there is not built again
    for each, name in ((one, "one"), (two, "two"), (other, "one"), (three, "three")):
        artifact = report[each]
        assert artifact.json("value.json") == artifact.manifest["summary"]["name"] == name
        assert artifact.manifest["label"] == f"{name}!"
    assert [time.reused for time in report.steps] == [True, False, False, False]


class TwoSlots:
    """A pool without processes: whatever was submitted first is done first."""

    order: ClassVar[list[str]] = []

    def __init__(self, *_: object) -> None:
        self.queue: list = []

    def __enter__(self) -> TwoSlots:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @property
    def idle(self) -> int:
        return 2 - len(self.queue)

    def submit(self, key, label, function, job) -> None:
        TwoSlots.order.append(label)
        self.queue.append((key, function, job))

    def wait(self):
        key, function, job = self.queue.pop(0)
        return key, function(job, Recorder())


def test_the_longest_chain_goes_first(store: ArtifactStore, log_file: Path, monkeypatch):
    TwoSlots.order = []
    monkeypatch.setattr(building, "WorkerPool", TwoSlots)
    short = [step(log_file, f"short{index}", cost=2.0) for index in range(3)]
    first = step(log_file, "first", cost=1.0)
    last = step(log_file, "last", cost=5.0, inputs={"first": first})
    build_all([*short, last], store, workers=2)
    assert TwoSlots.order == ["first!", "short0!", "last!", "short1!", "short2!"]


@pytest.mark.parametrize("workers", [1, 2])
def test_first_failure_is_raised_as_it_was(store: ArtifactStore, log_file: Path, workers: int):
    bad = step(log_file, "bad", "test_fail", cost=9.0, logger="wait" if workers == 2 else "none")
    after = step(log_file, "after", inputs={"bad": bad})
    long = step(log_file, "long", "test_train", cost=8.0, trainer=Trainer(max_steps=600))
    steps = [bad, after] if workers == 1 else [bad, long, after]
    with pytest.raises(UserError) as caught:
        build_all(steps, store, workers)
    assert str(caught.value) == "bad is wrong: did you mean 'right'?"
    assert "bad!" in caught.value.__notes__[0]
    assert logged(log_file) == []  # nothing was begun after it
    if workers == 2:  # and what ran could save its state
        assert logged(log_file, "saved") == ["long"]
        assert store.find("test_train", long.fingerprint) is None
        begun = store.directory("test_train", long.fingerprint).with_name(
            f"{long.fingerprint}.partial"
        )
        assert read_json(begun / "checkpoints" / "last.json")["step"] < 600


def test_an_error_that_cannot_be_pickled_is_told_in_words():
    error = sendable(PickyError(1, 2), "the trace")
    assert type(error) is RuntimeError
    assert str(error) == "PickyError: 1 and 2"
    assert error.__notes__ == ["the trace"]
    assert type(sendable(UserError("x"), "the trace")) is UserError


def test_a_killed_worker_is_named(store: ArtifactStore, log_file: Path):
    steps = [step(log_file, "victim", "test_die"), step(log_file, "fine", seconds=0.1)]
    with pytest.raises(WorkerDied, match=r"'victim!' died \(SIGKILL.*resumes the rest"):
        build_all(steps, store, workers=2)
    commands = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    assert not any("spawn_main" in command for command in commands)


# ---------------------------------------------------------------- interruption


def drive(root: str, stage: str, workers: int) -> None:
    """The process that the tests below interrupt."""
    log_file = Path(root) / "log"
    steps = [step(log_file, name, stage, trainer=Trainer(max_steps=600)) for name in ("a", "b")]
    try:
        build_all(steps, ArtifactStore(Path(root) / "artifacts"), workers)
    except KeyboardInterrupt:
        print("interrupted", flush=True)


def start(tmp_path: Path, stage: str, workers: int, running: int) -> subprocess.Popen:
    """`drive` in a process group of its own, with ``running`` of its steps under way."""
    code = f"import test_run; test_run.drive({str(tmp_path)!r}, {stage!r}, {workers})"
    driver = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell's background job ignores the interrupt, and so would the children of its tests.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: len(logged(tmp_path / "log", stage.removeprefix("test_"))) == running)
    return driver


def ended(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=60)[1]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("workers", "to"), [(1, "the group"), (2, "the group"), (2, "the process")]
)
def test_ctrl_c_saves_and_the_next_run_resumes(tmp_path: Path, workers: int, to: str):
    driver = start(tmp_path, "test_train", workers, running=workers)
    children = psutil.Process(driver.pid).children(recursive=True)
    (os.kill if to == "the process" else os.killpg)(driver.pid, signal.SIGINT)
    output, _ = driver.communicate(timeout=60)
    assert output == "interrupted\n"
    assert driver.returncode == 0
    assert ended(children)
    assert sorted(logged(tmp_path / "log", "saved")) == ["a", "b"][:workers]

    store = ArtifactStore(tmp_path / "artifacts")
    saved = list(store.root.glob("test_train/*.partial/checkpoints/last.json"))
    assert len(saved) == workers
    for path in saved:  # go on near the end
        assert read_json(path)["step"] >= 1
        write_json(path, {"step": 599})
    begun = [name for name in ("a", "b")[:workers]]
    steps = [
        step(tmp_path / "log", name, "test_train", trainer=Trainer(max_steps=600)) for name in begun
    ]
    report = build_all(steps, store)
    assert [report[one].manifest["summary"]["first"] for one in steps] == [599] * workers


def test_second_ctrl_c_kills_at_once(tmp_path: Path):
    driver = start(tmp_path, "test_stubborn", workers=2, running=2)
    children = psutil.Process(driver.pid).children(recursive=True)
    os.killpg(driver.pid, signal.SIGINT)
    wait_until(lambda: len(logged(tmp_path / "log", "deaf")) == 2)
    time.sleep(0.5)
    assert driver.poll() is None
    os.killpg(driver.pid, signal.SIGINT)
    output, _ = driver.communicate(timeout=10)  # less than the workers' grace
    assert output == "interrupted\n"
    assert ended(children)


def test_workers_end_with_a_killed_parent(tmp_path: Path):
    driver = start(tmp_path, "test_train", workers=2, running=2)
    children = psutil.Process(driver.pid).children(recursive=True)
    assert len(children) >= 2
    driver.kill()
    driver.communicate()
    assert ended(children)
    assert sorted(logged(tmp_path / "log", "saved")) == ["a", "b"]


def test_progress_comes_from_the_workers(store: ArtifactStore, log_file: Path):
    progress = Recorder()
    names = ("a", "b")
    steps = [step(log_file, n, "test_train", trainer=Trainer(max_steps=4)) for n in names]
    build_all(steps, store, workers=2, progress=progress)
    opened = {event.description: event for event in progress.events if isinstance(event, Opened)}
    assert set(opened) == {"all steps", "a!", "b!"}
    for description, total in (("a!", 4), ("b!", 4), ("all steps", 2)):
        counted = sum(
            getattr(event, "steps", 0)
            for event in progress.events
            if getattr(event, "task", None) == opened[description].task
        )
        assert counted == total == opened[description].total


def test_a_run_says_what_is_left_also_from_what_earlier_ones_took(store, log_file):
    def said(name: str) -> list[float | None]:
        recorder = Recorder()
        build_all([step(log_file, f"{name}{n}", seconds=0.05) for n in (1, 2)], store, 1, recorder)
        (task,) = [e.task for e in recorder.events if getattr(e, "description", "") == "all steps"]
        return [
            event.left
            for event in recorder.events
            if isinstance(event, Advanced) and event.task == task and event.left is not None
        ]

    first, again = said("first"), said("second")
    assert len(first) == 2  # nothing is known before the first step is done
    assert first[0] > 0.05
    assert first[1] == 0
    assert len(again) == 3
    assert again[0] >= 0.1  # two steps, each as long as those that are stored
